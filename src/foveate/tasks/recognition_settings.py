"""Every setting of a recognition run: a table of images with labels in, a classifier that chooses its patches out.

A run is a YAML file with ``task: recognition`` and the parts ``data``, ``select``, ``model``, ``train`` and
``out``.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from foveate.geometry.image import Real
from foveate.nn.heads import KINDS
from foveate.nn.rank import RANKS
from foveate.nn.schedule import KeepSchedule
from foveate.nn.selector import RULES
from foveate.tasks.precision import AUTO, resolve_precision
from foveate.tasks.settings import ModelSpec, TrainConfig
from foveate.tasks.settings_data import DataConfig, SplitConfig, among, require

_ELSEWHERE = {
    "tasks": "data.tasks",
    "patch_size": "data.patch_size",
    **{name: f"select.{name}" for name in ("keep", "chunk", "rule", "rank", "attend", "precision")},
    "workers": "train.num_workers",
}
_START = 128
_UNUSED = ("class_weights", "dice_weight", "score_weight", "score_target", "keep_ratio", "prune_noise", "trim")


@dataclass(frozen=True)
class LabelSpec:
    """One thing to recognise: a column of the table, and what is in it."""

    kind: str = "classes"
    """``classes`` (one of several), ``labels`` (any of several, with ``;`` between them, ``-`` for none), ``ordinal``
    (one of several that have an order) or ``regression`` (a number)."""
    column: str | None = None
    """Column of the table; ``null``: the name of the task."""
    values: list[str | int] | None = None
    """Names of the classes in their order; ``null``: those in the table, numbers by size and words by alphabet."""
    scale: list[float] | None = None
    """Mean and deviation by which a number is learned; ``null``: those of the training rows."""
    class_weights: list[float] | str | None = None
    """Weight of every class in the loss, or ``balanced``: every class counts alike, however many it has."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, once they are known."""
        return tuple(map(str, self.values or ()))

    def check(self, name: str) -> None:
        """Refuse contradictions, in a task of the given name."""
        where = f"data.tasks.{name}"
        among(f"{where}.kind", self.kind, KINDS)
        double = [value for value in self.names if self.names.count(value) > 1]
        require(not double, f"{where}.values names {double[:1]} twice: name every class once")
        numbers = self.kind == "regression"
        require(not numbers or self.values is None, f"{where}.values is set but kind is regression: leave it out")
        require(numbers or self.scale is None, f"{where}.scale is set but kind={self.kind!r}: leave it out")
        scale = self.scale
        require(
            scale is None or (len(scale) == 2 and scale[1] > 0 and all(map(math.isfinite, scale))),
            f"{where}.scale={scale} is no mean and deviation: give two numbers, the second above 0",
        )
        weights = self.class_weights
        if isinstance(weights, str):
            among(f"{where}.class_weights", weights, ("balanced",))
        require(
            weights is None or self.kind in ("classes", "labels"),
            f"{where}.class_weights is set but kind is {self.kind}: leave it out",
        )
        if isinstance(weights, list):
            fits = self.values is None or len(weights) == len(self.values)
            require(
                fits and all(0 <= weight < math.inf for weight in weights),
                f"{where}.class_weights={weights} for {len(self.values or ())} classes: give one of 0 or more each",
            )


