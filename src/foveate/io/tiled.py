"""Rasters that are read tile by tile: windows put together, tiles kept, broken ones dealt with; the formats come after.

Legend: C channels, B sides of a box, T sides of a tile.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError
from foveate.geometry.source import Box, exact_downsamples
from foveate.io.guard import DECODER_ERRORS, bad_file, one_line
from foveate.io.raster import About, check_window, fill_window, stored_window
from foveate.io.spacing import mpp_of
from foveate.io.tile_cache import SHARED, Stamp, TileCache

Array = NDArray[Any]
Broken = Literal["raise", "fill", "skip"]

_BLOCK = 2048  # pixels of a finer level along each axis that are held to make a broken tile


@dataclass(frozen=True)
class Facts:
    """What is known of a tiled file once it is open: level and tile shapes, channels, type, background, pixel size."""

    levels: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int, ...], ...]
    channels: int
    dtype: np.dtype[Any]
    background: float
    spacing: tuple[float, ...] | None
    about: About
    stamp: Stamp


class TiledRaster:
    """A file of tiles as a raster: opened by path, read by window, each tile decoded once per read.

    It can be pickled; the copy opens the file again when it first reads. Files are opened per process and few at a
    time; tiles are kept within a limit of bytes; any number of threads may read.

    Args:
        path: The file.
        facts: What its header says.
        broken: What a tile that cannot be decoded does: ``"raise"`` a FormatError, or ``"fill"`` and ``"skip"``
            with the background, in which case ``broken`` lists its box. A tile of a coarser level is then made from
            the level below, and ``mended`` lists its box: nothing is lost but what level 0 has lost.
        cache: Where decoded tiles are kept; None is one of 64 MiB that all rasters of a process share.
    """

    def __init__(self, path: Path, facts: Facts, *, broken: str, cache: TileCache | None) -> None:
        check_broken(broken)
        self.path = path
        self.on_broken = broken
        self._facts = facts
        self._cache = cache
        self._broken: dict[tuple[int, int, int], Box] = {}
        self._labels = False  # no means of them

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape (H, W) of level 0."""
        return self._facts.levels[0]

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self._facts.channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples, as stored."""
        return self._facts.dtype

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level."""
        return self._facts.levels

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level."""
        return exact_downsamples(self.levels)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in mm (y, x), or None."""
        return self._facts.spacing

    @property
    def mpp(self) -> float | None:
        """Um per level-0 pixel, or None."""
        return mpp_of(self.spacing)

    @property
    def about(self) -> About:
        """Which reader, why, and where the pixel size is from."""
        return self._facts.about

    @property
    def broken(self) -> list[Box]:
        """Boxes of the tiles of level 0 that could not be decoded so far, in this process."""
        return [box for (level, _, _), box in self._broken.items() if level == 0]

    @property
    def mended(self) -> list[Box]:
        """Boxes in level-0 pixels of the tiles of coarser levels that could not, and were made from finer ones."""
        return [box for (level, _, _), box in self._broken.items() if level > 0]

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """Storage tile of a level in its own pixels."""
        return self._facts.tiles[level]

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the pixels ``[C, *B]`` of a level that touch ``box``; channels lie last in memory.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
            FormatError: a tile cannot be decoded and ``broken`` is ``"raise"``, or the file is gone or has changed.

        Cost:
            Decoding of the tiles that touch the window and are not in the cache. Tiles that lie wholly in it are
            not put there: what is read tile by tile is read once.
        """
        window = check_window(box, self.shape, level, self.downsamples)
        part = self._stored(level, stored_window(window, self.levels[level]))
        return fill_window(part.transpose(2, 0, 1), window)

    def _stored(self, level: int, window: Box) -> Array:
        """Pixels ``[*B, C]`` of a window inside a level, in its own pixels."""
        (top, left), (bottom, right) = window
        (high, wide), (full_high, full_wide) = self._facts.tiles[level], self.levels[level]
        out = np.empty((bottom - top, right - left, self.channels), self.dtype)
        for row in range(top // high, -(-bottom // high)):
            for column in range(left // wide, -(-right // wide)):
                inside = top <= row * high and left <= column * wide
                inside &= min((row + 1) * high, full_high) <= bottom and min((column + 1) * wide, full_wide) <= right
                tile = self._tile(level, row, column, keep=not inside)
                y, x = max(row * high, top), max(column * wide, left)
                y_stop, x_stop = min((row + 1) * high, bottom), min((column + 1) * wide, right)
                part = (
                    self._facts.background
                    if tile is None
                    else tile[y - row * high : y_stop - row * high, x - column * wide : x_stop - column * wide]
                )
                out[y - top : y_stop - top, x - left : x_stop - left] = part
        return out

    def _tile(self, level: int, row: int, column: int, *, keep: bool) -> Array | None:
        """Pixels ``[T, T, C]``, at the lower and right edge at least those of the level; None is background."""
        place = (level, row, column)
        if place in self._broken:
            return self._mend(*place)
        cache = SHARED if self._cache is None else self._cache
        key = (str(self.path), self._facts.stamp, self._variant(), place)
        tile = cache.get(key)
        if tile is not None:
            return tile
        try:
            tile = self._decode(level, row, column)
        except FormatError:
            raise  # the file as a whole
        except DECODER_ERRORS as error:
            self._give_up(place, error)
            return self._mend(*place)
        if tile is not None and keep:
            cache.put(key, tile)
        return tile

    def _give_up(self, place: tuple[int, int, int], error: BaseException) -> None:
        level, row, column = place
        if self.on_broken == "raise":
            reason = one_line(error)[:120] or type(error).__name__
            raise bad_file(
                self.path,
                f"tile at row {row}, column {column} of level {level} is broken ({reason}); "
                f"fetch the file again, or pass --broken fill (broken='fill') to go on without it",
            ) from None
        pairs = list(zip((row, column), self.tile_shape(level), self.downsamples[level], self.shape, strict=True))
        start = tuple(int(at * side * step) for at, side, step, _ in pairs)
        stop = tuple(min(-int(-(at + 1) * side * step // 1), full) for at, side, step, full in pairs)
        self._broken[place] = (start, stop)

    def _mend(self, level: int, row: int, column: int) -> Array | None:
        """What a broken tile of a coarser level must have held, by the level below; None at level 0: nobody knows.

        Not kept: what is lost below it must be known to every raster that reads it.
        """
        if level == 0:
            return None
        (high, wide), (height, width) = self.tile_shape(level), self.levels[level]
        tile = np.empty((min(high, height - row * high), min(wide, width - column * wide), self.channels), self.dtype)
        steps = [a / b for a, b in zip(self.downsamples[level], self.downsamples[level - 1], strict=True)]
        block = max(1, int(_BLOCK / max(steps)))
        for y in range(0, tile.shape[0], block):
            for x in range(0, tile.shape[1], block):
                part = tile[y : y + block, x : x + block]
                self._reduce(part, level - 1, (row * high + y, column * wide + x), steps)
        return tile

    def _reduce(self, out: Array, level: int, corner: tuple[int, int], steps: list[float]) -> None:
        """Fills ``[h, w, C]`` from a finer level: means where whole pixels go into one, labels by centres."""
        from foveate.io.pyramid_tiles import shrink

        start, stop = (
            tuple(int(at * step + 1e-6) for at, step in zip(place, steps, strict=True))
            for place in (corner, (corner[0] + out.shape[0], corner[1] + out.shape[1]))
        )
        fine = self._stored(level, stored_window((start, stop), self.levels[level])).transpose(2, 0, 1)
        ratio = 1 if self._labels else 2 ** int(np.log2(max(1.0, min(steps)) + 1e-6))
        fine = np.asarray(shrink(fine, ratio, "mean")) if ratio > 1 else fine
        rows, columns = (
            np.minimum(((np.arange(size) + 0.5) * step / ratio).astype(np.int64), have - 1)
            for size, step, have in zip(out.shape[:2], steps, fine.shape[1:], strict=True)
        )
        out[:] = fine[:, rows[:, None], columns].transpose(1, 2, 0)

    def _variant(self) -> str:
        """What distinguishes this raster's tiles from another's of the same file."""
        raise NotImplementedError

    def _decode(self, level: int, row: int, column: int) -> Array | None:
        """Decodes one tile, raising whatever the decoder raises; None where the file stores nothing."""
        raise NotImplementedError


def check_broken(broken: str) -> None:
    """Refuses words for ``broken`` that nobody knows.

    Raises:
        ConfigError: not one of the three.
    """
    if broken not in ("raise", "fill", "skip"):
        raise ConfigError(f"broken={broken!r}; give 'raise', 'fill' or 'skip'")
