"""Files to samples: decode, shrink, normalise, vary, cut, patchify - each item drawn only from (seed, epoch, index).

Legend: T tokens of the batch, L tokens of one image, K classes, P samples per side, C channels, S image sides.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from foveate.errors import ConfigError, FormatError
from foveate.geometry.patches import Patches, pack, patchify, patchify_mask
from foveate.tasks.augment import augment, random_window
from foveate.tasks.cut import cut, share_of
from foveate.tasks.items import Item
from foveate.tasks.resize import limited_shape, shrink_image, shrink_labels
from foveate.tasks.settings import DataConfig, FitConfig
from foveate.tasks.values import normalise, value_range, with_channels

IGNORE = 255
"""Label of pixels that neither the loss nor a score looks at."""

NumpyArray = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Sample:
    """One image, cut, with its soft labels.

    Args:
        patches: the image's tokens.
        soft: share of each class in every sample of every token, background first; sums to 1 over K.
        weight: labelled image pixels that each sample stands for.
        name: the image's name, for reports.
    """

    patches: Patches
    soft: Float[Tensor, "L K *P"]
    weight: Float[Tensor, "L *P"]
    name: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples packed one after another, without padding.

    Args:
        patches: tokens of all images.
        soft: as in :class:`Sample`, for all tokens.
        weight: as in :class:`Sample`, for all tokens.
        names: one name per image.
    """

    patches: Patches
    soft: Float[Tensor, "T K *P"]
    weight: Float[Tensor, "T *P"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.patches.to(device), self.soft.to(device), self.weight.to(device), self.names)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples into one batch; no token is padded, dropped or repeated."""
    return Batch(
        pack([sample.patches for sample in samples]),
        torch.cat([sample.soft for sample in samples]),
        torch.cat([sample.weight for sample in samples]),
        tuple(sample.name for sample in samples),
    )


class SegmentationData(Dataset[Sample]):
    """Images with masks as samples, reproducible item by item.

    What ``self[i]`` returns depends on the files, the settings and (seed, epoch, i) alone: not on the order of the
    calls, on the number of worker processes, or on any global random state. Variation happens before the cut, so the
    tree is always that of the image the model sees.

    Args:
        items: the images of one split.
        config: settings of the run.
        patch_size: samples per side of a token.
        train: vary and crop the images as the settings say; otherwise every image whole and as it is.

    Raises:
        ConfigError: there are no items.
    """

    def __init__(self, items: Sequence[Item], config: FitConfig, patch_size: int, *, train: bool) -> None:
        if not items:
            kind = "training" if train else "validation"
            raise ConfigError(f"0 {kind} images: check data.root, data.images and data.split")
        self.items = tuple(items)
        self.config = config
        self.patch_size = patch_size
        self.train = train
        self.epoch = 0
        self._cache = ByteCache(config.data.cache_bytes)

    def __len__(self) -> int:
        return len(self.items)

    def set_epoch(self, epoch: int) -> None:
        """Choose the variations that follow; call it before the workers of that epoch start."""
        self.epoch = epoch

    def load(self, i: int, *, shrunk: bool = False) -> tuple[Float32[Tensor, "C *S"], UInt8[Tensor, "*S"] | None]:
        """Image ``i`` whole, normalised and unvaried, with its labels where it has a mask.

        Args:
            i: position in ``items``.
            shrunk: at the size the model works on (``data.max_side``) instead of full resolution.

        Raises:
            FormatError: a file is unreadable, or image and mask differ in size.
        """
        image, labels, scale = self._decoded(i, self.config.data.max_side if shrunk else None)
        return normalise(image, scale, self.config.data), None if labels is None else torch.from_numpy(labels)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i`` of the current epoch.

        Raises:
            FormatError: a file is unreadable, has no mask, or image and mask differ in size.
        """
        data = self.config.data
        array, labels_array, scale = self._decoded(i, data.max_side)
        if labels_array is None:
            raise FormatError(f"{self.items[i].image} has no mask: give one, or leave the image out of training")
        image, labels = normalise(array, scale, data), torch.from_numpy(labels_array)
        config = self.config
        if self.train:
            seed = np.random.SeedSequence([self.config.train.seed, self.epoch, i])
            generator = np.random.default_rng(seed)
            if data.window is not None:
                whole = image[0].numel()
                image, labels = random_window(image, labels, data.window, generator)
                config = replace(config, tree=share_of(config.tree, image[0].numel() / whole))
            image, labels = augment(image, labels, self.config.train.strength, generator)
        return make_sample(image, labels, config, self.patch_size, self.items[i].name)

    def _decoded(self, i: int, max_side: int | None) -> tuple[NumpyArray, NumpyArray | None, tuple[float, ...]]:
        found: tuple[NumpyArray, NumpyArray | None, tuple[float, ...]] | None = self._cache.get((i, max_side))
        if found is None:
            image, labels = read_item(self.items[i], self.config.data)
            scale = value_range(image, self.config.data)
            shape = limited_shape(image.shape[1:], max_side)
            image = shrink_image(image, shape)
            labels = None if labels is None else shrink_labels(labels, shape)
            found = (image, labels, scale)
            self._cache.put((i, max_side), found, image.nbytes + (0 if labels is None else labels.nbytes))
        return found