@dataclass(frozen=True)
class TableSplit(SplitConfig):
    """How rows are shared out: by whole groups (the column ``group``: a patient), every class alike on all sides."""

    folds: int | None = None
    """Number of folds of a cross-validation, instead of shares: ``fold`` is test and the next one validates. Where the
    column ``split`` says what is test, ``fold`` validates."""
    fold: int = 0
    """Which of them, from 0."""
    stratify: str | None = None
    """Task whose classes are shared out evenly; ``null``: the first one with classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        folds = self.folds
        require(folds is None or folds >= 3, f"data.split.folds={folds} is below 3: train, val and test need one each")
        require(
            0 <= self.fold < (folds or 1),
            f"data.split.fold={self.fold} of {folds or 1} folds: give 0 to {(folds or 1) - 1}",
        )


@dataclass(frozen=True)
class TableConfig:
    """Which images there are and what is known of each, and how an image becomes a bag of patches."""

    root: str = "."
    """Folder that all other paths are relative to; nothing outside it is read."""
    table: str = "labels.csv"
    """CSV (or JSONL) with the column path and one for every task and, as needed, id, group, split, mpp and marks."""
    tasks: dict[str, LabelSpec] = field(default_factory=lambda: {"label": LabelSpec()})
    """What to recognise, by name, such as ``{majority: {kind: classes}, multi: {kind: labels}}``."""
    missing: str = "error"
    """What an empty label is: ``error``, or ``ignore`` (the row is not learned and not scored in that task)."""
    split: TableSplit = field(default_factory=TableSplit)
    """How rows are shared out; a ``split`` column of the table wins over it."""
    features: str | None = None
    """Folder with one bag of features per row, ``<id>.safetensors``, as ``foveate embed`` writes them; the images are
    then not read."""
    patch_size: int = 256
    """Side of a patch in pixels."""
    stride: int | None = None
    """Pixels from one patch to the next; ``null``: ``patch_size``, so that patches do not overlap."""
    tissue: float = 0.0
    """Least share of a patch that must be tissue, from 0 (every patch counts) to 1; others are never decoded."""
    loading: str = "sequential"
    """``eager``: all patches of a batch of images are in memory; ``sequential``: those of one image; ``lazy``: those of
    one chunk. The result is the same."""
    mpp: float | None = None
    """Size in um of the pixels that all images are read at; ``null``: as they were stored."""
    normalise: str = "range"
    """``range``: by the file's data type to [0, 1]; ``image``: per-image robust percentiles; ``fixed``: ``range``, then
    minus ``mean`` over ``std``."""
    mean: tuple[float, ...] | None = None
    """Mean per channel for ``normalise: fixed``."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel for ``normalise: fixed``."""
    channels: int = 3
    """Channels the model sees; grey images are repeated, colour images averaged where it is 1."""
    broken: str = "raise"
    """What a tile that cannot be decoded does: ``raise`` (the slide is skipped) or ``fill`` with background."""
    max_pixels: int = 2**28
    """Images that are read whole are refused before memory is allocated if they have more pixels."""

    @cached_property
    def pixels(self) -> DataConfig:
        """The part about pixels in the terms that readers share."""
        names = ("root", "mpp", "normalise", "mean", "std", "channels", "broken", "max_pixels")
        return DataConfig(masks=None, **{name: getattr(self, name) for name in names})

    def __post_init__(self) -> None:
        require(bool(self.tasks), "data.tasks is empty: name at least one, such as {label: {kind: classes}}")
        for name, spec in self.tasks.items():
            spec.check(name)
        among("data.missing", self.missing, ("error", "ignore"))
        among("data.loading", self.loading, ("eager", "sequential", "lazy"))
        among("data.broken", self.broken, ("raise", "fill"))
        require(self.patch_size >= 1, f"data.patch_size={self.patch_size} is below 1: give a side in pixels")
        stride = self.stride
        require(
            stride is None or 1 <= stride <= self.patch_size,
            f"data.stride={stride} is outside 1 to patch_size={self.patch_size}: larger ones would leave pixels out",
        )
        require(0 <= self.tissue <= 1, f"data.tissue={self.tissue} is outside 0 to 1: give a share of a patch")
        by = self.split.stratify
        require(
            by is None or by in self.tasks,
            f"data.split.stratify={by!r} is no task: give one of {', '.join(self.tasks)}, or null",
        )
        _ = self.pixels  # its own checks


