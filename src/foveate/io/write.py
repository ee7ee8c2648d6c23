"""Results on disk as a whole or not at all: masks, probabilities, pictures, JSON."""

import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FormatError, ShapeError
from foveate.io.guard import DECODER_ERRORS, bad_file

Array = NDArray[Any]

_REMEDY = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some of your quota or write elsewhere",
    errno.EFBIG: "raise the file size limit or write elsewhere",
    errno.EIO: "check the disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "write to another folder",
    errno.EPERM: "write to another folder",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "create the folder first",
}
_WHILE_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what else a block raises is its own affair
# Black for background, then 19 colours, which repeat; the first are those of Okabe and Ito, safe for the colour-blind.
_PALETTE = bytes.fromhex(
    "000000 e69f00 56b4e9 009e73 f0e442 cc79a7 0072b2 d55e00 911eb4 46f0f0 "
    "e6194b bcf60c 9a6324 fabebe 000075 aaffc3 800000 e6beff 808000 f032e6"
)


@contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """Opens a new binary file that takes the place of ``path`` only when the block ends well and all bytes are on disk.

    Until then, and after any error or Ctrl-C, ``path`` is what it was before; readers never see half a file.

    Args:
        path: Where the file shall be; its folder must exist. The bytes are written aside in the same folder.
        overwrite: False refuses a path that exists.

    Yields:
        The file, open for writing and reading; its ``name`` is the path aside.

    Raises:
        FormatError: the path exists and may not be overwritten, the disk is full, the folder is missing or read-only.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    aside = path.with_name(f".foveate-{secrets.token_hex(6)}{path.suffix[:16]}")
    try:
        file = aside.open("x+b")
    except OSError as error:
        raise unwritable(path, error) from None
    placing = False
    try:
        with file:
            yield file
            placing = True
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(path, overwrite)
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if not placing and error.errno not in _WHILE_WRITING:
            raise
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_mask(path: str | Path, labels: Any, *, overwrite: bool = False) -> None:
    """Writes class labels or instance labels as PNG or TIFF, by the suffix, exactly.

    A PNG of labels up to 255 carries a palette, so that viewers show the classes; its values are still the labels.

    Args:
        path: ``.png`` (2-D only), ``.tif`` or ``.tiff``.
        labels: ``[H, W]`` or ``[D, H, W]`` integers or booleans, 0..65535; stored as uint8 if they fit, else as uint16.
        overwrite: True replaces an existing file.

    Raises:
        FormatError: another suffix, an existing file, or the path cannot be written.
        ShapeError: labels of another shape, dtype or range.
    """
    path, array = Path(path), np.asarray(labels)
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "biu":
        raise ShapeError(f"labels of shape {array.shape} and dtype {array.dtype}; give [H, W] or [D, H, W] integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ShapeError(f"labels from {low} to {high}; a mask holds 0 to 65535")
    if array.dtype != np.uint16:
        array = array.astype(np.uint8 if high <= 255 else np.uint16, copy=False)
    suffix = _suffix(path, (".png", ".tif", ".tiff"), "labels must be stored exactly")
    if suffix == ".png" and array.ndim == 3:
        raise bad_file(path, f"a PNG cannot hold a volume {array.shape}; name the file .tif")
    refuse_existing(path, overwrite)
    data = _png(array[None], palette=True) if suffix == ".png" else _tiff(array, "ZYX"[-array.ndim :])
    _save(path, data, overwrite)


def write_probability(path: str | Path, probability: Any, *, overwrite: bool = False, half: bool = True) -> None:
    """Writes probabilities as a compressed floating-point TIFF.

    Args:
        path: ``.tif`` or ``.tiff``.
        probability: ``[K, H, W]``, ``[K, D, H, W]`` or ``[H, W]`` in 0..1.
        overwrite: True replaces an existing file.
        half: True stores float16 (error below 0.0005), False float32.

    Raises:
        FormatError: another suffix, an existing file, or the path cannot be written.
        ShapeError: not floating point, another shape, or values that are no probabilities.
    """
    path, array = Path(path), np.asarray(probability)
    if array.ndim not in (2, 3, 4) or array.size == 0 or array.dtype.kind != "f":
        raise ShapeError(f"probability of shape {array.shape} and dtype {array.dtype}; give [K, *S] floats")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ShapeError(f"probability from {low:g} to {high:g}; apply softmax or sigmoid first")
    _suffix(path, (".tif", ".tiff"), "floats need TIFF")
    refuse_existing(path, overwrite)
    array = array.astype(np.float16 if half else np.float32, copy=False)
    _save(path, _tiff(array, {2: "YX", 3: "CYX", 4: "CZYX"}[array.ndim]), overwrite)


def write_image(path: str | Path, image: Any, *, overwrite: bool = False) -> None:
    """Writes an image ``[C, *S]`` as PNG, JPEG (quality 90) or TIFF, by the suffix; PNG and TIFF keep its dtype.

    Args:
        path: ``.png``, ``.jpg``, ``.jpeg``, ``.tif`` or ``.tiff``; only TIFF holds volumes, floats or other channels.
        image: ``[C, H, W]`` or ``[C, D, H, W]``, or ``[H, W]`` for one channel.
        overwrite: True replaces an existing file.

    Raises:
        FormatError: another suffix, a format that cannot hold the image, an existing file, or it cannot be written.
        ShapeError: not ``[C, *S]``.
    """
    path, array = Path(path), np.asarray(image)
    array = array[None] if array.ndim == 2 else array
    if array.ndim not in (3, 4) or array.size == 0 or array.dtype.kind not in "uif":
        raise ShapeError(
            f"image of shape {array.shape} and dtype {array.dtype}; give [C, H, W] or [C, D, H, W] numbers"
        )
    suffix = _suffix(path, (".png", ".jpg", ".jpeg", ".tif", ".tiff"), "these are the formats we write")
    deep = (np.uint8, np.uint16) if suffix == ".png" else (np.uint8,)
    if suffix not in (".tif", ".tiff") and (array.ndim != 3 or len(array) not in (1, 3) or array.dtype not in deep):
        raise bad_file(path, f"a {suffix[1:]} cannot hold {array.dtype} {array.shape}; name the file .tif")
    refuse_existing(path, overwrite)
    if suffix == ".png":
        data = _png(array)
    elif suffix in (".jpg", ".jpeg"):
        data = _jpeg(array)
    else:
        data = _tiff(array, "CYX" if array.ndim == 3 else "CZYX")
    _save(path, data, overwrite)


def write_png(path: str | Path, image: Any, *, overwrite: bool = False) -> None:
    """Writes ``[C, H, W]`` or ``[H, W]`` uint8 or uint16 as PNG; see ``write_image``."""
    _suffix(Path(path), (".png",), "this writes PNG")
    write_image(path, image, overwrite=overwrite)


def write_json(path: str | Path, value: Any, *, overwrite: bool = True) -> None:
    """Writes a value as indented JSON; NumPy numbers become numbers, and what is NaN or infinite becomes ``null``."""
    _save(Path(path), (json.dumps(_plain(value), indent=2) + "\n").encode(), overwrite)


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]], *, overwrite: bool = True) -> None:
    """Writes one JSON record per line, all or nothing."""
    _save(Path(path), b"".join(_line(record) for record in records), overwrite)


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Adds one record to a JSONL file in a single write, on a new line even if a killed run left half a line behind.

    Raises:
        FormatError: the disk is full, or the path cannot be written.
    """
    path = Path(path)
    try:
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            broken = end > 0 and file.read(1) != b"\n"
            file.write(b"\n" * broken + _line(record))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a JSONL file; lines that a killed run left unfinished are skipped.

    Raises:
        FormatError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise bad_file(path, f"cannot be read ({error.strerror}); check the path") from None
    records = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def unwritable(path: Path, error: OSError) -> FormatError:
    """Returns the error that says why a file cannot be written, and what to do about it."""
    remedy = _REMEDY.get(error.errno or 0, "check the path and the disk")
    return bad_file(path, f"cannot be written ({error.strerror or error}); {remedy}")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuses a path that no file may be written to.

    Raises:
        FormatError: it is a folder or no name at all, or it exists and ``overwrite`` is False.
    """
    if "\0" in str(path):
        raise bad_file(path, "cannot be written (null character in the name); choose another name")
    if path.is_dir():
        raise bad_file(path, "is a folder; give the name of a file")
    if not overwrite and path.exists():
        raise bad_file(path, "exists already; choose another name, or allow it with --overwrite (overwrite=True)")


def label_palette() -> bytes:
    """256 colours for labels, in masks, outlines and pictures alike; the last is white, which means ignore."""
    return (_PALETTE[:3] + _PALETTE[3:] * 14)[: 255 * 3] + b"\xff\xff\xff"


def _save(path: Path, data: bytes | memoryview, overwrite: bool) -> None:
    try:
        with atomic_write(path, overwrite=overwrite) as file:
            file.write(data)
    except OSError as error:
        raise unwritable(path, error) from None


def _suffix(path: Path, allowed: tuple[str, ...], reason: str) -> str:
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise bad_file(path, f"has the suffix {suffix!r}, but {reason}; name it {' or '.join(allowed)}")
    return suffix


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _png(image: Array, *, palette: bool = False) -> memoryview:
    """PNG bytes of ``[1 or 3, H, W]`` uint8 or uint16."""
    if image.dtype == np.uint16:
        import imagecodecs

        return memoryview(imagecodecs.png_encode(np.ascontiguousarray(_last(image))))
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(_last(image)))
    if palette:
        picture.putpalette(label_palette())
    buffer = BytesIO()
    picture.save(buffer, format="PNG", compress_level=4)
    return buffer.getbuffer()


def _jpeg(image: Array) -> memoryview:
    from PIL import Image

    buffer = BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(_last(image))).save(buffer, format="JPEG", quality=90)
    except DECODER_ERRORS:
        raise ShapeError(f"a JPEG holds at most 65535 pixels a side, not {image.shape}; use .png or .tif") from None
    return buffer.getbuffer()


def _tiff(array: Array, axes: str) -> memoryview:
    import tifffile

    rgb = axes == "CYX" and len(array) == 3 and array.dtype in (np.uint8, np.uint16)
    buffer = BytesIO()
    tifffile.imwrite(
        buffer,
        np.moveaxis(array, 0, -1) if rgb else array,
        photometric="rgb" if rgb else "minisblack",
        compression="zlib",
        predictor=True,
        metadata={"axes": "YXS" if rgb else axes},
        bigtiff=array.nbytes > 2**31,
    )
    return buffer.getbuffer()


def _last(image: Array) -> Array:
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_plain(record)) + "\n").encode()


def _plain(value: Any) -> Any:
    """The value in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
