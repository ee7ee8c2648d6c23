"""A copy of a projector of stored features that multiplies bytes, for a first look at bags of many patches.

Its kernels are compiled when this is imported, so import it where it is used.

Legend: R patches, F features, D width.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.nn.fast_copy import FastCopy, fast_copy
from foveate.nn.kernels_bytes import products_to_floats, rows_to_bytes
from foveate.nn.patch_encoder import FeatureProjector, PatchEncoder

_ROWS = 64  # that are floats at a time, so that they stay in the cache


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
        self.layers = nn.Sequential(*rest[:-1], nn.ReLU(inplace=True))
        scale_D = linear.weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        weight_DF = (linear.weight / scale_D[:, None]).round_().to(torch.int8)
        for name, value in (("weight_DF", weight_DF), ("scale_D", scale_D), ("bias_D", linear.bias)):
            self.register_buffer(name, value)

    def mapped(self, x: Shaped[Tensor, "R F"]) -> Float[Tensor, "R D"]:
        """Norm and linear map of rows; a row that holds NaN or infinities gives NaN."""
        bytes_RF, scale_R = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
        floats = torch.empty(min(_ROWS, len(x)), x.shape[1])
        for some, bytes_, scale in zip(x.split(_ROWS), bytes_RF.split(_ROWS), scale_R.split(_ROWS), strict=True):
            part = floats[: len(some)].copy_(some)
            rows_to_bytes(part.numpy(), bytes_.numpy(), scale.numpy(), self.eps)
        product_RD = torch._int_mm(bytes_RF, self.weight_DF.T)
        out = torch.empty(product_RD.shape)
        column, bias = self.scale_D.numpy(), self.bias_D.numpy()
        products_to_floats(product_RD.numpy(), scale_R.numpy(), column, bias, out.numpy())
        return out


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
    fast, halves = fast_copy(encoder), not encoder._mean  # what is taken from features is taken in float32
    assert isinstance(fast.encoder, PatchEncoder)
    assert isinstance(fast.encoder.net, FeatureProjector)
    fast.encoder.net = Int8Projector(fast.encoder.net)
    return FastCopy(fast.encoder, None if halves else torch.float32).eval()
