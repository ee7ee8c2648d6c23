"""Settings of the data: which files, what mask values mean, how images are read and shared out."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foveate.errors import ConfigError

ClassRule = int | list[int | str] | str
"""How the values of a mask file name a class: ``3``, ``[1, 2]``, ``"#ff0000"`` or ``">=128"``."""

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def require(true: bool, message: str) -> None:
    """Raise a `ConfigError` with the message unless the condition holds."""
    if not true:
        raise ConfigError(message)


def among(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a `ConfigError` that names the closest allowed value unless it is one of them."""
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
        require(value >= 0, f"{value} bytes is negative: give 0 or more")
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
        among("data.split.by", self.by, ("file", "group"))
        shares = (self.train, self.val, self.test)
        total = math.fsum(shares)
        require(
            all(0 <= share <= 1 for share in shares) and abs(total - 1) < 1e-6,
            f"data.split train, val, test = {shares} sum to {total:g}: give shares from 0 to 1 that sum to 1",
        )
        require(self.train > 0, "data.split.train=0 leaves nothing to learn from: give a share above 0")
        if self.group_regex is not None:
            require(self.by == "group", "data.split.group_regex is set but data.split.by='file': set by='group'")
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
    """Glob of the images below ``root``; ignored when ``manifest`` is given. With ``modalities``, ``{modality}`` stands
    for the name of each, such as ``*/*_{modality}.nii.gz``."""
    modalities: tuple[str, ...] | None = None
    """Names of the files that make up one image, in the order of its channels, such as [flair, t1, t1ce, t2] or
    ["0000", "0001"]: what stands last in their names before the ending. ``{stem}`` is then what they have in common."""
    masks: str | None = "masks/{stem}.*"
    """Rule that names an image's mask below ``root``; ``{stem}`` is the image's stem and ``*`` may be used. ``null``:
    no masks (prediction only)."""
    manifest: str | None = None
    """CSV or JSONL file below ``root`` with the column image and, as needed, mask, group, split, mpp (um per pixel,
    over what the file says) and spacing (mm, such as ``2.5 0.7 0.7``). Without an image column, ``manifest_id``
    names the column that holds the image's stem. Or a JSON file with the lists training, validation and test of
    ``{image, label}``, as MONAI and the Decathlon have it; an image may be a list of files, one per channel."""
    manifest_id: str = "id"
    """Column of the manifest that holds the stem where there is no image column; files are then found by ``images``."""
    classes: dict[str, ClassRule] = field(default_factory=lambda: {"foreground": ">=1"})
    """Name of each class and the mask values that mean it: a value, a comparison, a colour, or a list of them.
    ``background`` is class 0 and need not be named; the others count from 1 in the order they are written; what is
    named ``ignore`` is neither learned nor scored."""
    regions: dict[str, list[str]] = field(default_factory=dict)
    """Unions of classes, such as {whole: [edema, necrotic, enhancing], core: [necrotic, enhancing]}: they are what Dice
    in the loss and all scores are about, instead of the classes, which stay what a mask holds."""
    unknown: str = "error"
    """What a mask value that no class names is: ``error``, ``ignore`` (no loss, no score) or ``background``."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """How images are shared out; a ``split`` column in the manifest wins over it."""
    max_side: int | None = None
    """Longest side in pixels; larger images are area-averaged down before the tree. Scores stay at full resolution."""
    mpp: float | None = None
    """Size in um of the pixels that all images are read at, whatever they were stored at; every size in pixels, and
    every score, is in that frame. ``null``: each image as it was stored."""
    resample: tuple[float, ...] | None = None
    """Size of a voxel in mm along (z, y, x) that volumes are brought to before the tree (area mean down, linear up;
    labels by nearest). Scores, and predictions, stay in each file's own grid. ``null``: each as it was stored."""
    window: int | None = None
    """Side in pixels of a random training window, cut after ``max_side`` and ``resample``, an axis that is shorter is
    kept whole; validation sees the whole image, or windows as ``predict.window`` says."""
    windows: int = 1
    """Training samples drawn from each image per epoch."""
    whole: float | None = None
    """Share of these samples that are the whole image and not a window; ``null``: none where ``window`` is set."""
    balance: float = 0.5
    """Share of the windows that hold a pixel of a labelled class, chosen evenly among those of the image; the others
    lie anywhere, of a slide on tissue."""
    broken: str = "raise"
    """What a tile of a slide that cannot be decoded does: ``raise`` an error, ``fill`` with background, or ``skip``:
    filled, and neither learned nor scored."""
    normalise: str = "image"
    """``image``: per-image robust percentiles (1, 99) to [0, 1]; ``range``: by the file's data type to [0, 1];
    ``fixed``: ``range``, then minus ``mean`` over ``std``; ``limits``: from the values in ``limits`` to [-1, 1], what
    lies outside is cut off (CT); ``zscore``: each channel of an image minus the mean over the deviation of its voxels
    that are not 0, which stay 0 (MRI with the background removed)."""
    limits: tuple[float, float] | None = None
    """Lowest and highest value for ``normalise: limits``, in the units of the file, such as [-958, 326] HU."""
    mean: tuple[float, ...] | None = None
    """Mean per channel for ``normalise: fixed``, on the [0, 1] scale."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel for ``normalise: fixed``, on the [0, 1] scale."""
    channels: int = 3
    """Channels the model sees; grey images are repeated, colour images averaged where it is 1."""
    cache: int | str = "512MB"
    """Bytes of decoded images and masks kept in memory, per process."""
    max_pixels: int = 2**28
    """Images that are read whole are refused before memory is allocated if they have more pixels."""
    spacing: tuple[float, ...] | None = None
    """Size of a pixel in mm along (y, x) or (z, y, x); used for distances and for anisotropic volumes. ``null``: what
    each volume says of itself."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes by label, background first."""
        return ("background", *(name for name in self.classes if name not in ("background", "ignore")))

    @property
    def num_classes(self) -> int:
        """Number of classes, background included; at least 2."""
        return len(self.class_names)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """What is scored, and the labels that make it up: the regions, or each class but the background by itself."""
        label = {name: number for number, name in enumerate(self.class_names)}
        if self.regions:
            return {name: tuple(label[part] for part in parts) for name, parts in self.regions.items()}
        return {name: (number,) for name, number in label.items() if number > 0}

    @property
    def file_values(self) -> tuple[int, ...]:
        """The value that a mask file has for every class, background first; of a list of values the first.

        Raises:
            ConfigError: a class is named by a comparison or a colour.
        """
        values = [0]
        for name in self.class_names[1:]:
            rule = self.classes[name]
            value = rule[0] if isinstance(rule, list) and rule else rule
            if isinstance(value, str) and value.isdigit():
                value = int(value)
            if not isinstance(value, int) or not 0 <= value <= 65535:
                raise ConfigError(
                    f"predict.values='file' needs classes that are numbers, but data.classes.{name}={rule!r}: set it "
                    "to 'index'"
                )
            values.append(value)
        return tuple(values)

    @property
    def share_whole(self) -> float:
        """``whole`` as a number from 0 to 1."""
        if self.whole is not None:
            return self.whole
        return 1.0 if self.window is None else 0.0

    @property
    def cache_bytes(self) -> int:
        """``cache`` as a number of bytes."""
        return parse_bytes(self.cache)

    def __post_init__(self) -> None:
        among("data.unknown", self.unknown, ("error", "ignore", "background"))
        among("data.normalise", self.normalise, ("image", "range", "fixed", "limits", "zscore"))
        require(len(self.class_names) >= 2, "data.classes is empty: name at least one class, such as {vessel: '>=128'}")
        require(
            self.num_classes <= 255,
            f"data.classes has {self.num_classes} classes: a mask holds at most 255, 255 itself means ignore",
        )
        for name in ("max_side", "window"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}={value} is below 1: give a side in pixels or null")
        require(self.channels >= 1, f"data.channels={self.channels} is below 1: give 1 for grey or 3 for colour")
        require(self.max_pixels >= 1, f"data.max_pixels={self.max_pixels} is below 1: give the most pixels allowed")
        parse_bytes(self.cache)
        self._check_samples()
        self._check_modalities()
        self._check_regions()
        self._check_fixed()
        self._check_limits()
        if self.spacing is not None:
            require(
                len(self.spacing) in (2, 3) and all(0 < mm < math.inf for mm in self.spacing),
                f"data.spacing={list(self.spacing)} must be 2 or 3 sizes in mm above 0: give [y, x] or [z, y, x]",
            )
        if self.resample is not None:
            require(
                len(self.resample) == 3 and all(0 < mm < math.inf for mm in self.resample),
                f"data.resample={list(self.resample)} must be 3 sizes in mm above 0: give [z, y, x]",
            )
            require(self.max_side is None, "data.resample and data.max_side both choose the resolution: remove one")

    def _check_samples(self) -> None:
        among("data.broken", self.broken, ("raise", "fill", "skip"))
        require(
            self.mpp is None or 0 < self.mpp < math.inf,
            f"data.mpp={self.mpp} is not a pixel size: give um per pixel, such as 0.5, or null",
        )
        require(self.windows >= 1, f"data.windows={self.windows} is below 1: give samples per image and epoch")
        for name, share in (("whole", self.share_whole), ("balance", self.balance)):
            require(0 <= share <= 1, f"data.{name}={share} is outside 0 to 1: give a share")
        require(
            self.window is not None or self.share_whole == 1,
            f"data.whole={self.whole} asks for windows but data.window is null: give the side of a window in pixels",
        )

    def _check_modalities(self) -> None:
        names = self.modalities
        if names is None:
            require(
                "{modality}" not in self.images,
                f"data.images={self.images!r} has a {{modality}} but data.modalities is null: name them, such as "
                "[flair, t1]",
            )
            return
        require(
            len(names) == self.channels and len(set(names)) == len(names) and all(names),
            f"data.modalities={list(names)} for data.channels={self.channels}: name every channel once",
        )
        require(
            self.manifest is not None or "{modality}" in Path(self.images).name,
            f"data.images={self.images!r} does not say where the modality stands: write it as {{modality}} in the "
            "file's name, such as '*/*_{modality}.nii.gz'",
        )

    def _check_regions(self) -> None:
        for name, parts in self.regions.items():
            unknown = next((part for part in parts if part not in self.class_names[1:]), None)
            require(
                bool(parts) and unknown is None and len(set(parts)) == len(parts),
                f"data.regions.{name}={parts} must name some of the classes {', '.join(self.class_names[1:])}, each "
                "once",
            )

    def _check_limits(self) -> None:
        if self.normalise != "limits":
            require(
                self.limits is None,
                f"data.limits needs normalise='limits' but it is {self.normalise!r}: remove it or set it",
            )
            return
        low, high = self.limits or (math.nan, math.nan)
        require(
            -math.inf < low < high < math.inf,
            f"data.normalise='limits' has data.limits={self.limits}: give the lowest and the highest value, such as "
            "[-958, 326]",
        )

    def _check_fixed(self) -> None:
        given = self.mean is not None or self.std is not None
        if self.normalise != "fixed":
            require(
                not given,
                f"data.mean and data.std need normalise='fixed' but it is {self.normalise!r}: remove them or set it",
            )
            return
        sizes = [len(value) if value is not None else 0 for value in (self.mean, self.std)]
        require(
            sizes == [self.channels] * 2,
            f"data.normalise='fixed' has {sizes[0]} means, {sizes[1]} stds for {self.channels} channels: give one each",
        )
        require(
            all(value > 0 for value in self.std or ()),
            f"data.std={list(self.std or ())} has a value that is not above 0: give positive deviations",
        )
