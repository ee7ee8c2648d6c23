"""Which cells to look at more closely: what a finer level promises to save, told from the levels above it.

From one scale to the next the gain of a split falls by a factor, whose spread is much the same at neighbouring scales
of one image. So the gains of cells that no level has priced yet are drawn from those of their parents, times the
factors met one scale above. What the best use of the budget would have of them is their promise.

Legend: lists hold one grid per known scale, finest first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.pyramid import Triple, Values

LOSS = 0.005  # share of the residual that may be missed by not looking
_DRAWS = 24
_FEW = 64  # factors that say nothing about their spread


def promising(
    gains: Sequence[Values], bonus: Sequence[Values], ratios: Sequence[Triple], splits: int, depths: tuple[int, int]
) -> NDArray[np.bool_]:
    """The cells of the finest known scale whose children are worth a look, as a grid of truth values.

    Args:
        gains: what splitting a cell saves per leaf that it costs, the hull taken.
        bonus: what is added to it and known at every scale.
        ratios: children of a cell of each scale along each axis.
        splits: leaves that the budget has beyond the roots.
        depths: how many further scales the finer level prices, and how many there are.
    """
    values = [gain + more for gain, more in zip(gains, bonus, strict=True)]
    below = float(np.prod(ratios[0]))
    known = [value[value > 0] for value in values]
    cost = [np.full(len(value), np.prod(r) - 1.0) for value, r in zip(known, ratios, strict=True)]
    limit = _first_left(np.concatenate(known), np.concatenate(cost), splits)
    factors = _factors(gains, ratios, limit)

    for step in range(1, depths[1] + 1):
        likely = gains[0] * np.median(factors) ** step + bonus[0] / below**step
        known.append(likely[likely > limit])
        cost.append(np.full(len(known[-1]), below**step * (below - 1.0)))
    limit = _first_left(np.concatenate(known), np.concatenate(cost), splits)
    left = float(sum(v[v <= limit].sum() * (np.prod(r) - 1.0) for v, r in zip(values, ratios, strict=True)))
    promise = np.zeros(gains[0].shape)
    for step in range(1, depths[0] + 1):
        leaves = below**step * (below - 1.0) / len(factors)
        for factor in factors:
            drawn = gains[0] * factor**step + bonus[0] / below**step
            promise += leaves * np.maximum(drawn - limit, 0.0)
            left += leaves * float(drawn[drawn <= limit].sum())
    order = np.argsort(promise, axis=None)
    missed = int(np.searchsorted(np.cumsum(promise.ravel()[order]), LOSS * left, side="right"))
    chosen = promise > 0
    chosen.ravel()[order[:missed]] = False
    return chosen


def _first_left(values: Values, costs: Values, splits: int) -> float:
    order = np.argsort(-values)
    taken = int(np.searchsorted(np.cumsum(costs[order]), splits, side="right"))
    return float(values[order[taken]]) if taken < len(order) else 0.0


def _factors(gains: Sequence[Values], ratios: Sequence[Triple], limit: float) -> Values:
    """Quantiles of a cell's gain over its parent's, of parents that are split, one scale above those asked for."""
    assumed: Values = (np.arange(_DRAWS) + 0.5) / _DRAWS
    if len(gains) < 2:
        return assumed
    parent = gains[1]
    for axis, r in enumerate(ratios[1]):
        parent = np.repeat(parent, r, axis)
    parent = parent[tuple(slice(0, n) for n in gains[0].shape)]
    met = (parent > 0) & (parent >= limit)
    if int(met.sum()) < _FEW:
        return assumed
    factors: Values = np.quantile(gains[0][met] / parent[met], assumed)
    return factors
