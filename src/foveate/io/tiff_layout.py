"""What the pages of a TIFF are: which are levels, where their tiles lie, what the numbers mean, how large a pixel is.

tifffile reads the tags; what may be believed is decided here.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FoveateError
from foveate.io.guard import DECODER_ERRORS, Want, bad_file, undecodable
from foveate.io.spacing import Claim, aperio_claims, ome_claims, tag_claims
from foveate.io.tiff import MAX_TILE, check_chain

_RGB, _PALETTE, _CMYK, _YCBCR = 2, 3, 5, 6
_APERIO_YCBCR = 33003
_NODATA = 42113
_ALPHA = (1, 2)
_BAND = 2**20  # bytes of uncompressed rows read at once


@dataclass(frozen=True)
class Frame:
    """What all pages of a level share, taken while the file was open; tifffile reads most tags late."""

    photometric: int
    extrasamples: tuple[int, ...]
    colormap: Any
    compression: int
    is_tiled: bool
    dtype: np.dtype[Any]
    decode: Any


@dataclass(frozen=True)
class Level:
    """One level: a table of places in the file, and what decodes what lies there."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    places: NDArray[np.int64]  # [planes, rows, columns, 2]: start and number of bytes
    indices: NDArray[np.int64]  # [planes, rows, columns]: number of the tile, as the decoder counts
    tables: tuple[bytes | None, ...]  # of each plane: what its JPEGs share
    frame: Frame
    bands: bool  # rows of uncompressed strips, cut where we like


@dataclass(frozen=True)
class TiffLayout:
    """What the pages of a TIFF are: its levels, what its samples are, and who says how large a pixel is."""

    levels: tuple[Level, ...]
    kind: str
    channels: int
    dtype: np.dtype[Any]
    background: float
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    end: int  # of the blocks of what is no level
    has_foreign_colours: bool  # JPEG 2000 of Aperio as YCbCr, which no codec here turns into RGB


def read_layout(path: Path, want: Want = "shown") -> TiffLayout:
    """Says what the pages of a TIFF are, from its tags alone.

    Raises:
        FormatError: damaged or cyclic tags, no image, a stack of planes or time points, tiles too large to be true.
    """
    try:
        import tifffile

        check_chain(path)
        with tifffile.TiffFile(path, _multifile=False) as file:
            return _layout_of(path, file, want)
    except FoveateError:
        raise
    except DECODER_ERRORS as error:
        raise undecodable(path, "tiff", error) from None


def _layout_of(path: Path, file: Any, want: Want) -> TiffLayout:
    all_series = [series for series in file.series if series.shape and prod(series.shape)]
    if not all_series:
        raise bad_file(path, "holds no image; export the file again")
    number = max(range(len(all_series)), key=lambda at: (prod(all_series[at].keyframe.shape), -at))
    series = all_series[number]
    stack = [(axis, length) for axis, length in zip(series.axes, series.shape, strict=True) if length > 1]
    stack = [(axis, length) for axis, length in stack if axis not in "YXSC"]
    if stack:
        raise bad_file(path, f"holds {stack[0][1]} planes along axis {stack[0][0]}; save one image per file")
    first = series.keyframe
    if first.dtype is None or first.dtype.kind not in "biuf":
        raise bad_file(path, f"holds {first.dtype} values; give integers or floats")
    candidates = [list(one.pages) for one in series.levels]
    if series.kind == "svs":
        candidates = [[page] for page in file.pages]
    elif series.kind in ("generic", "uniform", "shaped"):
        candidates += [list(one.pages) for one in all_series if one is not series and one.keyframe.is_reduced]
    levels, notes = _levels_of(path, candidates)
    channels = sum(page.keyframe.samplesperpixel for page in series.pages)
    extra = tuple(int(one) for one in first.extrasamples or ())
    coloured = int(first.photometric) == _PALETTE and want != "values"
    if (int(first.photometric) == _CMYK and channels == 4) or (coloured and channels == 1):
        channels = 3
    elif channels in (2, 4) and len(extra) == 1 and extra[0] in _ALPHA:
        channels -= 1
    dtype = first.dtype.newbyteorder("=")
    if dtype.kind == "b" or coloured:
        dtype = np.dtype(np.uint8)
    white = dtype == np.uint8 and int(first.photometric) in (_RGB, _YCBCR)
    if first.tags.valueof(274, default=1) != 1:
        notes.append(f"orientation {first.tags.valueof(274)} is not applied")
    return TiffLayout(
        levels,
        series.kind,
        channels,
        dtype,
        float(first.nodata) if _NODATA in first.tags else 255.0 if white else 0.0,
        tuple(_claims(file, series, number)),
        tuple(notes),
        max((end for one in all_series if one is not series for end in _ends(one)), default=0),
        int(first.compression) == _APERIO_YCBCR,
    )


def _claims(file: Any, series: Any, number: int) -> list[Claim]:
    page = series.keyframe
    claims = []
    if file.is_svs:
        claims += aperio_claims(file.pages.first.description)
    if file.is_ome:
        claims += ome_claims(file.ome_metadata or "", number)
    unit = str((file.imagej_metadata or {}).get("unit", "")) if file.is_imagej else ""
    return claims + tag_claims(page, unit)


