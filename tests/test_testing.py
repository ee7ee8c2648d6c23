"""Synthetic images: seeded, exact, sparse, and not solved by a threshold."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from foveate.errors import BudgetError, ShapeError
from foveate.testing import synthetic_image, write_dataset


def test_same_seed_same_image() -> None:
    first, second = synthetic_image(128, 5), synthetic_image(128, 5)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], synthetic_image(128, 6)[0])


def test_seed_means_the_same_on_every_machine() -> None:
    image, labels = synthetic_image(128, 5)
    digest = hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()
    assert digest[:16] == "9eefeab2a3c2b983"


@pytest.mark.parametrize(("size", "num_dims"), [(512, 2), ((200, 333), 2), (64, 3), ((32, 48, 40), 3)])
def test_shape_and_coverage(size: int | tuple[int, ...], num_dims: int) -> None:
    image, labels = synthetic_image(size, 1, num_dims=num_dims, coverage=0.05)
    shape = (size,) * num_dims if isinstance(size, int) else size
    assert image.shape == (3, *shape)
    assert image.dtype == labels.dtype == np.uint8
    assert labels.shape == shape
    assert 0.05 <= labels.mean() <= 0.12


def test_three_classes_tell_vessels_from_cells() -> None:
    image, labels = synthetic_image(512, 2, num_classes=3)
    assert set(np.unique(labels)) == {0, 1, 2}
    vessel, cell = (image[:, labels == value].mean(axis=1) for value in (2, 1))
    assert vessel[2] < cell[2]


def test_threshold_alone_does_not_solve_it() -> None:
    for seed in range(3):
        image, labels = synthetic_image(512, seed)
        best = 0.0
        for plane in image:
            for threshold in range(60, 240, 6):
                found = plane >= threshold
                best = max(best, 2 * np.sum(found & (labels == 1)) / (found.sum() + labels.sum()))
        assert best < 0.8


def test_structures_differ_in_size() -> None:
    from scipy.ndimage import label

    _, labels = synthetic_image(1024, 0)
    areas = np.bincount(label(labels)[0].ravel())[1:]
    assert len(areas) > 15
    assert areas.max() > 30 * np.median(areas) or areas.max() > 50 * areas.min()


def test_bad_requests_say_the_rule() -> None:
    with pytest.raises(ShapeError, match="at least 16"):
        synthetic_image(8, 0)
    with pytest.raises(BudgetError, match=r"coverage=0\.9 must lie in \(0, 0\.5\]"):
        synthetic_image(64, 0, coverage=0.9)
    with pytest.raises(BudgetError, match="num_classes=5"):
        synthetic_image(64, 0, num_classes=5)


def test_write_dataset_pairs_images_and_masks(tmp_path: Path) -> None:
    from PIL import Image

    root = write_dataset(tmp_path / "set", 2, 64, seed=3)
    assert sorted(path.name for path in (root / "masks").iterdir()) == ["000.png", "001.png"]
    image, labels = synthetic_image(64, 4)
    with Image.open(root / "images" / "001.png") as shown, Image.open(root / "masks" / "001.png") as mask:
        assert np.array_equal(np.asarray(shown).transpose(2, 0, 1), image)
        assert np.array_equal(np.asarray(mask), labels)
