"""Polygons of classes as a label image of any size, painted where it is read."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from foveate.geometry.rings import Polygons, fill
from foveate.geometry.source import Box
from foveate.io.raster import check_window, fill_window, stored_window

Array = NDArray[Any]

_STEP = 4  # from one level to the next
_SMALL = 512  # pixels of a level that needs no further one


@dataclass(frozen=True, eq=False)
class Annotations:
    """A label raster that holds polygons and no pixels: uint8, one channel, 0 where no polygon is.

    Its levels have downsamples 1, 4, 16, ...; each of their pixels is the label at its centre, so the pixel ``i`` of
    level ``k`` is the level-0 pixel ``i d + d / 2``, ``d = 4^k``. A level holds the pixels whose centre lies in the
    image.

    Args:
        polygons: Labelled polygons in level-0 pixels; what lies outside the image is cut off.
        shape: (H, W) of the image.
        spacing: Size of a level-0 pixel in mm along each axis, or None.
        notes: What was met while reading that the user should know, one line each.

    Cost: reading a box costs a look at every polygon's bounds and the points of those that meet the box.
    """

    polygons: Polygons
    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """One: the label."""
        return 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def _steps(self) -> tuple[int, ...]:
        steps = [1]
        while max(self.shape) > _SMALL * steps[-1] and 2 * min(self.shape) > _STEP * steps[-1]:
            steps.append(_STEP * steps[-1])
        return tuple(steps)

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level."""
        return tuple(tuple(ceil(side / step - 0.5) for side in self.shape) for step in self._steps)

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level."""
        return tuple((float(step),) * 2 for step in self._steps)

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """A convenient block; nothing is stored, so any box costs what it holds."""
        height, width = self.levels[level]
        return min(height, _SMALL), min(width, _SMALL)

    def read(self, box: Box, level: int = 0) -> UInt8[Array, "1 *B"]:
        """Returns the labels ``[1, *B]`` of the pixels of a level that touch ``box``.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
        """
        window = check_window(box, self.shape, level, self.downsamples)
        step = self._steps[level]
        start, stop = (tuple(step * at for at in side) for side in stored_window(window, self.levels[level]))
        return np.asarray(fill_window(fill(self.polygons, (start, stop), step)[None], window))
