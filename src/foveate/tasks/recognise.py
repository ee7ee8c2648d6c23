"""One bag through a trained model: what it says, and how much every patch counted.

Legend: N patches, Q tasks, K outputs of a task or chosen patches.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from foveate.geometry.patch_source import PatchSource
from foveate.io.raster import Raster
from foveate.models.recognition import RecognitionModel
from foveate.nn.rank import attention_share
from foveate.tasks.config import load_as
from foveate.tasks.heatmap import Heat
from foveate.tasks.recognition_settings import LabelSpec, RecognitionConfig
from foveate.tasks.targets import NONE, SEPARATOR
from foveate.tasks.trained import load_trained


@dataclass(frozen=True, eq=False)
class Recognised:
    """What a model says of one image, and what it looked at."""

    said: dict[str, Float[np.ndarray, " _"]]  # probabilities, or the number
    share: Float[Tensor, "N Q"]  # of the attention over all patches, for every task
    index: Int64[Tensor, " K"]  # chosen patches, ascending
    patches: Shaped[Tensor, "K *rest"]
    seconds: float


def load_recognition(path: str | Path) -> tuple[RecognitionModel, RecognitionConfig]:
    """A recognition model and its settings, see `load_trained`; ``select.precision: auto`` is what suits this device,
    which need not be what suited the one of training."""
    model, config = load_trained(path, RecognitionModel.from_pretrained, partial(load_as, RecognitionConfig))
    device = next(model.parameters()).device
    model.config = replace(model.config, precision=config.select.precision_on(device))
    return model, config


def recognise(model: RecognitionModel, source: PatchSource, tasks: Mapping[str, LabelSpec]) -> Recognised:
    """Say what a bag shows, and how much each of its patches counted.

    Args:
        model: in evaluation mode.
        source: the bag.
        tasks: resolved, see `resolve_tasks`.

    Raises:
        FormatError: a patch cannot be read, or is not finite.

    Cost: one look at every patch (two where the published rule chose), and the chosen ones once more.
    """
    start = time.perf_counter()
    with torch.inference_mode():
        chosen = model.choose([source])
        logits_NA = chosen.selections[0].logits
        if logits_NA is None:  # taken whole, or chosen by the published rule
            logits_NA, _ = model.selector().look(source, torch.arange(len(source)), model.config.chunk)
        heads = logits_NA.shape[1] // len(model.config.tasks)
        share = torch.stack([attention_share(one) for one in logits_NA.split(heads, 1)], 1)
        logits = model(chosen)
    said = {}
    for spec in model.config.tasks:
        numbers = spec.predict(logits[spec.name])[0].double().cpu().numpy()
        mean, deviation = tasks[spec.name].scale or (0.0, 1.0)
        said[spec.name] = numbers * deviation + mean if spec.kind == "regression" else numbers
    return Recognised(said, share.cpu(), chosen.selections[0].index, chosen.patches, time.perf_counter() - start)


def label_of(said: Float[np.ndarray, " K"], spec: LabelSpec) -> str:
    """What a task's numbers come to, in the words of the table."""
    if spec.kind == "regression":
        return f"{said[0]:.6g}"
    if spec.kind == "labels":
        return SEPARATOR.join(name for name, value in zip(spec.names, said, strict=True) if value >= 0.5) or NONE
    return spec.names[int(said.argmax())]


def heat_of(found: Recognised, source: PatchSource, native: Raster | None, tasks: tuple[str, ...]) -> Heat | None:
    """What was looked at, in level-0 pixels of the file; None where nobody knows where the patches lie.

    Args:
        found: what the model says.
        source: the bag.
        native: the image as stored; None: boxes are in its pixels already.
        tasks: names.
    """
    if source.boxes is None or source.shape is None:
        return None
    shape = source.shape if native is None else tuple(native.shape)
    scale = np.array(shape) / np.array(source.shape)
    boxes = source.boxes.numpy() * scale
    low, high = np.floor(boxes[:, 0] + 1e-6), np.ceil(boxes[:, 1] - 1e-6)
    inside = np.minimum(np.stack([low, high], 1), np.array(shape)).astype(np.int64)
    spacing = None if native is None else native.spacing
    return Heat(shape, inside, found.share.numpy(), tasks, found.index.numpy(), spacing)
