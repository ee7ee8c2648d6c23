"""What the geometry needs to know of an image that is too large to hold: its levels, and pixels by box.

Legend: C channels, N spatial axes, B sides of a box.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

Box = tuple[tuple[int, ...], tuple[int, ...]]  # start and stop in level-0 pixels, array order


@runtime_checkable
class Source(Protocol):
    """An image or a volume of one or more levels, read by box.

    Pixel ``i`` of a level with downsample ``d`` covers the level-0 pixels ``[i d, (i + 1) d)`` along each axis.
    """

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
        """Spatial shape of every level as stored, level 0 (the largest) first."""
        ...

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level along each axis; a whole number wherever the level allows it."""
        ...

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """Storage block of a level in its own pixels, what is decoded at once; the level's shape if it is held."""
        ...

    def read(self, box: Box, level: int = 0) -> Shaped[np.ndarray, "C *B"]:
        """Returns the pixels ``[C, *B]`` of one level that touch ``box``, see `level_window`.

        The box must lie inside level 0. Where a level was stored one pixel short of its window (writers round down),
        its last pixel is repeated, so the shape is always that of `level_window`.
        """
        ...


def level_window(box: Box, downsample: Sequence[float]) -> Box:
    """The pixels of a level that touch a box: ``floor(start / d)`` to ``ceil(stop / d)`` along each axis.

    Args:
        box: start and stop in level-0 pixels.
        downsample: level-0 pixels per pixel of the level, per axis.

    Returns:
        Start and stop in pixels of the level.
    """
    start = tuple(math.floor(low / step + 1e-9) for low, step in zip(box[0], downsample, strict=True))
    stop = tuple(math.ceil(high / step - 1e-9) for high, step in zip(box[1], downsample, strict=True))
    return start, stop


def exact_downsample(full: int, level: int) -> float:
    """Level-0 pixels per pixel along one axis, a whole number where rounding of ``level`` allows it.

    Args:
        full: pixels of level 0.
        level: pixels of the level.

    Writers round a level's side up, down or to the nearest, so 2967 pixels at 4 x may be stored as 741 or 742; both
    are 4 exactly, not 4.004 or 3.998. Of several whole numbers that rounding allows, a power of two is meant.
    """
    ratio = full / level
    power = 2 ** round(math.log2(ratio))
    for whole in (power, round(ratio)):
        if abs(full / whole - level) < 1:
            return float(whole)
    return ratio


def exact_downsamples(levels: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Level-0 pixels per pixel of every level along each axis, from the spatial shapes of the levels."""
    return tuple(
        tuple(exact_downsample(full, side) for full, side in zip(levels[0], level, strict=True)) for level in levels
    )
