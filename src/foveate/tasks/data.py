"""Files to samples: decode, shrink, normalise, vary, cut, patchify - each item drawn only from (seed, epoch, index).

Legend: T tokens of the batch, L tokens of one image, K classes, P samples per side, C channels, S image sides.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from foveate.errors import ConfigError, FormatError
from foveate.geometry.patches import Patches, pack, patchify, patchify_mask
from foveate.tasks.augment import augment, random_window, trim
from foveate.tasks.cut import cut, share_of
from foveate.tasks.items import Item
from foveate.tasks.labels import IGNORE, whole_labels
from foveate.tasks.resize import resized_image, resized_spacing, shrink_labels, working_shape
from foveate.tasks.settings import DataConfig, FitConfig
from foveate.tasks.slides import Slide, vary_values
from foveate.tasks.source import is_large, open_item, open_native, spacing_of, whole_box
from foveate.tasks.values import normalise, value_range, with_channels

_SQUARE = 0.05  # relative difference of the sides of a pixel up to which a quarter turn leaves it as it is

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
        self._slides: dict[int, Slide] = {}
        self._sort: tuple[str, str] | None = None  # of pixels, and the first image that has it

    def __len__(self) -> int:
        return len(self.items) * (self.config.data.windows if self.train else 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the variations that follow; call it before the workers of that epoch start."""
        self.epoch = epoch

    def read(self, i: int, *, shrunk: bool = False) -> "Whole | Slide":
        """Image ``i`` unvaried: whole, or opened if it is read by box.

        Args:
            i: position in ``items``.
            shrunk: at the size the model works on (``data.max_side``, ``data.resample``) instead of full resolution.

        Raises:
            FormatError: a file is unreadable, or image and mask differ in size.
        """
        found = self._decoded(i, shrunk)
        if isinstance(found, Slide):
            return found
        labels = None if found.labels is None else torch.from_numpy(found.labels)
        return Whole(normalise(found.image, found.scale, self.config.data), labels, _settings_of(found, self.config))

    def load(self, i: int, *, shrunk: bool = False) -> tuple[Float32[Tensor, "C *S"], UInt8[Tensor, "*S"] | None]:
        """Image and labels of `read`, for sets of images that are read whole.

        Raises:
            FormatError: as `read`, or the image is read by box.
        """
        found = self.read(i, shrunk=shrunk)
        if isinstance(found, Slide):
            size = " x ".join(map(str, found.shape))
            raise FormatError(
                f"{found.item.image} of {size} pixels is read by box: this needs images that are held whole"
            )
        return found.image, found.labels

    def counts(self, i: int) -> Int64[NumpyArray, "256"]:
        """Pixels of image ``i`` per label of its mask; of a slide, by the mask at a glance.

        Raises:
            FormatError: a file is unreadable, or there is no mask.
        """
        found = self._decoded(i, False)
        if isinstance(found, Slide):
            return found.counts()
        return np.bincount(self._labels(i, found).ravel(), minlength=IGNORE + 1)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i`` of the current epoch.

        Raises:
            FormatError: a file is unreadable, has no mask, or image and mask differ in size.
        """
        data = self.config.data
        seed = np.random.SeedSequence([self.config.train.seed, self.epoch, i])
        generator = np.random.default_rng(seed)
        item = i // data.windows if self.train else i
        is_whole = not self.train or data.share_whole >= 1 or 0 < data.share_whole > generator.random()
        found = self._decoded(item, True)
        if isinstance(found, Slide):
            if is_whole:
                return self._whole(item, found, generator)
            image, labels, config = found.window(self.config, generator)
        else:
            truth, part, config = self._labels(item, found), found.image, _settings_of(found, self.config)
            if not is_whole:
                assert data.window is not None
                box = random_window(truth, data.window, generator, data.balance)
                truth, part = truth[box], part[(slice(None), *box)]
                config = replace(config, tree=share_of(config.tree, truth.size / found.image[0].size, truth.shape))
            image, labels = normalise(part, found.scale, data), torch.from_numpy(np.ascontiguousarray(truth))
        if self.train:
            sides = config.data.spacing or (1.0, 1.0)
            square = abs(sides[-1] / sides[-2] - 1) < _SQUARE
            image, labels = trim(image, labels, self.config.train.trim, generator)
            image, labels = augment(image, labels, self.config.train.strength, generator, quarters=square)
        return make_sample(image, labels, config, self.patch_size, self.items[item].name)

    def _whole(self, i: int, slide: Slide, generator: np.random.Generator) -> Sample:
        parts = self._cache.get((i, "whole"))
        if parts is None:
            parts = slide.whole(self.config, self.patch_size)
            size = sum(part.numel() * 4 for part in (parts[0].pixels, *parts[1:]))
            self._cache.put((i, "whole"), parts, size)
        patches, soft, weight = parts
        if self.train:
            patches = vary_values(patches, self.config.train.strength, generator)
        return Sample(patches, soft, weight, self.items[i].name)

    def _labels(self, i: int, found: "Decoded") -> UInt8[NumpyArray, "*S"]:
        if found.labels is None:
            raise FormatError(f"{self.items[i].image} has no mask: give one, or leave the image out of training")
        return found.labels

    def _decoded(self, i: int, shrunk: bool) -> "Decoded | Slide":
        data = self.config.data
        shrunk = shrunk and (data.max_side is not None or data.resample is not None)
        found: Decoded | Slide | None = self._slides.get(i) or self._cache.get((i, shrunk))
        return self._read(i, shrunk) if found is None else found

    def _read(self, i: int, shrunk: bool) -> "Decoded | Slide":
        found = read_item(self.items[i], self.config.data)
        if isinstance(found, Slide):
            self._check_alike(i, len(found.shape), found.raster.dtype)
            self._slides[i] = found
            return found
        self._check_alike(i, found.image.ndim - 1, found.image.dtype)
        if shrunk:
            old = found.image.shape[1:]
            shape = working_shape(old, replace(self.config.data, spacing=found.spacing))
            labels = None if found.labels is None else shrink_labels(found.labels, shape)
            spacing = resized_spacing(found.spacing, old, shape)
            image, scale = found.image, found.scale
            if self.config.data.resample is not None:  # values first, as in prediction: what is cut off stays cut off
                image, scale = normalise(image, scale, self.config.data).numpy(), ()
            found = replace(found, image=resized_image(image, shape), labels=labels, spacing=spacing, scale=scale)
        size = found.image.nbytes + (0 if found.labels is None else found.labels.nbytes)
        self._cache.put((i, shrunk), found, size)
        return found

    def _check_alike(self, i: int, num_dims: int, dtype: np.dtype[Any]) -> None:
        """Refuse images that the settings cannot bring to one scale, or one model not take."""
        sort = f"{num_dims}-D"
        if self.config.data.normalise in ("range", "fixed"):
            sort += " float" if dtype.kind == "f" else " integer"
        first, other = self._sort = self._sort or (sort, str(self.items[i].image))
        if first != sort:
            raise FormatError(
                f"{self.items[i].image} is {sort} and {other} is {first}, which data.normalise="
                f"{self.config.data.normalise!r} cannot bring together: set it to 'image', or make two sets"
            )


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


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image that is held whole, as stored, at the resolution the model works at.

    Args:
        image: in its file's own type, with the channels the model sees.
        labels: class per pixel, or ``None`` where there is no mask.
        scale: what `value_range` says of it; nothing where its values are normalised already.
        spacing: size of its pixels in mm, where known and meant.
    """

    image: Shaped[NumpyArray, "C *S"]
    labels: UInt8[NumpyArray, "*S"] | None
    scale: tuple[float, ...]
    spacing: tuple[float, ...] | None


def _settings_of(found: Decoded, config: FitConfig) -> FitConfig:
    """The settings for one image, with its own spacing."""
    return replace(config, data=replace(config.data, spacing=found.spacing))


@dataclass(frozen=True, eq=False)
class Whole:
    """An image as the model sees it, not varied.

    Args:
        image: normalised.
        labels: class per pixel, or ``None`` where there is no mask.
        config: the settings of the run, with ``data.spacing`` that of this image.
    """

    image: Float32[Tensor, "C *S"]
    labels: UInt8[Tensor, "*S"] | None
    config: FitConfig


def read_item(item: Item, data: DataConfig) -> Decoded | Slide:
    """Decode one image and, where there is one, its mask; or open both if the image is read by box.

    Raises:
        FormatError: a file is unreadable, holds values no class names, or the two differ in size.
    """
    native = open_native(item, data)
    if is_large(native):
        return Slide(item, native, data)
    raster = open_item(item, data, native)
    image = with_channels(raster.read(whole_box(raster.shape)), data.channels, str(item.image))
    labels = None if item.mask is None else whole_labels(item, data, native, raster)
    return Decoded(image, labels, value_range(image, data), spacing_of(item, data, raster))


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
