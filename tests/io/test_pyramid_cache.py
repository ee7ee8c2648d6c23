"""Coarse levels are made once, are right, and survive damage and company."""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from make_files import texture
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError
from foveate.io import pyramid_cache
from foveate.io.pyramid_cache import with_levels
from foveate.io.raster import ArrayRaster, Raster, describe, fits_whole, is_held, open_raster
from foveate.tasks.source import is_large

Array = NDArray[Any]
SHAPE = (2900, 2310)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lets a small file count as large, and keeps caches out of the user's."""
    monkeypatch.setattr("foveate.io.raster.READ_WHOLE", 2**16)
    monkeypatch.setattr(pyramid_cache, "_COARSEST", 2**16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image_of(channels: int = 3, dtype: str = "uint8") -> Array:
    return np.stack([np.roll(texture(*SHAPE, dtype=dtype), 100 * c, axis=1) for c in range(channels)])


def flat(path: Path, image: Array, **options: Any) -> Raster:
    rgb = len(image) == 3
    tifffile.imwrite(
        path, np.moveaxis(image, 0, -1) if rgb else image, photometric="rgb" if rgb else "minisblack",
        planarconfig=None if rgb or len(image) == 1 else "separate", **({"tile": (240, 256)} | options),
    )  # fmt: skip
    return open_raster(path)


def expected_levels(image: Array) -> list[Array]:
    levels, ratio = [], 4
    while not levels or max(levels[-1].shape[1:]) > 512:
        base = levels[-1] if levels else image
        height, width = base.shape[1:]
        base = np.pad(base, [(0, 0), (0, -height % ratio), (0, -width % ratio)], mode="edge").astype(np.float64)
        rows, columns = base.shape[1] // ratio, base.shape[2] // ratio
        mean = base.reshape(len(base), rows, ratio, columns, ratio).mean(axis=(2, 4))
        levels.append((mean if image.dtype.kind == "f" else np.rint(mean)).astype(image.dtype))
        ratio = 2
    return levels


def whole(raster: Raster, level: int) -> Array:
    return raster.read(((0, 0), raster.shape), level)


@pytest.mark.parametrize(
    ("channels", "dtype", "options"),
    [
        (3, "uint8", {}),
        (3, "uint8", {"tile": None, "rowsperstrip": 7}),
        (1, "uint16", {"compression": "zlib"}),
        (4, "uint16", {}),
        (2, "float32", {"tile": None, "rowsperstrip": 100, "compression": "zlib"}),
    ],
)
def test_levels_are_area_means(tmp_path: Path, channels: int, dtype: str, options: Any) -> None:
    image = image_of(channels, dtype)
    raster = with_levels(flat(tmp_path / "a.tif", image, **options))
    assert isinstance(raster, Raster)
    assert raster.levels == (SHAPE, (725, 578), (363, 289))
    assert raster.downsamples == ((1.0, 1.0), (4.0, 4.0), (8.0, 8.0))
    assert (raster.channels, raster.dtype) == (channels, image.dtype)
    np.testing.assert_array_equal(whole(raster, 0), image)
    for level, expected in enumerate(expected_levels(image), 1):
        found = whole(raster, level)
        side = expected.shape[1:]
        np.testing.assert_allclose(found[:, : side[0], : side[1]], expected, rtol=1e-6)
    box = ((1001, 333), (1777, 2001))
    np.testing.assert_allclose(raster.read(box, 1), expected_levels(image)[0][:, 250:445, 83:501], rtol=1e-6)


def test_a_flat_zarr_gets_levels_too(tmp_path: Path) -> None:
    image = image_of(3)
    zarr.create_array(tmp_path / "a.zarr", data=image, chunks=(3, 512, 512), dimension_names=["c", "y", "x"])
    raster = with_levels(open_raster(tmp_path / "a.zarr"))
    assert is_large(raster)
    for level, wanted in enumerate(expected_levels(image), 1):
        np.testing.assert_array_equal(whole(raster, level), wanted)
    (kept,) = (tmp_path / "cache" / "foveate").iterdir()
    assert any(str(kept) in line for line in describe(raster))
    made = kept.stat().st_mtime_ns
    with_levels(open_raster(tmp_path / "a.zarr"))
    assert kept.stat().st_mtime_ns == made


def test_cache_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of()
    first = with_levels(flat(tmp_path / "a.tif", image))
    (cache,) = (tmp_path / "cache" / "foveate").iterdir()
    before = cache.stat()
    monkeypatch.setattr(pyramid_cache, "write_pyramid", None)
    second = with_levels(open_raster(tmp_path / "a.tif"))
    np.testing.assert_array_equal(whole(second, 1), whole(first, 1))
    assert cache.stat().st_mtime_ns == before.st_mtime_ns
    again = pickle.loads(pickle.dumps(second))
    np.testing.assert_array_equal(whole(again, 2), whole(first, 2))
    assert "kept in" in again.about.notes[-1]


def test_changed_file_gets_new_levels(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    image = image_of()
    with_levels(flat(path, image))
    raster = with_levels(flat(path, 255 - image))
    np.testing.assert_array_equal(whole(raster, 1)[:, :725, :578], expected_levels(255 - image)[0])


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "gone"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_damaged_cache_is_made_again(tmp_path: Path, damage: str, when: str) -> None:
    image = image_of()
    raster = with_levels(flat(tmp_path / "a.tif", image), tmp_path / "levels")
    (cache,) = (tmp_path / "levels").iterdir()
    if damage == "truncated":
        os.truncate(cache, cache.stat().st_size * 2 // 3)
    elif damage == "gone":
        cache.unlink()
    else:
        cache.write_bytes(b"" if damage == "empty" else b"II*\0 no TIFF after all")
    if when == "before":
        raster = with_levels(open_raster(tmp_path / "a.tif"), tmp_path / "levels")
    np.testing.assert_array_equal(whole(raster, 1)[:, :725, :578], expected_levels(image)[0])
    assert len(list((tmp_path / "levels").iterdir())) == 1


def test_two_processes_at_once(tmp_path: Path) -> None:
    image = image_of(1)
    flat(tmp_path / "a.tif", image)
    code = (
        "from foveate.io import pyramid_cache, raster\n"
        "raster.READ_WHOLE = pyramid_cache._COARSEST = 2**16\n"
        "from foveate.io.raster import open_raster\n"
        "raster = pyramid_cache.with_levels(open_raster('a.tif'), 'levels')\n"
        "print(int(raster.read(((0, 0), raster.shape), 1).astype('int64').sum()))\n"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    total = str(int(np.pad(expected_levels(image)[0], 0).astype(np.int64).sum()))
    assert [run.communicate()[0].strip() for run in runs] == [total] * 3
    assert len(list((tmp_path / "levels").iterdir())) == 1


def test_enough_levels_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of(1)
    enough = ArrayRaster(image, coarser=[image[:, ::8, ::8], image[:, ::16, ::16]])
    assert with_levels(enough) is enough
    volume = ArrayRaster(np.zeros((1, 8, 300, 300), np.uint8))
    assert with_levels(volume) is volume
    monkeypatch.setattr(pyramid_cache, "_COARSEST", 2**24)
    small = OnDisk(image)
    assert with_levels(small) is small


@pytest.mark.parametrize("more", [0, 1])
def test_what_is_read_whole_needs_no_levels_and_what_is_not_gets_them(
    more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.io.raster.READ_WHOLE", math.prod(SHAPE) - more)
    raster = flat(tmp_path / "a.tif", image_of(1))
    whole = not more
    assert fits_whole(SHAPE) is whole
    assert is_held(raster) is whole
    assert is_large(raster) is not whole
    assert (with_levels(raster) is raster) is whole


class OnDisk(ArrayRaster):
    """An array that says it comes from a file of tiles."""

    path: Path | None = None

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        return 256, 256


def test_gap_between_levels_is_filled(tmp_path: Path) -> None:
    image = image_of(1)
    raster = OnDisk(image, coarser=[image[:, ::2, ::2], image[:, ::32, ::32]])
    raster.path = tmp_path / "a.bin"
    raster.path.write_bytes(b"x")
    filled = with_levels(raster)
    assert filled.levels == (SHAPE, (1450, 1155), (363, 289))
    assert filled.downsamples == ((1.0, 1.0), (2.0, 2.0), (8.0, 8.0))
    np.testing.assert_array_equal(whole(filled, 1), image[:, ::2, ::2])
    np.testing.assert_array_equal(whole(filled, 2), expected_levels(image[:, ::2, ::2])[0])


def test_raster_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a raster of \(2900, 2310\) has too few levels and no file to keep them"):
        with_levels(OnDisk(image_of(1)))


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raster = flat(tmp_path / "a.tif", image_of(1))
    with pytest.raises(FormatError, match=r"file/levels: cannot keep coarse levels \(Not a directory\); set XDG_CACHE"):
        with_levels(raster, tmp_path / "file" / "levels")
