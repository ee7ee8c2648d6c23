"""Coarse levels for slides that have none, made once and kept in a folder of caches.

Legend: C channels, B sides of a box, h w sides of a tile.
"""

import hashlib
import os
from contextlib import suppress
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError
from foveate.geometry.source import Box
from foveate.io.guard import bad_file
from foveate.io.pyramid import write_pyramid
from foveate.io.pyramid_tiles import shrink
from foveate.io.raster import (
    About,
    Raster,
    about_of,
    broken_of,
    check_window,
    fill_window,
    is_held,
    mended_of,
    open_raster,
    stored_window,
)
from foveate.io.spacing import mpp_of
from foveate.io.tile_cache import stamp_of

Array = NDArray[Any]

_GAP = 8  # between two levels; more means that a level is missing
_COARSEST = 2**24  # pixels that a coarsest level has at most
_FIRST = 4  # downsample of the first level that we make
_TILE = 512
_WINDOW = 1024  # pixels along each axis that are read at once, if the tiles of the file are smaller
_FORMAT = 1  # of the cache; another number makes old caches unused


class LeveledRaster:
    """A slide with coarse levels of ours: its own levels, then those of a cache file, each half of the one before.

    It can be pickled, as its file and its cache can. A cache that is gone or damaged is made again when it is read.

    Args:
        raster: the slide.
        num_own: how many of its levels to keep.
        folder: where the cache file lies.
    """

    def __init__(self, raster: Raster, num_own: int, folder: Path) -> None:
        self._raster, self._num_own = raster, num_own
        self._sides = [tuple(-(-side // _FIRST) for side in raster.levels[num_own - 1])]
        while max(self._sides[-1]) > _TILE:
            self._sides.append(tuple(-(-side // 2) for side in self._sides[-1]))
        self.path = _path_of(raster)
        self._file = folder / f"{self.path.stem[:40]}-{self._key()}.tif"
        self._coarse = self._open()

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape (H, W) of level 0."""
        return self._raster.shape

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self._raster.channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples, as stored."""
        return self._raster.dtype

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level; ours are rounded up."""
        return (*self._raster.levels[: self._num_own], *self._sides)

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level."""
        own = self._raster.downsamples[: self._num_own]
        ours = (tuple(step * _FIRST * 2**n for step in own[-1]) for n in range(len(self._sides)))
        return (*own, *ours)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in mm (y, x), or None."""
        return self._raster.spacing

    @property
    def mpp(self) -> float | None:
        """Um per level-0 pixel, or None."""
        return mpp_of(self.spacing)

    @property
    def about(self) -> About:
        """What the slide says of itself, and that levels were made."""
        about = about_of(self._raster)
        note = f"{len(self._sides)} coarse levels were made and are kept in {self._file}"
        return About(about.reader, about.reason, about.origin, (*about.notes, note))

    @property
    def broken(self) -> list[Box]:
        """Boxes of the tiles of the slide's level 0 that could not be decoded so far, in this process."""
        return broken_of(self._raster)

    @property
    def mended(self) -> list[Box]:
        """Boxes in level-0 pixels of the broken tiles of its coarser levels that were made from finer ones."""
        return mended_of(self._raster)

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """Storage tile of a level in its own pixels."""
        return self._raster.tile_shape(level) if level < self._num_own else (_TILE, _TILE)

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the pixels ``[C, *B]`` of a level that touch ``box``.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
            FormatError: the slide cannot be read, or the cache cannot be made again.
        """
        if level < self._num_own:
            return self._raster.read(box, level)
        window = check_window(box, self.shape, level, self.downsamples)
        start, stop = stored_window(window, self.levels[level])
        try:
            part = _read_stored(self._coarse, (start, stop), level - self._num_own)
        except FormatError:  # another process replaced the cache, or it is damaged
            self._file.unlink(missing_ok=True)
            self._coarse = self._open()
            part = _read_stored(self._coarse, (start, stop), level - self._num_own)
        return fill_window(part, window)

    def _key(self) -> str:
        raster = self._raster
        variant = getattr(raster, "_variant", str)()
        about = (type(raster).__name__, variant, raster.levels, raster.channels, raster.dtype.str, self._num_own)
        identity = (_FORMAT, str(self.path.absolute()), _stamp(self.path), *about)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def _open(self) -> Raster:
        with suppress(FormatError):
            return self._open_file()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot keep coarse levels ({error.strerror}); set XDG_CACHE_HOME to another folder"
            raise bad_file(self._file.parent, reason) from None
        base, raster = self._num_own - 1, self._raster
        write_pyramid(
            self._file, _Bands(raster, base), shape=self._sides[0], dtype=raster.dtype, channels=raster.channels,
            tile=_TILE, kind="tiff", reduce="mean", overwrite=True,
        )  # fmt: skip
        return self._open_file()

    def _open_file(self) -> Raster:
        coarse = open_raster(self._file, want="values")
        facts = (coarse.levels, coarse.channels, coarse.dtype)
        if facts != (tuple(self._sides), self.channels, self.dtype):
            raise bad_file(self._file, "holds other levels; remove it")
        return coarse


class _Bands:
    """Tiles of our first level, a row of them made at a time, so that every part of the file is decoded once."""

    def __init__(self, raster: Raster, level: int) -> None:
        self._raster, self._level = raster, level
        self._top = -1
        self._band: Array = np.empty(0)

    def __call__(self, box: Box) -> Shaped[Array, "C h w"]:
        (top, left), (bottom, right) = box
        if top != self._top:
            self._top, self._band = top, self._make(top, bottom)
        return self._band[:, :, left:right]

    def _make(self, top: int, bottom: int) -> Shaped[Array, "C h w"]:
        raster = self._raster
        height, width = raster.levels[self._level]
        rows, columns = (_step(side) for side in raster.tile_shape(self._level))
        band = np.empty((raster.channels, bottom - top, -(-width // _FIRST)), raster.dtype)
        stop = min(bottom * _FIRST, height)
        for y in range(top * _FIRST, stop, rows):
            for x in range(0, width, columns):
                corner = min(y + rows, stop), min(x + columns, width)
                part = shrink(_read_stored(raster, ((y, x), corner), self._level), _FIRST, "mean")
                at = y // _FIRST - top
                band[:, at : at + -(-(corner[0] - y) // _FIRST), x // _FIRST : -(-corner[1] // _FIRST)] = part
        return band


def with_levels(raster: Raster, cache: str | Path | None = None) -> Raster:
    """Gives a slide the coarse levels that it lacks; they are made once, in one pass, and kept on disk.

    A level is missing after one that is more than 8 times larger than the next, and after a coarsest one of more than
    2^24 pixels. Ours are 4, 8, 16, ... times smaller than the last level before the gap, by area means, until one fits
    into a tile of 512; sides are rounded up. The cache belongs to the file's path, size and time of change.

    Args:
        raster: an image or a volume; what is no plane, is held, or lacks no level, is returned as it is.
        cache: the folder; by default ``foveate`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Returns:
        ``raster``, or one whose levels up to the gap are those of ``raster``.

    Raises:
        ConfigError: levels are missing, but the raster is of no file.
        FormatError: the file cannot be read, or the cache cannot be written.

    Cost: one pass over the level before the gap where nothing is kept yet, in the memory of 512 rows of a quarter of
        its width; the cache takes up to 1/12 of its pixels.
    """
    if len(raster.shape) != 2 or is_held(raster):
        return raster
    num_own = next((n for n, (fine, coarse) in enumerate(pairwise(raster.levels), 1) if _far(fine, coarse)), None)
    if num_own is None and prod(raster.levels[-1]) <= _COARSEST:
        return raster
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return LeveledRaster(raster, num_own or len(raster.levels), Path(cache or Path(home) / "foveate"))


def _far(fine: tuple[int, ...], coarse: tuple[int, ...]) -> bool:
    return any(high > _GAP * (low + 1) for high, low in zip(fine, coarse, strict=True))


def _step(tile: int) -> int:
    """Pixels read at once along an axis: whole tiles if they are multiples of 4, about `_WINDOW` of them or one."""
    step = tile * max(1, _WINDOW // tile)
    return min(step + -step % _FIRST, 4 * _WINDOW)


def _read_stored(raster: Raster, window: Box, level: int) -> Shaped[Array, "C *B"]:
    """The stored pixels of a window of a level, in pixels of that level."""
    start, stop = window
    if level == 0:
        return raster.read((start, stop))
    steps = raster.downsamples[level]
    low = tuple(min(int(at * step), full - 1) for at, step, full in zip(start, steps, raster.shape, strict=True))
    high = tuple(min(int(-(-at * step // 1)), full) for at, step, full in zip(stop, steps, raster.shape, strict=True))
    part = raster.read((low, high), level)
    skip = (at - int(first / step + 1e-9) for at, first, step in zip(start, low, steps, strict=True))
    cut = tuple(slice(s, s + to - at) for s, at, to in zip(skip, start, stop, strict=True))
    return part[(slice(None), *cut)]


def _path_of(raster: Raster) -> Path:
    path = getattr(raster, "path", None)
    if path is None:
        raise ConfigError(f"a raster of {raster.shape} has too few levels and no file to keep them for; open its file")
    return Path(path)


def _stamp(path: Path) -> tuple[int, int]:
    """When the file, or the last of the files in a folder, was changed, and their size."""
    stamps = [stamp_of(part) for part in (path, *(path.rglob("*") if path.is_dir() else ()))]
    return max(changed for changed, _ in stamps), sum(size for _, size in stamps)
