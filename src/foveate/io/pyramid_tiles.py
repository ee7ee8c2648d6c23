"""The tiles of a pyramid: its levels from one another, and pixels as the bytes that a TIFF stores.

Legend: C channels, h w sides of a tile, which is smaller at the right and lower edge of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

Array = NDArray[Any]
Tile = Array | int  # [C, h, w], or the value of all its samples
Reduce = Literal["mode", "mean"]


@dataclass(frozen=True)
class Layout:
    """What is the same for all tiles of a pyramid.

    Args:
        shape: (H, W) of level 0.
        dtype: type of the samples.
        channels: number of channels C.
        tile: side of a tile, a multiple of 16 and of ``ratio``.
        ratio: pixels of a level, along each axis, that become one of the next.
        levels: how many levels there are.
        reduce: "mode" takes the most frequent of these pixels, of several the one that comes first in raster order;
            "mean" their mean, rounded half to even.
        interleaved: the samples of a pixel lie side by side (RGB); otherwise every channel has tiles of its own.
        compression: "zlib" (exact) or "jpeg".
        quality: of JPEG, 1 to 100.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    channels: int
    tile: int
    ratio: int
    levels: int
    reduce: Reduce
    interleaved: bool
    compression: Literal["zlib", "jpeg"]
    quality: int

    def side(self, level: int) -> tuple[int, int]:
        """(H, W) of a level: those of the level before divided by ``ratio``, rounded up."""
        height, width = self.shape
        for _ in range(level):
            height, width = -(-height // self.ratio), -(-width // self.ratio)
        return height, width

    def grid(self, level: int) -> tuple[int, int]:
        """Rows and columns of tiles of a level."""
        height, width = self.side(level)
        return -(-height // self.tile), -(-width // self.tile)

    def box(self, level: int, row: int, column: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and stop of a tile in pixels of its level."""
        height, width = self.side(level)
        start = (row * self.tile, column * self.tile)
        return start, (min(start[0] + self.tile, height), min(start[1] + self.tile, width))


def shrink(tile: Tile, ratio: int, reduce: Reduce) -> Tile:
    """Returns the part of a tile of the next level that ``tile`` covers; edge pixels stand in for missing ones."""
    if isinstance(tile, int):
        return tile
    short = [-side % ratio for side in tile.shape[1:]]
    if any(short):
        tile = np.pad(tile, [(0, 0), *((0, count) for count in short)], mode="edge")
    parts = [tile[:, y::ratio, x::ratio] for y in range(ratio) for x in range(ratio)]
    return most_frequent(parts) if reduce == "mode" else _mean(parts)


def compose(parts: Sequence[Sequence[Tile]], layout: Layout, box: tuple[tuple[int, int], tuple[int, int]]) -> Tile:
    """Returns a tile of the next level out of what `shrink` left of the tiles below it, rows of columns."""
    first = parts[0][0]
    if isinstance(first, int) and all(isinstance(part, int) and part == first for row in parts for part in row):
        return first
    return join(parts, layout, (box[1][0] - box[0][0], box[1][1] - box[0][1]))


def join(parts: Sequence[Sequence[Tile]], layout: Layout, shape: tuple[int, int]) -> Shaped[Array, "C h w"]:
    """Returns an array of ``shape`` out of rows of columns of what `shrink` left of tiles."""
    side = layout.tile // layout.ratio
    whole = np.empty((layout.channels, *shape), layout.dtype)
    for y, row in enumerate(parts):
        for x, part in enumerate(row):
            whole[:, y * side : (y + 1) * side, x * side : (x + 1) * side] = part
    return whole


def encode(tile: Tile, layout: Layout) -> tuple[bytes, ...]:
    """Returns the stored bytes of a tile: one string, or one for each channel where they are not interleaved."""
    if isinstance(tile, int):
        return _constant(tile, layout)
    short = [layout.tile - side for side in tile.shape[1:]]
    if any(short):
        tile = np.pad(tile, [(0, 0), *((0, count) for count in short)], mode="edge")
    planes = [np.moveaxis(tile, 0, -1)] if layout.interleaved else list(tile)
    return tuple(_bytes(np.ascontiguousarray(plane), layout) for plane in planes)


@lru_cache(64)
def _constant(value: int, layout: Layout) -> tuple[bytes, ...]:
    return encode(np.full((layout.channels, layout.tile, layout.tile), value, layout.dtype), layout)


def _bytes(plane: Array, layout: Layout) -> bytes:
    import imagecodecs

    if layout.compression == "zlib":
        little = plane.astype(plane.dtype.newbyteorder("<"), copy=False)
        return bytes(imagecodecs.deflate_encode(little.tobytes(), 5))
    if layout.interleaved:
        return bytes(
            imagecodecs.jpeg8_encode(plane, layout.quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="420")
        )
    return bytes(imagecodecs.jpeg8_encode(plane, layout.quality))


def _mean(parts: list[Shaped[Array, "C h w"]]) -> Shaped[Array, "C h w"]:
    dtype, count = parts[0].dtype, len(parts)
    small = dtype.kind == "u" and dtype.itemsize <= 2
    total: Array = parts[0].astype(np.uint32 if small else np.float64)
    for part in parts[1:]:
        total += part
    if small:  # half to even, so that no level is brighter than the one before
        bits = count.bit_length() - 1
        total += count // 2 - 1 + ((total >> bits) & 1)
        return (total >> bits).astype(dtype)
    total /= count
    return (total if dtype.kind == "f" else np.rint(total)).astype(dtype)


def most_frequent(parts: Sequence[Shaped[Array, "*S"]]) -> Shaped[Array, "*S"]:
    """The value that most of the parts have at each place; of several, that of the earliest part."""
    best = parts[0].copy()
    most = sum((part == best).astype(np.uint8) for part in parts)
    for candidate in parts[1:]:
        votes = sum((part == candidate).astype(np.uint8) for part in parts)
        better = votes > most
        best[better], most = candidate[better], np.maximum(votes, most)
    return best
