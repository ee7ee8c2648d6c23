"""Which cells to look at more closely: what a finer level promises to save, told from the levels above it.

What splitting a cell saves is near to what merging its children with those beside it costs within the cell, which the
level that the cell was seen at knows. How near, is measured one scale above, where both are known, and applied with its
spread to the cells that no level has priced. What the budget would have of them is their promise.

Legend: lists hold one grid per scale, finest first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.pyramid import Triple, Values

_DRAWS = 24
_FEW = 64  # factors that say nothing about their spread


def promising(
    hints: Sequence[Values],
    gains: Sequence[Values],
    bonus: Sequence[Values],
    ratios: Sequence[Triple],
    splits: int,
    depths: tuple[int, int],
    loss: float,
) -> NDArray[np.bool_]:
    """The cells of the finest scale that are worth a look, as a grid of truth values.

    Args:
        hints: what merging the children of a cell with those beside it costs within the cell, per leaf of a split.
        gains: what splitting a cell saves per leaf that it costs, the hull taken; of the finest scale not known.
        bonus: what is added to it and known at every scale.
        ratios: children of a cell of each scale along each axis.
        splits: leaves that the budget has beyond the roots.
        depths: how many scales the finer level prices, and how many there are to price.
        loss: share of the residual that may be missed by not looking.
    """
    below = float(np.prod(ratios[0]))
    values = [gain + more for gain, more in zip(gains[1:], bonus[1:], strict=True)]
    known = [value[value > 0] for value in values]
    cost = [np.full(len(value), np.prod(r) - 1.0) for value, r in zip(known, ratios[1:], strict=True)]
    limit = _first_left(np.concatenate([*known, np.zeros(0)]), np.concatenate([*cost, np.zeros(0)]), splits)
    factors = _factors(hints[1:2], gains[1:2], limit)
    modest = float(np.quantile(factors, 0.1))  # what others will claim of the budget must not be overrated
    for step in range(depths[1]):
        likely = hints[0] * (modest * (modest / below) ** step) + bonus[0] / below**step
        known.append(likely[likely > limit])
        cost.append(np.full(len(known[-1]), below**step * (below - 1.0)))
    limit = _first_left(np.concatenate(known), np.concatenate(cost), splits)
    left = float(sum(v[v <= limit].sum() * (np.prod(r) - 1.0) for v, r in zip(values, ratios[1:], strict=True)))
    promise = np.zeros(hints[0].shape)
    for step in range(depths[0]):
        leaves = below**step * (below - 1.0) / len(factors)
        for factor in factors:
            drawn = hints[0] * (factor * (factor / below) ** step) + bonus[0] / below**step
            promise += leaves * np.maximum(drawn - limit, 0.0)
            left += leaves * float(drawn[drawn <= limit].sum())
    order = np.argsort(promise, axis=None)
    missed = int(np.searchsorted(np.cumsum(promise.ravel()[order]), loss * left, side="right"))
    chosen = promise > 0
    chosen.ravel()[order[:missed]] = False
    return chosen


def _first_left(values: Values, costs: Values, splits: int) -> float:
    order = np.argsort(-values)
    taken = int(np.searchsorted(np.cumsum(costs[order]), splits, side="right"))
    return float(values[order[taken]]) if taken < len(order) else 0.0


def _factors(hints: Sequence[Values], gains: Sequence[Values], limit: float) -> Values:
    """Quantiles of gains over the hints at them, where these are large, one scale above those asked for."""
    assumed: Values = 4.0 * (np.arange(_DRAWS) + 0.5) / _DRAWS
    if not gains:
        return assumed
    ranked = np.sort(hints[0], axis=None)
    faint = ranked[np.searchsorted(np.cumsum(ranked), 0.01 * ranked.sum())]  # the cells below hold a hundredth of all
    met = hints[0] > max(limit, float(faint))
    if int(met.sum()) < _FEW:
        return assumed
    factors: Values = np.quantile(gains[0][met] / hints[0][met], (np.arange(_DRAWS) + 0.5) / _DRAWS)
    return factors
