"""A trained model and the settings it was trained with, from the folder of its run."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from foveate.errors import FormatError
from foveate.tasks.run import find_model

SETTINGS = "fit.yaml"  # the run's settings, stored with the model so that nothing has to be repeated

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


def load_trained(
    path: str | Path, model: Callable[[Path], Model], settings: Callable[[Path], Config]
) -> tuple[Model, Config]:
    """Read a trained model and the settings it was trained with.

    Args:
        path: run folder (its best model is taken), or a checkpoint's folder.
        model: reads the model of such a folder.
        settings: reads the file of settings.

    Returns:
        The model in evaluation mode, on the accelerator where there is one, and the settings.

    Raises:
        FormatError: there is no complete model, or it was saved without its run's settings.
    """
    folder = find_model(path)
    if not (folder / SETTINGS).is_file():
        raise FormatError(f"{folder}: has no {SETTINGS}, which says how images are prepared; give a run of foveate fit")
    config = settings(folder / SETTINGS)
    found = model(folder)
    found.eval()
    return found.to("cuda" if torch.cuda.is_available() else "cpu"), config
