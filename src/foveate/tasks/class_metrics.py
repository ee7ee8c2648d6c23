"""Scores of labels: AUROC, balanced accuracy, F1, accuracy; kappa, error; each with a bootstrap interval over images.

Legend: B images, K classes or labels of a task.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.geometry.image import Real

Array = NDArray[Any]
Measure = Callable[[Array, Array], float]

RESAMPLES = 1000
LEVEL = 0.95

MAIN = {"classes": "auroc", "labels": "auroc", "ordinal": "kappa", "regression": "r2"}
"""The measure by which a task of each kind is judged where one number is wanted."""


def score_task(
    kind: str,
    said: Shaped[np.ndarray, "_ K"],
    truth: Shaped[np.ndarray, "..."],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """All measures of one task.

    ``classes``: AUROC (of each class against the others, mean over the classes that images have and lack), balanced
    accuracy (mean recall of the classes there are), F1 (mean over these), accuracy. ``labels``: AUROC and F1 alike, and
    the share of images whose every label is right. ``ordinal``: kappa with quadratic weights, mean absolute error in
    steps, accuracy. ``regression``: R2 and mean absolute error.

    Args:
        kind: of the task.
        said: probabilities of the K classes or labels, or the number.
        truth: class of each image, below 0 where nobody knows; 0 or 1 per label, or the number, NaN where nobody knows.
        resamples: of the images, drawn with replacement, for the 95 % interval; 0 for none.
        seed: of these.

    Returns:
        By measure ``mean``, ``low``, ``high`` and ``num``, the number of images; NaN where a measure has no meaning,
        such as AUROC where all images are of one class.

    Raises:
        ShapeError: ``said`` and ``truth`` do not fit.
    """
    if len(said) != len(truth) or truth.ndim != (1 if kind in ("classes", "ordinal") else 2):
        raise ShapeError(f"said {said.shape} and truth {truth.shape} of a task of {kind}; give one of each per image")
    known = truth >= 0 if truth.ndim == 1 else ~np.isnan(truth).any(1)
    said, truth = said[known].astype(np.float64), truth[known]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, max(len(truth), 1), (resamples if len(truth) > 1 else 0, len(truth)))
    return {name: _interval(measure, said, truth, draws) for name, measure in _MEASURES[kind].items()}


def mean_score(values: Float[np.ndarray, " B"], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """Mean over images with its interval, as `score_task` gives them.

    Args:
        values: of each image.
        resamples: as in `score_task`, as is ``seed``.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, max(len(values), 1), (resamples if len(values) > 1 else 0, len(values)))
    return _interval(lambda said, _: float(said.mean()), values, values, draws)


def _interval(measure: Measure, said: Array, truth: Array, draws: Int64[np.ndarray, "R B"]) -> dict[str, float]:
    values = np.array([measure(said[draw], truth[draw]) for draw in draws])
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) if len(values) else (math.nan, math.nan)
    mean = measure(said, truth) if len(truth) else math.nan
    return {"mean": mean, "low": float(low), "high": float(high), "num": len(truth)}


def auroc(score: Float[np.ndarray, " B"], positive: Bool[np.ndarray, " B"]) -> float:
    """Share of pairs of a positive and a negative that the score has in order; ties count one half, NaN without pairs.

    Cost: one sort.
    """
    from scipy.stats import rankdata

    num = int(positive.sum())
    pairs = num * (len(positive) - num)
    if pairs == 0:
        return math.nan
    return float((rankdata(score)[positive].sum() - num * (num + 1) / 2) / pairs)


def _mean_auroc(said: Array, truth: Array) -> float:
    positive = truth == 1 if truth.ndim == 2 else truth[:, None] == np.arange(said.shape[1])
    if truth.ndim == 1 and said.shape[1] == 2:
        return auroc(said[:, 1], positive[:, 1])
    return _mean([auroc(score, one) for score, one in zip(said.T, positive.T, strict=True)])


def _confusion(said: Array, truth: Array) -> Array:
    num = said.shape[1]
    return np.bincount(truth * num + said.argmax(1), minlength=num * num).reshape(num, num)


def _balanced(said: Array, truth: Array) -> float:
    table = _confusion(said, truth)
    there = table.sum(1) > 0
    return float((table.diagonal()[there] / table.sum(1)[there]).mean())


def _accuracy(said: Array, truth: Array) -> float:
    return float((said.argmax(1) == truth).mean())


def _f1(said: Array, truth: Array) -> float:
    if truth.ndim == 2:
        guess, real = said >= 0.5, truth == 1
        both, either = (guess & real).sum(0), guess.sum(0) + real.sum(0)
    else:
        table = _confusion(said, truth)
        both, either = table.diagonal(), table.sum(0) + table.sum(1)
    there = either > 0
    return float((2 * both[there] / either[there]).mean()) if there.any() else math.nan


def _exact(said: Array, truth: Array) -> float:
    return float(((said >= 0.5) == (truth == 1)).all(1).mean())


def _kappa(said: Array, truth: Array) -> float:
    table = _confusion(said, truth)
    step = np.arange(len(table))
    apart = (step[:, None] - step) ** 2
    chance = (apart * np.outer(table.sum(1), table.sum(0))).sum() / len(truth)
    return float(1 - (apart * table).sum() / chance) if chance > 0 else math.nan


def _steps(said: Array, truth: Array) -> float:
    return float(np.abs(said.argmax(1) - truth).mean())


def _error(said: Array, truth: Array) -> float:
    return float(np.abs(said - truth).mean())


def _r2(said: Array, truth: Array) -> float:
    spread = ((truth - truth.mean(0)) ** 2).sum()
    return float(1 - ((said - truth) ** 2).sum() / spread) if spread > 0 else math.nan


def _mean(values: list[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


_MEASURES: dict[str, dict[str, Measure]] = {
    "classes": {"auroc": _mean_auroc, "balanced_accuracy": _balanced, "f1": _f1, "accuracy": _accuracy},
    "labels": {"auroc": _mean_auroc, "f1": _f1, "accuracy": _exact},
    "ordinal": {"kappa": _kappa, "error": _steps, "accuracy": _accuracy},
    "regression": {"r2": _r2, "error": _error},
}


def main_score(kinds: Mapping[str, str], scores: Mapping[str, Mapping[str, Mapping[str, Real]]]) -> float:
    """One number for all tasks: the mean over tasks of the main measure, or the accuracy where that has no meaning.

    Args:
        kinds: of the tasks, by name.
        scores: what `score_task` said of each.
    """
    values = []
    for name, kind in kinds.items():
        main = float(scores[name][MAIN[kind]]["mean"])
        values.append(float(scores[name]["accuracy"]["mean"]) if math.isnan(main) and kind != "regression" else main)
    return _mean(values)
