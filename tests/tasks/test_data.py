"""Samples: drawn from (seed, epoch, item) alone, cut after variation, labels and image by the same tree."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from foveate.errors import ConfigError, FormatError
from foveate.tasks.config import DataConfig, FitConfig, SplitConfig, TrainConfig, TreeConfig
from foveate.tasks.cut import blurred, cut, share_of
from foveate.tasks.data import (
    ByteCache,
    Decoded,
    Sample,
    SegmentationData,
    collate,
    normalise,
    read_item,
    value_range,
    with_channels,
)
from foveate.tasks.items import find_items, split_items
from foveate.tasks.resize import limited_shape, restore_size, shrink_image, shrink_labels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six noisy grey images with a bright disc each, of different sizes, with masks of 0 and 255."""
    draw = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for k in range(6):
        shape = (64 + 8 * k, 96)
        mask = np.zeros(shape, dtype=np.uint8)
        cv2.circle(mask, (30 + 5 * k, 30), 6 + k, 255, -1)
        image = np.clip(draw.normal(60, 10, shape) + mask * 0.5, 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"images/{k}.png"), image)
        cv2.imwrite(str(tmp_path / f"masks/{k}.png"), mask)
    return tmp_path


def settings(root: Path, **data: object) -> FitConfig:
    return FitConfig(
        data=replace(DataConfig(root=str(root), classes={"disc": ">=128"}), **data),
        tree=TreeConfig(max_leaves=40),
        train=TrainConfig(augment=0.5, seed=3),
    )


def same(one: Sample, two: Sample) -> bool:
    return (
        one.patches.pixels.shape == two.patches.pixels.shape
        and torch.equal(one.patches.pixels, two.patches.pixels)
        and torch.equal(one.soft, two.soft)
        and torch.equal(one.weight, two.weight)
    )


def test_sample_and_batch(root: Path) -> None:
    config = settings(root)
    data = SegmentationData(find_items(config.data), config, 8, train=False)
    samples = [data[i] for i in range(len(data))]
    for i, sample in enumerate(samples):
        assert sample.patches.pixels.shape[1:] == (3, 8, 8)
        torch.testing.assert_close(sample.soft.sum(1), torch.ones_like(sample.weight))
        assert float(sample.weight.sum()) == (64 + 8 * i) * 96
    batch = collate(samples[:3])
    assert len(batch) == 3
    assert batch.names == ("images/0", "images/1", "images/2")
    assert batch.patches.lengths == tuple(len(sample.weight) for sample in samples[:3])
    assert batch.soft.shape[0] == batch.weight.shape[0] == sum(batch.patches.lengths)
    assert batch.to("cpu").soft.equal(batch.soft)


def test_an_item_depends_on_seed_epoch_and_index_alone(root: Path) -> None:
    config = settings(root, window=48)
    items = find_items(config.data)
    one, two = (SegmentationData(items, config, 8, train=True) for _ in range(2))
    first = [one[i] for i in range(6)]
    again = [two[i] for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    two.set_epoch(1)
    assert not all(same(a, two[i]) for i, a in enumerate(first))
    other = replace(config, train=replace(config.train, seed=4))
    assert not all(same(a, SegmentationData(items, other, 8, train=True)[i]) for i, a in enumerate(first))


def test_a_window_has_its_share_of_the_leaves(root: Path) -> None:
    """A window is cut as finely as the whole image is at validation."""
    assert share_of(TreeConfig(max_leaves=100), 0.25).max_leaves == 25
    assert share_of(TreeConfig(max_leaves=100), 0.001).max_leaves == 1
    assert share_of(TreeConfig(max_leaves=None, tolerance=1.0), 0.25).max_leaves is None
    config = settings(root)
    items = find_items(config.data)
    whole = SegmentationData(items, config, 8, train=False)[0]
    side = max(whole.patches.leaves[0].shape) // 2
    windowed = replace(config, data=replace(config.data, window=side))
    part = SegmentationData(items, windowed, 8, train=True)[0]
    share = float(part.weight.sum() / whole.weight.sum())
    assert len(part.weight) <= max(1, round(share * (config.tree.max_leaves or 0)))


def test_workers_change_nothing(root: Path) -> None:
    config = settings(root)
    data = SegmentationData(find_items(config.data), config, 8, train=True)
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, collate_fn=collate)
    batches = list(loader)
    assert all(torch.equal(batch.soft, collate([data[2 * k], data[2 * k + 1]]).soft) for k, batch in enumerate(batches))


