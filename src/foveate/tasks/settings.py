"""Every setting of a run, as frozen values that are checked once, at the door.

A run is described by one YAML file with five parts (``data``, ``tree``, ``model``, ``train``, ``out``); any value can
be given again as ``a.b=c``. What a run resolved to is saved beside its results, and that file runs again as it is.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from foveate.errors import ConfigError

ClassRule = int | list[int | str] | str
"""How the values of a mask file name a class: ``3``, ``[1, 2]``, ``"#ff0000"`` or ``">=128"``."""

Override = list[int] | bool | int | float | str | None
"""A value of a field of a model configuration."""

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _require(true: bool, message: str) -> None:
    if not true:
        raise ConfigError(message)


def _among(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {', '.join(allowed)}"
        raise ConfigError(f"{name}={value!r} is none of {', '.join(allowed)}: {hint}")


def parse_bytes(value: int | str) -> int:
    """A number of bytes from ``2000000``, ``"500MB"`` or ``"1.5GiB"``.

    Args:
        value: bytes, or text with a unit of 10^3 (kB, MB, GB) or 2^10 (KiB, MiB, GiB).

    Raises:
        ConfigError: the text is not a size, or it is negative.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        _require(value >= 0, f"{value} bytes is negative: give 0 or more")
        return value
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?i?b?)\s*", str(value).lower())
    unit = found.group(2) if found else "?"
    if found is None or unit not in _BYTES:
        raise ConfigError(f"{value!r} is not a size in bytes: write a number or text such as '500MB' or '2GiB'")
    return int(float(found.group(1)) * _BYTES[unit])


@dataclass(frozen=True)
class SplitConfig:
    """How the images are shared out between training, validation and test, always by whole groups.

    A group is a file, or what ``group_regex`` finds in the file's name (a patient, a slide), so that two views of one
    subject, and all augmented copies of one image, are on the same side.
    """

    train: float = 0.7
    """Share of the groups used for training."""
    val: float = 0.15
    """Share of the groups that choose the best checkpoint; never used as test."""
    test: float = 0.15
    """Share of the groups looked at once, at the end; 0 where the set is too small to give an honest test score."""
    by: str = "file"
    """``file``: every image is its own group; ``group``: images of one group stay together."""
    group_regex: str | None = None
    """Regular expression searched in the file's stem; its first bracket (or whole match) is the group."""
    seed: int = 0
    """Seed of the shuffle, independent of the training seed so that seeds can be compared on one split."""

    def __post_init__(self) -> None:
        _among("data.split.by", self.by, ("file", "group"))
        shares = (self.train, self.val, self.test)
        total = math.fsum(shares)
        _require(
            all(0 <= share <= 1 for share in shares) and abs(total - 1) < 1e-6,
            f"data.split train, val, test = {shares} sum to {total:g}: give shares from 0 to 1 that sum to 1",
        )
        _require(self.train > 0, "data.split.train=0 leaves nothing to learn from: give a share above 0")
        if self.group_regex is not None:
            _require(self.by == "group", "data.split.group_regex is set but data.split.by='file': set by='group'")
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise ConfigError(
                    f"data.split.group_regex={self.group_regex!r} is not a regular expression: mend it ({error})"
                ) from None


