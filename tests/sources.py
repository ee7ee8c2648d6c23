"""Sources for tests: held arrays that pretend to be stored in tiles, and count what is read of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.source import Box
from foveate.io.raster import ArrayRaster


class TiledRaster(ArrayRaster):
    """An `ArrayRaster` in tiles of one side; ``reads`` counts the windows read, by level and box."""

    def __init__(
        self, array: NDArray[Any], spacing: tuple[float, ...] | None = None, coarser: Sequence[Any] = (), tile: int = 16
    ) -> None:
        super().__init__(array, spacing, coarser)
        self.tile = tile
        self.reads: Counter[tuple[int, Box]] = Counter()

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        return (self.tile,) * len(self.shape)

    def read(self, box: Box, level: int = 0) -> NDArray[Any]:
        self.reads[level, box] += 1
        return super().read(box, level)

    def levels_read(self) -> set[int]:
        return {level for level, _ in self.reads}


def mean_levels(image: NDArray[Any], steps: Sequence[int]) -> list[NDArray[Any]]:
    """Exact area means of an image by whole steps; the last pixel along an axis averages what is left."""
    levels = []
    for step in steps:
        level = image.astype(np.float64)
        for axis in range(1, image.ndim):
            edges = np.arange(0, image.shape[axis], step)
            counts = np.minimum(step, image.shape[axis] - edges)
            level = np.add.reduceat(level, edges, axis)
            level /= counts.reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        levels.append(level.astype(image.dtype))
    return levels
