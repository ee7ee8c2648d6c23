"""Windows of one size out of one level of a source, every storage tile read once, whatever their order.

Legend: C channels, D spatial axes, R windows, U windows that differ, P sides of a window.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped
from numpy.typing import NDArray

from foveate.geometry.source import Source, level_window

Ints = NDArray[np.int64]


def full_shape(source: Source, level: int) -> tuple[int, ...]:
    """Pixels of a level along each axis that cover all of level 0, the last perhaps not stored (it is repeated)."""
    steps = source.downsamples[level]
    return tuple(math.ceil(side / step - 1e-9) for side, step in zip(source.shape, steps, strict=True))


def read_windows(
    source: Source, start: Int64[np.ndarray, "R D"], size: Sequence[int], level: int = 0
) -> Shaped[np.ndarray, "R C *P"]:
    """Read windows of one size; where one reaches beyond the image, the image's last pixels are repeated.

    Args:
        source: image or volume.
        start: first pixel of each window in pixels of the level, inside the image; in any order, repeats allowed.
        size: side of a window in pixels of the level, one per axis.
        level: which level.

    Returns:
        The pixels of each window in the source's own type and native byte order.

    Cost: every storage tile that a window touches is read once, and of it no more than the windows need.
    """
    only, back = np.unique(start, axis=0, return_inverse=True)
    out = np.empty((len(only), source.channels, *size), source.dtype.newbyteorder("="))
    if not len(only):
        return out
    full = np.array(full_shape(source, level))
    stop = np.minimum(only + np.array(size), full)
    tile = np.array(source.tile_shape(level))
    last = -(-np.array(source.levels[level]) // tile) - 1  # a pixel that is not stored belongs to the last tile
    which, tiles = _touched(np.minimum(only // tile, last), np.minimum((stop - 1) // tile, last))
    code = np.ravel_multi_index(tuple(tiles.T), tuple(last + 1))
    order = np.argsort(code, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(code[order])) + 1):
        low = tiles[part[0]] * tile
        high = np.where(tiles[part[0]] == last, full, low + tile)
        _fill(source, level, (low, high), which[part], (only, stop), out)
    _repeat_last(out, stop - only)
    return out if np.array_equal(back.reshape(-1), np.arange(len(start))) else out[back.reshape(-1)]


def _touched(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Pairs of a window and a tile that it touches: positions ``[T]`` and tiles ``[T, D]``."""
    most = (high - low).max(axis=0) + 1
    which, tiles = [], []
    for shift in product(*(range(int(count)) for count in most)):
        near = low + np.array(shift)
        reached = np.flatnonzero((near <= high).all(axis=1))
        which.append(reached)
        tiles.append(near[reached])
    return np.concatenate(which), np.concatenate(tiles)


def _fill(
    source: Source, level: int, tile: tuple[Ints, Ints], which: Ints, windows: tuple[Ints, Ints], out: NDArray[Any]
) -> None:
    """Copy what one tile holds of the windows ``which``."""
    start, stop = (side[which] for side in windows)
    low, high = np.maximum(start, tile[0]), np.minimum(stop, tile[1])
    steps = source.downsamples[level]
    box = (
        tuple(math.floor(int(at) * step + 1e-9) for at, step in zip(low.min(0), steps, strict=True)),
        tuple(
            min(math.ceil(int(at) * step - 1e-9), side)
            for at, step, side in zip(high.max(0), steps, source.shape, strict=True)
        ),
    )
    pixels = source.read(box, level)
    origin = np.array(level_window(box, steps)[0])
    for row, a, b, c in zip(which, low - origin, high - origin, low - start, strict=True):
        taken = pixels[(slice(None), *map(slice, a.tolist(), b.tolist()))]
        out[(row, slice(None), *map(slice, c.tolist(), (c + b - a).tolist()))] = taken


def _repeat_last(out: NDArray[Any], valid: Ints) -> None:
    """Repeat the last valid pixel along each axis of the windows that reach beyond the image."""
    for axis in range(valid.shape[1]):
        for row in np.flatnonzero(valid[:, axis] < out.shape[2 + axis]):
            along = np.moveaxis(out[row], 1 + axis, 0)
            along[valid[row, axis] :] = along[valid[row, axis] - 1]
