import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_roc_auc

from foveate.errors import ShapeError
from foveate.tasks.class_metrics import auroc, main_score, score_task


def one_hot(truth: np.ndarray, num: int) -> np.ndarray:
    return np.eye(num)[truth]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(drawn: list[tuple[int, bool]]) -> None:
    score = np.array([value for value, _ in drawn], np.float64)
    positive = np.array([label for _, label in drawn])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    if pairs:
        assert auroc(score, positive) == pytest.approx(np.mean(pairs))
    else:
        assert math.isnan(auroc(score, positive))


def test_auroc_equals_monai() -> None:
    rng = np.random.default_rng(0)
    said = rng.dirichlet(np.ones(4), 200)
    truth = rng.integers(0, 4, 200)
    theirs = compute_roc_auc(torch.from_numpy(said), torch.from_numpy(one_hot(truth, 4)))
    assert score_task("classes", said, truth, resamples=0)["auroc"]["mean"] == pytest.approx(float(theirs))


def test_scores_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2, -1])
    said = one_hot(np.array([0, 0, 1, 1, 1, 0, 2]), 3)
    scores = score_task("classes", said, truth, resamples=0)
    assert scores["accuracy"]["mean"] == pytest.approx(4 / 6)
    assert scores["accuracy"]["num"] == 6
    assert scores["balanced_accuracy"]["mean"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["f1"]["mean"] == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    marks = np.array([[1, 0], [1, 1], [0, 0], [math.nan, math.nan]])
    guess = np.array([[0.9, 0.2], [0.4, 0.8], [0.3, 0.6], [0.1, 0.1]])
    scores = score_task("labels", guess, marks, resamples=0)
    assert scores["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert scores["f1"]["mean"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["auroc"]["mean"] == pytest.approx((1 + 1) / 2)
    grades = score_task("ordinal", one_hot(np.array([0, 1, 2, 2]), 3), np.array([0, 1, 2, 0]), resamples=0)
    assert grades["error"]["mean"] == 0.5
    years = score_task("regression", np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [2.0], [6.0]]), resamples=0)
    assert years["error"]["mean"] == 1.0
    assert years["r2"]["mean"] == pytest.approx(1 - 9 / 14)


def test_kappa_with_quadratic_weights() -> None:
    truth, guess = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    table = np.zeros((3, 3))
    np.add.at(table, (truth, guess), 1)
    apart = (np.arange(3)[:, None] - np.arange(3)) ** 2
    expected = 1 - (apart * table).sum() / (apart * np.outer(table.sum(1), table.sum(0)) / 6).sum()
    scores = score_task("ordinal", one_hot(guess, 3), truth, resamples=0)
    assert scores["kappa"]["mean"] == pytest.approx(expected)


def test_intervals_hold_the_score_and_shrink_with_images() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for num in (30, 300):
        truth = rng.integers(0, 2, num)
        score = truth * 0.5 + rng.random(num)
        found = score_task("classes", np.stack([-score, score], 1), truth, resamples=300)["auroc"]
        assert found["low"] < found["mean"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 2
    again = score_task("classes", np.stack([-score, score], 1), truth, resamples=300)["auroc"]
    assert again == found


def test_what_has_no_meaning_is_nan_without_a_warning() -> None:
    said, truth = np.full((3, 2), 0.5), np.ones(3, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = {"a": score_task("classes", said, truth), "b": score_task("classes", said[:0], truth[:0])}
    assert math.isnan(scores["a"]["auroc"]["mean"])
    assert scores["a"]["accuracy"]["mean"] == 0.0
    assert math.isnan(scores["b"]["accuracy"]["mean"])
    assert main_score({"a": "classes"}, scores) == 0.0  # accuracy instead
    assert math.isnan(main_score({"b": "classes"}, scores))


def test_shapes_are_checked() -> None:
    with pytest.raises(ShapeError, match=r"said \(3, 2\) and truth \(2,\) of a task of classes"):
        score_task("classes", np.zeros((3, 2)), np.zeros(2, np.int64))
