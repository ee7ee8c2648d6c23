import multiprocessing
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from make_slides import Array, first, halved, picture, write_ome, write_plain, write_svs

from foveate.errors import ConfigError, FormatError
from foveate.io.pyramid import write_pyramid
from foveate.io.raster import Raster, describe, open_raster
from foveate.io.tiff import check_chain
from foveate.io.tile_cache import TileCache


def whole(raster: Raster, level: int = 0) -> Array:
    return raster.read(((0, 0), raster.shape), level)


def shown_by_openslide(path: Path, level: int) -> Array:
    with openslide.OpenSlide(path) as slide:
        return first(np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3])


def assert_levels(raster: Raster, levels: list[Array]) -> None:
    assert raster.levels == tuple(level.shape[1:] for level in levels)
    for number, level in enumerate(levels):
        height, width = level.shape[1:]
        seen = whole(raster, number)[:, :height, :width].astype(np.float64)
        assert np.abs(seen - level).max() == 0


def test_aperio_is_what_openslide_shows(tmp_path: Path) -> None:
    levels = write_svs(tmp_path / "a.svs", picture(301, 203), steps=(4,))
    raster = open_raster(tmp_path / "a.svs")
    assert raster.levels == ((301, 203), (75, 50))  # neither thumbnail nor label
    assert raster.downsamples == ((1.0, 1.0), (4.0, 4.0))
    assert raster.mpp == pytest.approx(0.499)
    for number, level in enumerate(levels):
        seen = whole(raster, number)[:, : level.shape[0], : level.shape[1]].astype(np.int64)
        assert np.abs(seen - shown_by_openslide(tmp_path / "a.svs", number)).max() <= 1
        assert np.abs(seen - first(level)).mean() < 12  # noise in each channel, halved chroma
    assert describe(raster)[0] == "reader: tifffile (svs), because it is an Aperio slide, one plain pyramid of tiles"


@pytest.mark.parametrize("steps", [(2, 4), (3,), (3, 7)])
def test_plain_pyramid_of_odd_sides(tmp_path: Path, steps: tuple[int, ...]) -> None:
    levels = write_plain(tmp_path / "a.tif", picture(211, 333), steps=steps)
    raster = open_raster(tmp_path / "a.tif")
    assert_levels(raster, [first(level) for level in levels])
    assert raster.downsamples == tuple((float(step), float(step)) for step in (1, *steps))
    for number, level in enumerate(levels):
        assert np.array_equal(shown_by_openslide(tmp_path / "a.tif", number), first(level))


