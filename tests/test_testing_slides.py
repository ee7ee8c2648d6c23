"""Synthetic slides: seeded, exact, the same however they are cut, and slides to those who read slides."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from foveate.errors import BudgetError, FormatError
from foveate.io.raster import open_raster
from foveate.testing import write_slide
from foveate.testing.slides import TUMOUR, SyntheticSlide

Array = NDArray[Any]


def whole(path: Path, level: int = 0) -> Array:
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[level].asarray()


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("slide")
    write_slide(folder / "slide.tif", 2048, mask=folder / "mask.tif", tile=256, mpp=0.5)
    return folder / "slide.tif", folder / "mask.tif"


def test_openslide_and_we_agree(slide: tuple[Path, Path]) -> None:
    raster = open_raster(slide[0])
    with openslide.OpenSlide(slide[0]) as opened:
        assert opened.level_dimensions == ((2048, 2048), (512, 512), (128, 128))
        assert opened.properties["openslide.vendor"] == "aperio"
        assert float(opened.properties["openslide.mpp-x"]) == 0.5
        assert opened.properties["openslide.objective-power"] == "20"
        assert raster.levels == tuple((y, x) for x, y in opened.level_dimensions)
        assert raster.spacing == pytest.approx((0.0005, 0.0005))
        for level in range(3):
            found = np.asarray(opened.read_region((0, 0), level, opened.level_dimensions[level]).convert("RGB"))
            ours = np.moveaxis(raster.read(((0, 0), (2048, 2048)), level), 0, -1)
            assert np.abs(found.astype(int) - ours).mean() < 1  # decoders differ in how they enlarge chroma


def test_levels_are_means_of_the_slide(slide: tuple[Path, Path]) -> None:
    fine, coarse = whole(slide[0]).astype(float), whole(slide[0], 1).astype(float)
    mean = fine.reshape(512, 4, 512, 4, 3).mean(axis=(1, 3))
    assert np.abs(mean - coarse).mean() < 3  # JPEG
    assert abs(mean.mean() - coarse.mean()) < 0.3


def test_mask_is_exact_and_its_levels_agree(slide: tuple[Path, Path]) -> None:
    mask = whole(slide[1])
    exact = SyntheticSlide(2048, 0, 0.43).labels(((0, 0), (2048, 2048)))
    np.testing.assert_array_equal(mask, exact)
    assert set(np.unique(mask)) == {0, 1, 2}
    coarse = whole(slide[1], 1)
    votes = np.stack([(mask == value).reshape(512, 4, 512, 4).sum(axis=(1, 3)) for value in range(3)])
    np.testing.assert_array_equal(np.take_along_axis(votes, coarse[None].astype(int), 0)[0], votes.max(axis=0))
    assert open_raster(slide[1], want="values").spacing == pytest.approx((0.0005, 0.0005))


def test_classes_look_different(slide: tuple[Path, Path]) -> None:
    picture, mask = whole(slide[0]).astype(float), whole(slide[1])
    glass, tissue, tumour = (picture[mask == value] for value in range(3))
    assert glass.mean() > 235
    assert 0.5 < glass.std(axis=0).mean() < 6
    assert tissue.std(axis=0).mean() > 15
    assert tumour.std(axis=0).mean() > 15
    assert tissue[:, 0].mean() - tissue[:, 2].mean() > 15 > tumour[:, 0].mean() - tumour[:, 2].mean()


@pytest.mark.parametrize(("seed", "tissue"), [(0, 0.43), (1, 0.43), (2, 0.1), (3, 0.75)])
def test_share_of_tissue(seed: int, tissue: float) -> None:
    labels = SyntheticSlide(1500, seed, tissue).labels(((0, 0), (1500, 1500)))
    assert not isinstance(labels, int)
    assert abs((labels > 0).mean() - tissue) < 0.02
    assert 0.1 < (labels == TUMOUR).sum() / (labels > 0).sum() < 0.2


def test_any_cut_gives_the_same_pixels() -> None:
    """Also where a part is recognised as being of one class."""
    made = SyntheticSlide(1024, 4, 0.5)
    box = ((0, 0), (1024, 1024))
    labels, pixels = made.labels(box), made.pixels(box)
    assert not isinstance(labels, int)
    constant = 0
    for side in (64, 200, 333):
        for y in range(0, 1024, side):
            for x in range(0, 1024, side):
                part = ((y, x), (min(y + side, 1024), min(x + side, 1024)))
                where = (slice(y, y + side), slice(x, x + side))
                found = made.labels(part)
                constant += isinstance(found, int)
                assert (labels[where] == found).all()
                np.testing.assert_array_equal(made.pixels(part), pixels[(slice(None), *where)])
    assert constant > 50


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed, workers in (("a", 7, 1), ("b", 7, 3), ("c", 8, 1)):
        write_slide(
            tmp_path / f"{name}.tif", 600, seed=seed, tile=128, mask=tmp_path / f"{name}m.tif", num_workers=workers
        )
    a, b, c = ((tmp_path / f"{name}.tif").read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "am.tif").read_bytes() == (tmp_path / "bm.tif").read_bytes()


def test_ome_by_suffix(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.ome.tif", 700, tile=128)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert [level.shape for level in tiff.series[0].levels] == [(700, 700, 3), (175, 175, 3), (44, 44, 3)]
    raster = open_raster(path)
    assert raster.spacing == pytest.approx((0.00025, 0.00025))
    assert raster.levels == ((700, 700), (175, 175), (44, 44))


def test_command_line_makes_folders_and_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "foveate.testing", "a/s.tif", "--side", "300", "--mask", "b/m.tif"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert whole(tmp_path / "a/s.tif").shape == (300, 300, 3)
    assert whole(tmp_path / "b/m.tif").shape == (300, 300)
    again = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert re.match(r"python -m foveate\.testing: error: .*exists already; ", again.stderr)


def test_bad_requests_say_the_rule(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"side=100, tissue=0\.43; the side is at least 256, the tissue from 0\.05 to"
    ):
        write_slide(tmp_path / "a.tif", 100)
    with pytest.raises(BudgetError, match=r"tissue=0\.9;"):
        write_slide(tmp_path / "a.tif", 512, tissue=0.9)
    (tmp_path / "a.tif").write_bytes(b"mine")
    with pytest.raises(FormatError, match="exists already"):
        write_slide(tmp_path / "a.tif", 512, mask=tmp_path / "m.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
