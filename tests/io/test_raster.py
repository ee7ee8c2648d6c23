from pathlib import Path

import numpy as np
import pytest
from make_files import texture

from foveate.errors import FormatError, ShapeError
from foveate.geometry.source import exact_downsample
from foveate.io.raster import ArrayRaster, Raster, open_raster
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
    ("full", "level", "expected"), [(2967, 741, 4.0), (2967, 742, 4.0), (100, 33, 3.0), (100, 40, 2.5), (7, 7, 1.0)]
)
def test_exact_downsample(full: int, level: int, expected: float) -> None:
    assert exact_downsample(full, level) == expected