@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint16"), (3, "uint8"), (1, "uint16"), (7, "float32")])
@pytest.mark.parametrize("compression", ["zlib", "lzw", None])
def test_ome_keeps_type_and_channels(tmp_path: Path, channels: int, dtype: str, compression: str | None) -> None:
    image = picture(150, 133, channels, dtype)
    levels = write_ome(tmp_path / "a", image if channels == 3 else first(image), compression=compression)
    raster = open_raster(tmp_path / "a")
    assert (raster.channels, raster.dtype) == (channels, np.dtype(dtype))
    assert_levels(raster, [first(level) if channels == 3 else level for level in levels])
    assert raster.spacing == pytest.approx((0.25e-3, 0.25e-3))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "jpeg2000", "compressionargs": {"level": 0}},
        {"planarconfig": "separate", "photometric": "rgb"},
        {"compression": None, "byteorder": ">"},
        {"predictor": True},
    ],
)
def test_storage_makes_no_difference(tmp_path: Path, options: dict[str, object]) -> None:
    image = picture(150, 133)
    order = {"byteorder": options.pop("byteorder")} if "byteorder" in options else {}
    planes = first(image) if "planarconfig" in options else image
    smaller = planes[:, ::2, ::2] if "planarconfig" in options else planes[::2, ::2]
    with tifffile.TiffWriter(tmp_path / "a.tif", **order) as file:
        for number, level in enumerate((planes, smaller)):
            one = {"tile": (64, 64), "metadata": None, "compression": "zlib", "photometric": "rgb", **options}
            file.write(np.ascontiguousarray(level), subfiletype=number, **one)
    assert_levels(open_raster(tmp_path / "a.tif"), [first(image), first(image)[:, ::2, ::2]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("options", [{"rowsperstrip": 7}, {"rowsperstrip": 7, "compression": "zlib"}, {}])
def test_large_flat_files_are_read_by_strip(tmp_path: Path, monkeypatch, dtype: str, options) -> None:
    monkeypatch.setattr("foveate.io.raster.READ_WHOLE", 1000)
    monkeypatch.setattr("foveate.io.tiff_layout._BAND", 4096)
    image = picture(90, 133, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    raster = open_raster(tmp_path / "a.tif")
    assert describe(raster)[0].startswith("reader: tifffile")
    assert raster.tile_shape()[0] < 20
    assert np.array_equal(raster.read(((5, 9), (77, 120))), first(image)[:, 5:77, 9:120])


def test_meaning_of_the_numbers(tmp_path: Path) -> None:
    grey = picture(100, 130, 1)[..., 0]
    write_plain(tmp_path / "white.tif", grey, photometric="miniswhite")
    assert np.array_equal(whole(open_raster(tmp_path / "white.tif"))[0], 255 - grey)
    assert np.array_equal(whole(open_raster(tmp_path / "white.tif", want="values"))[0], grey)
    colours = np.arange(768).reshape(3, 256).astype(np.uint16) * 80
    write_plain(tmp_path / "labels.tif", grey, photometric="palette", colormap=colours)
    assert np.array_equal(whole(open_raster(tmp_path / "labels.tif")), (colours >> 8).astype(np.uint8)[:, grey])
    assert np.array_equal(whole(open_raster(tmp_path / "labels.tif", want="values"))[0], grey)
    alpha = np.concatenate([picture(100, 130), np.full((100, 130, 1), 255, np.uint8)], axis=2)
    alpha[:50, :, 3] = 0
    write_plain(tmp_path / "alpha.tif", alpha, photometric="rgb", extrasamples=["unassalpha"])
    seen = whole(open_raster(tmp_path / "alpha.tif"))
    assert (seen[:, :50] == 255).all()
    assert np.array_equal(seen[:, 50:], first(alpha[50:, :, :3]))
    write_plain(tmp_path / "bits.tif", grey > 99, compression=None, photometric="minisblack")
    assert np.array_equal(whole(open_raster(tmp_path / "bits.tif"))[0], np.where(grey > 99, 255, 0))


def test_a_page_of_another_aspect_is_no_level(tmp_path: Path) -> None:
    image = picture(200, 300)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number, level in enumerate((image, image[::2, ::2], image[:70, :80])):
            file.write(level, tile=(64, 64), subfiletype=int(number > 0), metadata=None, compression="zlib")
    raster = open_raster(tmp_path / "a.tif")
    assert raster.levels == ((200, 300), (100, 150))
    assert describe(raster)[-1] == "note: a page of 70 x 80 pixels is of another aspect and no level"


def change_tile(
    path: Path, number: int, *, start: int | None = None, count: int | None = None, data: bytes = b""
) -> None:
    """Changes where a tile of the first page lies, or its first bytes."""
    with tifffile.TiffFile(path) as file:
        page, order = file.pages.first, file.byteorder
        offsets, counts = page.tags[324], page.tags[325]
        place = page.dataoffsets[number]
    with path.open("r+b") as out:
        for tag, value in ((offsets, start), (counts, count)):
            if value is not None:
                size = tag.valuebytecount // tag.count
                out.seek(tag.valueoffset + number * size)
                out.write(struct.pack(order + {2: "H", 4: "I", 8: "Q"}[size], value))
        if data:
            out.seek(place)
            out.write(data)


def test_tiles_that_are_left_out(tmp_path: Path) -> None:
    image = picture(200, 190)
    write_plain(tmp_path / "a.tif", image)
    write_plain(tmp_path / "b.tif", image[..., 0])
    for name in "ab":
        change_tile(tmp_path / f"{name}.tif", 4, start=0, count=0)
    seen = whole(open_raster(tmp_path / "a.tif"))
    assert (seen[:, 64:128, 64:128] == 255).all()
    assert np.array_equal(seen[:, :64], first(image)[:, :64])
    assert (whole(open_raster(tmp_path / "b.tif"))[:, 64:128, 64:128] == 0).all()


@pytest.mark.parametrize("kind", ["zlib", "jpeg", "lies"])
def test_broken_tiles(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tif"
    image = picture(200, 190)
    write_plain(path, image, compression="jpeg" if kind == "jpeg" else "zlib", photometric="rgb")
    if kind == "lies":
        change_tile(path, 4, start=2**31)
        with pytest.raises(FormatError, match="1 of 12 tiles of level 0 lie past the end of the file"):
            open_raster(path)
    else:
        change_tile(path, 4, count=100, data=b"\x99" * 100 if kind == "zlib" else b"")
        raster = open_raster(path)
        assert raster.read(((0, 0), (64, 64))).shape == (3, 64, 64)
        with pytest.raises(FormatError, match=r"tile at row 1, column 1 of level 0 is broken .*pass --broken fill"):
            whole(raster)
    for word in ("fill", "skip"):
        raster = open_raster(path, broken=word)
        assert raster.broken == []
        assert (whole(raster)[:, 64:128, 64:128] == 255).all()
        assert raster.read(((70, 0), (71, 150))).shape == (3, 1, 150)
        assert raster.broken == [((64, 64), (128, 128))]
    with pytest.raises(ConfigError, match="broken='ignore'; give 'raise', 'fill' or 'skip'"):
        open_raster(path, broken="ignore")


@pytest.mark.parametrize("reduce", ["mean", "mode"])
@pytest.mark.parametrize("ratio", [2, 4])
def test_broken_tiles_of_coarse_levels_are_made_from_finer_ones(tmp_path: Path, reduce: Any, ratio: int) -> None:
    image = picture(333, 290).transpose(2, 0, 1)
    image = image // 64 if reduce == "mode" else image
    path = write_pyramid(
        tmp_path / "a.tif",
        lambda box: image[:, slice(box[0][0], box[1][0]), slice(box[0][1], box[1][1])],
        shape=image.shape[1:], dtype=np.uint8, channels=3, tile=64, ratio=ratio, kind="tiff", reduce=reduce, rgb=True,
    )  # fmt: skip
    want: Any = "values" if reduce == "mode" else "shown"
    area = ((0, 0), image.shape[1:])
    sound = open_raster(path, want=want)
    levels = range(1, len(sound.levels))
    expected = {level: sound.read(area, level) for level in levels}
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for page in file.pages[1:]:  # everything but level 0
            for at, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                data[at : at + count] = b"\x99" * count
    path.write_bytes(data)
    raster = open_raster(path, broken="skip", want=want)
    for level in levels:
        seen = raster.read(area, level)
        if reduce == "mean":
            assert (seen == expected[level]).mean() > 0.99, "the same means as the writer's"
        else:
            assert set(np.unique(seen)) <= set(np.unique(image)), "labels are never blended"
    assert raster.broken == []
    assert len(raster.mended) == sum(-(-high // 64) * -(-wide // 64) for high, wide in raster.levels[1:])


@pytest.mark.parametrize("kind", ["svs", "plain", "ome"])
@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
def test_truncated_slides(tmp_path: Path, kind: str, percent: int) -> None:
    path = tmp_path / "a"
    {"svs": write_svs, "plain": write_plain, "ome": write_ome}[kind](path, picture(300, 290), steps=(2, 4))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * percent // 100])
    with pytest.raises(FormatError) as error:
        whole(open_raster(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_pages_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_plain(path, picture(100, 100))
    with tifffile.TiffFile(path) as file:
        last, start = file.pages[-1], file.pages[0].offset
        at = last.offset + 2 + 12 * len(last.tags)
    with path.open("r+b") as out:
        out.seek(at)
        out.write(struct.pack("<I", start))
    with pytest.raises(FormatError, match="the pages run in a circle"):
        open_raster(path)
    path = tmp_path / "b.tif"
    write_ome(path, picture(100, 100))
    with tifffile.TiffFile(path) as file:
        tag, start = file.pages.first.tags[330], file.pages.first.offset
    with path.open("r+b") as out:
        out.seek(tag.valueoffset)
        out.write(struct.pack("<Q", start))
    with pytest.raises(FormatError, match="the pages run in a circle"):
        open_raster(path)


def test_many_pages_and_absurd_sizes(tmp_path: Path) -> None:
    page = struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 1)
    pages = b"".join(page + struct.pack("<I", 8 + 18 * (number + 1)) for number in range(100_000))
    (tmp_path / "many.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8) + pages)
    with pytest.raises(FormatError, match="more than 65536 pages"):
        open_raster(tmp_path / "many.tif")
    image = picture(128, 128)
    for name, changes in {"huge": {256: 10**6, 257: 10**6}, "tiles": {322: 2**16, 323: 2**16}}.items():
        path = tmp_path / f"{name}.tif"
        write_plain(path, image)
        with tifffile.TiffFile(path) as file:
            tags = {code: file.pages.first.tags[code] for code in changes}
        with path.open("r+b") as out:
            for code, value in changes.items():
                out.seek(tags[code].offset + 2)
                out.write(struct.pack("<HII", 4, 1, value))
        with pytest.raises(FormatError, match=r"declares (tiles of )?\d+ x \d+ pixels"):
            open_raster(path)


def test_no_pixels_at_all(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", picture(100, 90))
    with tifffile.TiffFile(tmp_path / "a.svs") as file:
        at = file.pages.first.tags[256].valueoffset
    with (tmp_path / "a.svs").open("r+b") as out:
        out.seek(at)
        out.write(bytes(2))
    with pytest.raises(FormatError, match="every side must be at least 1"):
        open_raster(tmp_path / "a.svs")


def test_one_block_of_a_whole_slide_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("foveate.io.tiff_layout.MAX_TILE", 1000)
    write_plain(tmp_path / "a.tif", picture(100, 100))
    from foveate.io.tiff_layout import read_layout

    with pytest.raises(FormatError, match=r"stores 64 x 64 pixels in one block, above 1000 .*save it again in tiles"):
        read_layout(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_a_tile_that_claims_to_be_huge(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    write_plain(path, picture(200, 190), compression=compression, photometric="rgb")
    data = bytearray(path.read_bytes())
    if compression == "jpeg":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 40000, 40000)
    else:
        at = data.index(b"\xff\x4f\xff\x51") + 8
        data[at : at + 8] = struct.pack(">II", 40000, 40000)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="it declares 1600000000 pixels in a tile of 4096"):
        whole(open_raster(path))


def test_levels_of_a_slide_without_thumbnail(tmp_path: Path) -> None:
    image = picture(256, 256)
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for number, level in enumerate((image, halved(image, 4), halved(image, 8))):
            one = {"tile": (64, 64), "description": "Aperio Image Library|MPP = 0.5", "metadata": None}
            file.write(level, subfiletype=int(number > 0), compression="jpeg", photometric="rgb", **one)
    assert open_raster(tmp_path / "a.svs").levels == ((256, 256), (64, 64), (32, 32))


def test_hamamatsu_pages_have_wider_offsets(tmp_path: Path) -> None:
    page = struct.pack("<H", 1) + struct.pack("<HHII", 65420, 3, 1, 1)
    (tmp_path / "a").write_bytes(struct.pack("<2sHI", b"II", 42, 8) + page + struct.pack("<Q", 30) + page + bytes(8))
    check_chain(tmp_path / "a")
    (tmp_path / "a").write_bytes(struct.pack("<2sHI", b"II", 42, 8) + page + struct.pack("<Q", 8))
    with pytest.raises(FormatError, match="the pages run in a circle"):
        check_chain(tmp_path / "a")


def test_check_chain_walks_sub_pages_of_both_byte_orders(tmp_path: Path) -> None:
    for big in (False, True):
        for order in "<>":
            with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=big, byteorder=order) as file:
                file.write(picture(64, 64), subifds=2, tile=(16, 16))
                for step in (2, 4):
                    file.write(picture(64 // step, 64 // step), tile=(16, 16), subfiletype=1)
            check_chain(tmp_path / "a.tif")
            assert len(open_raster(tmp_path / "a.tif").levels) == 3


def part_of(raster: Raster) -> Array:
    return raster.read(((10, 20), (150, 120)))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes(tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    levels = write_plain(tmp_path / "a.tif", picture(200, 190))
    raster = open_raster(tmp_path / "a.tif")
    expected = part_of(raster)
    assert np.array_equal(expected, first(levels[0])[:, 10:150, 20:120])
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert np.array_equal(pool.apply(part_of, (raster,)), expected)
    assert np.array_equal(part_of(pickle.loads(pickle.dumps(raster))), expected)


def test_threads_and_a_cache_of_their_own(tmp_path: Path) -> None:
    levels = write_plain(tmp_path / "a.tif", picture(200, 190))
    cache = TileCache(40_000)
    raster = open_raster(tmp_path / "a.tif", cache=cache)
    boxes = [((y, x), (y + 60, x + 70)) for y in range(0, 140, 23) for x in range(0, 120, 17)]
    with ThreadPoolExecutor(4) as pool:
        for box, part in zip(boxes, pool.map(raster.read, boxes), strict=True):
            (top, left), (bottom, right) = box
            assert np.array_equal(part, first(levels[0])[:, top:bottom, left:right])
    assert 0 < cache.num_bytes <= 40_000
    assert pickle.loads(pickle.dumps(cache)).max_bytes == 40_000


def test_more_files_than_are_held_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("foveate.io.tile_cache._MOST_FILES", 2)
    rasters = []
    for number in range(5):
        write_plain(tmp_path / f"{number}.tif", picture(100, 90, seed=number))
        rasters.append(open_raster(tmp_path / f"{number}.tif", cache=TileCache(0)))
    for _ in range(2):
        for number, raster in enumerate(rasters):
            assert np.array_equal(whole(raster), first(picture(100, 90, seed=number)))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    write_plain(tmp_path / "a.tif", picture(100, 90))
    raster = open_raster(tmp_path / "a.tif")
    write_plain(tmp_path / "a.tif", picture(100, 91))
    with pytest.raises(FormatError, match="has changed since it was opened; open it again"):
        whole(raster)
    (tmp_path / "a.tif").unlink()
    with pytest.raises(FormatError, match=r"cannot be read \(No such file or directory\); check the path"):
        whole(raster)


def test_tiles_that_are_handed_out_whole_are_not_kept(tmp_path: Path) -> None:
    cache = TileCache()
    write_plain(tmp_path / "a.tif", picture(300, 200))
    raster = open_raster(tmp_path / "a.tif", cache=cache)
    high, wide = raster.tile_shape()
    raster.read(((0, 0), (high, wide)))
    assert cache.num_bytes == 0
    raster.read(((0, 0), (high, wide - 1)))
    assert cache.num_bytes == 3 * high * wide
