"""What a model looked at, as pictures and files: heatmaps, chosen patches, the patches that matter most.

A patch that gets ``t`` times the attention of the mean patch of its image has heat ``t / (1 + t)``: one half at the
mean, 0.9 at nine times, so that images can be compared, and a model that looks everywhere alike shows one even colour.
Where patches overlap it is the mean of their heat.

Legend: N patches, Q tasks, K chosen patches, H W sides of a picture, C channels, P side of a patch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from numpy.typing import NDArray

from foveate.geometry.image import Real
from foveate.geometry.rings import Polygons
from foveate.geometry.source import Box, Source
from foveate.io.write import atomic_write
from foveate.tasks.figures import BLUE, YELLOW, Picture, heat_overlay, painted, panel, resized, to_rgb
from foveate.tasks.views import overview

HEAT_NOTE = (
    "attention against the mean patch: grey below a tenth, purple a quarter, teal the mean, green twice, yellow tenfold"
)
TOP = 24
"""Patches of a gallery."""
_TILE = 512


@dataclass(frozen=True, eq=False)
class Heat:
    """What a model looked at in one image.

    Args:
        shape: (H, W) of the image in its own level-0 pixels.
        boxes: of the patches there.
        share: of the attention that each patch gets, for every task.
        tasks: their names.
        index: patches that were chosen, ascending.
        spacing: size of a level-0 pixel in mm along y and x, if known.
    """

    shape: tuple[int, ...]
    boxes: Int64[np.ndarray, "N 2 2"]
    share: Float[np.ndarray, "N Q"]
    tasks: tuple[str, ...]
    index: Int64[np.ndarray, " K"]
    spacing: tuple[float, ...] | None = None

    @cached_property
    def times(self) -> Float[np.ndarray, "N Q"]:
        """Attention of every patch for every task, over that of the mean patch."""
        return self.share * len(self.share)

    @cached_property
    def values(self) -> Float32[np.ndarray, "N Q"]:
        """Heat of every patch for every task, 0 to 1."""
        return np.asarray(self.times / (1 + self.times), np.float32)

    @cached_property
    def ranked(self) -> Int64[np.ndarray, " K"]:
        """The chosen patches, the hottest first."""
        return self.index[np.argsort(-self.share[self.index].mean(1), kind="stable")]


def paint_boxes(
    boxes: Float[np.ndarray, "N 2 2"], values: Float32[np.ndarray, "N Q"], height: int, width: int
) -> Float32[np.ndarray, "Q H W"]:
    """Mean of the values of the boxes over every pixel, 0 where there is no box.

    Args:
        boxes: in pixels of the picture, parts of pixels allowed; what lies outside is cut off, and a box covers one
            pixel at least.
        values: of each box.
        height: rows of the picture.
        width: columns of the picture.

    Cost: O(N + pixels), by sums of what begins and what ends at each pixel.
    """
    sides = np.array([height, width])
    low = np.clip(np.floor(boxes[:, 0] + 1e-6).astype(np.int64), 0, sides - 1)
    high = np.clip(np.ceil(boxes[:, 1] - 1e-6).astype(np.int64), low + 1, sides)
    change = np.zeros((values.shape[1] + 1, height + 1, width + 1))
    layers = np.concatenate([values.T.astype(np.float64), np.ones((1, len(values)))])
    for rows, columns, sign in (
        (low[:, 0], low[:, 1], 1),
        (high[:, 0], high[:, 1], 1),
        (low[:, 0], high[:, 1], -1),
        (high[:, 0], low[:, 1], -1),
    ):
        for layer, value in zip(change, layers, strict=True):
            np.add.at(layer, (rows, columns), sign * value)
    total = change.cumsum(1).cumsum(2)[:, :height, :width]
    number = np.rint(total[-1])
    mean: NDArray[np.float32] = np.where(number > 0, total[:-1] / np.maximum(number, 1), 0).clip(0).astype(np.float32)
    return mean


def heatmap_picture(heat: Heat, native: Source | None, said: Mapping[str, str], side: int = 1024) -> Picture:
    """The image with its chosen patches outlined, and beside it the heat of every task.

    Args:
        heat: what was looked at.
        native: the image; None shows the heat on white.
        said: what the model says, for the titles.
        side: longest side of one picture in pixels.
    """
    picture = canvas(heat.shape, native, side)
    height, width = picture.shape[:2]
    scale = np.array([height, width]) / np.array(heat.shape)
    layers = paint_boxes(heat.boxes * scale, heat.values, height, width)
    line = max(1, side // 500)
    colour = YELLOW if picture.mean() < 160 else BLUE
    outlined = painted(picture, frames(heat.boxes[heat.index] * scale, height, width, line), colour)
    sides = " x ".join(map(str, heat.shape))
    titles = [f"image\n{sides}, {len(heat.index):,} of {len(heat.boxes):,} patches chosen"]
    most = heat.times.max(0, initial=0)
    tasks = zip(heat.tasks, most, strict=True)
    titles += [f"{task}: {said.get(task, '')}\n{sharpness(float(top))}" for task, top in tasks]
    shown = [heat_overlay(picture, layer, most=0.6) for layer in layers]
    return panel([[outlined, *shown]], titles, side=max(512, height, width), note=HEAT_NOTE)


def sharpness(top: Real) -> str:
    """How far the hottest patch stands out, in words; ``top`` is its attention over the mean patch's."""
    return f"highest {top:.1f} times the mean" if top >= 1.05 else "looks everywhere alike"


