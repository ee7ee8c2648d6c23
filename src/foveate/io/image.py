"""Ordinary image files to ``[C, *S]`` arrays in their own dtype, chosen by content, checked before they are decoded."""

import struct
import threading
import warnings
import zlib
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from foveate.errors import FoveateError
from foveate.io.colour import flatten_alpha, upright
from foveate.io.guard import (
    DECODER_ERRORS,
    DEFAULT_MAX_PIXELS,
    Want,
    bad_file,
    check_axes,
    check_size,
    check_values,
    sniff,
    undecodable,
)

Array = NDArray[Any]

_ORIENTATION = 0x0112
MOST_CHANNELS = 4  # an NPY axis this short is taken for the channels
# The plugin classes are used directly: `Image.open` would apply its own process-wide limit, below our legal sizes.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
_QUIET = threading.Lock()  # warning filters belong to the process, so one thread at a time may hold them


def read_image(
    path: str | Path, *, axes: str | None = None, max_pixels: int = DEFAULT_MAX_PIXELS, want: Want = "shown"
) -> Shaped[Array, "C *S"]:
    """Reads an image or a volume as ``[C, *S]`` in the file's own dtype, upright and with what its numbers stand for.

    The reader is chosen by the first bytes of the file, so a PNG named ``.jpg`` is simply read. EXIF and TIFF
    orientation are applied; palettes become RGB; 1 bit becomes 0 and 255 of uint8; CMYK becomes RGB; 16 bits stay
    16 bits. Opaque alpha is dropped, other alpha is composited on white; RGBA whose colours are all grey becomes one
    channel. Colour profiles are not applied.

    Args:
        path: PNG, JPEG, BMP, TIFF, NPY, GIF or WebP file. A TIFF of several equal pages is a volume ``[C, D, H, W]``.
        axes: What the axes of the stored array of an NPY or TIFF are, in letters of ``CDHW``, such as ``"DHW"``.
            Without it a TIFF says so itself, and an NPY is read as ``[H, W]``; with three axes ``[C, H, W]`` if the
            first has at most 4 entries, else ``[H, W, C]`` if the last has, else ``[D, H, W]``; with four axes
            ``[C, D, H, W]`` or ``[D, H, W, C]`` by the same rule.
        max_pixels: Most pixels (voxels) that the header may declare; checked before anything is allocated.
        want: What the numbers shall be: what a viewer shows, or the stored values or colours, see ``guard.Want``.

    Returns:
        Contiguous array ``[C, H, W]`` or ``[C, D, H, W]``, native byte order, integer or float.

    Raises:
        FormatError: missing, empty, truncated or corrupt file, no image, more than one frame, too large, NaN or
            infinite values. A JPEG with changed bytes, and blocks of a TIFF without checksums, can decode to other
            pixels without any sign; keep checksums where that matters.

    Cost:
        The time of decoding, and memory of at most two copies of the pixels (three when channels are stored last).
    """
    path = Path(path)
    pixels = load(path, axes=axes, max_pixels=max_pixels, want=want)
    check_values(path, pixels)
    if pixels.dtype.kind == "b":
        pixels = pixels.view(np.uint8) * np.uint8(255 if want == "shown" else 1)
    return np.ascontiguousarray(pixels)


def load(path: Path, *, axes: str | None, max_pixels: int, want: Want) -> Array:
    """Reads ``[C, *S]``, upright; ``want`` says whether the numbers, the colours or the picture is meant."""
    kind = sniff(path)
    orientation = 1
    if kind == "npy":
        raw, found = _read_npy(path, axes, max_pixels)
    elif kind == "tiff":
        from foveate.io.tiff import read_tiff

        raw, found, orientation = read_tiff(path, axes=axes, max_pixels=max_pixels, want=want)
    else:
        raw, orientation = _read_flat(path, kind, max_pixels, want)
        found = "CHW"
    if raw.dtype.kind == "b":  # pillow and damaged files make booleans of other bytes than 0 and 1
        raw = np.asarray(raw.view(np.uint8) != 0)
    if "C" not in found:
        raw, found = raw[None], "C" + found
    return upright(raw.transpose([found.index(letter) for letter in "CDHW" if letter in found]), orientation)


