"""Adaptive leaves: cut an image finely where it has detail and coarsely where it has not.

Greedy splitting of the largest value is a sort: a parent is never below its children, so the cells that are split are
the first in the order (value descending, preorder ascending). One walk from the roots finds them; after the value
pyramid its cost depends on the number of leaves only.

Legend: B images, K scales, L leaves, N spatial axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import BudgetError, ConfigError, ShapeError
from foveate.geometry import kernels_tree as kernels
from foveate.geometry.boxes import check_size
from foveate.geometry.detail import AdditiveMap, Residual, get_detail
from foveate.geometry.image import Real, as_image
from foveate.geometry.leaves import Leaves
from foveate.geometry.pyramid import Backend, Sizes, Triple, Values, grid_dims, split_ratios

Stop = Literal["fill", "reference"]
Image = Shaped[Tensor, "C *S"] | Shaped[np.ndarray, "C *S"]
Size = int | Sequence[int]


def adaptive_leaves(
    image: Image,
    max_leaves: int | None = None,
    *,
    tolerance: Real | None = None,
    min_size: Size = 8,
    max_size: Size | None = None,
    patch_size: Size | None = None,
    detail: Any = "residual",
    spacing: Sequence[Real] | None = None,
    stop: Stop = "fill",
) -> Leaves:
    """Cut an image into leaves, small where it has detail and large where it is quiet.

    The result is exactly that of splitting the leaf with the most detail again and again, found without doing so;
    for ``residual`` under a budget the leaf whose split saves the most error per leaf.
    Works for any shape in 2-D and 3-D; one root cell covers the image unless ``max_size`` asks for a forest.

    Args:
        image: ``[C, H, W]`` or ``[C, D, H, W]``, array or tensor, any real number type, finite.
        max_leaves: never more leaves than this, >= 1. Either this or ``tolerance``, or both.
        tolerance: split every cell whose detail is above it; in the unit of the detail (for ``residual``: squared error
            summed over pixels and channels).
        min_size: side of the smallest leaf in pixels, or one per axis.
        max_size: upper bound of the side of the largest leaf; default: one cell that covers the image.
        patch_size: samples per token and axis that ``residual`` is measured against; default ``min_size``.
        detail: what to cut for: a name (see `foveate.geometry.detail.list_details`), a map ``[*S]`` of values >= 0, a
            function from image to map, or a mapping from these to weights.
        spacing: size of a pixel in mm per axis; a cell is cut along its longest axes first until it is about cubic.
        stop: "fill" leaves cells without detail whole and goes on past the smallest ones. "reference" is the published
            rule: cells without detail are split too, and everything stops when a smallest cell comes up. Values are
            then integers: the count of 255s of a map of 0 and 255, else the truncated sum; 2-D order is y-flipped.

    Returns:
        Leaves that cover the image, in Z-order with the last axis fastest.

    Raises:
        BudgetError: ``max_leaves`` is below 1 or below the number of roots, or no bound is given.
        ShapeError: the image, a size or the spacing has an impossible shape or value.
        FormatError: NaN, Inf or negative values in image or map.
        ConfigError: an unknown detail or stop rule.

    Cost: one pass over the image for the detail, then O(L log L) time and O(L) memory.
    Source: Zhang et al., SC24, arXiv 2404.09707.
    **Differs**: residual instead of Canny edges, ranked under a budget by what a split saves; any shape and count; flat
    cells are not split and smallest cells do not end the walk; no random thresholds. ``stop="reference"`` gives the
    published tree, leaf for leaf.
    """
    options = _Options.check(
        max_leaves, tolerance, min_size, max_size, patch_size, detail, spacing, stop, image.ndim - 1
    )
    return _grow([image], options)[0]


def adaptive_leaves_batch(
    images: Sequence[Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."]],
    max_leaves: int | None = None,
    *,
    tolerance: Real | None = None,
    min_size: Size = 8,
    max_size: Size | None = None,
    patch_size: Size | None = None,
    detail: Any = "residual",
    spacing: Sequence[Real] | None = None,
) -> tuple[Leaves, ...]:
    """Cut a batch with one budget: leaves go to the images that need them.

    Args:
        images: images as in `adaptive_leaves`, of any shapes, all 2-D or all 3-D.
        max_leaves: never more leaves than this in all images together, >= 1 per image.
        tolerance: as in `adaptive_leaves`.
        min_size: as in `adaptive_leaves`.
        max_size: as in `adaptive_leaves`.
        patch_size: as in `adaptive_leaves`.
        detail: as in `adaptive_leaves`; a name, a function or a mixture, since a map belongs to one image.
        spacing: as in `adaptive_leaves`, the same for all images.

    Returns:
        The leaves of every image; an image keeps at least its roots.

    Raises:
        As `adaptive_leaves`; ShapeError too when 2-D and 3-D images are mixed.

    Cost: as `adaptive_leaves`, with L counted over the batch.
    """
    dims = {image.ndim for image in images}
    if len(dims) != 1:
        raise ShapeError(f"a batch needs images that are all 2-D or all 3-D, got array dimensions {sorted(dims)}")
    num_dims = dims.pop() - 1
    options = _Options.check(max_leaves, tolerance, min_size, max_size, patch_size, detail, spacing, "fill", num_dims)
    return tuple(_grow(images, options))


def cell_sizes(
    shape: Sequence[int],
    min_size: Sequence[int],
    max_size: Sequence[int] | None = None,
    spacing: Sequence[Real] | None = None,
) -> Sizes:
    """The side of the cells at every scale, finest first.

    A step up doubles the axes whose extent in mm is at most sqrt(2) times the shortest one: all of them for isotropic
    cells, only the fine ones until an anisotropic cell is about cubic.

    Args:
        shape: spatial shape of the image in pixels.
        min_size: finest cell in pixels, per axis.
        max_size: no cell is larger than this along any axis; default: the last cell covers the image.
        spacing: pixel size in mm per axis; default 1.

    Returns:
        The sizes.
    """
    unit = spacing or (1.0,) * len(shape)
    sizes = [tuple(int(side) for side in min_size)]
    while True:
        last = sizes[-1]
        extent = [side * step for side, step in zip(last, unit, strict=True)]
        limit = math.sqrt(2.0) * min(extent) * (1 + 1e-9)
        larger = tuple(side * 2 if e <= limit else side for side, e in zip(last, extent, strict=True))
        if max_size is not None and any(a > b for a, b in zip(larger, max_size, strict=True)):
            return tuple(sizes)
        if all(a >= b for a, b in zip(last, shape, strict=True)):
            return tuple(sizes)
        sizes.append(larger)


@dataclass(frozen=True)
class _Options:
    """The checked arguments."""

    max_leaves: int | None
    tolerance: Real | None
    min_size: tuple[int, ...]
    max_size: tuple[int, ...] | None
    patch_size: tuple[int, ...]
    detail: Any
    spacing: tuple[float, ...] | None
    stop: Stop
    backend: Backend = "numba"

    @classmethod
    def check(
        cls,
        max_leaves: int | None,
        tolerance: Real | None,
        min_size: Size,
        max_size: Size | None,
        patch_size: Size | None,
        detail: Any,
        spacing: Sequence[Real] | None,
        stop: Stop,
        num_dims: int,
    ) -> "_Options":
        if num_dims not in (2, 3):
            raise ShapeError(f"image has {num_dims + 1} axes; give [C, H, W] or [C, D, H, W]")
        if max_leaves is None and tolerance is None:
            raise BudgetError("max_leaves=None and tolerance=None bound nothing; give one of them")
        if max_leaves is not None and max_leaves < 1:
            raise BudgetError(f"max_leaves={max_leaves} must be at least 1; a whole image is one leaf")
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise BudgetError(f"tolerance={tolerance} must be finite and >= 0; 0 splits wherever there is detail")
        if stop not in ("fill", "reference"):
            raise ConfigError(f"stop={stop!r} must be 'fill' or 'reference'")
        if stop == "reference" and (max_leaves is None or tolerance is not None):
            raise ConfigError("stop='reference' is the published fixed-length rule; give max_leaves and no tolerance")
        least = check_size(min_size, num_dims, "min_size")
        most = None if max_size is None else check_size(max_size, num_dims, "max_size")
        if most is not None and any(a > b for a, b in zip(least, most, strict=True)):
            raise ShapeError(f"max_size={max_size} must not be below min_size={min_size}")
        samples = least if patch_size is None else check_size(patch_size, num_dims, "patch_size")
        unit = None if spacing is None else tuple(float(step) for step in spacing)
        if unit is not None and (len(unit) != num_dims or not all(0 < step < math.inf for step in unit)):
            raise ShapeError(f"spacing={spacing} must be {num_dims} finite values in mm > 0, one per spatial axis")
        return cls(max_leaves, tolerance, least, most, samples, detail, unit, stop)


def _grow(images: Sequence[Any], options: _Options, keep: dict[Triple, NDArray[Any]] | None = None) -> list[Leaves]:
    detail = get_detail(options.detail)
    arrays = [as_image(image) for image in images]
    shapes = [array.shape[1:] for array in arrays]
    sizes = [cell_sizes(shape, options.min_size, options.max_size, options.spacing) for shape in shapes]
    _check_roots(
        sum(int(grid_dims(shape, chain)[-1].prod()) for shape, chain in zip(shapes, sizes, strict=True)), options
    )
    by_gain = isinstance(detail, Residual) and options.stop == "fill" and options.tolerance is None
    levels = []
    for array, chain in zip(arrays, sizes, strict=True):
        if by_gain and isinstance(detail, Residual):
            levels.append(detail.gain(array, chain, options.patch_size, keep))
        else:
            levels.append(detail.pyramid(array, chain, options.patch_size))
    if options.stop == "reference":
        norm = [_reference_norm(detail, array) for array in arrays]
        levels = [[np.floor(v / n) for v in pyramid] for pyramid, n in zip(levels, norm, strict=True)]
    table, code = _walk(levels, shapes, sizes, options)
    order = np.argsort(code) if len(images) == 1 else np.lexsort((code, table[:, kernels.IMAGE]))
    table = table[order]
    bounds = np.searchsorted(table[:, kernels.IMAGE], np.arange(len(images) + 1))
    return [_leaves(table[bounds[b] : bounds[b + 1]], shapes[b], sizes[b]) for b in range(len(images))]


def _check_roots(num_roots: int, options: _Options) -> None:
    if options.max_leaves is not None and num_roots > options.max_leaves:
        raise BudgetError(
            f"max_leaves={options.max_leaves} is below the {num_roots} cells of the largest size; "
            f"raise it to {num_roots}, or raise max_size"
        )


def _reference_norm(detail: Any, image: NDArray[Any]) -> float:
    """255 for a map of 0 and 255, so that its value is the count of edge pixels; 1 for all else."""
    if not isinstance(detail, AdditiveMap):
        return 1.0
    pixels = detail.pixels(image)
    return 255.0 if pixels.max() == 255 and bool(((pixels == 0) | (pixels == 255)).all()) else 1.0


def _walk(
    levels: list[list[Values]], shapes: Sequence[tuple[int, ...]], sizes: Sequence[Sizes], options: _Options
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the leaves of all images: their table of cells and their codes, unordered."""
    finest = options.stop == "reference"
    longest = max(sizes, key=len)
    ratio = np.array(split_ratios(longest), np.int64).reshape(-1, 3)
    bits = np.log2(ratio.prod(1)).astype(np.int64) if len(ratio) else np.zeros(0, np.int64)
    shift = np.concatenate([[0], np.cumsum(bits)]).astype(np.int64)
    dims = np.ones((len(shapes), len(longest), 3), np.int64)
    offset = np.zeros((len(shapes), len(longest)), np.int64)
    flat, roots, codes, used = [], [], [], 0
    for b, (shape, chain) in enumerate(zip(shapes, sizes, strict=True)):
        dims[b, : len(chain)] = grid_dims(shape, chain)
        top = len(chain) - 1
        for k in range(0 if finest else 1, len(chain)):
            offset[b, k] = used
            flat.append(levels[b][k].reshape(-1))
            used += flat[-1].size
        grid = np.indices(tuple(dims[b, top])).reshape(3, -1).T
        roots.append(np.column_stack([np.full((len(grid), 2), (b, top)), grid]))
        codes.append(np.arange(len(grid), dtype=np.int64) << shift[top])
        if len(grid).bit_length() + int(shift[top]) > 62:
            raise BudgetError(f"image {shape} with cells {chain[0]} needs more than 62 bits; use a larger min_size")
    values = np.concatenate(flat) if flat else np.zeros(1)
    tables = (values, offset, dims, ratio, shift, np.concatenate(roots).astype(np.int64), np.concatenate(codes))
    floor = -1.0 if finest else float(options.tolerance or 0.0)
    room = int(dims[:, 0].prod(1).sum())
    if options.max_leaves is None:
        split = int(np.count_nonzero(values > floor))
        room = min(room, len(tables[5]) + split * (int(ratio.prod(1).max(initial=1)) - 1))
        return kernels.above_floor(*tables, room, floor)  # type: ignore[no-any-return]
    budget = min(options.max_leaves, room)
    flip = finest and len(shapes[0]) == 2
    walk = kernels.best_first if options.backend == "numba" else kernels.best_first_eager
    return walk(*tables, budget, floor, finest, flip)  # type: ignore[no-any-return]


def _leaves(table: NDArray[np.int64], shape: tuple[int, ...], sizes: Sizes) -> Leaves:
    num = len(shape)
    scale = np.ascontiguousarray(table[:, kernels.SCALE])
    size = np.array(sizes, np.int64).reshape(-1, num)[scale]
    start = table[:, 5 - num :] * size
    return Leaves(torch.from_numpy(start), torch.from_numpy(size), torch.from_numpy(scale), shape, sizes)
