"""Every setting of a run, as frozen values that are checked once, at the door.

A run is described by one YAML file with six parts (``data``, ``tree``, ``model``, ``train``, ``predict``, ``out``); any
value can be given again as ``a.b=c``. What a run resolved to is saved beside its results, and that file runs again as
it is.
"""

import math
from dataclasses import dataclass, field

from foveate.tasks.settings_data import ClassRule, DataConfig, SplitConfig, among, parse_bytes, require

__all__ = [
    "ClassRule",
    "DataConfig",
    "FitConfig",
    "ModelSpec",
    "Override",
    "PredictConfig",
    "SplitConfig",
    "TrainConfig",
    "TreeConfig",
    "parse_bytes",
]

Override = list[int] | list[float] | bool | int | float | str | None
"""A value of a field of a model configuration."""


@dataclass(frozen=True)
class TreeConfig:
    """How an image is cut into leaves: adaptively within a budget, or as a uniform grid for comparison."""

    max_leaves: int | None = 1024
    """Most leaves per image; with ``tolerance`` a cap on it."""
    tolerance: float | None = None
    """Every leaf's error (in units of the detail measure) stays below it; leaves as many as that takes."""
    min_size: int = 8
    """Side in pixels of the smallest leaf."""
    max_size: int | None = None
    """Side in pixels of the largest leaf; ``null``: one cell may cover the whole image."""
    detail: str | dict[str, float] = "residual"
    """Measure that drives splitting, or a mixture of measures with weights, such as ``{residual: 1, tv: 0.5}``."""
    smooth: float = 0.0
    """Sigma in pixels of a Gaussian blur before the measure (not before the patches); calms photographic noise."""
    tissue: float = 0.0
    """Weight of the tissue map as one more detail of slides: the larger, the coarser the background is cut."""
    uniform: int | None = None
    """Side in pixels of a uniform grid to use instead of the tree; all other fields are then without effect."""

    def __post_init__(self) -> None:
        if self.uniform is not None:
            require(
                self.uniform >= 1, f"tree.uniform={self.uniform} is below 1: give the leaf's side in pixels or null"
            )
        require(
            self.max_leaves is not None or self.tolerance is not None,
            "tree.max_leaves and tree.tolerance are both null: give a number of leaves, an error bound, or both",
        )
        leaves = self.max_leaves
        require(leaves is None or leaves >= 1, f"tree.max_leaves={leaves} is below 1: give at least 1 leaf")
        bound = self.tolerance
        require(bound is None or 0 <= bound < math.inf, f"tree.tolerance={bound} is not an error bound: give 0 or more")
        require(self.min_size >= 1, f"tree.min_size={self.min_size} is below 1: give a side in pixels")
        if self.max_size is not None:
            ratio = self.max_size / self.min_size
            require(
                ratio >= 1 and math.log2(ratio).is_integer(),
                f"tree.max_size={self.max_size} is not min_size={self.min_size} doubled a whole number of times: "
                f"give {self.min_size * 2 ** max(0, round(math.log2(max(ratio, 1))))}",
            )
        require(0 <= self.smooth < math.inf, f"tree.smooth={self.smooth} is not a sigma: give 0 or more pixels")
        require(0 <= self.tissue < math.inf, f"tree.tissue={self.tissue} is not a weight: give 0 (off) or more")
        require(bool(self.detail), "tree.detail is empty: give a measure such as 'residual'")


@dataclass(frozen=True)
class ModelSpec:
    """Which named model, what is changed in it, and where its weights come from."""

    name: str = "apf_vit_tiny"
    """Name from ``foveate.list_models()``."""
    overrides: dict[str, Override] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as ``{depth: 6, patch_size: 8}``."""
    weights: str | None = None
    """What to start from: a safetensors file with an encoder's weights, the folder of a run, or one that
    ``save_pretrained`` wrote. Where this model prunes and that one does not, scorers and assembler are fresh."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name is empty: give a name such as 'apf_vit_tiny'")
        for key in ("in_chans", "num_classes"):
            require(
                key not in self.overrides,
                f"model.overrides.{key} is set by the data: change data.channels or data.classes instead",
            )


