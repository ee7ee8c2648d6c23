"""Zarr folders and zips: OME-NGFF 0.4 and 0.5 images with their levels, and plain arrays, read chunk by chunk."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import FoveateError, ShapeError
from foveate.geometry.source import Box, exact_downsamples
from foveate.io.guard import (
    DECODER_ERRORS,
    DEFAULT_MAX_PIXELS,
    bad_file,
    check_size,
    check_values,
    one_line,
    undecodable,
)
from foveate.io.image import MOST_CHANNELS
from foveate.io.ngff_write import write_labels_zarr as write_labels_zarr
from foveate.io.raster import About, check_window, fill_window, fits_whole, is_held, stored_window
from foveate.io.spacing import mpp_of

Array = NDArray[Any]

_MARKS = ("zarr.json", ".zgroup", ".zarray")
_ZIP = b"PK\x03\x04"
_MOST_CHUNK = DEFAULT_MAX_PIXELS  # samples in a chunk; what is decoded at once
_QUIET = threading.Lock()  # warning filters belong to the process
_MILLIMETRES = {
    "angstrom": 1e-7,
    "nanometer": 1e-6,
    "micrometer": 1e-3,
    "micron": 1e-3,
    "millimeter": 1.0,
    "centimeter": 10.0,
    "decimeter": 100.0,
    "meter": 1000.0,
    "inch": 25.4,
}


@dataclass(frozen=True)
class _Layout:
    """What the metadata say: where the levels are, what their axes mean, how large a pixel is."""

    keys: tuple[str, ...]
    axes: str  # a letter of TCZYX for each axis of the arrays
    spacing: dict[str, float] | None
    reader: str
    notes: tuple[str, ...]


class ZarrRaster:
    """The levels of an OME-NGFF image, or one zarr array; a read decodes the chunks that its box touches, no more.

    Chunks that are not stored hold the fill value, as zarr defines it. A z axis of one slice is left out, so that a
    slide is ``(H, W)``. Pickled as its path; in a forked or spawned process it is opened again.

    Args:
        path: Folder or ``.zip``.
        spacing: Size of a level-0 pixel in mm along each spatial axis, instead of what the metadata say.
    """

    def __init__(self, path: Path, spacing: tuple[float, ...] | None = None) -> None:
        self.path, self._given = path, spacing
        self._opened: tuple[int, list[Any]] | None = None
        with _typed(path):
            root = _open(path)
            self._layout = _layout(path, root)
            self._check(self._arrays(root))
        letters, stated = self._spatial, self._layout.spacing
        if spacing is not None and (len(spacing) != len(letters) or not all(0 < size < np.inf for size in spacing)):
            raise ShapeError(f"spacing {spacing} for {len(letters)} axes; give one size in mm above 0 for each")
        self._spacing = spacing or (tuple(stated[letter] for letter in letters) if stated else None)

    def _check(self, arrays: list[Any]) -> None:
        """Takes shapes, type and chunks from the arrays, and refuses those that cannot be levels of one image."""
        axes, first = self._layout.axes, arrays[0]
        for array in arrays:
            if array.ndim != len(axes) or min(array.shape) < 1 or array.dtype.kind not in "biuf":
                raise bad_file(
                    self.path, f"holds {array.dtype} {array.shape}, axes {axes}; store numbers, no axis empty"
                )
            if prod(array.chunks) > _MOST_CHUNK:
                raise bad_file(
                    self.path, f"has chunks of {array.chunks}, above {_MOST_CHUNK} samples; store it in smaller chunks"
                )
        sides = dict(zip(axes, first.shape, strict=True))
        if sides.get("T", 1) != 1:
            raise bad_file(self.path, f"has {sides['T']} time points; save the one that you mean")
        self._spatial = "".join(
            letter for letter in "ZYX" if sides.get(letter, 1) > 1 or letter in axes.replace("Z", "")
        )
        if "YX" not in self._spatial:
            raise bad_file(self.path, f"has axes {axes}; an image needs y and x")
        self._channels = int(sides.get("C", 1))
        self._dtype: np.dtype[Any] = np.dtype(np.uint8 if first.dtype.kind == "b" else first.dtype.newbyteorder("="))
        place = [axes.index(letter) for letter in self._spatial]
        self._levels = tuple(tuple(int(array.shape[at]) for at in place) for array in arrays)
        self._tiles = tuple(tuple(min(int(array.chunks[at]), int(array.shape[at])) for at in place) for array in arrays)
        for fine, coarse in pairwise(arrays):
            rest = [at for at in range(len(axes)) if at not in place]
            same = coarse.dtype == fine.dtype and all(coarse.shape[at] == fine.shape[at] for at in rest)
            falls = all(c <= f for c, f in zip(coarse.shape, fine.shape, strict=True)) and coarse.shape != fine.shape
            if not (same and falls):
                raise bad_file(self.path, f"has a level {coarse.shape} below {fine.shape}; write its levels again")

    def _arrays(self, root: Any = None) -> list[Any]:
        """The arrays of all levels, opened once in each process."""
        if self._opened is None or self._opened[0] != os.getpid():
            root = root if root is not None else _open(self.path)
            self._opened = os.getpid(), [root[key] if key else root for key in self._layout.keys]
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S of level 0."""
        return self._levels[0]

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self._channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples; booleans are read as uint8 0 and 1."""
        return self._dtype

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level."""
        return self._levels

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level along each axis."""
        return exact_downsamples(self.levels)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in mm along each axis, or None where the unit is not stated."""
        return self._spacing

    @property
    def mpp(self) -> float | None:
        """Um per level-0 pixel of a plane, or None."""
        return mpp_of(self._spacing)

    @property
    def about(self) -> About:
        """Which version and store, and who says how large a pixel is."""
        origin = "given as an argument" if self._given else "OME" if self._spacing else "nobody said it"
        return About(self._layout.reader, "", origin, self._layout.notes)

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """Spatial shape of the chunks of a level."""
        return self._tiles[level]

    def read(self, box: Box, level: int = 0) -> Shaped[Array, "C *B"]:
        """Returns the pixels ``[C, *B]`` of a level that touch ``box``.

        Raises:
            ShapeError: no such level, or a box that is empty, of other axes, or reaches outside the image.
            FormatError: a chunk is truncated or corrupt, or holds NaN or infinite values.
        """
        window = check_window(box, self.shape, level, self.downsamples)
        start, stop = stored_window(window, self.levels[level])
        parts = dict(zip(self._spatial, map(slice, start, stop), strict=True))
        axes = self._layout.axes
        index = tuple(parts.get(letter, slice(None) if letter == "C" else 0) for letter in axes)
        with _typed(self.path):
            part = np.asarray(self._arrays()[level][index])
        kept = [letter for letter in axes if letter == "C" or letter in parts]
        part = part.transpose([kept.index(letter) for letter in "CZYX" if letter in kept])
        part = part if "C" in kept else part[None]
        check_values(self.path, part)
        return fill_window(np.ascontiguousarray(part, self._dtype), window)


