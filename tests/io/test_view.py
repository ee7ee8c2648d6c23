import pickle
from pathlib import Path

import numpy as np
import pytest
from make_files import Array, texture
from make_slides import first, picture, write_svs

from foveate.errors import ConfigError, ShapeError
from foveate.io.kernels_resize import blend_slow
from foveate.io.raster import ArrayRaster, Raster, describe, open_raster
from foveate.io.view import View, _blend, _taps, at_mpp


def whole(raster: Raster, level: int = 0) -> Array:
    return raster.read(((0, 0), raster.shape), level)


def area_means(plane: Array, height: int, width: int) -> Array:
    """The exact mean over each pixel of another grid, by integrating twice."""
    for axis, count in ((0, height), (1, width)):
        sums = np.cumsum(np.concatenate([np.zeros_like(plane.take([0], axis)), plane], axis), axis)
        side = plane.shape[axis]
        edges = np.linspace(0, side, count + 1)
        low = np.minimum(edges.astype(int), side - 1)
        at = sums.take(low, axis) + np.expand_dims(edges - low, 1 - axis) * plane.take(low, axis)
        plane = np.diff(at, axis=axis) * count / side
    return plane


@pytest.mark.parametrize("mpp", [0.31, 0.5, 0.75, 1.3, 2.0])
def test_shrinking_is_the_exact_mean(mpp: float) -> None:
    image = texture(3, 201, 157, dtype="float32")
    view = at_mpp(ArrayRaster(image, (0.25e-3, 0.25e-3)), mpp)
    height, width = round(201 * 0.25 / mpp), round(157 * 0.25 / mpp)
    assert view.shape == (height, width)
    assert view.spacing == pytest.approx((0.25e-3 * 201 / height, 0.25e-3 * 157 / width))
    expected = np.stack([area_means(plane.astype(np.float64), height, width) for plane in image])
    np.testing.assert_allclose(whole(view), expected, atol=1e-5)


def test_pixel_frames_map_linearly() -> None:
    ramp = np.broadcast_to(np.arange(400, dtype=np.float32) + 0.5, (1, 300, 400))  # the place of each pixel's centre
    source = ArrayRaster(ramp, (1e-3, 1e-3), coarser=[ramp.reshape(1, 75, 4, 100, 4).mean((2, 4))])
    for mpp in (0.3, 0.7, 1.7, 3.9, 4.0, 4.1, 9.0):
        view = at_mpp(source, mpp)
        for level in range(len(view.levels)):
            width = view.levels[level][1]
            step = 400 / view.shape[1] * view.downsamples[level][1]
            inner = slice(3, width - 3) if level == 0 else slice(0, width - 1)
            expected = (np.arange(width) + 0.5) * step
            difference = whole(view, level)[0, 0, inner] - expected[inner]
            assert np.abs(difference).max() < 0.1 * step  # steps of whole pixels below
            assert abs(difference.mean()) < 0.01 * step


@pytest.mark.parametrize("mpp", [0.2, 0.6, 1.1, 2.3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_windows_fit_together(mpp: float, dtype: str) -> None:
    image = texture(2, 203, 157, dtype=dtype)
    view = at_mpp(ArrayRaster(image, (0.25e-3, 0.25e-3), coarser=[image[:, ::3, ::3]]), mpp)
    assert view.dtype == np.dtype(dtype)
    for level, (height, width) in enumerate(view.levels):
        full, step = whole(view, level), int(view.downsamples[level][0])
        assert full.shape == (2, height, width)
        for top in range(0, height, 7):
            for left in range(0, width, 11):
                low = (top * step, left * step)
                high = (min((top + 7) * step, view.shape[0]), min((left + 11) * step, view.shape[1]))
                assert np.array_equal(view.read((low, high), level), full[:, top : top + 7, left : left + 11])


def test_levels_are_powers_of_four() -> None:
    view = View(ArrayRaster(texture(1, 400, 300)), (133, 100))
    assert view.downsamples == ((1.0, 1.0), (4.0, 4.0), (16.0, 16.0))
    assert view.levels == ((133, 100), (34, 25), (9, 7))
    assert view.tile_shape() == (133, 100)


def test_slide_at_another_mpp(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", picture(301, 203), steps=(4,))
    raster = open_raster(tmp_path / "a.svs", mpp=0.5)
    assert at_mpp(raster, 0.5) is raster
    assert at_mpp(raster, 0.5004) is raster
    view = at_mpp(raster, 1)
    assert view.shape == (150, 102)
    assert view.tile_shape() == (64, 64)
    assert whole(view).shape == (3, 150, 102)
    assert describe(view)[-1] == "note: a view of 301 x 203 pixels"
    copy = pickle.loads(pickle.dumps(view))
    assert np.array_equal(whole(copy), whole(view))


def test_labels_keep_their_values() -> None:
    labels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, np.ones((10, 10), np.uint8))[None]
    raster = ArrayRaster(labels, (1e-3, 1e-3))
    assert np.array_equal(whole(at_mpp(raster, 10, nearest=True)), labels[:, ::10, ::10])
    assert np.array_equal(whole(at_mpp(raster, 0.5, nearest=True)), labels.repeat(2, 1).repeat(2, 2))
    assert set(np.unique(whole(at_mpp(raster, 3.7, nearest=True)))) <= set(np.unique(labels))


def test_broken_tiles_are_in_pixels_of_the_view() -> None:
    raster = ArrayRaster(texture(1, 100, 100), (1e-3, 1e-3))
    raster.broken = [((10, 20), (30, 41))]  # type: ignore[attr-defined]
    view = at_mpp(raster, 2)
    assert isinstance(view, View)
    assert view.broken == [((5, 10), (15, 21))]


def test_unknown_or_absurd_resolutions() -> None:
    with pytest.raises(ConfigError, match=r"mpp=0.5 of an image whose pixel size nobody said; pass --mpp X"):
        at_mpp(ArrayRaster(texture(1, 10, 10)), 0.5)
    with pytest.raises(ConfigError, match=r"mpp=0\.0; give um per pixel"):
        at_mpp(ArrayRaster(texture(1, 10, 10), (1.0, 1.0)), 0.0)
    with pytest.raises(ConfigError, match="only planes are shown at another mpp"):
        at_mpp(ArrayRaster(texture(1, 4, 10, 10), (1.0, 1.0, 1.0)), 1)
    with pytest.raises(ShapeError, match="give two sides of at least 1, of a plane"):
        View(ArrayRaster(texture(1, 10, 10)), (0, 4))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "int32", "bool"])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7, 4.0])
def test_kernel_equals_its_twin(dtype: str, scale: float) -> None:
    source = first(picture(30, 40, dtype="uint8")).transpose(1, 2, 0)
    source = source > 99 if dtype == "bool" else source.astype(dtype)
    y = _taps(2, int(29 / scale), scale, 30, 30.0, False)
    x = _taps(0, int(40 / scale), scale, 40, 40.0, False)
    expected = blend_slow(source, *y, *x)
    expected = expected if dtype.startswith("float") else np.rint(expected)
    difference = np.abs(_blend(source, *y, *x).astype(np.float64) - expected)
    assert difference.max() <= (1e-4 if dtype.startswith("float") else 1)
    assert np.count_nonzero(difference > 1e-4) < difference.size / 100  # ties that round either way