@dataclass(frozen=True)
class TrainConfig:
    """How long and how the model learns; whichever of ``epochs``, ``max_steps``, ``minutes`` comes first ends it."""

    epochs: int | None = 50
    """Passes over the training images."""
    max_steps: int | None = None
    """Optimiser steps."""
    minutes: float | None = None
    """Minutes of wall time, for comparisons at equal cost."""
    batch_size: int = 4
    """Images per step and process."""
    accumulate: int = 1
    """Steps whose gradients are summed before the optimiser moves."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decay of AdamW on matrices; biases, norms, tokens, codes and embeddings of position are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two running means."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block of the encoder to the one before it, for pretrained encoders; what is
    not in a block (decoder, scorers, assembler, queries, heads) has the full rate."""
    warmup: float = 0.05
    """Share of the run, from 0 to 1, in which the learning rate rises from 0."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: ``cosine`` or ``linear`` to 0, or ``constant``."""
    clip: float | None = 1.0
    """Largest norm of the gradient; ``null``: no clipping."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    precision: str = "auto"
    """``fp32``, ``bf16`` or ``fp16`` (mixed). ``auto``: ``bf16`` where the device is made for it (CUDA from Ampere on,
    processors with AMX), else ``fp32``; the run's own file says which it was."""
    class_weights: list[float] | None = None
    """Weight of every class, background first, in the cross entropy; ``null``: all 1."""
    dice_weight: float = 1.0
    """Weight of the soft Dice beside the cross entropy; 0 turns it off."""
    score_weight: float = 1.0
    """Weight of the loss that teaches token scores what is worth keeping, where the model prunes; 0: they learn through
    the choice alone, which is hardly at all."""
    score_target: str = "labels"
    """What is worth keeping: ``labels`` (tokens with a label edge or a class), ``loss`` (tokens of high loss) or
    ``head`` (tokens of which a small head, used in training only, cannot say the class)."""
    keep_ratio: tuple[float, float] | None = None
    """Range from which every step draws the model's ``keep_ratio``, so that one model serves any; ``null``: its own."""
    prune_noise: float = 0.0
    """Scale of the Gumbel noise on token scores in the first epoch, falling to 0 at the last; published: 1, always."""
    augment: bool | float = True
    """How strongly training images are varied, from 0 (``false``) to 1 (``true``). Up to 0.5: flips and quarter turns
    only, which cost nothing; above: also rotation, zoom, shift, contrast and noise, growing with the number."""
    trim: int = 0
    """Pixels up to which every side of a training image is cut off, so that leaves lie elsewhere each time; unlike
    ``augment`` it leaves left where it is."""
    eval_every: int = 1
    """Epochs between validations."""
    eval_first: bool = False
    """Also validate before the first step, so that fine-tuning shows what it starts from."""
    patience: int | None = None
    """Validations without a better score after which training ends; ``null``: never."""
    num_workers: int = 0
    """Processes that prepare images; 0: the training process itself."""
    tracker: str | None = None
    """``tensorboard`` or ``wandb``: also send the metrics there; ``null``: only ``metrics.jsonl``."""

    @property
    def strength(self) -> float:
        """``augment`` as a number from 0 to 1."""
        return float(self.augment)

    def __post_init__(self) -> None:
        among("train.schedule", self.schedule, ("cosine", "linear", "constant"))
        among("train.score_target", self.score_target, ("labels", "loss", "head"))
        among("train.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        if self.tracker is not None:
            among("train.tracker", self.tracker, ("tensorboard", "wandb"))
        limits = {"epochs": self.epochs, "max_steps": self.max_steps, "minutes": self.minutes}
        require(
            any(value is not None for value in limits.values()),
            "train.epochs, train.max_steps and train.minutes are all null: give at least one end",
        )
        for name, value in limits.items():
            require(value is None or value > 0, f"train.{name}={value} is not above 0: give a positive end or null")
        for name in ("batch_size", "accumulate", "eval_every"):
            count = getattr(self, name)
            require(count >= 1, f"train.{name}={count} is below 1: give 1 or more")
        for name in ("weight_decay", "dice_weight", "score_weight", "prune_noise", "trim", "num_workers", "seed"):
            number = getattr(self, name)
            require(0 <= number < math.inf, f"train.{name}={number} is negative or not finite: give 0 or more")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"train.betas={list(self.betas)} are outside 0 up to below 1: give two, such as [0.9, 0.95]",
        )
        require(
            0 < self.layer_decay <= 1,
            f"train.layer_decay={self.layer_decay} is outside 0 to 1: give a factor such as 0.75",
        )
        require(0 < self.lr < math.inf, f"train.lr={self.lr} is not above 0: give a rate such as 3e-4")
        require(0 <= self.warmup < 1, f"train.warmup={self.warmup} is a share of the run: give 0 up to below 1")
        require(self.clip is None or self.clip > 0, f"train.clip={self.clip} is not above 0: give a norm or null")
        require(
            self.patience is None or self.patience >= 1,
            f"train.patience={self.patience} is below 1: give a number of validations or null",
        )
        require(0 <= self.strength <= 1, f"train.augment={self.augment} is outside 0 to 1: give true, false or a share")
        ratios = self.keep_ratio
        require(
            ratios is None or 0 < ratios[0] <= ratios[1] <= 1,
            f"train.keep_ratio={ratios} is no range of shares: give the least and the largest, such as [0.1, 1]",
        )
        weights = self.class_weights
        require(
            weights is None or all(0 <= weight < math.inf for weight in weights),
            f"train.class_weights={weights} has a negative or infinite weight: give 0 or more per class",
        )


