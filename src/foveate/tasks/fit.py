"""A task, its settings and its folder through the loop; and which task a finished run was about."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foveate.errors import FormatError
from foveate.tasks.checkpoint import find_checkpoint
from foveate.tasks.config import SEGMENTATION, read_settings, task_of
from foveate.tasks.loop import Loop, LoopResult, Task, on_cpu
from foveate.tasks.precision import resolve_precision
from foveate.tasks.run import CHECKPOINTS, RunConfig, find_model, open_run
from foveate.tasks.trained import SETTINGS


def run_task(
    task: Task, config: RunConfig, *, resume: bool = False, overwrite: bool = False
) -> tuple[Path, LoopResult]:
    """Train a task in the run folder that its settings name.

    Args:
        task: what is trained.
        config: settings of the run.
        resume: continue from the folder's last checkpoint.
        overwrite: redo a run that is there already.

    Returns:
        The folder, and how training ended.

    Raises:
        ConfigError: the folder holds another run.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu())
    config = _with_precision(config, state.device)
    with state.main_process_first():
        folder = open_run(config, resume=resume, overwrite=overwrite, active=state.is_main_process)
    there = find_checkpoint(folder / CHECKPOINTS / "last") is not None if resume else False
    return folder, Loop(task, config.train, folder, resume=there).run()


def _with_precision(config: Any, device: torch.device) -> Any:
    """The settings with what ``auto`` comes to here, as the run's own file shall say."""
    precision = resolve_precision(config.train.precision, device)
    return replace(config, train=replace(config.train, precision=precision))


def task_of_run(path: str | Path) -> str:
    """What a trained model is about; ``segmentation`` where there is none, about which others complain.

    Args:
        path: run folder, or a checkpoint's folder.
    """
    try:
        settings = find_model(path) / SETTINGS
    except FormatError:
        return SEGMENTATION
    return task_of(read_settings(settings)) if settings.is_file() else SEGMENTATION
