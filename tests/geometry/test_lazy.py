"""Trees of images that are read level by level: what is read, what it costs in error, and where nothing is lost."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import laws
from foveate.errors import BudgetError, ConfigError, FormatError, ShapeError
from foveate.geometry import lazy_tree
from foveate.geometry.adaptive import adaptive_patches
from foveate.geometry.kernels_detail import haar_step, haar_step_eager
from foveate.geometry.lazy import Reading, lazy_patches
from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import patchify
from foveate.io.raster import ArrayRaster
from sources import TiledRaster, mean_levels

KINDS = [np.uint8, np.uint16, np.float32, np.float64]


def textured(shape: tuple[int, ...], seed: int = 0, channels: int = 1) -> NDArray[np.float32]:
    """Half of it flat, the rest with structure of every size, more of it in some places than in others."""
    rng = np.random.default_rng(seed)
    image = np.zeros((channels, *shape), np.float32)
    step = 1
    while step < max(shape):
        coarse = rng.normal(size=(channels, *(-(-side // step) for side in shape))).astype(np.float32)
        for axis, side in enumerate(shape, start=1):
            coarse = coarse.repeat(step, axis).take(range(side), axis)
        image += coarse * step
        step *= 2
    image *= np.linspace(0.2, 3, shape[-1], dtype=np.float32)
    image[..., : shape[-1] // 2] = 5
    return image


def error(image: NDArray[Any], leaves: Leaves, patch_size: int) -> float:
    painted = unpatchify(patchify(image, leaves, patch_size).pixels, leaves)
    return float(((painted - torch.from_numpy(image)).double() ** 2).sum())


@settings(max_examples=25)
@given(
    shape=st.sampled_from([(37, 52), (64, 64), (5, 4), (1, 70), (20, 13, 9), (16, 16, 16)]),
    kind=st.sampled_from(KINDS),
    max_leaves=st.integers(1, 60),
    patch_size=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 99),
    least=st.sampled_from([None, 2, 4, 12]),
)
def test_one_level_gives_the_tree_and_patches_of_the_whole_image(
    shape: tuple[int, ...], kind: Any, max_leaves: int, patch_size: int, seed: int, least: int | None
) -> None:
    image = (textured(shape, seed, 2) * 3 + 90).clip(0, 255).astype(kind)
    source = TiledRaster(image, tile=16)
    found, reading = lazy_patches(source, max_leaves, patch_size=patch_size, min_size=least)
    expected = adaptive_patches(image, max_leaves, patch_size=patch_size, min_size=least)
    assert torch.equal(found.boxes, expected.boxes)
    laws.same(found.pixels, expected.pixels, "patches of one level")
    assert reading.share == reading.share_level_0 == 1


@pytest.mark.parametrize("detail", ["tv", "variance", {"residual": 1.0, "tv": 2.0}, np.arange(40 * 56).reshape(40, 56)])
def test_other_details_are_those_of_the_whole_image(detail: Any) -> None:
    image = textured((40, 56))
    found, _ = lazy_patches(ArrayRaster(image), 50, patch_size=4, detail=detail)
    expected = adaptive_patches(image, 50, patch_size=4, detail=detail)
    assert torch.equal(found.boxes, expected.boxes)
    laws.same(found.pixels, expected.pixels, "patches of another detail")


@pytest.mark.parametrize(("shape", "steps"), [((96, 83), (2, 4, 8)), ((128, 128), (4, 16)), ((40, 33, 27), (2, 4))])
def test_with_room_for_every_split_levels_of_means_give_the_whole_tree(
    shape: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    image = textured(shape, 3, 2)
    source = TiledRaster(image, coarser=mean_levels(image, steps), tile=8)
    most = 10**6
    found, _ = lazy_patches(source, most, patch_size=4)
    whole = adaptive_patches(image, most, patch_size=4)
    inner = (whole.boxes.diff(dim=1)[:, 0] == whole.leaves[0].size).all(1)  # border pixels of a level weigh as others
    assert {tuple(box.flatten().tolist()) for box in whole.boxes[inner]} <= {
        tuple(box.flatten().tolist()) for box in found.boxes
    }
    assert found.leaves[0].covers()
    laws.same(found.pixels, patchify(image, found.leaves[0], 4).pixels, "patches from levels", tolerance=2e-2)
    assert max(source.reads.values()) == 1, "a tile was decoded twice"


@pytest.mark.parametrize("max_leaves", [30, 100, 400])
@pytest.mark.parametrize("steps", [(2, 4, 8, 16), (4, 16)])
def test_the_error_is_that_of_the_whole_tree(max_leaves: int, steps: tuple[int, ...]) -> None:
    image = textured((512, 512), 1)
    source = TiledRaster(image, coarser=mean_levels(image, steps), tile=32)
    found, reading = lazy_patches(source, max_leaves, patch_size=8)
    whole = adaptive_patches(image, max_leaves, patch_size=8)
    assert error(image, found.leaves[0], 8) <= 1.01 * error(image, whole.leaves[0], 8)
    assert len(found.leaves[0]) <= max_leaves
    assert found.leaves[0].covers()
    assert max(source.reads.values()) == 1
    assert reading.pixels == tuple(
        sum(int(np.prod(np.subtract(*box[::-1]))) // step**2 for (at, box), _ in source.reads.items() if at == level)
        for level, step in enumerate((1, *steps))
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((300, 256), {"patch_size": 5}),  # samples that cannot be halved
        ((256, 256), {"patch_size": 1}),
        ((256, 256), {"patch_size": 8, "max_size": 128}),  # roots that the coarsest level of use does not price
        ((256, 256), {"patch_size": 8, "min_size": 32}),
        ((40, 128, 128), {"patch_size": 8, "spacing": (3.0, 1.0, 1.0)}),
    ],
)
def test_the_error_is_that_of_the_whole_tree_for_any_sizes(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    image = textured(shape, 1)
    source = TiledRaster(image, coarser=mean_levels(image, (2, 4, 8)), tile=16)
    found, _ = lazy_patches(source, 250, **options)
    whole = adaptive_patches(image, 250, **options)
    side = options["patch_size"]
    assert error(image, found.leaves[0], side) <= 1.01 * error(image, whole.leaves[0], side)
    assert found.leaves[0].covers()
    assert max(source.reads.values()) == 1


def test_flat_parts_and_few_leaves_need_few_pixels() -> None:
    image = textured((1024, 1024), 2)
    source = TiledRaster(image, coarser=mean_levels(image, (4, 16)), tile=16)
    _, few = lazy_patches(source, 64, patch_size=8)
    _, more = lazy_patches(source, 600, patch_size=8)
    assert few.share < more.share < 0.5
    assert few.share_level_0 == 0.0
    assert few.tiles[2] == 16  # the coarsest level, whole
    assert isinstance(few, Reading)
    assert few.levels == source.levels


def test_a_level_that_does_not_divide_is_left_alone() -> None:
    image = textured((90, 90), 2)
    source = TiledRaster(image, coarser=[image[:, :53, :53], image[:, ::3, ::3], image[:, :10, :10]], tile=16)
    found, reading = lazy_patches(source, 40, patch_size=4)
    assert torch.equal(found.boxes, adaptive_patches(image, 40, patch_size=4).boxes)
    assert reading.tiles[1:] == (0, 0, 0)


def test_a_level_of_other_steps_along_each_axis_serves() -> None:
    image = textured((16, 64, 64), 2)
    coarse = image.reshape(1, 16, 32, 2, 32, 2).mean((3, 5), dtype=np.float32)
    source = TiledRaster(image, coarser=[coarse], tile=16)
    found, reading = lazy_patches(source, 60, patch_size=4, spacing=(2.0, 1.0, 1.0))
    assert reading.tiles[1] > 0
    laws.same(found.pixels, patchify(image, found.leaves[0], 4).pixels, "patches of a volume", tolerance=2e-2)


def test_a_prior_sends_leaves_where_it_is_and_throws_nothing_away() -> None:
    image = np.random.default_rng(0).normal(size=(1, 256, 256)).astype(np.float32)
    source = ArrayRaster(image, coarser=mean_levels(image, (4,)))
    prior = np.array([[0.0, 1.0]])
    for weight, least in ((0.0, 0.4), (1.0, 0.7)):
        found, _ = lazy_patches(source, 100, patch_size=8, prior=prior, prior_weight=weight)
        leaves = found.leaves[0]
        share = float((leaves.start[:, 1] >= 128).float().mean())
        assert share >= least
        assert leaves.covers()
        if weight == 0:
            assert torch.equal(found.boxes, lazy_patches(source, 100, patch_size=8)[0].boxes)
            assert share <= 0.6


def test_a_map_is_of_any_resolution_and_reads_leaves_only() -> None:
    image = textured((256, 256))
    source = TiledRaster(image, coarser=mean_levels(image, (4,)), tile=16)
    values = torch.zeros(8, 8)
    values[2, 3] = 1.0
    found, reading = lazy_patches(source, 60, patch_size=8, detail=values)
    small = found.boxes[found.leaves[0].scale == 0]
    assert ((small[:, 0] >= torch.tensor([64, 96])) & (small[:, 1] <= torch.tensor([96, 128]))).all()
    assert reading.share_level_0 < 0.1
    laws.same(found.pixels, patchify(image, found.leaves[0], 8).pixels, "patches of a map", tolerance=1e-2)


def test_what_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((1, 32, 32), np.float32)
    source = ArrayRaster(image)
    with pytest.raises(BudgetError, match="max_leaves=3 is below the 4 cells of the largest size"):
        lazy_patches(source, 3, max_size=16)
    with pytest.raises(ConfigError, match="prior_weight=-1 must be finite and >= 0"):
        lazy_patches(source, 4, prior=np.ones((2, 2)), prior_weight=-1)
    with pytest.raises(ShapeError, match=r"prior has shape \(2,\); give 2 axes over the image"):
        lazy_patches(source, 4, prior=np.ones(2), prior_weight=1)
    with pytest.raises(FormatError, match="detail map reaches -1; values must be >= 0"):
        lazy_patches(source, 4, detail=-np.ones((2, 2)))
    with pytest.raises(FormatError, match="image has 1024 NaN or Inf values"):
        lazy_patches(ArrayRaster(image + np.nan), 4)
    monkeypatch.setattr(lazy_tree, "MOST_HELD", 1000)
    with pytest.raises(BudgetError, match=r"level 0 of shape \(32, 32\) is the coarsest of use, above the 1000 pixels"):
        lazy_patches(source, 4)
    monkeypatch.setattr(lazy_tree, "MOST_MEASURED", 1000)
    with pytest.raises(BudgetError, match="level 0 has 1024 pixels, above the 1000 that a detail other"):
        lazy_patches(source, 4, detail="tv")


@pytest.mark.parametrize("ratio", [(1, 3, 3), (3, 3, 3), (1, 1, 3)])
def test_samples_merge_by_any_number(ratio: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).random((2, 6, 12, 12))
    results = []
    for step in (haar_step, haar_step_eager):
        sums = np.empty((2, *(side // r for side, r in zip((6, 12, 12), ratio, strict=True))))
        energy = np.zeros((1, 1, 1))
        step(image, sums, energy, (1, 1, 1), (6, 12, 12), ratio, (0, 0, 0), sums.shape[1:])
        results.append((sums, energy))
    np.testing.assert_allclose(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1])