def _ends(series: Any) -> list[int]:
    """Where the blocks of a label, a thumbnail or another small image end in the file."""
    pages = [page for page in series.pages if page is not None]
    return [sum(block) for page in pages for block in zip(page.dataoffsets, page.databytecounts, strict=False)]


def _levels_of(path: Path, candidates: list[list[Any]]) -> tuple[tuple[Level, ...], list[str]]:
    """The first candidate and those below it that are smaller copies of it, largest first, one of each size.

    An untiled page beside a tiled one is a thumbnail, a label or an overview, whatever its aspect.
    """
    full = _level(path, candidates[0])
    frame = candidates[0][0].keyframe
    found: dict[tuple[int, int], Level] = {}
    notes = []
    for pages in candidates[1:]:
        one = next((page.keyframe for page in pages if page is not None), frame)
        shape = int(one.imagelength), int(one.imagewidth)
        alike = (one.dtype, one.samplesperpixel, len(pages)) == (frame.dtype, frame.samplesperpixel, len(candidates[0]))
        if not alike or (frame.is_tiled and not one.is_tiled) or shape in found or prod(shape) >= prod(full.shape):
            continue
        if not _same_aspect(full.shape, shape):
            notes.append(f"a page of {shape[0]} x {shape[1]} pixels is of another aspect and no level")
            continue
        found[shape] = _level(path, pages)
    return (full, *sorted(found.values(), key=lambda level: -prod(level.shape))), notes


def _same_aspect(full: tuple[int, int], level: tuple[int, int]) -> bool:
    """Whether one downsample explains both sides, each rounded by less than two pixels."""
    down = max(full) / max(level)
    return all(0 < low <= high and abs(high / down - low) < 2 for high, low in zip(full, level, strict=True))


def _level(path: Path, pages: list[Any]) -> Level:
    """The table of one level, checked for completeness and size."""
    if any(page is None for page in pages):
        raise undecodable(path, "tiff", EOFError("lacks a page"))
    frame = pages[0].keyframe
    separate, depth, height, width, samples = (int(side) for side in frame.shaped)
    if depth != 1:
        raise bad_file(path, f"holds {depth} planes in one page; save one image per file")
    if min(height, width, samples) < 1:
        raise bad_file(path, f"declares {height} x {width} pixels; every side must be at least 1")
    tile = (frame.tilelength, frame.tilewidth) if frame.is_tiled else (min(frame.rowsperstrip, height), width)
    if min(tile) < 1:
        raise bad_file(path, f"declares tiles of {tile[0]} x {tile[1]} pixels; export the file again")
    rows, columns = -(-height // tile[0]), -(-width // tile[1])
    numbers = np.arange(separate * rows * columns).reshape(separate, rows, columns)
    tables = []
    for page in pages:
        if min(len(page.dataoffsets), len(page.databytecounts)) < numbers.size:
            raise undecodable(path, "tiff", EOFError("lacks entries in its table of tiles"))
        table = np.array([page.dataoffsets[: numbers.size], page.databytecounts[: numbers.size]], np.int64)
        tables.append(np.moveaxis(table, 0, 1).reshape(*numbers.shape, 2))
    level = Level(
        (height, width),
        (int(tile[0]), int(tile[1])),
        np.concatenate(tables),
        np.concatenate([numbers] * len(pages)),
        tuple(page.jpegtables for page in pages for _ in range(separate)),
        _frame(frame),
        False,
    )
    if not frame.is_tiled and frame.compression == 1:
        level = _in_bands(level, width * samples * frame.dtype.itemsize, frame)
    if prod(level.tile) > MAX_TILE:
        raise bad_file(
            path,
            f"stores {level.tile[0]} x {level.tile[1]} pixels in one block, above {MAX_TILE} pixels; "
            f"save it again in tiles of 256 x 256 or 512 x 512",
        )
    return level


def _frame(page: Any) -> Frame:
    return Frame(
        int(page.photometric),
        tuple(int(one) for one in page.extrasamples or ()),
        page.colormap,
        int(page.compression),
        bool(page.is_tiled),
        page.dtype.newbyteorder(page.parent.byteorder),
        page.decode,
    )


def _in_bands(level: Level, row_bytes: int, frame: Any) -> Level:
    """Uncompressed strips that follow each other are cut into bands of rows of a size that suits reading."""
    places = level.places[:, :, 0]
    follow = (places[:, :-1].sum(axis=-1) == places[:, 1:, 0]).all()
    whole = (places[..., 1].sum(axis=1) == level.shape[0] * row_bytes).all()
    if not (follow and whole) or frame.bitspersample % 8 or frame.predictor != 1 or frame.fillorder != 1:
        return level
    height = min(max(1, _BAND // row_bytes), level.shape[0])
    start = np.arange(0, level.shape[0], height)
    count = np.minimum(start + height, level.shape[0]) - start
    table = np.stack(
        [places[:, :1, 0] + start * row_bytes, np.broadcast_to(count * row_bytes, (len(places), len(start)))], axis=-1
    )
    return replace(
        level,
        tile=(height, level.shape[1]),
        places=table[:, :, None],
        indices=np.zeros(table.shape[:2], np.int64)[..., None],
        bands=True,
    )