def _read_flat(path: Path, kind: str, max_pixels: int, want: Want) -> tuple[Array, int]:
    """PNG, JPEG, BMP, GIF, WebP through pillow: ``[C, H, W]`` and the EXIF orientation."""
    try:
        data = path.read_bytes()
        depth = _check_png(path, data, max_pixels) if kind == "png" else 8
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _PLUGINS[kind](BytesIO(data))
            check_size(path, (image.height, image.width), len(image.getbands()), max_pixels)
            frames = int(getattr(image, "n_frames", 1))
        if frames > 1:
            raise bad_file(path, f"is animated ({frames} frames); save the frame that you mean as PNG")
        image.load()
        orientation = _orientation(image)
        pixels = _deep_png(data) if depth == 16 else _samples(image, want)
    except FoveateError:
        raise
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise undecodable(path, kind, error) from None
    if want == "values" and image.mode == "L" and depth in (2, 4):
        pixels = pixels // np.uint8(255 // (2**depth - 1))  # pillow spreads few bits over 0..255
    return flatten_alpha(pixels, composite=want == "shown") if len(pixels) in (2, 4) else pixels, orientation


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; unreadable EXIF counts as none, as in every viewer."""
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION, 1)
    except DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _samples(image: Image.Image, want: Want) -> Array:
    """Samples ``[C, H, W]`` of a decoded picture, one channel at a time to keep the peak low; alpha is still there."""
    if image.mode in ("P", "PA") and want != "values":
        clear = want == "shown" and ("transparency" in image.info or image.mode == "PA")
        image = image.convert("RGBA" if clear else "RGB")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    bands = len(image.getbands())
    first = np.asarray(image.getchannel(0) if bands > 1 else image)
    out = np.empty((bands, *first.shape), first.dtype)
    out[0] = first
    for index in range(1, bands):
        out[index] = image.getchannel(index)
    return out


def _check_png(path: Path, data: bytes, max_pixels: int) -> int:
    """Checks the sums of all critical chunks, the size, the frames and the end of a PNG; returns the bits per sample.

    Pillow skips the sums of the pixel data and may be content with a missing end.
    """
    at, depth, seen_end = 8, 8, False
    while at + 12 <= len(data) and not seen_end:
        length, name = struct.unpack_from(">I4s", data, at)
        body = memoryview(data)[at + 8 : at + 8 + length]
        at += 12 + length
        critical = not name[0] & 0x20
        if at > len(data):
            break
        if critical and zlib.crc32(body, zlib.crc32(name)) != struct.unpack_from(">I", data, at - 4)[0]:
            break
        if name == b"IHDR" and length == 13:
            width, height, depth = struct.unpack_from(">IIB", body)
            check_size(path, (height, width), 1, max_pixels)
        elif name == b"acTL" and length == 8 and (frames := struct.unpack_from(">I", body)[0]) > 1:
            raise bad_file(path, f"is animated ({frames} frames); save the frame that you mean as PNG")
        seen_end = name == b"IEND"
    if not seen_end:
        raise undecodable(path, "png", EOFError(f"chunk that ends at byte {at} of {len(data)}"))
    return int(depth)


def _deep_png(data: bytes) -> Array:
    """Decodes 16 bits per sample, which pillow would cut to 8 when there are colours."""
    import imagecodecs

    pixels = np.asarray(imagecodecs.png_decode(data))
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _read_npy(path: Path, axes: str | None, max_pixels: int) -> tuple[Array, str]:
    """Reads an array whose header was checked against the file's size; objects, which could run code, are refused."""
    try:
        with path.open("rb") as file:
            version, npy = np.lib.format.read_magic(file), np.lib.format
            shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
            if dtype.kind not in "biuf":
                raise bad_file(path, f"holds {dtype} values; save integers or floats")
            if not 2 <= len(shape) <= 4:
                raise bad_file(path, f"holds an array of shape {shape}; save 2 to 4 axes")
            axes = axes or _guess_axes(path, shape)
            check_axes(path, shape, axes)
            channels = shape[axes.index("C")] if "C" in axes else 1
            spatial = tuple(side for side, axis in zip(shape, axes, strict=True) if axis != "C")
            check_size(path, spatial, channels, max_pixels)
            missing = file.tell() + prod(shape) * dtype.itemsize - path.stat().st_size
            if missing > 0:
                raise bad_file(path, f"truncated NPY ({missing} bytes are missing); fetch or export the file again")
            file.seek(0)
            array = npy.read_array(file, allow_pickle=False)
    except FoveateError:
        raise
    except DECODER_ERRORS as error:
        raise undecodable(path, "npy", error) from None
    return (array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))), axes


def _guess_axes(path: Path, shape: tuple[int, ...]) -> str:
    """The rule of ``read_image`` for arrays that do not say what their axes are."""
    spatial = {2: "HW", 3: "HW", 4: "DHW"}[len(shape)]
    if len(shape) == 2:
        return spatial
    if shape[0] <= MOST_CHANNELS:
        return "C" + spatial
    if shape[-1] <= MOST_CHANNELS:
        return spatial + "C"
    if len(shape) == 3:
        return "DHW"
    raise bad_file(path, f"has shape {shape}, and no end of it looks like channels; say axes='CDHW' or 'DHWC'")
