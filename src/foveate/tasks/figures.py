"""Pictures of images, leaves, masks and training: colour-blind-safe (Okabe-Ito), dark on white, exact to the pixel.

All pictures are uint8 arrays ``[H, W, 3]``. Volumes are shown as one plane of their first axis.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry.leaves import Leaves
from foveate.io.write import label_palette

ORANGE, SKY, GREEN = (230, 159, 0), (86, 180, 233), (0, 158, 115)
YELLOW, BLUE, VERMILLION, PURPLE = (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)
HIT, FALSE_ALARM, MISS = GREEN, VERMILLION, SKY
IGNORE = 255
LEFT = (BLUE, PURPLE, VERMILLION, GREEN)
"""Tints of the leaves whose tokens left at the first, second, ... prune point; beyond the last they repeat."""
_SMALL = 2**22

Picture = UInt8[np.ndarray, "_ _ 3"]
Colour = tuple[int, int, int]
Window = tuple[slice, slice]


def to_rgb(image: Shaped[np.ndarray, "C *S"], *, plane: int | None = None) -> Picture:
    """Turn any image into 8-bit RGB for looking at.

    Args:
        image: any numeric type; uint8 is kept, other types are stretched between their 0.5 and 99.5 percentiles.
        plane: which plane of a volume; the middle one by default.

    Raises:
        ShapeError: not ``[C, H, W]`` or ``[C, D, H, W]``.
    """
    if image.ndim not in (3, 4):
        raise ShapeError(
            f"a picture of an array of shape {image.shape} is not possible; give [C, H, W] or [C, D, H, W]"
        )
    flat = image if image.ndim == 3 else image[:, image.shape[1] // 2 if plane is None else plane]
    flat = flat[:3] if flat.shape[0] >= 3 else flat[:1]
    if flat.dtype == np.bool_:
        flat = flat.astype(np.uint8) * np.uint8(255)
    if flat.dtype != np.uint8:
        low, high = np.percentile(flat[:, ::4, ::4].astype(np.float64), (0.5, 99.5))
        scaled = (flat.astype(np.float32) - low) * (255 / max(high - low, 1e-12))
        flat = np.clip(scaled + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(np.moveaxis(flat, 0, -1), (*flat.shape[1:], 3)))


def resized(picture: Picture, height: int, width: int, *, labels: bool = False) -> Picture:
    """Bring a picture to a size: area mean when it shrinks, nearest for ``labels`` and when it grows."""
    from PIL import Image

    if picture.shape[:2] == (height, width):
        return picture
    grows = height >= picture.shape[0] and width >= picture.shape[1]
    method = Image.Resampling.NEAREST if labels or grows else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def fit_side(shape: Sequence[int], side: int) -> tuple[int, int]:
    """Height and width with the longest side ``side`` and the aspect of ``shape``."""
    longest = max(shape)
    return max(1, round(shape[0] * side / longest)), max(1, round(shape[1] * side / longest))


def leaf_overlay(
    image: Shaped[np.ndarray, "C *S"],
    leaves: Leaves,
    *,
    side: int | None = None,
    window: Window | None = None,
    plane: int | None = None,
    left: Int64[Tensor, " L"] | None = None,
) -> Picture:
    """Draw the outline of every leaf on the image, one pixel wide at any size.

    Args:
        image: the image that was cut, or a larger or smaller version of it.
        leaves: its leaves; of a volume, those that the shown plane cuts.
        side: longest side of the picture in pixels; by default the image's own, between 512 and 2048.
        window: part of the image to show, in its pixels; all of it by default.
        plane: which plane of a volume; the middle one by default.
        left: as in ``outlined``.

    Cost: O(L + pixels of the picture).
    """
    share = (image.shape[1] // 2 if plane is None else plane) / image.shape[1]
    return outlined(to_rgb(image, plane=plane), leaves, side=side, window=window, depth=share, left=left)


def outlined(
    picture: Picture,
    leaves: Leaves,
    *,
    side: int | None = None,
    window: Window | None = None,
    depth: float = 0.5,
    left: Int64[Tensor, " L"] | None = None,
) -> Picture:
    """Draw the outlines over a picture of the image, or of one plane of it.

    Args:
        picture: at any size.
        leaves: of the whole image.
        side: as in ``leaf_overlay``.
        window: as in ``leaf_overlay``.
        depth: where the plane lies in a volume, from 0 to 1.
        left: prune point at which each leaf's token left, counted from 0, and -1 for those kept to the end; the others
            are tinted.
    """
    base = picture
    boxes = leaves.boxes.cpu().numpy().astype(np.float64)
    points = np.full(len(leaves), -1) if left is None else left.cpu().numpy()
    if leaves.num_dims == 3:
        at = depth * leaves.shape[0]
        cut = (boxes[:, 0, 0] <= at) & (at < boxes[:, 1, 0])
        boxes, points = boxes[cut][:, :, 1:], points[cut]
    boxes *= np.array(base.shape[:2]) / leaves.shape[-2:]
    if window is not None:
        boxes -= [part.start for part in window]
        base = base[window]
    height, width = fit_side(base.shape, side or min(max(max(base.shape[:2]), 512), 2048))
    corner = np.rint(boxes * [height / base.shape[0], width / base.shape[1]]).astype(np.int64)
    shown = (corner[:, 1] > 0).all(1) & (corner[:, 0] < [height, width]).all(1)
    lines, tints = np.zeros((height, width), np.bool_), np.full((height, width), -1)
    for ((top, first), (bottom, last)), point in zip(corner[shown], points[shown], strict=True):
        rows, columns = slice(max(top, 0), bottom + 1), slice(max(first, 0), last + 1)
        tints[rows, columns] = point
        if top >= 0:
            lines[top, columns] = True
        if first >= 0:
            lines[rows, first] = True
    lines[-1] = lines[:, -1] = True
    out = resized(base, height, width)
    for point in np.unique(tints[tints >= 0]):
        out = painted(out, tints == point, LEFT[point % len(LEFT)], 0.5)
    return painted(out, lines, YELLOW if base.mean() < 160 else BLUE, 0.7)


def painted(picture: Picture, where: NDArray[np.bool_], colour: Colour, alpha: float = 1.0) -> Picture:
    """A copy of the picture with ``colour`` laid over the pixels where ``where`` is true."""
    out = picture.copy()
    out[where] = (out[where] * (1 - alpha) + np.array(colour) * alpha + 0.5).astype(np.uint8)
    return out


def outline(region: NDArray[np.bool_], width: int = 1) -> NDArray[np.bool_]:
    """Pixels of the region that touch its outside, ``width`` deep."""
    inside = region
    for _ in range(width):
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inside


def label_overlay(picture: Picture, labels: Integer[np.ndarray, "H W"], *, alpha: float = 0.6) -> Picture:
    """Colour every class but the background over a greyed picture; the outline is solid, ignored pixels are dark."""
    out = _greyed(picture)
    palette = label_palette()
    for value in range(1, int(labels.max(initial=0, where=labels != IGNORE)) + 1):
        region = labels == value
        red, green, blue = palette[3 * value : 3 * value + 3]
        colour = red, green, blue
        out = painted(painted(out, region, colour, alpha), outline(region), colour)
    return painted(out, labels == IGNORE, (30, 30, 30), 0.8)


HEAT_NOTE = "probability: dark purple 0.1, green 0.5, yellow 1; grey below 0.1"


def heat_overlay(picture: Picture, chance: Float[np.ndarray, "H W"], most: float = 0.8) -> Picture:
    """Colour a greyed picture by a probability: nothing where it is 0, dark purple over green to yellow at 1.

    Args:
        picture: below.
        chance: 0 to 1.
        most: share of the colour where it is thickest, 0 to 1.
    """
    from matplotlib import colormaps

    colour = colormaps["viridis"](chance.clip(0, 1), bytes=True)[..., :3].astype(np.float32)
    share = np.clip(chance * 8, 0, most).astype(np.float32)[..., None]
    mixed: Picture = (_greyed(picture) * (1 - share) + colour * share + 0.5).astype(np.uint8)
    return mixed


def contour_overlay(
    picture: Picture, prediction: Integer[np.ndarray, "H W"], truth: Integer[np.ndarray, "H W"], *, width: int = 2
) -> Picture:
    """Outline the truth in sky blue and the prediction in orange, any class but the background."""
    known = truth != IGNORE
    out = painted(picture, outline((truth > 0) & known, width), SKY)
    return painted(out, outline((prediction > 0) & known, width), ORANGE, 0.8)


def error_map(picture: Picture, prediction: Integer[np.ndarray, "H W"], truth: Integer[np.ndarray, "H W"]) -> Picture:
    """Colour what was found (green), invented or taken for another class (vermillion), and missed (sky blue)."""
    known = truth != IGNORE
    out = painted(_greyed(picture), (truth > 0) & (prediction == truth), HIT, 0.75)
    out = painted(out, known & (prediction > 0) & (prediction != truth), FALSE_ALARM, 0.9)
    return painted(out, known & (truth > 0) & (prediction == 0), MISS, 0.9)


def _greyed(picture: Picture) -> Picture:
    grey = picture.mean(axis=-1, keepdims=True) * 0.8 + 30
    return np.repeat(grey.astype(np.uint8), 3, axis=-1)


def busiest_window(labels: Integer[np.ndarray, "H W"], side: int) -> Window:
    """The square window with the longest outlines in it: the place worth a magnified look."""
    region = (labels > 0) & (labels != IGNORE)
    edges = outline(region).astype(np.int64)
    side = min(side, *labels.shape)
    total = np.pad(edges.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    return slice(int(top), int(top) + side), slice(int(left), int(left) + side)


def panel(rows: Sequence[Sequence[Picture]], titles: Sequence[str], *, side: int = 480, note: str = "") -> Picture:
    """Put pictures side by side on white, with a title over every column and a note below.

    Args:
        rows: rows of equally many pictures; each is brought to ``side`` pixels.
        titles: one per column; a line break starts a smaller second line.
        side: longest side of one picture in the panel, in pixels.
        note: small text under the pictures, in as many lines as it needs.
    """
    from PIL import Image, ImageDraw, ImageFont

    if any(len(row) != len(titles) for row in rows):
        raise ShapeError(f"rows of {[len(row) for row in rows]} pictures do not match {len(titles)} titles")
    gap, head = max(6, side // 48), round(side * 0.15)
    large, small = ImageFont.load_default(side // 18), ImageFont.load_default(side // 24)
    heights = [max(fit_side(picture.shape, side)[0] for picture in row) for row in rows]
    width = gap + len(titles) * (side + gap)
    letters = int(len(note) * (width - 2 * gap) / max(small.getlength(note), 1))
    lines = textwrap.wrap(note, max(letters, 1))
    foot = round(side * 0.06)  # of a line
    height = head + sum(h + gap for h in heights) + len(lines) * foot + bool(lines) * gap
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        first, _, second = title.partition("\n")
        left = gap + column * (side + gap)
        draw.text((left, head * 0.12), first, fill=(20, 20, 20), font=large)
        draw.text((left, head * 0.58), second, fill=(90, 90, 90), font=small)
    top = head
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            cell = resized(picture, *fit_side(picture.shape, side))
            canvas.paste(Image.fromarray(cell), (gap + column * (side + gap), top))
        top += height + gap
    for line in lines:
        draw.text((gap, top), line, fill=(90, 90, 90), font=small)
        top += foot
    return np.asarray(canvas)


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, width: int = 1600, score: str = "dice"
) -> Picture:
    """Plot loss and validation score over training minutes (steps where no time was recorded), one colour per run.

    Args:
        runs: name of each run and its records, such as the lines of ``metrics.jsonl``.
        width: of the picture in pixels.
        score: name of the score in the records.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = 160
    figure = Figure(figsize=(width / dpi, width / dpi * 0.34), dpi=dpi, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    timed = all("seconds" in record for records in runs.values() for record in records)
    for axis, kind in zip(axes, ("loss", score), strict=True):
        for index, (name, records) in enumerate(runs.items()):
            colour = [value / 255 for value in (BLUE, VERMILLION, GREEN, PURPLE, ORANGE)[index % 5]]
            x, y = _series(records, kind, timed)
            axis.plot(x, y, color=colour, linewidth=1.8, marker="o" if len(x) < 12 else None, markersize=4, label=name)
        axis.set_xlabel("training minutes" if timed else "step")
        title = "training loss" if kind == "loss" else f"validation {score.replace('dice', 'Dice')}"
        axis.set_title(title, loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        if len(runs) > 1:
            axis.legend(frameon=False)
        axis.set_xlim(left=0)
    axes[1].set_ylim(0, 1.02)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _series(records: Sequence[Mapping[str, Any]], kind: str, timed: bool) -> tuple[list[float], list[float]]:
    """The finite values of one kind over time, thinned to at most a few hundred means."""
    names = ("loss", "train_loss") if kind == "loss" else (kind, f"val_{kind}")
    pairs: list[tuple[float, float]] = []
    for place, record in enumerate(records):
        value = next((record[name] for name in names if isinstance(record.get(name), int | float)), None)
        if value is not None and np.isfinite(value):
            x = record["seconds"] / 60 if timed else record.get("step", place)
            pairs.append((float(x), float(value)))
    group = max(1, len(pairs) // 200)
    chunks = [pairs[i : i + group] for i in range(0, len(pairs), group)]
    means = [np.mean(chunk, axis=0) for chunk in chunks]
    return [float(mean[0]) for mean in means], [float(mean[1]) for mean in means]


def save_picture(path: str | Path, picture: Picture) -> None:
    """Write a picture as PNG, as a whole or not at all."""
    from foveate.io.write import atomic_write

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as file:
        file.write(png_bytes(picture))


def png_bytes(picture: Picture) -> bytes:
    """A picture as the bytes of a PNG file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    small = (
        picture.size < _SMALL
    )  # a smaller file is worth seconds for a page that holds many, not for one large picture
    Image.fromarray(picture).save(buffer, format="PNG", optimize=small, compress_level=9 if small else 5)
    return buffer.getvalue()
