"""From stored samples to the brightness or colour they stand for, and upright: alpha, inks, orientation."""

from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

Array = NDArray[Any]


def flatten_alpha(
    pixels: Shaped[Array, "A *S"], *, premultiplied: bool = False, composite: bool = True
) -> Shaped[Array, "C *S"]:
    """Drops the last channel, which is alpha, after compositing on white where it is not opaque.

    White, because what lies outside a slide or a drawing is paper; grey colours then collapse into one channel.

    Args:
        pixels: ``[C + 1, *S]``, alpha last; integers over their full range, floats in 0..1.
        premultiplied: The colours were multiplied by alpha when stored.
        composite: False takes the colours as they are stored, which a mask means.
    """
    colour, alpha = pixels[:-1], pixels[-1]
    top = 1 if pixels.dtype.kind == "f" else int(np.iinfo(pixels.dtype).max)
    if composite and bool((alpha != top).any()):
        colour = np.stack([_over_white(channel, alpha, top, premultiplied) for channel in colour])
    if len(colour) == 3 and np.array_equal(colour[0], colour[1]) and np.array_equal(colour[0], colour[2]):
        return colour[:1]
    return colour


def _over_white(channel: Array, alpha: Array, top: int, premultiplied: bool) -> Array:
    if premultiplied:
        return np.asarray(channel + np.minimum(top - alpha, top - channel), dtype=channel.dtype)
    if channel.dtype.kind == "f":
        return np.asarray(channel * alpha + (1 - alpha), dtype=channel.dtype)
    wide = channel.astype(np.uint32) * alpha + np.uint32(top) * (np.uint32(top) - alpha) + np.uint32(top // 2)
    return (wide // np.uint32(top)).astype(channel.dtype)


def rgb_of_cmyk(inks: Shaped[Array, "4 *S"]) -> Shaped[Array, "3 *S"]:
    """Multiplies paper white by what each ink and black leave over; no colour profile is applied.

    Args:
        inks: ``[4, *S]`` uint8 or uint16, 0 = no ink.
    """
    top = np.uint32(np.iinfo(inks.dtype).max)
    black = top - inks[3].astype(np.uint32)
    return np.stack([(((top - ink) * black + top // 2) // top).astype(inks.dtype) for ink in inks[:3]])


def upright(pixels: Shaped[Array, "C *S"], orientation: int) -> Shaped[Array, "C *T"]:
    """Turns ``[C, H, W]`` as EXIF orientation 1-8 asks, so that the first row is the top of the picture."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return pixels
