"""A model in a folder: its configuration as JSON, its weights as safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from foveate.errors import FormatError
from foveate.io.write import atomic_write

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def as_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, as JSON and YAML have them, as the tuples that a frozen configuration holds."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def save_model(model: nn.Module, kind: str, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, each aside first and then renamed.

    Args:
        model: its state dict is kept.
        kind: what sort of model it is; `read_config` asks for the same.
        config: numbers and names that JSON can hold.
        folder: made where it does not exist.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS_FILE) as file:
        file.write(save(state))
    with atomic_write(folder / CONFIG_FILE) as file:
        file.write((json.dumps({"model": kind, **config}, indent=1) + "\n").encode())


def read_config(folder: str | Path, kind: str, known: set[str]) -> dict[str, Any]:
    """Read the configuration that `save_model` wrote.

    Args:
        folder: what was written.
        kind: the sort of model that is expected.
        known: fields that a configuration may have.

    Raises:
        FormatError: the file is missing, damaged, or describes something else.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("model", None)
    except (OSError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: cannot be read ({error}); give a folder that save_pretrained wrote") from None
    if found != kind:
        raise FormatError(f"{path}: describes {found!r}, not a {kind} model; give another folder")
    unknown = sorted(set(values) - known)
    if unknown:
        raise FormatError(f"{path}: unknown fields {', '.join(unknown)}; it was written by another version")
    return as_tuples(values)


def no_model(folder: str | Path, error: Exception) -> FormatError:
    """The error of a configuration whose values build no model."""
    reason = " ".join(str(error).split())[:160]
    path = Path(folder) / CONFIG_FILE
    return FormatError(f"{path}: describes no model ({reason}); give a folder that save_pretrained wrote")


def load_state(model: nn.Module, path: Path) -> None:
    """Read all weights of a model.

    Raises:
        FormatError: the file is unreadable, or its names or shapes are not those of the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: is no readable safetensors file ({error}); save the model again") from None
    ours = model.state_dict()
    wrong = [f"{name} is missing" for name in ours if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in ours]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in ours.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{path}: does not fit the model: {'; '.join(wrong[:3])}{more}; build it with the same config"
        )
    model.load_state_dict(state)