@dataclass(frozen=True)
class DataConfig:
    """Which images and masks there are, what the mask values mean, and how pixels become numbers."""

    root: str = "."
    """Folder that all other paths are relative to; nothing outside it is read."""
    images: str = "images/*"
    """Glob of the images below ``root``; ignored when ``manifest`` is given."""
    masks: str | None = "masks/{stem}.*"
    """Rule that names an image's mask below ``root``; ``{stem}`` is the image's stem and ``*`` may be used. ``null``:
    no masks (prediction only)."""
    manifest: str | None = None
    """CSV or JSONL file below ``root`` with the columns image, mask (optional), group (optional), split (optional).
    Without an image column, ``manifest_id`` names the column that holds the image's stem."""
    manifest_id: str = "id"
    """Column of the manifest that holds the stem where there is no image column; files are then found by ``images``."""
    classes: dict[str, ClassRule] = field(default_factory=lambda: {"foreground": ">=1"})
    """Name of each class and the mask values that mean it: a value, a comparison, a colour, or a list of them.
    ``background`` is class 0 and need not be named; the others count from 1 in the order they are written; what is
    named ``ignore`` is neither learned nor scored."""
    unknown: str = "error"
    """What a mask value that no class names is: ``error``, ``ignore`` (no loss, no score) or ``background``."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """How images are shared out; a ``split`` column in the manifest wins over it."""
    max_side: int | None = None
    """Longest side in pixels; larger images are area-averaged down before the tree. Scores stay at full resolution."""
    window: int | None = None
    """Side in pixels of a random training window, cut after ``max_side``; validation always sees the whole image."""
    normalise: str = "image"
    """``image``: per-image robust percentiles (1, 99) to [0, 1]; ``range``: by the file's data type to [0, 1];
    ``fixed``: ``range``, then minus ``mean`` over ``std``."""
    mean: tuple[float, ...] | None = None
    """Mean per channel for ``normalise: fixed``, on the [0, 1] scale."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel for ``normalise: fixed``, on the [0, 1] scale."""
    channels: int = 3
    """Channels the model sees; grey images are repeated, colour images averaged where it is 1."""
    cache: int | str = "512MB"
    """Bytes of decoded images and masks kept in memory, per process."""
    max_pixels: int = 2**28
    """Images with more pixels are refused before memory is allocated."""
    spacing: tuple[float, ...] | None = None
    """Size of a pixel in mm along (y, x) or (z, y, x); used for distances and for anisotropic volumes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes by label, background first."""
        return ("background", *(name for name in self.classes if name not in ("background", "ignore")))

    @property
    def num_classes(self) -> int:
        """Number of classes, background included; at least 2."""
        return len(self.class_names)

    @property
    def cache_bytes(self) -> int:
        """``cache`` as a number of bytes."""
        return parse_bytes(self.cache)

    def __post_init__(self) -> None:
        _among("data.unknown", self.unknown, ("error", "ignore", "background"))
        _among("data.normalise", self.normalise, ("image", "range", "fixed"))
        _require(
            len(self.class_names) >= 2, "data.classes is empty: name at least one class, such as {vessel: '>=128'}"
        )
        _require(
            self.num_classes <= 255,
            f"data.classes has {self.num_classes} classes: a mask holds at most 255, 255 itself means ignore",
        )
        for name in ("max_side", "window"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name}={value} is below 1: give a side in pixels or null")
        _require(self.channels >= 1, f"data.channels={self.channels} is below 1: give 1 for grey or 3 for colour")
        _require(self.max_pixels >= 1, f"data.max_pixels={self.max_pixels} is below 1: give the most pixels allowed")
        parse_bytes(self.cache)
        self._check_fixed()
        if self.spacing is not None:
            _require(
                len(self.spacing) in (2, 3) and all(0 < mm < math.inf for mm in self.spacing),
                f"data.spacing={list(self.spacing)} must be 2 or 3 sizes in mm above 0: give [y, x] or [z, y, x]",
            )

    def _check_fixed(self) -> None:
        given = self.mean is not None or self.std is not None
        if self.normalise != "fixed":
            _require(
                not given,
                f"data.mean and data.std need normalise='fixed' but it is {self.normalise!r}: remove them or set it",
            )
            return
        sizes = [len(value) if value is not None else 0 for value in (self.mean, self.std)]
        _require(
            sizes == [self.channels] * 2,
            f"data.normalise='fixed' has {sizes[0]} means, {sizes[1]} stds for {self.channels} channels: give one each",
        )
        _require(
            all(value > 0 for value in self.std or ()),
            f"data.std={list(self.std or ())} has a value that is not above 0: give positive deviations",
        )


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
    uniform: int | None = None
    """Side in pixels of a uniform grid to use instead of the tree; all other fields are then without effect."""

    def __post_init__(self) -> None:
        if self.uniform is not None:
            _require(
                self.uniform >= 1, f"tree.uniform={self.uniform} is below 1: give the leaf's side in pixels or null"
            )
        _require(
            self.max_leaves is not None or self.tolerance is not None,
            "tree.max_leaves and tree.tolerance are both null: give a number of leaves, an error bound, or both",
        )
        leaves = self.max_leaves
        _require(leaves is None or leaves >= 1, f"tree.max_leaves={leaves} is below 1: give at least 1 leaf")
        bound = self.tolerance
        _require(
            bound is None or 0 <= bound < math.inf, f"tree.tolerance={bound} is not an error bound: give 0 or more"
        )
        _require(self.min_size >= 1, f"tree.min_size={self.min_size} is below 1: give a side in pixels")
        if self.max_size is not None:
            ratio = self.max_size / self.min_size
            _require(
                ratio >= 1 and math.log2(ratio).is_integer(),
                f"tree.max_size={self.max_size} is not min_size={self.min_size} doubled a whole number of times: "
                f"give {self.min_size * 2 ** max(0, round(math.log2(max(ratio, 1))))}",
            )
        _require(0 <= self.smooth < math.inf, f"tree.smooth={self.smooth} is not a sigma: give 0 or more pixels")
        _require(bool(self.detail), "tree.detail is empty: give a measure such as 'residual'")


