"""Arrays in a safetensors file with a word on what they are: written as streams, read by memory map.

A file begins with the length of its header in 8 bytes, then the header as JSON, then the arrays one after the other.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.io.guard import bad_file
from foveate.io.write import atomic_write

Array = NDArray[Any]

_NAMES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U16": "<u2", "U8": "|u1"}
_CODES = {np.dtype(kind): name for name, kind in _NAMES.items()}
_MOST_HEADER = 100 * 2**20  # as in the format's own rules
_MOST_MAPPED = 32 * 2**20  # bytes that were looked at and may stay in the memory of the process


def is_tensor_file(head: bytes) -> bool:
    """Whether a file that begins so is safetensors."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MOST_HEADER


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Array | tuple[tuple[int, ...], np.dtype[Any], Iterable[Array]]],
    about: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes arrays whole or not at all.

    Args:
        path: The file; its folder must exist.
        tensors: Arrays by name, or (shape, type, parts), of which the parts are made while they are written.
        about: What the file says of itself.
        overwrite: True replaces an existing file.

    Returns:
        ``path``.

    Raises:
        FormatError: the path exists or cannot be written, or the parts of an array are not as many bytes as it has.
    """
    plain = {
        name: (value.shape, value.dtype, (value,)) if isinstance(value, np.ndarray) else value
        for name, value in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": dict(about)}
    place = 0
    order = sorted(plain, key=lambda name: -plain[name][1].itemsize)  # so that all lie where their type wants them
    for name in order:
        shape, kind, _ = plain[name]
        end = place + prod(shape) * kind.itemsize
        header[name] = {"dtype": _CODES[kind], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            shape, kind, parts = plain[name]
            missing = prod(shape) * kind.itemsize
            for part in parts:
                missing -= file.write(np.ascontiguousarray(part, kind).data)
            if missing:
                raise bad_file(Path(path), f"{name} of {shape} is {missing} bytes short; give as much as was announced")
    return Path(path)


class TensorFile:
    """The arrays of a file that says of itself what it is.

    Args:
        path: The file.
        kind: What its header must call it.
        remedy: What to do about a file that is something else.

    Raises:
        FormatError: missing, cut short, damaged, or another kind of file.
    """

    def __init__(self, path: Path, kind: str, remedy: str) -> None:
        self.path, self.kind, self._remedy = path, kind, remedy
        header: Any = None
        try:
            with path.open("rb") as file:
                head = file.read(16)
                is_one = is_tensor_file(head)
                self._start = 8 + int.from_bytes(head[:8], "little") if is_one else 0
                file.seek(8)
                text = file.read(self._start - 8) if is_one else b""
                self._bytes = file.seek(0, 2) - self._start
                with suppress(ValueError, RecursionError):
                    header = json.loads(text)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if is_one else None
        except OSError as error:
            raise bad_file(path, f"cannot be read ({error.strerror or error}); check the path") from None
        if not is_one:
            raise bad_file(path, f"is no {kind} (it begins with {head[:8]!r}); {remedy}")
        if not isinstance(header, dict):
            raise self.damaged("its header is cut short or no JSON")
        about = header.pop("__metadata__", {})
        if not isinstance(about, dict) or about.get("kind") != kind:
            found = about.get("kind") if isinstance(about, dict) else None
            raise bad_file(path, f"is a safetensors file of kind {found!r}, not a {kind}; {remedy}")
        self.about: dict[str, str] = about
        self._header: dict[str, Any] = header
        self._seen = 0

    def damaged(self, reason: str) -> Exception:
        """The error about a file that is not what its writer made."""
        return bad_file(self.path, f"damaged {self.kind} ({reason}); {self._remedy}")

    def value(self, name: str, default: Any = None) -> Any:
        """What the header says of itself under ``name``, as JSON.

        Raises:
            FormatError: it is no JSON.
        """
        try:
            return json.loads(self.about[name]) if name in self.about else default
        except (ValueError, TypeError, RecursionError):
            raise self.damaged(f"{name} is no JSON") from None

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def tensor(self, name: str, num_axes: int, kinds: str) -> Array:
        """A view of an array in the file, which must not be written to; nothing is read yet.

        Args:
            name: Which.
            num_axes: How many axes it must have.
            kinds: numpy's letters of the types that it may have.

        Raises:
            FormatError: it is not there, of other axes or types, or the file ends before it does.
        """
        try:
            entry = self._header[name]
            kind, shape = np.dtype(_NAMES[entry["dtype"]]), tuple(int(side) for side in entry["shape"])
            low, high = (int(place) for place in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise self.damaged(f"it has no {name} of a known type") from None
        if len(shape) != num_axes or kind.kind not in kinds or min(shape, default=0) < 0:
            raise self.damaged(f"{name} is {kind} {shape}")
        if not 0 <= low <= high <= self._bytes or high - low != prod(shape) * kind.itemsize:
            raise self.damaged(f"{name} of {shape} is cut short")
        assert self._map is not None
        return np.frombuffer(self._map, kind, prod(shape), self._start + low).reshape(shape)

    def release(self, num_bytes: int) -> None:
        """Count what was looked at, and let go of pages of the file once they are many; they are read again at need."""
        self._seen += num_bytes
        if self._map is not None and self._seen > _MOST_MAPPED and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._seen = 0
