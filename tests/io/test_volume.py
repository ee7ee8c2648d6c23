"""NIfTI volumes: voxels, place in space, and every way in which a header can lie."""

import gzip
import pickle
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from make_files import texture

from foveate.errors import FormatError, ShapeError
from foveate.io.volume import Volume, is_volume, open_volume

OBLIQUE = np.array([[-1.9, 0.2, 0.1, 90], [0.3, 0.9, -0.6, -126], [0.05, 0.3, 2.4, -72], [0, 0, 0, 1]])


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, *, version: int = 1, **fields) -> Path:
    """Writes (x, y, z) voxels through nibabel; ``fields`` overwrite those of the header afterwards."""
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(array, np.diag([1.0, 2, 3, 1]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    if fields:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        header = type(image.header)(data[: image.header.sizeof_hdr], check=False)
        for name, value in fields.items():
            header[name] = value
        data = header.binaryblock + data[len(header.binaryblock) :]
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def voxels(volume: Volume) -> np.ndarray:
    return volume.read(((0, 0, 0), volume.shape))


def refused(path: Path, **options) -> str:
    with pytest.raises(FormatError) as caught:
        open_volume(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    return message


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64", "int8", "uint32"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_are_exact_in_array_order(tmp_path: Path, dtype: str, name: str) -> None:
    array = texture(5, 6, 7, dtype=dtype)
    volume = open_volume(save(tmp_path / name, array))
    assert (volume.shape, volume.channels, volume.dtype) == ((7, 6, 5), 1, np.dtype(dtype))
    assert np.array_equal(voxels(volume)[0], array.T)
    assert volume.spacing == (3.0, 2.0, 1.0)
    assert volume.orientation == "RAS"
    assert np.array_equal(volume.affine, np.diag([1.0, 2, 3, 1]))
    assert voxels(volume).flags.aligned


@pytest.mark.parametrize("version", [1, 2])
def test_big_endian_and_both_versions(tmp_path: Path, version: int) -> None:
    array = texture(5, 6, 7, dtype="int16")
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    header = kind.header_class(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    nib.save(kind(array, OBLIQUE, header), tmp_path / "a.nii.gz")
    volume = open_volume(tmp_path / "a.nii.gz")
    assert np.array_equal(voxels(volume)[0], array.T)
    assert volume.dtype == np.int16
    assert volume.dtype.isnative
    assert np.allclose(volume.affine, OBLIQUE, atol=1e-5)
    assert volume.describe()[0] == f"reader: NIfTI-{version}, gzip"


def test_fourth_axis_becomes_channels_and_a_slice_a_volume(tmp_path: Path) -> None:
    array = texture(5, 6, 7, 3, dtype="int16")
    volume = open_volume(save(tmp_path / "a.nii", array))
    assert (volume.shape, volume.channels) == ((7, 6, 5), 3)
    assert np.array_equal(voxels(volume), array.T)
    assert "note: 3 volumes of the fourth axis are read as channels" in volume.describe()
    assert open_volume(save(tmp_path / "b.nii", array[:, :, 0, 0])).shape == (1, 6, 5)
    assert "at most one axis besides x, y and z" in refused(save(tmp_path / "c.nii", np.zeros((2, 2, 2, 2, 2), "u1")))


def test_scaling_is_applied_only_where_it_changes_something(tmp_path: Path) -> None:
    array = texture(5, 6, 7, dtype="int16")
    plain = open_volume(save(tmp_path / "a.nii", array, scl_slope=1, scl_inter=0))
    assert plain.dtype == np.int16
    path = save(tmp_path / "b.nii", array, scl_slope=0.5, scl_inter=-7)
    scaled = open_volume(path)
    assert scaled.dtype == np.float32
    assert np.allclose(voxels(scaled)[0].T, nib.load(path).get_fdata())
    assert "correct the header" in refused(save(tmp_path / "c.nii", array, scl_slope=0.5, scl_inter=np.nan))


@pytest.mark.parametrize("canonical", [False, True])
def test_every_orientation_goes_to_ras_and_back(tmp_path: Path, canonical: bool) -> None:
    array = texture(4, 5, 6, dtype="int16")
    for codes in ("LPS", "RAS", "SPL", "AIR", "ILP", "PSR"):
        turn = nib.orientations.axcodes2ornt(codes)
        affine = np.diag([1.0, 2, 3, 1]) @ nib.orientations.inv_ornt_aff(turn, array.shape)
        path = save(tmp_path / f"{codes}.nii", array, affine)
        image = nib.load(path)
        volume = open_volume(path, canonical=canonical)
        wanted = nib.as_closest_canonical(image) if canonical else image
        assert np.array_equal(voxels(volume)[0].T, np.asarray(wanted.dataobj))
        assert np.array_equal(volume.affine, wanted.affine)
        assert volume.orientation == "".join(nib.aff2axcodes(wanted.affine))
        assert volume.spacing == tuple(float(size) for size in reversed(wanted.header.get_zooms()))
        assert np.array_equal(volume.to_native(voxels(volume)[0]).T, array)


def test_oblique_affine_is_kept_and_said(tmp_path: Path) -> None:
    volume = open_volume(save(tmp_path / "a.nii", texture(4, 5, 6), OBLIQUE), canonical=True)
    assert np.allclose(volume.spacing, np.linalg.norm(OBLIQUE[:3, :3], axis=0)[::-1])
    assert volume.orientation == "RAS"
    assert any("turned from LAS" in line for line in volume.describe())
    assert any("oblique: axes turned by up to" in line for line in volume.describe())
    assert any("sheared" in line for line in volume.describe())


def test_degenerate_transforms_fall_back_with_a_note(tmp_path: Path) -> None:
    array = texture(4, 5, 6)
    path = save(tmp_path / "a.nii", array, qform_code=1, srow_x=(0, 0, 0, 0))
    volume = open_volume(path)
    assert volume.spacing == (3.0, 2.0, 1.0)
    assert "note: sform is degenerate and was ignored" in volume.describe()
    path = save(tmp_path / "b.nii", array, sform_code=0, qform_code=0)
    volume = open_volume(path)
    assert volume.spacing == (3.0, 2.0, 1.0)
    assert np.array_equal(volume.affine, nib.load(path).affine)
    assert "note: no usable sform or qform: axes and sizes are those of pixdim" in volume.describe()


def test_absurd_pixdim_needs_spacing(tmp_path: Path) -> None:
    for pixdim in ((1, 0, 0, 0), (1, np.nan, 1, 1), (1, 1e30, 1, 1)):
        path = save(tmp_path / "a.nii", texture(4, 5, 6), sform_code=0, qform_code=0, pixdim=(*pixdim, 0, 0, 0, 0))
        assert "pass spacing=(z, y, x) in mm" in refused(path)
        volume = open_volume(path, spacing=(2.0, 1.0, 0.5))
        assert volume.spacing == (2.0, 1.0, 0.5)
        assert np.array_equal(np.abs(np.diag(volume.affine)), [0.5, 1, 2, 1])
    with pytest.raises(ShapeError, match=r"spacing \(1.0, 0.0, 1.0\) for 3 axes"):
        open_volume(path, spacing=(1.0, 0.0, 1.0))


def test_absurd_transform_is_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", texture(4, 5, 6), version=2, srow_x=(1e300, 0, 0, 0))
    volume = open_volume(path)
    assert volume.spacing == (3.0, 2.0, 1.0)
    assert "note: sform is degenerate and was ignored" in volume.describe()


def test_units_are_not_invented(tmp_path: Path) -> None:
    array = texture(4, 5, 6)
    micro = open_volume(save(tmp_path / "a.nii", array, xyzt_units=3))
    assert np.allclose(micro.spacing, (0.003, 0.002, 0.001))
    unknown = open_volume(save(tmp_path / "b.nii", array, xyzt_units=0))
    assert unknown.spacing == (3.0, 2.0, 1.0)
    assert any("unit not stated: taken as mm" in line for line in unknown.describe())
    nothing = open_volume(save(tmp_path / "c.nii", array, xyzt_units=0, sform_code=0, qform_code=0))
    assert nothing.spacing is None
    assert any("the size of a voxel is unknown; give spacing=" in line for line in nothing.describe())


def test_is_pickled_as_its_path(tmp_path: Path) -> None:
    volume = open_volume(save(tmp_path / "a.nii.gz", texture(40, 50, 60), OBLIQUE), canonical=True)
    data = pickle.dumps(volume)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert np.array_equal(voxels(again), voxels(volume))
    assert np.array_equal(again.affine, volume.affine)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_truncation_is_never_silent(tmp_path: Path, name: str, share: float) -> None:
    path = save(tmp_path / name, texture(20, 21, 22, dtype="int16"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated or corrupt" in refused(path)


def test_flipped_bytes_are_noticed_by_the_check_sum(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", texture(20, 21, 22, dtype="int16"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    assert "truncated or corrupt GZIP" in refused(path)


def test_members_and_padding_of_gzip_are_read(tmp_path: Path) -> None:
    array = texture(20, 21, 22, dtype="int16")
    data = save(tmp_path / "a.nii", array).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + b"\0" * 512)
    assert np.array_equal(voxels(open_volume(path))[0], array.T)
    path.write_bytes(gzip.compress(data + b"\0" * 1000))
    assert np.array_equal(voxels(open_volume(path))[0], array.T)


def test_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    array = texture(4, 5, 6)
    big = save(tmp_path / "a.nii.gz", array, dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))
    lying = save(tmp_path / "b.nii.gz", array, dim=(3, 600, 600, 600, 1, 1, 1, 1))
    raw = save(tmp_path / "c.nii", array, dim=(3, 600, 600, 600, 1, 1, 1, 1))
    data = save(tmp_path / "d.nii", array).read_bytes()
    endless = tmp_path / "e.nii.gz"
    endless.write_bytes(gzip.compress(data + bytes(2**26)))
    tracemalloc.start()
    assert "above the limit of 268435456 pixels" in refused(big)
    assert "bytes cannot hold the" in refused(lying)
    assert "bytes are missing" in refused(raw)
    assert refused(endless).endswith(
        "e.nii.gz: inflates past the 472 bytes that its header declares; export the file again"
    )
    assert refused(endless).count("e.nii.gz") == 1
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert "above the limit of 100 pixels" in refused(tmp_path / "d.nii", max_pixels=100)


def test_values_and_types_that_are_no_voxels(tmp_path: Path) -> None:
    array = texture(4, 5, 6, dtype="float32")
    array[0, 0, 0] = np.nan
    assert "holds 1 values that are NaN or infinite" in refused(save(tmp_path / "a.nii", array))
    assert "holds complex64 values; save integers or floats" in refused(
        save(tmp_path / "b.nii", array.astype(np.complex64))
    )
    rgb = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert "holds RGB colours; save integers or floats, one volume for each" in refused(save(tmp_path / "c.nii", rgb))
    assert "values of unknown type 77" in refused(save(tmp_path / "d.nii", texture(4, 5, 6), datatype=77))


def test_headers_that_are_none(tmp_path: Path) -> None:
    array = texture(4, 5, 6)
    assert "declares 0 axes" in refused(save(tmp_path / "a.nii", array, dim=(0, 4, 5, 6, 1, 1, 1, 1)))
    assert "every side must be at least 1" in refused(save(tmp_path / "b.nii", array, dim=(3, -4, 5, 6, 1, 1, 1, 1)))
    assert "declares its voxels at byte 7" in refused(save(tmp_path / "c.nii", array, vox_offset=7))
    assert "half of a pair" in refused(save(tmp_path / "d.nii", array, magic=b"ni1"))
    assert "Analyze 7.5" in refused(save(tmp_path / "e.nii", array, magic=b""))
    for name, data, words in (
        ("f", b"", "is empty"),
        ("g", b"\x89PNG" * 200, "is no NIfTI volume"),
        ("h", struct.pack("<i", 348), "less than a header"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in refused(tmp_path / name)
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none.nii")
    assert "is a folder without DICOM files" in refused(tmp_path)


def test_volumes_are_known_by_content(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", texture(4, 5, 6))
    assert is_volume(path.rename(tmp_path / "a.bin"))
    (tmp_path / "b.nii").write_bytes(b"no" * 400)
    assert not is_volume(tmp_path / "b.nii")
    assert not is_volume(tmp_path)
    assert not is_volume(tmp_path / "none")


def test_labels_of_another_shape_have_no_native_grid(tmp_path: Path) -> None:
    volume = open_volume(save(tmp_path / "a.nii", texture(4, 5, 6)))
    with pytest.raises(ShapeError, match=r"labels of shape \(4, 5, 6\) for a volume of \(6, 5, 4\)"):
        volume.to_native(np.zeros((4, 5, 6), np.uint8))
