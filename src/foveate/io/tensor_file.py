"""Arrays in a safetensors file with a word on what they are: written as streams, read by row.

A file begins with the length of its header in 8 bytes, then the header as JSON, then the arrays one after the other.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FormatError
from foveate.io.guard import bad_file
from foveate.io.tile_cache import DiskFile, handle, stamp_of
from foveate.io.write import atomic_write

Array = NDArray[Any]

_NAMES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U16": "<u2", "U8": "|u1"}
_CODES = {np.dtype(kind): name for name, kind in _NAMES.items()}
_MOST_HEADER = 100 * 2**20  # as in the format's own rules


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


@dataclass(frozen=True)
class Stored:
    """Where an array lies in a file."""

    shape: tuple[int, ...]
    kind: np.dtype[Any]
    place: int


class TensorFile:
    """The arrays of a file that says of itself what it is; of files that are open at once there are few.

    Args:
        path: The file.
        kind: What its header must call it.
        remedy: What to do about a file that is something else.

    Raises:
        FormatError: missing, cut short, damaged, or another kind of file.
    """

    def __init__(self, path: Path, kind: str, remedy: str) -> None:
        self.path, self.kind, self._remedy = path, kind, remedy
        self._stamp = stamp_of(path)
        head = self._bytes_at(0, 16)
        if not is_tensor_file(head):
            raise bad_file(path, f"is no {kind} (it begins with {head[:8]!r}); {remedy}")
        size = int.from_bytes(head[:8], "little")
        self._start, self._size = 8 + size, self._stamp[1]
        header: Any = None
        with suppress(ValueError, RecursionError):
            header = json.loads(self._bytes_at(8, size))
        if not isinstance(header, dict):
            raise self.damaged("its header is cut short or no JSON")
        about = header.pop("__metadata__", {})
        if not isinstance(about, dict) or about.get("kind") != kind:
            found = about.get("kind") if isinstance(about, dict) else None
            raise bad_file(path, f"is a safetensors file of kind {found!r}, not a {kind}; {remedy}")
        self.about: dict[str, str] = about
        self._header: dict[str, Any] = header

    def damaged(self, reason: str) -> FormatError:
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

    def find(self, name: str, num_axes: int, kinds: str) -> Stored:
        """Where an array lies; nothing is read.

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
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self.damaged(f"it has no {name} of a known type") from None
        if len(shape) != num_axes or kind.kind not in kinds or min(shape, default=0) < 0:
            raise self.damaged(f"{name} is {kind} {shape}")
        if not 0 <= low <= high <= self._size - self._start or high - low != prod(shape) * kind.itemsize:
            raise self.damaged(f"{name} of {shape} is cut short")
        return Stored(shape, kind, self._start + low)

    def rows(self, stored: Stored, index: NDArray[np.int64]) -> Array:
        """Returns some rows of an array; rows that follow each other are read in one go, and no others are touched.

        Raises:
            FormatError: the file is not the same any more.
        """
        row = stored.shape[1:]
        out = np.empty((len(index), *row), stored.kind)
        size = prod(row) * stored.kind.itemsize
        if not out.size:
            return out
        file, held = self._file(), out.reshape(-1).view(np.uint8).data
        for run in np.split(np.arange(len(index)), np.flatnonzero(np.diff(index) != 1) + 1):
            part = held[int(run[0]) * size : (int(run[-1]) + 1) * size]
            if file.read_into(stored.place + int(index[run[0]]) * size, part) < len(part):
                raise self.damaged("it ends before its last row")
        return out

    def tensor(self, name: str, num_axes: int, kinds: str) -> Array:
        """Returns a whole array; see `find`."""
        stored = self.find(name, num_axes, kinds)
        return self.rows(stored, np.arange(stored.shape[0]))

    def _bytes_at(self, place: int, count: int) -> bytes:
        return self._file().read(place, count)

    def _file(self) -> DiskFile:
        file: DiskFile = handle((str(self.path), self._stamp), lambda: DiskFile(self.path, self._stamp))
        return file
