"""Pyramids hold what was asked for, at every level, for readers that are not ours."""

import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError, ShapeError
from foveate.io.pyramid import write_pyramid

Array = NDArray[Any]
SHAPE = (1037, 777)


def blocks(shape: tuple[int, int] = SHAPE, dtype: str = "uint8", channels: int = 1) -> Array:
    """Labels or pixels in large areas with some fine ones, none of them symmetric."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    coarse = (y // 190 + 2 * (x // 250)) % 5
    fine = (x * y // 7) % 5
    plane = np.where((y < 300) & (x > 500), fine, coarse)
    return np.stack([plane * (c + 1) * (1 if dtype == "uint8" else 1000) for c in range(channels)]).astype(dtype)


def asking(array: Array, asked: list[Any] | None = None) -> Callable[[Any], Any]:
    def tiles(box: Any) -> Array | int:
        if asked is not None:
            asked.append(box)
        part = array[:, box[0][0] : box[1][0], box[0][1] : box[1][1]]
        return int(part.flat[0]) if (part == part.flat[0]).all() else part

    return tiles


def half(array: Array, reduce: str, ratio: int = 2) -> Array:
    """The next level, pixel by pixel."""
    short = [(0, 0), *((0, -side % ratio) for side in array.shape[1:])]
    array = np.pad(array, short, mode="edge")
    channels, height, width = array.shape
    cells = array.reshape(channels, height // ratio, ratio, width // ratio, ratio)
    cells = cells.transpose(0, 1, 3, 2, 4).reshape(channels, height // ratio, width // ratio, ratio * ratio)
    if reduce == "mean":
        mean = cells.mean(axis=-1)
        return (mean if array.dtype.kind == "f" else np.rint(mean)).astype(array.dtype)
    votes = (cells[..., :, None] == cells[..., None, :]).sum(axis=-1)
    return np.take_along_axis(cells, votes.argmax(axis=-1)[..., None], axis=-1)[..., 0]


def levels_of(path: Path) -> list[Array]:
    with tifffile.TiffFile(path) as tiff:
        return [level.asarray() for level in tiff.series[0].levels]


@pytest.mark.parametrize("kind", ["ome", "tiff"])
@pytest.mark.parametrize("shape", [SHAPE, (64, 64), (1, 1), (1, 300), (130, 65)])
def test_labels_come_back_at_every_level(tmp_path: Path, kind: Any, shape: tuple[int, int]) -> None:
    labels = blocks(shape)
    asked: list[Any] = []
    path = write_pyramid(tmp_path / "a.tif", asking(labels, asked), shape=shape, dtype=np.uint8, tile=64, kind=kind)
    assert len(asked) == -(-shape[0] // 64) * -(-shape[1] // 64)
    assert asked == sorted(asked)
    with tifffile.TiffFile(path) as tiff:
        assert not tiff.is_bigtiff
        pages = [tiff.pages[0], *tiff.pages[0].pages] if kind == "ome" and max(shape) > 64 else list(tiff.pages)
        found = [page.asarray() for page in pages]
        assert [page.subfiletype for page in pages] == [0] + [1] * (len(pages) - 1)
        assert all(page.is_tiled for page in pages)
    assert max(found[-1].shape) <= 64 < max(found[-2].shape if len(found) > 1 else (65,))
    expected = labels
    for level in found:
        np.testing.assert_array_equal(level, expected[0])
        expected = half(expected, "mode")


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_images_are_averaged(tmp_path: Path, ratio: int, dtype: str) -> None:
    image = blocks((523, 401), dtype)
    path = write_pyramid(
        tmp_path / "a.ome.tif", asking(image), shape=(523, 401), dtype=dtype, tile=64, ratio=ratio, reduce="mean"
    )
    expected = image
    found = levels_of(path)
    assert len(found) >= 2
    for level in found:
        assert level.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(level, expected[0])
        expected = half(expected, "mean", ratio)


def test_means_do_not_drift() -> None:
    """Halves go to even, so that a noisy plane is as bright at the last level as at the first."""
    from foveate.io.pyramid_tiles import shrink

    noise = np.random.default_rng(0).integers(60, 200, (1, 512, 512), np.uint8)
    level: Any = noise
    for _ in range(3):
        level = shrink(level, 2, "mean")
    assert abs(float(level.mean()) - float(noise.mean())) < 0.05


@pytest.mark.parametrize("kind", ["ome", "tiff"])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_channels_stay_apart(tmp_path: Path, kind: Any, channels: int) -> None:
    image = blocks(SHAPE, "uint16", channels)
    path = write_pyramid(
        tmp_path / "a.tif", asking(image), shape=SHAPE, dtype=np.uint16, channels=channels, tile=128, kind=kind,
        names=[f"marker {c}" for c in range(channels)],
    )  # fmt: skip
    expected = image
    for level in levels_of(path):
        np.testing.assert_array_equal(level, expected)
        expected = half(expected, "mode")


@pytest.mark.parametrize("kind", ["ome", "tiff"])
@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_colours_lie_side_by_side(tmp_path: Path, kind: Any, compression: Any) -> None:
    image = blocks(SHAPE, "uint8", 3) * np.array([9, 11, 15], np.uint8)[:, None, None]
    image[:, :300, 500:] = 40
    path = write_pyramid(
        tmp_path / "a.tif", asking(image), shape=SHAPE, dtype=np.uint8, channels=3, tile=64, kind=kind, reduce="mean",
        compression=compression,
    )  # fmt: skip
    found = levels_of(path)
    assert found[0].shape == (*SHAPE, 3)
    difference = np.abs(found[0].astype(int) - image.transpose(1, 2, 0))
    assert difference.mean() < 2 if compression == "jpeg" else difference.max() == 0


def test_openslide_reads_the_plain_kind(tmp_path: Path) -> None:
    image = np.repeat(blocks() * 40, 3, axis=0)
    path = write_pyramid(
        tmp_path / "a.tif", asking(image), shape=SHAPE, dtype=np.uint8, channels=3, tile=64, kind="tiff",
        reduce="mean", spacing=(0.0005, 0.00025),
    )  # fmt: skip
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-6)
        expected = image
        for level, (width, height) in enumerate(slide.level_dimensions):
            assert (height, width) == expected.shape[1:]
            found = np.asarray(slide.read_region((0, 0), level, (width, height)).convert("RGB"))
            np.testing.assert_array_equal(found.transpose(2, 0, 1), expected)
            expected = half(expected, "mean")
        assert slide.level_count == 6
        part = np.asarray(slide.read_region((301, 777), 0, (100, 100)).convert("RGB"))
        np.testing.assert_array_equal(part.transpose(2, 0, 1), image[:, 777:877, 301:401])


def test_ome_says_what_it_holds(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.ome.tif", asking(blocks(SHAPE, "uint16", 2)), shape=SHAPE, dtype=np.uint16, channels=2, tile=64,
        spacing=(0.0005, 0.00025), names=("glass", "tissue"),
    )  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert tiff.series[0].axes == "CYX"
        assert len(tiff.pages) == 2
        assert all(len(page.subifds) == 5 for page in tiff.pages)
        root = xml.etree.ElementTree.fromstring(tiff.ome_metadata)
        assert tiff.pages[0].get_resolution("MICROMETER") == pytest.approx((4.0, 2.0), rel=1e-6)
    pixels = root.find(".//{*}Pixels")
    assert pixels is not None
    wanted = {
        "SizeX": "777", "SizeY": "1037", "SizeC": "2", "SizeZ": "1", "SizeT": "1", "Type": "uint16",
        "PhysicalSizeX": "0.25", "PhysicalSizeXUnit": "µm", "PhysicalSizeY": "0.5", "PhysicalSizeYUnit": "µm",
    }  # fmt: skip
    assert {name: pixels.get(name) for name in wanted} == wanted
    assert [channel.get("Name") for channel in root.findall(".//{*}Channel")] == ["glass", "tissue"]


def test_number_of_levels_can_be_given(tmp_path: Path) -> None:
    for levels, expected in ((1, 1), (3, 3), (99, 6)):
        path = tmp_path / f"{levels}.ome.tif"
        write_pyramid(path, lambda box: 1, shape=SHAPE, dtype=np.uint8, tile=64, levels=levels)
        assert len(levels_of(path)) == expected


def test_threads_change_nothing(tmp_path: Path) -> None:
    for workers in (1, 3):
        write_pyramid(
            tmp_path / f"{workers}.tif", asking(blocks()), shape=SHAPE, dtype=np.uint8, tile=64,
            num_workers=workers,
        )  # fmt: skip
    assert (tmp_path / "1.tif").read_bytes() == (tmp_path / "3.tif").read_bytes()


def test_huge_constant_mask_is_quick_and_small(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.ome.tif", lambda box: 2, shape=(60000, 50001), dtype=np.uint8, tile=1024)
    assert path.stat().st_size < 2**23
    with tifffile.TiffFile(path) as tiff:
        assert tiff.series[0].shape == (60000, 50001)
        assert (tiff.series[0].levels[-1].asarray() == 2).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": (0, 5)}, ShapeError, r"shape \(0, 5\) of 1 channels, uint8; give \(H, W\) above 0 and numbers"),
        ({"tile": 40}, ConfigError, r"tile=40, ratio=2; a tile is a multiple of 16, a ratio is 2, 4 or 8"),
        ({"ratio": 3}, ConfigError, r"tile=64, ratio=3; a tile is a multiple of 16"),
        (
            {"compression": "jpeg"},
            ConfigError,
            r"compression='jpeg' for 1 channels of uint8, reduce='mode'; use 'zlib'",
        ),
        ({"tiles": lambda box: 256}, ShapeError, r"tile \(\(0, 0\), \(64, 64\)\) is 256, which uint8 cannot hold"),
        (
            {"tiles": lambda box: np.zeros((1, 64, 63), np.uint8)},
            ShapeError,
            r"is uint8 \(1, 64, 63\); give uint8 \(1, 64, 64\), or one number",
        ),
    ],
)
def test_bad_requests_say_the_rule(tmp_path: Path, options: Any, error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"tiles": lambda box: 0, "shape": SHAPE, "dtype": np.uint8, "tile": 64}
    with pytest.raises(error, match=message):
        write_pyramid(tmp_path / "a.tif", **(given | options))
    assert not any(tmp_path.iterdir())


def test_existing_file_is_refused_before_work(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"mine")
    asked: list[Any] = []
    with pytest.raises(FormatError, match="exists already"):
        write_pyramid(path, asking(blocks(), asked), shape=SHAPE, dtype=np.uint8)
    assert path.read_bytes() == b"mine"
    assert not asked
    write_pyramid(path, asking(blocks()), shape=SHAPE, dtype=np.uint8, overwrite=True)
    np.testing.assert_array_equal(levels_of(path)[0], blocks()[0])


@pytest.mark.parametrize("spool", ["None", "'spool'"])
@pytest.mark.parametrize("limit", [1000, 125_000])
def test_full_disk_leaves_nothing(tmp_path: Path, spool: str, limit: int) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "import numpy as np\nfrom foveate.errors import FormatError\nfrom foveate.io.pyramid import write_pyramid\n"
        "noise = np.random.default_rng(0).integers(0, 255, (1, 400, 256), np.uint8)\n"
        "part = lambda box: noise[:, box[0][0]:box[1][0], box[0][1]:box[1][1]]\n"
        f"try: write_pyramid('a.tif', part, shape=(400, 256), dtype=np.uint8, tile=64, spool={spool})\n"
        "except FormatError as error: assert 'File too large' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != "spool"]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="create the folder first"):
        write_pyramid(tmp_path / "no" / "a.tif", lambda box: 0, shape=SHAPE, dtype=np.uint8)
