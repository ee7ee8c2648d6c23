"""Volumes with many organs: seeded, exact, and not solved by looks alone."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from foveate.errors import BudgetError, ShapeError
from foveate.testing import marked_volume, organ_volume
from foveate.testing.organs import ORGANS, Volume

LABELS = {organ.name: label for label, organ in enumerate(ORGANS, 1)}


@pytest.mark.parametrize("draw", [organ_volume, marked_volume])
def test_seed_decides_everything(draw: Callable[[int, int], Volume]) -> None:
    first, again = draw(3, 40), draw(3, 40)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], draw(4, 40)[0])


def test_seed_means_the_same_on_every_machine() -> None:
    digests = []
    for image, labels in (organ_volume(5, 48), marked_volume(5, 48)):
        assert image.shape == (1, 48, 48, 48)
        assert image.dtype == labels.dtype == np.uint8
        digests.append(hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()[:16])
    assert digests == ["26fc17314ea29594", "25b3903029507544"]


def test_every_organ_is_there_and_sizes_differ() -> None:
    for seed in range(5):
        counts = np.bincount(organ_volume(seed, 64)[1].ravel(), minlength=len(ORGANS) + 1)
        assert len(ORGANS) >= 8
        assert counts[1:].min() > 30
        assert counts[1:].max() > 8 * counts[1:].min()
        assert 0.02 < counts[1:].sum() / counts.sum() < 0.12


@pytest.mark.parametrize("pair", [("liver", "spleen"), ("right kidney", "left kidney"), ("gall bladder", "bladder")])
def test_some_organs_differ_in_place_alone(pair: tuple[str, str]) -> None:
    greys: dict[str, list[float]] = {name: [] for name in pair}
    for seed in range(6):
        image, labels = organ_volume(seed, 48, noise=0.0, bias=0.0)
        for name in pair:
            greys[name].append(float(image[0][labels == LABELS[name]].mean()))
    first, second = (np.mean(values) for values in greys.values())
    assert abs(first - second) < 8


def test_light_is_uneven_and_noise_is_there() -> None:
    plain, noisy, shaded = (
        organ_volume(2, 48, noise=noise, bias=bias)[0].astype(float)
        for noise, bias in ((0.0, 0.0), (14.0, 0.0), (0.0, 0.3))
    )
    inside = plain > 60
    assert 3 < (noisy - plain)[inside].std() < 9
    ratio = (shaded[inside] + 1) / (plain[inside] + 1)
    assert ratio.max() > 1.1
    assert ratio.min() < 0.9


def test_only_the_mark_names_the_class_of_the_balls() -> None:
    greys: dict[int, list[float]] = {1: [], 2: []}
    for seed in range(24):
        image, labels = marked_volume(seed, 48, num_balls=3, noise=0.0, bias=0.0)
        (label,) = np.unique(labels)[1:].tolist()
        assert (image[0, :8, :8, :8].min() > 200) == (label == 1)
        assert not labels[:8, :8, :8].any()
        greys[label].append(float(image[0][labels == label].mean()))
        assert np.array_equal(labels > 0, (image[0] > 130) & (image[0] < 200))
    assert min(map(len, greys.values())) > 5
    assert abs(np.mean(greys[1]) - np.mean(greys[2])) < 2


def test_bad_requests_say_the_rule() -> None:
    with pytest.raises(ShapeError, match="side=16: organs need at least 32 voxels along each axis; use a larger side"):
        organ_volume(0, 16)
    with pytest.raises(BudgetError, match=r"noise=14\.0, bias=1\.5: noise must lie in \[0, 100\] and bias in \[0, 1\)"):
        marked_volume(0, bias=1.5)
    with pytest.raises(BudgetError, match="num_balls=9 must be 1 to 8, one in each octant; 4 are usual"):
        marked_volume(0, num_balls=9)
