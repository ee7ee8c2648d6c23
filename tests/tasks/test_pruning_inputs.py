"""What a model that prunes makes of odd volumes, and what it says of impossible ones."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from tiny_run import tiny_config

import foveate as fv
from foveate.cli import main
from foveate.errors import BudgetError, ConfigError, FormatError, ShapeError
from foveate.nn.pruner import Pruning
from foveate.tasks.config import FitConfig, save_config
from foveate.tasks.predict import predict
from foveate.tasks.segmentation import build_task, fit

OVERRIDES: dict[str, Any] = {
    "width": 24, "depth": 2, "num_heads": 2, "decoder_width": 4, "patch_size": 4, "prune_after": [0], "keep_ratio": 0.5
}  # fmt: skip
STRAIGHT = np.diag([1.0, 1.0, 1.0, 1.0])


def write(root: Path, name: str, shape: tuple[int, ...], affine: Any = STRAIGHT, *, value: int = 1) -> Path:
    draw = np.random.default_rng(len(name))
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(side // 4, side // 2 + 1) for side in shape)] = value
    for folder, array in (("images", draw.normal(20, 2, shape).astype(np.float32) + 60 * labels), ("labels", labels)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), root / folder / f"{name}.nii.gz")
    return root / "images" / f"{name}.nii.gz"


def config_of(root: Path, **changes: Any) -> FitConfig:
    data = {"images": "images/*.nii.gz", "masks": "labels/{stem}.nii.gz", "classes": {"ball": 1}, "channels": 1}
    values: dict[str, Any] = {
        "data": data | changes.pop("data", {}),
        "model": {"name": "scd_vit_tiny_3d", "overrides": OVERRIDES | changes.pop("overrides", {})},
        "tree": {"max_leaves": 60, "min_size": 4},
        "train": {"epochs": 1, "augment": False},
    }
    return tiny_config(root, root / "run", **(values | changes))


def four(root: Path, shape: tuple[int, ...], affine: Any = STRAIGHT, **kinds: Any) -> Path:
    for index in range(4):
        write(root, f"v{index}", shape, affine, **kinds)
    return root


@pytest.mark.parametrize("shape", [(20, 9, 6), (3, 2, 3), (1, 1, 1)], ids=["crop", "patch", "voxel"])
def test_a_volume_may_be_smaller_than_a_crop_or_a_patch(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """An axis that is shorter is kept whole; a leaf that ends outside is filled up; nothing is resized."""
    root = four(tmp_path, shape)
    run = fit(config_of(root, data={"window": 16, "windows": 2, "whole": 0.5})).folder
    written = predict(run, root / "images" / "v0.nii.gz", tmp_path / "out")
    assert nibabel.load(written[0]).shape == shape


TURN = np.array([[2.0, -0.6, 0.0, 5.0], [0.4, 3.0, 0.0, -7.0], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize("affine", [np.diag([0.5, 0.5, 5.0, 1.0]), TURN], ids=["anisotropic", "oblique"])
def test_anisotropic_and_oblique_volumes(tmp_path: Path, affine: Any) -> None:
    """They train, are scored in mm, and labels come back in the grid of the file."""
    root = four(tmp_path, (24, 20, 10), affine)
    result = fit(config_of(root))
    assert 0 <= result.loop.last_scores["boundary_recall"] <= 1
    written = predict(result.folder, root / "images" / "v1.nii.gz", tmp_path / "out")
    labels = nibabel.load(written[0])
    assert labels.shape == (24, 20, 10)
    np.testing.assert_allclose(labels.affine, affine, atol=1e-5)


def test_label_values_outside_the_table(tmp_path: Path) -> None:
    root = four(tmp_path, (12, 12, 12), value=7)
    with pytest.raises(FormatError, match=r"v\d\.nii\.gz: holds values of no class: 7 \(\d+ pixels\).* classes are"):
        fit(config_of(root))


def test_an_empty_class_is_no_error(tmp_path: Path) -> None:
    """A class without a pixel anywhere costs nothing, has no Dice, and no token of it can be missed."""
    root = four(tmp_path, (16, 16, 16))
    result = fit(config_of(root, data={"classes": {"ball": 1, "nowhere": 2}}))
    assert all(np.isfinite(result.loop.last_scores[name]) for name in ("dice", "boundary_recall"))


def test_volumes_of_background_alone_have_no_recall(tmp_path: Path) -> None:
    root = four(tmp_path, (16, 16, 16), value=0)
    scores = fit(config_of(root)).loop.last_scores
    assert np.isnan(scores["boundary_recall"])


def test_training_in_half_precision(tmp_path: Path) -> None:
    root = four(tmp_path, (16, 16, 16))
    result = fit(config_of(root, train={"epochs": 2, "augment": False, "precision": "bf16", "score_target": "head"}))
    assert np.isfinite(result.loop.last_scores["dice"])
    assert 0 <= result.loop.last_scores["boundary_recall"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("keep_ratio=0", "keep_ratio=0 must lie in (0, 1] and never rise; 0.25 keeps a quarter"),
        ("keep_ratio=[0.5,0.25]", "keep_ratio=(0.5, 0.25) has 2 shares for 1 prune points; give one each"),
        ("prune_after=[5]", "prune_after=(5,) must ascend within 0..0, before the last of 2 blocks"),
        ("prune_after=[1]", "prune_after=(1,) must ascend within 0..0, before the last of 2 blocks"),
        ("estimator=magic", "estimator='magic' is none of threshold, softmax, lapsum, perturbed; choose one"),
        ("completion=all", "completion='all' is none of none, cross, block, mask, last"),
    ],
)
def test_impossible_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    root = four(tmp_path, (12, 12, 12))
    save_config(config_of(root), tmp_path / "run.yaml")
    assert main(["fit", str(tmp_path / "run.yaml"), f"--model.overrides.{change}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_ratio_that_leaves_no_token_is_refused_in_a_call() -> None:
    model = fv.create_model("scd_vit_tiny_3d", num_classes=2, **OVERRIDES | {"prune_after": (0,)})
    patches = fv.patchify(torch.zeros(1, 8, 8, 8), fv.uniform_leaves((8, 8, 8), 4), 4)
    for ratio in (0.0, -0.5, 1.5):
        with pytest.raises(BudgetError, match=rf"keep_ratio={ratio} must lie in \(0, 1\] and never rise"):
            model(patches, Pruning(keep_ratio=ratio))
    assert model(patches, Pruning(keep_ratio=1e-9)).shape[0] == 8, "never below 16 tokens, or all there are"


def test_prune_points_beyond_depth() -> None:
    with pytest.raises(
        ConfigError, match=r"prune_after=\(2, 5\) must ascend within 0\.\.2, before the last of 4 blocks"
    ):
        fv.create_model("scd_vit_tiny", depth=4, prune_after=(2, 5), keep_ratio=(0.5, 0.25))


def test_a_checkpoint_of_another_size_names_the_tensors(tmp_path: Path) -> None:
    root = four(tmp_path, (12, 12, 12))
    small = fv.create_model("scd_vit_tiny_3d", num_classes=2, **OVERRIDES | {"prune_after": (0,)})
    small.save_pretrained(tmp_path / "small")
    config = config_of(root, overrides={"width": 48})
    model = {"name": config.model.name, "overrides": config.model.overrides, "weights": str(tmp_path / "small")}
    with pytest.raises(
        FormatError,
        match=r"does not fit the model: encoder\.cls_token has shape \(1, 1, 24\), not \(1, 1, 48\); .* more;",
    ):
        build_task(config_of(root, model=model))


def test_patches_of_another_size_or_channels_are_refused() -> None:
    model = fv.create_model("scd_vit_tiny", num_classes=2, in_chans=1, **OVERRIDES | {"prune_after": (0,)})
    patches = fv.patchify(torch.zeros(2, 16, 16), fv.uniform_leaves((16, 16), 8), 8)
    with pytest.raises(ShapeError, match=r"patches of \(2, 8, 8\) .* but the model wants \(1, 4, 4\)"):
        model(patches)
