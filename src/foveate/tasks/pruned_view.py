"""What was pruned where: leaves over the image, each tinted by the prune point that its token left at.

Legend: L leaves, C channels, S image sides.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, Integer, Shaped
from torch import Tensor

from foveate.geometry.leaves import Leaves
from foveate.io.write import label_palette
from foveate.nn.pruner import Scores
from foveate.tasks import figures
from foveate.tasks.figures import IGNORE, LEFT, Picture

_AXES = "zyx"
_LINE = 2  # pixels of an outline


def left_at(scores: Sequence[Scores], num_leaves: int) -> Int64[Tensor, " L"]:
    """At which prune point each token of one image left, counted from 0; -1 for those kept to the end.

    Args:
        scores: what every prune point of a forward pass thought, in order, see `Pruning.scores`.
        num_leaves: tokens of the image.
    """
    rows = max((int(stage.rows.max()) + 1 for stage in scores), default=0)  # a tiny image is given several times over
    left = torch.full((max(num_leaves, rows),), -1, dtype=torch.int64)
    for point, stage in enumerate(scores):
        left[stage.rows.cpu()] = point
        left[stage.rows.index_select(0, stage.kept).cpu()] = -1
    return left[:num_leaves]


def describe_left(left: Int64[Tensor, " L"]) -> list[tuple[str, tuple[int, int, int]]]:
    """How many tokens left at each prune point, and how many stayed, each with its tint (white: none).

    Args:
        left: of `left_at`.
    """
    entries = [
        (f"left at prune point {point + 1}: {int((left == point).sum()):,}", LEFT[point % len(LEFT)])
        for point in range(int(left.max()) + 1)
    ]
    return [*entries, (f"kept to the end: {int((left < 0).sum()):,} of {len(left):,} tokens", (255, 255, 255))]


def pruned_panel(
    image: Shaped[np.ndarray, "C *S"],
    leaves: Leaves,
    left: Int64[Tensor, " L"],
    labels: Integer[np.ndarray, "*S"],
    *,
    spacing: Sequence[float] | None = None,
    side: int = 480,
    note: str = "",
) -> Picture:
    """The image, and the same with leaves outlined and tinted by the prune point that they left at.

    Of a volume, three planes are shown, each where the labels are largest, with the last axis but one upwards, as
    anatomists draw it, and in mm where sizes are known. The labels' outlines lie on top.

    Args:
        image: as stored or normalised.
        leaves: of the image, in its frame or one of another size.
        left: of `left_at`.
        labels: class per pixel of the image, 255 where unknown.
        spacing: size of a pixel in mm along each axis.
        side: longest side of one picture in pixels.
        note: a line below the legend.
    """
    sizes = tuple(spacing or (1.0,) * labels.ndim)
    columns, titles = [], []
    for axis in range(3) if labels.ndim == 3 else (None,):
        order = list(range(labels.ndim)) if axis is None else [axis, *(k for k in range(3) if k != axis)]
        plane, truth, depth, titled = None, labels, 0.5, "x".join(map(str, labels.shape))
        if axis is not None:
            truth = labels.transpose(order)
            plane = int(((truth > 0) & (truth != IGNORE)).sum((1, 2)).argmax()) if labels.any() else len(truth) // 2
            depth, titled = (plane + 0.5) / len(truth), f"plane {_AXES[axis]} = {plane} of {len(truth)}"
            truth = truth[plane]
        picture = figures.to_rgb(image.transpose(0, *(k + 1 for k in order)), plane=plane)
        mm = [length * sizes[k] for length, k in zip(truth.shape, order[-2:], strict=True)]
        height, width = figures.fit_side([round(1000 * length) for length in mm], side)
        picture, shown = figures.resized(picture, height, width), _resized_labels(truth, height, width)
        cut = figures.outlined(picture, _turned(leaves, order), side=max(height, width), depth=depth, left=left)
        pair = [_with_outlines(one, shown) for one in (picture, cut)]
        columns.append([one[::-1] for one in pair] if axis is not None else pair)
        titles.append(titled)
    if labels.ndim == 2:
        return with_legend(figures.panel(columns, [titles[0], "tokens"], side=side, note=note), left)
    rows = [list(row) for row in zip(*columns, strict=True)]
    return with_legend(figures.panel(rows, titles, side=side, note=note), left)


def _turned(leaves: Leaves, order: Sequence[int]) -> Leaves:
    """The leaves with their axes in another order."""
    at = list(order)
    sizes = tuple(tuple(size[k] for k in at) for size in leaves.sizes)
    shape = tuple(leaves.shape[k] for k in at)
    return Leaves(leaves.start[:, at], leaves.size[:, at], leaves.scale, shape, sizes)


def _resized_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), labels.shape, strict=True))
    return labels[np.ix_(rows, columns)]


def _with_outlines(picture: Picture, labels: np.ndarray) -> Picture:
    palette = label_palette()
    for value in np.unique(labels[(labels > 0) & (labels != IGNORE)]):
        red, green, blue = palette[3 * int(value) : 3 * int(value) + 3]
        picture = figures.painted(picture, figures.outline(labels == value, _LINE), (red, green, blue))
    return picture


def with_legend(picture: Picture, left: Int64[Tensor, " L"]) -> Picture:
    """A picture with a line above it that says what the tints mean.

    Args:
        picture: drawn with ``left``.
        left: of `left_at`.
    """
    from PIL import Image, ImageDraw, ImageFont

    size = max(12, picture.shape[1] // 70)
    strip = Image.new("RGB", (picture.shape[1], 2 * size), (255, 255, 255))
    draw, font, x = ImageDraw.Draw(strip), ImageFont.load_default(size), float(size)
    for text, colour in describe_left(left):
        draw.rectangle((x, size // 2, x + size, size // 2 + size), fill=colour, outline=(90, 90, 90))
        draw.text((x + 1.4 * size, 0.3 * size), text, fill=(20, 20, 20), font=font)
        x += 3 * size + draw.textlength(text, font=font)
    return np.concatenate([np.asarray(strip), picture])
