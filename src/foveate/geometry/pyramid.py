"""Value pyramids: one array of cell values per scale, finest first, in which no parent is below its children.

The grid of scale k has ``ceil(shape / sizes[k])`` cells; cell i of scale k holds the children ``i * ratio + {0, 1}`` of
scale k - 1, those inside the image. Everything here is 3-D; a 2-D image is a volume of one slice.

Legend: C channels, D H W pixels, K scales.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foveate.geometry import kernels_detail as kernels
from foveate.geometry.kernels_fused import fused_merge

Sizes = tuple[tuple[int, ...], ...]
Triple = tuple[int, int, int]
Values = NDArray[np.float64]
Backend = Literal["numba", "eager"]


def triple(values: Sequence[int]) -> Triple:
    """One value per axis, 2 or 3 axes, as three: a 2-D image has one slice."""
    z, y, x = (1, *values) if len(values) == 2 else values
    return int(z), int(y), int(x)


def split_ratios(sizes: Sizes) -> list[Triple]:
    """How many children a cell of scale k + 1 has along each axis, for k = 0 .. K - 2."""
    return [triple([b // a for a, b in zip(triple(low), triple(high), strict=True)]) for low, high in pairwise(sizes)]


def grid_dims(shape: Sequence[int], sizes: Sizes) -> NDArray[np.int64]:
    """Number of cells along each axis at every scale, ``[K, 3]``."""
    return -(-np.array(triple(shape), np.int64) // np.array([triple(size) for size in sizes], np.int64))


def fold(values: Values, ratio: Sequence[int], how: Literal["sum", "max"] = "sum") -> Values:
    """Combine the children of every cell of the next scale; ``ratio`` is 1 or 2 per axis."""
    for axis, r in enumerate(ratio):
        if r == 1:
            continue
        first = (slice(None),) * axis
        out = values[(*first, slice(0, None, 2))].copy()
        odd = values[(*first, slice(1, None, 2))]
        part = out[(*first, slice(0, odd.shape[axis]))]
        (np.add if how == "sum" else np.maximum)(part, odd, out=part)
        values = out
    return values


def additive(finest: Values, sizes: Sizes) -> list[Values]:
    """The pyramid of an additive measure: a parent is the sum of its children."""
    levels = [finest]
    for ratio in split_ratios(sizes):
        levels.append(fold(levels[-1], ratio))
    return levels


def monotone_hull(levels: Sequence[Values], sizes: Sizes) -> list[Values]:
    """Raise every parent to the largest of its children, so that the order of splits is that of a greedy search."""
    raised = list(levels[:1])
    for values, ratio in zip(levels[1:], split_ratios(sizes), strict=True):
        raised.append(np.maximum(values, fold(raised[-1], ratio, "max")))
    return raised


def map_pyramid(
    values_CDHW: NDArray[Any], shape: Sequence[int], sizes: Sizes, backend: Backend = "numba"
) -> list[Values]:
    """The additive pyramid of a map of pixels."""
    finest = np.zeros(tuple(grid_dims(shape, sizes)[0]))
    step = kernels.cell_sum if backend == "numba" else kernels.cell_sum_eager
    step(values_CDHW, finest, triple(sizes[0]))
    return additive(finest, sizes)


def sample_sizes(sizes: Sizes, patch_size: Sequence[int]) -> list[Triple]:
    """Pixels per token sample along each axis at every scale, never below 1.

    Where the patch size does not divide the cells, the next coarser grid of samples that does is taken.
    """
    per_cell = []
    for least, side in zip(triple(sizes[0]), triple(patch_size) if len(patch_size) == 2 else patch_size, strict=True):
        if least >= side:
            per_cell.append(max(d for d in range(1, side + 1) if least % d == 0))
        else:
            per_cell.append(least << ((side // least).bit_length() - 1))
    cells = [triple(size) for size in sizes]
    return [(max(1, z // per_cell[0]), max(1, y // per_cell[1]), max(1, x // per_cell[2])) for z, y, x in cells]


def residual_pyramid(
    image_CDHW: NDArray[Any], shape: Sequence[int], sizes: Sizes, patch_size: Sequence[int], backend: Backend = "numba"
) -> list[Values]:
    """Exact squared error of coding every cell by its area means, one mean per sample of a token.

    The samples of a parent are the merged samples of its children, so its error is theirs plus that of merging. Cells
    whose samples are single pixels have none.
    """
    levels = merge_errors(image_CDHW, shape, sizes, patch_size, backend)
    extents = sample_sizes(sizes, patch_size)
    for k, ratio in enumerate(split_ratios(sizes), start=1):
        if extents[k - 1] != (1, 1, 1):
            levels[k] += fold(levels[k - 1], ratio)
    return levels


def gain_pyramid(
    image_CDHW: NDArray[Any],
    shape: Sequence[int],
    sizes: Sizes,
    patch_size: Sequence[int],
    keep: dict[Triple, NDArray[Any]] | None = None,
) -> list[Values]:
    """Squared error that splitting a cell saves per leaf that it costs, raised to the largest of its children.

    Spending leaves in this order comes closer to the optimal pruning than splitting the largest error, which may hide
    deeper than one split.
    """
    own = merge_errors(image_CDHW, shape, sizes, patch_size, keep=keep)
    return rank_by_gain(own, shape, sizes)


def rank_by_gain(saved: Sequence[Values], shape: Sequence[int], sizes: Sizes) -> list[Values]:
    """The hull of what every split saves, per leaf that it costs; the finest cells cannot be split."""
    dims, gains = grid_dims(shape, sizes), [np.zeros_like(saved[0])]
    for k, ratio in enumerate(split_ratios(sizes), start=1):
        sides = [np.minimum(r, fine - r * np.arange(n)) for r, fine, n in zip(ratio, dims[k - 1], dims[k], strict=True)]
        children = sides[0][:, None, None] * sides[1][None, :, None] * sides[2][None, None, :]
        gains.append(saved[k] / np.maximum(children - 1, 1))
    return [gains[0], *monotone_hull(gains[1:], sizes[1:])] if len(gains) > 1 else gains


def merge_errors(
    image_CDHW: NDArray[Any],
    shape: Sequence[int],
    sizes: Sizes,
    patch_size: Sequence[int],
    backend: Backend = "numba",
    keep: dict[Triple, NDArray[Any]] | None = None,
) -> list[Values]:
    """Squared error that a cell has more than its children together: the Haar energy of one more level of samples.

    ``keep`` receives the sums of pixels per sample, by the extent of the samples, as far as they are made whole.
    float64 images are measured from their first pixel, in float32.
    """
    if image_CDHW.dtype == np.float64:  # room for exact sums: equal pixels must have no error at all
        image_CDHW = (image_CDHW - image_CDHW.flat[0]).astype(np.float32)
    image_CDHW = np.ascontiguousarray(image_CDHW)  # the fused kernel reads rows as words
    length, dims = triple(shape), grid_dims(shape, sizes)
    extents, cells = sample_sizes(sizes, patch_size), [triple(size) for size in sizes]
    levels = [np.zeros(tuple(d)) for d in dims]
    state = _Merge(image_CDHW, length, backend)
    scales = _fusible(image_CDHW, extents, cells) if backend == "numba" else None
    if scales:
        energies, chosen = [levels[k] for k in scales], [cells[k] for k in scales]
        state.take(_fuse(image_CDHW, energies, chosen, length), (1, 16, 16))
    for k, extent in enumerate(extents):
        if any(a > b for a, b in zip(extent, state.extent, strict=True)):
            state.merge_to(extent, levels[k], cells[k])
        if keep is not None and extent == state.extent:
            keep[extent] = state.sums
    return levels


def _fusible(image_CDHW: NDArray[Any], extents: Sequence[Triple], cells: Sequence[Triple]) -> list[int]:
    """The scales that gain the error of the merges to 2, 4, 8, 16 pixels per sample, if one touch can make all four."""
    plain = all(e[0] == 1 and e[1] == e[2] and e[1].bit_count() == 1 for e in extents)
    if not plain or image_CDHW.dtype != np.uint8 or extents[-1][1] < 16 or min(image_CDHW.shape[2:]) < 64:
        return []
    scales = [next(k for k, extent in enumerate(extents) if extent[1] >= side) for side in (2, 4, 8, 16)]
    even = all(cells[k][2] // side % 2 == 0 for k, side in zip(scales, (2, 4, 8, 16), strict=True))
    return scales if even else []


class _Merge:
    """The sums of the samples so far, and the way to coarser ones."""

    def __init__(self, image_CDHW: NDArray[Any], length: Triple, backend: Backend) -> None:
        self.sums, self.length, self.extent = image_CDHW, length, (1, 1, 1)
        self.step = kernels.haar_step if backend == "numba" else kernels.haar_step_eager

    def merge_to(self, extent: Triple, energy: Values, cell: Triple) -> None:
        """Merge until samples have ``extent`` pixels; add the error of it to the grid of cells."""
        while self.extent != extent:
            need = [b // a for a, b in zip(self.extent, extent, strict=True)]
            ratio = triple([2 if n % 2 == 0 else n for n in need])
            merged = triple([a * r for a, r in zip(self.extent, ratio, strict=True)])
            dims = [-(-n // m) for n, m in zip(self.length, merged, strict=True)]
            sums = np.empty((self.sums.shape[0], *dims))
            self.step(self.sums, sums, energy, self.extent, self.length, ratio, (0, 0, 0), _block(cell, merged))
            self.sums, self.extent = sums, merged

    def take(self, sums: NDArray[Any], extent: Triple) -> None:
        """Go on from sums that were merged elsewhere."""
        self.sums, self.extent = sums, extent


def _block(cell: Triple, extent: Triple) -> Triple:
    """Samples per cell."""
    z, y, x = (max(1, c // e) for c, e in zip(cell, extent, strict=True))
    return z, y, x


def _fuse(
    image_CDHW: NDArray[Any], energies: Sequence[Values], cells: Sequence[Triple], length: Triple
) -> NDArray[np.float32]:
    """The first four merges of a uint8 picture; returns the sums of 16 x 16 pixels, ``[C, 1, H / 16, W / 16]``."""
    extents: list[Triple] = [(1, side, side) for side in (2, 4, 8, 16)]
    blocks = np.array([_block(cell, extent)[1:] for cell, extent in zip(cells, extents, strict=True)])
    dims = [-(-n // 16) for n in length[1:]]
    sums = np.empty((image_CDHW.shape[0], 1, *dims), np.float32)
    tall, wide = (n - n % 16 for n in length[1:])
    inner = sums[:, 0, : tall // 16, : wide // 16]
    fused_merge(image_CDHW[:, 0, :tall, :wide], inner, tuple(energy[0] for energy in energies), blocks)
    for top, left, bottom in ((0, wide, tall), (tall, 0, length[1])):  # what is left at the right, then below
        part: NDArray[Any] = np.ascontiguousarray(image_CDHW[:, :, top:bottom, left:])
        border = triple(part.shape[1:])
        if 0 in border:
            continue
        for energy, cell, extent in zip(energies, cells, extents, strict=True):
            merged = np.empty((part.shape[0], *(-(-n // e) for n, e in zip(border, extent, strict=True))))
            origin = (0, top // extent[1], left // extent[2])
            before = (1, extent[1] // 2, extent[2] // 2)
            kernels.haar_step(part, merged, energy, before, border, (1, 2, 2), origin, _block(cell, extent))
            part = merged
        sums[:, :, top // 16 : -(-bottom // 16), left // 16 :] = part
    return sums
