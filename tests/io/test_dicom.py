"""DICOM series, written with ITK, read whole or refused."""

import locale
import sys
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from make_files import texture

from foveate.errors import FormatError, MissingExtraError
from foveate.io.volume import is_volume, open_volume
from foveate.io.write_volume import write_volume

SPACING = (0.7, 0.8, 2.5)  # x, y, z
ORIGIN = (10.0, -20.0, 30.0)  # LPS


def save(
    folder: Path, array: np.ndarray, *, uid: str = "1.2.3.4", skip: tuple[int, ...] = (), step: float = 2.5
) -> Path:
    """Writes ``[D, H, W]`` as one file per slice, with intercept -5."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, slice_ in enumerate(array):
        if number in skip:
            continue
        image = sitk.GetImageFromArray(slice_)
        image.SetSpacing(SPACING[:2])
        place = (*ORIGIN[:2], ORIGIN[2] + step * number)
        for tag, value in (
            ("0020|000e", uid),
            ("0020|000d", "1.2.3"),
            ("0020|0032", "\\".join(map(str, place))),
            ("0020|0037", "1\\0\\0\\0\\1\\0"),
            ("0020|0013", str(number)),
            ("0008|0060", "CT"),
            ("0028|1052", "-5"),
            ("0028|1053", "1"),
        ):
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}-{100 - number}.dcm"))  # names run against positions
        writer.Execute(image)
    return folder


@pytest.fixture
def array() -> np.ndarray:
    return texture(5, 8, 9, dtype="int16") // 8


def refused(path: Path, **options) -> str:
    with pytest.raises(FormatError) as caught:
        open_volume(path, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_series_is_read_with_its_place(tmp_path: Path, array: np.ndarray) -> None:
    folder = save(tmp_path / "series", array)
    words = locale.setlocale(locale.LC_ALL)
    volume = open_volume(folder)
    assert locale.setlocale(locale.LC_ALL) == words, "ITK leaves the process with the locale of C"
    assert np.array_equal(volume.read(((0, 0, 0), volume.shape))[0], array)
    assert np.allclose(volume.spacing, SPACING[::-1])
    assert volume.orientation == "LPS"
    wanted = np.diag([-0.7, -0.8, 2.5, 1])
    wanted[:3, 3] = (-10, 20, 30)
    assert np.allclose(volume.affine, wanted)
    assert volume.describe()[0] == "reader: DICOM through SimpleITK, 5 files"
    assert is_volume(folder)
    assert is_volume(next(folder.iterdir()))
    one = open_volume(next(folder.iterdir()))
    assert one.shape == volume.shape


@pytest.mark.parametrize("canonical", [False, True])
def test_labels_go_back_as_nifti(tmp_path: Path, array: np.ndarray, canonical: bool) -> None:
    folder = save(tmp_path / "series", array)
    volume = open_volume(folder, canonical=canonical)
    labels = volume.read(((0, 0, 0), volume.shape))[0] % 5
    write_volume(tmp_path / "out.nii.gz", labels, volume)
    assert np.allclose(nib.load(tmp_path / "out.nii.gz").affine, open_volume(folder).affine)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    source, other = reader.Execute(), sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(other), array % 5)
    assert np.allclose(other.GetOrigin(), source.GetOrigin())
    assert np.allclose(other.GetSpacing(), source.GetSpacing())
    assert np.allclose(other.GetDirection(), source.GetDirection())


def test_several_series_are_named(tmp_path: Path, array: np.ndarray) -> None:
    folder = save(save(tmp_path / "series", array), array[:2], uid="1.2.3.5")
    message = refused(folder)
    assert "holds 2 series: 1.2.3.4" in message
    assert "(5 files)" in message
    assert "give one file of the series that you mean" in message
    assert open_volume(folder / "1.2.3.5-100.dcm").shape == (2, 8, 9)


def test_missing_and_uneven_slices_are_refused(tmp_path: Path, array: np.ndarray, capfd) -> None:
    message = refused(save(tmp_path / "a", array, skip=(2,)))
    assert "has a gap of 5 mm between 1.2.3.4-99.dcm and 1.2.3.4-97.dcm, elsewhere 2.5 mm" in message
    assert capfd.readouterr().err == ""


def test_two_slices_at_one_place_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    folder = save(tmp_path / "a", array)
    (folder / "copy.dcm").write_bytes((folder / "1.2.3.4-98.dcm").read_bytes())
    assert "has two slices at one place" in refused(folder)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("number", [98, 96])
def test_a_truncated_slice_is_named(tmp_path: Path, array: np.ndarray, share: float, number: int, capfd) -> None:
    folder = save(tmp_path / "a", array)
    name = folder / f"1.2.3.4-{number}.dcm"
    data = name.read_bytes()
    name.write_bytes(data[: int(len(data) * share)])
    assert str(name) in refused(folder)
    assert capfd.readouterr().err == ""


def test_flipped_bytes_are_refused_or_read_never_a_crash(tmp_path: Path, array: np.ndarray) -> None:
    folder = save(tmp_path / "a", array)
    name = folder / "1.2.3.4-98.dcm"
    data = name.read_bytes()
    for at in range(130, 700, 19):
        name.write_bytes(data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :])
        with suppress(FormatError):
            assert open_volume(folder).channels == 1


def test_size_is_checked_before_the_voxels(tmp_path: Path, array: np.ndarray) -> None:
    assert "above the limit of 100 pixels" in refused(save(tmp_path / "a", array), max_pixels=100)


def test_without_simpleitk_the_remedy_is_named(tmp_path: Path, array: np.ndarray, monkeypatch) -> None:
    folder = save(tmp_path / "a", array)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtraError, match=r"DICOM needs SimpleITK; run: pip install 'foveate\[dicom\]'"):
        open_volume(folder)