def test_split_before_augmentation(root: Path) -> None:
    """Variants of one image are made after the split, from the training side only, and validation is never varied."""
    config = settings(root, split=SplitConfig(train=0.5, val=0.25, test=0.25))
    splits = split_items(find_items(config.data), config.data)
    train = SegmentationData(splits["train"], config, 8, train=True)
    val = SegmentationData(splits["val"], config, 8, train=False)
    assert not {item.image for item in train.items} & {item.image for item in (*val.items, *splits["test"])}
    before = val[0]
    for epoch in range(3):
        train.set_epoch(epoch)
        val.set_epoch(epoch)
        assert {train[i].name for i in range(len(train))} == {item.name for item in splits["train"]}
        assert same(val[0], before)


def test_full_resolution_beside_the_working_size(root: Path) -> None:
    config = settings(root, max_side=32)
    data = SegmentationData(find_items(config.data), config, 8, train=False)
    image, labels = data.load(0)
    assert labels is not None
    assert image.shape == (3, 64, 96)
    assert labels.shape == (64, 96)
    assert set(labels.unique().tolist()) == {0, 1}
    small, small_labels = data.load(0, shrunk=True)
    assert small_labels is not None
    assert small.shape == (3, 21, 32)
    assert small_labels.shape == (21, 32)
    assert abs(float(small.mean()) - float(image.mean())) < 0.02
    assert data[0].patches.leaves[0].shape == (21, 32)


def test_uniform_instead_of_adaptive(root: Path) -> None:
    config = replace(settings(root), tree=TreeConfig(uniform=16))
    data = SegmentationData(find_items(config.data), config, 8, train=False)
    assert data[0].patches.lengths == (4 * 6,)


def test_adaptive_leaves_are_small_on_the_disc(root: Path) -> None:
    config = settings(root)
    sample = SegmentationData(find_items(config.data), config, 8, train=False)[0]
    leaves = sample.patches.leaves[0]
    on_disc = sample.soft[:, 1].flatten(1).mean(1) > 0.1
    assert leaves.area[on_disc].float().mean() < leaves.area[~on_disc].float().mean()


def test_smoothing_changes_the_tree_not_the_patches(root: Path) -> None:
    config = settings(root)
    image, _ = SegmentationData(find_items(config.data), config, 8, train=False).load(0)
    calm = cut(image, replace(config.tree, smooth=2.0), 8)
    assert len(calm) <= 40
    assert blurred(image, 2.0).shape == image.shape
    assert blurred(image[:, :8, None, :8].expand(3, 8, 8, 8), 1.0).shape == (3, 8, 8, 8)


def test_image_and_mask_must_have_one_size(root: Path) -> None:
    cv2.imwrite(str(root / "masks/0.png"), np.zeros((10, 96), dtype=np.uint8))
    config = settings(root)
    data = SegmentationData(find_items(config.data), config, 8, train=True)
    with pytest.raises(FormatError, match=r"size differs from its image's, 10 x 96 against 64 x 96"):
        data[0]


def test_no_items_and_no_mask(root: Path) -> None:
    config = settings(root, masks=None)
    with pytest.raises(ConfigError, match="0 training images"):
        SegmentationData((), config, 8, train=True)
    data = SegmentationData(find_items(config.data), config, 8, train=True)
    assert data.load(0)[1] is None
    with pytest.raises(FormatError, match="has no mask"):
        data[0]


def test_value_scales() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    data = DataConfig(channels=1)
    values = normalise(image, value_range(image, data), data)
    assert abs(float(values.median())) < 0.01
    assert 0.9 < float(values.max() - values.min()) < 1.1
    part = replace(data, normalise="range")
    assert float(normalise(image, value_range(image, part), part).max()) == 1
    fixed = replace(data, normalise="fixed", mean=(0.5,), std=(0.5,))
    assert float(normalise(image, value_range(image, fixed), fixed).max()) == 1
    assert float(normalise(image, value_range(image, fixed), fixed).min()) == -1
    deep = (image.astype(np.uint16) * 257).reshape(1, 16, 16)
    torch.testing.assert_close(normalise(deep, value_range(deep, data), data), values)


