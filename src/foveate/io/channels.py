"""An image whose channels lie in several files, such as the sequences of an MRI examination."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from foveate.io.guard import DEFAULT_MAX_PIXELS, bad_file, check_size
from foveate.io.raster import ArrayRaster, Raster, open_raster
from foveate.io.volume import Volume, is_volume, open_volume

_SAME_PLACE = 1e-3  # mm (per voxel) by which affines may differ


def open_channels(
    paths: Sequence[str | Path],
    *,
    spacing: tuple[float, ...] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    canonical: bool = False,
) -> Raster:
    """Read files of one grid as the channels of one image, in the order given.

    Args:
        paths: the files, at least one; all volumes, or all images.
        spacing: size of a voxel in mm as stored, instead of what the first file says.
        max_pixels: most pixels of each file.
        canonical: as in ``open_volume``.

    Returns:
        A `Volume` in the grid of the first file, or a raster that is held.

    Raises:
        FormatError: a file is unreadable, or its shape or its place in space is not that of the first.

    Cost: all files are read and held.
    """
    if not is_volume(paths[0]):
        parts = [open_raster(path, spacing=spacing, max_pixels=max_pixels) for path in paths]
        return ArrayRaster(_stacked(paths, parts, max_pixels), parts[0].spacing)
    volumes = [open_volume(path, spacing=spacing, max_pixels=max_pixels) for path in paths]
    first = volumes[0]
    for path, volume in zip(paths, volumes, strict=True):
        if volume.shape == first.shape and not np.allclose(volume.affine, first.affine, rtol=0, atol=_SAME_PLACE):
            raise bad_file(Path(path), f"lies elsewhere in space than {Path(paths[0]).name}; register them to one grid")
    names = tuple(str(path) for path in paths)
    reopen = partial(open_channels, names, spacing=spacing, max_pixels=max_pixels, canonical=canonical)
    return Volume(_stacked(paths, volumes, max_pixels), first.grid, reopen, canonical)  # type: ignore[arg-type]


def _stacked(paths: Sequence[str | Path], parts: Sequence[Raster], max_pixels: int) -> np.ndarray:
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if part.shape != first.shape:
            sizes = [" x ".join(map(str, one.shape)) for one in (part, first)]
            raise bad_file(Path(path), f"is {sizes[0]} and {Path(paths[0]).name} is {sizes[1]}; bring them to one grid")
        check_size(Path(path), part.shape, part.channels, max_pixels)
    whole = (0,) * len(first.shape), first.shape
    return np.concatenate([part.read(whole) for part in parts])
