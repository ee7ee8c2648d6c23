"""One training run of the quality benchmark: build a side, train it for so many CPU seconds, score it in voxels.

Legend: T tokens of a pack, K classes, P samples per side of a patch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNETR
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from _quality_data import Volume, VolumeSet, varied
from _reductions import CroprEncoder, MergingEncoder
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import pack, patchify, patchify_mask
from foveate.geometry.tree import adaptive_leaves
from foveate.models import ModelConfig, build_model
from foveate.nn.attention import Packing
from foveate.nn.pruner import Pruning
from foveate.tasks.loop import batch_plan
from foveate.tasks.losses import leaf_loss
from foveate.tasks.metrics import PixelMetrics, ceiling, mean_known, paint_labels
from foveate.tasks.pruning import score_loss, token_worth

PATCH, BATCH = 4, 1
BASE = {
    "num_dims": 3,
    "patch_size": PATCH,
    "in_chans": 1,
    "width": 96,
    "depth": 6,
    "num_heads": 2,
    "pos_grid": 8,
    "class_token": False,
    "decoder": "sparse",
    "decoder_width": 8,
}
PRUNE_AFTER = (0, 2)
UNIFORM_LEFT, ADAPTIVE_LEFT = (0.5, 0.25), (0.75, 0.5)
MERGED_LEFT = tuple(max(0.25, 0.5 ** ((block + 1) / 2)) for block in range(6))
"""ToMe cannot merge more than half of the tokens at once: evenly, to the same quarter behind the fourth block."""
MAX_LEAVES = {"organs": 576, "marked": 144, "hippocampus": 384}


@dataclass(frozen=True)
class Side:
    """One way to segment.

    Args:
        name: of the side.
        leaves: "adaptive", "uniform", or "voxels" (the dense convolutional baseline).
        reduce: "prune" (ours), "" (nothing), "merge" (ToMe), "cropr", "random" (ours with scores by chance), or
            "identity" (no transformer at all).
        model: fields of the configuration that differ from `BASE`.
        score_weight: of the loss on the scores.
        budgets: range of the share left at the end that every step draws from.
        lr: peak learning rate.
    """

    name: str
    leaves: str = "adaptive"
    reduce: str = "prune"
    model: dict[str, Any] = field(default_factory=dict)
    score_weight: float = 0.2
    budgets: tuple[float, float] | None = None
    lr: float = 2e-3

    @property
    def left(self) -> tuple[float, float]:
        """Share of the tokens that is left after each prune point."""
        return ADAPTIVE_LEFT if self.leaves == "adaptive" else UNIFORM_LEFT


class Chance(nn.Module):
    """Scores by chance, from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        return torch.rand(len(x_TD), generator=self.generator)


class Nothing(nn.Module):
    """A block that does nothing."""

    def forward(self, x_AD: Tensor, packing: Packing, turn: object = None) -> Tensor:
        return x_AD


def build(side: Side, data: VolumeSet) -> nn.Module:
    """The model of a side, with fresh weights."""
    if side.leaves == "voxels":
        size = padded_shape(data)
        return UNETR(1, data.num_classes, size, feature_size=8, hidden_size=96, mlp_dim=384, num_heads=2)
    prunes = side.reduce in ("prune", "random")
    pruning = {"prune_after": PRUNE_AFTER, "keep_ratio": side.left, "active_stage": 0} if prunes else {}
    model = build_model(ModelConfig(**{**BASE, **pruning, "num_classes": data.num_classes, **side.model}))
    if side.reduce == "random":
        for pruner in model.encoder.pruners.values():
            pruner.scorer = Chance()
    if side.reduce == "identity":
        model.encoder.blocks = nn.ModuleList(Nothing() for _ in model.encoder.blocks)
    if side.reduce == "merge":
        model.encoder = MergingEncoder(model.encoder, MERGED_LEFT)
    if side.reduce == "cropr":
        model.encoder = CroprEncoder(model.encoder, PRUNE_AFTER, UNIFORM_LEFT, data.num_classes)
    return model


