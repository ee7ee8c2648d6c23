"""What the stages of every decoder in token space are made of.

Legend: T leaves of a pack, n leaves of a chunk, S samples of a leaf, R = T * S rows, H samples of a leaf with its halo,
C channels, D token width, K classes, N dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import Patches
from foveate.nn.halo import HaloConv


class HaloBlock(nn.Module):
    """Halo convolution, norm over channels, modulation by the size of the leaf, GELU.

    Args:
        num_dims: N, 2 or 3.
        channels: C.
    """

    def __init__(self, num_dims: int, channels: int) -> None:
        super().__init__()
        self.conv = HaloConv(num_dims, channels, channels)
        self.norm = nn.LayerNorm(channels)
        modulate = nn.Linear(16, 2 * channels)
        nn.init.zeros_(modulate.weight)  # a fresh decoder treats all sizes alike
        nn.init.zeros_(modulate.bias)
        self.modulation = nn.Sequential(nn.Linear(num_dims, 16), nn.GELU(), modulate)

    def forward(self, padded_nHC: Tensor, scale_nN: Tensor) -> Tensor:
        """Rows ``[n * S, C]`` of leaves padded by one sample, ``[n, H, C]``, whose sizes `log_scale` gave."""
        y_RC = self.norm(self.conv.convolve(padded_nHC))
        y_TSC = y_RC.view(len(scale_nN), -1, y_RC.shape[1])
        gain_T1C, shift_T1C = self.modulation(scale_nN)[:, None].chunk(2, dim=-1)
        return functional.gelu(torch.addcmul(shift_T1C, y_TSC, 1 + gain_T1C)).view_as(y_RC)


def double(x_RC: Tensor, side: int, num_dims: int) -> Tensor:
    """Rows of ``side``^N samples with 2^N * C channels (sub-sample first) to rows of (2 side)^N samples with C."""
    grid = x_RC.view(-1, *(side,) * num_dims, *(2,) * num_dims, x_RC.shape[1] >> num_dims)
    pairs = [axis for i in range(num_dims) for axis in (1 + i, 1 + num_dims + i)]
    return grid.permute(0, *pairs, 1 + 2 * num_dims).reshape(-1, x_RC.shape[1] >> num_dims)


def log_scale(leaves: Sequence[Leaves], patch_size: int) -> Tensor:
    """log2 of pixels per sample and axis: 0 where a leaf is stored at its own resolution."""
    return (torch.cat([one.size for one in leaves]).to(torch.float32) / patch_size).log2()


def check_settings(num_dims: int, num_classes: int, patch_size: int, num_hidden: int, channels: int) -> None:
    """Refuse what no decoder can be built from.

    Raises:
        ConfigError: no 2 or 3 dimensions, or a number below 1.
    """
    if num_dims not in (2, 3):
        raise ConfigError(f"num_dims={num_dims}: leaves are 2-D or 3-D; pass 2 or 3")
    settings = {"num_classes": num_classes, "patch_size": patch_size, "num_hidden": num_hidden, "channels": channels}
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: a decoder needs at least 1; pass {name} >= 1")


def check_hidden(hidden: tuple[Tensor, ...], patches: Patches, num_hidden: int, patch_size: int) -> None:
    """Refuse hidden states and patches that a decoder was not built for.

    Raises:
        ShapeError: too few or many hidden states, patches of another size, or tokens and patches that differ in number.
    """
    if len(hidden) != num_hidden:
        raise ShapeError(
            f"{len(hidden)} hidden states: the decoder was built for {num_hidden}; give the encoder as many out_blocks"
        )
    if patches.pixels.shape[-1] != patch_size:
        raise ShapeError(
            f"patches of {patches.pixels.shape[-1]} samples per side: the decoder was built for {patch_size}; "
            f"call patchify with patch_size={patch_size}"
        )
    if any(len(x_TD) != len(patches.pixels) for x_TD in hidden):
        raise ShapeError(
            f"hidden states of {[len(x_TD) for x_TD in hidden]} tokens for {len(patches.pixels)} patches: "
            f"drop the prefix tokens first"
        )
