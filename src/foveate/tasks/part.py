"""The hidden folder in which the outputs of one image grow, so that a killed prediction can go on where it stopped."""

import errno
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveate.errors import FormatError
from foveate.geometry.leaves import Leaves
from foveate.geometry.source import Box
from foveate.io.write import atomic_write, write_json

_VALUES, _LEAVES, _NOTE, _PLACING = "values.safetensors", "leaves.npz", "note.json", "placing.json"
_LOCK = "lock"


class Part:
    """What is finished of one image's outputs.

    It holds the model's output, the unfinished spools of the writers, and finished files under their final names. They
    are moved out together; the folder is gone when everything is in its place.

    Args:
        folder: The hidden folder, on the same disk as the outputs.
        key: Digest of what the outputs depend on; a folder of another key is of no use.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.resumed = self._note().get("key") == key
        """Whether an interrupted run of the same key left the folder."""

    @classmethod
    def open(cls, out: Path, name: str, source: Path, settings: Mapping[str, Any], *, resume: bool) -> "Part":
        """Make the folder, or take up the one that an interrupted run left; one that does not fit is removed.

        Args:
            out: Folder of the outputs.
            name: What the outputs' names begin with.
            source: The image.
            settings: Whatever else the outputs depend on.
            resume: False starts anew in any case.

        Raises:
            FormatError: another process is at work in it.
        """
        key, folder = fingerprint(source, settings), part_folder(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        part = cls(folder, key)
        weakref.finalize(part, os.close, lock)
        if not (resume and part.resumed):
            part._clear()
            part.resumed = False
        return part

    @property
    def has_values(self) -> bool:
        """Whether the model's output is kept, so that the image can be resumed."""
        return (self.folder / _NOTE).is_file()

    def path(self, target: Path) -> Path:
        """Where an output grows until it is moved to ``target``."""
        return self.folder / target.name

    def spool(self, target: Path) -> Path:
        """Folder for the unfinished rows of an output."""
        return self.folder / f"{target.name}.spool"

    def keep(self, values: Tensor, leaves: Leaves, broken: Sequence[Box], left: Tensor | None = None) -> None:
        """Store the model's output; from here on the image can be resumed.

        Args:
            values: Logits ``[L, K, *P]``.
            leaves: Their leaves.
            broken: Boxes in level-0 pixels that could not be decoded.
            left: Prune point at which each leaf's token left, see `left_at`, of a model that prunes.
        """
        from safetensors.torch import save

        tensors = {"values": values.contiguous()} | ({} if left is None else {"left": left})
        with atomic_write(self.folder / _VALUES) as file:
            file.write(save(tensors))
        leaves.save(self.folder / _LEAVES)
        write_json(self.folder / _NOTE, {"key": self.key, "broken": broken})

    def kept(self) -> tuple[Tensor, Leaves, list[Box], Tensor | None] | None:
        """What `keep` stored, or None."""
        note = self._note()
        if not note:
            return None
        try:
            tensors, leaves = load_file(self.folder / _VALUES), Leaves.load(self.folder / _LEAVES)
            values, left = tensors["values"], tensors.get("left")
        except (OSError, SafetensorError, KeyError, FormatError):
            return None  # the disk lost it: computed again
        return values, leaves, [(tuple(start), tuple(stop)) for start, stop in note["broken"]], left

    def _note(self) -> dict[str, Any]:
        try:
            note = json.loads((self.folder / _NOTE).read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def is_complete(self, targets: Sequence[Path]) -> bool:
        """Whether these outputs were all made when the run ended; some may have been moved already."""
        try:
            names = json.loads((self.folder / _PLACING).read_bytes())
        except (OSError, ValueError):
            return False
        return all(target.name in names and (self.path(target).exists() or target.exists()) for target in targets)

    def place(self, targets: Sequence[Path]) -> None:
        """Move every output to its final name, replacing what is there, and remove the folder."""
        write_json(self.folder / _PLACING, [target.name for target in targets])
        for target in targets:
            done = self.path(target)
            if not done.exists():
                continue  # moved before the run was interrupted
            if target.is_dir():  # a folder cannot be replaced by a rename
                target.replace(self.folder / f"{target.name}.old")
            done.replace(target)
        self.remove()

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        self._clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clear(self) -> None:
        (self.folder / _NOTE).unlink(missing_ok=True)  # first, so that half a folder is never taken up
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)


def _lock(folder: Path) -> int:
    """Keeps other processes out of a folder until the descriptor is closed, or this process is killed."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # a system without such locks
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise FormatError(
                f"{folder}: another process is predicting this image into the same folder; wait for it, or give "
                "another --out"
            ) from None
    return descriptor


def part_folder(out: Path, name: str) -> Path:
    """The hidden folder of an image's unfinished outputs."""
    return out / f".{name}.part"


def fingerprint(source: Path, settings: Mapping[str, Any]) -> str:
    """A digest of everything that a prediction depends on: settings, and the source's size and time.

    Args:
        source: The image; of a folder, the size and time of what is directly in it.
        settings: Anything; what JSON does not know is taken by its text.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in sorted([source, *source.iterdir()] if source.is_dir() else [source]):
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def digest_of(model: Path) -> str:
    """A digest of the files of a saved model."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.iterdir() if path.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
