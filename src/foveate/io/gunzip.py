"""Gzip files whose size is known beforehand, inflated at once and never further than that."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FormatError
from foveate.io.guard import DECODER_ERRORS, bad_file, undecodable

GZIP = b"\x1f\x8b"
_BLOCK = 2**20
_MOST_PER_BYTE = 1032  # what a byte of deflate can become
_TRAILING = 2**20  # bytes after the last declared one that are read, to reach the check sum, before the file is refused


def gunzip_head(path: Path, size: int) -> bytes:
    """Returns the first ``size`` bytes of a gzip file's contents, or fewer where it has no more.

    Raises:
        FormatError: the file cannot be read, or its stream is corrupt.
    """
    head = b""
    try:
        for piece in _pieces(path, size):
            head += piece
            if len(head) >= size:
                break
    except DECODER_ERRORS as error:
        raise undecodable(path, "gzip", error) from None
    return head[:size]


def gunzip(path: Path, size: int) -> NDArray[np.uint8]:
    """Returns the first ``size`` bytes of a gzip file's contents, which must be (nearly) all of them.

    The size that the gzip file itself declares is not believed: it is a 32-bit number that anyone can write.

    Args:
        path: The file.
        size: Bytes that the contents declare of themselves.

    Raises:
        FormatError: fewer bytes, many more bytes, a wrong check sum, or the file cannot be read.

    Cost:
        One pass of libdeflate; memory of ``size`` and of the file. Files of several members, or far larger than
        their contents, are inflated block by block instead.
    """
    import imagecodecs

    try:
        stored = path.stat().st_size
        if stored * _MOST_PER_BYTE < size:
            raise EOFError(f"{stored} bytes cannot hold the {size} that the header declares")
        out = np.empty(size, np.uint8)
        if stored <= size + size // 8 + _BLOCK:
            try:
                if len(imagecodecs.gzip_decode(path.read_bytes(), out=out.data)) == size:
                    return out
            except imagecodecs.DeflateError:
                pass  # several members, trailing bytes, or damage: the slow way tells which
        _fill(path, out)
    except FormatError:
        raise
    except DECODER_ERRORS as error:
        raise undecodable(path, "gzip", error) from None
    return out


def _fill(path: Path, out: NDArray[np.uint8]) -> None:
    """Inflates block by block into ``out``."""
    at = 0
    for piece in _pieces(path, _BLOCK):
        part = np.frombuffer(piece, np.uint8)[: max(0, len(out) - at)]
        out[at : at + len(part)] = part
        at += len(piece)
        if at > len(out) + _TRAILING:
            raise bad_file(path, f"inflates past the {len(out)} bytes that its header declares; export the file again")
    if at < len(out):
        raise EOFError(f"{at} of {len(out)} bytes")


def _pieces(path: Path, block: int) -> Iterator[bytes]:
    """The contents of all members, in pieces of at most ``block`` bytes."""
    inflater = zlib.decompressobj(31)
    with path.open("rb") as file:
        data = file.read(block)
        while data:
            yield inflater.decompress(data, block)
            data = inflater.unconsumed_tail
            if inflater.eof:
                data = inflater.unused_data + file.read(block)
                if not data.startswith(GZIP):
                    return  # padding, as gzip itself ignores it
                inflater = zlib.decompressobj(31)
            data = data or file.read(block)
    raise EOFError("the stream has no end")
