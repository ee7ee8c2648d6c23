"""Periodic textures that look like stained tissue: fibres, glands, nuclei."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray

from foveate.geometry.image import Real
from foveate.geometry.source import Box

Array = NDArray[np.float32]
_STROMA, _CYTOPLASM, _TUMOUR = (226, 160, 190), (214, 150, 186), (186, 128, 182)
_NUCLEUS, _DARK_NUCLEUS, _LUMEN = (108, 74, 142), (78, 50, 118), (240, 234, 240)


@dataclass(frozen=True)
class Textures:
    """Four textures ``[P, P, 3]``, each of a period of its own, so that together they repeat late."""

    banks: dict[str, UInt8[np.ndarray, "P P 3"]]

    def window(self, name: str, box: Box) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels of a box of one texture, which is repeated without end."""
        bank = self.banks[name]
        rows, columns = (np.arange(low, high) % len(bank) for low, high in zip(*box, strict=True))
        part: NDArray[np.uint8] = bank[rows][:, columns]
        return part


def make_textures(seed: int) -> Textures:
    """Draws the textures of one seed.

    Cost: 1 s.
    """
    rng = np.random.Generator(np.random.PCG64((seed, 1)))
    return Textures(
        {
            "glass": _glass(rng, 512),
            "stroma": _stroma(rng, 1024),
            "glands": _glands(rng, 1152),
            "tumour": _tumour(rng, 896),
        }
    )


def _noise(rng: np.random.Generator, period: int, steps: tuple[int, int]) -> Float32[np.ndarray, "P P"]:
    """Smooth noise in [-1, 1] that repeats, from a grid of the given steps, which divide the period."""
    field: Array = rng.integers(-127, 128, [period // step for step in steps]).astype(np.float32) / np.float32(127)
    for axis, step in enumerate(steps):
        place = (np.arange(period, dtype=np.float32) + np.float32(0.5)) / np.float32(step)
        cell = place.astype(np.int64)
        t = place - cell.astype(np.float32)
        weight = (t * t * (3 - 2 * t)).reshape((-1, 1) if axis == 0 else (1, -1))
        low, high = np.take(field, cell, axis), np.take(field, (cell + 1) % field.shape[axis], axis)
        field = low + (high - low) * weight
    return field


def _colour(value: Array, base: Sequence[int], contrast: Sequence[Real]) -> Float32[np.ndarray, "P P 3"]:
    picture: Array = np.array(base, np.float32) + value[..., None] * np.array(contrast, np.float32)
    return picture


def _finish(rng: np.random.Generator, picture: Array) -> UInt8[np.ndarray, "P P 3"]:
    grain = rng.integers(-5, 6, picture.shape, dtype=np.int8)
    pixels: NDArray[np.uint8] = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return pixels


def _discs(
    rng: np.random.Generator,
    picture: Array,
    count: int,
    radii: tuple[float, float],
    colour: Sequence[int],
    place: NDArray[np.int64] | None = None,
) -> None:
    """Stamps soft, uneven ellipses over the edge of the period, where ``place`` says or anywhere."""
    period = len(picture)
    for index in range(count):
        centre = rng.integers(0, period, 2) if place is None else place[index]
        radius = radii[0] + (radii[1] - radii[0]) * float(rng.integers(0, 256)) / 255
        stretch, turn = 1 + float(rng.integers(0, 160)) / 200, rng.integers(-100, 101, 2) / 100
        length = float((turn * turn).sum()) ** 0.5 + 1e-6
        reach = int(radius * stretch) + 3
        line = np.arange(-reach, reach + 1, dtype=np.float32)
        along = (line[:, None] * turn[0] + line * turn[1]) / length / (radius * stretch)
        across = (line[:, None] * turn[1] - line * turn[0]) / length / radius
        alpha = np.clip((1 - np.sqrt(along * along + across * across)) * radius / 2, 0, 1).astype(np.float32)
        rim = 1 - np.float32(0.25) * np.clip(alpha * 4 - 3, 0, 1)  # chromatin is paler inside
        rows, columns = (np.arange(c - reach, c + reach + 1) % period for c in centre)
        part = picture[np.ix_(rows, columns)]
        shade = np.float32(0.85 + float(rng.integers(0, 256)) / 850)
        wanted = 255 - (255 - np.array(colour, np.float32) * shade) * rim[..., None]
        picture[np.ix_(rows, columns)] = part + alpha[..., None] * np.float32(0.9) * (wanted - part)


def _glass(rng: np.random.Generator, period: int) -> UInt8[np.ndarray, "P P 3"]:
    shade = _noise(rng, period, (128, 128)) + rng.integers(-2, 3, (period, period)).astype(np.float32)
    return _finish(rng, _colour(shade, (241, 240, 243), (1, 1, 1)))


def _stroma(rng: np.random.Generator, period: int) -> UInt8[np.ndarray, "P P 3"]:
    """Wavy fibres with few, thin nuclei."""
    bend = np.rint(40 * _noise(rng, period, (128, 128)) + 12 * _noise(rng, period, (32, 64))).astype(np.int64)
    fibres = _noise(rng, period, (8, 128)) + np.float32(0.7) * _noise(rng, period, (4, 32))
    rows = (np.arange(period)[:, None] + bend) % period
    value = fibres[rows, np.arange(period)] + np.float32(0.6) * _noise(rng, period, (64, 64))
    picture = _colour(value, _STROMA, (11, 22, 14))
    _discs(rng, picture, period * period // 9000, (4.0, 7.0), _NUCLEUS)
    return _finish(rng, picture)


def _glands(rng: np.random.Generator, period: int) -> UInt8[np.ndarray, "P P 3"]:
    """Rings of nuclei around a pale lumen."""
    value = _noise(rng, period, (64, 64)) + np.float32(0.8) * _noise(rng, period, (8, 8))
    picture = _colour(value, _CYTOPLASM, (9, 16, 11))
    for _ in range(period * period // 60000):
        centre, radius = rng.integers(0, period, 2), float(rng.integers(45, 110))
        _discs(rng, picture, 1, (radius * 0.9, radius), _CYTOPLASM, centre[None])
        _discs(rng, picture, 1, (radius * 0.35, radius * 0.5), _LUMEN, centre[None])
        count = int(radius * 0.45)
        angle = np.arange(count) * (2 * np.pi / count)
        ring = np.stack([np.sin(angle), np.cos(angle)], axis=1) * radius * 0.85 + rng.integers(-6, 7, (count, 2))
        _discs(rng, picture, count, (6.0, 9.5), _NUCLEUS, centre + np.rint(ring).astype(np.int64))
    _discs(rng, picture, period * period // 12000, (4.0, 8.0), _NUCLEUS)
    return _finish(rng, picture)


def _tumour(rng: np.random.Generator, period: int) -> UInt8[np.ndarray, "P P 3"]:
    """Crowded nuclei of very different sizes, no glands."""
    value = _noise(rng, period, (32, 32)) + np.float32(0.8) * _noise(rng, period, (8, 4))
    picture = _colour(value, _TUMOUR, (10, 16, 10))
    _discs(rng, picture, period * period // 1300, (7.0, 16.0), _DARK_NUCLEUS)
    _discs(rng, picture, period * period // 2500, (4.0, 7.0), _NUCLEUS)
    return _finish(rng, picture)
