"""Small image files of every kind that we read, made when they are needed, and the ways to damage them."""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]


def texture(*shape: int, dtype: str = "uint8", seed: int = 0) -> Array:
    """Smooth structure with some noise, over the whole range of an integer dtype or 0..1."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(0, 3 + axis, side) for axis, side in enumerate(shape)), indexing="ij")
    values = np.clip(0.5 + 0.4 * np.sin(sum(axes)) + 0.05 * rng.standard_normal(shape), 0, 1)
    return (values if dtype.startswith("float") else values * np.iinfo(dtype).max).astype(dtype)


def pil_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def tiff_bytes(array: Array, **options: Any) -> bytes:
    buffer = BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy_bytes(array: Array, **options: Any) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bytes(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, so that sizes and depths can be declared that no library would write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + png_chunk(b"IEND", b"")


def tiff_header(width: int, height: int, *, next_page: int = 0, big: bool = False, rows: int = 2**31) -> bytes:
    """A little-endian grey TIFF of one strip of 8 bytes, whatever size it declares."""
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 8),
        (262, 1),
        (273, 8 + 8 * big),
        (277, 1),
        (278, rows),
        (279, 8),
    ]
    if big:
        entries = b"".join(struct.pack("<HHQQ", tag, 16, 1, value) for tag, value in tags)
        head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 24) + bytes(8)
        return head + struct.pack("<Q", len(tags)) + entries + struct.pack("<Q", next_page)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        struct.pack("<2sHI", b"II", 42, 16)
        + bytes(8)
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", next_page)
    )


def containers() -> dict[str, bytes]:
    """One healthy file of each kind, none above 10 KB."""
    grey, rgb, deep = texture(61, 83), texture(61, 83, 3), texture(33, 45, 3, dtype="uint16")
    picture, paint = Image.fromarray(rgb), {"photometric": "rgb"}
    import imagecodecs

    return {
        "png-grey": pil_bytes(Image.fromarray(grey), "PNG"),
        "png-palette": pil_bytes(picture.quantize(32), "PNG"),
        "png-rgb16": bytes(imagecodecs.png_encode(deep)),
        "jpeg": pil_bytes(picture, "JPEG", quality=80),
        "jpeg-progressive": pil_bytes(picture, "JPEG", quality=80, progressive=True),
        "bmp": pil_bytes(Image.fromarray(grey), "BMP"),
        "gif": pil_bytes(picture.resize((40, 30)).quantize(32), "GIF"),
        "webp": pil_bytes(picture, "WEBP", lossless=False),
        "tiff-strip": tiff_bytes(grey, rowsperstrip=8),
        "tiff-deflate": tiff_bytes(grey, rowsperstrip=16, compression="zlib", predictor=True),
        "tiff-lzw": tiff_bytes(grey, rowsperstrip=16, compression="lzw"),
        "tiff-tile": tiff_bytes(grey, tile=(32, 32), compression="zlib"),
        "tiff-jpeg": tiff_bytes(rgb, tile=(32, 32), compression="jpeg", **paint),
        "tiff-big": tiff_bytes(deep, bigtiff=True, compression="zlib", **paint),
        "tiff-stack": tiff_bytes(texture(5, 21, 23, dtype="uint16"), photometric="minisblack", compression="zlib"),
        "tiff-ome": tiff_bytes(texture(2, 3, 11, 13), ome=True, photometric="minisblack", metadata={"axes": "CZYX"}),
        "npy": npy_bytes(texture(3, 31, 33)),
        "npy-float": npy_bytes(texture(31, 33, dtype="float32")),
    }


def flipped(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies of a file with one to four bytes replaced, the header as often as all the rest."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(int(rng.integers(1, 5))):
            copy[int(rng.integers(0, min(len(data), 400) if rng.random() < 0.5 else len(data)))] = int(
                rng.integers(256)
            )
        yield bytes(copy)
