"""Labels as NIfTI, read back by nibabel and by ITK."""

import errno
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from make_files import texture
from scipy.spatial.transform import Rotation
from test_volume import save

from foveate.errors import FormatError, ShapeError
from foveate.io.volume import open_volume
from foveate.io.write_volume import write_volume

OBLIQUE = np.eye(4)  # ITK reads no sheared grids
OBLIQUE[:3] = np.c_[
    Rotation.from_euler("xyz", (20, -10, 5), degrees=True).as_matrix() * (0.5, 0.75, 2), (90, -126, -72)
]


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_labels_return_to_the_grid_of_the_input(tmp_path: Path, canonical: bool, version: int, name: str) -> None:
    turned = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt("SPL"), (4, 5, 6))
    for affine in (np.diag([1.0, 2, 3, 1]), OBLIQUE @ turned):
        array = texture(4, 5, 6, dtype="int16")
        path = save(tmp_path / "in.nii.gz", array, affine, version=version)
        volume = open_volume(path, canonical=canonical)
        labels = volume.read(((0, 0, 0), volume.shape))[0] % 3  # in the frame as opened
        write_volume(tmp_path / name, labels, volume, overwrite=True)
        back, image = nib.load(tmp_path / name), nib.load(path)
        assert np.array_equal(np.asarray(back.dataobj), array % 3)
        assert back.get_data_dtype() == np.uint8
        assert np.array_equal(back.affine, image.affine)
        assert type(back.header) is type(image.header)
        for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_y", "quatern_c"):
            assert (
                np.array_equal(back.header[field][..., :4], image.header[field][..., :4])
                if np.ndim(image.header[field])
                else back.header[field] == image.header[field]
            )
        if version == 1:
            other, source = sitk.ReadImage(str(tmp_path / name)), sitk.ReadImage(str(path))
            assert np.array_equal(sitk.GetArrayFromImage(other), sitk.GetArrayFromImage(source) % 3)
            assert other.GetSpacing() == source.GetSpacing()
            assert other.GetOrigin() == source.GetOrigin()
            assert other.GetDirection() == source.GetDirection()


def test_many_labels_are_stored_in_16_bits(tmp_path: Path) -> None:
    labels = np.arange(300).reshape(10, 6, 5)
    write_volume(tmp_path / "a.nii.gz", labels, spacing=(3.0, 2.0, 0.5))
    back = nib.load(tmp_path / "a.nii.gz")
    assert back.get_data_dtype() == np.uint16
    assert np.array_equal(np.asarray(back.dataobj), labels.T)
    assert np.array_equal(back.affine, np.diag([0.5, 2, 3, 1]))
    assert back.header.get_xyzt_units()[0] == "mm"
    assert open_volume(tmp_path / "a.nii.gz").spacing == (3.0, 2.0, 0.5)


def test_without_a_size_none_is_stated(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", np.zeros((4, 5, 6), bool))
    assert open_volume(tmp_path / "a.nii").spacing is None


def test_a_given_spacing_replaces_an_absurd_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", texture(4, 5, 6), sform_code=0, qform_code=0, pixdim=(1, 0, 0, 0, 0, 0, 0, 0))
    volume = open_volume(path, spacing=(3.0, 2.0, 0.5))
    write_volume(tmp_path / "b.nii", np.ones(volume.shape, np.uint8), volume)
    again = open_volume(tmp_path / "b.nii")
    assert again.spacing == (3.0, 2.0, 0.5)
    assert np.array_equal(again.affine, volume.affine)


def test_refuses_what_is_no_label_volume(tmp_path: Path) -> None:
    path, labels = tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(FormatError, match=r"name it .nii or .nii.gz"):
        write_volume(tmp_path / "a.gz", labels)
    with pytest.raises(ShapeError, match=r"labels of shape \(3, 4\) and dtype uint8; give \[D, H, W\] integers"):
        write_volume(path, labels[0])
    with pytest.raises(ShapeError, match="dtype float32"):
        write_volume(path, labels.astype(np.float32))
    with pytest.raises(ShapeError, match="labels from -1 to 0; a mask holds 0 to 65535"):
        write_volume(path, labels.astype(int) - np.eye(1, 24, dtype=int).reshape(2, 3, 4))
    with pytest.raises(ShapeError, match=r"spacing \(1.0,\) for 3 axes"):
        write_volume(path, labels, spacing=(1.0,))
    volume = open_volume(save(tmp_path / "in.nii", texture(4, 5, 6)))
    with pytest.raises(ShapeError, match="give one label per voxel"):
        write_volume(path, labels, volume)
    assert not path.exists()
    write_volume(path, labels)
    with pytest.raises(FormatError, match="exists already"):
        write_volume(path, labels)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FormatError, match="No space left on device"):
        write_volume(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), np.uint8))
    assert list(tmp_path.iterdir()) == []
