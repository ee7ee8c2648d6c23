"""Volumes with their place in space: NIfTI files and DICOM series, held; labels go back to their grid."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.io.grid import Affine, Grid, Turn, orientation, turn_to_ras
from foveate.io.guard import DEFAULT_MAX_PIXELS, bad_file, one_line
from foveate.io.nifti import is_nifti, read_nifti
from foveate.io.raster import ArrayRaster

Array = NDArray[Any]


class Volume(ArrayRaster):
    """A volume ``[C, D, H, W]`` in array order (z, y, x), and where it lies.

    It is pickled as its path and opened again, so that workers do not copy voxels through a pipe.

    Args:
        array: Voxels as stored.
        grid: Where they lie.
        reopen: What opens the file again.
        canonical: True turns the axes to those closest to right, anterior, superior.
    """

    def __init__(
        self, array: Shaped[Array, "C D H W"], grid: Grid, reopen: "partial[Volume]", canonical: bool = False
    ) -> None:
        self._turn = turn_to_ras(grid.affine) if canonical else Turn()
        spacing = grid.spacing
        if spacing is not None:
            spacing = tuple(spacing[2 - axis] for axis in reversed(self._turn.order))
        super().__init__(np.ascontiguousarray(self._turn.there(array)), spacing)
        self._grid, self._reopen = grid, reopen

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    @property
    def grid(self) -> Grid:
        """The grid as stored in the file."""
        return self._grid

    @property
    def affine(self) -> Affine:
        """Voxel indices (x, y, z) of this volume to mm, RAS+."""
        return self._turn.affine(self._grid.affine, self._grid.shape)

    @property
    def orientation(self) -> str:
        """Where the axes (x, y, z) point, such as ``"RAS"``: to the right, to the front, up."""
        return orientation(self.affine)

    def to_native(self, labels: Shaped[Array, "D H W"]) -> Shaped[Array, "Z Y X"]:
        """Brings an array in the frame of this volume into the grid that the file stores; a view.

        Raises:
            ShapeError: ``labels`` are not of this volume's shape.
        """
        if labels.shape != self.shape:
            raise ShapeError(f"labels of shape {labels.shape} for a volume of {self.shape}; give one label per voxel")
        return self._turn.back(labels)

    def describe(self) -> list[str]:
        """Says in lines what was read, how, and what had to be decided."""
        sides = " x ".join(map(str, self.shape))
        size = "unknown" if self.spacing is None else " x ".join(f"{side:g}" for side in self.spacing) + " mm"
        turned = f", turned from {orientation(self._grid.affine)}" if self._turn != Turn() else ""
        return [
            f"reader: {self._grid.reader}",
            f"shape: {sides} (z, y, x), {self.channels} channel" + "s" * (self.channels != 1) + f", {self.dtype}",
            f"spacing: {size} (z, y, x)",
            f"orientation: {self.orientation} (x, y, z)" + turned,
            *(f"note: {one_line(note)}" for note in self._grid.notes),
        ]


def is_volume(path: str | Path) -> bool:
    """True if ``open_volume`` is meant to read this: NIfTI or DICOM by content, or a folder with a DICOM file in it."""
    from foveate.io.dicom import is_dicom

    return is_dicom(path) or (Path(path).is_file() and is_nifti(path))


def open_volume(
    path: str | Path,
    *,
    spacing: tuple[float, ...] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    canonical: bool = False,
) -> Volume:
    """Reads a NIfTI file, or a DICOM series by its folder or one of its files.

    The array is NIfTI's (x, y, z) transposed to (z, y, x). A fourth axis becomes the channels; a picture of two axes
    is a volume of one slice. The stored type is kept, unless slope and intercept change the values: then float32
    (float64 for 8-byte types). The place in space is that of the sform, else the qform, else pixdim.

    Args:
        path: ``.nii`` or ``.nii.gz`` by content; a folder that holds one DICOM series; or one file of a series.
        spacing: Size of a voxel in mm (z, y, x) as stored, instead of what the file says.
        max_pixels: Most voxels that the header may declare; checked before anything is allocated.
        canonical: True turns and flips the axes to those closest to right, anterior, superior (RAS+).
            ``write_volume`` turns labels back.

    Raises:
        FormatError: missing, truncated, corrupt or inconsistent file, too large, NaN or infinite values, several
            series.
        ShapeError: ``spacing`` is not three sizes above 0.
        MissingExtraError: DICOM, and SimpleITK is not installed.

    Cost:
        The time of inflating; memory of the voxels and of the compressed file (twice the voxels where they are
        scaled or turned).
    """
    path = Path(path)
    if spacing is not None and (len(spacing) != 3 or not all(0 < size < np.inf for size in spacing)):
        raise ShapeError(f"spacing {spacing} for 3 axes; give (z, y, x) in mm, each above 0")
    reopen = partial(open_volume, os.fspath(path), spacing=spacing, max_pixels=max_pixels, canonical=canonical)
    from foveate.io.dicom import is_dicom, read_dicom

    if is_dicom(path):
        array, grid = read_dicom(path, spacing, max_pixels)
    elif path.is_dir():
        raise bad_file(path, "is a folder without DICOM files; give a NIfTI file or the folder of a series")
    else:
        array, grid = read_nifti(path, spacing, max_pixels)
    return Volume(array, grid, reopen, canonical)