def make_sample(
    image: Float32[Tensor, "C *S"], labels: UInt8[Tensor, "*S"], config: FitConfig, patch_size: int, name: str
) -> Sample:
    """Cut one normalised image and its labels with the same tree.

    Args:
        image: normalised image.
        labels: class per pixel, 255 where unknown.
        config: settings of the run.
        patch_size: samples per side of a token.
        name: the image's name.
    """
    leaves = cut(image, config.tree, patch_size, config.data.spacing)
    soft, weight = patchify_mask(labels, leaves, patch_size, config.data.num_classes)
    return Sample(patchify(image, leaves, patch_size), soft, weight, name)


def read_item(item: Item, data: DataConfig) -> tuple[NumpyArray, NumpyArray | None]:
    """Decode one image and, where there is one, its mask.

    Returns:
        The image ``[data.channels, *S]`` in its file's own type, and labels ``[*S]`` uint8 or ``None``.

    Raises:
        FormatError: a file is unreadable, holds values no class names, or the two differ in size.
    """
    image = read_pixels(item, data)
    if item.mask is None:
        return image, None
    return image, read_labels(item, data, image.shape[1:])


def read_pixels(item: Item, data: DataConfig) -> Shaped[NumpyArray, "C *S"]:
    """The image of an item in its file's own type, with the number of channels the model sees.

    Raises:
        FormatError: the file is unreadable, or has channels that do not fit.
    """
    from foveate.io.image import read_image

    return with_channels(read_image(item.image, max_pixels=data.max_pixels), data.channels, str(item.image))


def read_labels(item: Item, data: DataConfig, shape: tuple[int, ...] | None = None) -> UInt8[NumpyArray, "*S"]:
    """The labels of an item, by the declared classes.

    Args:
        item: an item with a mask.
        data: the classes.
        shape: spatial shape of the image, which the mask must have.

    Raises:
        FormatError: the file is unreadable, has another size, or holds values that no class names.
    """
    from foveate.io.masks import ClassTable, read_mask

    assert item.mask is not None
    return read_mask(item.mask, ClassTable(data.classes, data.unknown), shape=shape, max_pixels=data.max_pixels)


class ByteCache:
    """The most recently used values, as many as fit into a number of bytes.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value, now the most recent; ``None`` when it is not kept."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        """Keep a value; the least recently used ones leave until it fits, and it is not kept if it never would."""
        if num_bytes > self.limit:
            return
        self.used += num_bytes - self._values.pop(key, (None, 0))[1]
        self._values[key] = (value, num_bytes)
        while self.used > self.limit:
            self.used -= self._values.popitem(last=False)[1][1]