@dataclass(frozen=True)
class ModelSpec:
    """Which named model, what is changed in it, and where its weights come from."""

    name: str = "apf_vit_tiny"
    """Name from ``foveate.list_models()``."""
    overrides: dict[str, Override] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as ``{depth: 6, patch_size: 8}``."""
    weights: str | None = None
    """Safetensors file, or a folder that ``save_pretrained`` wrote, to start from."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "model.name is empty: give a name such as 'apf_vit_tiny'")
        for key in ("in_chans", "num_classes"):
            _require(
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
    """Decay of AdamW on matrices; biases, norms and embeddings of position are not decayed."""
    warmup: float = 0.05
    """Share of the run, from 0 to 1, in which the learning rate rises from 0."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: ``cosine`` or ``linear`` to 0, or ``constant``."""
    clip: float | None = 1.0
    """Largest norm of the gradient; ``null``: no clipping."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    precision: str = "fp32"
    """``fp32``, ``bf16`` or ``fp16`` (mixed)."""
    class_weights: list[float] | None = None
    """Weight of every class, background first, in the cross entropy; ``null``: all 1."""
    dice_weight: float = 1.0
    """Weight of the soft Dice beside the cross entropy; 0 turns it off."""
    augment: bool | float = True
    """How strongly training images are varied, from 0 (``false``) to 1 (``true``). Up to 0.5: flips and quarter turns
    only, which cost nothing; above: also rotation, zoom, shift, contrast and noise, growing with the number."""
    eval_every: int = 1
    """Epochs between validations."""
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
        _among("train.schedule", self.schedule, ("cosine", "linear", "constant"))
        _among("train.precision", self.precision, ("fp32", "bf16", "fp16"))
        if self.tracker is not None:
            _among("train.tracker", self.tracker, ("tensorboard", "wandb"))
        limits = {"epochs": self.epochs, "max_steps": self.max_steps, "minutes": self.minutes}
        _require(
            any(value is not None for value in limits.values()),
            "train.epochs, train.max_steps and train.minutes are all null: give at least one end",
        )
        for name, value in limits.items():
            _require(value is None or value > 0, f"train.{name}={value} is not above 0: give a positive end or null")
        for name in ("batch_size", "accumulate", "eval_every"):
            count = getattr(self, name)
            _require(count >= 1, f"train.{name}={count} is below 1: give 1 or more")
        for name in ("weight_decay", "dice_weight", "num_workers", "seed"):
            number = getattr(self, name)
            _require(0 <= number < math.inf, f"train.{name}={number} is negative or not finite: give 0 or more")
        _require(0 < self.lr < math.inf, f"train.lr={self.lr} is not above 0: give a rate such as 3e-4")
        _require(0 <= self.warmup < 1, f"train.warmup={self.warmup} is a share of the run: give 0 up to below 1")
        _require(self.clip is None or self.clip > 0, f"train.clip={self.clip} is not above 0: give a norm or null")
        _require(
            self.patience is None or self.patience >= 1,
            f"train.patience={self.patience} is below 1: give a number of validations or null",
        )
        _require(
            0 <= self.strength <= 1, f"train.augment={self.augment} is outside 0 to 1: give true, false or a share"
        )
        weights = self.class_weights
        _require(
            weights is None or all(0 <= weight < math.inf for weight in weights),
            f"train.class_weights={weights} has a negative or infinite weight: give 0 or more per class",
        )


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
    out: str = "runs/fit"
    """Folder for the resolved settings, metrics and checkpoints."""

    def __post_init__(self) -> None:
        weights = self.train.class_weights
        _require(
            weights is None or len(weights) == self.data.num_classes,
            f"train.class_weights has {len(weights or [])} values for {self.data.num_classes} classes "
            f"({', '.join(self.data.class_names)}): give one each, background first",
        )
        _require(bool(self.out), "out is empty: give a folder for the run")