def padded_shape(data: VolumeSet) -> tuple[int, ...]:
    """The least multiple of 16 per axis that holds every volume."""
    sides = np.max([volume.labels.shape for volume in (*data.train, *data.val, *data.test)], axis=0)
    return tuple(16 * math.ceil(side / 16) for side in sides)


def padded(array: NDArray[Any], shape: Sequence[int], value: float = 0.0) -> Tensor:
    """An array ``[*S]`` with ``value`` behind its end on every axis."""
    missing = [(0, to - side) for side, to in zip(array.shape, shape, strict=True)]
    return torch.from_numpy(np.pad(array, missing, constant_values=value))


def cut(image: NDArray[np.float32], side: Side, data: VolumeSet) -> Leaves:
    if side.leaves == "uniform":
        return uniform_leaves(image.shape[1:], PATCH)
    return adaptive_leaves(image, max_leaves=MAX_LEAVES[data.name], min_size=PATCH)


def step_loss(
    model: Any,
    side: Side,
    data: VolumeSet,
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.uint8]]],
    chance: np.random.Generator,
) -> Tensor:
    """Cross entropy and Dice of a batch, and what teaches the scores."""
    if side.leaves == "voxels":
        shape = padded_shape(data)
        image = torch.stack([padded(image[0], shape)[None] for image, _ in parts])
        labels = torch.stack([padded(labels.astype(np.int64), shape, -1) for _, labels in parts])
        soft = functional.one_hot(labels.clamp(min=0), data.num_classes).movedim(-1, 1).float()
        return leaf_loss(model(image), soft, (labels >= 0).float(), lengths=(1,) * len(parts)).total()
    leaves = [cut(image, side, data) for image, _ in parts]
    patches = pack([patchify(image, own, PATCH) for (image, _), own in zip(parts, leaves, strict=True)])
    pairs = [
        patchify_mask(labels, own, PATCH, data.num_classes) for (_, labels), own in zip(parts, leaves, strict=True)
    ]
    soft, weight = (torch.cat(values) for values in zip(*pairs, strict=True))
    pruning = Pruning(keep_ratio=drawn_ratio(side, chance), scores=[])
    prunes = side.reduce in ("prune", "random")
    logits = model(patches, pruning) if prunes else model(patches)
    loss = leaf_loss(logits, soft, weight, lengths=patches.lengths).total()
    if side.reduce == "prune" and side.score_weight:
        taught = score_loss(pruning.scores or [], token_worth(soft, weight), patches.lengths)
        loss = loss + side.score_weight * taught / len(parts)
    if side.reduce == "cropr":
        loss = loss + model.encoder.auxiliary_loss(patches, soft, weight)
    return loss


def drawn_ratio(side: Side, chance: np.random.Generator) -> tuple[float, float] | None:
    """The shares of this step, where they are drawn."""
    if side.budgets is None:
        return None
    low, high = side.budgets
    return shares(float(low * (high / low) ** chance.random()))


def shares(left: float) -> tuple[float, float]:
    """Shares after each prune point that leave ``left`` at the end."""
    return (math.sqrt(left), left)


def train(
    model: nn.Module,
    side: Side,
    data: VolumeSet,
    seed: int,
    *,
    seconds: float = math.inf,
    epochs: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train for so many CPU seconds of this process, or epochs: samples, cutting and steps, all counted.

    Args:
        watch: called before every epoch and after the last, with how many are done; its time is not counted.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=side.lr, weight_decay=0.01)
    spent, epoch, steps, share = 0.0, 0, 0, 0.0
    while share < 1:
        if watch is not None:
            watch(epoch)
        model.train()
        plan = batch_plan(len(data.train), BATCH, seed, epoch)
        for number, batch in enumerate(plan):
            start = time.process_time()
            share = spent / seconds if epochs is None else (epoch + number / len(plan)) / epochs
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = side.lr * min(1.0, share / 0.05 + 0.02) * 0.5 * (1 + math.cos(math.pi * share))
            chance = np.random.default_rng([seed, epoch, number])
            loss = step_loss(model, side, data, [varied(data.train[index], chance) for index in batch], chance)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            spent += time.process_time() - start
        else:
            epoch += 1
            share = share if epochs is None else epoch / epochs
    if watch is not None:
        watch(epoch)
    return {"steps": steps, "epochs": epoch, "train_seconds": spent}


