from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_slides import picture, write_ome, write_plain, write_svs

from foveate.errors import ConfigError
from foveate.io.raster import describe, open_raster
from foveate.io.spacing import aperio_claims, choose, mpp_of, ome_claims


def test_the_argument_goes_before_the_file(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", picture(100, 90))
    assert open_raster(tmp_path / "a.svs").mpp == pytest.approx(0.499)
    assert open_raster(tmp_path / "a.svs", mpp=1).mpp == 1
    raster = open_raster(tmp_path / "a.svs", spacing=(0.001, 0.002))
    assert raster.spacing == (0.001, 0.002)
    assert "mpp: 1.4142 um per pixel (given as an argument)" in describe(raster)


@pytest.mark.parametrize("mpp", [0, -1.0, float("nan"), float("inf"), 0.001, 1000])
def test_absurd_arguments_are_refused(tmp_path: Path, mpp: float) -> None:
    write_plain(tmp_path / "a.tif", picture(100, 90))
    with pytest.raises(ConfigError, match=r"mpp=.*; give um per pixel, 0.01 to 100"):
        open_raster(tmp_path / "a.tif", mpp=mpp)


def test_two_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mpp=0.5 and spacing=\(1.0, 1.0\) say the same thing; give one"):
        choose((), mpp=0.5, spacing=(1.0, 1.0))


@pytest.mark.parametrize("mpp", ["0", "-3", "nan", "7000", "1e999", "..", "0.0001"])
def test_absurd_words_of_a_file_are_noted(tmp_path: Path, mpp: str) -> None:
    write_svs(tmp_path / "a.svs", picture(100, 90), mpp=mpp)
    raster = open_raster(tmp_path / "a.svs")
    assert raster.spacing is None
    assert raster.mpp is None
    lines = describe(raster)
    assert "mpp: unknown; pass --mpp X (mpp=X) where the physical size matters" in lines
    assert lines[-1].startswith("note: vendor (Aperio) says")
    assert lines[-1].endswith("which is not believed")


def test_vendor_then_ome_then_resolution(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", picture(100, 90), resolution=(5000, 5000), resolutionunit="CENTIMETER")
    assert open_raster(tmp_path / "a.svs").mpp == pytest.approx(0.499)
    write_svs(tmp_path / "b.svs", picture(100, 90), mpp="", resolution=(5000, 5000), resolutionunit="CENTIMETER")
    assert open_raster(tmp_path / "b.svs").mpp == pytest.approx(2.0)
    write_ome(tmp_path / "c.tif", picture(100, 90), mpp=0.3, resolution=(5000, 5000), resolutionunit="CENTIMETER")
    raster = open_raster(tmp_path / "c.tif")
    assert "mpp: 0.3 um per pixel (OME)" in describe(raster)


@pytest.mark.parametrize(
    ("resolution", "unit", "spacing"),
    [
        ((40000, 20000), "CENTIMETER", (5e-4, 2.5e-4)),
        ((101600, 101600), "INCH", (2.5e-4, 2.5e-4)),
        ((72, 72), "INCH", None),
        ((96, 96), "INCH", None),
        ((600, 600), "INCH", None),
        ((4000, 4000), "NONE", None),
        ((40000, 1), "CENTIMETER", None),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_resolution_tags(tmp_path: Path, resolution, unit: str, spacing, flat: bool) -> None:
    steps = () if flat else (2,)
    write_plain(tmp_path / "a.tif", picture(100, 90), steps=steps, resolution=resolution, resolutionunit=unit)
    found = open_raster(tmp_path / "a.tif").spacing
    assert found == (None if spacing is None else pytest.approx(spacing))


def test_imagej_names_its_unit_elsewhere(tmp_path: Path) -> None:
    image = np.ascontiguousarray(picture(50, 40)[..., 0])
    tifffile.imwrite(tmp_path / "a.tif", image, imagej=True, resolution=(4, 4), metadata={"unit": "um"})
    assert open_raster(tmp_path / "a.tif").mpp == pytest.approx(0.25)
    tifffile.imwrite(tmp_path / "a.tif", image, imagej=True, resolution=(4, 4), metadata={"unit": "pixel"})
    assert open_raster(tmp_path / "a.tif").mpp is None


def test_ome_units_and_image_numbers() -> None:
    xml = (
        '<OME><Image><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.00025"'
        ' PhysicalSizeYUnit="mm"/></Image><Image><ome:Pixels PhysicalSizeX="2"/></Image></OME>'
    )
    assert ome_claims(xml, 0) == [("OME", 0.25, 0.25)]
    assert ome_claims(xml, 1) == []
    assert ome_claims(xml, 2) == []
    assert choose(ome_claims(xml.replace('"nm"', '"pixel"'), 0)).spacing is None


def test_words_without_a_number() -> None:
    assert aperio_claims("Aperio|AppMag = 20") == []
    assert mpp_of(None) is None
    assert mpp_of((1.0, 1.0, 1.0)) is None
