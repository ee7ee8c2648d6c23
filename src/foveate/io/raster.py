"""Images and volumes read by box; the one thing that cutting and prediction need to know of a file."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.io.guard import DEFAULT_MAX_PIXELS
from foveate.io.image import read_image

Array = NDArray[Any]
Box = tuple[tuple[int, ...], tuple[int, ...]]  # start and stop in level-0 pixels, array order


@runtime_checkable
class Raster(Protocol):
    """An image or a volume, held or on disk, of one or more levels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S of level 0, (H, W) or (D, H, W)."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels C."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples, as stored."""
        ...

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level, level 0 (the largest) first."""
        ...

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in mm along each axis, or None where nobody said it."""
        ...

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the samples ``[C, *B]`` of one level that lie in ``box``, given in level-0 pixels."""
        ...


class ArrayRaster:
    """An array as a raster of one level; boxes are views, nothing is copied.

    Args:
        array: ``[C, H, W]`` or ``[C, D, H, W]``.
        spacing: Size of a pixel in mm along each spatial axis.

    Raises:
        ShapeError: the array is of another shape, or ``spacing`` does not have one size above 0 for each axis.
    """

    def __init__(self, array: Shaped[Array, "..."], spacing: tuple[float, ...] | None = None) -> None:
        if array.ndim not in (3, 4) or array.size == 0:
            raise ShapeError(f"array of shape {array.shape}; give [C, H, W] or [C, D, H, W], no axis empty")
        if spacing is not None and (len(spacing) != array.ndim - 1 or not all(size > 0 for size in spacing)):
            raise ShapeError(f"spacing {spacing} for {array.ndim - 1} axes; give one size in mm above 0 for each")
        self._array = array
        self._shape: tuple[int, ...] = array.shape[1:]
        self._spacing = spacing

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S."""
        return self._shape

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return len(self._array)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The one level's shape."""
        return (self.shape,)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a pixel in mm along each axis, or None."""
        return self._spacing

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the view ``[C, *B]`` of ``box``, which must lie inside the image.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
        """
        if level != 0:
            raise ShapeError(f"level {level} of a raster with 1 level; give level 0")
        start, stop = (tuple(int(value) for value in side) for side in box)
        inside = len(start) == len(stop) == len(self.shape) and all(
            0 <= low < high <= side for low, high, side in zip(start, stop, self.shape, strict=True)
        )
        if not inside:
            raise ShapeError(f"box {start} to {stop} in an image of {self.shape}; give start < stop inside the image")
        return self._array[(slice(None), *(slice(low, high) for low, high in zip(start, stop, strict=True)))]


def open_raster(
    path: str | Path, *, spacing: tuple[float, ...] | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Raster:
    """Opens a file as a raster; ordinary images and volumes are read at once, see ``read_image``.

    Args:
        path: The file.
        spacing: Size of a pixel in mm along each spatial axis, if known.
        max_pixels: As in ``read_image``.

    Raises:
        FormatError: as ``read_image``.
        ShapeError: ``spacing`` does not fit the number of axes.
    """
    return ArrayRaster(read_image(path, max_pixels=max_pixels), spacing)
