"""A copy of a patch encoder for passes without gradient: norms folded, channels last, half precision."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from foveate.nn.patch_encoder import FeatureProjector, PatchEncoder, SmallCNN
from foveate.nn.resnet import ResNet


class FastCopy(nn.Module):
    """Calls a network in another type and memory layout; takes floats of any kind and gives float32.

    Args:
        encoder: the copy.
        dtype: what it computes in; None: it takes what comes as it is.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.encoder, self.dtype = encoder.to(dtype), dtype

    @property
    def halves(self) -> bool:
        """Whether stored halves are best given as they are."""
        return self.dtype is None

    def forward(self, x: Tensor) -> Tensor:
        """One vector per patch."""
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        out: Tensor = self.encoder(x if self.dtype is None else x.to(self.dtype, memory_format=layout))
        return out.float()


@torch.no_grad()
def fast_copy(encoder: nn.Module, dtype: torch.dtype = torch.float32) -> FastCopy:
    """Copy an encoder as it is in evaluation mode, for speed.

    In our own networks batch norms are folded into the convolution or linear map before them. The copy does not follow
    later changes of the weights: make one per training step.

    Args:
        encoder: stays as it is.
        dtype: float32 changes vectors by rounding alone; bfloat16 by about 0.3 %, so that a few of the patches of
            nearly equal rank may change places.

    Cost: one copy of the weights.
    """
    fast = copy.deepcopy(encoder).eval().requires_grad_(False)
    for module in list(fast.modules()):
        if isinstance(module, PatchEncoder) and isinstance(module.net, ResNet | SmallCNN | FeatureProjector):
            _fold(module.net)
    for module in fast.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return FastCopy(fast, dtype).eval()


def _fold(net: nn.Module) -> None:
    """In these networks a batch norm always takes what the module before it in its parent gives."""
    for parent in list(net.modules()):
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if before is not None and isinstance(child, nn.modules.batchnorm._BatchNorm):
                if isinstance(before[1], nn.Conv2d):
                    setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                    setattr(parent, name, nn.Identity())
                elif isinstance(before[1], nn.Linear):
                    setattr(parent, before[0], fuse_linear_bn_eval(before[1], child))
                    setattr(parent, name, nn.Identity())
            before = (name, child)
