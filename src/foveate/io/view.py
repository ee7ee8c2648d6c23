"""A raster at another resolution: the same picture in other pixels, made on the fly from the best level that is stored.

A view spans exactly what its raster spans, so pixel i of n along an axis covers the share [i / n, (i + 1) / n) of it.
Shrinking takes the exact area mean of what a pixel covers, enlarging interpolates linearly between pixel centres, and
neighbouring reads fit together without a seam. Legend: C channels, B sides of a box.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.source import Box, level_window
from foveate.io.raster import About, Raster, about_of, broken_of, check_window
from foveate.io.spacing import Real, check_mpp, mpp_of
from foveate.io.stepped import SteppedPlane

Array = NDArray[Any]

_STEP = 4  # between levels of a view
_LEAST_TILE = 64
_SAME = 1e-3  # relative difference of two resolutions that are one


class View(SteppedPlane):
    """A plane in another number of pixels; see the top of the file.

    Its levels are 1, 4, 16, ... times coarser, as long as there are two pixels along each axis. It has the storage,
    the threads and the pickling of the raster that it shows.

    Args:
        raster: What is shown, a plane of any levels.
        shape: Its shape (H, W) as shown.
        nearest: Take the pixel under each centre instead of a mean, as labels need it.

    Raises:
        ShapeError: ``raster`` is no plane, or ``shape`` is not two sides of at least 1.
    """

    def __init__(self, raster: Raster, shape: tuple[int, ...], *, nearest: bool = False) -> None:
        if len(raster.shape) != 2 or len(shape) != 2 or min(shape) < 1:
            raise ShapeError(
                f"a view of {shape} of a raster of {raster.shape}; give two sides of at least 1, of a plane"
            )
        self._raster = raster
        self._nearest = nearest
        steps = [1]
        while min(shape) // (steps[-1] * _STEP) >= 2:
            steps.append(steps[-1] * _STEP)
        super().__init__(shape, steps)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self._raster.channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples, as stored."""
        return self._raster.dtype

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in mm (y, x), or None."""
        spacing = self._raster.spacing
        return None if spacing is None else tuple(np.multiply(spacing, self._ratio()).tolist())

    @property
    def mpp(self) -> float | None:
        """Um per level-0 pixel, or None."""
        return mpp_of(self.spacing)

    @property
    def about(self) -> About:
        """Which reader lies below, and where the pixel size is from."""
        below = about_of(self._raster)
        shown = f"a view of {' x '.join(map(str, self._raster.shape))} pixels"
        return About(below.reader, below.reason, below.origin, (*below.notes, shown))

    @property
    def broken(self) -> list[Box]:
        """Boxes of broken tiles so far, in level-0 pixels of the view."""
        return [level_window(box, self._ratio()) for box in broken_of(self._raster)]

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """What one storage tile covers, or as many as make 64 pixels, in pixels of the level."""
        stored, _, scale = self._best(level)
        tiles = zip(self._raster.tile_shape(stored), scale, self.levels[level], strict=True)
        covered = [(max(1, round(side / step)), full) for side, step, full in tiles]
        return tuple(min(side * -(-_LEAST_TILE // side), full) for side, full in covered)

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the pixels ``[C, *B]`` of a level that touch ``box``; channels lie last in memory.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the view.
            FormatError: as the raster below.

        Cost:
            One read of the same area from the coarsest level that is no coarser than what is asked for.
        """
        start, stop = check_window(box, self.shape, level, self.downsamples)
        stored, steps, scale = self._best(level)
        limits = [math.ceil(full / step - 1e-9) for full, step in zip(self._raster.shape, steps, strict=True)]
        taps = [
            _taps(low, high, ratio, limit, full * ratio / step, self._nearest)
            for low, high, ratio, limit, full, step in zip(
                start, stop, scale, limits, self.shape, (self._steps[level],) * 2, strict=True
            )
        ]
        low = [int(first.min()) for first, _ in taps]
        high = [int(first.max()) + weight.shape[1] for first, weight in taps]
        below = (
            tuple(math.floor(at * step + 1e-9) for at, step in zip(low, steps, strict=True)),
            tuple(
                min(math.ceil(at * step - 1e-9), full)
                for at, step, full in zip(high, steps, self._raster.shape, strict=True)
            ),
        )
        origin = level_window(below, steps)[0]
        source = np.moveaxis(self._raster.read(below, stored), 0, -1)
        (first_y, weight_y), (first_x, weight_x) = taps
        first_y, first_x = first_y - origin[0], first_x - origin[1]
        if self._nearest:
            return source[first_y[:, None], first_x[None]].transpose(2, 0, 1)
        return _blend(source, first_y, weight_y, first_x, weight_x).transpose(2, 0, 1)

    def _ratio(self) -> tuple[float, ...]:
        """Pixels of the raster's level 0 per pixel of the view's."""
        return tuple(below / side for below, side in zip(self._raster.shape, self._shape, strict=True))

    def _best(self, level: int) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """The level below to read, its downsample, and its pixels per pixel of ours along each axis."""
        wanted = [ratio * self._steps[level] for ratio in self._ratio()]
        below = self._raster.downsamples
        fitting = [
            number
            for number, steps in enumerate(below)
            if all(step <= want * (1 + _SAME) for step, want in zip(steps, wanted, strict=True))
        ]
        stored = fitting[-1] if fitting else 0
        return stored, below[stored], tuple(want / step for want, step in zip(wanted, below[stored], strict=True))


