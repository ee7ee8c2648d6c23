"""Open files and decoded tiles that one process keeps: few, bounded, safe under threads, fork and spawn."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from foveate.io.guard import bad_file

Array = NDArray[Any]
Stamp = tuple[int, int]  # when a file was changed, and its size

DEFAULT_CACHE_BYTES = 64 * 2**20
_MOST_FILES = 32
_LOCK = threading.Lock()
_OPEN: OrderedDict[Hashable, Any] = OrderedDict()
_INHERITED: list[Any] = []


class TileCache:
    """Decoded tiles, the least recently used of which go first.

    Args:
        max_bytes: Most bytes of pixels kept; a tile larger than this is never kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._tiles: OrderedDict[Hashable, Array] = OrderedDict()

    def __reduce__(self) -> tuple[type["TileCache"], tuple[int]]:
        return TileCache, (self.max_bytes,)

    def get(self, key: Hashable) -> Array | None:
        """Returns the tile, which must not be written to, or None."""
        with _LOCK:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
        return tile

    def put(self, key: Hashable, tile: Array) -> None:
        """Keeps a tile that nobody will write to."""
        with _LOCK:
            if key in self._tiles or tile.nbytes > self.max_bytes:
                return
            self._tiles[key] = tile
            self.num_bytes += tile.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._tiles.popitem(last=False)[1].nbytes


SHARED = TileCache()


def handle(key: Hashable, opener: Callable[[], Any]) -> Any:
    """Returns what ``opener`` opened for ``key``; the least recently used of many is dropped.

    A dropped handle must close itself when nobody uses it any more.
    """
    with _LOCK:
        if key in _OPEN:
            _OPEN.move_to_end(key)
            return _OPEN[key]
    made = opener()
    with _LOCK:
        made = _OPEN.setdefault(key, made)
        gone = [_OPEN.popitem(last=False)[1] for _ in range(len(_OPEN) - _MOST_FILES)]
    del gone  # closed outside the lock
    return made


def forget(key: Hashable) -> None:
    """Drops the handle of ``key``, if there is one."""
    with _LOCK:
        gone = _OPEN.pop(key, None)
    del gone


def stamp_of(path: Path) -> Stamp:
    """What tells one content of a path from another.

    Raises:
        FormatError: the file cannot be read.
    """
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise bad_file(path, f"cannot be read ({getattr(error, 'strerror', None) or error}); check the path") from None
    return state.st_mtime_ns, state.st_size


class DiskFile:
    """Bytes by place, from any thread; closed when nobody holds it any more.

    Args:
        path: The file.
        stamp: What ``stamp_of`` said when the file was understood.

    Raises:
        FormatError: the file cannot be read, or it is not the same any more.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        check_unchanged(path, stamp)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise bad_file(path, f"cannot be read ({error.strerror}); check the path") from None
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()

    def read(self, offset: int, count: int) -> bytes:
        """Returns ``count`` bytes from ``offset`` on, fewer where the file ends."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(count)

    def read_into(self, offset: int, out: memoryview) -> int:
        """Fills ``out`` with the bytes from ``offset`` on; returns how many there were before the file ended."""
        done = 0
        with self._lock:
            self._file.seek(offset)
            while count := self._file.readinto(out[done:]):  # some systems read no more than 2 GiB at a time
                done += count
        return done


def check_unchanged(path: Path, stamp: Stamp) -> None:
    """Refuses a file that was written to since it was understood.

    Raises:
        FormatError: the file cannot be read, or it is not the same any more.
    """
    if stamp_of(path) != stamp:
        raise bad_file(path, "has changed since it was opened; open it again")


def _in_child() -> None:
    # A handle shared with the parent shares its place in the file, and closing it could wait for a lock of a thread
    # that does not exist here: the child opens its own and leaves the parent's alone.
    _INHERITED.extend(_OPEN.values())
    _OPEN.clear()
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_in_child)
