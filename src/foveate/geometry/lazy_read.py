"""Pixels of chosen cells of one level of a source, every storage tile decoded once.

Cells that are read together lie in one array, stacked along an axis, so that the loops that price and resample an image
run over many cells at once. Cells that the image's border clips are stacked apart, by their valid part.

Legend: C channels, N spatial axes, U cells.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.pyramid import Values
from foveate.geometry.source import Source

Ints = NDArray[np.int64]
Span = tuple[tuple[int, ...], tuple[int, ...]]  # start and stop in pixels of a level
_STACK = 1 << 22  # pixels that are priced at a time


@dataclass
class Counter:
    """What has been decoded so far, per level."""

    pixels: list[int]
    tiles: list[int]

    @classmethod
    def of(cls, source: Source) -> "Counter":
        """Nothing yet."""
        return cls([0] * len(source.levels), [0] * len(source.levels))


@dataclass(frozen=True, eq=False)
class Stack:
    """Cells of one level and one valid part, one after the other along ``axis``.

    Args:
        pixels: ``[C, *S]``, as stored.
        cells: ``[U, N]``, the index of each.
        size: side of a cell in pixels of the level.
        side: the valid part of it.
        axis: the spatial axis along which they are stacked.
    """

    pixels: NDArray[Any]
    cells: Ints
    size: tuple[int, ...]
    side: tuple[int, ...]
    axis: int

    def scatter(self, values: Values, size: Sequence[int], grid: Values) -> None:
        """Put values of smaller cells of ``size`` pixels, in the order of the stack, into the grid of all of them.

        ``values`` and ``grid`` are volumes, of one slice in 2-D.
        """
        lead, num = 3 - len(size), len(self.cells)
        counts = [1] * lead + [-(-n // by) for n, by in zip(self.side, size, strict=True)]
        axis = self.axis + lead
        split = values.reshape(*values.shape[:axis], num, counts[axis], *values.shape[axis + 1 :])
        ratio = np.array([n // by for n, by in zip(self.size, size, strict=True)])
        first = np.pad(self.cells * ratio, ((0, 0), (lead, 0)))
        index = []
        for at, n in enumerate(counts):
            view = [1, 1, 1]
            view[at] = n
            index.append(first[:, at].reshape(-1, 1, 1, 1) + np.arange(n).reshape(1, *view))
        grid[tuple(index)] = np.moveaxis(split, axis, 0)

    def local(self, start: Ints, place: Ints) -> Ints:
        """Where pixels of the level lie in the stack, in the cells ``place``."""
        inside: Ints = start - self.cells[place] * np.array(self.size)
        inside[:, self.axis] += place * self.side[self.axis]
        return inside


def whole_steps(source: Source) -> dict[int, tuple[int, ...]]:
    """The levels whose downsample is a whole number along each axis, with that."""
    steps = [tuple(round(by) for by in down) for down in source.downsamples]
    return {i: step for i, step in enumerate(steps) if step == tuple(source.downsamples[i])}


def level_shape(source: Source, step: Sequence[int]) -> tuple[int, ...]:
    """Pixels of a level with a whole downsample ``step``, the last one along each axis perhaps not all image."""
    return tuple(-(-full // by) for full, by in zip(source.shape, step, strict=True))


def read_level(source: Source, level: int, step: Sequence[int], count: Counter) -> Stack:
    """The whole level as one cell."""
    full = level_shape(source, step)
    tiles = list(tiles_of(source, level, full))
    if len(tiles) == 1:
        pixels = decode(source, level, step, tiles[0], count)
    else:
        pixels = _empty(source, full)
        for start, stop in tiles:
            area = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            pixels[(slice(None), *area)] = decode(source, level, step, (start, stop), count)
    return Stack(pixels, np.zeros((1, len(full)), np.int64), full, full, 0)


def read_cells(
    source: Source, level: int, step: Sequence[int], cells: Ints, size: Sequence[int], count: Counter
) -> list[Stack]:
    """Cells of one size, in stacks.

    Args:
        source: the image.
        level: which level.
        step: its downsample, whole numbers.
        cells: ``[U, N]``, indices of the cells.
        size: side of a cell in pixels of the level.
        count: what is decoded is added to it.
    """
    full = np.array(level_shape(source, step))
    starts = cells * np.array(size)
    slots = np.full(tuple(-(-full // np.array(size))), -1, np.int64)
    stacks: list[Stack] = []
    where: list[tuple[Stack, int]] = []
    valid = np.minimum(full - starts, np.array(size))
    for side in np.unique(valid, axis=0):
        same = np.flatnonzero((valid == side).all(axis=1))
        axis = int(np.flatnonzero(side == np.array(size))[0]) if (side == np.array(size)).any() else 0
        for part in np.array_split(same, max(1, math.ceil(len(same) * int(side.prod()) / _STACK))):
            shape = [int(n) * (len(part) if a == axis else 1) for a, n in enumerate(side)]
            stack = Stack(_empty(source, shape), cells[part], tuple(size), tuple(int(n) for n in side), axis)
            slots[tuple(cells[part].T)] = len(where) + np.arange(len(part))
            where += [(stack, place) for place in range(len(part))]
            stacks.append(stack)
    for start, stop in tiles_of(source, level, tuple(int(n) for n in full)):
        near = tuple(slice(a // by, -(-b // by)) for a, b, by in zip(start, stop, size, strict=True))
        found = slots[near]
        if (found < 0).all():
            continue
        tile = decode(source, level, step, (start, stop), count)
        for slot in found[found >= 0]:
            _copy(tile, (start, stop), *where[slot])
    return stacks


def _copy(tile: NDArray[Any], span: Span, stack: Stack, place: int) -> None:
    """Put what a tile holds of a cell into its stack."""
    origin = stack.cells[place] * np.array(stack.size)
    source, target = [], []
    for axis, side in enumerate(stack.side):
        low = max(span[0][axis], int(origin[axis]))
        high = min(span[1][axis], int(origin[axis]) + side)
        shift = place * side * (axis == stack.axis) - int(origin[axis])
        source.append(slice(low - span[0][axis], high - span[0][axis]))
        target.append(slice(low + shift, high + shift))
    stack.pixels[(slice(None), *target)] = tile[(slice(None), *source)]


def _empty(source: Source, shape: Sequence[int]) -> NDArray[Any]:
    return np.empty((source.channels, *shape), source.dtype.newbyteorder("="))


def tiles_of(source: Source, level: int, full: tuple[int, ...]) -> Iterator[Span]:
    """The storage tiles of a level in raster order; the last one along an axis reaches to the image's end."""
    stored, tile = source.levels[level], source.tile_shape(level)
    for at in product(*(range(-(-side // step)) for side, step in zip(stored, tile, strict=True))):
        start = tuple(i * step for i, step in zip(at, tile, strict=True))
        yield (
            start,
            tuple(
                end if a + step >= side else a + step
                for a, step, side, end in zip(start, tile, stored, full, strict=True)
            ),
        )


def decode(source: Source, level: int, step: Sequence[int], span: Span, count: Counter) -> NDArray[Any]:
    """The pixels ``[C, *B]`` of a tile, and what that took."""
    start, stop = (tuple(at * by for at, by in zip(side, step, strict=True)) for side in span)
    box = (start, tuple(min(at, full) for at, full in zip(stop, source.shape, strict=True)))
    stored = [min(b, side) - a for a, b, side in zip(*span, source.levels[level], strict=True)]
    count.pixels[level] += math.prod(stored)
    count.tiles[level] += 1
    return source.read(box, level)