@dataclass(frozen=True)
class PredictConfig:
    """How the mask of an image is made, at validation, evaluation and prediction alike."""

    window: int | None = None
    """Side in pixels of windows that slide over an image, each cut and segmented by itself, their probabilities
    blended; ``null``: the whole image at once, so that leaves and attention span it. For images that are held."""
    overlap: float = 0.5
    """Share of its side that a window has in common with the next."""
    keep_ratio: float | None = None
    """Share of the tokens that go on at every prune point of a model that prunes; ``null``: as it was made."""
    precision: str = "auto"
    """``fp32`` or ``bf16`` (mixed), with which a few pixels on borders differ. ``auto``: as in training, of the device
    that makes the masks."""
    values: str = "index"
    """What masks in NIfTI hold: ``index``, the number of the class as it is written in ``data.classes``; ``file``, the
    value that ``data.classes`` gives it (of a list the first)."""

    def __post_init__(self) -> None:
        require(
            self.window is None or self.window >= 1,
            f"predict.window={self.window} is below 1: give a side in pixels or null",
        )
        among("predict.values", self.values, ("index", "file"))
        among("predict.precision", self.precision, ("auto", "fp32", "bf16"))
        ratio = self.keep_ratio
        require(
            ratio is None or 0 < ratio <= 1,
            f"predict.keep_ratio={ratio} is no share above 0 and up to 1: give one such as 0.5",
        )
        require(0 <= self.overlap < 1, f"predict.overlap={self.overlap} is outside 0 up to below 1: give a share")


@dataclass(frozen=True)
class FitConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images, masks, classes and splits."""
    tree: TreeConfig = field(default_factory=TreeConfig)
    """How an image is cut."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """What learns."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it learns."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    """How its masks are made."""
    out: str = "runs/fit"
    """Folder for the resolved settings, metrics and checkpoints."""

    def __post_init__(self) -> None:
        weights = self.train.class_weights
        require(
            weights is None or len(weights) == self.data.num_classes,
            f"train.class_weights has {len(weights or [])} values for {self.data.num_classes} classes "
            f"({', '.join(self.data.class_names)}): give one each, background first",
        )
        require(bool(self.out), "out is empty: give a folder for the run")
        if self.predict.values == "file":
            _ = self.data.file_values
