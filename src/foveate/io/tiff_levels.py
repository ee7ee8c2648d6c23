"""TIFF slides tile by tile: Aperio, OME with sub-pages, plain pyramids, large strips; any depth, any channels.

tifffile decodes single tiles; what their numbers stand for is decided here.
"""

import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.io.guard import Want, undecodable
from foveate.io.raster import About
from foveate.io.spacing import Real, choose
from foveate.io.tiff import shown
from foveate.io.tiff_layout import Frame, Level, TiffLayout, read_layout
from foveate.io.tile_cache import DiskFile, TileCache, handle, stamp_of
from foveate.io.tiled import Facts, TiledRaster

Array = NDArray[Any]

_PLAIN_COLOURS = (1, 2, 6)  # black is zero, RGB, YCbCr (which the JPEG decoder turns into RGB)
_WHITE_IS_ZERO = 0
_JPEG = (7, 33007)
_FRAME_STARTS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


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
        self._labels = want == "values"
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

    def _levels(self) -> tuple[Level, ...]:
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


def _plane(file: DiskFile, table: Level, plane: int, row: int, column: int) -> Array | None:
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


def _as_shown(path: Path, tile: Array, frame: Frame, want: Want, channels: int) -> Array:
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
