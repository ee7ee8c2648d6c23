"""Samples of images that are read by box: the whole slide, for its context, and windows of it, for detail.

Legend: C channels, K classes, L leaves, P samples per side, S image sides, B sides of a box.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import FormatError
from foveate.geometry.patches import Patches
from foveate.geometry.source import Box
from foveate.io.raster import Raster
from foveate.tasks.cut import share_of
from foveate.tasks.items import Item
from foveate.tasks.labels import IGNORE, Labels, open_labels
from foveate.tasks.settings import DataConfig, FitConfig
from foveate.tasks.source import check_large, glance, is_large, open_item, open_native, slide_patches
from foveate.tasks.tissue import tissue_map
from foveate.tasks.values import normalise, value_range, with_channels

CLASS_MAP = 2**22
"""Pixels of the map that windows of a class are drawn from; a structure smaller than one of them may be missed."""

LARGE_FILE = 2**24
"""Bytes above which a file is opened before training starts."""

NumpyArray = NDArray[Any]


class Slide:
    """A large image with its mask, opened once; what is drawn from it depends on the generator alone.

    Args:
        item: the image.
        native: the image as stored.
        data: the settings.

    Raises:
        FormatError: the mask is unreadable or of another size, or the resolution cannot be met.
    """

    def __init__(self, item: Item, native: Raster, data: DataConfig) -> None:
        self.item, self.data = item, data
        self.raster = open_item(item, data, native)
        self.labels = None if item.mask is None else open_labels(item, data, native.shape, self.raster)

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S in the working frame."""
        return tuple(self.raster.shape)

    @cached_property
    def small(self) -> Shaped[NumpyArray, "C *B"]:
        """The slide at a glance, with the channels the model sees."""
        return with_channels(glance(self.raster), self.data.channels, str(self.item.image))

    @cached_property
    def tissue(self) -> Bool[NumpyArray, "*B"]:
        """Where there is something to see, at the size of `small`."""
        return tissue_map(self.small)

    @cached_property
    def classes(self) -> UInt8[NumpyArray, "*B"]:
        """The mask at a glance."""
        return np.ascontiguousarray(glance(self._mask(), CLASS_MAP, nearest=True)[0])

    def counts(self) -> NumpyArray:
        """Pixels of each class in the working frame, by the mask at a glance; int64, of 256 labels."""
        seen = np.bincount(self.classes.ravel(), minlength=IGNORE + 1)
        return (seen * (math.prod(self.shape) / self.classes.size)).round().astype(np.int64)

    def whole(
        self, config: FitConfig, patch_size: int
    ) -> tuple[Patches, Float32[Tensor, "L K *P"], Float32[Tensor, "L *P"]]:
        """The whole slide as one sample: patches, soft labels and their weights.

        Args:
            config: settings of the run.
            patch_size: samples per side of a token.

        Cost: as `slide_patches`, and the parts of the mask that lie in leaves.
        """
        from foveate.geometry.lazy_labels import lazy_soft_labels

        mask = self._mask()
        patches = slide_patches(self.raster, config, patch_size)
        soft, weight = lazy_soft_labels(mask, patches.leaves[0], patch_size, self.data.num_classes)
        return patches, soft, weight

    def window(
        self, config: FitConfig, generator: np.random.Generator
    ) -> tuple[Float32[Tensor, "C *B"], UInt8[Tensor, "*B"], FitConfig]:
        """A window of the slide at full resolution, normalised as the whole is.

        Args:
            config: settings of the run; ``data.window`` is the side.
            generator: source of all chance.

        Returns:
            The image, its labels, and the settings with the window's share of the leaves: that of its tissue, where
            the leaves of the whole lie.
        """
        box = self.place(generator)
        part = with_channels(self.raster.read(box, 0), self.data.channels, str(self.item.image))
        image = normalise(part, value_range(self.small, self.data), self.data)
        labels = torch.from_numpy(np.ascontiguousarray(self._mask().read(box)[0]))
        check_large(config.tree, config.data)
        return image, labels, replace(config, tree=share_of(config.tree, self.share(box), labels.shape))

    def place(self, generator: np.random.Generator) -> Box:
        """Where a window lies: around a pixel of a class, each class of the slide alike, or around tissue.

        Args:
            generator: source of all chance.
        """
        assert self.data.window is not None
        sides = [min(self.data.window, side) for side in self.shape]
        wanted: NumpyArray = self.tissue
        if generator.random() < self.data.balance:
            there = np.flatnonzero(np.bincount(self.classes.ravel(), minlength=IGNORE)[1 : self.data.num_classes])
            if len(there):
                wanted = self.classes == 1 + there[int(generator.integers(len(there)))]
        cells = np.flatnonzero(wanted)
        cell = np.unravel_index(int(cells[int(generator.integers(len(cells)))]), wanted.shape)
        start = []
        for at, count, side, full in zip(cell, wanted.shape, sides, self.shape, strict=True):
            point = (int(at) + generator.random()) * full / count
            start.append(min(max(int(point) - int(generator.integers(side)), 0), full - side))
        return tuple(start), tuple(low + side for low, side in zip(start, sides, strict=True))

    def share(self, box: Box) -> float:
        """Share of the slide's tissue in a box, at least the box's share of its area."""
        scale = [count / full for count, full in zip(self.tissue.shape, self.shape, strict=True)]
        spans = zip(*box, scale, strict=True)
        inside = self.tissue[tuple(slice(int(a * s), max(int(a * s) + 1, round(b * s))) for a, b, s in spans)]
        area = math.prod(high - low for low, high in zip(*box, strict=True)) / math.prod(self.shape)
        part = float(inside.mean()) * area * self.tissue.size / float(self.tissue.sum())
        return min(1.0, max(area, part))

    def _mask(self) -> Labels:
        if self.labels is None:
            raise FormatError(f"{self.item.image} has no mask: give one, or leave the image out of training")
        return self.labels


def vary_values(patches: Patches, strength: float, generator: np.random.Generator) -> Patches:
    """The patches of a whole slide a little brighter or darker, with more or less contrast; never moved.

    Args:
        patches: normalised patches.
        strength: 0 to 0.5 leaves them as they are; then growing to 30 % of contrast and 0.1 of brightness at 1.
        generator: source of all chance.
    """
    amount = max(0.0, 2 * strength - 1)
    if amount == 0:
        return patches
    contrast, brightness = generator.uniform(-amount, amount, 2)
    return patches.with_pixels(patches.pixels * (1 + 0.3 * float(contrast)) + 0.1 * float(brightness))


def check_large_files(items: Sequence[Item], data: DataConfig) -> None:
    """Open every large file and its mask once, so that a damaged slide is found now and not in the middle of an epoch.

    Args:
        items: images, of which folders and files above 2^24 bytes are opened.
        data: the settings.

    Raises:
        FormatError: one of them cannot be opened, or its mask is of another size.

    Cost: the headers of slides, the pixels of large images that are read whole.
    """
    for item in items:
        if item.image.is_dir() or item.image.stat().st_size > LARGE_FILE:
            native = open_native(item, data)
            if is_large(native):
                Slide(item, native, data)
