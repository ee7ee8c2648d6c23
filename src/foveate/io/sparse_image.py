"""Images of which nearly all is black, kept as the pixels that are not: a plane of bytes in a safetensors file.

Legend: M pixels that are not 0, N boxes.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.geometry.source import Box
from foveate.io.guard import one_line
from foveate.io.raster import About, check_window, fits_whole
from foveate.io.spacing import mpp_of
from foveate.io.stepped import SteppedPlane
from foveate.io.tensor_file import TensorFile, write_tensors

KIND = "foveate sparse image"
_TILE = 512  # side of what is made dense at once
_STEP = 4  # between levels
_MOST = 2**40  # pixels


class SparseRaster(SteppedPlane):
    """A plane of one channel, black but for some pixels; what is read of it is made dense, the whole never.

    An image that is soon read has one level, others are also there in 4, 16, ... times fewer pixels.

    Args:
        shape: (H, W) in pixels.
        index: places ``y W + x`` of the pixels that are not 0, rising.
        value: their values.
        spacing: size of a pixel in mm along each axis.

    Raises:
        ShapeError: no plane, or places that do not rise or lie outside it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        index: Int64[np.ndarray, " M"],
        value: UInt8[np.ndarray, " M"],
        spacing: tuple[float, ...] | None = None,
    ) -> None:
        if len(shape) != 2 or min(shape) < 1 or prod(shape) > _MOST or len(index) != len(value):
            raise ShapeError(
                f"{len(value)} values at {len(index)} places of {shape}; give one each, of a plane up to 2^40 pixels"
            )
        if len(index) and not (index[0] >= 0 and index[-1] < prod(shape) and bool((np.diff(index) > 0).all())):
            raise ShapeError(f"places of pixels must rise from 0 to {prod(shape) - 1}, without repeats; sort them")
        steps = [1]
        while not fits_whole(shape) and max(shape) > _TILE * steps[-1]:
            steps.append(steps[-1] * _STEP)
        super().__init__(shape, steps)
        self.index, self.value, self._spacing = index, value, spacing

    @property
    def channels(self) -> int:
        """One."""
        return 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Bytes."""
        return np.dtype(np.uint8)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a pixel in mm along each axis, or None."""
        return self._spacing

    @property
    def mpp(self) -> float | None:
        """Um per pixel, or None."""
        return mpp_of(self._spacing)

    @property
    def about(self) -> About:
        """That it is sparse, and how much of it is there."""
        share = f"{len(self.index)} of {prod(self._shape)} pixels are not 0"
        return About("sparse image", share, "given as an argument" if self._spacing else "nobody said it")

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """What is worth making dense at once."""
        height, width = self.levels[level]
        return (min(_TILE, height), min(_TILE, width))

    def read(self, box: Box, level: int = 0) -> Shaped[np.ndarray, "1 *B"]:
        """Returns the pixels ``[1, *B]`` of a level that touch ``box``; those of a coarser one are area means.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
        """
        (top, left), (bottom, right) = check_window(box, self._shape, level, self.downsamples)
        step, (height, width) = self._steps[level], self._shape
        rows = slice(*np.searchsorted(self.index, [top * step * width, bottom * step * width]))
        y, x = (at // step for at in np.divmod(self.index[rows], width))
        inside = (x >= left) & (x < right)
        y, x, value = y[inside] - top, x[inside] - left, self.value[rows][inside]
        if step == 1:
            out = np.zeros((1, bottom - top, right - left), np.uint8)
            out[0, y, x] = value
            return out
        sides = (bottom - top, right - left)
        total = np.bincount(y * sides[1] + x, value, sides[0] * sides[1]).reshape(1, *sides)
        area = [
            np.minimum(step, full - np.arange(low, high) * step)
            for low, high, full in ((top, bottom, height), (left, right, width))
        ]
        mean: NDArray[np.uint8] = np.rint(total / (area[0][:, None] * area[1])).astype(np.uint8)
        return mean

    def blank(self, boxes: Int64[np.ndarray, "N 2 2"]) -> Bool[np.ndarray, " N"]:
        """Returns which boxes are black all over.

        Cost: memory for as many cells as the sides of all boxes cut the image into.
        """
        y, x = np.divmod(self.index, self._shape[1])
        edges = [np.unique(boxes[:, :, axis]) for axis in (0, 1)]
        cell = [np.searchsorted(edge, at, side="right") for edge, at in zip(edges, (y, x), strict=True)]
        counts = np.zeros([len(edge) + 1 for edge in edges], np.int64)
        np.add.at(counts, tuple(cell), 1)
        counts = counts.cumsum(0).cumsum(1)  # of pixels above and left of an edge
        top, left = (np.searchsorted(edge, boxes[:, 0, axis]) for axis, edge in enumerate(edges))
        bottom, right = (np.searchsorted(edge, boxes[:, 1, axis]) for axis, edge in enumerate(edges))
        held = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
        none: NDArray[np.bool_] = held == 0
        return none


def write_sparse(path: str | Path, image: SparseRaster, *, overwrite: bool = False) -> Path:
    """Writes the pixels that are not 0 with their places, as safetensors; 5 bytes a pixel up to 65,536 squared.

    Raises:
        FormatError: the path exists or cannot be written.
    """
    place = np.uint32 if prod(image.shape) <= 2**32 else np.int64
    about = {"kind": KIND, "shape": json.dumps(image.shape)}
    if image.spacing is not None:
        about["spacing"] = json.dumps(image.spacing)
    tensors = {"index": image.index.astype(place), "value": image.value}
    return write_tensors(path, tensors, about, overwrite=overwrite)


def open_sparse(path: str | Path, *, spacing: tuple[float, ...] | None = None) -> SparseRaster:
    """Opens what `write_sparse` wrote; the pixels that are not 0 are read.

    Args:
        path: The file.
        spacing: Size of a pixel in mm along each axis, against what the file says.

    Raises:
        FormatError: missing, damaged, or another kind of file.
    """
    path = Path(path)
    file = TensorFile(path, KIND, "write it with foveate.io.sparse_image.write_sparse")
    index, value = file.tensor("index", 1, "ui"), file.tensor("value", 1, "u")
    try:
        shape = tuple(int(side) for side in file.value("shape", ()))
        said = file.value("spacing")
        found = None if said is None else tuple(float(size) for size in said)
        return SparseRaster(shape, index.astype(np.int64), value.astype(np.uint8), spacing or found)
    except (ShapeError, TypeError, ValueError, OverflowError) as error:
        raise file.damaged(one_line(error)) from None
