"""DICOM series through SimpleITK (an extra): one series, whole, evenly spaced, or a refusal that says why."""

import locale
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import FormatError, MissingExtraError
from foveate.io.grid import Grid, column_spacing, tilt, usable
from foveate.io.guard import DECODER_ERRORS, bad_file, check_size, check_values, one_line, undecodable

Array = NDArray[Any]

_POSITION = "0020|0032"
_UNEVEN = 0.02  # share of a gap by which gaps may differ
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_dicom(path: str | Path) -> bool:
    """True for a DICOM file, by its magic bytes, and for a folder that holds one."""
    path = Path(path)
    try:
        return any(_has_magic(file) for file in sorted(path.iterdir())) if path.is_dir() else _has_magic(path)
    except (OSError, ValueError):
        return False


def read_dicom(path: Path, spacing: tuple[float, ...] | None, max_pixels: int) -> tuple[Shaped[Array, "C D H W"], Grid]:
    """Reads the one series of a folder, or the series that a file belongs to; rescale slope and intercept applied.

    Args:
        path: Folder or file.
        spacing: Size of a voxel in mm (z, y, x), instead of what the files say.
        max_pixels: Most voxels that the headers may declare.

    Returns:
        The voxels, slices in order of position, and their grid.

    Raises:
        FormatError: several series in a folder, a file that cannot be read, slices of different size, missing or
            unevenly spaced slices, too many voxels.
        MissingExtraError: SimpleITK is not installed.
    """
    sitk = _sitk()
    with _quiet(sitk):
        names = _files(sitk, path)
        heads = [_head(sitk, name) for name in names]
        size = heads[0].GetSize()
        channels, slices = heads[0].GetNumberOfComponents(), len(names) if len(names) > 1 else (*size, 1)[2]
        for name, head in zip(names, heads, strict=True):
            if head.GetSize() != size or head.GetNumberOfComponents() != channels:
                raise bad_file(
                    name, f"is a slice of {head.GetSize()}, others are {size}; keep one series in the folder"
                )
        shape = (int(slices), int(size[1]), int(size[0]))
        check_size(path, shape, channels, max_pixels)
        _check_gaps(path, names, heads)
        mixed = len({head.GetPixelID() for head in heads}) > 1
        image = _read(sitk, path, names, sitk.sitkFloat32 if mixed else sitk.sitkUnknown)
        array = np.asarray(sitk.GetArrayFromImage(image))
    array = np.moveaxis(array, -1, 0) if channels > 1 else array[None]
    if array.shape != (channels, *shape):
        raise undecodable(path, "DICOM", ValueError(f"{array.shape[1:]} voxels, {shape} declared"))
    check_values(path, array)
    affine = _affine(path, image)
    notes = [] if spacing is None else ["spacing given by the caller"]
    notes += [f"{channels} components are read as channels"] if channels > 1 else []
    reader = f"DICOM through SimpleITK, {len(names)} file" + "s" * (len(names) != 1)
    return array, Grid(shape, affine, spacing or column_spacing(affine), reader, b"", (*notes, *tilt(affine)))


def _sitk() -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise MissingExtraError("DICOM needs SimpleITK; run: pip install 'foveate[dicom]'") from None
    return SimpleITK


@contextmanager
def _quiet(sitk: Any) -> Iterator[None]:
    """Keeps ITK's warnings to itself, and its choice of locale: it leaves the process with that of C."""
    shown, words = sitk.ProcessObject.GetGlobalWarningDisplay(), locale.setlocale(locale.LC_ALL)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
        locale.setlocale(locale.LC_ALL, words)


def _has_magic(path: Path) -> bool:
    if not path.is_file() or path.name == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _files(sitk: Any, path: Path) -> list[Path]:
    """The files of the series, in order of position; no DICOM file of the folder is left out in silence."""
    folder = path if path.is_dir() else path.parent
    found = sitk.ImageSeriesReader
    try:
        series = {
            uid: [Path(name) for name in found.GetGDCMSeriesFileNames(str(folder), uid)]
            for uid in found.GetGDCMSeriesIDs(str(folder))
        }
    except DECODER_ERRORS as error:
        raise undecodable(path, "DICOM", _reason(error)) from None
    known = {name.name for names in series.values() for name in names}
    if path.is_file():
        if path.name not in known:
            raise undecodable(path, "DICOM", ValueError("no image in it"))
        names = next(names for names in series.values() if any(path.name == name.name for name in names))
        return [path] if len(names) == 1 else names
    for name in sorted(path.iterdir()):
        if name.name not in known and (name.suffix.lower() == ".dcm" or _has_magic(name)):
            raise bad_file(name, "is no readable DICOM image; fetch it again, or move it out of the folder")
    if len(series) > 1:
        listed = ", ".join(f"{one_line(uid)[:80]} ({len(names)} files)" for uid, names in list(series.items())[:8])
        raise bad_file(path, f"holds {len(series)} series: {listed}; give one file of the series that you mean")
    return next(iter(series.values()))


def _head(sitk: Any, path: Path) -> Any:
    """The header of one file."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except DECODER_ERRORS as error:
        raise undecodable(path, "DICOM", _reason(error)) from None
    return reader


def _check_gaps(path: Path, names: list[Path], heads: list[Any]) -> None:
    """Refuses slices that lack a position, share one, or lie unevenly, as where one is missing."""
    if len(names) < 2:
        return
    try:
        at = np.array([[float(part) for part in head.GetMetaData(_POSITION).split("\\")] for head in heads])
    except DECODER_ERRORS:
        raise bad_file(path, "has slices without a position; export the series again") from None
    seen: dict[tuple[float, ...], str] = {}
    for place, name in zip(at.tolist(), names, strict=True):
        if (other := seen.setdefault(tuple(place), name.name)) != name.name:
            raise bad_file(path, f"has two slices at one place, {other} and {name.name}; keep one")
    gaps = np.linalg.norm(np.diff(at, axis=0), axis=1)
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    if not abs(float(gaps[worst]) - usual) <= _UNEVEN * usual:
        raise bad_file(
            path,
            f"has a gap of {gaps[worst]:g} mm between {names[worst].name} and {names[worst + 1].name}, elsewhere "
            f"{usual:g} mm; a slice is missing or the series is uneven: export it again, or resample it",
        )


def _read(sitk: Any, path: Path, names: list[Path], kind: int) -> Any:
    reader = sitk.ImageSeriesReader() if len(names) > 1 else sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetOutputPixelType(kind)
    if len(names) > 1:
        reader.SetFileNames([str(name) for name in names])
    else:
        reader.SetFileName(str(names[0]))
    try:
        return reader.Execute()
    except DECODER_ERRORS as error:
        raise undecodable(path, "DICOM", _reason(error)) from None


def _reason(error: BaseException) -> FormatError:
    """The last sentence of what ITK says, without its own source paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return FormatError(lines[-1] if lines else type(error).__name__)


def _affine(path: Path, image: Any) -> NDArray[np.float64]:
    """Voxel indices (x, y, z) to mm in RAS+; DICOM's own frame is LPS."""
    affine = np.eye(4)
    turn = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = turn * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = np.asarray(_LPS_TO_RAS @ affine)
    if not usable(affine):
        raise bad_file(path, f"has voxels of {image.GetSpacing()} mm, directions {turn.tolist()}; export it again")
    return affine
