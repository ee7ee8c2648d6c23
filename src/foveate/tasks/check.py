"""Looks at a data set before any time is spent on it: what is wrong with the files."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from foveate.errors import FoveateError
from foveate.io.raster import Raster
from foveate.io.volume import Volume
from foveate.tasks.items import SPLITS, Item, find_items, split_items
from foveate.tasks.labels import IGNORE, OTHER_SIZE, is_annotation, open_labels, whole_labels
from foveate.tasks.plan_data import DataPlan, ImagePlan, plan_data
from foveate.tasks.settings import DataConfig
from foveate.tasks.slides import Slide
from foveate.tasks.source import NO_MPP, is_large, open_item, open_native, whole_box
from foveate.tasks.values import with_channels

__all__ = ["DataPlan", "DataReport", "Finding", "ImagePlan", "SplitRow", "check_data", "plan_data"]

NumpyArray = NDArray[Any]

ERRORS = (
    "unreadable image",
    "unreadable mask",
    "no mpp",
    "size mismatch",
    "mixed dimensions",
    "mixed types",
    "duplicate across splits",
)
"""Findings that make training or its score wrong; the others are notes."""


@dataclass(frozen=True)
class Finding:
    """One thing seen in the data.

    Args:
        kind: what it is; see :data:`ERRORS` for the serious ones.
        name: the image, mask or class.
        detail: one line that says what was found.
    """

    kind: str
    name: str
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether it must be mended before a score means anything."""
        return self.kind in ERRORS


@dataclass(frozen=True)
class SplitRow:
    """What one split holds.

    Args:
        split: ``train``, ``val`` or ``test``.
        num_images: images in it.
        num_groups: groups in it.
        shares: share of labelled pixels per class, background first.
        images_with: images that hold each class, background first.
    """

    split: str
    num_images: int
    num_groups: int
    shares: tuple[float, ...]
    images_with: tuple[int, ...]


@dataclass(frozen=True)
class DataReport:
    """What :func:`check_data` saw.

    Args:
        class_names: classes, background first.
        splits: one row per split.
        findings: everything worth knowing, errors first.
        sizes: smallest and largest spatial shape by pixels; ``None`` when nothing could be read.
    """

    class_names: tuple[str, ...]
    splits: tuple[SplitRow, ...]
    findings: tuple[Finding, ...]
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None

    @property
    def num_errors(self) -> int:
        """Findings that must be mended."""
        return sum(finding.is_error for finding in self.findings)

    def to_text(self) -> str:
        """The report as plain text for a terminal or a file."""
        head = f"{'split':<6} {'images':>6} {'groups':>6}  " + "  ".join(f"{name:>16}" for name in self.class_names)
        lines = [head]
        for row in self.splits:
            cells = [f"{s:>9.3%} in {n:>3}" for s, n in zip(row.shares, row.images_with, strict=True)]
            counts = f"{row.split:<6} {row.num_images:>6} {row.num_groups:>6}  "
            lines.append(counts + "  ".join(f"{cell:>16}" for cell in cells))
        lines.append("share of labelled pixels, and images that hold the class")
        if self.sizes is not None:
            small, large = (" x ".join(str(side) for side in shape) for shape in self.sizes)
            lines.append(f"sizes: {small} to {large} pixels")
        for finding in self.findings:
            lines.append(f"{'ERROR' if finding.is_error else 'note '} {finding.kind}: {finding.name}: {finding.detail}")
        lines.append(f"{self.num_errors} errors, {len(self.findings) - self.num_errors} notes")
        return "\n".join(lines)


