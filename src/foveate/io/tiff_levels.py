"""TIFF slides tile by tile: Aperio, OME with sub-pages, plain pyramids, large strips; any depth, any channels.

tifffile reads the tags and decodes single tiles; which pages are levels, what may be believed and what the numbers
stand for is decided here.
"""

import struct
import threading
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FoveateError
from foveate.io.guard import DECODER_ERRORS, Want, bad_file, undecodable
from foveate.io.raster import About
from foveate.io.spacing import Claim, Real, aperio_claims, choose, ome_claims, tag_claims
from foveate.io.tiff import MAX_TILE, check_chain, shown
from foveate.io.tile_cache import DiskFile, TileCache, handle, stamp_of
from foveate.io.tiled import Facts, TiledRaster

Array = NDArray[Any]

_PLAIN_COLOURS = (1, 2, 6)  # black is zero, RGB, YCbCr (which the JPEG decoder turns into RGB)
_WHITE_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 2, 3, 5, 6
_JPEG = (7, 33007)
_FRAME_STARTS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_APERIO_YCBCR = 33003
_NODATA = 42113
_ALPHA = (1, 2)
_BAND = 2**20  # bytes of uncompressed rows read at once


@dataclass(frozen=True)
class _Frame:
    """What all pages of a level share, taken while the file was open; tifffile reads most tags late."""

    photometric: int
    extrasamples: tuple[int, ...]
    colormap: Any
    compression: int
    is_tiled: bool
    dtype: np.dtype[Any]
    decode: Any


