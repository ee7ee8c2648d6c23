"""NIfTI-1 and NIfTI-2: the header is read and checked first, then the voxels, without a copy where possible."""

import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import FoveateError
from foveate.io.grid import Grid, column_spacing, tilt, usable
from foveate.io.guard import DECODER_ERRORS, bad_file, check_size, check_values, undecodable
from foveate.io.gunzip import GZIP, gunzip, gunzip_head

Array = NDArray[Any]
Shape = tuple[int, int, int]

_HEAD = 544  # bytes of the longest header
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_REFUSED = {
    1: "1-bit values",
    32: "complex64 values",
    128: "RGB colours",
    1536: "float128 values",
    1792: "complex128 values",
    2048: "complex256 values",
    2304: "RGBA colours",
}
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # per metre, millimetre, micrometre


def is_nifti(path: str | Path) -> bool:
    """True if the first bytes, inflated if need be, are those of NIfTI, in one file or two, or of Analyze."""
    try:
        head, _ = _head(Path(path))
    except (FoveateError, *DECODER_ERRORS):
        return False
    return _kind(head) is not None


def read_nifti(path: Path, spacing: tuple[float, ...] | None, max_pixels: int) -> tuple[Shaped[Array, "C D H W"], Grid]:
    """Reads a NIfTI file as stored; see ``foveate.io.volume.open_volume``."""
    try:
        head, zipped = _head(path)
    except (OSError, ValueError) as error:
        if isinstance(error, FoveateError):
            raise
        raise bad_file(path, f"cannot be read ({getattr(error, 'strerror', None) or error}); check the path") from None
    header, version = _header(path, head)
    shape, channels, dtype, offset = _layout(path, header, 352 if version == 1 else 544)
    check_size(path, shape, channels, max_pixels)
    notes = [f"{channels} volumes of the fourth axis are read as channels"] if channels > 1 else []
    grid = _grid(path, header, shape, spacing, notes)
    size = channels * prod(shape) * dtype.itemsize
    raw = gunzip(path, offset + size)[offset:] if zipped else _plain(path, offset, size)
    array = _scaled(path, header, raw.view(dtype).reshape(channels, *shape))
    check_values(path, array)
    reader = f"NIfTI-{version}" + ", gzip" * zipped
    stored = bytes(header.as_byteswapped("<").binaryblock)
    return array, Grid(shape, grid.affine, grid.spacing, reader, stored, grid.notes)


def _head(path: Path) -> tuple[bytes, bool]:
    """The first bytes of the contents, and whether they were compressed."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    zipped = head.startswith(GZIP)
    return (gunzip_head(path, _HEAD) if zipped else head), zipped


def _kind(head: bytes) -> tuple[str, str] | None:
    """Byte order and kind: 1 or 2 (NIfTI), pair, analyze; None if it is none of them."""
    if len(head) < 348:
        return None
    for order in "<>":
        size = struct.unpack_from(order + "i", head)[0]
        if size == 540 and head[4:7] == b"n+2":
            return order, "2"
        if size == 348 and head[344:347] == b"n+1":
            return order, "1"
        if (size == 348 and head[344:347] == b"ni1") or (size == 540 and head[4:7] == b"ni2"):
            return order, "pair"
        if size == 348 and 1 <= struct.unpack_from(order + "h", head, 40)[0] <= 7:
            return order, "analyze"
    return None


def _header(path: Path, head: bytes) -> tuple[Any, int]:
    """The header as nibabel has it, and the version; nothing in it is checked yet."""
    from nibabel import Nifti1Header, Nifti2Header

    if not head:
        raise bad_file(path, "is empty (0 bytes); fetch or export the file again")
    found = _kind(head)
    if found is None:
        if len(head) < 348:
            raise undecodable(path, "NIfTI", EOFError(f"{len(head)} bytes, less than a header"))
        raise bad_file(path, f"is no NIfTI volume (it begins with {head[:8]!r}); give .nii, .nii.gz or a DICOM folder")
    order, kind = found
    if kind == "pair":
        raise bad_file(path, "is half of a pair .hdr and .img; save it as one file .nii or .nii.gz")
    if kind == "analyze":
        raise bad_file(path, "is Analyze 7.5, which does not say left from right; convert it to NIfTI")
    if kind == "2" and len(head) < 540:
        raise undecodable(path, "NIfTI", EOFError(f"{len(head)} bytes, less than a header"))
    header = (Nifti1Header(head[:348], order, False)) if kind == "1" else Nifti2Header(head[:540], order, False)
    if abs(float(header["pixdim"][0])) != 1:
        header["pixdim"][0] = 1  # the standard's reading of 0, which nibabel refuses
    return header, int(kind)


def _layout(path: Path, header: Any, least: int) -> tuple[Shape, int, np.dtype[Any], int]:
    """Spatial shape, channels, type and place of the voxels."""
    code = int(header["datatype"])
    if code not in _DTYPES:
        held = _REFUSED.get(code, f"values of unknown type {code}")
        raise bad_file(path, f"holds {held}; save integers or floats, one volume for each component")
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise bad_file(path, f"declares {axes} axes, where NIfTI has 1 to 7; the header is corrupt")
    sides = [int(side) for side in header["dim"][1 : axes + 1]] + [1] * (3 - axes)
    more = [side for side in sides[3:] if side != 1]
    if len(more) > 1:
        raise bad_file(path, f"has axes {tuple(sides)}; save at most one axis besides x, y and z")
    offset = float(header["vox_offset"])
    if offset != 0 and not (least <= offset < 2**31 and offset.is_integer()):
        raise bad_file(path, f"declares its voxels at byte {offset:g}; the header is corrupt, export the file again")
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    return (sides[2], sides[1], sides[0]), (more[0] if more else 1), dtype, int(offset) or least


def _plain(path: Path, offset: int, size: int) -> NDArray[np.uint8]:
    try:
        missing = offset + size - path.stat().st_size
        if missing > 0:
            raise EOFError(f"{missing} bytes are missing")
        return np.fromfile(path, np.uint8, size, offset=offset)
    except DECODER_ERRORS as error:
        raise undecodable(path, "NIfTI", error) from None


def _scaled(path: Path, header: Any, array: Array) -> Array:
    """Native byte order, and slope and intercept applied where they change something."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope != 0 and np.isfinite(slope) and not np.isfinite(inter):
        raise bad_file(path, f"declares scl_slope {slope:g} and scl_inter {inter:g}; correct the header")
    if slope == 0 or not np.isfinite(slope) or (slope, inter) == (1, 0):
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        return np.require(array, requirements=["C", "A"])
    check_values(path, array)
    with np.errstate(over="ignore"):
        array = array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32)
        array *= array.dtype.type(slope)
        array += array.dtype.type(inter)
    return array


