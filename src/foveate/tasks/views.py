"""Small pictures of large things: an image of any size, and what was predicted on its leaves.

Legend: L leaves, K classes, P samples per side, H W sides of the picture, N spatial axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from foveate.geometry.leaves import Leaves
from foveate.geometry.source import Box, Source, level_window
from foveate.tasks.figures import (
    HEAT_NOTE,
    IGNORE,
    Picture,
    fit_side,
    heat_overlay,
    label_overlay,
    outlined,
    panel,
    to_rgb,
)
from foveate.tasks.painting import Painting
from foveate.tasks.pruned_view import pruned_panel

SIDE = 2048
"""Longest side of an overview picture in pixels."""
_SIDE_EACH = 640  # of each picture, where several are shown
_SHOWN = 2**26  # pixels of an image up to which it is held for a picture
_HELD = 2**26  # values read at once
_POINTS = 2**18  # points looked up at once


def plane_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Where a volume is shown: its middle plane along the first axis; nothing for an image."""
    return (shape[0] // 2,) if len(shape) == 3 else ()


def overview(source: Source, side: int | None = None) -> Shaped[np.ndarray, "C H W"]:
    """The whole image, or the middle plane of a volume, with at most ``side`` pixels a side, in its own type.

    Args:
        source: Image of any size.
        side: Longest side in pixels, `SIDE` by default; an image that is smaller stays as it is.

    Cost: Reads the coarsest level that is not smaller than the picture, in bands: pixels of that level as time, about
    2^26 values as memory.
    """
    import cv2

    side = side or SIDE
    wanted = [at for at, shape in enumerate(source.levels) if max(shape[-2:]) >= side]
    level = wanted[-1] if wanted else 0
    shape, down = source.levels[level][-2:], source.downsamples[level]
    height, width = fit_side(shape, min(side, max(shape)))
    out = np.empty((source.channels, height, width), _kept_type(source.dtype))
    step = max(1, _HELD // (source.channels * shape[1] * math.ceil(shape[0] / height)))
    for row in range(0, height, step):
        rows = min(row + step, height) - row
        first, last = row * shape[0] // height, (row + rows) * shape[0] // height
        band = _rows(source, level, first, max(last, first + 1), down).astype(out.dtype, copy=False)
        for channel, plane in enumerate(band):
            out[channel, row : row + rows] = cv2.resize(plane, (width, rows), interpolation=cv2.INTER_AREA)
    return out


def _kept_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that OpenCV can average in."""
    return dtype if dtype.name in ("uint8", "uint16") else np.dtype(np.float32)


def _rows(source: Source, level: int, first: int, last: int, down: Sequence[float]) -> NDArray[Any]:
    """Rows ``first`` to ``last`` of a level as ``[C, rows, W]``, of a volume those of its middle plane."""
    plane = plane_of(source.shape)
    full_height, full_width = source.shape[-2:]
    start = (*plane, min(int(first * down[-2]), full_height - 1), 0)
    stop = (*(at + 1 for at in plane), min(math.ceil(last * down[-2]), full_height), full_width)
    box: Box = (start, stop)
    low = level_window(box, down)[0][-2]
    band = source.read(box, level)[..., : source.levels[level][-1]]
    band = band[:, 0] if plane else band
    return np.ascontiguousarray(band[:, first - low : last - low])


def overlay(native: Source, painting: Painting) -> Picture:
    """The image with its mask in colours and the outlines of the leaves, see `overview`.

    Of a model that prunes, what was pruned where: see `pruned_panel` for what is held, else the leaves are tinted.
    """
    if painting.left is not None and math.prod(native.shape) <= _SHOWN:
        image = native.read(((0,) * len(native.shape), tuple(native.shape)))
        labels = painting.labels.numpy()
        return pruned_panel(image, painting.leaves, painting.left, labels, spacing=painting.spacing, side=_SIDE_EACH)
    picture = to_rgb(overview(native))
    height, width = picture.shape[:2]
    if max(native.shape[-2:]) <= SIDE:
        shown = painting.tile(_plane_box(native.shape))
        labels = np.full((height, width), shown, np.uint8) if isinstance(shown, int) else shown.reshape(height, width)
    else:
        chances = coarse_probability(painting.values, painting.leaves, height, width, points=1)
        labels = chances.argmax(0).to(torch.uint8).numpy()
        mark(labels, painting.unknown, native.shape)
    return outlined(label_overlay(picture, labels), painting.leaves, left=painting.left)


def heatmap(native: Source, painting: Painting, names: Sequence[str], side: int = 1024) -> Picture:
    """The image, and beside it the probability of every class but the background as colour over the grey image.

    Args:
        native: The image as stored.
        painting: What was predicted on it.
        names: Names of the classes, background first.
        side: Longest side of one picture in pixels.
    """
    picture = to_rgb(overview(native, side))
    height, width = picture.shape[:2]
    if max(native.shape[-2:]) <= side:
        chances = painting.probability(_plane_box(native.shape)).reshape(-1, height, width)
    else:
        chances = coarse_probability(painting.values, painting.leaves, height, width).numpy()
    shown = [heat_overlay(picture, chance) for chance in chances[1:]]
    sides = " x ".join(map(str, native.shape))
    titles = [f"image\n{sides}", *names[1:]]
    return panel([[picture, *shown]], titles, side=max(512, *picture.shape), note=HEAT_NOTE)


def _plane_box(shape: Sequence[int]) -> Box:
    plane = plane_of(shape)
    return (*plane, 0, 0), (*(at + 1 for at in plane), *shape[-2:])


def coarse_probability(
    values: Float[Tensor, "L K *P"], leaves: Leaves, height: int, width: int, *, points: int = 2
) -> Float32[Tensor, "K H W"]:
    """The mean probability of every class in each pixel of an overview, from the samples of the leaves.

    Args:
        values: Logits of the leaves.
        leaves: Of the whole image; of a volume, its middle plane is shown.
        height: Rows of the overview.
        width: Columns of the overview.
        points: Points along each side of a pixel, over which the mean is taken.

    Cost: O(H W points^2 log L) time, whatever the size of the image.
    """
    num, side = leaves.num_dims, values.shape[-1]
    rows = torch.arange(height * points, dtype=torch.float64).add(0.5).mul(leaves.shape[-2] / (height * points))
    columns = torch.arange(width * points, dtype=torch.float64).add(0.5).mul(leaves.shape[-1] / (width * points))
    plane = torch.tensor(plane_of(leaves.shape), dtype=torch.float64) + 0.5
    flat = values.flatten(2)
    out = torch.empty(values.shape[1], height, width)
    step = max(1, _POINTS // (width * points**2))
    for row in range(0, height, step):
        lines = rows[row * points : (row + step) * points]
        point = torch.cartesian_prod(*plane[:, None], lines, columns)
        leaf = leaves.locate(point)
        within = (point - leaves.start[leaf]) / leaves.size[leaf] * side
        place = within.long().clamp(0, side - 1)
        sample = torch.zeros_like(leaf)
        for axis in range(num):
            sample = sample * side + place[:, axis]
        chance = flat[leaf, :, sample].float().softmax(1).T.reshape(len(out), -1, points, width, points)
        out[:, row : row + step] = chance.mean((2, 4))
    return out


def mark(labels: UInt8[np.ndarray, "H W"], boxes: Sequence[Box], shape: Sequence[int]) -> None:
    """Write 255 where boxes of the image lie in its overview.

    Args:
        labels: Classes per pixel of the overview; changed.
        boxes: In level-0 pixels.
        shape: The image's, in the same frame.
    """
    plane = plane_of(shape)
    for start, stop in boxes:
        if plane and not start[0] <= plane[0] < stop[0]:
            continue
        scale = [side / full for side, full in zip(labels.shape, shape[-2:], strict=True)]
        low = [int(at * factor) for at, factor in zip(start[-2:], scale, strict=True)]
        high = [math.ceil(at * factor) for at, factor in zip(stop[-2:], scale, strict=True)]
        labels[low[0] : high[0], low[1] : high[1]] = IGNORE
