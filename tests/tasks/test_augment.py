"""Variations: seeded, image and labels together, in 2-D and 3-D, and no label that was not there."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.tasks.augment import augment, random_window, trim


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image whose first channel is its own label, so that the two can be compared after any movement."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.zeros(shape, dtype=torch.uint8)
    labels[tuple(slice(side // 4, side // 2) for side in shape)] = 3
    labels[0] = 255
    image = torch.rand(2, *shape, generator=draw)
    image[0] = labels.float()
    return image, labels


@pytest.mark.parametrize("shape", [(24, 40), (8, 12, 10)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_drawn_from_the_generator_alone(shape: tuple[int, ...], strength: float) -> None:
    image, labels = pair(shape)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    one = augment(image, labels, strength, np.random.default_rng(5))
    np.random.seed(2)  # noqa: NPY002
    augment(image, labels, strength, np.random.default_rng(9))
    two = augment(image, labels, strength, np.random.default_rng(5))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    others = [augment(image, labels, strength, np.random.default_rng(k))[0] for k in range(6)]
    assert any(other.shape != one[0].shape or not torch.equal(other, one[0]) for other in others)


@pytest.mark.parametrize("shape", [(24, 40), (8, 12, 10)])
def test_light_part_moves_image_and_labels_alike_and_needs_no_monai(shape: tuple[int, ...]) -> None:
    loaded = "monai" in sys.modules
    for seed in range(20):
        image, labels = augment(*pair(shape), 0.5, np.random.default_rng(seed))
        assert torch.equal(image[0], labels.float())
        assert sorted(labels.shape) == sorted(shape)
    assert ("monai" in sys.modules) == loaded


def test_strength_zero_is_the_identity() -> None:
    image, labels = pair((8, 8))
    same = augment(image, labels, 0.0, np.random.default_rng(0))
    assert same[0] is image
    assert same[1] is labels


@pytest.mark.parametrize("shape", [(48, 64), (24, 28, 32)])
def test_full_part_invents_no_label_and_stays_aligned(shape: tuple[int, ...]) -> None:
    agreement = []
    for seed in range(12):
        image, labels = pair(shape)
        image = torch.cat([image, (labels == 3)[None].float() * 4])
        new_image, new_labels = augment(image, labels, 1.0, np.random.default_rng(seed))
        assert new_image.dtype == torch.float32
        assert new_labels.dtype == torch.uint8
        assert type(new_image) is Tensor
        assert new_image.shape[1:] == new_labels.shape
        assert set(new_labels.unique().tolist()) <= {0, 3, 255}
        assert new_image.isfinite().all()
        seen = new_image[-1] > (new_image[-1].max() + new_image[-1].median()) / 2
        real = new_labels == 3
        agreement.append(float(2 * (seen & real).sum() / (seen.sum() + real.sum()).clamp(min=1)))
    assert np.median(agreement) > 0.9


@pytest.mark.parametrize("shape", [(30, 50), (10, 12, 14)])
def test_windows(shape: tuple[int, ...]) -> None:
    image, _ = pair(shape)
    labels = torch.zeros(shape, dtype=torch.uint8)
    labels[(-1,) * len(shape)] = 1
    image[0] = labels.float()
    hits = 0
    for seed in range(60):
        box = random_window(labels.numpy(), 11, np.random.default_rng(seed))
        part, part_labels = image[(slice(None), *box)], labels[box]
        assert part_labels.shape == tuple(min(11, side) for side in shape)
        assert torch.equal(part[0], part_labels.float())
        hits += bool(part_labels.any())
    assert 20 <= hits <= 45


def test_window_larger_than_the_image_is_the_image() -> None:
    image, labels = pair((8, 12))
    box = random_window(labels.numpy(), 64, np.random.default_rng(0))
    part, part_labels = image[(slice(None), *box)], labels[box]
    assert torch.equal(part, image)
    assert torch.equal(part_labels, labels)


def test_pixels_that_are_not_square_are_turned_by_halves() -> None:
    image, labels = pair((24, 40))
    shapes = {augment(image, labels, 0.5, np.random.default_rng(k), quarters=False)[1].shape for k in range(12)}
    assert shapes == {(24, 40)}
    assert len({augment(image, labels, 0.5, np.random.default_rng(k))[1].shape for k in range(12)}) == 2


@pytest.mark.parametrize("shape", [(24, 40), (8, 12, 3)])
def test_trimming_keeps_the_middle(shape: tuple[int, ...]) -> None:
    image, labels = pair(shape)
    sizes = set()
    for seed in range(20):
        cut_image, cut_labels = trim(image, labels, 3, np.random.default_rng(seed))
        assert cut_image.shape[1:] == cut_labels.shape
        assert torch.equal(cut_image[0], cut_labels.float()), "image and labels are cut alike"
        assert all(side // 2 <= left <= side for left, side in zip(cut_labels.shape, shape, strict=True))
        assert int((cut_labels == 3).sum()) > 0
        sizes.add(tuple(cut_labels.shape))
    assert len(sizes) > 5
    assert trim(image, labels, 0, np.random.default_rng(0))[0] is image