def _grid(path: Path, header: Any, shape: Shape, given: tuple[float, ...] | None, notes: list[str]) -> Grid:
    """The geometry: sform, else qform, else pixdim; whatever was passed over is noted."""
    factor = _MILLIMETRES.get(int(header["xyzt_units"]) & 7)
    affine = _transform(header, notes)
    found: tuple[float, ...] | None
    if affine is not None:
        if factor is None:
            notes.append("unit not stated: taken as mm, as in every scanner's and atlas space")
        affine[:3] *= factor or 1.0
        found = column_spacing(affine)
    else:
        affine = _from_pixdim(path, header, shape, factor, given)
        found = column_spacing(affine) if factor else None
        notes.append("no usable sform or qform: axes and sizes are those of pixdim")
        if factor is None and given is None:
            notes.append("unit not stated: the size of a voxel is unknown; give spacing=(z, y, x) in mm")
    if given is not None:
        notes.append("spacing given by the caller")
    return Grid(shape, affine, given or found, "", b"", (*notes, *tilt(affine)))


def _transform(header: Any, notes: list[str]) -> NDArray[np.float64] | None:
    """The sform or the qform, the first that is set and sound."""
    from nibabel.spatialimages import HeaderDataError

    for name, make in (("sform", header.get_sform), ("qform", header.get_qform)):
        if int(header[f"{name}_code"]) > 0:
            try:
                with np.errstate(all="ignore"):
                    affine = np.array(make(), np.float64)
                if usable(affine):
                    return affine
            except (HeaderDataError, *DECODER_ERRORS):
                pass
            notes.append(f"{name} is degenerate and was ignored")
    return None


def _from_pixdim(
    path: Path, header: Any, shape: Shape, factor: float | None, given: tuple[float, ...] | None
) -> NDArray[np.float64]:
    """The affine of a file that has none: centred, its x axis to the left, as nibabel takes it."""
    from nibabel.volumeutils import shape_zoom_affine

    sides = shape[::-1]
    sizes = [abs(float(size)) or float(side == 1) for size, side in zip(header["pixdim"][1:4], sides, strict=True)]
    sizes = list(reversed(given)) if given else [size * (factor or 1.0) for size in sizes]
    affine = np.array(shape_zoom_affine(sides, sizes), np.float64) if np.isfinite(sizes).all() else np.zeros((4, 4))
    if not usable(affine):
        words = " x ".join(f"{float(size):g}" for size in header["pixdim"][1:4])
        raise bad_file(path, f"has no usable sform or qform, and pixdim {words}; pass spacing=(z, y, x) in mm")
    if given:
        header["pixdim"][1:4], header["xyzt_units"] = sizes, 2
    return affine
