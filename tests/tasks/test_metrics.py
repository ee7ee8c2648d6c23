"""Scores are pixel scores with a stated policy for what is missed, and the ceiling is the tree's alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.tree import adaptive_leaves
from foveate.tasks.metrics import (
    PixelMetrics,
    ceiling,
    count_labels,
    hausdorff95,
    interval,
    mean_known,
    paint_labels,
    tiles,
)

NAMES = ("background", "cell", "lesion")


def square(shape: tuple[int, ...], start: int, side: int) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[(slice(start, start + side),) * len(shape)] = True
    return mask


def test_dice_and_iou() -> None:
    truth = np.zeros((10, 10), dtype=np.uint8)
    truth[:4, :4] = 1
    guess = np.zeros_like(truth)
    guess[:4, 2:6] = 1
    metrics = PixelMetrics(NAMES)
    row = metrics.update("a", guess, truth)
    assert row["dice"]["cell"] == pytest.approx(2 * 8 / 32)
    assert row["iou"]["cell"] == pytest.approx(8 / 24)
    assert math.isnan(row["dice"]["lesion"])
    assert metrics.summarise()["dice"]["lesion"]["num"] == 0


def test_dice_is_pixel_space() -> None:
    """Two leaves of unequal size, one right and one wrong: tokens say 1/2, pixels say what was covered."""
    image = np.zeros((1, 64, 64), dtype=np.uint8)
    image[0, :8, :8] = np.indices((8, 8)).sum(0) // 2 % 2 * 255  # stripes that 8-pixel leaves of 4 samples can keep
    leaves = adaptive_leaves(image, 10, min_size=8, patch_size=4)
    assert len(set(leaves.area.tolist())) > 1
    truth = np.ones((64, 64), dtype=np.uint8)
    values = torch.zeros(len(leaves), 2, 4, 4)
    small = leaves.area == leaves.area.min()
    values[small, 1] = 1  # right on the small leaves only
    guess = paint_labels(values, leaves, mode="nearest").numpy()
    row = PixelMetrics(NAMES[:2]).update("a", guess, truth)
    covered = int(leaves.area[small].sum())
    assert row["dice"]["cell"] == pytest.approx(2 * covered / (covered + 64 * 64))
    in_tokens = 2 * int(small.sum()) / (int(small.sum()) + len(leaves))
    assert abs(in_tokens - row["dice"]["cell"]) > 0.2


def test_ignored_pixels_do_not_count() -> None:
    truth = np.full((8, 8), 255, dtype=np.uint8)
    truth[:4] = 1
    guess = np.ones((8, 8), dtype=np.uint8)
    row = PixelMetrics(NAMES).update("a", guess, truth)
    assert row["dice"]["cell"] == 1
    assert row["hd95"]["cell"] == 0


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match="bring it to full resolution"):
        PixelMetrics(NAMES).update("a", np.zeros((4, 4), np.uint8), np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize(
    ("shape", "spacing"), [((40, 40), None), ((40, 40), (0.5, 2.0)), ((20, 20, 20), (3.0, 1.0, 1.0))]
)
def test_hausdorff_of_a_shift(shape: tuple[int, ...], spacing: tuple[float, ...] | None) -> None:
    one = square(shape, 4, 8)
    two = np.roll(one, 3, axis=0)
    step = 3 * (spacing or (1.0,))[0]
    assert hausdorff95(one, one, spacing) == 0
    assert 0 < hausdorff95(one, two, spacing) <= step
    far = np.roll(one, 3, axis=0)[: shape[0]]
    assert hausdorff95(one, far, spacing) == hausdorff95(far, one, spacing)


def test_hausdorff_of_two_points_in_mm() -> None:
    one, two = np.zeros((2, 30, 30), dtype=bool)
    one[5, 5] = two[9, 8] = True
    assert hausdorff95(one, two, (2.0, 1.0)) == pytest.approx(math.hypot(8, 3))
    assert hausdorff95(one, two) == pytest.approx(5)


@given(st.integers(0, 2**16), st.booleans())
def test_hausdorff_is_the_brute_force(seed: int, volume: bool) -> None:
    draw = np.random.default_rng(seed)
    shape = (6, 5, 7) if volume else (11, 9)
    spacing = (2.0, 0.5, 1.0)[: len(shape)]
    one, two = draw.random((2, *shape)) < 0.2
    if not (one.any() and two.any()):
        return
    from scipy.ndimage import binary_erosion
    from scipy.spatial.distance import cdist

    points = [np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in (one, two)]
    far = cdist(points[0], points[1])
    expected = max(np.percentile(far.min(1), 95), np.percentile(far.min(0), 95))
    assert hausdorff95(one, two, spacing) == pytest.approx(expected)


def test_policy_for_missed_structures() -> None:
    """MONAI drops the distance of what was missed; here it costs the diagonal unless dropping is asked for."""
    nothing, something = np.zeros((30, 40), bool), square((30, 40), 2, 3)
    assert hausdorff95(nothing, something, (1.0, 2.0)) == pytest.approx(math.hypot(30, 80))
    assert math.isnan(hausdorff95(nothing, something, absent="drop"))
    assert math.isnan(hausdorff95(nothing, nothing))
    metrics = PixelMetrics(NAMES)
    metrics.update("missed", nothing.astype(np.uint8), something.astype(np.uint8))
    metrics.update("invented", something.astype(np.uint8), nothing.astype(np.uint8))
    metrics.update("neither", nothing.astype(np.uint8), nothing.astype(np.uint8))
    found = metrics.summarise()
    assert found["hd95"]["cell"]["mean"] == pytest.approx(50)
    assert found["dice"]["cell"] == {"mean": 0, "low": 0, "high": 0, "num": 2}
    assert (found["missed"]["cell"], found["invented"]["cell"], found["num_images"]) == (1, 1, 3)
    assert found["hd95_unit"] == "px"
    with pytest.raises(ConfigError, match="neither 'diagonal' nor 'drop'"):
        PixelMetrics(NAMES, absent="zero")


def test_summary_means_over_images_and_pooled_over_pixels() -> None:
    metrics = PixelMetrics(NAMES[:2], (1.0, 1.0), distances=False)
    truth = np.ones((10, 10), dtype=np.uint8)
    for k, rows in enumerate((10, 5)):
        guess = np.zeros_like(truth)
        guess[:rows] = 1
        metrics.update(str(k), guess, truth)
    found = metrics.summarise()
    assert found["dice"]["mean"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert 0 <= found["dice"]["cell"]["low"] < found["dice"]["cell"]["mean"] < found["dice"]["cell"]["high"] <= 1
    assert found["pooled_dice"]["cell"] == pytest.approx(2 * 150 / 350)
    assert found["hd95"]["cell"]["num"] == 0
    assert found["hd95_unit"] == "mm"


def test_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 3.0, math.nan])
    assert found["num"] == 3
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.302652729696142 / math.sqrt(3))
    assert math.isnan(interval([5.0])["low"])
    assert math.isnan(interval([])["mean"])
    dice = interval([0.99, 0.6, 0.98], most=1.0)  # a t interval knows no bounds: here it would end at 1.4
    assert dice["high"] == 1
    assert 0.3 < dice["low"] < dice["mean"]
    assert interval([0.0, 0.5])["low"] == 0
    assert mean_known({"a": 1.0, "b": math.nan}) == 1
    assert math.isnan(mean_known([math.nan]))


def test_an_empty_set_summarises() -> None:
    assert PixelMetrics(NAMES).summarise()["num_images"] == 0


@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 6)])
def test_tiles_cover_once(shape: tuple[int, ...]) -> None:
    count = np.zeros(shape, dtype=int)
    for start, stop in tiles(shape, 3):
        count[tuple(slice(*side) for side in zip(start, stop, strict=True))] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize("shape", [(50, 70), (20, 24, 18)])
def test_tiles_of_any_size_paint_the_same(shape: tuple[int, ...], mode: str) -> None:
    leaves = uniform_leaves(shape, 8)
    values = torch.randn(len(leaves), 3, *(4,) * len(shape), generator=torch.Generator().manual_seed(0))
    whole = paint_labels(values, leaves, mode=mode)
    assert torch.equal(whole, paint_labels(values, leaves, mode=mode, tile=11))


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
def test_ceiling_is_one_where_nothing_is_lost(mode: str) -> None:
    labels = torch.from_numpy(square((32, 32), 8, 16).astype(np.uint8))
    assert ceiling(labels, uniform_leaves((32, 32), 8), 8, 3, mode)[0] == 1
    assert math.isnan(ceiling(labels, uniform_leaves((32, 32), 8), 8, 3, mode)[1])
    assert ceiling(labels, uniform_leaves((32, 32), 8), 1, 2, "nearest") == (1.0,)


def test_ceiling_falls_with_coarser_leaves_and_ignores_the_unknown() -> None:
    labels = torch.from_numpy(square((64, 64), 5, 7).astype(np.uint8))
    scores = [ceiling(labels, uniform_leaves((64, 64), size), 4, 2)[0] for size in (4, 16, 32)]
    assert scores[0] == 1
    assert scores[0] > scores[1] > scores[2]
    labels[40:, 40:] = 255
    assert ceiling(labels, uniform_leaves((64, 64), 4), 4, 2)[0] == 1


def test_counts_of_tiles_are_those_of_the_image() -> None:
    draw = np.random.default_rng(0)
    guess, real = draw.integers(0, 3, (2, 40, 50)).astype(np.uint8)
    real[:5] = 255
    whole, parts = PixelMetrics(("background", "a", "b")), PixelMetrics(("background", "a", "b"))
    row = whole.update("x", guess, real)
    counts = sum(count_labels(guess[rows], real[rows], 3) for rows in (slice(0, 13), slice(13, 40)))
    other = parts.update_counts("x", counts)
    assert other["dice"] == row["dice"]
    assert other["iou"] == row["iou"]
    assert np.isnan(other["hd95"]["a"])
    assert parts.summarise()["pooled_dice"] == whole.summarise()["pooled_dice"]
    constant = np.full_like(guess, 2)
    np.testing.assert_array_equal(count_labels(2, real, 3), count_labels(constant, real, 3))


def test_distances_in_px_and_in_mm_have_no_common_mean() -> None:
    one, two = np.zeros((2, 9, 9), np.uint8)
    one[2:5, 2:5] = two[3:6, 3:6] = 1
    metrics = PixelMetrics(("background", "a"))
    assert metrics.update("mm", one, two, (2.0, 2.0))["hd95"]["a"] == 2 * metrics.update("px", one, two)["hd95"]["a"]
    summary = metrics.summarise()
    assert summary["hd95_unit"] == "px or mm"
    assert np.isnan(summary["hd95"]["a"]["mean"])
    assert summary["dice"]["mean"]["num"] == 2
