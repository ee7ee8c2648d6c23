"""How many leaves the images of a set need, before anything is trained: what a tree could gain on them.

The true mask is encoded and decoded by the tree alone, so no model is needed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.tasks.cut import cut
from foveate.tasks.data import SegmentationData
from foveate.tasks.items import Item, find_items
from foveate.tasks.labels import IGNORE
from foveate.tasks.metrics import ceiling, mean_known
from foveate.tasks.settings import FitConfig

LIMIT = 16
"""Images that a plan looks at unless more are asked for: enough for a median, and minutes less on a large set."""

GAIN = 1.2
"""Uniform over adaptive leaves from which a plan speaks of a gain; below, the trees' own cost is not worth it."""


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
        looked: images that were looked at; those without objects have no row.
        num_images: images that there are.
    """

    targets: tuple[float, ...]
    images: tuple[ImagePlan, ...]
    patch_size: int
    min_size: int
    looked: int
    num_images: int

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
        lines.append(f"P={self.patch_size}, smallest leaf {self.min_size} px ('-': too large)")
        if self.looked < self.num_images:
            lines.append(f"{self.looked} of {self.num_images} images, drawn by train.seed (--limit 0: all)")
        return "\n".join([*lines, self.verdict])


def _count(leaves: int | None) -> str:
    return "-" if leaves is None else str(leaves)


def plan_data(
    config: FitConfig,
    targets: Sequence[float] = (0.9, 0.95, 0.99),
    *,
    patch_size: int | None = None,
    items: Sequence[Item] | None = None,
    limit: int | None = LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> DataPlan:
    """How many leaves each image needs so that a perfect model could reach a Dice, adaptively and uniformly.

    It needs no model and no training: the true mask is encoded and decoded by the tree alone. The tree is built from
    the image, as in training, so a set whose image detail does not lie where its mask is shows it here.

    Args:
        config: the run; its ``tree`` settings but the budget are used, and images at ``data.max_side``.
        targets: ceilings, Dice from 0 to 1.
        patch_size: samples per side of a token; ``None``: what ``model.overrides`` says, else 16.
        items: images there are; ``None``: all of the run. Those without a mask are left out.
        limit: most images to look at, drawn by ``train.seed`` where there are more; ``None``: all.
        progress: called with (images done, images in all).

    Returns:
        Leaves to about 5 %, by bisection (the ceiling nearly always grows with the budget), and a verdict.

    Cost: about 20 trees, and 30 encodings and decodings of the mask, per image: nearly all of it is the latter.
    """
    if patch_size is None:
        declared = config.model.overrides.get("patch_size", 16)
        patch_size = declared if isinstance(declared, int) else 16
    there = [item for item in (find_items(config.data) if items is None else items) if item.mask is not None]
    chosen = there
    if limit is not None and len(there) > limit:
        drawn = np.random.default_rng(config.train.seed).permutation(len(there))[:limit]
        chosen = [there[index] for index in sorted(drawn.tolist())]
    data = SegmentationData(chosen, config, patch_size, train=False)
    rows = []
    for i, item in enumerate(chosen):
        image, labels = data.load(i, shrunk=True)
        assert labels is not None
        if bool(((labels > 0) & (labels < IGNORE)).any()):
            rows.append(_plan_image(item.name, image, labels, config, tuple(targets), patch_size))
        if progress is not None:
            progress(i + 1, len(chosen))
    return DataPlan(tuple(targets), tuple(rows), patch_size, config.tree.min_size, len(chosen), len(there))


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
