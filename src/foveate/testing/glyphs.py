"""Drawn digits and strokes of any small size: lines through few points, bent, turned, thickened, all from numbers.

Legend: G glyphs, K points of a line, S sides of a picture.
"""

from functools import cache

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

Array = NDArray[np.float32]
NUM_DIGITS = 10

# One line per digit on a board of 10 x 10, (y, x); corners are cut twice, so that they are round.
_LINES = (
    ((0, 5), (0, 1), (5, 0), (10, 1), (10, 9), (5, 10), (0, 9), (0, 5)),
    ((2, 3), (1, 4), (0, 6), (3, 6), (7, 6), (9, 6), (10, 6)),
    ((3, 1), (0, 1), (0, 9), (4, 9), (7, 4), (10, 0), (10, 5), (10, 9)),
    ((1, 1), (0, 9), (4, 9), (5, 4), (5, 5), (6, 10), (10, 9), (9, 1)),
    ((6, 10), (6, 5), (6, 0), (3, 4), (0, 8), (0, 8), (5, 8), (10, 8)),
    ((0, 9), (0, 5), (0, 2), (4, 1), (4, 9), (10, 10), (10, 3), (9, 1)),
    ((0, 8), (2, 2), (8, 0), (10, 3), (10, 9), (5, 10), (5, 3), (8, 1)),
    ((0, 0), (0, 5), (0, 10), (2, 9), (5, 6), (8, 4), (10, 3)),
    ((5, 5), (2, 1), (0, 5), (2, 9), (5, 5), (8, 0), (10, 5), (8, 10), (5, 5)),
    ((2, 9), (5, 7), (5, 1), (0, 1), (0, 8), (2, 9), (6, 9), (10, 7)),
)
_POINTS = 24  # of every line, so that all digits are drawn in one go


def draw_digits(rng: np.random.Generator, classes: Int64[np.ndarray, " G"], side: int) -> UInt8[np.ndarray, "G S S"]:
    """Draw digits, each in a hand of its own: bent points, size, slant, turn, place and thickness.

    Args:
        rng: where the hands are from.
        classes: 0 to 9.
        side: of a picture in pixels, 6 at least to be legible.

    Returns:
        Bright strokes on black.

    Cost: 24 S^2 distances per digit, 0.2 ms at 28 pixels.
    """
    num = len(classes)
    points = _board()[classes] + (rng.random((num, _POINTS // 4, 2), np.float32).repeat(4, 1) - 0.5) * np.float32(0.06)
    points -= np.float32(0.5)
    size = (0.56 + 0.2 * rng.random((num, 1, 2), np.float32)) * np.array([1.05, 0.75], np.float32)
    slant, turn = (0.5 * rng.random((2, num, 1), np.float32) - 0.25) * np.array([[[1.0]], [[0.7]]], np.float32)
    y, x = points[..., 0] * size[..., 0], points[..., 1] * size[..., 1]
    place = 0.5 + 0.12 * (rng.random((num, 1, 2), np.float32) - 0.5)
    bent = np.stack([y + turn * x, x - (slant + turn) * y], axis=-1) + place
    width = (0.035 + 0.03 * rng.random((num, 1, 1), np.float32)) * side
    return _stroke(bent * np.float32(side), np.maximum(width, np.float32(0.45)), side)


def draw_strokes(rng: np.random.Generator, count: int, side: int, num_points: int = 4) -> UInt8[np.ndarray, "G S S"]:
    """Draw lines through random points, as bright and as thick as digits are, which mean nothing.

    Args:
        rng: where the points are from.
        count: number of pictures, G.
        side: of a picture in pixels.
        num_points: of each line; two points are a straight line.

    Cost: as `draw_digits`, by the number of points.
    """
    points = rng.random((count, num_points, 2), np.float32) * np.float32(side * 0.8) + np.float32(side * 0.1)
    width = (0.035 + 0.03 * rng.random((count, 1, 1), np.float32)) * side
    return _stroke(points, np.maximum(width, np.float32(0.45)), side)


@cache
def _board() -> Float32[np.ndarray, "10 K 2"]:
    """The line of every digit as points in [0, 1], evenly spaced."""
    return np.stack([_even(_rounded(_rounded(np.array(line, np.float32) / np.float32(10)))) for line in _LINES])


def _rounded(line: Array) -> Array:
    """Every corner cut at a quarter of its sides; the ends stay."""
    low, high = line[:-1], line[1:]
    cut = np.stack([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high], axis=1).reshape(-1, 2)
    rounded: Array = np.concatenate([line[:1], cut[1:-1], line[-1:]])
    return rounded


def _even(line: Array) -> Array:
    steps = np.sqrt(np.square(np.diff(line, axis=0)).sum(1))
    along = np.concatenate([np.zeros(1), np.cumsum(steps, dtype=np.float64)])
    wanted = np.arange(_POINTS) * (along[-1] / (_POINTS - 1))
    return np.stack([np.interp(wanted, along, axis) for axis in line.T], axis=1).astype(np.float32)


def _stroke(points: Float32[np.ndarray, "G K 2"], width: Float32[np.ndarray, "G 1 1"], side: int) -> NDArray[np.uint8]:
    """Lines through points in pixels, of ``width`` pixels to either side, soft over one pixel."""
    line = np.arange(side, dtype=np.float32) + np.float32(0.5)
    nearest: Array = np.full((len(points), side, side), np.inf, np.float32)
    for low, step in zip(np.moveaxis(points[:, :-1], 1, 0), np.moveaxis(np.diff(points, axis=1), 1, 0), strict=True):
        y = line - low[:, :1]  # [G, S], separable parts first
        x = line - low[:, 1:]
        length = np.maximum(np.square(step).sum(1), np.float32(1e-6))[:, None]
        place = (y * step[:, :1] / length)[:, :, None] + (x * step[:, 1:] / length)[:, None, :]
        np.clip(place, 0, 1, out=place)
        far = np.square(y[:, :, None] - place * step[:, :1, None])
        far += np.square(x[:, None, :] - place * step[:, 1:, None])
        np.minimum(nearest, far, out=nearest)
    bright = np.clip(width + np.float32(0.5) - np.sqrt(nearest), 0, 1)
    return (bright * np.float32(255) + np.float32(0.5)).astype(np.uint8)
