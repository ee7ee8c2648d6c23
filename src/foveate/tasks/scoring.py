"""The score of one image, held whole or read by box, and the ceiling that its tree leaves.

Legend: L leaves, K classes, P samples per side, S image sides.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import Patches, patchify_mask
from foveate.geometry.source import Box
from foveate.nn.pruner import Pruning
from foveate.tasks.data import SegmentationData
from foveate.tasks.infer import Segmented, logits_of, paint, segment, working_frame
from foveate.tasks.metrics import PixelMetrics, tiles
from foveate.tasks.painting import Painting
from foveate.tasks.pruning import recorded_pruning, selection_recall, token_worth
from foveate.tasks.resize import shrink_labels
from foveate.tasks.settings import FitConfig
from foveate.tasks.slides import Slide
from foveate.tasks.windows import slide_windows


@dataclass(frozen=True, eq=False)
class Scored:
    """What one image scored.

    Args:
        row: what `PixelMetrics` says of the prediction.
        ceiling: the same of the true mask after the tree; ``None`` where it was not asked for.
        tokens: leaves of the image.
        seconds: from the decoded image (a slide: from the file) to its full-size mask.
        recall: what `selection_recall` says of the choice of a model that prunes; ``None`` of any other.
        shown: normalised image, labels and result, of an image that is held whole.
    """

    row: dict[str, Any]
    ceiling: dict[str, Any] | None
    tokens: int
    seconds: float
    recall: dict[str, float] | None
    shown: tuple[Tensor, Tensor, Segmented] | None


def score_item(
    model: nn.Module, data: SegmentationData, index: int, metrics: PixelMetrics, *, ceiling: bool = True
) -> Scored:
    """Segment one image of a set that is not varied, and score it in pixels at full resolution.

    A slide is painted, compared with its mask and counted tile by tile; nothing of its size is ever held, and distances
    are left out.

    Args:
        model: as in `segment`.
        data: images with masks.
        index: position in ``data.items``.
        metrics: gets the row.
        ceiling: also score the tree.

    Raises:
        FormatError: a file is unreadable, has no mask, or image and mask differ in size.
    """
    name, config = data.items[index].name, data.config
    found = data.read(index)
    if isinstance(found, Slide):
        return _score_slide(model, data, index, found, metrics)
    image, labels = found.image, found.labels
    assert labels is not None
    pruning = recorded_pruning(model, config.predict)
    result = segment(model, image, found.config, pruning)
    row = metrics.update(name, result.labels, labels, found.config.data.spacing)
    if not ceiling:
        reach = None
    elif config.predict.window is None:
        reach = ceiling_row(name, labels, result.leaves, config, data.patch_size)
    else:
        reach = _window_ceiling(name, image, labels, found.config, data.patch_size)
    recall = None
    if pruning is not None and result.left is not None:
        recall = _recall(pruning, *leaf_labels(labels, result.leaves, config, data.patch_size))
    return Scored(row, reach, len(result.leaves), result.seconds, recall, (image, labels, result))


def _recall(pruning: Pruning, soft: Tensor, weight: Tensor) -> dict[str, float]:
    return selection_recall(pruning.scores or [], token_worth(soft, weight))


def _score_slide(model: nn.Module, data: SegmentationData, index: int, slide: Slide, metrics: PixelMetrics) -> Scored:
    start = time.perf_counter()
    sample = data[index]
    leaves, pruning = sample.patches.leaves[0], recorded_pruning(model, data.config.predict)
    logits = logits_of(model, sample.patches, pruning, data.config.predict.precision)
    pictures = [Painting(values, leaves, slide.shape) for values in (logits, sample.soft)]
    seconds = time.perf_counter() - start
    assert slide.labels is not None
    reach = PixelMetrics(data.config.data.class_names, groups=data.config.data.groups, distances=False)
    counts = np.zeros((len(pictures), len(metrics.class_names), 3), dtype=np.int64)
    for box in tiles(slide.shape):
        truth = slide.labels.read(box)[0]
        start = time.perf_counter()
        tile = pictures[0].tile(box)
        seconds += time.perf_counter() - start
        counts[0] += metrics.count(tile, truth)
        counts[1] += reach.count(pictures[1].tile(box), truth)
    recall = None if pruning is None else _recall(pruning, sample.soft, sample.weight)
    found, bound = metrics.update_counts(sample.name, counts[0]), reach.update_counts(sample.name, counts[1])
    return Scored(found, bound, len(leaves), seconds, recall, None)


def ceiling_row(name: str, labels: Tensor, leaves: Leaves, config: FitConfig, patch_size: int) -> dict[str, Any]:
    """Score the true mask itself after the tree: encoded on the leaves, and painted by the path of the predictions.

    Args:
        name: The image's name.
        labels: Class per pixel ``[*S]`` at full resolution, 255 where unknown.
        leaves: Leaves the image was cut into, in the frame of the shrunk image.
        config: Settings of the run.
        patch_size: Samples per side of a token.
    """
    soft, _ = leaf_labels(labels, leaves, config, patch_size)
    metrics = PixelMetrics(config.data.class_names, groups=config.data.groups, distances=False)
    return metrics.update(name, paint(soft, leaves, tuple(labels.shape)), labels)


def _window_ceiling(name: str, image: Tensor, labels: Tensor, config: FitConfig, patch_size: int) -> dict[str, Any]:
    """The same where windows slide: each window's own trees, blended as the predictions are."""
    small, config = working_frame(image, config)
    known = torch.from_numpy(shrink_labels(labels.numpy(), tuple(small.shape[1:])))
    num_classes = config.data.num_classes

    def shares(patches: Patches, box: Box) -> Tensor:
        part = known[tuple(slice(low, high) for low, high in zip(*box, strict=True))]
        soft, _ = patchify_mask(part, patches.leaves[0], patch_size, num_classes)
        return unpatchify(soft, patches.leaves[0], mode="smooth")

    values, leaves = slide_windows(small, config, patch_size, num_classes, shares)
    metrics = PixelMetrics(config.data.class_names, groups=config.data.groups, distances=False)
    return metrics.update(name, paint(values, leaves, tuple(labels.shape)), labels)


def leaf_labels(labels: Tensor, leaves: Leaves, config: FitConfig, patch_size: int) -> tuple[Tensor, Tensor]:
    """Labels on the leaves: share of each class in every sample, and labelled pixels under it.

    Args:
        labels: As in `ceiling_row`; ``leaves``, ``config`` and ``patch_size`` as there.
    """
    small = torch.from_numpy(shrink_labels(labels.numpy(), leaves.shape))
    return patchify_mask(small, leaves, patch_size, config.data.num_classes)
