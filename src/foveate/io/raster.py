"""Images and volumes read by box; the one thing that cutting and prediction need to know of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.geometry.source import Box, Source, exact_downsamples, level_window
from foveate.io.guard import DEFAULT_MAX_PIXELS, Want, one_line
from foveate.io.spacing import mpp_of
from foveate.io.tile_cache import TileCache

Array = NDArray[Any]

READ_WHOLE = 2**26
"""Pixels above which an image without levels is read by box."""


@runtime_checkable
class Raster(Source, Protocol):
    """An image or a volume, held or on disk, of one or more levels, with the physical size of its pixels."""

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in mm along each axis, or None where nobody said it."""
        ...


@dataclass(frozen=True)
class About:
    """What ``describe`` says of a raster beside its numbers: who reads it, why, and who says how large a pixel is."""

    reader: str
    reason: str
    origin: str
    notes: tuple[str, ...] = ()


class ArrayRaster:
    """Arrays as a raster; boxes are views, nothing is copied.

    Args:
        array: ``[C, H, W]`` or ``[C, D, H, W]``.
        spacing: Size of a level-0 pixel in mm along each spatial axis.
        coarser: The same image at lower resolution, as further levels, largest first.
        about: Where the arrays come from, for ``describe``.

    Raises:
        ShapeError: an array is of another shape, a level is not smaller than the one before, or ``spacing`` does not
            have one size above 0 for each axis.
    """

    def __init__(
        self,
        array: Shaped[Array, "..."],
        spacing: tuple[float, ...] | None = None,
        coarser: Sequence[Shaped[Array, "..."]] = (),
        about: "About | None" = None,
    ) -> None:
        if array.ndim not in (3, 4) or array.size == 0:
            raise ShapeError(f"array of shape {array.shape}; give [C, H, W] or [C, D, H, W], no axis empty")
        if spacing is not None and (len(spacing) != array.ndim - 1 or not all(size > 0 for size in spacing)):
            raise ShapeError(f"spacing {spacing} for {array.ndim - 1} axes; give one size in mm above 0 for each")
        for fine, coarse in pairwise((array, *coarser)):
            falls = fine.ndim == coarse.ndim and all(0 < c <= f for f, c in zip(fine.shape, coarse.shape, strict=True))
            if not falls or len(coarse) != len(array) or coarse.size == fine.size:
                raise ShapeError(f"level {coarse.shape} below {fine.shape}; give smaller levels of the same channels")
        self._arrays = (array, *coarser)
        self._spacing = spacing
        self.about = about or About("array", "", "given as an argument" if spacing else "nobody said it")

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S."""
        return self.levels[0]

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return len(self._arrays[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        dtype: np.dtype[Any] = self._arrays[0].dtype
        return dtype

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level."""
        return tuple(tuple(array.shape[1:]) for array in self._arrays)

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level."""
        return exact_downsamples(self.levels)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a pixel in mm along each axis, or None."""
        return self._spacing

    @property
    def mpp(self) -> float | None:
        """Um per pixel of a plane, the mean of both axes; None for volumes and where nobody said it."""
        return mpp_of(self._spacing)

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """The whole level: it is held."""
        return self.levels[level]

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the pixels ``[C, *B]`` of a level that touch ``box``; a view where the level holds them all.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
        """
        window = check_window(box, self.shape, level, self.downsamples)
        start, stop = stored_window(window, self.levels[level])
        part = self._arrays[level][(slice(None), *(slice(low, high) for low, high in zip(start, stop, strict=True)))]
        return fill_window(part, window)


def check_window(box: Box, shape: tuple[int, ...], level: int, downsamples: tuple[tuple[float, ...], ...]) -> Box:
    """Checks what every ``read`` is given, and returns the window in pixels of the level.

    Raises:
        ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
    """
    if not 0 <= level < len(downsamples):
        number = f"{len(downsamples)} level" + "s" * (len(downsamples) != 1)
        raise ShapeError(f"level {level} of a raster with {number}; give 0 to {len(downsamples) - 1}")
    start, stop = (tuple(int(value) for value in side) for side in box)
    inside = len(start) == len(stop) == len(shape) and all(
        0 <= low < high <= side for low, high, side in zip(start, stop, shape, strict=True)
    )
    if not inside:
        raise ShapeError(f"box {start} to {stop} in an image of {shape}; give start < stop inside the image")
    return level_window((start, stop), downsamples[level])


def stored_window(window: Box, level_shape: tuple[int, ...]) -> Box:
    """The pixels of a window that a level holds; at least its last one along each axis."""
    start = tuple(min(low, side - 1) for low, side in zip(window[0], level_shape, strict=True))
    return start, tuple(min(high, side) for high, side in zip(window[1], level_shape, strict=True))


def fill_window(part: Shaped[Array, "C *A"], window: Box) -> Shaped[Array, "C *B"]:
    """Repeats the last pixel along each axis where a level ended before its window did."""
    missing = [high - low - have for low, high, have in zip(*window, part.shape[1:], strict=True)]
    return part if not any(missing) else np.pad(part, [(0, 0), *((0, count) for count in missing)], mode="edge")


def open_raster(
    path: str | Path,
    *,
    mpp: float | int | None = None,
    spacing: tuple[float, ...] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    broken: str = "raise",
    cache: TileCache | None = None,
    want: Want = "shown",
) -> Raster:
    """Opens an image, a slide or a volume; the reader is chosen by content, `describe` says which and why.

    Slides, pyramids and images above 2^26 pixels in a TIFF are read tile by tile when asked for; zarr and volumes as
    their own readers do; other images at once. The size of a pixel is the argument's, else what the vendor, OME or
    the TIFF's resolution says, else unknown.

    Args:
        path: Slide, image or volume; a folder of zarr or of a DICOM series.
        mpp: Size of a pixel of a plane, um, against what the file says.
        spacing: The same in mm along each spatial axis; give one of the two.
        max_pixels: Most pixels that an image read at once may declare; what is read by tile has no such limit.
        broken: What a tile that cannot be decoded does: ``"raise"`` a FormatError; ``"fill"`` and ``"skip"`` read
            background and list its box in the raster's ``broken`` (what is skipped is then trained on by nobody). A
            tile of a coarser level is made from finer ones, and its box is in ``mended``.
        cache: Where decoded tiles are kept; None is one of 64 MiB that all rasters of a process share.
        want: What the numbers of an ordinary image or TIFF shall be, as in ``foveate.io.guard.Want``; label masks
            ask for ``"values"``.

    Raises:
        FormatError: missing, damaged, dangerous or unknown file.
        ShapeError: ``spacing`` does not fit the number of axes.
        ConfigError: ``mpp`` or ``broken`` is not allowed, or both sizes are given.

    Cost:
        The tags of a slide; the pixels of an ordinary image.
    """
    from foveate.io.choose import open_by_content

    return open_by_content(
        Path(path), mpp=mpp, spacing=spacing, max_pixels=max_pixels, broken=broken, cache=cache, want=want
    )


def fits_whole(shape: Sequence[int]) -> bool:
    """Whether an image without levels is small enough to be read whole."""
    return prod(shape) <= READ_WHOLE


def is_held(raster: Raster) -> bool:
    """Whether a box costs as much as the whole image: it is in memory, or stored in one piece."""
    return tuple(raster.tile_shape(0)) == tuple(raster.shape)


def about_of(raster: Source) -> About:
    """What a raster says of itself, or its type where it says nothing."""
    about: About | None = getattr(raster, "about", None)
    return about or About(type(raster).__name__, "", "the file" if getattr(raster, "spacing", None) else "nobody")


def broken_of(raster: Source | None) -> list[Box]:
    """Boxes of the tiles of level 0 that could not be decoded so far; none of what knows no such tiles."""
    return list(getattr(raster, "broken", ()))


def mended_of(raster: Source | None) -> list[Box]:
    """Boxes in level-0 pixels of broken tiles of coarser levels, which were made from finer ones so far."""
    return list(getattr(raster, "mended", ()))


def describe(raster: Raster) -> list[str]:
    """Lines that say what a raster is: reader and why, levels, channels and type, size of a pixel and who says so."""
    about = about_of(raster)
    lines = [f"reader: {about.reader}" + (f", because {about.reason}" if about.reason else "")]
    lines.append(f"samples: {raster.channels} channel{'s' * (raster.channels != 1)} of {raster.dtype}")
    for number, (shape, steps) in enumerate(zip(raster.levels, raster.downsamples, strict=True)):
        step = " x ".join(f"{value:.6g}" for value in dict.fromkeys(steps))
        tile = " x ".join(map(str, raster.tile_shape(number)))
        lines.append(f"level {number}: {' x '.join(map(str, shape))} pixels, downsample {step}, tiles of {tile}")
    mpp = mpp_of(raster.spacing)
    if mpp is not None:
        lines.append(f"mpp: {mpp:.5g} um per pixel ({about.origin})")
    elif raster.spacing is not None:
        lines.append(f"spacing: {' x '.join(f'{size:.5g}' for size in raster.spacing)} mm ({about.origin})")
    else:
        lines.append("mpp: unknown; pass --mpp X (mpp=X) where the physical size matters")
    return lines + [f"note: {one_line(note)}" for note in about.notes]