@dataclass(frozen=True)
class _Level:
    """One level: a table of places in the file, and what decodes what lies there."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    places: NDArray[np.int64]  # [planes, rows, columns, 2]: start and number of bytes
    indices: NDArray[np.int64]  # [planes, rows, columns]: number of the tile, as the decoder counts
    tables: tuple[bytes | None, ...]  # of each plane: what its JPEGs share
    frame: _Frame
    bands: bool  # rows of uncompressed strips, cut where we like


@dataclass(frozen=True)
class TiffLayout:
    """What the pages of a TIFF are: its levels, what its samples are, and who says how large a pixel is."""

    levels: tuple[_Level, ...]
    kind: str
    channels: int
    dtype: np.dtype[Any]
    background: float
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    end: int  # of the blocks of what is no level
    has_foreign_colours: bool  # JPEG 2000 of Aperio as YCbCr, which no codec here turns into RGB


class TiffRaster(TiledRaster):
    """A TIFF as a raster, decoded tile by tile with tifffile's codecs.

    Tiles that the file leaves out are legal and read as its nodata value if it names one, else white in RGB of 8 bits
    (outside a slide is glass) and 0 in everything else.

    Args:
        path: The file.
        layout: What ``read_layout`` said of it.
        mpp, spacing: As in ``open_raster``.
        broken, cache: As in ``TiledRaster``.
        want: As in ``read_image``: what a viewer shows, or the stored values.
        reason: Why this reader.

    Raises:
        FormatError: blocks lie past the end of the file and ``broken`` is ``"raise"``.
    """

    def __init__(
        self,
        path: Path,
        layout: TiffLayout,
        *,
        mpp: Real | None = None,
        spacing: tuple[float, ...] | None = None,
        broken: str = "raise",
        cache: TileCache | None = None,
        want: Want = "shown",
        reason: str = "",
    ) -> None:
        size = choose(layout.claims, mpp=mpp, spacing=spacing)
        stamp = stamp_of(path)
        facts = Facts(
            tuple(level.shape for level in layout.levels),
            tuple(level.tile for level in layout.levels),
            layout.channels,
            layout.dtype,
            layout.background,
            size.spacing,
            About(f"tifffile ({layout.kind})", reason, size.origin, layout.notes + size.notes),
            stamp,
        )
        super().__init__(path, facts, broken=broken, cache=cache)
        self._want: Want = want
        self._layout: TiffLayout | None = layout
        if broken == "raise":
            if layout.end > stamp[1]:
                raise undecodable(path, "tiff", EOFError("its label or overview lies past the end of the file"))
            for number, level in enumerate(layout.levels):
                lost = int((level.places.sum(axis=-1) > stamp[1]).sum())
                if lost:
                    what = f"{lost} of {level.indices.size} tiles of level {number} lie past the end of the file"
                    raise undecodable(path, "tiff", EOFError(what))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layout": None}

    def _variant(self) -> str:
        return f"tiff {self._want}"

    def _levels(self) -> tuple[_Level, ...]:
        if self._layout is None:
            self._layout = read_layout(self.path, self._want)
        return self._layout.levels

    def _decode(self, level: int, row: int, column: int) -> Array | None:
        path, stamp = self.path, self._facts.stamp
        file = handle((str(path), stamp, "bytes"), lambda: DiskFile(path, stamp))
        table = self._levels()[level]
        planes = [_plane(file, table, plane, row, column) for plane in range(len(table.places))]
        if all(plane is None for plane in planes):
            return None
        height, width = next(plane.shape[:2] for plane in planes if plane is not None)
        empty = np.full((height, width, self.channels // len(planes)), self._facts.background, self.dtype)
        tile = np.concatenate([empty if plane is None else plane for plane in planes], axis=2)
        tile = _as_shown(self.path, tile, table.frame, self._want, self.channels)
        if tile.dtype.kind == "f" and not np.isfinite(tile).all():
            raise ValueError("it holds values that are NaN or infinite")
        return tile if tile.dtype.isnative else tile.astype(tile.dtype.newbyteorder("="))


def _plane(file: DiskFile, table: _Level, plane: int, row: int, column: int) -> Array | None:
    """Decodes one tile of one plane to ``[T, T, samples]``; None where nothing is stored."""
    start, count = table.places[plane, row, column].tolist()
    if count == 0 or start == 0:
        return None
    data = file.read(start, count)
    if len(data) < count:
        raise EOFError(f"it ends at byte {start + len(data)}, {count - len(data)} bytes early")
    frame = table.frame
    if table.bands:
        height = min(table.tile[0], table.shape[0] - row * table.tile[0])
        return np.frombuffer(data, frame.dtype).reshape(height, table.shape[1], -1)
    if (declared := _declared(data)) > 2 * prod(table.tile):
        raise ValueError(f"it declares {declared} pixels in a tile of {prod(table.tile)}")
    options: dict[str, Any] = {"_fullsize": frame.is_tiled}
    if frame.compression in _JPEG:
        if b"\xff\xd9" not in data[-64:]:
            raise EOFError("its JPEG has no end")
        options["jpegtables"] = table.tables[plane]
    pixels, _, _ = frame.decode(data, int(table.indices[plane, row, column]), **options)
    return np.asarray(pixels[0])


def _declared(data: bytes) -> int:
    """Pixels that a JPEG or JPEG 2000 stream claims to hold, which its decoder would allocate; 0 for other streams."""
    if data[:4] == b"\xff\x4f\xff\x51":
        return prod(struct.unpack_from(">II", data, 8))
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _FRAME_STARTS:
            return prod(struct.unpack_from(">HH", data, at + 5))
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _as_shown(path: Path, tile: Array, frame: _Frame, want: Want, channels: int) -> Array:
    """Stored numbers ``[T, T, samples]`` as what they stand for, ``[T, T, C]``."""
    if tile.dtype.kind == "b":
        tile = tile.view(np.uint8)
        tile = (tile != 0).astype(np.uint8) * np.uint8(255 if want == "shown" else 1)
        if frame.photometric == _WHITE_IS_ZERO and want == "shown":
            tile = np.uint8(255) - tile
        return tile
    if frame.photometric in _PLAIN_COLOURS and tile.shape[2] == channels:
        return tile
    squeeze = tile.shape[2] == 1
    planes, _ = shown(path, tile[..., 0] if squeeze else tile, "HW" if squeeze else "HWC", frame, want)
    planes = planes[None] if planes.ndim == 2 else planes
    return np.ascontiguousarray(np.broadcast_to(planes, (channels, *planes.shape[1:])).transpose(1, 2, 0))


def read_layout(path: Path, want: Want = "shown") -> TiffLayout:
    """Says what the pages of a TIFF are, from its tags alone.

    Raises:
        FormatError: damaged or cyclic tags, no image, a stack of planes or time points, tiles too large to be true.
    """
    try:
        import tifffile

        check_chain(path)
        with _ONE_AT_A_TIME, tifffile.TiffFile(path, _multifile=False) as file:
            return _layout_of(path, file, want)
    except FoveateError:
        raise
    except DECODER_ERRORS as error:
        raise undecodable(path, "tiff", error) from None


_ONE_AT_A_TIME = threading.Lock()  # tags of many files at once would only wait for each other


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


def _levels_of(path: Path, candidates: list[list[Any]]) -> tuple[tuple[_Level, ...], list[str]]:
    """The first candidate and those below it that are smaller copies of it, largest first, one of each size.

    An untiled page beside a tiled one is a thumbnail, a label or an overview, whatever its aspect.
    """
    full = _level(path, candidates[0])
    frame = candidates[0][0].keyframe
    found: dict[tuple[int, int], _Level] = {}
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


def _level(path: Path, pages: list[Any]) -> _Level:
    """The table of one level, checked for completeness and size."""
    if any(page is None for page in pages):
        raise undecodable(path, "tiff", EOFError("lacks a page"))
    frame = pages[0].keyframe
    separate, depth, height, width, samples = (int(side) for side in frame.shaped)
    if depth != 1:
        raise bad_file(path, f"holds {depth} planes in one page; save one image per file")
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
    level = _Level(
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


def _frame(page: Any) -> _Frame:
    return _Frame(
        int(page.photometric),
        tuple(int(one) for one in page.extrasamples or ()),
        page.colormap,
        int(page.compression),
        bool(page.is_tiled),
        page.dtype.newbyteorder(page.parent.byteorder),
        page.decode,
    )


def _in_bands(level: _Level, row_bytes: int, frame: Any) -> _Level:
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