def canvas(shape: Sequence[int], native: Source | None, side: int) -> Picture:
    """The image at most ``side`` pixels a side, or as much white."""
    if native is not None:
        picture = to_rgb(overview(native, side))
        small = max(picture.shape[:2])
        return picture if small >= 256 else resized(picture, *(at * (256 // small + 1) for at in picture.shape[:2]))
    scale = min(1.0, side / max(shape))
    return np.full((*(max(1, round(length * scale)) for length in shape), 3), 255, np.uint8)


def frames(boxes: Float[np.ndarray, "K 2 2"], height: int, width: int, line: int) -> NDArray[np.bool_]:
    """Where the outlines of boxes lie in a picture, in its pixels."""
    found = np.zeros((height, width), np.bool_)
    corner = np.clip(np.rint(boxes).astype(np.int64), 0, [height, width])
    for (top, left), (bottom, right) in corner:
        found[top:bottom, left : left + line] = found[top:bottom, max(right - line, 0) : right] = True
        found[top : top + line, left:right] = found[max(bottom - line, 0) : bottom, left:right] = True
    return found


def write_heat_pyramid(
    path: Path, heat: Heat, *, kind: Literal["ome", "tiff"] = "ome", overwrite: bool = False
) -> Path:
    """Write the heat as a pyramid of bytes at the size of the image, 255 standing for 1, one channel per task; 0 is
    also where no patch is.

    Cost: tile by tile; of a tile, a look at the patches in its row of tiles.
    """
    from foveate.io.pyramid import write_pyramid

    row: dict[tuple[int, int], NDArray[np.int64]] = {}

    def tile(box: Box) -> UInt8[np.ndarray, "Q h w"]:
        (top, left), (bottom, right) = box
        if (top, bottom) not in row:
            row.clear()
            row[top, bottom] = np.flatnonzero((heat.boxes[:, 1, 0] > top) & (heat.boxes[:, 0, 0] < bottom))
        near = row[top, bottom]
        near = near[(heat.boxes[near, 1, 1] > left) & (heat.boxes[near, 0, 1] < right)]
        boxes = (heat.boxes[near] - np.array([top, left])).astype(np.float64)
        layers = 255 * paint_boxes(boxes, heat.values[near], bottom - top, right - left)
        return np.asarray(layers + 0.5, np.uint8)

    text = "attention t times the mean patch's as 255 t / (1 + t): " + ", ".join(heat.tasks)
    return write_pyramid(
        path,
        tile,
        shape=heat.shape,
        dtype=np.uint8,
        channels=len(heat.tasks),
        tile=_TILE,
        spacing=heat.spacing,
        kind=kind,
        reduce="mean",
        rgb=False,
        names=heat.tasks if kind == "ome" else (),
        description=text.encode("ascii", "replace").decode("ascii"),
        overwrite=overwrite,
    )


def write_chosen(path: Path, heat: Heat, *, overwrite: bool = False) -> None:
    """Write the chosen patches as GeoJSON for QuPath, detections with their rank and their attention over the
    mean patch's as measurements."""
    from foveate.io.geojson import write_geojson

    ranked = heat.ranked
    (top, left), (bottom, right) = heat.boxes[ranked].transpose(1, 2, 0)
    corners = np.stack([top, left, top, right, bottom, right, bottom, left], 1).reshape(-1, 4, 2)
    measured: dict[str, list[float]] = {"rank": [float(rank) for rank in range(1, len(ranked) + 1)]}
    measured |= {f"attention {task}": heat.times[ranked, at].tolist() for at, task in enumerate(heat.tasks)}
    write_geojson(
        path,
        Polygons.of((1, [ring.astype(np.int32)]) for ring in corners),
        ("background", "chosen patch"),
        measurements=measured,
        spacing=heat.spacing,
        object_type="detection",
        overwrite=overwrite,
    )


def write_scores(path: Path, heat: Heat, *, overwrite: bool = False) -> None:
    """Write what every patch got: ``.npz`` (boxes, share, tasks, chosen, shape) or ``.csv``, one row per patch."""
    chosen = np.zeros(len(heat.boxes), np.bool_)
    chosen[heat.index] = True
    with atomic_write(path, overwrite=overwrite) as file:
        if path.suffix == ".npz":
            shape, tasks = np.array(heat.shape), np.array(heat.tasks)
            np.savez_compressed(file, boxes=heat.boxes, share=heat.share, tasks=tasks, chosen=chosen, shape=shape)
            return
        file.write((",".join(["y", "x", "y_stop", "x_stop", "chosen", *heat.tasks]) + "\n").encode())
        for box, flag, share in zip(heat.boxes.reshape(-1, 4).tolist(), chosen, heat.share.tolist(), strict=True):
            cells = [*map(str, box), str(int(flag)), *(f"{value:.9g}" for value in share)]
            file.write((",".join(cells) + "\n").encode())


def gallery(pixels: Shaped[np.ndarray, "K C P P"], heat: Heat, *, side: int = 128, columns: int = 8) -> Picture:
    """The chosen patches that were looked at most, each with its rank, place, and attention over the mean patch's.

    Args:
        pixels: of the patches at the first places of ``heat.ranked``.
        heat: what was looked at.
        side: of a patch in the picture, in pixels.
        columns: patches in a row.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, foot = 8, 30
    columns = max(1, min(columns, len(pixels)))
    rows = max(1, math.ceil(len(pixels) / columns))
    size = (gap + columns * (side + gap), gap + rows * (side + foot + gap))
    page = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    pictures = _on_one_scale(pixels)
    for place, picture in enumerate(pictures):
        patch = heat.ranked[place]
        left = gap + place % columns * (side + gap)
        top = gap + place // columns * (side + foot + gap)
        page.paste(Image.fromarray(resized(picture, side, side)), (left, top))
        y, x = heat.boxes[patch, 0].tolist()
        draw.text(
            (left, top + side + 2), f"{place + 1}: x {heat.times[patch].mean():.1f}", fill=(20, 20, 20), font=font
        )
        draw.text((left, top + side + 15), f"y {y}, x {x}", fill=(90, 90, 90), font=font)
    return np.asarray(page)


def _on_one_scale(pixels: NDArray[Any]) -> list[Picture]:
    """Patches as pictures, all with the same black and white."""
    if not len(pixels):
        return []
    if pixels.dtype == np.uint8:
        return [to_rgb(patch) for patch in pixels]
    flat = pixels.astype(np.float32)
    low, high = np.percentile(flat, (0.5, 99.5))
    scaled = np.clip((flat - low) * (255 / max(high - low, 1e-12)) + 0.5, 0, 255).astype(np.uint8)
    return [to_rgb(patch) for patch in scaled]
