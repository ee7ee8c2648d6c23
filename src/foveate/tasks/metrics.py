"""Scores in pixels at full resolution, and the ceiling: what the tree alone would allow a perfect model to score.

A score in token space is another number than the one that matters (a 64-pixel leaf counts there as much as an 8-pixel
one), so nothing here looks at tokens: predictions are painted to full resolution first, and each image is scored whole.

Legend: L leaves, K classes (background first), P samples per side, S image sides.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer, UInt8
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import patchify_mask

IGNORE = 255
NumpyArray = NDArray[Any]
MEASURES = ("dice", "iou", "hd95")


class PixelMetrics:
    """Dice, IoU and the 95 % Hausdorff distance per image and class, gathered over a set.

    What is done with structures that are not there is stated, because it moves means by tens of points. A class that is
    in neither truth nor prediction of an image is left out of that image's scores. One that is in exactly one of them
    (missed, or invented) has Dice 0 and IoU 0, and its distance is the image's diagonal (``absent="diagonal"``) or left
    out (``absent="drop"``, which rewards missing things: an easy way to a better mean).

    Args:
        class_names: all classes, background first; background is not scored.
        groups: what is scored instead of each class: names, and the labels that make up each; they may overlap.
        spacing: pixel size in mm per axis; ``None``: distances are in pixels.
        absent: ``diagonal`` or ``drop``, the distance of a missed or invented structure.
        distances: compute the Hausdorff distance at all; it is most of the cost.

    **Differs** from MONAI, whose distance of a missed structure is NaN or infinite and is dropped from the mean; the
    distance itself is the same: the larger of the two directed 95th percentiles between boundary pixels.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        spacing: Sequence[float] | None = None,
        *,
        groups: Mapping[str, Sequence[int]] | None = None,
        absent: str = "diagonal",
        distances: bool = True,
    ) -> None:
        if absent not in ("diagonal", "drop"):
            raise ConfigError(f"absent={absent!r} is neither 'diagonal' nor 'drop': choose one")
        self._num_classes = len(class_names)
        self._groups: dict[str, tuple[int, ...]] = {name: (label,) for label, name in enumerate(class_names)}
        if groups is not None:
            self._groups = {class_names[0]: (0,), **{name: tuple(labels) for name, labels in groups.items()}}
        self.class_names = tuple(self._groups)
        self.spacing = tuple(spacing) if spacing is not None else None
        self.absent = absent
        self.distances = distances
        self.rows: list[dict[str, Any]] = []
        self._pixels = np.zeros((len(self.class_names), 3), dtype=np.int64)
        self._units: list[str] = []

    def update(
        self,
        name: str,
        predicted: Integer[NumpyArray | Tensor, "..."],
        truth: Integer[NumpyArray | Tensor, "..."],
        spacing: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Score one image and remember the result.

        Args:
            name: the image's name.
            predicted: class per pixel ``[*S]`` at full resolution.
            truth: class per pixel, same shape; pixels of 255 are not looked at.
            spacing: pixel size of this image in mm per axis; ``None``: that of all images.

        Returns:
            The row: ``name``; per measure a dictionary from class to value, NaN where the class is left out; and the
            names of the classes that were ``missed`` and ``invented``.

        Raises:
            ShapeError: the two differ in shape.
        """
        guess, real = np.asarray(predicted), np.asarray(truth)
        if guess.shape != real.shape:
            raise ShapeError(f"prediction {guess.shape} and truth {real.shape} differ: bring it to full resolution")
        far: dict[str, float] = {}
        sizes = self.spacing if spacing is None else tuple(spacing)
        if self.distances:
            known = real != IGNORE
            for class_name, labels in list(self._groups.items())[1:]:
                one, two = (np.isin(side, labels) & known for side in (guess, real))
                far[class_name] = hausdorff95(one, two, sizes, absent=self.absent)
        return self._add(name, self.count(guess, real), far, sizes)

    def count(
        self, guess: Integer[NumpyArray, "..."] | int, real: Integer[NumpyArray, "..."]
    ) -> Int64[NumpyArray, "K 3"]:
        """`count_labels` of what is scored, background first."""
        return count_labels(guess, real, self._num_classes, tuple(self._groups.values()))

    def update_counts(self, name: str, counts: Int64[NumpyArray, "K 3"]) -> dict[str, Any]:
        """Score one image that is too large to hold by its counts, and remember the result; there are no distances.

        Args:
            name: the image's name.
            counts: sum of `count` over boxes that cover the image once.

        Returns:
            The row, as `update`; ``hd95`` is NaN.
        """
        return self._add(name, counts, {}, self.spacing)

    def _add(
        self, name: str, counts: NumpyArray, far: Mapping[str, float], spacing: tuple[float, ...] | None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, **{measure: {} for measure in MEASURES}, "missed": [], "invented": []}
        for class_name, (both, one, two) in zip(self.class_names[1:], counts[1:].tolist(), strict=True):
            if one == 0 < two:
                row["missed"].append(class_name)
            if two == 0 < one:
                row["invented"].append(class_name)
            row["dice"][class_name], row["iou"][class_name] = _dice_iou(both, one, two)
            row["hd95"][class_name] = far.get(class_name, math.nan)
        self._pixels += counts
        self.rows.append(row)
        if far:
            self._units.append("px" if spacing is None else "mm")
        return row

    def summarise(self) -> dict[str, Any]:
        """Means over images with 95 % intervals.

        Returns:
            ``num_images``; ``hd95_unit``; per measure a dictionary from class to ``{"mean", "low", "high", "num"}``
            (Student's t over the images that score it, within the range of the measure; ``low`` and ``high`` are NaN
            below two images), and under ``"mean"`` the same for the mean over classes of each image; ``pooled_dice``
            per class over all pixels together; ``missed`` and ``invented`` images per class. Where only some images
            have a spacing, distances have no mean.
        """
        scored = self.class_names[1:]
        units = set(self._units) or {"px" if self.spacing is None else "mm"}
        result: dict[str, Any] = {
            "num_images": len(self.rows),
            "hd95_unit": "px or mm" if len(units) > 1 else min(units),
            "absent": self.absent,
        }
        for measure in MEASURES:
            table = np.array([[row[measure][name] for name in scored] for row in self.rows]).reshape(-1, len(scored))
            if measure == "hd95" and len(units) > 1:
                table = np.full_like(table, np.nan)
            most = math.inf if measure == "hd95" else 1.0
            result[measure] = {name: interval(table[:, k], most=most) for k, name in enumerate(scored)}
            result[measure]["mean"] = interval(_row_means(table), most=most)
        result["pooled_dice"] = {
            name: _dice_iou(*(int(count) for count in self._pixels[label]))[0]
            for label, name in enumerate(self.class_names)
            if label > 0
        }
        for side in ("missed", "invented"):
            result[side] = {name: sum(name in row[side] for row in self.rows) for name in scored}
        return result


def _row_means(table: NumpyArray) -> NumpyArray:
    known = ~np.isnan(table)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, table, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def count_labels(
    guess: Integer[NumpyArray, "..."] | int,
    real: Integer[NumpyArray, "..."],
    num_classes: int,
    groups: Sequence[Sequence[int]] | None = None,
) -> Int64[NumpyArray, "K 3"]:
    """Pixels per class in both, in the prediction and in the truth, where the truth is known.

    Args:
        guess: class per pixel, or one for all.
        real: class per pixel, 255 where unknown.
        num_classes: K, background included.
        groups: labels of each union of classes to count instead of every class.
    """
    size = IGNORE + 1
    if isinstance(guess, int):
        table = np.zeros((size, size), dtype=np.int64)
        table[:, guess] = np.bincount(real.ravel(), minlength=size)
    else:
        pairs = real.ravel().astype(np.uint16) * np.uint16(size) + guess.ravel()
        table = np.bincount(pairs, minlength=size * size).reshape(size, size)
    table[IGNORE] = 0
    rows = []
    for labels in [(label,) for label in range(num_classes)] if groups is None else groups:
        at = list(labels)
        rows.append((table[np.ix_(at, at)].sum(), table[:, at].sum(), table[at].sum()))
    return np.array(rows, dtype=np.int64)


def _dice_iou(both: int, one: int, two: int) -> tuple[float, float]:
    if one + two == 0:
        return math.nan, math.nan
    return 2 * both / (one + two), both / (one + two - both)


def interval(
    values: Sequence[float] | Float[NumpyArray, " n"], level: float = 0.95, *, most: float = math.inf
) -> dict[str, float]:
    """Mean of the values that are numbers, with Student's t interval, cut off at 0 and at ``most``.

    Args:
        values: one value per image, from 0; NaN is left out.
        level: coverage of the interval.
        most: largest value that there can be, such as 1 for Dice.
    """
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    num = len(kept)
    if num == 0:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "num": 0}
    mean = float(kept.mean())
    if num == 1:
        return {"mean": mean, "low": math.nan, "high": math.nan, "num": 1}
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, num - 1) * kept.std(ddof=1) / math.sqrt(num))
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(most, mean + half), "num": num}


def hausdorff95(
    one: NumpyArray, two: NumpyArray, spacing: Sequence[float] | None = None, *, absent: str = "diagonal"
) -> float:
    """95 % Hausdorff distance between the boundaries of two binary masks.

    Args:
        one: boolean mask ``[*S]``.
        two: boolean mask ``[*S]``.
        spacing: pixel size in mm per axis; ``None``: 1, so the distance is in pixels.
        absent: ``diagonal``: the image's diagonal when exactly one mask is empty; ``drop``: NaN then.

    Returns:
        The larger of the two directed 95th percentiles; NaN when both masks are empty.

    Cost: two Euclidean distance transforms of the box around both masks, not of the image.
    """
    sizes = np.asarray(spacing if spacing is not None else (1.0,) * one.ndim, dtype=np.float64)
    if len(sizes) != one.ndim:
        raise ShapeError(f"spacing has {len(sizes)} values for {one.ndim} axes: give one per axis")
    filled = (bool(one.any()), bool(two.any()))
    if not all(filled):
        return float(np.linalg.norm(sizes * one.shape)) if any(filled) and absent == "diagonal" else math.nan
    from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

    box = find_objects((one | two).astype(np.int8))[0]
    edges = [mask[box] & ~binary_erosion(mask[box]) for mask in (one, two)]
    far = [distance_transform_edt(~edge, sampling=sizes) for edge in edges]
    return max(float(np.percentile(far[1][edges[0]], 95)), float(np.percentile(far[0][edges[1]], 95)))


def tiles(shape: Sequence[int], side: int | None = None) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (start, stop) that cover an image, in raster order.

    Args:
        shape: spatial shape in pixels.
        side: side of a box in pixels; ``None``: 1024 in 2-D, 128 in 3-D.
    """
    step = side or {2: 1024, 3: 128}[len(shape)]
    for start in itertools.product(*(range(0, length, step) for length in shape)):
        yield start, tuple(min(first + step, length) for first, length in zip(start, shape, strict=True))


def paint_labels(
    values: Float[Tensor, "L K *P"], leaves: Leaves, *, mode: str = "smooth", tile: int | None = None
) -> UInt8[Tensor, "*S"]:
    """The class with the largest value at every pixel, painted tile by tile.

    Args:
        values: logits or shares of one image's leaves.
        leaves: the tree.
        mode: ``nearest`` or ``smooth``, as in ``unpatchify``.
        tile: side of a tile in pixels; memory is K x tile, never K x image.
    """
    labels = torch.zeros(leaves.shape, dtype=torch.uint8, device=values.device)
    for box in tiles(leaves.shape, tile):
        area = tuple(slice(first, last) for first, last in zip(*box, strict=True))
        # the same index as argmax, of equal values the first, and eight times faster along this axis
        labels[area] = unpatchify(values, leaves, mode=mode, box=box).max(0).indices.to(torch.uint8)
    return labels


def ceiling(
    labels: Integer[Tensor, "*S"], leaves: Leaves, patch_size: int, num_classes: int, mode: str = "smooth"
) -> tuple[float, ...]:
    """Dice of the true mask after it is encoded and decoded by the tree: the best any model on this tree can do.

    It separates what the cut loses from what the model loses; a score far below its ceiling is the model's fault.
    (It is a ceiling for a model that predicts true shares per sample; one that sharpens them could pass it slightly.)

    Args:
        labels: class per pixel, 255 where unknown.
        leaves: the tree.
        patch_size: samples per side of a token.
        num_classes: classes, background included.
        mode: how predictions are painted, ``nearest`` or ``smooth``.

    Returns:
        Dice per class without background; NaN for a class that is in neither the mask nor its decoding.

    Cost: one pass over the pixels per class, one tile at a time.
    """
    soft, _ = patchify_mask(labels, leaves, patch_size, num_classes)
    painted = paint_labels(soft, leaves, mode=mode).numpy()
    counts = count_labels(painted, labels.numpy(), num_classes)
    return tuple(_dice_iou(*row)[0] for row in counts[1:].tolist())


def mean_known(values: Sequence[float] | Mapping[str, float]) -> float:
    """Mean of the values that are numbers; NaN when none is."""
    numbers = values.values() if isinstance(values, Mapping) else values
    kept = [value for value in numbers if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan
