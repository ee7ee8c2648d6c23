"""Windows of volumes: balanced in training, sliding with blended overlaps in prediction."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from test_volumes import write_ball
from tiny_run import tiny_config
from torch import Tensor, nn

from foveate.errors import ConfigError, FormatError
from foveate.geometry.patches import Patches
from foveate.io.raster import ArrayRaster
from foveate.tasks.augment import random_window
from foveate.tasks.config import FitConfig, load_config
from foveate.tasks.data import SegmentationData
from foveate.tasks.evaluate import evaluate
from foveate.tasks.infer import infer, segment
from foveate.tasks.items import find_items
from foveate.tasks.predict import predict
from foveate.tasks.resize import resized_image, working_shape
from foveate.tasks.run import read_metrics
from foveate.tasks.segmentation import fit
from foveate.tasks.settings import PredictConfig, TreeConfig
from foveate.tasks.source import check_large, slide_patches
from foveate.tasks.windows import blend_weight, window_boxes


def test_windows_cover_a_volume_and_overlap_as_asked() -> None:
    seen = np.zeros((40, 25, 7), int)
    boxes = list(window_boxes(seen.shape, 16, 0.5))
    for start, stop in boxes:
        seen[tuple(slice(low, high) for low, high in zip(start, stop, strict=True))] += 1
        assert tuple(high - low for low, high in zip(start, stop, strict=True)) == (16, 16, 7), "the short axis whole"
    assert seen.min() >= 1
    assert sorted({start[0] for start, _ in boxes}) == [0, 8, 16, 24]
    assert sorted({start[1] for start, _ in boxes}) == [0, 8, 9], "the last one is moved back inside"
    assert list(window_boxes((5, 6, 7), 96, 0.5)) == [((0, 0, 0), (5, 6, 7))]
    assert [start for start, _ in window_boxes((8, 8), 4, 0.0)] == [(0, 0), (0, 4), (4, 0), (4, 4)]


def test_the_middle_of_a_window_counts_most() -> None:
    weight = blend_weight((9, 5))
    assert float(weight[4, 2]) == 1
    assert float(weight.min()) == pytest.approx(1e-3)
    assert torch.equal(weight, weight.flip(0, 1))


class Pixelwise(nn.Module):
    """Says of a sample what its own pixels say, so that windows and the whole must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.config = SimpleNamespace(patch_size=4, num_dims=3)

    def forward(self, patches: Patches) -> Tensor:
        return torch.cat([-patches.pixels, self.factor * patches.pixels], dim=1)


def _uniform(window: int | None, overlap: float = 0.5, **tree: object) -> FitConfig:
    config = tiny_config(Path(), Path(), data={"classes": {"ball": 1}, "channels": 1}, tree={"uniform": 4} | tree)
    return replace(config, predict=PredictConfig(window, overlap))


@pytest.mark.parametrize("window", [8, 12, 64])
@pytest.mark.parametrize("shape", [(13, 21, 18), (3, 9, 30), (2, 2, 2)])
def test_windows_of_a_model_without_context_are_the_whole(window: int, shape: tuple[int, ...]) -> None:
    image = torch.randn(1, *shape)
    model = Pixelwise()
    whole, slid = (segment(model, image, _uniform(side)) for side in (None, window))
    assert torch.equal(whole.labels, slid.labels)
    values, leaves = infer(model, image, _uniform(window))
    assert leaves.shape == shape
    assert float(values.exp().sum(1)[..., 0, 0, 0].mean()) == pytest.approx(1, abs=1e-5), "probabilities"


def test_a_window_larger_than_the_volume_is_the_volume_with_its_whole_budget() -> None:
    image = torch.randn(1, 14, 14, 14).cumsum(1)
    config = _uniform(None, uniform=None, max_leaves=60)
    model = Pixelwise()
    one, two = (segment(model, image, replace(config, predict=PredictConfig(side))) for side in (None, 96))
    assert torch.equal(one.labels, two.labels)


def test_windows_in_training_hold_each_class_alike_as_often_as_asked() -> None:
    labels = np.zeros((20, 24, 28), np.uint8)
    labels[1, 1, 1] = 1  # a single voxel
    labels[12:, 12:, 12:] = 2
    labels[:, 22:] = 255
    draws = {}
    for balance in (0.0, 0.5, 1.0):
        boxes = [random_window(labels, 8, np.random.default_rng(seed), balance) for seed in range(300)]
        assert all(labels[box].shape == (8, 8, 8) for box in boxes)
        draws[balance] = [sum((labels[box] == label).any() for box in boxes) / 300 for label in (1, 2)]
    assert draws[0.0][0] < 0.03
    assert 0.18 < draws[0.5][0] < 0.33, "half of the half that is drawn for a class"
    assert 0.42 < draws[1.0][0] < 0.58
    assert labels[random_window(labels, 96, np.random.default_rng(0), 1.0)].shape == labels.shape


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balls")
    for k in range(4):
        write_ball(folder, f"v{k}", k)
    return folder


def _config(root: Path, out: Path, **changes: object) -> FitConfig:
    values = {"images": "images/*.nii.gz", "masks": "labels/{stem}.nii.gz", "classes": {"ball": 1}, "channels": 1}
    small = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "decoder_width": 4}
    parts = {
        "data": values | {"window": 12, "windows": 2, "balance": 1.0},
        "tree": {"max_leaves": 60},
        "model": {"name": "scd_vit_tiny_3d", "overrides": small | {"prune_after": [0], "keep_ratio": 0.5}},
        "train": {"epochs": 1},
        "predict": {"window": 12},
    }
    return tiny_config(root, out, **parts | changes)


def test_a_crop_that_is_larger_than_its_volume_is_the_volume(root: Path) -> None:
    config = _config(
        root, root, data={"window": 96, "classes": {"ball": 1}, "images": "images/*.nii.gz", "channels": 1}
    )
    config = replace(config, data=replace(config.data, masks="labels/{stem}.nii.gz", windows=1))
    data = SegmentationData(find_items(config.data), config, 4, train=True)
    sample = data[0]
    assert sample.patches.leaves[0].shape in [(16, 24, 20), (16, 20, 24)]
    assert float(sample.weight.sum()) == 16 * 24 * 20


def test_volumes_train_and_are_segmented_in_windows(root: Path, tmp_path: Path) -> None:
    fit(_config(root, tmp_path / "run"))
    (line,) = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "val")
    assert 0.5 < line["ceiling"] < 1, "each window's tree, not the pixels of the blend"
    evaluation = evaluate(tmp_path / "run", split="val")
    assert evaluation.ceiling == pytest.approx(line["ceiling"])
    assert load_config(tmp_path / "run" / "config.yaml").predict.window == 12
    file = root / "images" / "v0.nii.gz"
    (slid,) = predict(tmp_path / "run", file, tmp_path / "slid", overlay=False)
    whole, picture = predict(tmp_path / "run", file, tmp_path / "whole", window=0, overlay=True)
    assert picture.is_file()
    for path in (slid, whole):
        assert nibabel.load(path).shape == nibabel.load(file).shape
    pair = predict(tmp_path / "run", file, tmp_path / "both", overlay=True)
    assert len(pair) == 2, "windows have no picture of what left where, but one of the mask"


def test_windows_are_checked_at_the_door() -> None:
    with pytest.raises(ConfigError, match=r"predict\.window=0 is below 1: give a side in pixels or null"):
        PredictConfig(0)
    with pytest.raises(ConfigError, match=r"predict\.overlap=1\.0 is outside 0 up to below 1: give a share"):
        PredictConfig(96, 1.0)


def test_what_needs_the_whole_image_is_refused_of_one_read_by_box() -> None:
    slide = ArrayRaster(np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(
        ConfigError, match=r"predict\.window=16 slides over images that are held, and this one is read by"
    ):
        slide_patches(slide, _uniform(16), 4)
    changes = [{"resample": (1.0, 1.0, 1.0)}, {"normalise": "zscore"}]
    named = [
        r"data\.resample needs images .* unset it; data\.mpp",
        r"data\.normalise='zscore' needs .*; 'image' scales",
    ]
    for change, message in zip(changes, named, strict=True):
        with pytest.raises(ConfigError, match=message):
            check_large(TreeConfig(), replace(_uniform(None).data, **change))


def test_resampling_needs_the_size_of_a_voxel() -> None:
    data = replace(_uniform(None).data, resample=(2.0, 1.0, 1.0))
    assert working_shape((10, 20, 30), replace(data, spacing=(4.0, 1.0, 0.5))) == (20, 20, 15)
    assert resized_image(np.ones((2, 10, 20, 30), np.int16), (20, 20, 15)).shape == (2, 20, 20, 15)
    with pytest.raises(
        FormatError, match=r"an image of 10 x 20 x 30 has no size of a voxel along three axes, which data\."
    ):
        working_shape((10, 20, 30), data)
