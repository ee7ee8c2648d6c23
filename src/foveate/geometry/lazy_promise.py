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

LOSS = 0.002  # share of the residual that may be missed by not looking
_DRAWS = 24
_FEW = 64  # factors that say nothing about their spread


def threshold(values: Sequence[Values], ratios: Sequence[Triple], splits: int) -> float:
    """The value of the first cell that is not split, 0 where the budget splits them all."""
    some = [value[value > 0] for value in values]
    costs = [np.full(len(value), np.prod(r) - 1.0) for value, r in zip(some, ratios, strict=True)]
    return _first_left(np.concatenate(some), np.concatenate(costs), splits)


def promising(
    gains: Sequence[Values], bonus: Sequence[Values], ratios: Sequence[Triple], splits: int, depth: int
) -> NDArray[np.bool_]:
    """The cells of the finest known scale whose children are worth a look, as a grid of truth values.

    Args:
        gains: what splitting a cell saves per leaf that it costs, the hull taken.
        bonus: what is added to it and known at every scale.
        ratios: children of a cell of each scale along each axis.
        splits: leaves that the budget has beyond the roots.
        depth: how many scales the finer level prices.
    """
    values = [gain + more for gain, more in zip(gains, bonus, strict=True)]
    below = float(np.prod(ratios[0]))
    factors = _factors(gains, ratios, threshold(values, ratios, splits))
    known = [value[value > 0] for value in values]
    cost = [np.full(len(value), np.prod(r) - 1.0) for value, r in zip(known, ratios, strict=True)]
    draws = gains[0][gains[0] > 0][:, None] * factors
    cost.append(np.full(draws.size, below * (below - 1.0) / len(factors)))
    limit = _first_left(np.concatenate([*known, draws.ravel()]), np.concatenate(cost), splits)
    left = float(sum(v[v <= limit].sum() * (np.prod(r) - 1.0) for v, r in zip(values, ratios, strict=True)))
    promise = np.zeros(gains[0].shape)
    for step in range(1, depth + 1):
        leaves = below**step * (below - 1.0)
        for factor in factors:
            drawn = gains[0] * factor**step + bonus[0] / below**step
            promise += leaves / len(factors) * np.maximum(drawn - limit, 0.0)
            left += leaves / len(factors) * float(drawn[drawn <= limit].sum())
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
