"""Where a model starts: fresh, from an encoder's weights, from a trained model, or as the sparse form of one."""

from pathlib import Path
from typing import Any

from torch import nn

from foveate.errors import FormatError
from foveate.tasks.pruning import prunes
from foveate.tasks.run import find_model
from foveate.tasks.settings import FitConfig

NEW = ("encoder.pruners.", "assembler.")
"""What a sparse model has and its dense form has not."""


def make_model(config: FitConfig) -> Any:
    """Create the model of the settings with the weights that they name.

    A file holds the weights of an encoder. A folder holds a trained model, or is the run of one: all of its weights are
    taken, and there must not be others; where the new model prunes and that one does not, scorers and assembler are
    fresh, and so is what another decoder does not share.

    Args:
        config: Settings of the run.

    Raises:
        FormatError: The weights are unreadable or do not fit; the tensors are named.
    """
    from foveate.models import SegmentationModel, create_model

    spec, data = config.model, config.data
    folder = find_model(spec.weights) if spec.weights is not None and Path(spec.weights).is_dir() else None
    settings: dict[str, Any] = {"in_chans": data.channels, "num_classes": data.num_classes, **spec.overrides}
    if folder is not None:
        model, dense = create_model(spec.name, **settings), SegmentationModel.from_pretrained(folder)
        if prunes(model) and not prunes(dense):
            decoder = ("decoder.",) if model.config.decoder != dense.config.decoder else ()
            take_shared(model, dense, folder, NEW + decoder)
            return model
    return create_model(spec.name, weights=folder or spec.weights, **settings)


def take_shared(model: nn.Module, dense: nn.Module, folder: Path, fresh: tuple[str, ...]) -> None:
    """Copy into a model what a dense one has as well.

    Args:
        model: Changed.
        dense: Where the weights are.
        folder: Where they came from, for the message.
        fresh: Beginnings of names that may be new, missing, or of another shape.

    Raises:
        FormatError: Anything else differs.
    """
    ours, theirs = model.state_dict(), dense.state_dict()
    taken = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    lost = [name for name in {**ours, **theirs} if name not in taken and not name.startswith(fresh)]
    if lost:
        shown = []
        for name in lost[:3]:
            shapes = [str(tuple(state[name].shape)) if name in state else "missing" for state in (theirs, ours)]
            shown.append(f"{name} is {shapes[0]} there and {shapes[1]} here")
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise FormatError(
            f"{folder}: does not fit the model: {'; '.join(shown)}{more}; give model.overrides as it was trained with"
        )
    model.load_state_dict(ours | taken)
