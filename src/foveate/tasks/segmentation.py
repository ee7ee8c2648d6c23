"""Segmentation as a task of the loop: the loss on leaves in training, scores in pixels at full resolution elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from foveate.errors import ConfigError
from foveate.nn.pruner import Scores
from foveate.tasks.config import FitConfig, save_config
from foveate.tasks.data import Batch, Sample, SegmentationData, collate
from foveate.tasks.fit import run_task
from foveate.tasks.items import find_items, split_items
from foveate.tasks.loop import LoopResult
from foveate.tasks.losses import leaf_loss
from foveate.tasks.metrics import PixelMetrics, mean_known
from foveate.tasks.pruning import class_shares, draw_pruning, prunes, score_loss, token_worth
from foveate.tasks.score_targets import NAME as TEACHER
from foveate.tasks.score_targets import Teacher, apart, load_teacher, loss_worth, save_teacher
from foveate.tasks.scoring import score_item
from foveate.tasks.slides import check_large_files
from foveate.tasks.start import make_model
from foveate.tasks.trained import SETTINGS


class SegmentationTask:
    """A segmentation model with its data, as the loop wants it.

    Args:
        config: Settings of the run.
        model: `SegmentationModel`, or any module with ``config.patch_size``, ``save_pretrained`` and the same call.
        train: Training images, varied as the settings say.
        val: Validation images, never varied; None where there are none, then the latest model is the best.
    """

    score = "dice"

    def __init__(
        self, config: FitConfig, model: nn.Module, train: SegmentationData, val: SegmentationData | None
    ) -> None:
        self.config, self.model, self.train, self.val = config, model, train, val
        self.num_items = len(train)
        self._ceilings: dict[int, dict[str, Any]] = {}

    def batches(self, epoch: int, plan: Sequence[Sequence[int]], device: torch.device) -> Iterator[Batch]:
        """Load the batches of a plan in its order, in this process or in ``train.num_workers`` others."""
        self.train.set_epoch(epoch)
        loaded = (collate([self.train[item] for item in batch]) for batch in plan)
        if self.config.train.num_workers > 0 and plan:
            loader: DataLoader[Any] = DataLoader(
                _Guarded(self.train),
                batch_sampler=[list(batch) for batch in plan],
                collate_fn=_collate_guarded,
                num_workers=self.config.train.num_workers,
                generator=torch.Generator(),  # the loader's own; nothing is drawn from it
            )
            loaded = (_unwrapped(batch) for batch in loader)
        for batch in loaded:
            yield batch.to(device)

    def names(self, batch: Batch) -> tuple[str, ...]:
        """Names of the images in the batch."""
        return batch.names

    def num_tokens(self, batch: Batch) -> int:
        """Tokens of the batch."""
        return len(batch.soft)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Labelled pixels times their class weight for the cross entropy, labelled images for Dice."""
        weight_TS = batch.weight.double().flatten(1)
        by_class_K = (batch.soft.double().flatten(2) * weight_TS[:, None]).sum((0, 2))
        factors_K = self.config.train.class_weights or [1.0] * len(by_class_K)
        images = torch.stack([part.sum() > 0 for part in weight_TS.split(list(batch.patches.lengths))])
        pixels = sum(float(value) * factor for value, factor in zip(by_class_K.tolist(), factors_K, strict=True))
        found = {"ce": pixels, "dice_loss": float(images.sum())}
        taught = ("score_loss", "teacher_loss") if hasattr(self.model, TEACHER) else ("score_loss",)
        return found | dict.fromkeys(taught if prunes(self.model) else (), float(images.sum()))

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums of cross entropy and soft Dice over the batch, and of the scores' own loss where the model prunes."""
        train = self.config.train
        pruning = draw_pruning(train, self.train.epoch, batch.names) if prunes(self.model) else None
        logits = model(batch.patches) if pruning is None else model(batch.patches, pruning)
        parts = leaf_loss(
            logits.float(),
            batch.soft,
            batch.weight,
            lengths=batch.patches.lengths,
            class_weights=train.class_weights,
            dice_weight=train.dice_weight,
            groups=tuple(self.config.data.groups.values()) if self.config.data.regions else None,
        )
        sums = {"ce": parts.ce_sum, "dice_loss": parts.dice_weight * parts.dice_sum}
        if pruning is not None:
            sums |= self._score_losses(pruning.scores or [], batch, logits)
        return sums

    def _score_losses(self, scores: Sequence[Scores], batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The loss that teaches scores what ``train.score_target`` says, and that of a teacher where there is one."""
        train, lengths = self.config.train, batch.patches.lengths
        if train.score_target == "head":
            known_T = batch.weight.flatten(1).sum(1) > 0
            shares = class_shares(batch.soft, batch.weight)
            worths, teacher_loss = getattr(self.model, TEACHER)(scores, shares, known_T, lengths)
            each = [score_loss([stage], worth, lengths) for stage, worth in zip(scores, worths, strict=True)]
            return {"score_loss": train.score_weight * torch.stack(each).mean(), "teacher_loss": teacher_loss}
        if train.score_target == "loss":
            worth_T = loss_worth(logits, batch.soft, batch.weight, lengths)
        else:
            worth_T = token_worth(batch.soft, batch.weight)
        return {"score_loss": train.score_weight * score_loss(scores, worth_T, lengths)}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean Dice and IoU in pixels at full resolution, and the ceiling that the trees leave."""
        if self.val is None:
            return {}
        data = self.config.data
        metrics = PixelMetrics(data.class_names, data.spacing, groups=data.groups, distances=False)
        tokens, recalls = [], list[dict[str, float]]()
        for index in range(len(self.val)):
            ceiling = index not in self._ceilings  # the trees of unvaried images stay the same
            scored = score_item(model, self.val, index, metrics, ceiling=ceiling)
            tokens.append(scored.tokens)
            recalls += [] if scored.recall is None else [scored.recall]
            if scored.ceiling is not None:
                self._ceilings[index] = scored.ceiling
        reach = mean_known([mean_known(row["dice"]) for row in self._ceilings.values()])
        scores = {"dice": 0.0, "iou": 0.0, "ceiling": reach, "tokens": sum(tokens) / len(tokens)}
        for measure in ("dice", "iou"):
            scores[measure] = mean_known([mean_known(row[measure]) for row in metrics.rows])
        for name in recalls[0] if recalls else ():
            scores[name] = mean_known([recall[name] for recall in recalls])
        # images in which there is nothing, and nothing was found, have no Dice; a set of such images was got right
        return scores if scores["dice"] == scores["dice"] else scores | {"dice": 1.0, "iou": 1.0, "ceiling": 1.0}

    def save(self, folder: Path) -> None:
        """Write the model and the settings that prediction needs; what only training needs lies beside them."""
        with apart(self.model):
            self.model.save_pretrained(folder)  # type: ignore[operator]
        save_teacher(self.model, folder)
        save_config(self.config, folder / SETTINGS)

    def load(self, folder: Path) -> None:
        """Read back the weights that `save` wrote."""
        from safetensors.torch import load_file

        with apart(self.model):
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
        load_teacher(self.model, folder)


@dataclass(frozen=True)
class FitResult:
    """A finished run."""

    folder: Path
    loop: LoopResult

    def __str__(self) -> str:
        position, scores = self.loop.position, self.loop.last_scores
        text = (
            f"{self.folder}: ended by {self.loop.reason} after {position.epoch} epochs, {position.step} steps, "
            f"{position.seconds:.0f} s of training in {self.loop.precision}"
        )
        if scores:
            text += f"; best val dice {position.best:.3f} at step {position.best_step}"
            text += f" (last {scores['dice']:.3f}, ceiling {scores['ceiling']:.3f}, {scores['tokens']:.0f} tokens)"
        return text


def build_task(config: FitConfig) -> SegmentationTask:
    """Find the data, share it out, and create the model from the settings.

    Args:
        config: Settings of the run.

    Raises:
        ConfigError: Training or validation images have no masks.
        FormatError: A slide, or its mask, cannot be opened.
    """
    split = split_items(find_items(config.data), config.data)
    for kind in ("train", "val"):
        check_large_files(split[kind], config.data)
        bare = [item.name for item in split[kind] if item.mask is None]
        if bare:
            raise ConfigError(f"{kind} image {bare[0]} has no mask; correct data.masks, or take it out of the split")
    with torch.random.fork_rng(devices=[]):  # the caller's generator is not ours to move
        torch.manual_seed(config.train.seed)
        model = make_model(config)
        if config.train.score_target == "head" and prunes(model):
            numbers = model.config.width, config.data.num_classes, len(model.config.prune_after)
            model.add_module(TEACHER, Teacher(*numbers))
    patch_size = model.config.patch_size
    train = SegmentationData(split["train"], config, patch_size, train=True)
    val = SegmentationData(split["val"], config, patch_size, train=False) if split["val"] else None
    if config.model.weights is None or not Path(config.model.weights).is_dir():  # a folder holds a trained decoder
        start_from_shares(model, train)
    return SegmentationTask(config, model, train, val)


def start_from_shares(model: Any, data: SegmentationData, num_images: int = 16) -> None:
    """Set the bias of a fresh decoder so that its first guess is the share of each class, not one half.

    Where structures cover 2 % of the pixels, the first steps would otherwise go into learning just that.

    Args:
        model: Its ``decoder.head`` is changed, where it has one with a bias per class.
        data: Training images; the masks of the first ones are counted.
        num_images: How many are counted.

    Cost: decodes the counted images.
    """
    num_classes = data.config.data.num_classes
    bias = getattr(getattr(model.decoder, "head", None), "bias", None)
    if bias is None or len(bias) % num_classes:
        return
    counts = torch.ones(num_classes, dtype=torch.float64)
    for index in range(min(num_images, len(data.items))):
        counts += torch.from_numpy(data.counts(index)[:num_classes])
    shares = (counts / counts.sum()).clamp(min=0.01)
    with torch.no_grad():
        bias.view(num_classes, -1).copy_((shares / shares.sum()).log()[:, None])


def fit(config: FitConfig, *, resume: bool = False, overwrite: bool = False) -> FitResult:
    """Train a segmentation model as the settings say.

    Args:
        config: Settings of the run; ``config.out`` is its folder.
        resume: Continue from the folder's last checkpoint; on the CPU bit for bit as if it had not stopped.
        overwrite: Redo a run that is there already.

    Returns:
        Where the run is and how it ended.

    Raises:
        ConfigError: The settings, the data or the run folder do not fit.
        Interrupted: Ctrl-C or SIGTERM; everything is saved and the message says how to continue.
    """
    return FitResult(*run_task(build_task(config), config, resume=resume, overwrite=overwrite))


class _Guarded(Dataset[Any]):
    """Hands an error of a loader process over as a value: torch would wrap its message in a traceback."""

    def __init__(self, data: SegmentationData) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except Exception as error:  # noqa: BLE001 - raised again in the main process
            return error


def _collate_guarded(samples: Sequence[Sample | Exception]) -> Any:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return collate([sample for sample in samples if isinstance(sample, Sample)])


def _unwrapped(batch: Any) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    assert isinstance(batch, Batch)
    return batch
