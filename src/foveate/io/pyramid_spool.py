"""Encoded tiles kept on disk until all levels are there, so that a run that was killed can go on."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foveate.io.guard import bad_file
from foveate.io.write import write_json

Pending = dict[int, NDArray[Any]]  # by level, the rows [C, h, W] that wait for the rest of a row of the next level


class Spool:
    """Tiles of several levels, appended level by level in raster order.

    Args:
        folder: where to keep them so that another run finds them; None keeps them in files without a name.
        beside: a folder on the disk for the files without a name.
        fingerprint: everything that a run to be continued must have in common with this one.
        num_levels: number of levels.

    Raises:
        FormatError: the folder holds tiles of other settings, or is no folder.
    """

    def __init__(self, folder: Path | None, beside: Path, fingerprint: str, num_levels: int) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self.rows = 0  # complete tile rows of level 0
        self.pending: Pending = {}
        self._lengths: list[list[int]] = [[] for _ in range(num_levels)]
        self._files: list[IO[bytes]] = []
        if folder is None:
            self._files = [tempfile.TemporaryFile(dir=beside) for _ in range(num_levels)]  # noqa: SIM115
        else:
            self._resume(folder, num_levels)

    def add(self, level: int, blobs: Iterable[bytes]) -> None:
        """Appends encoded tiles to a level."""
        for blob in blobs:
            self._files[level].write(blob)
            self._lengths[level].append(len(blob))

    def commit(self, rows: int, pending: Pending) -> None:
        """Makes what was added durable: a run that is killed from now on continues after row ``rows`` of level 0."""
        if self._folder is None:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = self._folder / f"state-{rows}.npz"
        with state.open("wb") as file:
            arrays = {f"pending-{level}": band for level, band in pending.items()}
            arrays |= {f"lengths-{level}": np.array(some, np.uint32) for level, some in enumerate(self._lengths)}
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        write_json(self._folder / "index.json", {"rows": rows, "settings": self._fingerprint})
        (self._folder / f"state-{self.rows}.npz").unlink(missing_ok=True)
        self.rows = rows

    def size(self) -> int:
        """Bytes of all tiles together."""
        return sum(map(sum, self._lengths))

    def tiles(self, level: int, planes: int) -> Iterator[bytes]:
        """Yields the tiles of a level; with several planes, all of the first plane, then those of the next."""
        lengths = self._lengths[level]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        file = self._files[level]
        for plane in range(planes):
            for index in range(plane, len(lengths), planes):
                file.seek(int(offsets[index]))
                yield file.read(lengths[index])

    def close(self) -> None:
        """Closes the files; those without a name are gone then."""
        for file in self._files:
            file.close()

    def remove(self) -> None:
        """Removes what was kept; the folder too unless something else lies in it."""
        self.close()
        if self._folder is None:
            return
        for path in [*self._folder.glob("level-*.bin"), *self._folder.glob("state-*.npz"), self._folder / "index.json"]:
            path.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _resume(self, folder: Path, num_levels: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / "index.json"
        known: dict[str, Any] = {"rows": 0, "settings": self._fingerprint}
        if index.exists():
            known = json.loads(index.read_text())
        if known["settings"] != self._fingerprint:
            raise bad_file(
                folder,
                f"keeps tiles of another output ({known['settings']}, not {self._fingerprint}); "
                "give the settings of that run, or remove the folder to begin again",
            )
        self.rows = int(known["rows"])
        if self.rows:
            with np.load(folder / f"state-{self.rows}.npz") as state:
                self._lengths = [state[f"lengths-{level}"].tolist() for level in range(num_levels)]
                waiting = (level for level in range(num_levels) if f"pending-{level}" in state)
                self.pending = {level: state[f"pending-{level}"] for level in waiting}
        for level, lengths in enumerate(self._lengths):
            file = (folder / f"level-{level}.bin").open("a+b")
            file.truncate(sum(lengths))
            self._files.append(file)