@torch.inference_mode()
def predict(
    model: Any, side: Side, data: VolumeSet, image: NDArray[np.float32], pruning: Pruning | None
) -> NDArray[np.uint8]:
    """Class of every voxel of one volume."""
    if side.leaves == "voxels":
        logits = model(padded(image[0], padded_shape(data))[None, None])[0]
        return logits.argmax(0)[tuple(slice(0, side) for side in image.shape[1:])].to(torch.uint8).numpy()
    leaves = cut(image, side, data)
    patches = patchify(image, leaves, PATCH)
    logits = model(patches, pruning) if pruning is not None else model(patches)
    return paint_labels(logits, leaves).numpy()


def score(
    model: Any, side: Side, data: VolumeSet, volumes: Sequence[Volume], left: float | None = None
) -> dict[str, Any]:
    """Dice and HD95 in voxels at full resolution, recall of the tokens that matter, and the ceiling of the leaves."""
    model.eval()
    pruning = None if left is None else Pruning(keep_ratio=shares(left))
    names = [str(label) for label in range(data.num_classes)]
    metrics, recalls, reach, tokens, start = PixelMetrics(names), [], [], [], time.process_time()
    guesses = [predict(model, side, data, volume.image, pruning) for volume in volumes]
    spent = (time.process_time() - start) / len(volumes)
    for volume, guess in zip(volumes, guesses, strict=True):
        metrics.update(volume.name, guess, volume.labels, volume.spacing)
        if side.leaves != "voxels":
            leaves = cut(volume.image, side, data)
            tokens.append(len(leaves))
            reach.append(mean_known(ceiling(torch.from_numpy(volume.labels), leaves, PATCH, data.num_classes)))
            if side.reduce in ("prune", "random") and left is None:
                recalls.append(recall(model, volume, leaves, data))
    found = {measure: mean_known([mean_known(row[measure]) for row in metrics.rows]) for measure in ("dice", "hd95")}
    summary = metrics.summarise()
    return {
        **found,
        "classes": [summary["dice"][name]["mean"] for name in names[1:]],
        "ceiling": mean_known(reach),
        "tokens": mean_known(tokens),
        "predict_seconds": spent,
        **{name: mean_known([one[name] for one in recalls]) for name in (recalls[0] if recalls else ())},
    }


def recall(model: Any, volume: Volume, leaves: Leaves, data: VolumeSet) -> dict[str, float]:
    """Share of the tokens with a label edge, and with any label, that are kept to the end, and what is possible."""
    soft, weight = patchify_mask(volume.labels, leaves, PATCH, data.num_classes)
    worth = token_worth(soft, weight)
    with torch.inference_mode():
        kept = model.encoder(patchify(volume.image, leaves, PATCH)).parts[-1].rows
    chosen = torch.zeros(len(worth), dtype=torch.bool).index_fill(0, kept, True)
    edges = worth == 1.0
    return {
        "boundary": float(chosen[edges].float().mean()),
        "foreground": float(chosen[worth > 0].float().mean()),
        "possible": min(1.0, len(kept) / max(1, int(edges.sum()))),
    }


def run(
    side: Side, data: VolumeSet, seconds: float, seed: int, *, part: str = "test"
) -> tuple[dict[str, Any], nn.Module]:
    """Build, train and score one side; returns what was found, and the model."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build(side, data)
    for volume in data.val[:1]:  # compiles what is compiled at the first call
        predict(model.eval(), side, data, volume.image, None)
    trained = train(model, side, data, seed, seconds=seconds)
    volumes = data.test if part == "test" else data.val
    params = sum(weight.numel() for weight in model.parameters())
    return {**score(model, side, data, volumes), **trained, "params": params, "lr": side.lr, "seed": seed}, model


def with_model(side: Side, name: str, **model: Any) -> Side:
    """The same side with other fields of the configuration."""
    return replace(side, name=name, model={**side.model, **model})