def test_scale_of_odd_images() -> None:
    data = DataConfig(channels=1)
    flat = np.full((1, 8, 8), 7, dtype=np.float32)
    assert not normalise(flat, value_range(flat, data), data).any()
    sparse = np.zeros((1, 100, 100), dtype=np.uint16)
    sparse[0, 0, 0] = 1000
    assert float(normalise(sparse, value_range(sparse, data), data).max()) == 1
    hot = np.random.default_rng(0).random((1, 100, 100)).astype(np.float32)
    hot[0, 5, 5] = 1e9
    assert float(normalise(hot, value_range(hot, data), data).max()) == 5


def test_channels() -> None:
    grey, colour = np.ones((1, 4, 5), np.uint8), np.stack([np.full((4, 5), k, np.uint8) for k in (0, 30, 60)])
    assert with_channels(grey, 3, "x").shape == (3, 4, 5)
    assert (with_channels(colour, 1, "x") == 30).all()
    with pytest.raises(FormatError, match=r"x has 3 channels but data\.channels=2"):
        with_channels(colour, 2, "x")


def test_read_item_without_mask(root: Path) -> None:
    data = DataConfig(root=str(root), masks=None)
    found = read_item(find_items(data)[0], data)
    assert isinstance(found, Decoded)
    assert found.image.shape == (3, 64, 96)
    assert found.labels is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int16])
@pytest.mark.parametrize("shape", [(40, 60), (12, 20, 16)])
def test_shrinking(shape: tuple[int, ...], dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, 200, (2, *shape)).astype(dtype)
    small = limited_shape(shape, max(shape) // 2)
    assert max(small) == max(shape) // 2
    new = shrink_image(image, small)
    assert new.shape == (2, *small)
    assert abs(float(new.mean()) - float(image.mean())) < 1
    labels = np.random.default_rng(1).choice([0, 7, 255], shape).astype(np.uint8)
    assert set(np.unique(shrink_labels(labels, small))) <= {0, 7, 255}
    back = restore_size(torch.from_numpy(new.astype(np.float32)), shape)
    assert back.shape == (2, *shape)
    assert limited_shape(shape, None) == shape
    assert limited_shape((1000, 1), 10) == (10, 1)


def test_cache_keeps_the_latest_within_its_bytes() -> None:
    cache = ByteCache(100)
    cache.put("a", 1, 40)
    cache.put("b", 2, 40)
    assert cache.get("a") == 1
    cache.put("c", 3, 40)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    cache.put("big", 4, 101)
    assert cache.get("big") is None
    cache.put("a", 5, 10)
    assert cache.used == 50
    nothing = ByteCache(0)
    nothing.put("a", 1, 1)
    assert nothing.get("a") is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 200)])
@pytest.mark.parametrize("value", [0, 7])
def test_tiny_constant_and_empty_images_are_samples(root: Path, shape: tuple[int, int], value: int) -> None:
    cv2.imwrite(str(root / "images/0.png"), np.full(shape, value, np.uint8))
    cv2.imwrite(str(root / "masks/0.png"), np.zeros(shape, np.uint8))
    config = settings(root, max_side=64, window=20)
    config = replace(config, train=replace(config.train, augment=True))
    for train in (True, False):
        sample = SegmentationData(find_items(config.data)[:1], config, 8, train=train)[0]
        assert sample.patches.pixels.isfinite().all()
        assert train or not sample.patches.pixels.any()
        assert float(sample.soft[:, 1].sum()) == 0
        assert float(sample.weight.sum()) >= 1


def test_volumes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for k in range(2):
        mask = np.zeros((12, 30, 26), dtype=np.uint8)
        mask[3:8, 8:20, 5:15] = k + 1
        np.save(tmp_path / f"images/{k}.npy", draw.normal(0, 1, mask.shape).astype(np.float32) + 5 * mask)
        np.save(tmp_path / f"masks/{k}.npy", mask)
    classes: dict[str, int | list[int | str] | str] = {"front": 1, "back": 2}
    part = DataConfig(root=str(tmp_path), classes=classes, channels=1, spacing=(2.0, 1.0, 1.0), max_side=24)
    for strength in (0.5, 1.0):
        config = FitConfig(data=part, tree=TreeConfig(max_leaves=200, min_size=4), train=TrainConfig(augment=strength))
        data = SegmentationData(find_items(part), config, 4, train=True)
        batch = collate([data[0], data[1]])
        assert batch.patches.pixels.shape[1:] == (1, 4, 4, 4)
        assert batch.soft.shape[1:] == (3, 4, 4, 4)
        assert batch.patches.lengths[0] <= 200
        assert batch.soft[:, 1].any()
        assert batch.soft[:, 2].any()
