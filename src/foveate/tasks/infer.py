"""From one image to what the model says of it: the path that validation, evaluation and prediction share.

Legend: T tokens, L leaves, K classes (background first), P samples per side, C channels, S image sides.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.source import Box
from foveate.nn.pruner import Pruning
from foveate.tasks.config import FitConfig, load_config
from foveate.tasks.cut import cut
from foveate.tasks.painting import Painting
from foveate.tasks.precision import resolve_precision
from foveate.tasks.pruned_view import left_at
from foveate.tasks.resize import resized_image, resized_spacing, working_shape
from foveate.tasks.trained import load_trained
from foveate.tasks.windows import slide_windows


@dataclass(frozen=True, eq=False)
class Segmented:
    """What became of one image."""

    labels: UInt8[Tensor, "*S"]  # class per pixel, at the image's own size
    leaves: Leaves  # in the frame of the shrunk image where `max_side` applies
    seconds: float  # shrink, cut, patches, model and painting
    left: Int64[Tensor, " L"] | None = None  # prune point at which each leaf's token left, see `left_at`


def working_frame(image: Float[Tensor, "C *S"], config: FitConfig) -> tuple[Float[Tensor, "C *s"], FitConfig]:
    """A normalised image at the size that the model works at, and the settings with the size of its pixels there.

    Args:
        image: Normalised, at full resolution.
        config: Settings of the run, with ``data.spacing`` that of the image.
    """
    old = tuple(image.shape[1:])
    shape = working_shape(old, config.data)
    data = replace(config.data, spacing=resized_spacing(config.data.spacing, old, shape))
    return torch.from_numpy(resized_image(image.numpy(), shape)), replace(config, data=data)


def prepare(image: Float[Tensor, "C *S"], config: FitConfig, patch_size: int) -> Patches:
    """Bring a normalised image to the size that the settings say, cut it, and take its patches.

    Args:
        image: Normalised, at full resolution.
        config: Settings of the run.
        patch_size: Samples per side of a token.
    """
    small, config = working_frame(image, config)
    leaves = cut(small, config.tree, patch_size, config.data.spacing)
    return patchify(small, leaves, patch_size)


def infer(
    model: nn.Module, image: Float[Tensor, "C *S"], config: FitConfig, pruning: Pruning | None = None
) -> tuple[Float[Tensor, "L K *P"], Leaves]:
    """What the model says of a normalised image, whole or in sliding windows, and the leaves that it says it of.

    Args:
        model: As in `segment`.
        image: Normalised, at full resolution.
        config: Settings of the run.
        pruning: As in `logits_of`; not recorded where windows slide.
    """
    size = patch_size_of(model)
    if config.predict.window is None:
        patches = prepare(image, config, size)
        return logits_of(model, patches, pruning, config.predict.precision), patches.leaves[0]
    small, config = working_frame(image, config)
    silent = None if pruning is None else replace(pruning, scores=None)

    def chances(patches: Patches, box: Box) -> Tensor:
        logits = logits_of(model, patches, silent, config.predict.precision)
        return unpatchify(logits, patches.leaves[0], mode="smooth").softmax(0)

    return slide_windows(small, config, size, config.data.num_classes, chances)


def segment(
    model: nn.Module, image: Float[Tensor, "C *S"], config: FitConfig, pruning: Pruning | None = None
) -> Segmented:
    """Segment one normalised image at full resolution.

    Painting goes tile by tile, so that classes x pixels are never in memory; a pixel costs one byte.

    Args:
        model: Maps `Patches` to logits ``[T, K, *P]``; used as it is, on its own device.
        image: Normalised as in training (see `SegmentationData.load`), at full resolution.
        config: Settings of the run.
        pruning: As in `logits_of`.

    Cost: one pass over the pixels and the model over the tokens.
    """
    start = time.perf_counter()
    values, leaves = infer(model, image, config, pruning)
    labels = paint(values, leaves, tuple(image.shape[1:]))
    seconds = time.perf_counter() - start
    return Segmented(labels, leaves, seconds, left_of(pruning, len(leaves)))


def left_of(pruning: Pruning | None, num_leaves: int) -> Tensor | None:
    """Where the tokens left, if a forward pass over the whole image recorded it."""
    return left_at(pruning.scores, num_leaves) if pruning is not None and pruning.scores else None


def patch_size_of(model: nn.Module) -> int:
    """Samples per side of a token of a model, from its ``config``."""
    config: Any = getattr(model, "config", None)
    assert config is not None
    return int(config.patch_size)


def logits_of(
    model: nn.Module, patches: Patches, pruning: Pruning | None = None, precision: str = "fp32"
) -> Float[Tensor, "T K *P"]:
    """What the model says of the samples of every leaf, on the CPU.

    Args:
        model: As in `segment`.
        patches: Tokens.
        pruning: How to prune in this call, of a model that does; None: as it was configured.
        precision: ``fp32``, ``bf16`` (mixed) or ``auto``.

    Raises:
        FoveateError: The output is not finite.
    """
    device = next(model.parameters()).device
    mixed = resolve_precision(precision, device) == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        placed = patches.to(device)
        logits: Tensor = (model(placed) if pruning is None else model(placed, pruning)).float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise FoveateError("the model's output holds NaN or Inf; train it again at a lower train.lr")
    return logits


def paint(values: Float[Tensor, "L K *P"], leaves: Leaves, shape: Sequence[int]) -> UInt8[Tensor, "*S"]:
    """The class with the largest value at every pixel of the full-size image, tile by tile.

    Args:
        values: Logits, or shares per class, of one image's leaves.
        leaves: Leaves of the image that was cut.
        shape: Spatial shape of the image before it was shrunk.
    """
    return Painting(values, leaves, shape).labels


def load_model(path: str | Path) -> tuple[Any, FitConfig]:
    """A segmentation model and its settings, see `load_trained`."""
    from foveate.models import SegmentationModel

    return load_trained(path, SegmentationModel.from_pretrained, load_config)
