"""What every reader checks before it believes a file: what it is, how large it says it is, what it holds."""

import struct
import tokenize
import zlib
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError

DEFAULT_MAX_PIXELS = 2**28  # 16384 x 16384
CHANNELS_PER_PIXEL = 4  # samples allowed for each allowed pixel, so that 40 channels of 5000 x 5000 still pass

# shown: what a viewer shows (images). values: the stored numbers, such as palette indices and booleans (label masks).
# colours: the stored colours, alpha ignored (colour masks).
Want = Literal["shown", "values", "colours"]

# What pillow, tifffile, imagecodecs and numpy are known to raise on damaged files; caught only around calls of theirs.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\x93NUMPY", "npy"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
)


def one_line(text: object) -> str:
    """Returns ``text`` on one line of printable characters, so that no file can write into a terminal or a log."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(str(text).split()))


def bad_file(path: Path, reason: object) -> FormatError:
    """Returns the error that names the file and says in one line what is wrong with it."""
    return FormatError(f"{one_line(path)}: {one_line(reason)}")


def undecodable(path: Path, kind: str, error: BaseException) -> FormatError:
    """Returns the error for a file that its own decoder gave up on, with the decoder's reason."""
    reason = one_line(error) or type(error).__name__
    return bad_file(path, f"truncated or corrupt {kind.upper()} ({reason[:160]}); fetch or export the file again")


def sniff(path: Path) -> str:
    """Returns the kind of an image file by its first bytes: png, jpeg, bmp, tiff, npy, gif or webp; never by its name.

    Raises:
        FormatError: the file is missing, unreadable, empty, or none of these.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise bad_file(path, f"cannot be read ({reason}); check the path") from None
    if not head:
        raise bad_file(path, "is empty (0 bytes); fetch or export the file again")
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    raise bad_file(
        path, f"is no image that we read (it begins with {head[:8]!r}); give PNG, JPEG, BMP, TIFF, NPY, GIF or WebP"
    )


def check_size(path: Path, shape: tuple[int, ...], channels: int, max_pixels: int) -> None:
    """Refuses sizes of zero and sizes above ``max_pixels``, from the header alone, before anything is allocated.

    Args:
        path: The file, for the message.
        shape: Spatial shape *S that the header declares.
        channels: Number of channels that the header declares.
        max_pixels: Most pixels (voxels) allowed; ``channels`` may be up to 4 for each of them.
    """
    size = " x ".join(map(str, shape)) + f" pixels of {channels} channel" + "s" * (channels != 1)
    if min((*shape, channels)) < 1:
        raise bad_file(path, f"declares {size}; every side must be at least 1")
    if prod(shape) > max_pixels or prod(shape) * channels > CHANNELS_PER_PIXEL * max_pixels:
        needed = max(prod(shape), -(-prod(shape) * channels // CHANNELS_PER_PIXEL))
        raise bad_file(
            path,
            f"declares {size}, above the limit of {max_pixels} pixels; "
            f"if you trust the file, pass --max-pixels {needed} (max_pixels={needed})",
        )


def check_axes(path: Path, shape: tuple[int, ...], axes: str) -> None:
    """Refuses axes that are not letters of ``CDHW``, once each, for every axis of the stored array."""
    if "".join(sorted(axes)) not in ("HW", "CHW", "DHW", "CDHW"):
        raise ConfigError(f"axes={axes!r} must name H and W, and C and D where they exist, once each, such as 'CHW'")
    if len(axes) != len(shape):
        raise bad_file(path, f"has {len(shape)} axes {shape}, but axes={axes!r} names {len(axes)}; name each of them")


def check_values(path: Path, pixels: NDArray[Any]) -> None:
    """Refuses dtypes that are no pixels and floating-point values that are not finite, with their count."""
    if pixels.dtype.kind not in "biuf":
        raise bad_file(path, f"holds {pixels.dtype} values; give integers or floats")
    if pixels.dtype.kind != "f":
        return
    finite = np.isfinite(pixels)
    if not finite.all():
        count = int(finite.size - np.count_nonzero(finite))
        raise bad_file(path, f"holds {count} values that are NaN or infinite; replace them before reading")
