"""Looks at a data set before any time is spent on it: what is wrong with the files, and what a tree could gain."""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from foveate.errors import FoveateError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.tasks.cut import cut
from foveate.tasks.data import IGNORE, SegmentationData, read_labels, read_pixels
from foveate.tasks.items import SPLITS, Item, find_items, split_items
from foveate.tasks.metrics import ceiling, mean_known
from foveate.tasks.settings import DataConfig, FitConfig

ERRORS = ("unreadable image", "unreadable mask", "size mismatch", "duplicate across splits")
"""Findings that make training or its score wrong; the others are notes."""

GAIN = 1.2
"""Uniform over adaptive leaves from which a plan speaks of a gain; below, the trees' own cost is not worth it."""


@dataclass(frozen=True)
class Finding:
    """One thing seen in the data.

    Args:
        kind: what it is; see :data:`ERRORS` for the serious ones.
        name: the image, mask or class.
        detail: one line that says what was found.
    """

    kind: str
    name: str
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether it must be mended before a score means anything."""
        return self.kind in ERRORS


@dataclass(frozen=True)
class SplitRow:
    """What one split holds.

    Args:
        split: ``train``, ``val`` or ``test``.
        num_images: images in it.
        num_groups: groups in it.
        shares: share of labelled pixels per class, background first.
        images_with: images that hold each class, background first.
    """

    split: str
    num_images: int
    num_groups: int
    shares: tuple[float, ...]
    images_with: tuple[int, ...]


@dataclass(frozen=True)
class DataReport:
    """What :func:`check_data` saw.

    Args:
        class_names: classes, background first.
        splits: one row per split.
        findings: everything worth knowing, errors first.
        sizes: smallest and largest spatial shape by pixels; ``None`` when nothing could be read.
    """

    class_names: tuple[str, ...]
    splits: tuple[SplitRow, ...]
    findings: tuple[Finding, ...]
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None

    @property
    def num_errors(self) -> int:
        """Findings that must be mended."""
        return sum(finding.is_error for finding in self.findings)

    def to_text(self) -> str:
        """The report as plain text for a terminal or a file."""
        head = f"{'split':<6} {'images':>6} {'groups':>6}  " + "  ".join(f"{name:>16}" for name in self.class_names)
        lines = [head]
        for row in self.splits:
            cells = [f"{s:>9.3%} in {n:>3}" for s, n in zip(row.shares, row.images_with, strict=True)]
            counts = f"{row.split:<6} {row.num_images:>6} {row.num_groups:>6}  "
            lines.append(counts + "  ".join(f"{cell:>16}" for cell in cells))
        lines.append("share of labelled pixels, and images that hold the class")
        if self.sizes is not None:
            small, large = (" x ".join(str(side) for side in shape) for shape in self.sizes)
            lines.append(f"sizes: {small} to {large} pixels")
        for finding in self.findings:
            lines.append(f"{'ERROR' if finding.is_error else 'note '} {finding.kind}: {finding.name}: {finding.detail}")
        lines.append(f"{self.num_errors} errors, {len(self.findings) - self.num_errors} notes")
        return "\n".join(lines)


class _Census:
    """Running counts of one pass over the files."""

    def __init__(self, data: DataConfig, split_of: dict[str, str]) -> None:
        self.data = data
        self.split_of = split_of
        self.findings: list[Finding] = []
        self.pixels = {split: np.zeros(data.num_classes, dtype=np.int64) for split in SPLITS}
        self.images_with = {split: np.zeros(data.num_classes, dtype=np.int64) for split in SPLITS}
        self.seen: dict[bytes, Item] = {}
        self.shapes: list[tuple[int, ...]] = []

    def note(self, kind: str, name: str, detail: str) -> None:
        self.findings.append(Finding(kind, name, detail))

    def add(self, item: Item) -> None:
        shape = self._image(item)
        if item.mask is None:
            self.note("no mask", item.name, "it can be predicted but not learned from or scored")
            return
        try:
            labels = read_labels(item, self.data)
        except FoveateError as error:
            self.note("unreadable mask", item.name, str(error))
            return
        if shape is not None and labels.shape != shape:
            self.note(
                "size mismatch", item.name, f"image {shape}, mask {labels.shape}: give a mask of the image's size"
            )
            return
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)
        split = self.split_of[item.name]
        self.pixels[split] += counts[: self.data.num_classes]
        self.images_with[split] += counts[: self.data.num_classes] > 0
        if counts[IGNORE]:
            self.note(
                "ignored pixels", item.name, f"{counts[IGNORE]} of {labels.size} have no class and are not scored"
            )
        if not counts[1 : self.data.num_classes].any():
            self.note("background only", item.name, "the mask holds no class")

    def _image(self, item: Item) -> tuple[int, ...] | None:
        try:
            image = read_pixels(item, self.data)
        except FoveateError as error:
            self.note("unreadable image", item.name, str(error))
            return None
        shape = tuple(image.shape[1:])
        self.shapes.append(shape)
        if image.min() == image.max():
            self.note("constant image", item.name, f"every value is {image.flat[0]}")
        content = hashlib.blake2b(repr((image.shape, image.dtype.str)).encode())
        content.update(np.ascontiguousarray(image).data)
        first = self.seen.setdefault(content.digest(), item)
        if first is not item:
            sides = (self.split_of[first.name], self.split_of[item.name])
            apart = sides[0] != sides[1]
            self.note(
                "duplicate across splits" if apart else "duplicate",
                item.name,
                f"same pixels as {first.name}" + (f" ({sides[1]} and {sides[0]}): put both into one group" * apart),
            )
        return shape


def check_data(data: DataConfig, progress: Callable[[int, int], None] | None = None) -> DataReport:
    """Read every file once and report what is wrong or surprising, without stopping at the first.

    Args:
        data: the data settings.
        progress: called with (images done, images in all).

    Returns:
        Split table, class shares and findings: unreadable files, unknown labels (as unreadable masks, with the value),
        size mismatches, images with the same pixels (also across splits), classes that are empty somewhere they are
        needed, constant images and masks without any class.

    Raises:
        ConfigError: no image is found at all, or the rules contradict each other.

    Cost: one decode of every file; one image in memory at a time.
    """
    items = find_items(data)
    splits = split_items(items, data)
    split_of = {item.name: split for split, members in splits.items() for item in members}
    census = _Census(data, split_of)
    for done, item in enumerate(items, 1):
        census.add(item)
        if progress is not None:
            progress(done, len(items))
    rows = []
    for split, members in splits.items():
        total = max(int(census.pixels[split].sum()), 1)
        shares = tuple(float(count) / total for count in census.pixels[split])
        with_class = tuple(int(count) for count in census.images_with[split])
        rows.append(SplitRow(split, len(members), len({item.group for item in members}), shares, with_class))
        if not members:
            census.note("empty split", split, "no image is in it, so it gives no score")
            continue
        for name, images in zip(data.class_names[1:], with_class[1:], strict=True):
            if images == 0:
                census.note("empty class", name, f"no image of {split} holds it")
    ordered = tuple(sorted(census.findings, key=lambda finding: not finding.is_error))
    shapes = sorted(census.shapes, key=math.prod)
    return DataReport(data.class_names, tuple(rows), ordered, (shapes[0], shapes[-1]) if shapes else None)


@dataclass(frozen=True)
class ImagePlan:
    """Leaves that one image needs.

    Args:
        name: the image's name.
        adaptive: leaves of the tree per target; ``None`` where the smallest leaf is too large for it.
        uniform: leaves of a uniform grid per target, likewise.
    """

    name: str
    adaptive: tuple[int | None, ...]
    uniform: tuple[int | None, ...]


@dataclass(frozen=True)
class DataPlan:
    """What the trees of a set need, beside uniform grids.

    Args:
        targets: ceilings asked for (Dice of the mask encoded and decoded, meaned over the classes of the image).
        images: one row per image.
        patch_size: samples per side of a token.
        min_size: side of the smallest leaf in pixels.
    """

    targets: tuple[float, ...]
    images: tuple[ImagePlan, ...]
    patch_size: int
    min_size: int

    def ratios(self, target: int) -> tuple[float, ...]:
        """Uniform over adaptive leaves at the target of this position, for the images that reach it both ways."""
        pairs = ((image.uniform[target], image.adaptive[target]) for image in self.images)
        return tuple(one / two for one, two in pairs if one is not None and two is not None)

    @property
    def verdict(self) -> str:
        """Whether adaptive patching has something to gain here, in plain words."""
        found = [(target, sorted(ratios)) for k, target in enumerate(self.targets) if (ratios := self.ratios(k))]
        if not found:
            return (
                f"no target is reached with leaves of {self.min_size} px and P={self.patch_size}: lower tree.min_size, "
                "raise the patch size, or keep more of the image (data.max_side)"
            )
        parts = ", ".join(
            f"{median(ratios):.2g}x at {target:g} ({ratios[0]:.2g} to {ratios[-1]:.2g})" for target, ratios in found
        )
        gains = [f"{target:g}" for target, ratios in found if median(ratios) >= GAIN]
        rest = [f"{target:g}" for target, ratios in found if median(ratios) < GAIN]
        word = f"saves leaves at {', '.join(gains)}" if gains else "has nothing to gain here: use tree.uniform"
        if gains and rest:
            word += f" and has nothing to gain at {', '.join(rest)}"
        return f"adaptive patching {word} (uniform / adaptive leaves at equal ceiling, median and range: {parts})"

    def to_text(self) -> str:
        """The plan as plain text: a table of images and the verdict."""
        wide = max((len(image.name) for image in self.images), default=5)
        lines = ["leaves for a ceiling of (tree / uniform grid)"]
        lines.append(f"{'image':<{wide}}  " + "  ".join(f"{target:>15g}" for target in self.targets))
        for image in self.images:
            cells = [f"{_count(one)} / {_count(two)}" for one, two in zip(image.adaptive, image.uniform, strict=True)]
            lines.append(f"{image.name:<{wide}}  " + "  ".join(f"{cell:>15}" for cell in cells))
        return "\n".join(
            [*lines, f"P={self.patch_size}, smallest leaf {self.min_size} px ('-': too large)", self.verdict]
        )


def _count(leaves: int | None) -> str:
    return "-" if leaves is None else str(leaves)


def plan_data(
    config: FitConfig,
    targets: Sequence[float] = (0.9, 0.95, 0.99),
    *,
    patch_size: int | None = None,
    items: Sequence[Item] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataPlan:
    """How many leaves each image needs so that a perfect model could reach a Dice, adaptively and uniformly.

    It needs no model and no training: the true mask is encoded and decoded by the tree alone. The tree is built from
    the image, as in training, so a set whose image detail does not lie where its mask is shows it here.

    Args:
        config: the run; its ``tree`` settings but the budget are used, and images at ``data.max_side``.
        targets: ceilings, Dice from 0 to 1.
        patch_size: samples per side of a token; ``None``: what ``model.overrides`` says, else 16.
        items: images to look at; ``None``: all that have a mask.
        progress: called with (images done, images in all).

    Returns:
        Leaves to about 5 %, by bisection (the ceiling nearly always grows with the budget), and a verdict.

    Cost: about 20 trees, and as many encodings and decodings of the mask, per image.
    """
    if patch_size is None:
        declared = config.model.overrides.get("patch_size", 16)
        patch_size = declared if isinstance(declared, int) else 16
    chosen = [item for item in (find_items(config.data) if items is None else items) if item.mask is not None]
    data = SegmentationData(chosen, config, patch_size, train=False)
    rows = []
    for i, item in enumerate(chosen):
        image, labels = data.load(i, shrunk=True)
        assert labels is not None
        if bool(((labels > 0) & (labels < IGNORE)).any()):
            rows.append(_plan_image(item.name, image, labels, config, tuple(targets), patch_size))
        if progress is not None:
            progress(i + 1, len(chosen))
    return DataPlan(tuple(targets), tuple(rows), patch_size, config.tree.min_size)


def _plan_image(
    name: str,
    image: Tensor,
    labels: UInt8[Tensor, "*S"],
    config: FitConfig,
    targets: tuple[float, ...],
    patch_size: int,
) -> ImagePlan:
    finest = config.tree.min_size
    roots = 1
    if config.tree.max_size is not None:
        roots = math.prod(-(-side // config.tree.max_size) for side in labels.shape)
    most = len(uniform_leaves(tuple(labels.shape), finest))

    def tree(budget: int) -> Leaves:
        settings = replace(config.tree, max_leaves=budget, tolerance=None, uniform=None)
        return cut(image, settings, patch_size, config.data.spacing)

    def grid(size: int) -> Leaves:
        return uniform_leaves(tuple(labels.shape), size)

    def score(leaves: Leaves) -> float:
        return mean_known(ceiling(labels, leaves, patch_size, config.data.num_classes))

    budgets = _ladder(roots, most, 1.05)
    sizes = _ladder(finest, max(labels.shape), 1.12)[::-1]
    return ImagePlan(name, _needed(budgets, tree, score, targets, 14), _needed(sizes, grid, score, targets, 3))


def _ladder(low: int, high: int, step: float) -> list[int]:
    """Whole numbers from low to high, about ``step`` apart, both ends included."""
    count = math.ceil(math.log(max(high, low) / low, step))
    return sorted({min(high, round(low * step**k)) for k in range(count)} | {low, max(low, high)})


def _needed(
    choices: Sequence[int],
    build: Callable[[int], Leaves],
    score: Callable[[Leaves], float],
    targets: Sequence[float],
    stride: int,
) -> tuple[int | None, ...]:
    """Leaves of the first choice, from coarse to fine, whose score reaches each target.

    Strides from the coarse end, then bisects: the fine end costs most and is seldom needed.
    """

    @functools.cache
    def at(position: int) -> tuple[float, int]:
        leaves = build(choices[position])
        return score(leaves), len(leaves)

    found: dict[float, int | None] = {}
    low, last = 0, len(choices) - 1
    for target in sorted(targets):
        high = low
        while at(high)[0] < target and high < last:
            low, high = high + 1, min(high + stride, last)
        if at(high)[0] < target:
            found[target] = None
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle)[0] >= target else (middle + 1, high)
        found[target] = at(low)[1]
    return tuple(found[target] for target in targets)
