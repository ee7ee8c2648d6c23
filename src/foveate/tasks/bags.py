"""From a row of the table to its bag of patches: a grid over a raster, or features that were stored.

Legend: R patches read, C channels, P patch side, N patches of a bag, S image sides, F features.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from foveate.errors import FormatError
from foveate.geometry.patch_source import GridPatches, PatchSource, TensorPatches, constant_of
from foveate.geometry.source import Source
from foveate.io.bags import FeatureBag
from foveate.io.guard import bad_file
from foveate.io.raster import Raster
from foveate.tasks.items import Item
from foveate.tasks.recognition_settings import TableConfig
from foveate.tasks.source import glance, open_item, open_native
from foveate.tasks.table import Row
from foveate.tasks.tissue import tissue_map
from foveate.tasks.values import normalise, value_range, with_channels


def open_bag(item: Item, data: TableConfig, *, width: int | None = None, native: Raster | None = None) -> PatchSource:
    """The patches of an image as the model sees them; none of them is read yet.

    Args:
        item: the image, or the bag of features where the settings name a folder of these.
        data: the settings.
        width: features that the model takes; None takes any.
        native: the image, if it is open already.

    Raises:
        FormatError: the file is unreadable, does not say how large its pixels are though ``data.mpp`` is set, shows no
            tissue, has no patches, or features of another width.

    Cost: the header; with ``data.tissue`` or ``data.normalise: image`` one look at low resolution.
    """
    source = _feature_bag(item, width) if data.features is not None else _grid(item, data, native)
    if not len(source):
        why, remedy = f"no patch has a share of tissue of {data.tissue:g}", "lower tissue"
        if data.features is not None:
            why, remedy = "nothing can be said of it", "embed it again"
        raise bad_file(item.image, f"is a bag of 0 patches ({why}); {remedy}, or leave it out")
    return source


def _feature_bag(item: Item, width: int | None) -> PatchSource:
    return CheckedFeatures(FeatureBag(item.image, width), item)


def _grid(item: Item, data: TableConfig, native: Raster | None) -> PatchSource:
    raster = open_item(item, data.pixels, open_native(item, data.pixels) if native is None else native)
    if len(raster.shape) != 2:
        raise bad_file(item.image, f"is a volume of {raster.shape}; recognition takes planes, or bags of features")
    keep = None
    if data.tissue > 0:
        cells = GridPatches(raster, data.patch_size, stride=data.stride).boxes
        keep = tissue_share(raster, cells) >= data.tissue
    return ScaledPatches(GridPatches(raster, data.patch_size, stride=data.stride, keep=keep), raster, data, item)


def tissue_share(source: Source, boxes: Int64[Tensor, "N 2 2"]) -> Shaped[Tensor, " N"]:
    """Share of every box that is tissue, from one look at low resolution.

    Args:
        source: the image.
        boxes: in level-0 pixels.

    Cost: see `glance`.
    """
    found = tissue_map(glance(source))
    total = np.pad(found.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    scale = np.array(found.shape) / np.array(source.shape)
    place = boxes.numpy() * scale
    low = np.minimum(np.floor(place[:, 0] + 1e-6).astype(np.int64), np.array(found.shape) - 1)
    high = np.maximum(np.ceil(place[:, 1] - 1e-6).astype(np.int64), low + 1)
    (top, left), (bottom, right) = low.T, high.T
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return torch.from_numpy(inside / (high - low).prod(1))


class ScaledPatches:
    """Patches of a grid with the channels and the values that the model sees.

    Bytes on the scale of their type stay bytes, which encoders scale themselves.

    Args:
        grid: the patches as stored.
        raster: the image that they are from.
        data: channels and normalisation.
        item: for messages.
    """

    def __init__(self, grid: GridPatches, raster: Raster, data: TableConfig, item: Item) -> None:
        self.grid, self.raster, self._data, self._name = grid, raster, data, str(item.image)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the image in the working frame."""
        return self.grid.shape

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def boxes(self) -> Int64[Tensor, "N 2 D"] | None:
        """In level-0 pixels of the working frame."""
        return self.grid.boxes

    @property
    def constant(self) -> Bool[Tensor, " N"] | None:
        """Patches that are known to be blank."""
        return constant_of(self.grid)

    @cached_property
    def _scale(self) -> tuple[float, ...]:
        data = self._data.pixels
        if data.normalise != "image":
            return value_range(np.empty((1, 1, 1), self.raster.dtype), data)
        return value_range(with_channels(glance(self.raster), data.channels, self._name), data)

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R C *P"]:
        """Returns the patches at ``index``.

        Raises:
            FormatError: a tile is broken, the channels do not fit, or values are not finite.
        """
        pixels, data = self.grid.read(index), self._data.pixels
        channels_first: NDArray[Any] = pixels.movedim(1, 0).numpy()
        seen = with_channels(channels_first, data.channels, self._name)
        if data.normalise == "range" and pixels.dtype == torch.uint8:
            return torch.from_numpy(np.ascontiguousarray(seen.swapaxes(0, 1)))
        values = normalise(np.ascontiguousarray(seen), self._scale, data).movedim(0, 1).contiguous()
        _check_finite(values, index, self._name)
        return values


class CheckedFeatures:
    """Stored features, refused where they are not finite.

    Args:
        bag: the features.
        item: for messages.
    """

    def __init__(self, bag: PatchSource, item: Item) -> None:
        self._bag, self._name = bag, str(item.image)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the image that they are from."""
        return self._bag.shape

    def __len__(self) -> int:
        return len(self._bag)

    @property
    def boxes(self) -> Int64[Tensor, "N 2 D"] | None:
        """Where they are from."""
        return self._bag.boxes

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R F"]:
        """Returns the features at ``index``.

        Raises:
            FormatError: some are NaN or infinite.
        """
        values = self._bag.read(index)
        _check_finite(values, index, self._name)
        return values


def _check_finite(values: Tensor, index: Tensor, name: str) -> None:
    good = values.isfinite().flatten(1).all(1)
    if not bool(good.all()):
        first = int(index[(~good).nonzero()[0]])
        raise FormatError(f"{name}: patch {first} holds NaN or infinite values; make the file again")


def held(source: PatchSource) -> PatchSource:
    """The same bag with all its patches in memory."""
    return TensorPatches(source.read(torch.arange(len(source))), source.boxes, source.shape)


class Bags(Dataset[PatchSource | Exception]):
    """The bags of some rows; what cannot be read is handed over as the error that says why.

    Args:
        rows: of the table.
        data: the settings.
        width: features that the model takes; None takes any.
        lazy: patches are read when asked for; else a bag comes with all of them in memory.
    """

    def __init__(self, rows: Sequence[Row], data: TableConfig, width: int | None = None, *, lazy: bool) -> None:
        self.rows, self.data, self.width, self.lazy = tuple(rows), data, width, lazy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PatchSource | Exception:
        try:
            source = open_bag(self.rows[index].item, self.data, width=self.width)
            return source if self.lazy else held(source)
        except Exception as error:  # noqa: BLE001 - judged where it arrives; a loader process would wrap it in a traceback
            return error
