"""Soft labels from a mask with levels: what the whole mask would give, or close to it for less reading."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import laws
from foveate.errors import BudgetError, FormatError, ShapeError
from foveate.geometry.lazy_labels import lazy_soft_labels
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.patches import patchify_mask
from foveate.io.raster import ArrayRaster
from sources import TiledRaster
from trees import Tree, trees


@given(tree=trees(), patch=st.integers(1, 5), tile=st.integers(1, 9), seed=st.integers(0, 99))
def test_one_level_gives_what_the_whole_mask_gives(tree: Tree, patch: int, tile: int, seed: int) -> None:
    leaves = tree()
    labels = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), leaves.shape)
    mask = TiledRaster(labels[None], tile=tile)
    expected = patchify_mask(labels, leaves, patch, 3)
    laws.same(lazy_soft_labels(mask, leaves, patch, 3), expected, "lazy soft labels")
    assert max(mask.reads.values()) == 1


@pytest.mark.parametrize("shape", [(64, 96), (32, 16, 48)])
def test_coarse_levels_give_the_same_where_labels_are_constant(shape: tuple[int, ...]) -> None:
    blocks = np.random.default_rng(0).integers(0, 3, [side // 4 for side in shape], dtype=np.uint8)
    fine = blocks
    for axis in range(len(shape)):
        fine = fine.repeat(4, axis)
    leaves = uniform_leaves(shape, 16)
    mask = TiledRaster(fine[None], coarser=[blocks[None]], tile=8)
    found = lazy_soft_labels(mask, leaves, 2, 3, oversample=2)
    laws.same(found, patchify_mask(fine, leaves, 2, 3), "labels of a coarse level")
    assert mask.levels_read() == {1}
    laws.same(lazy_soft_labels(mask, leaves, 2, 3, oversample=4), found, "labels of level 0")
    assert mask.levels_read() == {0, 1}


def test_a_mask_that_does_not_fit_is_refused() -> None:
    leaves = uniform_leaves((8, 8), 4)
    zeros = np.zeros((1, 8, 8), np.uint8)
    with pytest.raises(ShapeError, match=r"mask of 1 channels and shape \(8, 9\) for leaves of \(8, 8\)"):
        lazy_soft_labels(ArrayRaster(np.zeros((1, 8, 9), np.uint8)), leaves)
    with pytest.raises(FormatError, match="mask of type float32 must hold integer labels"):
        lazy_soft_labels(ArrayRaster(zeros.astype(np.float32)), leaves)
    with pytest.raises(FormatError, match=r"mask holds label 7, not in 0\.\.1 or 255; map it in the class table"):
        lazy_soft_labels(ArrayRaster(zeros + 7), leaves)
    with pytest.raises(FormatError, match="mask holds label -3"):
        lazy_soft_labels(ArrayRaster(zeros.astype(np.int16) - 3), leaves)
    with pytest.raises(BudgetError, match="num_classes=0 and oversample=4 must be at least 1"):
        lazy_soft_labels(ArrayRaster(zeros), leaves, 4, 0)


def test_unlabelled_pixels_weigh_nothing() -> None:
    leaves = uniform_leaves((8, 8), 4)
    soft, weight = lazy_soft_labels(ArrayRaster(np.full((1, 8, 8), 255, np.uint8)), leaves, 2, 2)
    assert not torch.cat([soft.flatten(), weight.flatten()]).any()
