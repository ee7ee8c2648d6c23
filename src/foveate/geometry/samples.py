"""Where the P^N samples of every leaf lie: under a pixel, beside a leaf, and on how many pixels.

A sample of a leaf of size s covers s/P pixels per axis. Its *flat index* is ``leaf * P**N + sample``, the row of
``pixels.movedim(1, -1).flatten(0, -2)``.

Legend: L leaves, N spatial axes, P patch_size.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry import kernels_patches as kernels
from foveate.geometry.boxes import check_box
from foveate.geometry.kernels_paint import index_paint
from foveate.geometry.leaves import Leaves

Box = Sequence[Sequence[int]]


def check_patch_size(patch_size: int) -> int:
    """Return the side of a patch in samples, or raise ShapeError when it is below 1."""
    if patch_size < 1:
        raise ShapeError(f"patch_size={patch_size} must be at least 1 sample per side; 8 or 16 is usual")
    return patch_size


def as_volume(values: Tensor | Sequence[int], fill: int) -> NDArray[np.int64]:
    """Give per-axis values of a 2-D image a first axis, so that the kernels only know volumes."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.int64)
    if array.shape[-1] == 2:
        array = np.concatenate([np.full_like(array[..., :1], fill), array], axis=-1)
    return np.ascontiguousarray(array, dtype=np.int64)