def is_zarr(path: str | Path) -> bool:
    """True for a folder with zarr metadata in it, and for every zip file."""
    path = Path(path)
    try:
        if path.is_dir():
            return any((path / mark).is_file() for mark in _MARKS)
        with path.open("rb") as file:
            return file.read(4) == _ZIP
    except (OSError, ValueError):
        return False


def open_zarr(
    path: str | Path, *, spacing: tuple[float, ...] | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> ZarrRaster:
    """Opens an OME-NGFF image of version 0.4 (zarr v2) or 0.5 (zarr v3), or a plain zarr array, as a raster.

    Axes are those of the metadata, or the array's ``dimension_names``; without both, those of an NPY of that shape
    (see ``read_image``). The size of a pixel is that of the metadata if they state its unit.

    Args:
        path: The folder, or a ``.zip`` of its contents.
        spacing: Size of a level-0 pixel in mm along each spatial axis, instead of what the metadata say.
        max_pixels: Most pixels of an array that is read whole: one without levels that is small or a single chunk.

    Raises:
        FormatError: no zarr, corrupt metadata, several time points, a type that is no number, chunks too large, or more
            pixels than ``max_pixels``.
        ShapeError: ``spacing`` does not fit the number of axes.
    """
    raster = ZarrRaster(Path(path), spacing)
    if len(raster.levels) == 1 and (fits_whole(raster.shape) or is_held(raster)):
        check_size(raster.path, raster.shape, raster.channels, max_pixels)
    return raster


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Turns what zarr and its codecs raise into errors about the file."""
    try:
        yield
    except FoveateError:
        raise
    except (*DECODER_ERRORS, BadZipFile) as error:
        raise undecodable(path, "zarr", error) from None


def _open(path: Path) -> Any:
    """The root array or group."""
    import zarr
    from zarr.storage import LocalStore, ZipStore

    if not is_zarr(path):
        reason = "holds no zarr (no zarr.json, .zgroup or .zarray)" if path.exists() else "cannot be read"
        raise bad_file(path, f"{reason}; check the path")
    if path.is_file():
        with ZipFile(path) as file:
            entries = file.infolist()
        if not any(entry.filename in _MARKS for entry in entries):
            raise bad_file(
                path, "is a zip without zarr metadata at its top; zip the contents of the folder, not itself"
            )
        for entry in entries:
            if entry.compress_type != ZIP_STORED and entry.file_size > 8 * _MOST_CHUNK:
                raise bad_file(path, f"holds {entry.filename} of {entry.file_size} bytes compressed; store it as it is")
    store = ZipStore(path, mode="r") if path.is_file() else LocalStore(path, read_only=True)
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open(store, mode="r")


def _layout(path: Path, root: Any) -> _Layout:
    """Reads the metadata of a root array or group."""
    import zarr

    where = "zip" if path.is_file() else "folder"
    if isinstance(root, zarr.Array):
        axes, why = _plain_axes(path, root)
        return _Layout(("",), axes, None, f"zarr v{root.metadata.zarr_format} array, {where}", (why,))
    attributes = dict(root.attrs)
    stated = attributes.get("ome", attributes)
    prefix, notes = "", []
    if "multiscales" not in stated and "bioformats2raw.layout" in stated:
        prefix, attributes = "0/", dict(root["0"].attrs)
        stated = attributes.get("ome", attributes)
        notes.append("first of the images in it, 0")
    if "multiscales" not in stated:
        inside = ", ".join(sorted(one_line(key)[:40] for key in root)[:8]) or "nothing"
        raise bad_file(path, f"is a zarr group without multiscales metadata; open one of its members: {inside}")
    scales = stated["multiscales"]
    if len(scales) > 1:
        notes.append(f"first of {len(scales)} multiscales")
    chosen = scales[0]
    version = stated.get("version", chosen.get("version", "of unknown version"))
    axes, units = _ome_axes(path, chosen)
    spacing = _ome_spacing(chosen, axes, units, notes)
    keys = tuple(prefix + str(level["path"]) for level in chosen["datasets"])
    return _Layout(keys, axes, spacing, f"OME-NGFF {one_line(version)[:20]}, {where}", tuple(notes))


def _plain_axes(path: Path, array: Any) -> tuple[str, str]:
    """The axes of an array without OME metadata, and how they are known."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if names and all(isinstance(name, str) for name in names):
        letters = "".join(_LETTERS.get(name.lower(), "?") for name in names)
        if "?" not in letters and len(set(letters)) == len(letters):
            return letters, "axes by their names"
    shape, ends = array.shape, {2: "YX", 3: "YX", 4: "ZYX"}
    if len(shape) not in ends:
        raise bad_file(path, f"has shape {shape} and unnamed axes; name them with dimension_names")
    spatial = ends[len(shape)]
    if len(shape) == 2:
        return spatial, "axes by their number"
    if shape[0] <= MOST_CHANNELS:
        return "C" + spatial, "axes by the shape: the first is short"
    if shape[-1] <= MOST_CHANNELS:
        return spatial + "C", "axes by the shape: the last is short"
    if len(shape) == 3:
        return "ZYX", "axes by the shape: none is short"
    raise bad_file(path, f"has shape {shape} and unnamed axes; name them with dimension_names")


_LETTERS = {
    **{letter.lower(): letter for letter in "TCZYX"},
    **{"time": "T", "channel": "C", "channels": "C", "depth": "Z", "height": "Y", "width": "X"},
}


def _ome_axes(path: Path, scale: dict[str, Any]) -> tuple[str, list[str | None]]:
    """A letter and a unit for each axis."""
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in scale["axes"]]
    kinds = {"channel": "C", "time": "T"}
    letters = "".join(kinds.get(str(axis.get("type")), _LETTERS.get(str(axis["name"]).lower(), "?")) for axis in axes)
    if "?" in letters or len(set(letters)) != len(letters):
        names = [one_line(axis["name"])[:20] for axis in axes]
        raise bad_file(path, f"has axes {names}; axes are t, c, z, y and x, once each")
    return letters, [axis.get("unit") for axis in axes]


def _ome_spacing(
    scale: dict[str, Any], axes: str, units: list[str | None], notes: list[str]
) -> dict[str, float] | None:
    """Size of a level-0 pixel in mm for each spatial axis, None where a unit is not stated."""
    size = np.ones(len(axes))
    for owner in (scale, scale["datasets"][0]):
        for step in owner.get("coordinateTransformations") or []:
            if step.get("type") == "scale" and "scale" in step:
                size = size * np.array(step["scale"], np.float64)
    spatial = [at for at, letter in enumerate(axes) if letter in "ZYX"]
    factors = [_MILLIMETRES.get(str(units[at]).lower()) for at in spatial]
    if None in factors:
        notes.append("unit not stated: the size of a pixel is unknown; give spacing= in mm")
        return None
    found = {axes[at]: float(size[at]) * float(factor or 0) for at, factor in zip(spatial, factors, strict=True)}
    if not all(1e-9 < side < 1e6 for side in found.values()):
        notes.append(f"pixels of {list(found.values())} mm are impossible; give spacing= in mm")
        return None
    return found
