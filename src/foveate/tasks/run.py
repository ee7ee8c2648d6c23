"""The run folder: resolved settings, versions, metrics, checkpoints, so that a result can be traced and continued."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, runtime_checkable

from foveate.errors import ConfigError, FormatError, MissingExtraError
from foveate.tasks.checkpoint import find_checkpoint
from foveate.tasks.config import TrainConfig, config_to_dict, load_as, save_config

CONFIG, VERSIONS, METRICS, CHECKPOINTS = "config.yaml", "versions.json", "metrics.jsonl", "checkpoints"
# what may differ when a run is continued: how long it goes on and how fast it is fed, never what it computes
_FREE_TO_CHANGE = ("epochs", "max_steps", "minutes", "eval_every", "patience", "num_workers", "tracker")


@runtime_checkable
class RunConfig(Protocol):
    """What settings of every task have: a folder, and how to train."""

    @property
    def out(self) -> str:
        """Folder of the run."""
        ...

    @property
    def train(self) -> TrainConfig:
        """How the model learns."""
        ...


def open_run(config: RunConfig, *, resume: bool = False, overwrite: bool = False, active: bool = True) -> Path:
    """Make, or go back to, the folder of a run, and write the settings and versions into it.

    Args:
        config: Settings of the run; ``config.out`` is the folder.
        resume: Continue what is there; only limits and the number of loader processes may differ.
        overwrite: Remove what an earlier run left there.
        active: False on the other processes of a distributed run, which only look.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder holds another run, or something that is no run at all.
    """
    folder = Path(config.out)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; give one of them")
    if not active:
        return folder
    there = folder.exists() and any(folder.iterdir()) if not folder.is_file() else True
    if there and not (folder / CONFIG).is_file():
        raise ConfigError(f"out={folder} exists and is not a run; give a new or an empty folder")
    if there and overwrite:
        for name in (CHECKPOINTS, "report", "evaluation"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / METRICS).unlink(missing_ok=True)
    elif there:
        _require_same(folder, config, resume)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG)
    (folder / VERSIONS).write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
    return folder


def _require_same(folder: Path, config: RunConfig, resume: bool) -> None:
    trained = find_checkpoint(folder / CHECKPOINTS / "last") is not None
    if not resume:
        if trained:
            raise ConfigError(
                f"out={folder} holds a run already; add --resume to continue it or --overwrite to redo it"
            )
        return
    old: Any = load_as(type(config), folder / CONFIG)
    free = {name: getattr(config.train, name) for name in _FREE_TO_CHANGE}
    train = replace(old.train, **free)
    ours, theirs = _flat(config_to_dict(config)), _flat(config_to_dict(replace(old, train=train, out=config.out)))
    changed = [key for key in ours if key != "data.root" and ours[key] != theirs.get(key)]
    if trained and changed:
        key = changed[0]
        raise ConfigError(
            f"{key}={ours[key]!r} but the run in {folder} has {theirs.get(key)!r}; a run is resumed with its own "
            f"settings (only {', '.join(_FREE_TO_CHANGE)} may change); restore it, or give another out"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def find_model(path: str | Path) -> Path:
    """The folder of the best model of a run, or the folder itself where it is a saved model.

    Args:
        path: Run folder, checkpoint folder, or a folder that ``save_pretrained`` wrote.

    Raises:
        FormatError: There is no complete model.
    """
    path = Path(path)
    for name in ("best", "last"):
        found = find_checkpoint(path / CHECKPOINTS / name)
        if found is not None:
            return found
    found = find_checkpoint(path)
    if found is not None and (found / "model.safetensors").is_file():
        return found
    raise FormatError(f"{path}: holds no trained model; give a run folder with a checkpoint, or a saved model's folder")


def versions() -> dict[str, Any]:
    """What the run stood on: interpreter, libraries, commit, machine."""
    from importlib.metadata import version

    import torch

    import foveate

    def of(package: str) -> str:
        return version(package)

    return {
        "foveate": foveate.__version__,
        "commit": _commit(Path(foveate.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: of(name) for name in ("numpy", "accelerate", "safetensors", "numba")},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _commit(folder: Path) -> str | None:
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Metrics:
    """Lines of ``metrics.jsonl``: means over an interval of training steps, and the scores of each evaluation.

    Args:
        path: The file; lines are appended, each in one write.
        keep: Step of the checkpoint that is continued: later lines, and a line cut short by a kill, are removed. None
            keeps everything.
        active: False on the processes that do not write.
        also: Called with every line's values and step, for a tracker.
    """

    def __init__(
        self,
        path: Path,
        keep: int | None = None,
        *,
        active: bool = True,
        also: Callable[[dict[str, Any], int], None] | None = None,
    ) -> None:
        self.path, self.active, self.also = path, active, also
        self._sums: dict[str, float] = {}
        self._steps = self._tokens = 0
        if active and path.exists():
            from foveate.io.write import write_jsonl

            write_jsonl(path, [line for line in read_metrics(path) if keep is None or line["step"] <= keep])

    def add(self, terms: Mapping[str, float], tokens: int) -> None:
        """Remember a step's loss terms until the next `flush`."""
        for key, value in terms.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._steps += 1
        self._tokens += tokens

    def flush(self, position: Any, rate: float) -> None:
        """Write the mean over the steps since the last line."""
        if self._steps == 0:
            return
        means = {key: value / self._steps for key, value in self._sums.items()}
        values = {"loss": sum(means.values()), **means, "lr": rate, "tokens_per_step": self._tokens / self._steps}
        self.write("train", position, values)
        self._sums, self._steps, self._tokens = {}, 0, 0

    def write(self, kind: str, position: Any, values: Mapping[str, Any]) -> None:
        """Append one line: kind (``train`` or ``val``), step, epoch, seconds of training, and the values."""
        if not self.active:
            return
        from foveate.io.write import append_jsonl

        place = {"kind": kind, "step": position.step, "epoch": position.epoch, "seconds": round(position.seconds, 3)}
        append_jsonl(self.path, place | dict(values))
        if self.also is not None:
            numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
            self.also(numbers, position.step)


def installed_tracker(name: str | None) -> str | None:
    """The name of a tracker, once it is sure that its package is there.

    Raises:
        MissingExtraError: It is not installed.
    """
    from importlib.util import find_spec

    if name is not None and find_spec(name) is None:
        raise MissingExtraError(f"train.tracker={name!r} needs a package that is not installed; pip install {name}")
    return name


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the complete lines of ``metrics.jsonl``; a last line cut short by a kill is left out."""
    from foveate.io.write import read_jsonl

    return [line for line in read_jsonl(path) if "step" in line]


class Signals:
    """While entered, Ctrl-C and SIGTERM ask the loop to stop at the next step; a second Ctrl-C stops at once."""

    def __init__(self, kinds: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.stop = False
        self._kinds = kinds if threading.current_thread() is threading.main_thread() else ()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for kind in self._kinds:
            self._before[kind] = signal.signal(kind, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True


class Progress:
    """A progress bar on standard error, only where that is a terminal.

    Args:
        active: False on the processes that stay silent.
    """

    def __init__(self, active: bool) -> None:
        self._bar: Any = None
        self._task: Any = None
        if active and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            text = TextColumn("[progress.description]{task.description}")
            self._bar = Bar(text, BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=1.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, text: str) -> None:
        """Move the bar to a share of the run, from 0 to 1, with a line of text."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
