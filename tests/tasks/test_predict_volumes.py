"""Prediction of volumes: labels in the grid of the file, whatever its axes; formats by kind of input."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import torch
import zarr
from tiny_run import tiny_config

from foveate.errors import FormatError
from foveate.models import create_model
from foveate.tasks.config import save_config
from foveate.tasks.predict import predict
from foveate.tasks.trained import SETTINGS

SHAPE = (20, 24, 17)  # x, y, z


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    overrides = {"width": 32, "depth": 1, "num_heads": 2, "decoder_width": 8, "patch_size": 4}
    config = tiny_config(
        folder,
        folder,
        data={"root": str(folder), "classes": {"front": 1, "back": 2}, "channels": 1},
        tree={"max_leaves": 100, "min_size": 4},
        model={"name": "apf_vit_tiny_3d", "overrides": overrides},
    )
    torch.manual_seed(0)
    network = create_model(config.model.name, in_chans=1, num_classes=3, **overrides)
    with torch.no_grad():
        network.decoder.head.weight.mul_(50)
    network.save_pretrained(folder)
    save_config(config, folder / SETTINGS)
    return folder


def _scan() -> Any:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 60, SHAPE).astype(np.int16)
    values[4:14, 5:16, 3:11] += 300
    return values


def test_labels_come_back_in_the_grid_of_the_file(model: Path, tmp_path: Path) -> None:
    affine = np.array([[1.0, 0.1, 0, -9], [0, 1.5, 0.2, 4], [0, 0, 2.0, 30], [0, 0, 0, 1]])
    straight = nibabel.Nifti1Image(_scan(), affine)
    turned = straight.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    for name, image in (("straight", straight), ("turned", turned)):
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
    written = predict(model, [tmp_path / "straight.nii.gz", tmp_path / "turned.nii.gz"], tmp_path / "out")
    assert [path.name for path in written] == ["straight.nii.gz", "turned.nii.gz"]
    masks = [nibabel.load(path) for path in written]
    for mask, image in zip(masks, (straight, turned), strict=True):
        assert mask.shape == image.shape
        assert np.allclose(mask.affine, image.affine, atol=1e-5)
    labels = [np.asarray(nibabel.as_closest_canonical(mask).dataobj) for mask in masks]
    assert len(np.unique(labels[0])) > 1
    assert (labels[0] == labels[1]).all()


def test_every_format_of_a_volume_holds_the_same_labels(model: Path, tmp_path: Path) -> None:
    turned = nibabel.Nifti1Image(_scan(), np.diag([-1.0, 1.0, 2.0, 1.0]))
    nibabel.save(turned, tmp_path / "a.nii")
    written = predict(
        model, tmp_path / "a.nii", tmp_path / "out", format="nii.gz,tif,zarr,ome.tif", probability=True, overlay=True
    )
    labels = np.asarray(nibabel.load(written[0]).dataobj).T
    assert (tifffile.imread(written[1]) == labels).all()
    assert (zarr.open_group(written[2], mode="r")["0"][:] == labels).all()
    assert (tifffile.imread(written[3]) == labels).all()
    with tifffile.TiffFile(written[3]) as file:
        assert 'PhysicalSizeZ="2.0" PhysicalSizeZUnit="mm"' in str(file.ome_metadata)
    chance = tifffile.imread(written[4])
    assert chance.shape == (3, *labels.shape)
    clear = np.sort(chance, axis=0)[-1] - np.sort(chance, axis=0)[-2] > 1e-3
    assert (chance.argmax(0) == labels)[clear].all()
    with pytest.raises(
        FormatError, match=r"format='png' does not fit a volume; choose among nii\.gz, tif, ome\.tif, zarr"
    ):
        predict(model, tmp_path / "a.nii", tmp_path / "other", format="png")


def test_planes_and_zarr_have_formats_of_their_own(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", _scan().T)
    array = zarr.create_array(tmp_path / "b.zarr", shape=_scan().T.shape, chunks=(8, 8, 8), dtype="i2")
    array[:] = _scan().T
    planes, store = predict(model, [tmp_path / "a.npy", tmp_path / "b.zarr"], tmp_path / "out")
    assert (planes.name, store.name) == ("a.tif", "b.zarr")
    assert (zarr.open_group(store, mode="r")["0"][:] == tifffile.imread(planes)).all()
    again = predict(model, tmp_path / "b.zarr", tmp_path / "out", overwrite=True)
    assert again == [store]
    assert (zarr.open_group(store, mode="r")["0"][:] == tifffile.imread(planes)).all()


def test_a_model_of_other_axes_and_a_size_for_planes_are_refused(model: Path, tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(_scan(), np.eye(4)), tmp_path / "a.nii.gz")
    np.save(tmp_path / "plane.npy", np.zeros((30, 30), np.uint8))
    with pytest.raises(FormatError, match=r"plane\.npy has 2 axes, the model was trained on 3; give a model for 2"):
        predict(model, tmp_path / "plane.npy", tmp_path / "out")
    with pytest.raises(FormatError, match=r"is a volume, for which mpp=0\.5 has no meaning; leave it out"):
        predict(model, tmp_path / "a.nii.gz", tmp_path / "out", mpp=0.5)
