"""Images of which nearly all is black: what is read is what was there, and files that are none are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from foveate.errors import FormatError, ShapeError
from foveate.io.pyramid_cache import with_levels
from foveate.io.raster import Raster, open_raster
from foveate.io.sparse_image import SparseRaster, open_sparse, write_sparse
from sources import mean_levels


def sparse(shape=(700, 900), share=0.001, seed=0, **options):
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 256, shape, dtype=np.uint8) * (rng.random(shape) < share)
    index = np.flatnonzero(image)
    return image, SparseRaster(shape, index, image.ravel()[index], **options)


def test_what_is_read_is_what_was_there() -> None:
    image, raster = sparse()
    assert isinstance(raster, Raster)
    assert (raster.channels, raster.levels, raster.tile_shape()) == (1, ((700, 900),), (512, 512))
    for box in (((0, 0), (700, 900)), ((3, 5), (699, 600)), ((699, 899), (700, 900))):
        assert np.array_equal(raster.read(box)[0], image[tuple(map(slice, *box))])
    with pytest.raises(ShapeError, match="box"):
        raster.read(((0, 0), (701, 900)))


def test_blank_boxes_are_known_without_reading() -> None:
    image, raster = sparse(share=0.0002)
    rng = np.random.default_rng(1)
    start = np.stack([rng.integers(0, side - 1, 300) for side in image.shape], axis=1)
    stop = np.minimum(start + rng.integers(1, 200, (300, 2)), image.shape)
    wanted = [not image[y:b, x:r].any() for (y, x), (b, r) in zip(start.tolist(), stop.tolist(), strict=True)]
    assert 0 < sum(wanted) < 300
    assert raster.blank(np.stack([start, stop], axis=1)).tolist() == wanted


def test_a_large_image_has_coarse_levels(monkeypatch) -> None:
    monkeypatch.setattr("foveate.io.sparse_image.fits_whole", lambda shape: False)
    monkeypatch.setattr("foveate.io.sparse_image._TILE", 64)
    image, raster = sparse((701, 902), share=0.2)
    (quarter, sixteenth) = mean_levels(image[None].astype(np.float64), [4, 16])
    assert raster.levels == ((701, 902), (176, 226), (44, 57))
    assert raster.downsamples == ((1, 1), (4, 4), (16, 16))
    for level, wanted in ((1, quarter), (2, sixteenth)):
        found = raster.read(((0, 0), (701, 902)), level)
        assert np.array_equal(found, np.rint(wanted))
        step = 4**level
        part = raster.read(((3 * step + 1, 5 * step), (701, 20 * step - 3)), level)
        assert np.array_equal(part, found[:, 3:, 5:20])
    assert with_levels(raster) is raster


@pytest.mark.parametrize("spacing", [None, (0.001, 0.002)])
def test_a_file_holds_the_same(tmp_path: Path, spacing) -> None:
    image, raster = sparse(spacing=spacing)
    path = write_sparse(tmp_path / "a.safetensors", raster)
    found = open_raster(path)
    assert type(found) is SparseRaster
    assert np.array_equal(found.read(((0, 0), image.shape))[0], image)
    assert found.spacing == spacing
    assert open_raster(path, mpp=0.5).spacing == (0.0005, 0.0005)
    assert np.array_equal(load_file(path)["index"], raster.index)  # by any other reader
    with pytest.raises(FormatError, match="exists already"):
        write_sparse(path, raster)


def test_an_empty_image_is_one(tmp_path: Path) -> None:
    empty = SparseRaster((30, 40), np.zeros(0, np.int64), np.zeros(0, np.uint8))
    found = open_sparse(write_sparse(tmp_path / "a", empty))
    assert not found.read(((0, 0), (30, 40))).any()
    assert found.blank(np.array([[[0, 0], [30, 40]]])).all()


@pytest.mark.parametrize(
    ("shape", "index", "message"),
    [
        ((4, 4, 4), [1], r"1 values at 1 places of \(4, 4, 4\); give one each, of a plane up to 2.40 pixels"),
        ((2**21, 2**20), [1], r"1 values at 1 places of \(2097152, 1048576\); give one each, of a plane up to 2.40"),
        ((4, 4), [2, 1], "places of pixels must rise from 0 to 15, without repeats; sort them"),
        ((4, 4), [16], "places of pixels must rise from 0 to 15"),
    ],
)
def test_places_that_are_none_are_refused(shape, index, message) -> None:
    with pytest.raises(ShapeError, match=message):
        SparseRaster(shape, np.array(index), np.ones(len(index), np.uint8))


def bad_file_of(kind: str, path: Path) -> Path:
    _, raster = sparse()
    data = write_sparse(path, raster).read_bytes()
    tensors, about = load_file(path), {"kind": "foveate sparse image", "shape": "[700, 900]"}
    if kind == "short":
        path.write_bytes(data[:-9])
    elif kind == "header":
        path.write_bytes(data[:40])
    elif kind == "other":
        save_file({"weight": np.zeros(3, np.float32)}, path)
    elif kind == "shape":
        save_file(tensors, path, about | {"shape": "[7, 9]"})
    elif kind == "shape endless":
        save_file(tensors, path, about | {"shape": "[Infinity, 9]"})
    elif kind == "shape no json":
        save_file(tensors, path, about | {"shape": "[7,"})
    elif kind == "shape no numbers":
        save_file(tensors, path, about | {"shape": json.dumps({"a": 1})})
    elif kind == "float":
        save_file(tensors | {"index": tensors["index"].astype(np.float32)}, path, about)
    else:
        save_file({"index": tensors["index"]}, path, about)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"value of \(\d+,\) is cut short"),
        ("header", "its header is cut short or no JSON"),
        ("other", "is a safetensors file of kind None, not a foveate sparse image; write it with"),
        ("shape", "damaged foveate sparse image .places of pixels must rise from 0 to 62"),
        ("shape no json", "shape is no JSON"),
        ("shape endless", "damaged foveate sparse image .cannot convert float infinity to integer"),
        ("shape no numbers", "damaged foveate sparse image .invalid literal"),
        ("float", r"index is float32 \(\d+,\)"),
        ("value", "it has no value of a known type"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, kind, message) -> None:
    with pytest.raises(FormatError, match=message):
        open_raster(bad_file_of(kind, tmp_path / "a.safetensors"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x89PNG....")
    with pytest.raises(FormatError, match=r"is no foveate sparse image .it begins with b'.x89PNG....'.; write it"):
        open_sparse(tmp_path / "a")
    with pytest.raises(FormatError, match=r"cannot be read .No such file or directory.; check the path"):
        open_sparse(tmp_path / "b")
