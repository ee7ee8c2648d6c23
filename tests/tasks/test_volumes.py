"""Volumes as items: canonical axes, their own spacing, mixed types, masks that lie as they do."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from foveate.errors import FormatError
from foveate.tasks.check import check_data
from foveate.tasks.config import DataConfig, FitConfig, SplitConfig, TrainConfig, TreeConfig
from foveate.tasks.data import SegmentationData
from foveate.tasks.evaluate import evaluate
from foveate.tasks.items import find_items, split_items
from foveate.tasks.segmentation import fit

SHAPE = (20, 24, 16)  # x, y, z


def write_ball(root: Path, name: str, seed: int, *, axes: str = "RAS", dtype: type = np.float32) -> None:
    """A bright ball in noise, the same in space however its axes are stored."""
    draw = np.random.default_rng(seed)
    grid = np.stack(np.mgrid[tuple(slice(side) for side in SHAPE)])
    ball = (((grid - np.array([7, 12, 8])[:, None, None, None]) / np.array([4, 5, 4])[:, None, None, None]) ** 2).sum(
        0
    ) < 1
    voxels = (draw.normal(20, 2, SHAPE) + 60 * ball) * (1 if dtype is np.uint8 else 10)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    turn = nibabel.orientations.axcodes2ornt(axes)
    for folder, array in (("images", voxels.astype(dtype)), ("labels", ball.astype(np.uint8))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(array, affine)
        there = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(affine), turn)
        nibabel.save(image.as_reoriented(there), root / folder / f"{name}.nii.gz")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k, (axes, dtype) in enumerate([("RAS", np.float32), ("LPS", np.uint8), ("PIR", np.int16), ("RAS", np.uint8)]):
        write_ball(tmp_path, f"v{k}", 0 if k < 3 else k, axes=axes, dtype=dtype)
    return tmp_path


def data_of(root: Path, **changes: object) -> DataConfig:
    base = DataConfig(
        root=str(root),
        images="images/*.nii.gz",
        masks="labels/{stem}.nii.gz",
        classes={"ball": 1},
        channels=1,
        split=SplitConfig(0.5, 0.25, 0.25),
    )
    return replace(base, **changes)


def test_names_lose_the_whole_ending(root: Path) -> None:
    items = find_items(data_of(root))
    assert [item.name for item in items] == [f"images/v{k}" for k in range(4)]
    assert items[0].group == "v0"


def test_every_volume_is_seen_the_same_way_round(root: Path) -> None:
    config = FitConfig(data=data_of(root), tree=TreeConfig(max_leaves=60, min_size=4), train=TrainConfig())
    data = SegmentationData(find_items(config.data), config, 4, train=False)
    seen = [data.read(i) for i in range(3)]
    for one in seen:
        assert one.config.data.spacing == pytest.approx((2, 1.5, 1))  # z, y, x
        assert one.image.shape == (1, 16, 24, 20)
        assert torch.equal(one.labels, seen[0].labels)
    assert float((seen[1].image - seen[0].image).abs().mean()) < 0.05  # uint8 and float32, each on its own scale


def test_a_given_spacing_wins_over_the_file(root: Path) -> None:
    config = FitConfig(data=data_of(root, spacing=(3.0, 2.0, 1.0)), tree=TreeConfig(max_leaves=60, min_size=4))
    data = SegmentationData(find_items(config.data), config, 4, train=False)
    assert data.read(0).config.data.spacing == (3, 2, 1)


def test_anisotropic_volumes_have_flat_leaves(root: Path) -> None:
    config = FitConfig(data=data_of(root), tree=TreeConfig(max_leaves=500, min_size=4))
    thick = replace(config, data=replace(config.data, spacing=(8.0, 1.0, 1.0)))
    plain, flat = (
        SegmentationData(find_items(config.data), one, 4, train=False)[0].patches.leaves[0] for one in (config, thick)
    )
    sides = flat.sizes[-1]
    assert sides[0] < sides[1] == sides[2]
    assert len(set(plain.sizes[-1])) >= 1


def test_a_mask_that_cannot_say_how_it_lies_is_refused_beside_a_turned_volume(root: Path) -> None:
    for k in (0, 1):
        np.save(root / "labels" / f"v{k}.npy", np.zeros(SHAPE[::-1], np.uint8))
    config = FitConfig(data=data_of(root, masks="labels/{stem}.npy", images="images/v[01].nii.gz"))
    data = SegmentationData(find_items(config.data), config, 4, train=False)
    assert data.read(0).labels.shape == SHAPE[::-1]
    with pytest.raises(
        FormatError, match=r"v1\.npy does not say how it lies beside .*v1\.nii\.gz, which is stored as LPS"
    ):
        data.read(1)


def test_the_check_names_mixed_types(root: Path) -> None:
    notes = {finding.kind: finding for finding in check_data(data_of(root)).findings}
    assert not notes["types"].is_error
    assert "3-D float32 (images/v0)" in notes["types"].detail
    error = {finding.kind: finding for finding in check_data(data_of(root, normalise="range")).findings}["mixed types"]
    assert error.is_error
    assert "set it to 'image'" in error.detail
    config = FitConfig(data=data_of(root, normalise="range"))
    data = SegmentationData(find_items(config.data), config, 4, train=False)
    data.read(0)
    with pytest.raises(FormatError, match=r"v1\.nii\.gz is 3-D integer and .*v0\.nii\.gz is 3-D float, which data\."):
        data.read(1)


def test_planes_and_volumes_are_not_mixed(root: Path) -> None:
    np.save(root / "images/plane.npy", np.random.default_rng(0).random((16, 16)))
    np.save(root / "labels/plane.npy", np.ones((16, 16), np.uint8))
    data = data_of(root, images="images/*", masks="labels/{stem}.*")
    (found,) = (finding for finding in check_data(data).findings if finding.kind == "mixed dimensions")
    assert found.is_error


def test_an_oblique_volume_is_noted(root: Path) -> None:
    path = root / "images/v0.nii.gz"
    image = nibabel.load(path)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    tilted = nibabel.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)
    nibabel.save(tilted, path)
    notes = [finding for finding in check_data(data_of(root)).findings if finding.kind == "volume"]
    assert not any(note.is_error for note in notes)
    assert [note.name for note in notes if "11.5" in note.detail] == ["images/v0"], "0.2 rad"


def test_volumes_train_and_are_scored_in_mm(root: Path, tmp_path: Path) -> None:
    values = {"images": "images/*.nii.gz", "masks": "labels/{stem}.nii.gz", "classes": {"ball": 1}, "channels": 1}
    config = tiny_config(
        root,
        tmp_path / "run",
        data=values,
        tree={"max_leaves": 60},
        model={"name": "apf_vit_tiny_3d", "overrides": {"width": 48, "depth": 1, "num_heads": 2, "patch_size": 4}},
        train={"epochs": 1},
    )
    fit(config)
    bad = split_items(find_items(config.data), config.data)["test"][0]
    evaluation = evaluate(tmp_path / "run", split="train")
    assert evaluation.summary["hd95_unit"] == "mm"
    assert evaluation.failed == ()
    assert 0.5 < evaluation.ceiling <= 1
    train = split_items(find_items(config.data), config.data)["train"][0]
    train.image.write_bytes(train.image.read_bytes()[:100])
    again = evaluate(tmp_path / "run", split="train")
    assert len(again.rows) == 1
    assert len(again.failed) == 1
    assert train.image.name in again.failed[0]
    assert "skipped" in str(again)
    bad.image.write_bytes(b"")
    with pytest.raises(FormatError, match=r"none of the 1 test images can be scored \(first: "):
        evaluate(tmp_path / "run", split="test")
