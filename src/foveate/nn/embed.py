"""Patch and box to token: what a leaf shows, where it lies, and how large it is. Nothing depends on a token's index.

Legend: T tokens of a pack, D width, N dimensions, G side of the position grid, H heads, E width of a head, F features.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ShapeError
from foveate.geometry.patches import Patches

_OCTAVES = 8


class PatchEmbed(nn.Module):
    """The patch projection of a ViT, as one matrix product on packed patches.

    ``proj`` has the weight of timm's convolution with kernel = stride = P, and gives the same numbers.

    Args:
        num_dims: 2 or 3.
        in_chans: C.
        width: D.
        patch_size: P.
    """

    def __init__(self, num_dims: int, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        conv = nn.Conv2d if num_dims == 2 else nn.Conv3d
        self.proj = conv(in_chans, width, patch_size, stride=patch_size)

    def forward(self, patches: Patches) -> Float[Tensor, "T D"]:
        """Project every patch.

        Raises:
            ShapeError: the patches have other channels or another size than the weight.
        """
        pixels, weight = patches.pixels, self.proj.weight
        if pixels.shape[1:] != weight.shape[1:]:
            raise ShapeError(
                f"patches of {tuple(pixels.shape[1:])} (channels, P, ...) but the model wants "
                f"{tuple(weight.shape[1:])}: patchify with the model's patch_size and in_chans"
            )
        return functional.linear(pixels.flatten(1).to(weight.dtype), weight.flatten(1), self.proj.bias)


def axis_weights(start: Int64[Tensor, " T"], stop: Int64[Tensor, " T"], extent: int, grid: int) -> Float[Tensor, "T G"]:
    """How much of each entry of a one-dimensional table a span of an axis sees; rows sum to 1.

    The table's entries sit at the centres of ``grid`` equal cells. A span of n cells is sampled at the centres of n
    equal parts (at least one), each bilinear between entries: one cell gives its entry exactly, two give their mean.

    Args:
        start: first pixel of each span.
        stop: last pixel plus one.
        extent: pixels of the axis.
        grid: entries of the table, G.
    """
    cells = (stop - start).double() * (grid / extent)
    parts = cells.round().clamp_min(1)
    number = torch.arange(int(parts.max()), device=start.device)
    at_TQ = (start.double()[:, None] * (grid / extent) + (number + 0.5) / parts[:, None] * cells[:, None]) - 0.5
    at_TQ = at_TQ.clamp(0, grid - 1)
    low_TQ = at_TQ.floor().clamp_max(max(grid - 2, 0))
    high_TQ = at_TQ - low_TQ
    share_TQ = (number < parts[:, None]) / parts[:, None]
    weights_TG = torch.zeros(len(start), grid, dtype=torch.float64, device=start.device)
    weights_TG.scatter_add_(1, low_TQ.long(), (1 - high_TQ) * share_TQ)
    weights_TG.scatter_add_(1, (low_TQ.long() + 1).clamp_max(grid - 1), high_TQ * share_TQ)
    return weights_TG.float()


@torch.no_grad()
def grid_weights(patches: Patches, grid: int) -> Float[Tensor, "T G_N"]:
    """How much of each entry of a G^N position table every leaf sees: the box average of the interpolated table.

    Args:
        patches: the pack; each image's whole extent spans the table.
        grid: G.
    """
    rows = []
    for leaves in patches.leaves:
        boxes = leaves.boxes
        weights = torch.ones(len(leaves), 1)
        for axis, extent in enumerate(leaves.shape):
            one = axis_weights(boxes[:, 0, axis], boxes[:, 1, axis], extent, grid)
            weights = (weights[:, :, None] * one[:, None, :]).flatten(1)
        rows.append(weights)
    return torch.cat(rows).to(patches.pixels.device)


@torch.no_grad()
def geometry_features(patches: Patches) -> Float[Tensor, "T F"]:
    """Fourier features of each leaf's centre (relative to its image) and the logarithm of its size in patch samples."""
    rows = []
    frequency = 2.0 ** torch.arange(_OCTAVES) * math.pi
    for leaves in patches.leaves:
        extent = torch.tensor(leaves.shape, dtype=torch.float32)
        centre_TN = leaves.boxes.float().mean(1) / extent
        size_TN = torch.log2(leaves.size.float() / patches.patch_size)
        phase_TF = (centre_TN[:, :, None] * frequency).flatten(1)
        rows.append(torch.cat([phase_TF.sin(), phase_TF.cos(), size_TN / 4], 1))
    return torch.cat(rows).to(patches.pixels.device)


class GeometryEmbed(nn.Module):
    """A learned code of place and size that starts at zero, so that a pretrained ViT is not disturbed.

    Args:
        num_dims: N.
        width: D.
    """

    def __init__(self, num_dims: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear((2 * _OCTAVES + 1) * num_dims, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, patches: Patches) -> Float[Tensor, "T D"]:
        """One code per leaf."""
        code: Tensor = self.fc2(functional.gelu(self.fc1(geometry_features(patches).to(self.fc1.weight.dtype))))
        return code


@torch.no_grad()
def rotary_angles(patches: Patches, head_width: int, *, base: float = 1000.0) -> Float[Tensor, "T E2"]:
    """Angles of the rotary position of each leaf's centre, in units of ``patch_size`` pixels, axes side by side.

    Args:
        patches: the pack.
        head_width: E; the E // 2 pairs are shared out evenly over the axes, what is left is not turned.
        base: longest period over shortest.
    """
    num_dims, pairs = patches.num_dims, head_width // 2
    per_axis = pairs // num_dims
    frequency = base ** (-torch.arange(per_axis) / max(per_axis, 1))
    centre_TN = torch.cat([leaves.centre for leaves in patches.leaves]) / patches.patch_size
    angles_TF = (centre_TN[:, :, None] * frequency).flatten(1)
    return functional.pad(angles_TF, (0, pairs - angles_TF.shape[1])).to(patches.pixels.device)


def rotate(x_THE: Float[Tensor, "T H E"], angles_TF: Float[Tensor, "T E2"]) -> Float[Tensor, "T H E"]:
    """Turn pairs of a head's channels by the given angles."""
    sin, cos = angles_TF.sin()[:, None, :], angles_TF.cos()[:, None, :]
    even, odd = x_THE[..., 0::2].float(), x_THE[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2).to(x_THE.dtype)
