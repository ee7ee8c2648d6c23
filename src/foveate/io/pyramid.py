"""Pyramidal TIFF written tile by tile: masks and pictures of any size, in the memory of a row of tiles."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal
from uuid import NAMESPACE_OID, uuid5

import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike, NDArray

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.image import Real
from foveate.geometry.source import Box
from foveate.io.pyramid_spool import Pending, Spool
from foveate.io.pyramid_tiles import Layout, Reduce, Tile, compose, encode, join, shrink
from foveate.io.write import atomic_write, refuse_existing

Array = NDArray[Any]
Tiles = Callable[[Box], Shaped[Array, "C h w"] | int]
Kind = Literal["ome", "tiff"]
Finished = tuple[tuple[bytes, ...], Tile]  # a tile as bytes, and what it leaves of itself in the next level
Work = Callable[[Callable[[int], Finished], Iterable[int]], Iterable[Finished]]


def write_pyramid(
    path: str | Path,
    tiles: Tiles,
    *,
    shape: Sequence[int],
    dtype: DTypeLike,
    channels: int = 1,
    tile: int = 512,
    spacing: Sequence[Real] | None = None,
    levels: int | None = None,
    ratio: int = 2,
    kind: Kind = "ome",
    compression: Literal["zlib", "jpeg"] = "zlib",
    quality: int = 85,
    reduce: Reduce = "mode",
    rgb: bool | None = None,
    names: Sequence[str] = (),
    description: str | None = None,
    overwrite: bool = False,
    spool: str | Path | None = None,
    key: str = "",
    num_workers: int = 1,
) -> Path:
    """Writes a pyramid whose level 0 is asked for tile by tile; no level is ever held.

    Args:
        path: the file. Its folder must exist.
        tiles: called once for every tile of level 0 in raster order, with its box in pixels, cut at the edge of the
            image; returns the pixels ``[C, h, w]``, or one number where all samples are equal.
        shape: (H, W) of level 0.
        dtype: type of the samples, integer or float.
        channels: number of channels C.
        tile: side of the stored tiles, a multiple of 16.
        spacing: size of a level-0 pixel in mm along y and x.
        levels: how many levels; as many as it takes to fit a level into one tile by default.
        ratio: downsample from one level to the next, 2, 4 or 8; sides are rounded up.
        kind: "ome" is OME-TIFF with the levels as SubIFDs (QuPath, Bio-Formats); "tiff" has a page for each level
            (OpenSlide, libvips).
        compression: "zlib" is exact; "jpeg" is for images of 8 bits.
        quality: of JPEG, 1 to 100.
        reduce: how coarser levels come about, "mode" for labels, "mean" for images, see `Layout`.
        rgb: three channels are colours and stored as such; by default if they are averaged integers.
        names: of the channels, kept by OME-TIFF.
        description: text that goes with the image; of a plain TIFF, ASCII.
        overwrite: True replaces an existing file.
        spool: a folder for the finished rows of tiles. If the run is killed, the same call with the same folder asks
            only for the rows that are missing, and writes the same file. It is removed in the end.
        key: what the tiles come from, such as a model and a slide; a spool of another key is refused.
        num_workers: threads that call ``tiles`` and encode; more than one call it in any order within a row.

    Returns:
        The path.

    Raises:
        FormatError: the path exists, cannot be written, or the disk is full; the spool is of another output.
        ShapeError: a shape without pixels, or a tile of another shape or dtype.
        ConfigError: options that contradict each other.

    Cost: memory of about two rows of tiles; disk of twice the file while it is put together.
    """
    path = Path(path)
    colours = rgb if rgb is not None else channels == 3 and reduce == "mean" and np.dtype(dtype).kind == "u"
    layout = _layout(shape, np.dtype(dtype), channels, tile, ratio, levels, reduce, colours, compression, quality)
    refuse_existing(path, overwrite)
    with ExitStack() as stack:
        store = Spool(path, Path(spool) if spool else None, layout, key)
        stack.callback(store.close)
        pool = stack.enter_context(ThreadPoolExecutor(num_workers)) if num_workers > 1 else None
        _Stream(layout, store, pool.map if pool else map).run(tiles)
        with atomic_write(path, overwrite=overwrite) as file:
            _assemble(file, store, layout, kind, spacing, names, description)
        store.remove()
    return path


def _layout(
    shape: Sequence[int],
    dtype: np.dtype[Any],
    channels: int,
    tile: int,
    ratio: int,
    levels: int | None,
    reduce: Reduce,
    colours: bool,
    compression: Literal["zlib", "jpeg"],
    quality: int,
) -> Layout:
    if len(shape) != 2 or min(shape) < 1 or channels < 1 or dtype.kind not in "uif":
        raise ShapeError(f"shape {tuple(shape)} of {channels} channels, {dtype}; give (H, W) above 0 and numbers")
    if tile < 16 or tile % 16 or ratio not in (2, 4, 8):
        raise ConfigError(f"tile={tile}, ratio={ratio}; a tile is a multiple of 16, a ratio is 2, 4 or 8")
    if compression == "jpeg" and (dtype != np.uint8 or reduce == "mode" or (channels > 1 and not colours)):
        raise ConfigError(f"compression='jpeg' for {channels} channels of {dtype}, reduce={reduce!r}; use 'zlib'")
    needed, side = 1, max(shape)
    while side > tile:
        needed, side = needed + 1, -(-side // ratio)
    height, width = shape
    levels = needed if levels is None else max(1, min(levels, needed))
    return Layout((height, width), dtype, channels, tile, ratio, levels, reduce, colours, compression, quality)


class _Stream:
    """All tiles of all levels on their way into the spool; rows wait here until the next level needs them."""

    def __init__(self, layout: Layout, spool: Spool, work: Work) -> None:
        self._layout, self._spool, self._work = layout, spool, work
        part = layout.tile // layout.ratio
        self._waiting: list[list[list[Tile]]] = [[] for _ in range(layout.levels)]
        for level, band in spool.pending.items():
            _, height, width = band.shape
            self._waiting[level] = [
                [band[:, y : y + part, x : x + part] for x in range(0, width, part)] for y in range(0, height, part)
            ]

    def run(self, tiles: Tiles) -> None:
        """Asks for the rows of level 0 that the spool does not hold yet."""
        layout = self._layout
        for row in range(self._spool.rows, layout.grid(0)[0]):
            self._row(0, row, partial(_ask, tiles, layout, row))
            self._spool.commit(row + 1, self._bands())

    def _row(self, level: int, row: int, get: Callable[[int], Tile]) -> None:
        layout = self._layout

        def finish(column: int) -> Finished:
            tile = get(column)
            return encode(tile, layout), shrink(tile, layout.ratio, layout.reduce)

        small = []
        rows, columns = layout.grid(level)
        for blobs, part in self._work(finish, range(columns)):
            self._spool.add(level, blobs)
            small.append(part)
        if level + 1 == layout.levels:
            return
        self._waiting[level].append(small)
        if len(self._waiting[level]) == layout.ratio or row + 1 == rows:
            below, self._waiting[level] = self._waiting[level], []
            upper = row // layout.ratio
            self._row(level + 1, upper, partial(self._compose, below, level + 1, upper))

    def _compose(self, below: list[list[Tile]], level: int, row: int, column: int) -> Tile:
        ratio = self._layout.ratio
        parts = [some[column * ratio : (column + 1) * ratio] for some in below]
        return compose(parts, self._layout, self._layout.box(level, row, column))

    def _bands(self) -> Pending:
        layout = self._layout
        part = layout.tile // layout.ratio
        return {
            level: join(rows, layout, (len(rows) * part, layout.side(level + 1)[1]))
            for level, rows in enumerate(self._waiting)
            if rows
        }


def _ask(tiles: Tiles, layout: Layout, row: int, column: int) -> Tile:
    box = layout.box(0, row, column)
    tile = tiles(box)
    if isinstance(tile, int | np.integer):
        if layout.dtype.kind in "ui" and not np.iinfo(layout.dtype).min <= tile <= np.iinfo(layout.dtype).max:
            raise ShapeError(f"tile {box} is {tile}, which {layout.dtype} cannot hold; give another dtype")
        return int(tile)
    wanted = (layout.channels, *(high - low for low, high in zip(*box, strict=True)))
    if tile.shape != wanted or tile.dtype != layout.dtype:
        raise ShapeError(f"tile {box} is {tile.dtype} {tile.shape}; give {layout.dtype} {wanted}, or one number")
    first = tile.flat[0]
    return int(first) if layout.dtype.kind != "f" and (tile == first).all() else tile


def _assemble(
    file: IO[bytes],
    spool: Spool,
    layout: Layout,
    kind: Kind,
    spacing: Sequence[Real] | None,
    names: Sequence[str],
    description: str | None,
) -> None:
    """Puts the spooled tiles into a TIFF."""
    import tifffile

    planes = 1 if layout.interleaved else layout.channels
    separate = "separate" if planes > 1 and kind == "tiff" else None
    jpeg = layout.compression == "jpeg"
    metadata = _ome(layout, spacing, names, description, spool.digest()) if kind == "ome" else None
    with tifffile.TiffWriter(file, bigtiff=spool.size() > 2**32 - 2**27, byteorder="<", ome=kind == "ome") as tiff:
        for level in range(layout.levels):
            shape: tuple[int, ...] = layout.side(level)
            shape = (*shape, layout.channels) if layout.interleaved else (planes, *shape) if planes > 1 else shape
            tiff.write(
                spool.tiles(level, planes),
                shape=shape,
                dtype=layout.dtype,
                tile=(layout.tile, layout.tile),
                photometric=("ycbcr" if jpeg else "rgb") if layout.interleaved else "minisblack",
                planarconfig=separate,
                compression=layout.compression,
                subsampling=(2, 2) if jpeg and layout.interleaved else None,
                subifds=layout.levels - 1 if kind == "ome" and level == 0 and layout.levels > 1 else None,
                subfiletype=int(level > 0),
                resolution=_per_cm(spacing, layout.ratio**level),
                resolutionunit="CENTIMETER" if spacing else None,
                description=description if level == 0 and kind == "tiff" else None,
                metadata=metadata if level == 0 else None,
                software=False,
            )


def _per_cm(spacing: Sequence[Real] | None, downsample: int) -> tuple[float, float] | None:
    return None if spacing is None else (10 / (spacing[1] * downsample), 10 / (spacing[0] * downsample))


def _ome(
    layout: Layout, spacing: Sequence[Real] | None, names: Sequence[str], description: str | None, digest: str
) -> dict[str, Any]:
    """What OME-XML says of the image; its UUID follows from the tiles, so that equal tiles give equal files."""
    axes = "YXS" if layout.interleaved else "CYX" if layout.channels > 1 else "YX"
    metadata: dict[str, Any] = {"axes": axes, "UUID": str(uuid5(NAMESPACE_OID, digest))}
    for axis, size in zip("YX", spacing or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": size * 1000, f"PhysicalSize{axis}Unit": "µm"}
    metadata |= {"Description": description} if description else {}
    return metadata | ({"Channel": {"Name": list(names)}} if names else {})
