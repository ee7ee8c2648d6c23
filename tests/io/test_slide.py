import pickle
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from make_slides import first, picture, write_svs, write_trestle

from foveate.errors import FormatError
from foveate.io.raster import describe, open_raster
from foveate.io.slide import SlideRaster


def test_a_vendor_slide_goes_to_openslide(tmp_path: Path) -> None:
    image = picture(200, 190)
    write_trestle(tmp_path / "a.tif", image)
    raster = open_raster(tmp_path / "a.tif")
    assert describe(raster)[0] == (
        "reader: OpenSlide (trestle), because it is a trestle slide, whose levels tifffile does not put together"
    )
    assert (raster.channels, raster.dtype, raster.shape) == (3, np.dtype(np.uint8), (200, 190))
    assert np.array_equal(raster.read(((10, 30), (150, 190))), first(image)[:, 10:150, 30:190])
    copy = pickle.loads(pickle.dumps(raster))
    assert np.array_equal(copy.read(((199, 0), (200, 190))), first(image)[:, 199:])


def test_levels_are_those_of_openslide(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", picture(301, 203), steps=(4,))
    raster = SlideRaster(tmp_path / "a.svs")
    assert raster.levels == ((301, 203), (75, 50))
    assert raster.downsamples[1] == (4.0, 4.0)
    assert raster.mpp == pytest.approx(0.499)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        expected = first(np.asarray(slide.read_region((0, 0), 1, (50, 75)))[..., :3])
    seen = raster.read(((0, 0), (301, 203)), 1)
    assert seen.shape == (3, 76, 51)  # a pixel short as stored: the last one is repeated
    assert np.array_equal(seen[:, :64, :50], expected[:, :64])
    # its downsample is 301 / 75 and 203 / 50 in the mean, so that further tiles lie between its pixels
    assert np.abs(seen[:, 64:75, :50].astype(int) - expected[:, 64:]).mean() < 6


def test_broken_tile_of_openslide(tmp_path: Path) -> None:
    image = picture(300, 290)
    path = tmp_path / "a.svs"
    write_svs(path, image)
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start : start + 40] = b"\x77" * 40
    path.write_bytes(data)
    raster = SlideRaster(path)
    with pytest.raises(FormatError, match=r"tile at row 0, column 0 of level 0 is broken .*pass --broken fill"):
        raster.read(((0, 0), (300, 290)))
    raster = SlideRaster(path, broken="fill")
    assert (raster.read(((0, 0), (100, 290)))[:, :64, :64] == 255).all()
    assert raster.broken == [((0, 0), (64, 64))]
    assert raster.read(((200, 0), (300, 290))).std() > 0


@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_truncated(tmp_path: Path, percent: int) -> None:
    write_trestle(tmp_path / "a.tif", picture(200, 190))
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) * percent // 100])
    with pytest.raises(FormatError) as error:
        open_raster(tmp_path / "a.tif").read(((0, 0), (200, 190)))
    assert "\n" not in str(error.value)


def test_no_slide_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"no slide at all")
    with pytest.raises(FormatError, match="truncated or corrupt SLIDE"):
        SlideRaster(tmp_path / "a.svs")


def test_a_level_without_pixels(tmp_path: Path) -> None:
    write_trestle(tmp_path / "a.tif", picture(200, 190))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages.first.tags[257].valueoffset
    with (tmp_path / "a.tif").open("r+b") as out:
        out.seek(at)
        out.write(bytes(2))
    with pytest.raises(FormatError):
        open_raster(tmp_path / "a.tif")
