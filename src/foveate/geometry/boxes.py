"""Boxes in level-0 pixels, and the codes that sort cells along the tree.

A box is ``(start, stop)``, half open, in array order: (y, x) or (z, y, x).
A cell code is an integer in which every cell of every scale is one contiguous run, so that finding the leaf under
a point is a binary search.

Legend: Q points, N spatial axes, A and B boxes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from foveate.errors import BudgetError, ShapeError

Sizes = tuple[tuple[int, ...], ...]


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a spatial shape as a tuple of ints, or say what is wrong with it.

    Args:
        shape: extent of each spatial axis in pixels, 2 or 3 axes, each >= 1.

    Raises:
        ShapeError: there are not 2 or 3 axes, or one is empty.
    """
    checked = tuple(int(extent) for extent in shape)
    if len(checked) not in (2, 3):
        raise ShapeError(f"spatial shape {checked} must have 2 or 3 axes; leave the channel axis out (image.shape[1:])")
    if min(checked) < 1:
        raise ShapeError(f"spatial shape {checked} must be at least 1 along every axis; skip empty images")
    return checked


def check_size(size: int | Sequence[int], num_dims: int, name: str = "size") -> tuple[int, ...]:
    """Return a cell or patch size as one int per spatial axis.

    Args:
        size: pixels along every axis, or one value per axis, each >= 1.
        num_dims: number of spatial axes.
        name: what the caller calls it, for the message.

    Raises:
        ShapeError: the number of values or a value is wrong.
    """
    checked = (int(size),) * num_dims if isinstance(size, int) else tuple(int(side) for side in size)
    if len(checked) != num_dims or min(checked) < 1:
        raise ShapeError(f"{name}={size} must be one integer >= 1, or {num_dims} of them, one per spatial axis")
    return checked


def check_box(box: Sequence[Sequence[int]], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a box as ``(start, stop)``, or say how it leaves the image.

    Args:
        box: (start, stop) in level-0 pixels, array order, half open.
        shape: spatial shape of the image.

    Raises:
        ShapeError: the box is empty, has the wrong number of axes, or reaches outside the image.
    """
    if len(box) != 2 or any(len(corner) != len(shape) for corner in box):
        raise ShapeError(f"box={box} must be (start, stop) with {len(shape)} values each for an image of shape {shape}")
    start, stop = (tuple(int(value) for value in corner) for corner in box)
    if any(not 0 <= a < b <= extent for a, b, extent in zip(start, stop, shape, strict=True)):
        raise ShapeError(f"box={(start, stop)} must be non-empty and inside the image of shape {shape}; clip it first")
    return start, stop


def check_sizes(sizes: Sequence[Sequence[int]]) -> Sizes:
    """Return the cell sizes of a tree, finest first, or say where the chain breaks.

    Args:
        sizes: cell size per scale in pixels; from one scale to the next every axis stays or doubles, and one doubles.

    Raises:
        ShapeError: the chain is empty, too short somewhere, or an axis grows by another factor.
    """
    chain = tuple(tuple(int(side) for side in size) for size in sizes)
    if not chain or min(min(size, default=0) for size in chain) < 1:
        raise ShapeError(f"sizes={chain} must hold at least one cell size, every side >= 1 pixel")
    if len({len(size) for size in chain}) != 1:
        raise ShapeError(f"sizes={chain} must have one value per spatial axis at every scale")
    for fine, coarse in pairwise(chain):
        factors = {c / f for f, c in zip(fine, coarse, strict=True)}
        if not factors <= {1.0, 2.0} or 2.0 not in factors:
            raise ShapeError(f"sizes={chain} must double one or more axes per scale; {fine} -> {coarse} does not")
    return chain


def morton_encode(cells: Int64[Tensor, "*batch N"]) -> Int64[Tensor, "*batch"]:
    """Interleave the bits of integer coordinates; the last axis is the fastest.

    Args:
        cells: coordinates, 0 <= value < 2**31 (N = 2) or 2**21 (N = 3).

    Returns:
        One code per coordinate; sorting by it gives the Z-order.
    """
    num_dims = cells.shape[-1]
    code = torch.zeros_like(cells[..., 0])
    top = int(cells.max()) if cells.numel() else 0
    for bit in range(top.bit_length()):
        for axis in range(num_dims):
            code |= ((cells[..., axis] >> bit) & 1) << (bit * num_dims + num_dims - 1 - axis)
    return code


def cell_code(cells: Int64[Tensor, "Q N"], shape: tuple[int, ...], sizes: Sizes) -> Int64[Tensor, " Q"]:
    """Number the finest cells so that every cell of every scale is one contiguous run of codes.

    Inside a root cell the bits follow the chain of ``sizes`` (only axes that double give a bit), root cells follow
    in raster order. With one scale this is the raster index itself.

    Args:
        cells: coordinates in units of the finest cell, inside the image's grid.
        shape: spatial shape of the image in pixels.
        sizes: cell size per scale, finest first.

    Returns:
        The codes; a cell of scale k whose first finest cell has code c owns ``[c, c + run_lengths(sizes)[k])``.

    Raises:
        BudgetError: the grid has more finest cells than a 63-bit code can number.
    """
    rest = list(cells.unbind(-1))
    code = torch.zeros_like(rest[0])
    bit = 0
    for fine, coarse in pairwise(sizes):
        for axis in reversed(range(len(shape))):
            if coarse[axis] != fine[axis]:
                code |= (rest[axis] & 1) << bit
                rest[axis] = rest[axis] >> 1
                bit += 1
    roots = [-(-extent // side) for extent, side in zip(shape, sizes[-1], strict=True)]
    if math.prod(roots) << bit >= 1 << 63:
        raise BudgetError(f"image {shape} with cells {sizes[0]} needs more than 63 bits; use a larger min_size")
    root = rest[0]
    for axis in range(1, len(shape)):
        root = root * roots[axis] + rest[axis]
    return code | (root << bit)


def run_lengths(sizes: Sizes) -> tuple[int, ...]:
    """Return how many finest cells a cell of each scale holds."""
    return tuple(math.prod(side // least for side, least in zip(size, sizes[0], strict=True)) for size in sizes)


def overlap(boxes_a: Shaped[Tensor, "A 2 N"], boxes_b: Shaped[Tensor, "B 2 N"]) -> Shaped[Tensor, "A B"]:
    """Return the volume that each box of one list shares with each of the other.

    Args:
        boxes_a: boxes in level-0 pixels, array order.
        boxes_b: boxes in the same frame.

    Returns:
        Shared pixels, 0 where two boxes do not meet; the dtype of the boxes.

    Cost: O(A B N) time and memory.
    """
    start = torch.maximum(boxes_a[:, None, 0], boxes_b[None, :, 0])
    stop = torch.minimum(boxes_a[:, None, 1], boxes_b[None, :, 1])
    return (stop - start).clamp(min=0).prod(dim=-1)
