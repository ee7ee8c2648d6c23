"""Recognition as a task of the loop: choose patches without gradient, read them again, learn from them.

Legend: B bags, T chosen patches of a batch, K outputs of a task.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foveate.errors import ConfigError, FormatError
from foveate.geometry.patch_source import PatchSource
from foveate.models.recognition import Chosen, RecognitionModel, join_patches
from foveate.nn.detail_prior import DetailPrior
from foveate.nn.heads import TaskSpec
from foveate.nn.patch_encoder import freeze
from foveate.nn.selection import Coverage
from foveate.nn.warm_start import WarmStart
from foveate.tasks.bags import Bags, open_bag
from foveate.tasks.class_metrics import main_score, score_task
from foveate.tasks.config import save_config
from foveate.tasks.fit import run_task
from foveate.tasks.loop import LoopResult, run_device
from foveate.tasks.marks import CEILING, RECALL, marks_of, needle_recall
from foveate.tasks.recognition_settings import RecognitionConfig
from foveate.tasks.skipped import UNREADABLE, skipped_line, to_stderr
from foveate.tasks.splits import split_rows
from foveate.tasks.table import Row, read_table
from foveate.tasks.targets import class_weights, encode, resolve_tasks, task_specs
from foveate.tasks.trained import SETTINGS


@dataclass(frozen=True, eq=False)
class BagBatch:
    """What was chosen of the images of a batch, and what is known of them."""

    chosen: Chosen | None  # None where not one image could be read
    targets: Mapping[str, Tensor]
    names: tuple[str, ...]
    needles: tuple[Mapping[str, float], ...] = ()  # what `needle_recall` says of the images with marks


class RecognitionTask:
    """A recognition model with its data, as the loop wants it.

    Args:
        config: settings, with everything that the table decides written down.
        model: what learns; its own attention chooses the patches.
        split: rows that train and validate.
        warn: called with one line for each image that cannot be read; None writes it to standard error.
    """

    score = "score"

    def __init__(
        self,
        config: RecognitionConfig,
        model: RecognitionModel,
        split: Mapping[str, Sequence[Row]],
        warn: Callable[[str], Any] | None = None,
    ) -> None:
        self.model: nn.Module = model
        self.config, self.network, self.warn = config, model, warn or to_stderr
        self.rows = {kind: tuple(split[kind]) for kind in ("train", "val")}
        self.specs = {spec.name: spec for spec in model.config.tasks}
        self.targets = {kind: encode(rows, config.data.tasks) for kind, rows in self.rows.items()}
        self.class_weights = class_weights(config.data.tasks, self.targets["train"])
        self.marks = {row.item.name: marks_of(row) for row in self.rows["val"]}
        self.num_items = len(self.rows["train"])
        self.skipped: dict[str, str] = {}
        every = config.select.warm_start
        self.warm = WarmStart(every=every) if every > 1 else None
        self.schedule, self.prior = config.select.schedule(config.train.epochs), DetailPrior(config.select.start)
        self.coverage: list[Coverage] = []  # of the selections since the last validation

    def batches(self, epoch: int, plan: Sequence[Sequence[int]], device: torch.device) -> Iterator[BagBatch]:
        """Choose the patches of every batch with the weights as they are when the batch is asked for."""
        return self._chosen("train", plan, epoch)

    def _chosen(self, kind: str, plan: Sequence[Sequence[int]], epoch: int | None) -> Iterator[BagBatch]:
        stream = self._stream(kind, [item for batch in plan for item in batch])
        for batch in plan:
            yield self._batch(kind, batch, islice(stream, len(batch)), epoch)
        deque(stream, maxlen=0)  # a loader's processes end when it is asked once more

    def _stream(self, kind: str, order: Sequence[int]) -> Iterator[PatchSource | Exception]:
        """Bags in an order, prepared in this process or in ``train.num_workers`` others."""
        data = self.config.data
        bags = Bags(self.rows[kind], data, feature_width(self.network), lazy=data.loading == "lazy")
        workers = (
            0 if bags.lazy else self.config.train.num_workers
        )  # what is lazy is read ahead by the selector's threads
        if workers == 0 or not order:
            return (bags[item] for item in order)
        ahead = None if data.loading == "eager" else 1
        generator = torch.Generator()  # the loader's own; nothing is drawn from it
        loader = DataLoader(
            bags, batch_size=None, sampler=list(order), num_workers=workers, prefetch_factor=ahead, generator=generator
        )
        return iter(loader)

    def _batch(self, kind: str, items: Sequence[int], bags: Iterable[Any], epoch: int | None) -> BagBatch:
        """Choose from every bag that can be read; with ``eager`` loading all of them are in memory before."""
        bags = list(bags) if self.config.data.loading == "eager" else bags
        chosen, seen, needles = [], [], []
        for item, bag in zip(items, bags, strict=True):
            row = self.rows[kind][item]
            try:
                if isinstance(bag, Exception):
                    raise bag
                picked = self._choose(row, bag, epoch)
                marks = self.marks[row.item.name] if kind == "val" else None
                needles.append(needle_recall(marks, picked.selections[0].index, bag, row, self.config.data))
                chosen.append(self._varied(picked, row, epoch))
                seen.append(item)
            except UNREADABLE as error:
                self._skip(kind, row, error)
        index = torch.tensor(seen, dtype=torch.int64)
        targets = {name: target[index] for name, target in self.targets[kind].items()}
        names = tuple(self.rows[kind][item].item.name for item in seen)
        return BagBatch(join(chosen), targets, names, tuple(one for one in needles if one))

    def _choose(self, row: Row, bag: PatchSource, epoch: int | None) -> Chosen:
        """By attention alone where nothing is learned; in an epoch as the schedule says."""
        if epoch is None:
            return self.network.choose([bag])
        keep, by_detail = self.schedule.at(epoch), self.schedule.by_detail_at(epoch)
        names = [row.item.name]
        chosen = self.network.choose([bag], keep, warm=self.warm, prior=self.prior, by_detail=by_detail, names=names)
        self.coverage += [one.coverage for one in chosen.selections if one.coverage is not None]
        return chosen

    def _varied(self, chosen: Chosen, row: Row, epoch: int | None) -> Chosen:
        """Turn and flip every chosen patch by itself, by (seed, epoch, image) alone."""
        train = self.config.train
        if epoch is None or train.strength == 0 or chosen.patches.ndim != 4:
            return chosen
        rng = np.random.default_rng([train.seed, epoch, zlib.crc32(row.item.name.encode())])
        way = torch.from_numpy(rng.integers(0, 8, len(chosen.patches)))
        patches = chosen.patches.clone()
        for turn in range(1, 8):
            some = patches[way == turn]
            some = some.rot90(turn % 4, (-2, -1))
            patches[way == turn] = some.flip(-1) if turn >= 4 else some
        return replace(chosen, patches=patches)

    def _skip(self, kind: str, row: Row, error: BaseException) -> None:
        if row.item.name not in self.skipped:
            self.skipped[row.item.name] = skipped_line(row.item, error)
            self.warn(f"foveate: skipped {self.skipped[row.item.name]}")
        lost = [row.item.name in self.skipped for row in self.rows[kind]]
        if all(lost):
            first = self.skipped[self.rows[kind][0].item.name]
            raise FormatError(f"none of the {len(lost)} {kind} images can be read (first: {first}); mend the files")

    def names(self, batch: BagBatch) -> tuple[str, ...]:
        """Names of the images in the batch."""
        return batch.names

    def num_tokens(self, batch: BagBatch) -> int:
        """Patches of the batch that carry gradient."""
        return 0 if batch.chosen is None else sum(batch.chosen.lengths)

    def weights(self, batch: BagBatch) -> Mapping[str, float]:
        """Images with a label, for every task."""
        known = {name: spec.known(batch.targets[name]) for name, spec in self.specs.items()}
        return {f"{name}_loss": float(flags.sum()) for name, flags in known.items()}

    def loss(self, model: nn.Module, batch: BagBatch) -> Mapping[str, Tensor]:
        """Sum over the images of each task's loss, divided by the number of tasks, so that they add up to the mean."""
        if batch.chosen is None:
            nothing = sum((p.sum() * 0 for p in model.parameters() if p.requires_grad), start=torch.tensor(0.0))
            return {f"{name}_loss": nothing for name in self.specs}
        logits = model(batch.chosen)
        return {f"{name}_loss": self._losses(spec, logits[name], batch).sum() for name, spec in self.specs.items()}

    def _losses(self, spec: TaskSpec, logits: Tensor, batch: BagBatch) -> Tensor:
        weight = self.class_weights.get(spec.name)
        target = batch.targets[spec.name].to(logits.device)
        each = spec.loss(logits, target, None if weight is None else weight.to(logits.device))
        return each / len(self.specs)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and scores of every task on the validation images, without intervals, and needle recall."""
        rows = self.rows["val"]
        if not rows:
            return {}
        losses, said, index = [], list[dict[str, Tensor]](), list[int]()
        needles = list[Mapping[str, float]]()
        plan = [[item] for item in range(len(rows))]
        for item, batch in enumerate(self._chosen("val", plan, None)):
            if batch.chosen is None:
                continue
            logits = {name: value.float().cpu() for name, value in model(batch.chosen).items()}
            losses.append(sum(float(self._losses(spec, logits[name], batch)) for name, spec in self.specs.items()))
            said.append({name: spec.predict(logits[name]) for name, spec in self.specs.items()})
            index.append(item)
            needles += batch.needles
        values = {"val_loss": sum(losses) / len(losses)}
        scores = {}
        for name, spec in self.specs.items():
            truth = self.targets["val"][name][index].numpy()
            scores[name] = score_task(spec.kind, torch.cat([one[name] for one in said]).numpy(), truth, resamples=0)
            values |= {f"{name}_{measure}": found["mean"] for measure, found in scores[name].items()}
        for name in needles[0] if needles else ():
            values[name] = sum(one[name] for one in needles) / len(needles)
        if self.coverage:
            for name in ("looked", "missed"):
                values[name] = sum(getattr(one, name) for one in self.coverage) / len(self.coverage)
            self.coverage = []
        return {"score": main_score({name: spec.kind for name, spec in self.specs.items()}, scores), **values}

    def save(self, folder: Path) -> None:
        """Write the model and the settings that prediction needs."""
        self.network.save_pretrained(folder)
        save_config(self.config, folder / SETTINGS)

    def load(self, folder: Path) -> None:
        """Read back the weights that `save` wrote."""
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(folder / "model.safetensors"))


def join(parts: Sequence[Chosen]) -> Chosen | None:
    """Chosen patches of several images as one batch; None of none."""
    if not parts:
        return None
    centres = [part.centres for part in parts if part.centres is not None]
    return Chosen(
        join_patches([part.patches for part in parts]),
        tuple(length for part in parts for length in part.lengths),
        torch.cat(centres) if centres else None,
        tuple(one for part in parts for one in part.selections),
    )


def feature_width(model: RecognitionModel) -> int | None:
    """Width of the features that a model takes; None where it takes pixels."""
    return model.config.in_chans if model.config.encoder == "features" else None


@dataclass(frozen=True)
class FitResult:
    """A finished run."""

    folder: Path
    loop: LoopResult
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        position, scores = self.loop.position, self.loop.last_scores
        text = (
            f"{self.folder}: ended by {self.loop.reason} after {position.epoch} epochs, {position.step} steps, "
            f"{position.seconds:.0f} s of training in {self.loop.precision}"
        )
        if scores:
            needle = f", needle recall {scores[RECALL]:.3f} of {scores[CEILING]:.3f}" if RECALL in scores else ""
            text += f"; best val score {position.best:.3f} at step {position.best_step} (last {scores['score']:.3f}"
            text += f"{needle})"
        return text + (f"; {len(self.skipped)} images skipped (first: {self.skipped[0]})" if self.skipped else "")


def build_task(config: RecognitionConfig, warn: Callable[[str], Any] | None = None) -> RecognitionTask:
    """Read the table, share it out, and create the model from the settings.

    Args:
        config: settings of the run.
        warn: see `RecognitionTask`.

    Raises:
        ConfigError: settings, table and model do not fit each other.
        FormatError: the table is bad, or not one bag of features can be read.
    """
    rows = read_table(config.data)
    split = split_rows(rows, config.data)
    config = replace(config, data=resolve_tasks(config.data, rows, split["train"]))
    with torch.random.fork_rng(devices=[]):  # the caller's generator is not ours to move
        torch.manual_seed(config.train.seed)
        model = build_model(config, split["train"])
    return RecognitionTask(config, model, split, warn)


def build_model(config: RecognitionConfig, train: Sequence[Row]) -> RecognitionModel:
    """The model of the settings, with a head for every task, and weights where they are given.

    Args:
        config: settings, resolved.
        train: rows for training, of which the first says how wide stored features are.

    Raises:
        ConfigError: the model is not one for what the table holds.
    """
    from foveate.models import create_model, list_models

    data, select = config.data, config.select
    known = list_models("ips*")
    if config.model.name not in known:
        raise ConfigError(f"model.name={config.model.name!r} is no recognition model: give one of {', '.join(known)}")
    features = data.features is not None
    given: dict[str, Any] = {
        "tasks": task_specs(data.tasks),
        **{name: getattr(select, name) for name in ("keep", "chunk", "rule", "rank", "attend")},
        "precision": select.precision_on(run_device()),
        "workers": config.train.num_workers if data.loading == "lazy" else 0,
        **({} if features else {"patch_size": data.patch_size}),
        **config.model.overrides,
    }
    width = _stored_width(train, config) if features else data.channels
    model: object = create_model(config.model.name, in_chans=width, weights=config.model.weights, **given)
    assert isinstance(model, RecognitionModel)
    if (model.config.encoder == "features") != features:
        what, remedy = ("features", "model.name=ips_features") if features else ("pixels", "a model of pixels")
        raise ConfigError(f"model.name={config.model.name!r} but the run is about {what}: give {remedy}")
    if config.model.train_blocks is not None:
        freeze(model.encoder, config.model.train_blocks)
    return model


def _stored_width(train: Sequence[Row], config: RecognitionConfig) -> int:
    first = ""
    for row in train:
        try:
            return int(open_bag(row.item, config.data).read(torch.tensor([0])).shape[1])
        except UNREADABLE as error:
            first = first or skipped_line(row.item, error)
    raise FormatError(f"none of the {len(train)} training bags can be read (first: {first}); mend data.features")


def fit(config: RecognitionConfig, *, resume: bool = False, overwrite: bool = False) -> FitResult:
    """Train a recognition model as the settings say.

    Args:
        config: settings of the run; ``config.out`` is its folder.
        resume: continue from the folder's last checkpoint; on the CPU bit for bit as if it had not stopped.
        overwrite: redo a run that is there already.

    Returns:
        Where the run is, how it ended, and what was skipped.

    Raises:
        ConfigError: the settings, the data or the run folder do not fit.
        FormatError: the table is bad, or not one image can be read.
        Interrupted: Ctrl-C or SIGTERM; everything is saved and the message says how to continue.
    """
    task = build_task(config)
    select = replace(task.config.select, precision=task.network.config.precision)  # the run says what `auto` came to
    folder, result = run_task(task, replace(task.config, select=select), resume=resume, overwrite=overwrite)
    return FitResult(folder, result, tuple(task.skipped.values()))