def cells_of(leaves: Leaves) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return start, stop and size of the leaves as volumes ``[L, 3]``."""
    return as_volume(leaves.start, 0), as_volume(leaves.stop, 1), as_volume(leaves.size, 1)


def sample_area(leaves: Leaves, patch_size: int = 16) -> Float32[Tensor, "L *P"]:
    """Return how many valid pixels each sample covers: the weight of a sample in a loss per pixel.

    Args:
        leaves: the cells.
        patch_size: samples per side of a patch, P >= 1.

    Returns:
        Pixels per sample, not always whole; 0 for samples outside the image. A leaf's samples sum to its area.
    """
    check_patch_size(patch_size)
    edge = torch.arange(patch_size + 1, device=leaves.device)[None, None]  # in units of s/P pixels
    edge_LNP = torch.minimum(edge * leaves.size[..., None], (leaves.stop - leaves.start)[..., None] * patch_size)
    area = edge_LNP.diff(dim=-1).double() / patch_size
    total = area[:, 0]
    for axis in range(1, leaves.num_dims):
        total = total[..., None] * area[:, axis].reshape(len(leaves), *(1,) * axis, patch_size)
    return total.float()


def sample_index(
    leaves: Leaves, patch_size: int = 16, box: Box | None = None, *, backend: str = "numba"
) -> Int[Tensor, "*S"]:
    """Return, for every pixel, the flat index of the sample under its centre.

    Args:
        leaves: the cells.
        patch_size: samples per side of a patch, P >= 1.
        box: window (start, stop) in level-0 pixels; the whole image when left out.
        backend: "numba", or "eager" for plain torch on the leaves' device.

    Returns:
        Flat indices, -1 where no leaf lies; int32 when they fit, else int64.

    Cost: O(L + pixels of the window) time, 4 or 8 bytes per pixel.
    """
    check_patch_size(patch_size)
    start, stop = check_box(box, leaves.shape) if box is not None else ((0,) * leaves.num_dims, leaves.shape)
    dtype = torch.int32 if len(leaves) * patch_size**leaves.num_dims < 1 << 31 else torch.int64
    window = tuple(b - a for a, b in zip(start, stop, strict=True))
    if backend == "eager":
        axes = [torch.arange(a, b, device=leaves.device) for a, b in zip(start, stop, strict=True)]
        pixel = torch.cartesian_prod(*axes)
        leaf = leaves.cell_at(pixel)
        flat = leaf
        for axis in range(leaves.num_dims):
            offset = 2 * (pixel[:, axis] - leaves.start[leaf, axis]) + 1
            flat = flat * patch_size + offset * patch_size // (2 * leaves.size[leaf, axis])
        return torch.where(leaf >= 0, flat, -1).view(window).to(dtype)
    index = torch.full(window, -1, dtype=dtype)
    volume = index.numpy().reshape(as_volume(window, 1))
    first, last, size = cells_of(leaves)
    patch = as_volume((patch_size,) * leaves.num_dims, 1)
    index_paint(first, size, last, patch, as_volume(start, 0), volume)
    return index.to(leaves.device)


def halo_index(
    leaves: Leaves, patch_size: int = 16, *, border: str = "empty", backend: str = "numba"
) -> Int64[Tensor, "L *H"]:
    """Return the flat sample index under each leaf's grid of samples padded by one sample on every side.

    With it a convolution runs over leaves of any size: gather, then convolve without padding. On a uniform grid this
    is the dense convolution with zero padding.

    Args:
        leaves: the cells, of any mixture of sizes.
        patch_size: samples per side of a patch, P >= 1; 1 stands for the tokens themselves.
        border: "empty" gives -1 where no leaf lies; "repeat" moves points outside the image to its nearest pixel
            first, also for the samples of border leaves.
        backend: "numba", or "eager" for plain torch on the leaves' device.

    Returns:
        ``[L, P + 2, ...]``: the own samples inside; around them the neighbour's sample under the centre of the halo
        sample, whatever the neighbour's size; -1 where there is no leaf.

    Cost: O(L P^(N-1) log L) time, 8 L (P + 2)^N bytes.
    """
    check_patch_size(patch_size)
    if border not in ("empty", "repeat"):
        raise ShapeError(f"border={border!r} must be 'empty' or 'repeat'")
    if backend == "eager":
        return _halo_eager(leaves, patch_size, border == "repeat")
    return halo_rows(leaves, patch_size, np.arange(len(leaves)), border == "repeat").to(leaves.device)


def halo_rows(leaves: Leaves, patch_size: int, which: NDArray[np.int64], repeat: bool) -> Tensor:
    """Return the rows ``which`` of ``halo_index``, on the CPU, at the cost of these rows only."""
    out = torch.empty((len(which), *(patch_size + 2,) * leaves.num_dims), dtype=torch.int64)
    if len(which) == 0:
        return out
    codes, order = (part.cpu().numpy() for part in leaves._codes)
    lead = 3 - leaves.num_dims
    bits = [
        lead + axis
        for fine, coarse in pairwise(leaves.sizes)
        for axis in reversed(range(leaves.num_dims))
        if coarse[axis] != fine[axis]
    ]
    roots = [-(-extent // side) for extent, side in zip(leaves.shape, leaves.sizes[-1], strict=True)]
    grid: tuple[Any, ...] = (as_volume(leaves.sizes[0], 1), np.array(bits, dtype=np.int64), as_volume(roots, 1))
    patch = as_volume((patch_size,) * leaves.num_dims, 1)
    volume = out.numpy().reshape(-1, *(patch + 2 * (np.arange(3) >= lead)))
    start, _, size = cells_of(leaves)
    kernels.halo_gather(start, size, which, patch, codes, order, *grid, as_volume(leaves.shape, 1), repeat, volume)
    return out


def _halo_eager(leaves: Leaves, patch_size: int, repeat: bool) -> Tensor:
    num, device = leaves.num_dims, leaves.device
    place = torch.cartesian_prod(*(torch.arange(-1, patch_size + 1, device=device),) * num)
    inside = ((place >= 0) & (place < patch_size)).all(dim=-1)
    # twice P times the distance of the sample's centre from the leaf's start, in pixels
    twice = (2 * place[None] + 1) * leaves.size[:, None]
    pixel = leaves.start[:, None] + twice.div(2 * patch_size, rounding_mode="floor")
    if repeat:
        near = torch.minimum(pixel.clamp(min=0), leaves._extent - 1)
        twice = torch.where(near != pixel, (2 * (near - leaves.start[:, None]) + 1) * patch_size, twice)
        pixel = near
    own = torch.arange(len(leaves), device=device)[:, None]
    leaf = torch.where(inside[None], own, leaves.cell_at(pixel.flatten(0, 1)).view(len(leaves), -1))
    flat = leaf
    for axis in range(num):
        offset = 2 * patch_size * (leaves.start[:, None, axis] - leaves.start[leaf, axis]) + twice[..., axis]
        flat = flat * patch_size + offset.div(2 * leaves.size[leaf, axis], rounding_mode="floor")
    return torch.where(leaf >= 0, flat, -1).view(len(leaves), *(patch_size + 2,) * num)
