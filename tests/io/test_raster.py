from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_files import texture
from make_slides import picture, write_plain

from foveate.errors import ConfigError, FormatError, ShapeError
from foveate.geometry.source import exact_downsample
from foveate.io.guard import DEFAULT_MAX_PIXELS
from foveate.io.raster import ArrayRaster, Raster, describe, open_raster
from foveate.io.write import write_image


@pytest.mark.parametrize("shape", [(3, 9, 11), (1, 5, 7, 9)])
def test_reads_boxes_as_views(shape: tuple[int, ...]) -> None:
    array = texture(*shape, dtype="uint16")
    raster: Raster = ArrayRaster(array, spacing=(0.5,) * (len(shape) - 1))
    assert raster.shape == shape[1:]
    assert (raster.channels, raster.dtype) == (shape[0], np.uint16)
    assert raster.levels == (shape[1:],)
    assert raster.spacing == (0.5,) * (len(shape) - 1)
    start, stop = (1,) * (len(shape) - 1), (4,) * (len(shape) - 1)
    box = raster.read((start, stop))
    np.testing.assert_array_equal(box, array[(slice(None), *[slice(1, 4)] * (len(shape) - 1))])
    assert np.shares_memory(box, array)


@pytest.mark.parametrize("box", [((0, 0), (10, 11)), ((-1, 0), (2, 2)), ((2, 2), (2, 3)), ((0, 0, 0), (1, 1, 1))])
def test_refuses_boxes_outside(box) -> None:
    with pytest.raises(ShapeError, match="give start < stop inside the image"):
        ArrayRaster(texture(1, 9, 11)).read(box)


def test_refuses_what_is_no_raster() -> None:
    with pytest.raises(ShapeError, match=r"array of shape \(9, 11\)"):
        ArrayRaster(texture(9, 11))
    with pytest.raises(ShapeError, match=r"spacing \(1.0,\) for 2 axes"):
        ArrayRaster(texture(1, 9, 11), spacing=(1.0,))
    with pytest.raises(ShapeError, match="level 1 of a raster with 1 level"):
        ArrayRaster(texture(1, 9, 11)).read(((0, 0), (1, 1)), level=1)


def test_opens_a_file(tmp_path: Path) -> None:
    image = texture(3, 9, 11)
    write_image(tmp_path / "a.png", image)
    raster = open_raster(tmp_path / "a.png", spacing=(0.1, 0.2))
    np.testing.assert_array_equal(raster.read(((0, 0), raster.shape)), image)
    assert raster.spacing == (0.1, 0.2)
    with pytest.raises(FormatError, match="above the limit of 10 pixels"):
        open_raster(tmp_path / "a.png", max_pixels=10)


def test_levels_are_read_in_level_0_boxes() -> None:
    full = texture(2, 9, 11)
    raster = ArrayRaster(
        full, coarser=[full[:, ::2, ::2][:, :4, :5]]
    )  # stored one pixel short: 9 / 2 and 11 / 2 cut off
    assert raster.levels == ((9, 11), (4, 5))
    assert raster.downsamples == ((1.0, 1.0), (2.0, 2.0))
    assert np.array_equal(raster.read(((0, 2), (4, 6)), 1), full[:, 0:4:2, 2:6:2])
    edge = raster.read(((7, 9), (9, 11)), 1)  # pixels 3..4 and 4..5 of the level: its last ones are repeated
    assert edge.shape == (2, 2, 2)
    assert (edge == full[:, 6:7, 8:9]).all()
    assert raster.read(((8, 10), (9, 11)), 1).shape == (2, 1, 1)


def test_rejects_levels_that_do_not_fall() -> None:
    with pytest.raises(ShapeError, match="give smaller levels"):
        ArrayRaster(texture(1, 9, 11), coarser=[texture(1, 9, 11)])
    with pytest.raises(ShapeError, match=r"level 2 of a raster with 2 levels; give 0 to 1"):
        ArrayRaster(texture(1, 8, 8), coarser=[texture(1, 4, 4)]).read(((0, 0), (2, 2)), 2)


@pytest.mark.parametrize(
    ("full", "level", "expected"),
    [(2967, 741, 4.0), (2967, 742, 4.0), (65537, 257, 256.0), (100, 33, 3.0), (100, 40, 2.5), (7, 7, 1.0)],
)
def test_exact_downsample(full: int, level: int, expected: float) -> None:
    assert exact_downsample(full, level) == expected


def test_describes_what_it_holds(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", texture(3, 9, 11))
    assert describe(open_raster(tmp_path / "a.png", mpp=0.5)) == [
        "reader: image, because it is PNG",
        "samples: 3 channels of uint8",
        "level 0: 9 x 11 pixels, downsample 1, tiles of 9 x 11",
        "mpp: 0.5 um per pixel (given as an argument)",
    ]
    volume = ArrayRaster(texture(1, 4, 5, 6), (3.0, 1.0, 1.0))
    assert describe(volume)[-1] == "spacing: 3 x 1 x 1 mm (given as an argument)"


def test_the_name_of_a_file_means_nothing(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", texture(3, 9, 11))
    (tmp_path / "b.png").rename(tmp_path / "a.svs")
    assert open_raster(tmp_path / "a.svs").shape == (9, 11)
    write_plain(tmp_path / "a.png", picture(100, 90))
    assert len(open_raster(tmp_path / "a.png").levels) == 3
    tifffile.imwrite(tmp_path / "stack.ome.tif", texture(4, 20, 30), metadata={"axes": "ZYX"})
    assert open_raster(tmp_path / "stack.ome.tif").shape == (4, 20, 30)


def test_what_is_no_raster(tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(FormatError, match="is no image that we read"):
        open_raster(tmp_path / "a.geojson")
    with pytest.raises(FormatError, match=r"cannot be read \(No such file or directory\); check the path"):
        open_raster(tmp_path / "missing.svs")
    (tmp_path / "empty.svs").touch()
    with pytest.raises(FormatError, match="is empty"):
        open_raster(tmp_path / "empty.svs")


def test_volumes_and_zarr_go_to_their_readers(tmp_path: Path, monkeypatch) -> None:
    seen = []

    def opener(path: Path, **options: object) -> Raster:
        seen.append((path.name, options))
        return ArrayRaster(texture(1, 2, 2, 2))

    monkeypatch.setattr("foveate.io.volume.open_volume", opener)
    monkeypatch.setattr("foveate.io.ngff.open_zarr", opener)
    for name, head in {
        "a": b"\x5c\x01\0\0",
        "b": b"\0\0\x02\x1c",
        "c": b"\x1f\x8b\x08",
        "d": bytes(128) + b"DICM",
    }.items():
        (tmp_path / name).write_bytes(head + bytes(400))
        open_raster(tmp_path / name, max_pixels=7)
    for folder, inside in {"e": "IM001", "f": "zarr.json", "g": ".zattrs"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / inside).touch()
        open_raster(tmp_path / folder, mpp=1 if folder > "e" else None)
    volume = {"spacing": None, "max_pixels": DEFAULT_MAX_PIXELS}
    (tmp_path / "h").write_bytes(b"PK\x03\x04" + bytes(400))
    open_raster(tmp_path / "h")
    assert seen.pop() == ("h", volume)
    assert seen[:4] == [(name, {**volume, "max_pixels": 7}) for name in "abcd"]
    given = {**volume, "spacing": (1e-3, 1e-3)}
    assert seen[4:] == [("e", volume), ("f", given), ("g", given)]
    with pytest.raises(ConfigError, match=r"mpp=0\.5 for a volume; give spacing in mm along each axis"):
        open_raster(tmp_path / "a", mpp=0.5)