class _Census:
    """Running counts of one pass over the files."""

    def __init__(self, data: DataConfig, split_of: dict[str, str]) -> None:
        self.data = data
        self.split_of = split_of
        self.findings: list[Finding] = []
        self.pixels = {split: np.zeros(data.num_classes, dtype=np.int64) for split in SPLITS}
        self.images_with = {split: np.zeros(data.num_classes, dtype=np.int64) for split in SPLITS}
        self.seen: dict[bytes, Item] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.types: dict[str, str] = {}  # sort of pixels -> the first image that has them

    def note(self, kind: str, name: str, detail: str) -> None:
        self.findings.append(Finding(kind, name, detail))

    def add(self, item: Item) -> None:
        try:
            native = open_native(item, self.data)
            raster = open_item(item, self.data, native)
            with_channels(np.empty((raster.channels, 1, 1), raster.dtype), self.data.channels, str(item.image))
        except FoveateError as error:
            self.note("no mpp" if NO_MPP in str(error) else "unreadable image", item.name, str(error))
            return
        shape = tuple(raster.shape)
        self.shapes.append(shape)
        self.types.setdefault(f"{len(shape)}-D {raster.dtype}", item.name)
        slide = None
        try:
            if is_large(native):
                slide = Slide(replace(item, mask=None), native, self.data)
            self._content(item, slide.small if slide else raster.read(whole_box(shape)))
        except FoveateError as error:
            self.note("unreadable image", item.name, str(error))
        if isinstance(raster, Volume):
            for line in raster.grid.notes:
                self.note("volume", item.name, line)
        if item.mask is None:
            self.note("no mask", item.name, "it can be predicted but not learned from or scored")
            return
        try:
            counts = self._labels(item, native, raster)
        except FoveateError as error:
            self.note("size mismatch" if OTHER_SIZE in str(error) else "unreadable mask", item.name, str(error))
            return
        self._count(item, counts)

    def _labels(self, item: Item, native: Raster, raster: Raster) -> Int64[NumpyArray, "256"]:
        assert item.mask is not None
        if is_large(native):
            slide = Slide(item, native, self.data)
            labels, counts = slide.labels, slide.counts()
        elif is_annotation(item.mask):
            labels = open_labels(item, self.data, native.shape, raster)
            counts = np.bincount(labels.read(whole_box(raster.shape)).ravel(), minlength=IGNORE + 1)
        else:
            return np.bincount(whole_labels(item, self.data, native, raster).ravel(), minlength=IGNORE + 1)
        for line in labels.notes if labels else ():
            self.note("annotations", item.name, line)
        return counts

    def _count(self, item: Item, counts: NumpyArray) -> None:
        split = self.split_of[item.name]
        self.pixels[split] += counts[: self.data.num_classes]
        self.images_with[split] += counts[: self.data.num_classes] > 0
        if counts[IGNORE]:
            self.note(
                "ignored pixels", item.name, f"{counts[IGNORE]} of {counts.sum()} have no class and are not scored"
            )
        if not counts[1 : self.data.num_classes].any():
            self.note("background only", item.name, "the mask holds no class")

    def _content(self, item: Item, image: NumpyArray) -> None:
        if image.min() == image.max():
            self.note("constant image", item.name, f"every value is {image.flat[0]}")
        content = hashlib.blake2b(repr((image.shape, image.dtype.str)).encode())
        content.update(np.ascontiguousarray(image).data)
        first = self.seen.setdefault(content.digest(), item)
        if first is not item:
            sides = (self.split_of[first.name], self.split_of[item.name])
            apart = sides[0] != sides[1]
            self.note(
                "duplicate across splits" if apart else "duplicate",
                item.name,
                f"same pixels as {first.name}" + (f" ({sides[1]} and {sides[0]}): put both into one group" * apart),
            )

    def compare(self) -> None:
        """Say which sorts of pixels are mixed, and whether the settings bring them together."""
        if len(self.types) < 2:
            return
        shown = ", ".join(f"{sort} ({name})" for sort, name in self.types.items())
        dims = {sort.split()[0] for sort in self.types}
        whole = {np.dtype(sort.split()[1]).kind in "bui" for sort in self.types}
        if len(dims) > 1:
            self.note("mixed dimensions", self.data.root, f"{shown}: one model takes one; make two sets")
        elif len(whole) > 1 and self.data.normalise in ("range", "fixed"):
            remedy = (
                f"data.normalise={self.data.normalise!r} cannot scale both: set it to 'image', or convert the files"
            )
            self.note("mixed types", self.data.root, f"{shown}: {remedy}")
        else:
            self.note("types", self.data.root, f"{shown}: each is scaled by itself (data.normalise)")


def check_data(data: DataConfig, progress: Callable[[int, int], None] | None = None) -> DataReport:
    """Read every file once and report what is wrong or surprising, without stopping at the first.

    Args:
        data: the data settings.
        progress: called with (images done, images in all).

    Returns:
        Split table, class shares and findings: unreadable files, unknown labels (as unreadable masks, with the value),
        size mismatches, missing pixel sizes where ``data.mpp`` needs them, mixed types, images with the same pixels
        (also across splits), classes that are empty somewhere they are needed, constant images and masks without any
        class; for volumes and annotations, what their reader had to decide.

    Raises:
        ConfigError: no image is found at all, or the rules contradict each other.

    Cost: one decode of every file, but of slides and their masks only low-resolution levels; one image in memory at a
    time.
    """
    items = find_items(data)
    splits = split_items(items, data)
    split_of = {item.name: split for split, members in splits.items() for item in members}
    census = _Census(data, split_of)
    for done, item in enumerate(items, 1):
        census.add(item)
        if progress is not None:
            progress(done, len(items))
    census.compare()
    rows = []
    for split, members in splits.items():
        total = max(int(census.pixels[split].sum()), 1)
        shares = tuple(float(count) / total for count in census.pixels[split])
        with_class = tuple(int(count) for count in census.images_with[split])
        rows.append(SplitRow(split, len(members), len({item.group for item in members}), shares, with_class))
        if not members:
            census.note("empty split", split, "no image is in it, so it gives no score")
            continue
        for name, images in zip(data.class_names[1:], with_class[1:], strict=True):
            if images == 0:
                census.note("empty class", name, f"no image of {split} holds it")
    ordered = tuple(sorted(census.findings, key=lambda finding: not finding.is_error))
    shapes = sorted(census.shapes, key=math.prod)
    return DataReport(data.class_names, tuple(rows), ordered, (shapes[0], shapes[-1]) if shapes else None)
