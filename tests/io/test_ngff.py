"""OME-NGFF and plain zarr: levels, axes, sizes, labels written and read, and damaged stores."""

import errno
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from make_files import texture

from foveate.errors import FormatError, ShapeError
from foveate.io.ngff import is_zarr, open_zarr, write_labels_zarr
from foveate.io.raster import Raster, describe, open_raster


def save(
    path: Path,
    levels: list[np.ndarray],
    letters: str,
    *,
    version: str = "0.5",
    unit: str | None = "micrometer",
    scale: float = 0.5,
    **metadata: Any,
) -> Path:
    """Writes an OME-NGFF image of chunks of 16; level-0 pixels are ``scale`` units, 2 along z."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    for number, array in enumerate(levels):
        chunks = tuple(
            1 if letter in "tc" else min(16, side) for letter, side in zip(letters, array.shape, strict=True)
        )
        group.create_array(str(number), shape=array.shape, chunks=chunks, dtype=array.dtype)[:] = array
    size = [{"t": 1.0, "c": 1.0, "z": 4 * scale}.get(letter, scale) for letter in letters]
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    space = {"type": "space"} if unit is None else {"type": "space", "unit": unit}
    scales = {
        "axes": [{"name": letter, **kinds.get(letter, space)} for letter in letters],
        "datasets": [
            {"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": size}]}
            for number in range(len(levels))
        ],
        **metadata,
    }
    group.attrs.update(
        {"ome": {"version": "0.5", "multiscales": [scales]}}
        if version == "0.5"
        else {"multiscales": [{"version": version, **scales}]}
    )
    return path


def whole(raster: Raster, level: int = 0) -> np.ndarray:
    return raster.read(((0,) * len(raster.shape), raster.shape), level)


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        whole(open_zarr(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    return message


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("zipped", [False, True])
def test_levels_axes_and_sizes_of_an_image(tmp_path: Path, version: str, zipped: bool) -> None:
    full = texture(1, 3, 1, 37, 53, dtype="uint16")
    path = save(tmp_path / "a.zarr", [full, full[..., ::2, ::2], full[..., :36:4, :52:4]], "tczyx", version=version)
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "b"), "zip", path))
    assert is_zarr(path)
    raster: Raster = open_zarr(path)
    assert (raster.shape, raster.channels, raster.dtype) == ((37, 53), 3, np.uint16)
    assert raster.levels == ((37, 53), (19, 27), (9, 13))
    assert raster.downsamples == ((1.0, 1.0), (2.0, 2.0), (4.0, 4.0))
    assert raster.spacing == (0.0005, 0.0005)
    assert open_zarr(path).mpp == 0.5
    assert raster.tile_shape(0) == (16, 16)
    assert raster.tile_shape(2) == (9, 13)
    assert np.array_equal(whole(raster), full[0, :, 0])
    assert np.array_equal(raster.read(((3, 5), (20, 40))), full[0, :, 0, 3:20, 5:40])
    assert np.array_equal(raster.read(((4, 4), (20, 40)), 1), full[0, :, 0, 4:20:2, 4:40:2])
    assert raster.read(((30, 40), (37, 53)), 2).shape == (3, 3, 4)  # stored one short, its last pixels repeated
    lines = describe(open_zarr(path))
    assert lines[0] == f"reader: OME-NGFF {version}, {'zip' if zipped else 'folder'}"
    assert "level 1: 19 x 27 pixels, downsample 2, tiles of 16 x 16" in lines
    assert "mpp: 0.5 um per pixel (OME)" in lines


def test_volume_with_anisotropic_levels(tmp_path: Path) -> None:
    full = texture(8, 20, 24)
    raster = open_zarr(save(tmp_path / "a", [full, full[:, ::2, ::2]], "zyx", unit="millimeter"))
    assert raster.downsamples[1] == (1.0, 2.0, 2.0)
    assert raster.spacing == (2.0, 0.5, 0.5)
    assert np.array_equal(whole(raster, 1)[0], full[:, ::2, ::2])


def test_size_is_known_only_with_its_unit(tmp_path: Path) -> None:
    path = save(tmp_path / "a", [texture(20, 24)], "yx", unit=None)
    assert open_zarr(path).spacing is None
    assert "note: unit not stated: the size of a pixel is unknown; give spacing= in mm" in describe(open_zarr(path))
    assert open_zarr(path, spacing=(1.0, 2.0)).spacing == (1.0, 2.0)
    with pytest.raises(ShapeError, match=r"spacing \(1.0,\) for 2 axes"):
        open_zarr(path, spacing=(1.0,))
    absurd = open_zarr(save(tmp_path / "b", [texture(20, 24)], "yx", scale=-3.0))
    assert absurd.spacing is None
    assert "impossible" in describe(absurd)[-1]


@pytest.mark.parametrize("version", [2, 3])
def test_plain_arrays(tmp_path: Path, version: int) -> None:
    for shape, wanted in (((20, 24), (1, 20, 24)), ((3, 20, 24), (3, 20, 24)), ((9, 20, 24), (1, 9, 20, 24))):
        array = texture(*shape, dtype="float32")
        zarr.create_array(tmp_path / "a", data=array, zarr_format=version, chunks=(8,) * len(shape), overwrite=True)
        raster = open_zarr(tmp_path / "a")
        assert whole(raster).shape == wanted
        assert np.array_equal(whole(raster).reshape(shape), array)
        assert raster.spacing is None
    array = texture(20, 24, 3)
    zarr.create_array(tmp_path / "b", data=array, zarr_format=version)
    assert np.array_equal(whole(open_zarr(tmp_path / "b")), array.transpose(2, 0, 1))


def test_plain_array_with_names_and_booleans(tmp_path: Path) -> None:
    array = texture(9, 3, 20) > 99
    zarr.create_array(tmp_path / "a", data=array, dimension_names=["y", "x", "c"])
    raster = open_zarr(tmp_path / "a")
    assert (raster.shape, raster.channels, raster.dtype) == ((9, 3), 20, np.uint8)
    assert np.array_equal(whole(raster), array.transpose(2, 0, 1))


def test_pickled_forked_and_spawned(tmp_path: Path) -> None:
    full = texture(40, 50)
    path = Path(shutil.make_archive(str(tmp_path / "b"), "zip", save(tmp_path / "a", [full], "yx")))
    raster = open_zarr(path)
    whole(raster)
    assert np.array_equal(whole(pickle.loads(pickle.dumps(raster))), full[None])
    boxes = [((low, 0), (low + 10, 50)) for low in range(0, 40, 10)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert np.array_equal(np.concatenate(pool.map(raster.read, boxes), axis=1), full[None])


def test_first_image_of_a_converted_slide(tmp_path: Path) -> None:
    full = texture(20, 24)
    group = zarr.open_group(tmp_path / "a", mode="w", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    save(tmp_path / "a" / "0", [full], "yx", version="0.4")
    raster = open_zarr(tmp_path / "a")
    assert np.array_equal(whole(raster)[0], full)
    assert "note: first of the images in it, 0" in describe(raster)


def test_missing_chunk_is_the_fill_value(tmp_path: Path) -> None:
    path = save(tmp_path / "a", [texture(32, 32) | 1], "yx")
    (path / "0" / "c" / "0" / "1").unlink()
    assert (whole(open_zarr(path))[0, :16, 16:] == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_chunk_is_refused(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "a", [texture(32, 32)], "yx")
    chunk = path / "0" / "c" / "0" / "1"
    chunk.write_bytes(chunk.read_bytes()[: int(chunk.stat().st_size * share)])
    assert "truncated or corrupt ZARR" in refused(path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_zip_is_refused(tmp_path: Path, share: float) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "b"), "zip", save(tmp_path / "a", [texture(32, 32)], "yx")))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated or corrupt ZARR" in refused(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"zarr_format": 3}', '{"zarr_format": 7}'])
@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json"])
def test_corrupt_json_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = save(tmp_path / "a", [texture(32, 32)], "yx")
    (path / name).write_text(text)
    assert refused(path)


def test_lying_metadata_is_refused(tmp_path: Path) -> None:
    full = texture(32, 32)
    assert "axes are t, c, z, y and x, once each" in refused(
        save(tmp_path / "a", [full], "yx", axes=[{"name": "q"}] * 2)
    )
    assert "truncated or corrupt ZARR" in refused(save(tmp_path / "b", [full], "yx", datasets=[]))
    assert "truncated or corrupt ZARR" in refused(save(tmp_path / "c", [full], "yx", axes=7))
    assert "has a level (32, 32) below (32, 32)" in refused(save(tmp_path / "d", [full, full], "yx"))
    assert "has 2 time points; save the one" in refused(save(tmp_path / "e", [np.stack([full, full])], "tyx"))
    assert "an image needs y and x" in refused(save(tmp_path / "f", [full], "cx"))
    assert "open one of its members: 0" in refused(
        Path(zarr.open_group(tmp_path / "g", mode="w").create_group("0").store_path.store.root)
    )
    zarr.create_array(tmp_path / "h", data=np.zeros((8, 8), complex))
    assert "store numbers, no axis empty" in refused(tmp_path / "h")
    zarr.create_array(tmp_path / "i", data=np.zeros((8, 9, 10, 11), "u1"))
    assert "name them with dimension_names" in refused(tmp_path / "i")
    zarr.create_array(tmp_path / "j", data=np.full((8, 8), np.nan))
    assert "64 values that are NaN or infinite" in refused(tmp_path / "j")


def test_bombs_are_refused_or_cost_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a", [texture(32, 32)], "yx")
    file = path / "0" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"] = [10**12, 10**12]
    file.write_text(json.dumps(metadata))
    assert open_zarr(path).read(((10**9, 10**9), (10**9 + 2, 10**9 + 2))).sum() == 0
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [10**6, 10**6]
    file.write_text(json.dumps(metadata))
    assert "above 268435456 samples; store it in smaller chunks" in refused(path)


def test_what_is_no_zarr(tmp_path: Path) -> None:
    assert not is_zarr(tmp_path)
    assert "holds no zarr" in refused(tmp_path)
    assert "cannot be read; check the path" in refused(tmp_path / "none")
    inside = tmp_path / "in"
    save(inside / "a", [texture(32, 32)], "yx")
    packed = Path(shutil.make_archive(str(tmp_path / "b"), "zip", inside))
    assert "without zarr metadata at its top; zip the contents" in refused(packed)


@pytest.mark.parametrize("shape", [(70, 45), (20, 33, 41)])
def test_labels_are_written_and_read_again(tmp_path: Path, shape: tuple[int, ...]) -> None:
    labels = np.sort(texture(*shape) // 50, axis=0)
    size = (0.002, 0.001, 0.001)[-len(shape) :]
    path = write_labels_zarr(tmp_path / "a.zarr", labels, chunk=16, spacing=size)
    raster = open_zarr(path)
    assert np.array_equal(whole(raster)[0], labels)
    assert raster.spacing == size
    assert raster.downsamples[1] == ((2.0, 2.0) if len(shape) == 2 else (1.0, 2.0, 2.0))
    assert all(side <= 16 for side in raster.levels[-1])
    coarse = whole(raster, 1)[0]
    step = tuple(int(by) for by in raster.downsamples[1])
    group = labels[tuple(slice(4 * by, 5 * by) for by in step)].reshape(-1)
    assert (group == coarse[(4,) * len(shape)]).sum() == np.bincount(group).max()
    stated = zarr.open_group(path, mode="r").attrs["ome"]  # independent of our reader
    assert stated["version"] == "0.5"
    assert stated["multiscales"][0]["axes"][0] == {"name": "zyx"[-len(shape)], "type": "space", "unit": "millimeter"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_labels_are_streamed_chunk_by_chunk(tmp_path: Path) -> None:
    asked = []

    def blocks(box):
        asked.append(box)
        return 7 if box[0] == (16, 0) else 0

    path = write_labels_zarr(tmp_path / "a", blocks, shape=(40, 20), dtype=np.uint16, chunk=16)
    assert asked == [
        ((y, x), (min(y + 16, 40), min(x + 16, 20))) for y in (0, 16, 32) for x in (0, 16)
    ]  # each once, in raster order
    raster = open_zarr(path)
    assert raster.dtype == np.uint16
    assert whole(raster).sum() == 7 * 256
    assert raster.spacing is None
    assert [p.name for p in (path / "0" / "c").rglob("*") if p.is_file()] == ["0"]  # zeros take no space


def test_labels_that_do_not_fit_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.full((20, 20), 3)
    for words, options in (
        ("labels from 300 to 300; uint8 holds 0 to 255", {"labels": lambda _: 300, "shape": (20, 20)}),
        ("give integers", {"labels": lambda _: np.zeros((2, 2), int), "shape": (20, 20)}),
        ("give shape=", {"labels": lambda _: 0}),
        ("leave shape= out", {"labels": labels, "shape": (2, 2)}),
        (r"give \[H, W\] or \[D, H, W\] integers", {"labels": labels.astype(float)}),
        (r"chunk \(4,\) for 2 axes", {"labels": labels, "chunk": (4,)}),
        ("give one size in mm above 0", {"labels": labels, "spacing": (1.0,)}),
    ):
        with pytest.raises(ShapeError, match=words):
            write_labels_zarr(tmp_path / "a", **options)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zarr.Array.__setitem__", full)
    with pytest.raises(FormatError, match=r"cannot be written .No space left on device.; free some space"):
        write_labels_zarr(tmp_path / "a", labels)
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_not_replaced_unasked(tmp_path: Path) -> None:
    labels = np.full((20, 20), 3, np.uint8)
    path = write_labels_zarr(tmp_path / "a", labels)
    with pytest.raises(FormatError, match="exists already"):
        write_labels_zarr(path, labels)
    write_labels_zarr(path, labels + 1, overwrite=True)
    assert whole(open_zarr(path)).max() == 4
    with pytest.raises(FormatError, match="is a folder and no zarr, so it is not replaced"):
        write_labels_zarr(tmp_path, labels, overwrite=True)
    (tmp_path / "b").write_text("")
    with pytest.raises(FormatError, match="is a file; give the name of a folder"):
        write_labels_zarr(tmp_path / "b", labels, overwrite=True)


def test_what_is_read_whole_has_a_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "a", [texture(40, 50)], "yx")
    assert open_raster(path, max_pixels=2000).shape == (40, 50)
    with pytest.raises(FormatError, match=r"40 x 50 pixels of 1 channel, above the limit of 1999 pixels; .*max_pixels"):
        open_raster(path, max_pixels=1999)
    levels = save(tmp_path / "b", [texture(40, 50), texture(20, 25)], "yx")
    assert open_raster(levels, max_pixels=1999).shape == (40, 50)