def at_mpp(raster: Raster, mpp: Real, *, nearest: bool = False) -> Raster:
    """Shows a plane at another resolution.

    Args:
        raster: A plane whose pixel size is known.
        mpp: Um per pixel of the result; its true spacing differs from it by what rounding to whole pixels takes.
        nearest: Labels: take the pixel under each centre instead of a mean.

    Returns:
        The raster itself where it has that resolution (to 0.1 %), else a `View` of it.

    Raises:
        ConfigError: nobody said how large a pixel is, or ``mpp`` is no size of a pixel.
    """
    check_mpp(mpp)
    if len(raster.shape) != 2:
        raise ConfigError(f"mpp={mpp} of a volume of {raster.shape}; only planes are shown at another mpp")
    if raster.spacing is None:
        raise ConfigError(
            f"mpp={mpp} of an image whose pixel size nobody said; pass --mpp X (mpp=X), the um per pixel that it has"
        )
    ratios = [mpp / (1000 * size) for size in raster.spacing]
    if all(abs(ratio - 1) <= _SAME for ratio in ratios):
        return raster
    return View(raster, tuple(max(1, round(s / r)) for s, r in zip(raster.shape, ratios, strict=True)), nearest=nearest)


def _taps(low: int, high: int, scale: float, limit: int, end: float, nearest: bool) -> tuple[Array, Array]:
    """The pixels below that make the pixels ``low`` to ``high``, and their shares.

    Args:
        low, high: Pixels asked for.
        scale: Pixels below per pixel.
        limit: Number of pixels below.
        end: Where the picture ends, in pixels below; at most ``limit``.
        nearest: One pixel each.

    Returns:
        First pixel ``[O]`` and shares ``[O, T]``, all inside ``limit``.
    """
    index = np.arange(low, high)
    left = index * scale
    right = np.minimum(left + scale, end)
    if nearest:
        return np.clip(np.floor((left + right) / 2).astype(np.int64), 0, limit - 1), np.ones((len(index), 1))
    if scale >= 1 - _SAME:
        first = np.clip(np.floor(left + 1e-6).astype(np.int64), 0, limit - 1)
        last = np.clip(np.ceil(right - 1e-6).astype(np.int64), first + 1, limit)
    else:
        centre = np.clip((left + right) / 2 - 0.5, 0, limit - 1)
        first = np.minimum(np.floor(centre).astype(np.int64), max(limit - 2, 0))
        last = np.minimum(first + 2, limit)
    count = int((last - first).max())
    first = np.minimum(first, limit - count)
    pixel = first[:, None] + np.arange(count)
    if scale >= 1 - _SAME:
        weight = np.minimum(pixel + 1, right[:, None]) - np.maximum(pixel, left[:, None])
    else:
        weight = 1 - np.abs(pixel - centre[:, None])
    weight = np.maximum(weight, 0)
    return first, weight / weight.sum(axis=1, keepdims=True)


def _blend(source: Array, first_y: Array, weight_y: Array, first_x: Array, weight_x: Array) -> Array:
    """Weighted means ``[O, Q, C]`` of ``source`` [H, W, C], rounded where the type is whole."""
    from foveate.io.kernels_resize import blend

    kind = source.dtype
    if kind.kind == "b":
        source = source.view(np.uint8)
    real = np.float32 if source.dtype.itemsize <= 2 or source.dtype == np.float32 else np.float64
    row = np.empty(source.shape[1] * source.shape[2], real)
    out = np.empty((len(first_y), len(first_x), source.shape[2]), real)
    blend(np.ascontiguousarray(source), first_y, weight_y.astype(real), first_x, weight_x.astype(real), row, out)
    if kind.kind in "biu":
        np.rint(out, out=out)
    return out.astype(kind)