@dataclass(frozen=True)
class SelectConfig:
    """Which patches of an image are worth training on: the ``keep`` that the model's own attention ranks first."""

    keep: int = 64
    """Patches that are kept, and carry gradient."""
    chunk: int = 256
    """Patches that are looked at together; it sets memory and speed, and never what is chosen."""
    rule: str = "exact"
    """``exact``, or ``buffered`` (as published; depends on ``chunk``)."""
    rank: str = "mean"
    """How heads and queries agree on a patch: ``mean`` (as published), ``best``, ``quota`` (each brings its own best)
    or ``lse``."""
    attend: str = "kept"
    """What a prediction rests on: the ``kept`` patches (as published), or ``all``, of which the kept ones alone carry
    gradient."""
    precision: str = "auto"
    """In which patches are looked at: ``fp32`` (the encoder itself), ``folded`` (a fast copy, other by rounding alone),
    ``bf16``, ``int8`` (stored features), or ``auto``: ``bf16`` where the device is made for it, else ``folded``."""
    keep_start: int | None = None
    """``keep`` in the first epoch, from which it falls, and which sets the memory; ``null``: 8 times ``keep``, but at
    most 128 or ``keep`` itself; equal to ``keep``: no fall."""
    by_detail: float | None = None
    """Share of the kept patches that are the most detailed ones in the first epoch, instead of those that attention
    ranks first; it falls to nothing. ``null``: 0.5, and 0 with the published rule."""
    anneal: float = 0.6
    """Share of the epochs over which both fall."""
    warm_start: int = 1
    """A look at all patches of an image each so many epochs; in between at the contenders of the last look and at a
    rotating sample, and every validation says what may have been missed. 1: always all, exactly. Above 1 a run that was
    resumed begins with a look at all, so it is not the same to the bit."""

    @property
    def start(self) -> int:
        """``keep`` in the first epoch."""
        return max(self.keep, min(8 * self.keep, _START)) if self.keep_start is None else self.keep_start

    def schedule(self, epochs: int | None) -> KeepSchedule:
        """Patches kept in every epoch of a run."""
        return KeepSchedule(self.start, self.keep, self.anneal * (epochs or 0), self.prior)

    @property
    def prior(self) -> Real:
        """``by_detail``, once it is resolved."""
        return (0.5 if self.rule == "exact" else 0.0) if self.by_detail is None else self.by_detail

    def precision_on(self, device: torch.device) -> str:
        """``precision``, once it is resolved; where a prediction rests on all patches, ``auto`` only ever rounds.

        Args:
            device: where the model is.
        """
        if self.precision != AUTO:
            return self.precision
        half = self.attend == "kept" and resolve_precision(AUTO, device) == "bf16"
        return "bf16" if half else "folded"

    def __post_init__(self) -> None:
        among("select.rule", self.rule, RULES)
        among("select.rank", self.rank, RANKS)
        among("select.attend", self.attend, ("kept", "all"))
        among("select.precision", self.precision, (AUTO, "fp32", "folded", "bf16", "int8"))
        for name in ("keep", "chunk", "warm_start"):
            count = getattr(self, name)
            require(count >= 1, f"select.{name}={count} is below 1: give 1 or more")
        require(self.start >= self.keep, f"select.keep_start={self.start} is below keep={self.keep}: give keep or more")
        require(
            self.warm_start == 1 or (self.rule, self.attend) == ("exact", "kept"),
            f"select.warm_start={self.warm_start} needs rule=exact and attend=kept: set them, or warm_start to 1",
        )
        require(
            0 <= self.prior < 1, f"select.by_detail={self.prior} is outside 0 to below 1: give a share, such as 0.5"
        )
        require(0 <= self.anneal <= 1, f"select.anneal={self.anneal} is outside 0 to 1: give a share of the epochs")
        require(
            self.rule == "exact" or self.rank == "mean",
            f"select.rank={self.rank!r} but the published rule 'buffered' ranks by the mean: set rank to mean",
        )


@dataclass(frozen=True)
class RecognitionModelSpec(ModelSpec):
    """Which named model, what is changed in it, and where its weights come from."""

    name: str = "ips_cnn"
    """Name from ``foveate.list_models("ips*")``."""
    train_blocks: int | None = None
    """How many of the encoder's last blocks are trained; 0: it is frozen; ``null``: all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, where in _ELSEWHERE.items():
            require(key not in self.overrides, f"model.overrides.{key} is set by {where}: change it there")
        blocks = self.train_blocks
        require(blocks is None or blocks >= 0, f"model.train_blocks={blocks} is negative: give 0 or more, or null")


@dataclass(frozen=True)
class RecognitionConfig:
    """One recognition run."""

    task: str = "recognition"
    """What tells the file from one about segmentation."""
    data: TableConfig = field(default_factory=TableConfig)
    """Images, labels and splits."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which patches are kept."""
    model: RecognitionModelSpec = field(default_factory=RecognitionModelSpec)
    """What learns."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it learns; ``augment`` turns and flips the patches that were chosen."""
    out: str = "runs/recognition"
    """Folder for the resolved settings, metrics and checkpoints."""

    def __post_init__(self) -> None:
        among("task", self.task, ("recognition",))
        require(bool(self.out), "out is empty: give a folder for the run")
        default = TrainConfig()
        for name in _UNUSED:
            remedy = "data.tasks.NAME.class_weights is meant" if name == "class_weights" else "leave it out"
            require(
                getattr(self.train, name) == getattr(default, name),
                f"train.{name} has no meaning in a recognition run: {remedy}",
            )
        falls = self.select.start > self.select.keep and self.select.anneal > 0
        require(
            not falls or self.train.epochs is not None,
            "select.keep_start needs train.epochs, over which keep falls: give epochs, or keep_start equal to keep",
        )
        require(
            not self.select.by_detail or self.train.epochs is not None,
            "select.by_detail needs train.epochs, over which it falls: give epochs, or by_detail=0",
        )
