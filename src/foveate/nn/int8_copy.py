"""A copy of a projector of stored features that multiplies bytes, for a first look at bags of many patches.

Legend: R patches, F features, D width.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.nn.fast_copy import FastCopy, fast_copy
from foveate.nn.patch_encoder import FeatureProjector, PatchEncoder

_ROWS = 512  # that are normed at a time


class Int8Projector(FeatureProjector):
    """A projector whose first norm and linear map are in 8 bits: a scale for each row, and one for each output.

    Args:
        net: what it stands for; a batch norm should be folded.
    """

    weight_DF: Tensor
    scale_D: Tensor
    bias_D: Tensor

    def __init__(self, net: FeatureProjector) -> None:
        nn.Module.__init__(self)
        norm, linear, *rest = net.layers
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(linear, nn.Linear)
        self.in_chans, self.width, self.eps = net.in_chans, net.width, norm.eps
        self.layers = nn.Sequential(*rest)
        weight_DF, scale_D1 = _in_bytes(linear.weight.clone())
        for name, value in (("weight_DF", weight_DF), ("scale_D", scale_D1[:, 0]), ("bias_D", linear.bias)):
            self.register_buffer(name, value)

    def mapped(self, x: Shaped[Tensor, "R F"]) -> Float[Tensor, "R D"]:
        """Norm and linear map of rows; a row that holds NaN or infinities gives NaN."""
        rows_RF, scale_R1 = map(torch.cat, zip(*map(self._normed, x.split(_ROWS)), strict=True))
        product_RD = torch._int_mm(rows_RF, self.weight_DF.T).float()
        return torch.addcmul(self.bias_D, product_RD.mul_(scale_R1), self.scale_D)

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer norm gives, in bytes; its division becomes part of their scale."""
        rows = x.float() - x.mean(1, keepdim=True, dtype=torch.float32)
        square_R1 = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square() / self.in_chans
        bytes_, scale_R1 = _in_bytes(rows)
        return bytes_, scale_R1 / (square_R1 + self.eps).sqrt()


def _in_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Every row as whole numbers from -127 to 127, and what one of them is worth in it; overwrites its argument."""
    most = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    scale = most.clamp_min(torch.finfo(torch.float32).tiny) / 127
    return rows.mul_(1 / scale).round_().to(torch.int8), scale


@torch.no_grad()
def int8_copy(encoder: nn.Module) -> FastCopy:
    """Copy an encoder of stored features as it is in evaluation mode, its matrix in 8 bits.

    As with `fast_copy`, a batch norm is folded, and the copy does not follow later changes of the weights. A row's bits
    depend on the row alone.

    Args:
        encoder: stays as it is; on the CPU.

    Raises:
        ConfigError: it is no `FeatureProjector`, or not on the CPU.

    Cost: one copy of the weights; on processors with 8-bit products half the time of bfloat16. What is lost: about 1 %
    of a row's vector, and more where single features are many times the others. Choose by it with a judge
    (`PatchSelector`).
    """
    net = encoder.net if isinstance(encoder, PatchEncoder) else encoder
    if not isinstance(net, FeatureProjector) or net is encoder:
        raise ConfigError(
            f"precision='int8' for {type(net).__name__}: 8 bits are for stored features (encoder='features'); "
            "choose bf16"
        )
    device = next(net.parameters()).device
    if device.type != "cpu":
        raise ConfigError(f"precision='int8' on {device}: 8 bits are for the CPU; choose bf16")
    fast = fast_copy(encoder)
    assert isinstance(fast.encoder, PatchEncoder)
    assert isinstance(fast.encoder.net, FeatureProjector)
    fast.encoder.net = Int8Projector(fast.encoder.net)
    return fast.eval()
