"""Labels of a volume as NIfTI, in the grid of the volume they belong to."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.io.guard import bad_file
from foveate.io.volume import Volume
from foveate.io.write import atomic_write

Array = NDArray[Any]

_PLACE = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)
_MOST = 32767  # voxels along an axis of NIfTI-1
_LABEL = 1002  # NIFTI_INTENT_LABEL
_MILLIMETRE = 2


def write_volume(
    path: str | Path,
    labels: Any,
    like: Volume | None = None,
    *,
    spacing: tuple[float, ...] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes class or instance labels as NIfTI, exactly, in the grid of the volume that they were made from.

    Only the geometry of ``like`` is copied (sform, qform, their codes, pixdim, the unit): names, descriptions and
    extensions of the input are not.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        labels: ``[D, H, W]`` integers or booleans, 0..65535, in the frame of ``like`` as it was opened; stored as uint8
            if they fit, else as uint16.
        like: The volume. If it was opened ``canonical``, the labels are turned back.
        spacing: Size of a voxel in mm (z, y, x), where there is no ``like``; without both, voxels have no size.
        overwrite: True replaces an existing file.

    Raises:
        FormatError: another suffix, an existing file, or the path cannot be written.
        ShapeError: labels of another shape, dtype or range, or ``spacing`` that is not three sizes above 0.
    """
    import imagecodecs

    path, array = Path(path), np.asarray(labels)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise bad_file(path, "is no name for a NIfTI file; name it .nii or .nii.gz")
    if array.ndim != 3 or array.size == 0 or array.dtype.kind not in "biu":
        raise ShapeError(f"labels of shape {array.shape} and dtype {array.dtype}; give [D, H, W] integers")
    if spacing is not None and (len(spacing) != 3 or not all(0 < size < np.inf for size in spacing)):
        raise ShapeError(f"spacing {spacing} for 3 axes; give (z, y, x) in mm, each above 0")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ShapeError(f"labels from {low} to {high}; a mask holds 0 to 65535")
    array = array if like is None else like.to_native(array)
    array = np.ascontiguousarray(array, np.dtype("<u1" if high <= 255 else "<u2"))
    with atomic_write(path, overwrite=overwrite) as file:
        header = _header(array, like, spacing)
        data = header + array.tobytes()
        file.write(imagecodecs.gzip_encode(data, level=6) if path.name.lower().endswith(".gz") else data)


def _header(array: Array, like: Volume | None, spacing: tuple[float, ...] | None) -> bytes:
    """The header up to the first voxel, little-endian."""
    from nibabel import Nifti1Header, Nifti2Header

    stored = like.grid.header if like is not None else b""
    deep = max(array.shape) > _MOST or len(stored) == 540
    header: Any = (Nifti2Header if deep else Nifti1Header)(endianness="<", check=False)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape[::-1])
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = (544 if deep else 352), 1, 0
    header["intent_code"] = _LABEL
    if like is not None and stored:
        kind = Nifti2Header if len(stored) == 540 else Nifti1Header
        source = kind(stored, "<", check=False)
        header["pixdim"][:4] = source["pixdim"][:4]
        header["xyzt_units"] = int(source["xyzt_units"]) & 7
        for name in _PLACE:
            header[name] = source[name]
    elif like is not None:
        header.set_qform(like.grid.affine, code="scanner", strip_shears=True)
        header.set_sform(like.grid.affine, code="scanner")
        header["xyzt_units"] = _MILLIMETRE
    elif spacing is not None:
        affine = np.diag([*reversed(spacing), 1.0])
        header.set_qform(affine, code="scanner")
        header.set_sform(affine, code="scanner")
        header["xyzt_units"] = _MILLIMETRE
    return bytes(header.binaryblock) + b"\0" * 4
