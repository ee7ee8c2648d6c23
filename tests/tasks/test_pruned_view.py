"""The picture of what was pruned where: every leaf has the tint of the point that it left at, in planes and volumes."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import tiny_config, write_disc

from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.models import create_model
from foveate.nn.pruner import Pruning, Scores
from foveate.tasks.config import save_config
from foveate.tasks.figures import BLUE, PURPLE, outlined
from foveate.tasks.predict import predict, prepare, segment
from foveate.tasks.pruned_view import describe_left, left_at, pruned_panel
from foveate.tasks.report import case_panel
from foveate.tasks.trained import SETTINGS

PRUNED = {"width": 32, "depth": 3, "num_heads": 2, "decoder_width": 8, "patch_size": 4}


def test_a_token_left_at_the_last_point_that_saw_it() -> None:
    first = Scores(torch.arange(6), torch.zeros(6), torch.tensor([0, 2, 3, 5]))
    second = Scores(torch.tensor([0, 2, 3, 5]), torch.zeros(4), torch.tensor([1, 3]))
    left = left_at([first, second], 6)
    assert left.tolist() == [1, 0, -1, 1, 0, -1]
    assert [text for text, _ in describe_left(left)] == [
        "left at prune point 1: 2",
        "left at prune point 2: 2",
        "kept to the end: 2 of 6 tokens",
    ]


def test_a_leaf_has_the_tint_of_its_point_and_a_kept_one_none() -> None:
    grey = np.full((64, 64, 3), 200, np.uint8)
    leaves = uniform_leaves((64, 64), 32)
    shown = outlined(grey, leaves, side=64, left=torch.tensor([0, 1, -1, -1]))
    assert shown[16, 16].tolist() == [(200 + part + 1) // 2 for part in BLUE]
    assert shown[16, 48].tolist() == [(200 + part + 1) // 2 for part in PURPLE]
    assert shown[48, 16].tolist() == shown[48, 48].tolist() == [200, 200, 200]


def test_every_axis_of_a_volume_shows_the_leaves_it_cuts_and_its_size_in_mm() -> None:
    image = np.full((1, 8, 16, 16), 100, np.uint8)
    labels = np.zeros((8, 16, 16), np.uint8)
    labels[2, 9:15, 9:15] = 1
    leaves = uniform_leaves((8, 16, 16), 8)  # one layer along z, four columns
    left = torch.tensor([-1, -1, -1, 0])  # the one with the labels
    thick = pruned_panel(image, leaves, left, labels, spacing=(4.0, 1.0, 1.0), side=96)
    cubic = pruned_panel(image, leaves, left, labels, side=96)
    blue = (thick == np.array([(100 + part + 1) // 2 for part in BLUE], np.uint8)).all(-1)
    assert blue.any()
    column = 6 + (96 + 6) + 70  # in the plane of z and x: 8 x 4 mm tall, 16 x 1 mm wide
    assert (thick[-90:, column] == 255).all()
    assert (cubic[-90:-60, column] != 255).any()
    assert pruned_panel(image, leaves, left, 0 * labels, side=96).shape == cubic.shape, "no label: the middle planes"


def test_leaves_keep_their_tint_when_axes_are_turned() -> None:
    image = np.random.default_rng(0).integers(0, 255, (1, 12, 20, 16), dtype=np.uint8)
    leaves = uniform_leaves((12, 20, 16), 4)
    left = torch.full((len(leaves),), -1)
    left[leaves.start[:, 2] >= 8] = 0  # the right half is pruned
    labels = np.zeros((12, 20, 16), np.uint8)
    panel = pruned_panel(image, leaves, left, labels, side=80)
    tinted = (panel[..., 2].astype(int) - panel[..., 0]) > 40
    assert tinted[-80:, :40].mean() < 0.1 < tinted[-80:, 40:80].mean(), "z plane: right half only"


def _saved(folder: Path, dims: int) -> Path:
    name = "scd_vit_tiny" if dims == 2 else "scd_vit_tiny_3d"
    overrides = PRUNED | {"prune_after": [0, 1], "keep_ratio": [0.5, 0.3]}
    data = {"root": str(folder), "classes": {"disc": ">=1"}, "channels": 1}
    tree = {"max_leaves": 80, "min_size": 4}
    config = tiny_config(folder, folder, data=data, tree=tree, model={"name": name, "overrides": overrides})
    torch.manual_seed(0)
    create_model(name, in_chans=1, num_classes=2, **overrides).save_pretrained(folder)
    save_config(config, folder / SETTINGS)
    return folder


def test_predict_draws_it_for_a_model_that_prunes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scan = nibabel.Nifti1Image(rng.integers(0, 99, (20, 24, 17)).astype(np.int16), np.diag([1.0, 1.0, 2.0, 1.0]))
    nibabel.save(scan, tmp_path / "a.nii.gz")
    _, picture = predict(_saved(tmp_path / "model3", 3), tmp_path / "a.nii.gz", tmp_path / "out", overlay=True)
    assert np.asarray(Image.open(picture)).shape[1] > 3 * 640
    write_disc(tmp_path, "b", 0)
    model2 = _saved(tmp_path / "model2", 2)
    _, flat = predict(model2, tmp_path / "images/b.png", tmp_path / "out", overlay=True)
    shown = np.asarray(Image.open(flat))
    assert 2 * 640 < shown.shape[1] < 3 * 640
    again = predict(model2, tmp_path / "images/b.png", tmp_path / "again", overlay=True)[1]
    assert again.read_bytes() == flat.read_bytes()


def test_the_report_tints_its_leaves(tmp_path: Path) -> None:
    from foveate.tasks.predict import load_model

    model, config = load_model(_saved(tmp_path / "model", 2))
    image = torch.randn(1, 40, 40)
    result = segment(model, image, config, Pruning(scores=[]))
    assert result.left is not None
    assert len(result.left) == len(result.leaves) == len(prepare(image, config, 4).pixels)
    assert int((result.left < 0).sum()) == round(0.3 * len(result.leaves))
    labels = result.labels.numpy()
    plain, tinted = (
        case_panel(image.numpy(), labels, labels, result.leaves, 1.0, side=80, left=left)
        for left in (None, result.left)
    )
    assert tinted.shape[0] > plain.shape[0], "a legend"


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_turned_leaves_still_cover_the_volume(order: tuple[int, ...]) -> None:
    from foveate.tasks.pruned_view import _turned

    leaves: Leaves = _turned(uniform_leaves((5, 9, 7), (2, 4, 4)), order)
    assert leaves.covers()
    assert leaves.shape == tuple((5, 9, 7)[axis] for axis in order)
