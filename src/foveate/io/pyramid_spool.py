"""Encoded tiles kept on disk until all levels are there, so that a run that was killed can go on."""

import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FormatError
from foveate.io.guard import DECODER_ERRORS, bad_file
from foveate.io.pyramid_tiles import Layout
from foveate.io.write import atomic_write, unwritable

Pending = dict[int, NDArray[Any]]  # by level, the rows [C, h, W] that wait for the rest of a row of the next level

_STATE = "state.npz"


class Spool:
    """Tiles of several levels, appended level by level in raster order.

    Args:
        path: the file that the tiles are for.
        folder: where to keep them so that another run finds them; None keeps them beside ``path`` in files without a
            name, which are gone with the process.
        layout: of the tiles.
        key: what the tiles come from.

    Raises:
        FormatError: the folder holds tiles of another output or is damaged, or the disk is full.
    """

    def __init__(self, path: Path, folder: Path | None, layout: Layout, key: str) -> None:
        self._place = folder or path
        self._folder = folder
        self._settings = {"output": str(path.absolute()), "key": key} | asdict(layout) | {"dtype": layout.dtype.str}
        self._lengths: list[list[int]] = [[] for _ in range(layout.levels)]
        self._sums = [0] * layout.levels
        self._files: list[IO[bytes]] = []
        self.rows = 0  # complete tile rows of level 0
        self.pending: Pending = {}
        with self._writing():
            if folder is None:
                self._files = [tempfile.TemporaryFile(dir=path.parent) for _ in self._lengths]  # noqa: SIM115
            else:
                folder.mkdir(parents=True, exist_ok=True)
                self._resume(folder)

    def add(self, level: int, tiles: Iterable[bytes]) -> None:
        """Appends encoded tiles to a level."""
        with self._writing():
            for tile in tiles:
                self._files[level].write(tile)
                self._lengths[level].append(len(tile))
                self._sums[level] = zlib.crc32(tile, self._sums[level])

    def commit(self, rows: int, pending: Pending) -> None:
        """Notes what was added: a run that is killed from now on continues after row ``rows`` of level 0."""
        if self._folder is None:
            return
        with self._writing():
            for file in self._files:
                file.flush()
            arrays = {f"pending-{level}": band for level, band in pending.items()}
            arrays |= {f"lengths-{level}": np.array(some, np.uint32) for level, some in enumerate(self._lengths)}
            index = json.dumps({"rows": rows, "sums": self._sums, "settings": self._settings})
            with atomic_write(self._folder / _STATE) as file:
                np.savez_compressed(file, allow_pickle=False, index=np.array(index), **arrays)

    def size(self) -> int:
        """Bytes of all tiles together."""
        return sum(map(sum, self._lengths))

    def digest(self) -> str:
        """Checksums of the tiles of every level."""
        return " ".join(map(str, self._sums))

    def tiles(self, level: int, planes: int) -> Iterator[bytes]:
        """Yields the tiles of a level; with several planes, all of the first plane, then those of the next."""
        lengths, file = self._lengths[level], self._files[level]
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        for plane in range(planes):
            for index in range(plane, len(lengths), planes):
                file.seek(int(offsets[index]))
                yield file.read(lengths[index])

    def close(self) -> None:
        """Closes the files; those without a name are gone then."""
        for file in self._files:
            with suppress(OSError):
                file.close()

    def remove(self) -> None:
        """Removes what was kept; the folder too unless something else lies in it."""
        self.close()
        if self._folder is None:
            return
        for path in [*self._folder.glob("level-*.bin"), self._folder / _STATE]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self._place, error) from None

    def _resume(self, folder: Path) -> None:
        if (folder / _STATE).exists():
            try:
                self._load(folder)
            except FormatError:
                raise
            except (zipfile.BadZipFile, *DECODER_ERRORS):
                raise bad_file(folder, "keeps tiles of a run, but is damaged; remove it to begin again") from None
        for level, lengths in enumerate(self._lengths):
            file = (folder / f"level-{level}.bin").open("a+b")
            self._files.append(file)
            file.truncate(sum(lengths))

    def _load(self, folder: Path) -> None:
        with (folder / _STATE).open("rb") as file, np.load(file) as state:
            index = json.loads(str(state["index"]))
            self._check(folder, index["settings"])
            self.rows, self._sums = index["rows"], index["sums"]
            for level, known in enumerate(self._sums):
                self._lengths[level] = state[f"lengths-{level}"].tolist()
                if f"pending-{level}" in state:
                    self.pending[level] = state[f"pending-{level}"]
                if _sum(folder / f"level-{level}.bin", self._lengths[level]) != known:
                    raise ValueError(f"level {level} differs")

    def _check(self, folder: Path, known: dict[str, Any]) -> None:
        for name, value in json.loads(json.dumps(self._settings)).items():
            if known[name] != value:
                raise bad_file(
                    folder,
                    f"keeps tiles of another output, {name}={known[name]!r}, not {value!r}; "
                    "use the settings of that run, or remove the folder to begin again",
                )


def _sum(path: Path, lengths: list[int]) -> int:
    """Checksum of the tiles of a level, read one after the other."""
    total = 0
    with path.open("rb") as file:
        for length in lengths:
            total = zlib.crc32(file.read(length), total)
    return total
