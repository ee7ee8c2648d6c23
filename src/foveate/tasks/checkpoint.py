"""Checkpoints that survive a kill at any instant: written aside, flushed, renamed, and the old one removed last.

A checkpoint is a folder: the model as safetensors with its config (so that `from_pretrained` reads it), the settings of
the run as ``fit.yaml``, and for ``last`` the trainer state as ``trainer.pt``, read back with ``weights_only=True``.
"""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.errors import FormatError

TRAINER = "trainer.pt"
_NEW, _OLD = ".new", ".old"


def save_checkpoint(folder: Path, write: Callable[[Path], None], trainer: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint so that at every instant either the old or the new one is complete on disk.

    Everything goes into ``<folder>.new``, which is flushed to the disk; then the old folder steps aside, the new one
    takes its name, and only then the old one is removed. What a kill between two of these steps leaves is put right by
    `find_checkpoint`.

    Args:
        folder: Where the checkpoint shall be, such as ``run/checkpoints/last``.
        write: Called with the temporary folder; writes the model into it.
        trainer: State of the trainer: nested dicts, lists and tuples of tensors and plain values.

    Raises:
        FormatError: The disk refused the write (full, read-only); the old checkpoint is untouched.
    """
    new, old = _beside(folder, _NEW), _beside(folder, _OLD)
    find_checkpoint(folder)
    try:
        _remove(new)
        new.mkdir(parents=True)
        write(new)
        if trainer is not None:
            torch.save(dict(trainer), new / TRAINER)
        _flush(new)
        _remove(old)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _flush_entry(folder.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        find_checkpoint(folder)
        if not _is_disk_error(error):
            raise
        reason = str(error).splitlines()[0]
        raise FormatError(
            f"checkpoint {folder}: not saved ({reason}); the folder must be writable and have room; "
            "free some space and resume, the previous checkpoint is kept"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Name the complete checkpoint at ``folder``, putting right what a kill in the middle of a save has left.

    Args:
        folder: Where the checkpoint should be.

    Returns:
        ``folder``, or None where no checkpoint was ever completed.
    """
    old = _beside(folder, _OLD)
    if not folder.exists() and old.exists():
        old.rename(folder)
    return folder if folder.exists() else None


def load_trainer(folder: Path) -> dict[str, Any]:
    """Read the trainer state of a checkpoint; no code in the file can run.

    Args:
        folder: Checkpoint folder that was written with ``trainer=``.

    Returns:
        The mapping that was given to `save_checkpoint`.

    Raises:
        FormatError: The file is missing or unreadable.
    """
    path = folder / TRAINER
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise FormatError(f"{path}: not a readable trainer state; start again with --overwrite") from error
    except Exception as error:
        # pickle.UnpicklingError and friends: whatever the unpickler refuses is a bad file, never a reason to trust it
        if type(error).__module__ not in {"pickle", "_pickle"}:
            raise
        raise FormatError(f"{path}: holds objects that are not plain data; start again with --overwrite") from error
    assert isinstance(state, dict)
    return state


def rng_state() -> dict[str, Any]:
    """Take the state of every generator that a model or a transform may draw from, as plain data."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - saved, not drawn from
    assert not isinstance(keys, (int, float, str))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002


def _is_disk_error(error: BaseException) -> bool:
    # safetensors and torch.save report a full disk through types of their own
    return isinstance(error, OSError) or any(
        sign in str(error) for sign in ("PytorchStreamWriter", "inline_container", "IoError", "No space left")
    )


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    if os.name == "posix":  # other systems cannot open a folder
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
