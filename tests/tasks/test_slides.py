"""Slides as samples: whole and in windows, drawn from (seed, epoch, item) alone, balanced by class and tissue."""

import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from tiny_run import tiny_config

from foveate.errors import ConfigError, FormatError
from foveate.io.raster import ArrayRaster
from foveate.tasks.config import DataConfig, FitConfig, SplitConfig, TrainConfig, TreeConfig
from foveate.tasks.data import Sample, SegmentationData
from foveate.tasks.items import Item, find_items
from foveate.tasks.metrics import PixelMetrics
from foveate.tasks.scoring import ceiling_row, score_item
from foveate.tasks.segmentation import build_task, fit
from foveate.tasks.slides import Slide, check_large_files, vary_values
from foveate.tasks.source import glance, is_large, open_item, open_native, slide_patches, spacing_of

SIDE = 512
MPP = 0.5


def write_pyramid(path: Path, image: np.ndarray, *, mpp: float | None = MPP) -> None:
    """A tiled TIFF ``[H, W(, 3)]`` with levels at 1, 2, 4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (64, 64), "photometric": photometric, "compression": "zlib"}
        file.write(image, subifds=2, **options, **size)
        for step in (2, 4):
            if image.ndim == 3:
                level = cv2.resize(image, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
            else:
                level = image[step // 2 :: step, step // 2 :: step]
            file.write(level, subfiletype=1, **options)


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """White glass with a stained piece of tissue, in which there is a large and a small lesion."""
    draw = np.random.default_rng(seed)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    centre = (200 + 10 * seed, 220)
    tissue = cv2.ellipse(mask.copy(), centre, (150, 120), 20, 0, 360, 1, -1)
    cv2.circle(mask, centre, 60, 1, -1)
    cv2.circle(mask, (centre[0] + 90, 220), 14, 2, -1)
    colours = np.array([[242, 243, 241], [215, 160, 205]])[tissue] - np.array([[0], [60], [110]])[mask]
    return np.clip(colours + draw.normal(0, 4, colours.shape), 0, 255).astype(np.uint8), mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k in range(4):
        image, mask = picture(k)
        write_pyramid(tmp_path / f"images/s{k}.tif", image)
        write_pyramid(tmp_path / f"masks/s{k}.tif", mask)
    return tmp_path


def settings(root: Path, **changes: object) -> FitConfig:
    data = DataConfig(root=str(root), classes={"large": 1, "small": 2}, split=SplitConfig(0.5, 0.25, 0.25))
    return FitConfig(
        data=replace(data, **changes), tree=TreeConfig(max_leaves=120, min_size=8), train=TrainConfig(augment=0.5)
    )


def train_data(config: FitConfig) -> SegmentationData:
    return SegmentationData(find_items(config.data), config, 8, train=True)


def open_first(config: FitConfig) -> Slide:
    item = find_items(config.data)[0]
    return Slide(item, open_native(item, config.data), config.data)


def same(one: Sample, two: Sample) -> bool:
    return torch.equal(one.patches.pixels, two.patches.pixels) and torch.equal(one.soft, two.soft)


def test_what_is_large() -> None:
    small, flat = np.zeros((1, 8, 8), np.uint8), np.zeros((1, 4, 4), np.uint8)
    assert not is_large(ArrayRaster(small))
    assert is_large(ArrayRaster(small, coarser=[flat]))


def test_a_glance_is_aligned_with_its_image() -> None:
    image = np.arange(64 * 48, dtype=np.float32).reshape(1, 64, 48)
    small = glance(ArrayRaster(image), 12 * 16)
    assert small.shape == (1, 16, 12)
    np.testing.assert_allclose(small, image.reshape(1, 16, 4, 12, 4).mean((2, 4)))
    assert glance(ArrayRaster(image, coarser=[image[:, ::2, ::2]]), 32 * 24).shape == (1, 32, 24)
    picked = glance(ArrayRaster((image % 7).astype(np.uint8)), 12 * 16, nearest=True)
    assert set(picked.ravel().tolist()) <= set(range(7))


def test_the_whole_slide_is_one_sample(root: Path) -> None:
    config = settings(root)
    data = SegmentationData(find_items(config.data), config, 8, train=False)
    sample = data[0]
    assert sample.patches.leaves[0].shape == (SIDE, SIDE)
    assert len(sample.weight) <= 120
    assert float(sample.weight.sum()) == SIDE * SIDE
    mask = picture(0)[1]
    shares = (sample.soft * sample.weight[:, None]).sum((0, 2, 3)) / sample.weight.sum()
    wanted = np.bincount(mask.ravel(), minlength=3) / mask.size
    np.testing.assert_allclose(shares.numpy(), wanted, atol=4e-3)
    values = sample.patches.pixels
    assert values.dtype == torch.float32
    assert float(values.abs().max()) <= 5
    assert same(sample, data[0])


def test_windows_have_their_labels_and_their_share_of_the_leaves(root: Path) -> None:
    config = settings(root, window=128, windows=5)
    data = train_data(config)
    assert len(data) == 20
    for i in (0, 4, 7):
        sample = data[i]
        assert sample.name == f"images/s{i // 5}"
        assert float(sample.weight.sum()) == 128 * 128
        assert len(sample.weight) <= 40
    slide = open_first(config)
    image, labels, part = slide.window(config, np.random.default_rng(3))
    box = slide.place(np.random.default_rng(3))
    area = tuple(slice(low, high) for low, high in zip(*box, strict=True))
    np.testing.assert_array_equal(labels.numpy(), picture(0)[1][area])
    assert image.shape == (3, 128, 128)
    assert part.tree.max_leaves is not None
    assert part.tree.max_leaves <= 120
    assert slide.share(((0, 0), (SIDE, SIDE))) == 1
    tissue = slide.share(((150, 130), (278, 258)))
    assert slide.share(((384, 384), (512, 512))) == pytest.approx(1 / 16)
    assert tissue > 2 / 16


def test_samples_depend_on_seed_epoch_and_index_alone(root: Path) -> None:
    config = settings(root, window=96, windows=3, whole=0.3)
    one, two = train_data(config), pickle.loads(pickle.dumps(train_data(config)))
    first = [one[i] for i in range(12)]
    assert all(same(a, two[i]) for i, a in reversed(list(enumerate(first))))
    sizes = [float(sample.weight.sum()) for sample in first]
    assert 0 < sizes.count(SIDE * SIDE) < 12
    assert set(sizes) == {SIDE * SIDE, 96 * 96}
    two.set_epoch(1)
    assert not all(same(a, two[i]) for i, a in enumerate(first))


def test_balance(root: Path) -> None:
    config = settings(root, window=32, balance=1.0)
    slide = open_first(config)
    draw = np.random.default_rng(0)
    seen = np.zeros(3)
    for _ in range(60):
        labels = slide.window(config, draw)[1]
        seen += [bool((labels == k).any()) for k in range(3)]
    assert seen[1] >= 20, "a large lesion and a small one are drawn alike"
    assert seen[2] >= 20
    slide = open_first(settings(root, window=32, balance=0.0))
    inside = [slide.tissue[tuple(int((low + 16) // 1) for low in slide.place(draw)[0])] for _ in range(40)]
    assert np.mean(inside) > 0.8


def test_a_slide_without_a_class_gives_tissue(root: Path) -> None:
    write_pyramid(root / "masks/s0.tif", np.zeros((SIDE, SIDE), np.uint8))
    slide = open_first(settings(root, window=64, balance=1.0))
    assert slide.counts()[1:].sum() == 0
    slide.place(np.random.default_rng(0))


def test_one_resolution_for_all(root: Path) -> None:
    image, mask = picture(9)
    half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    write_pyramid(root / "images/coarse.tif", half, mpp=2 * MPP)
    write_pyramid(root / "masks/coarse.tif", mask[1::2, 1::2])
    config = settings(root, mpp=2 * MPP)
    data = SegmentationData(find_items(config.data), config, 8, train=False)
    assert {data[i].patches.leaves[0].shape for i in range(5)} == {(SIDE // 2, SIDE // 2)}
    item = find_items(config.data)[1]
    fine = Slide(item, open_native(item, config.data), config.data)
    assert fine.labels is not None
    near = fine.labels.read(((0, 0), (256, 256)))[0]
    assert (near == picture(0)[1][1::2, 1::2]).mean() > 0.99


def test_a_slide_without_a_pixel_size_is_an_error_with_the_remedy(root: Path) -> None:
    image, mask = picture(9)
    write_pyramid(root / "images/none.tif", image, mpp=None)
    write_pyramid(root / "masks/none.tif", mask, mpp=None)
    config = settings(root, mpp=1.0)
    item = next(item for item in find_items(config.data) if item.name == "images/none")
    message = (
        r"none\.tif does not say the size of its pixels, but data\.mpp=1: give it in a column mpp of the manifest, "
        r"to predict with --mpp X \(mpp=X\), or set data\.mpp to null$"
    )
    with pytest.raises(FormatError, match=message):
        open_item(item, config.data)
    assert open_item(replace(item, mpp=0.5), config.data).shape == (256, 256)


@pytest.mark.parametrize(
    ("tree", "data", "name"),
    [
        ({"uniform": 16}, {}, "tree.uniform"),
        ({"tolerance": 1.0}, {}, "tree.tolerance"),
        ({"smooth": 1.0}, {}, "tree.smooth"),
        ({}, {"max_side": 100}, "data.max_side"),
    ],
)
def test_what_needs_the_whole_image_is_refused(
    root: Path, tree: dict[str, object], data: dict[str, object], name: str
) -> None:
    config = settings(root, **data)
    config = replace(config, tree=replace(config.tree, **tree))
    slide = open_first(config)
    with pytest.raises(ConfigError, match=rf"{name} needs images that are read whole, and this one is read by box"):
        slide_patches(slide.raster, config, 8)


def test_tissue_takes_leaves_from_the_glass(root: Path) -> None:
    config = settings(root)
    slide = open_first(config)

    def on_glass(weight: float) -> int:
        tree = replace(config.tree, tissue=weight)
        leaves = slide_patches(slide.raster, replace(config, tree=tree), 8).leaves[0]
        return int((leaves.start[:, 0] >= 400).sum())

    assert on_glass(50.0) <= on_glass(0.0)


def test_whole_slides_are_varied_in_value_only(root: Path) -> None:
    config = settings(root)
    sample = train_data(config)[0]
    assert vary_values(sample.patches, 0.5, np.random.default_rng(0)) is sample.patches
    varied = vary_values(sample.patches, 1.0, np.random.default_rng(0))
    assert varied.leaves == sample.patches.leaves
    assert not torch.equal(varied.pixels, sample.patches.pixels)
    spread = varied.pixels.std() / sample.patches.pixels.std()
    assert 0.69 < float(spread) < 1.31


def test_a_damaged_slide_is_found_before_training(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.tasks.slides.LARGE_FILE", 1000)
    config = settings(root)
    check_large_files(find_items(config.data), config.data)
    (root / "images/s2.tif").write_bytes((root / "images/s2.tif").read_bytes()[:4000])
    with pytest.raises(FormatError, match=r"s2\.tif"):
        check_large_files(find_items(config.data), config.data)


def test_a_broken_tile_is_neither_learned_nor_scored(root: Path) -> None:
    path = root / "images/s0.tif"
    with tifffile.TiffFile(path) as file:
        places = [level.pages[0].dataoffsets[at] for level, at in zip(file.series[0].levels, (27, 5, 0), strict=True)]
    content = bytearray(path.read_bytes())
    for place in places:  # pixels 192 to 256 x 192 to 256 of level 0, and what covers them elsewhere
        content[place : place + 16] = b"\xff" * 16
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"s0\.tif"):
        SegmentationData(find_items(settings(root).data), settings(root), 8, train=False)[0]
    config = settings(root, broken="skip", window=256, windows=2)
    slide = open_first(config)
    whole, _, weight = slide.whole(config, 8)
    assert float(weight.sum()) < SIDE * SIDE
    labels = slide.labels.read(((192, 192), (256, 256)))
    assert (labels == 255).all()
    assert len(whole.pixels)
    filled = settings(root, broken="fill")
    sample = SegmentationData(find_items(filled.data), filled, 8, train=False)[0]
    assert float(sample.weight.sum()) == SIDE * SIDE


def test_scores_of_a_slide_are_those_of_the_whole_image(root: Path) -> None:
    config = settings(root)
    data = SegmentationData(find_items(config.data), config, 8, train=False)

    class Echo(torch.nn.Module):
        """Says what the mask says."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, patches: object) -> torch.Tensor:
            return data[0].soft * self.scale

    metrics = PixelMetrics(config.data.class_names)
    scored = score_item(Echo(), data, 0, metrics)
    assert scored.shown is None
    assert scored.ceiling is not None
    mask = torch.from_numpy(picture(0)[1])
    leaves = data[0].patches.leaves[0]
    wanted = ceiling_row("", mask, leaves, config, 8)["dice"]
    assert scored.row["dice"] == pytest.approx(scored.ceiling["dice"])
    assert scored.row["dice"] == pytest.approx(wanted, abs=0.01)
    assert np.isnan(scored.row["hd95"]["large"])
    assert metrics.summarise()["num_images"] == 1


def test_slides_train_and_score(root: Path, tmp_path: Path) -> None:
    config = tiny_config(
        root,
        tmp_path / "run",
        data={"classes": {"large": 1, "small": 2}, "window": 128, "windows": 2, "whole": 0.5},
        tree={"max_leaves": 64},
        train={"epochs": 1},
    )
    assert len(build_task(config).train) == 2 * 2
    result = fit(config)
    assert 0 < result.loop.last_scores["ceiling"] <= 1
    assert result.loop.last_scores["tokens"] <= 64


def test_spacing_of_a_picture_is_not_believed(root: Path) -> None:
    item = Item("a", root / "images/s0.tif", None, "a")
    raster = open_native(item, DataConfig())
    assert raster.spacing == pytest.approx((MPP / 1000, MPP / 1000))
    assert spacing_of(item, DataConfig(), raster) is None
    assert spacing_of(item, DataConfig(spacing=(0.1, 0.1)), raster) == (0.1, 0.1)
    assert spacing_of(replace(item, spacing=(0.2, 0.2)), DataConfig(spacing=(0.1, 0.1)), raster) == (0.2, 0.2)
