"""The tree of an image that is read level by level, coarse to fine.

Legend: C channels, N spatial axes, K scales, U cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import BudgetError
from foveate.geometry.detail import Detail, Residual
from foveate.geometry.image import as_image, as_volume
from foveate.geometry.kernels_tree import SCALE
from foveate.geometry.lazy_promise import promising
from foveate.geometry.lazy_read import Counter, Stack, level_shape, read_cells, read_level, whole_steps
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import patchify
from foveate.geometry.pyramid import (
    Sizes,
    Values,
    additive,
    grid_dims,
    merge_errors,
    rank_by_gain,
    sample_sizes,
    split_ratios,
    triple,
)
from foveate.geometry.source import Source
from foveate.geometry.tree import _check_roots, _leaves, _Options, _walk

LOSS = 0.005  # share of the residual that may be missed by not looking
CHEAP = 64  # level-0 pixels per pixel of a level that is read on suspicion
MOST_HELD = 1 << 28  # pixels of a level that is read whole
MOST_MEASURED = 1 << 26  # of one that another detail than the residual is measured on


@dataclass(frozen=True)
class Stage:
    """A level, and the scales ``low .. high`` whose leaves are resampled from it.

    It prices the splits into these leaves: the scales ``low + 1 .. high + 1``.
    """

    level: int
    step: tuple[int, ...]
    low: int
    high: int


def plan_stages(source: Source, sizes: Sizes, patch_size: Sequence[int]) -> list[Stage]:
    """Which level serves which scales, coarsest first: the coarsest whose pixels divide the samples of the leaves."""
    steps = whole_steps(source)
    stages: list[Stage] = []
    for k, extent in reversed(list(enumerate(sample_sizes(sizes, patch_size)))):
        per_axis = list(zip(extent[3 - len(patch_size) :], sizes[k], patch_size, strict=True))
        fits = [
            level
            for level, step in steps.items()
            if all(by == 1 or e % by == s % (p * by) == 0 for by, (e, s, p) in zip(step, per_axis, strict=True))
        ]
        level = max(fits)
        if stages and stages[-1].level == level:
            stages[-1] = Stage(level, steps[level], k, stages[-1].high)
        else:
            stages.append(Stage(level, steps[level], k, k))
    return stages


class Growth:
    """What is known of a source so far: what splits save, and the pixels that were decoded to find that out."""

    def __init__(
        self, source: Source, sizes: Sizes, options: _Options, prior: NDArray[Any] | None, weight: float
    ) -> None:
        self.source, self.sizes, self.options = source, sizes, options
        self.prior, self.weight = prior, weight
        self.stages = plan_stages(source, sizes, options.patch_size)
        self.count = Counter.of(source)
        self.held: list[tuple[Stage, list[Stack]]] = []
        self._dims = grid_dims(source.shape, sizes)
        self._ratios = split_ratios(sizes)
        _check_roots(int(self._dims[-1].prod()), options)
        self._saved: list[Values] = [np.zeros(0)] * len(sizes)
        self._hints: list[Values] = [np.zeros(0)] * len(sizes)
        samples = zip(triple(sizes[-1]), sample_sizes(sizes, options.patch_size)[-1], strict=True)
        self._samples = [side // e if e > 1 else side for side, e in samples]

    def by_residual(self) -> Leaves:
        """Grow the tree that saves the most squared error, reading finer levels where they promise to save more."""
        stage = self.stages[0]
        if math.prod(level_shape(self.source, stage.step)) > MOST_HELD:
            raise BudgetError(
                f"level {stage.level} of shape {self.source.levels[stage.level]} is the coarsest of use, above the "
                f"{MOST_HELD} pixels that are read at once; make coarser ones (io.pyramid_cache.with_levels), of "
                "downsamples 2^i, and let min_size be a multiple of patch_size"
            )
        self._hold(stage, [read_level(self.source, stage.level, stage.step, self.count)], stage.high)
        for stage in self.stages[1:]:
            top = stage.high + 1
            roots = top == len(self.sizes) - 1
            chosen = np.ones(self._dims[top], bool) if roots else self._promising(top, stage)
            if not chosen.any():
                break
            cells = np.argwhere(chosen)[:, 3 - len(self.source.shape) :]
            size = [side // by for side, by in zip(self.sizes[top], stage.step, strict=True)]
            self._hold(stage, read_cells(self.source, stage.level, stage.step, cells, size, self.count), top)
        low = self.held[-1][0].low
        values = [gain + more for gain, more in zip(*self._values(low), strict=True)]
        return self._walk(values, low)

    def _hold(self, stage: Stage, stacks: list[Stack], top: int) -> None:
        """Price the splits of the scales ``low + 1 .. top`` of a stage in the cells that were read."""
        self.held.append((stage, stacks))
        for k in range(stage.low, top + 1):
            self._saved[k] = np.zeros(self._dims[k])
            self._hints[k] = np.zeros(self._dims[k])
        chain, num = self._chain(stage, top), len(self.source.shape)
        samples = self._samples[3 - num :]
        ratio = self._ratios[min(stage.low, len(self._ratios) - 1)][3 - num :] if self._ratios else (1,) * num
        halves = stage.low > 0 and all(n % r == 0 for n, r in zip(samples, ratio, strict=True))
        per_level = float(np.prod(stage.step))
        for stack in stacks:
            image = as_image(stack.pixels)
            volume, shape = as_volume(image), image.shape[1:]
            errors = merge_errors(volume, shape, chain, samples)
            for k in range(stage.low + 1, top + 1):
                stack.scatter(errors[k - stage.low] * per_level, chain[k - stage.low], self._saved[k])
            if halves:  # with half the samples, a merge counts for the cells below those that it makes
                finer = tuple(side // r for side, r in zip(chain[0], ratio, strict=True))
                half = [n // r for n, r in zip(samples, ratio, strict=True)]
                errors = merge_errors(volume, shape, (finer, *chain), half)
                for k in range(stage.low, top + 1):
                    stack.scatter(errors[k - stage.low + 1] * per_level, chain[k - stage.low], self._hints[k])
        if not halves:
            for k in range(stage.low, min(top + 1, len(self.sizes) - 1)):
                self._hints[k] = unfold(self._saved[k + 1], self._ratios[k], self._saved[k].shape)

    def _values(self, low: int) -> tuple[list[Values], list[Values]]:
        """Of the scales from ``low``: what a split saves per leaf, and what the prior adds to that."""
        gains = rank_by_gain(self._saved[low:], self.source.shape, self.sizes[low:])
        return gains, self._bonus(sum(float(saved.sum()) for saved in self._saved[low:]), low)

    def _bonus(self, total: float, low: int) -> list[Values]:
        """What the prior adds to the cells of the scales from ``low``: its share of ``total``, times its weight."""
        if self.prior is None or self.weight == 0:
            return [np.broadcast_to(0.0, tuple(dims)) for dims in self._dims[low:]]
        sums = map_sums(self.prior, self.source.shape, self.sizes[low:])
        whole = float(sums[-1].sum())
        return [level * (self.weight * total / whole if whole > 0 else 0.0) for level in sums]

    def _chain(self, stage: Stage, top: int) -> Sizes:
        """The cells of the scales ``low .. top`` in pixels of a stage's level."""
        return tuple(
            tuple(side // by for side, by in zip(size, stage.step, strict=True))
            for size in self.sizes[stage.low : top + 1]
        )

    def _promising(self, top: int, stage: Stage) -> NDArray[np.bool_]:
        gains, bonus = self._values(top)
        splits = (self.options.max_leaves or 0) - int(self._dims[-1].prod())
        hints = [
            self._hints[k] / (math.prod(self._ratios[k - 1]) - 1) for k in range(top, min(top + 2, len(self.sizes)))
        ]
        ahead = top if math.prod(stage.step) < CHEAP else 0
        return promising(
            hints, gains, bonus, self._ratios[top - 1 :], splits, (stage.high - stage.low + 1, ahead), LOSS
        )

    def _walk(self, values: Sequence[Values], low: int) -> Leaves:
        """The leaves of the tree of the scales from ``low``."""
        chain = self.sizes[low:]
        table, code = _walk([list(values)], [self.source.shape], [chain], self.options)
        table = table[np.argsort(code)]
        table[:, SCALE] += low
        return _leaves(table, self.source.shape, self.sizes)

    def by_detail(self, detail: Detail) -> Leaves:
        """Grow the tree of another detail on the coarsest level on which no leaf is as small as it can tell."""
        for stage in self.stages:
            chain = self._chain(stage, len(self.sizes) - 1)
            shape = level_shape(self.source, stage.step)
            if math.prod(shape) > MOST_MEASURED:
                raise BudgetError(
                    f"level {stage.level} has {math.prod(shape)} pixels, above the {MOST_MEASURED} that a detail other "
                    "than 'residual' is measured on at once; use detail='residual', fewer leaves or a larger min_size"
                )
            stack = read_level(self.source, stage.level, stage.step, self.count)
            image = as_image(stack.pixels)
            measure = detail.gain if isinstance(detail, Residual) else detail.pyramid
            values = measure(image, chain, tuple(self._samples[3 - len(shape) :]))
            bonus = self._bonus(float(values[-1].sum()), stage.low)
            leaves = self._walk([value + more for value, more in zip(values, bonus, strict=True)], stage.low)
            if not bool((leaves.scale == stage.low).any()):
                break
        self.held = [(Stage(stage.level, stage.step, stage.low, len(self.sizes) - 1), [stack])]
        return leaves

    def by_map(self, values: NDArray[Any]) -> Leaves:
        """Grow the tree of a map of any resolution; nothing needs to be read for it."""
        for stage in self.stages:
            sums = map_sums(values, self.source.shape, self.sizes[stage.low :])
            bonus = self._bonus(float(sums[-1].sum()), stage.low)
            leaves = self._walk([value + more for value, more in zip(sums, bonus, strict=True)], stage.low)
            if not bool((leaves.scale == stage.low).any()):
                break
        return leaves

    def patches(self, leaves: Leaves, patch_size: int) -> Tensor:
        """The samples of the leaves, from the pixels that are held; what is missing is read."""
        shape = (len(leaves), self.source.channels, *(patch_size,) * leaves.num_dims)
        pixels, todo = torch.empty(shape), np.ones(len(leaves), bool)
        scale, start = leaves.scale.numpy(), leaves.start.numpy()
        for stage, stacks in self.held:
            self._resample(stage, stacks, leaves, pixels, todo)
        for stage in self.stages:
            which = np.flatnonzero(todo & (scale >= stage.low) & (scale <= stage.high))
            if not len(which):
                continue
            size = self.sizes[stage.high]
            cells = np.unique(start[which] // np.array(size), axis=0)
            side = [n // by for n, by in zip(size, stage.step, strict=True)]
            stacks = read_cells(self.source, stage.level, stage.step, cells, side, self.count)
            self._resample(stage, stacks, leaves, pixels, todo)
        return pixels

    def _resample(
        self, stage: Stage, stacks: list[Stack], leaves: Leaves, pixels: Tensor, todo: NDArray[np.bool_]
    ) -> None:
        scale, start = leaves.scale.numpy(), leaves.start.numpy() // np.array(stage.step)
        chain = self._chain(stage, stage.high)
        for stack in stacks:
            slots = np.full(stack.cells.max(0) + 1, -1, np.int64)
            slots[tuple(stack.cells.T)] = np.arange(len(stack.cells))
            at = start // np.array(stack.size)
            near = todo & (scale >= stage.low) & (scale <= stage.high) & (at < slots.shape).all(axis=1)
            which = np.flatnonzero(near)
            place = slots[tuple(at[which].T)]
            which, place = which[place >= 0], place[place >= 0]
            if not len(which):
                continue
            kind = torch.from_numpy(scale[which] - stage.low)
            local = Leaves(
                torch.from_numpy(stack.local(start[which], place)),
                torch.tensor(chain)[kind],
                kind,
                tuple(stack.pixels.shape[1:]),
                chain,
            )
            pixels[torch.from_numpy(which)] = patchify(stack.pixels, local, pixels.shape[-1]).pixels
            todo[which] = False


def unfold(values: Values, ratio: Sequence[int], dims: Sequence[int]) -> Values:
    """Share the values of cells among their children, alike."""
    for axis, r in enumerate(ratio):
        values = np.repeat(values, r, axis)
    return values[tuple(slice(0, n) for n in dims)] / math.prod(ratio)


def map_sums(values: NDArray[Any], shape: Sequence[int], sizes: Sizes) -> list[Values]:
    """The additive pyramid of a map of any resolution over an image of ``shape``, in units of the map's pixels."""
    sums = values.astype(np.float64)
    for axis, (full, have, side) in enumerate(zip(shape, values.shape, sizes[0], strict=True)):
        edges = np.minimum(np.arange(-(-full // side) + 1) * side, full) * (have / full)
        before = np.concatenate([np.zeros_like(sums.take([0], axis)), sums.cumsum(axis)], axis)
        low = np.minimum(edges.astype(np.int64), have - 1)
        part = (edges - low).reshape([-1 if a == axis else 1 for a in range(sums.ndim)])
        below = before.take(low, axis)
        sums = np.maximum(np.diff(below + part * (before.take(low + 1, axis) - below), axis=axis), 0.0)
    return additive(sums.reshape(triple(sums.shape)), sizes)
