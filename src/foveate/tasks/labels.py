"""Masks of any kind as class labels in the frame of their image, read by box.

Legend: S image sides, B sides of a box.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from foveate.errors import FormatError
from foveate.geometry.source import Box, Source, exact_downsample, level_window
from foveate.io.annotations import Annotations
from foveate.io.grid import orientation
from foveate.io.guard import sniff
from foveate.io.masks import ClassTable, label_pixels, read_mask
from foveate.io.raster import ArrayRaster, Raster, broken_of, check_window, open_raster
from foveate.io.volume import Volume, is_volume, open_volume
from foveate.tasks.items import Item
from foveate.tasks.settings import DataConfig
from foveate.tasks.source import whole_box

IGNORE = 255
"""Label of pixels that neither the loss nor a score looks at."""

OTHER_SIZE = "the mask's size differs from its image's"

NumpyArray = NDArray[Any]


class Labels:
    """Class labels of an image, with the levels of the file they come from; a source of one uint8 channel.

    A pixel takes the label that lies under its centre, so no class appears that was not there.

    Args:
        source: the mask as stored; level 0 covers the same area as the image, at any whole or fractional scale.
        shape: spatial shape *S of the image in its working frame.
        table: what its values mean; ``None``: they are labels already.
        path: the file, for messages.
        image: what the labels are of; boxes that it lists as ``broken`` when labels are read become 255.
    """

    def __init__(
        self,
        source: Source,
        shape: Sequence[int],
        table: ClassTable | None,
        path: Path,
        image: Source | None = None,
    ) -> None:
        self._source, self._table, self._path, self._image = source, table, path, image
        self._scale = tuple(_scale(old, new) for old, new in zip(source.shape, shape, strict=True))
        steps = [tuple(d / s for d, s in zip(down, self._scale, strict=True)) for down in source.downsamples]
        fine = [k for k, step in enumerate(steps) if max(step) <= 1 + 1e-9]
        self._stored = [fine[-1] if fine else 0]  # level of the file behind each level here
        self._downsamples = [(1.0,) * len(self._scale)]
        for level, step in enumerate(steps):
            if min(step) > 1 + 1e-9:
                self._stored.append(level)
                self._downsamples.append(step)
        self._shape = tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S."""
        return self._shape

    @property
    def channels(self) -> int:
        """One."""
        return 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level."""
        return tuple(
            tuple(math.ceil(side / step - 1e-9) for side, step in zip(self._shape, down, strict=True))
            for down in self._downsamples
        )

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level."""
        return tuple(self._downsamples)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of annotations, one line each: what crosses itself, what was left out."""
        return self._source.notes if isinstance(self._source, Annotations) else ()

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """Storage block of the level, in its own pixels."""
        stored = self._stored[level]
        tile, down = self._source.tile_shape(stored), self._source.downsamples[stored]
        sides = zip(tile, down, self._scale, self._downsamples[level], strict=True)
        return tuple(max(1, round(side * step / (scale * own))) for side, step, scale, own in sides)

    def read(self, box: Box, level: int = 0) -> UInt8[NumpyArray, "1 *B"]:
        """Labels of the pixels of a level that touch a box, see `Source.read`.

        Raises:
            FormatError: the file is broken there, or holds values that no class names.
        """
        window = check_window(box, self._shape, level, self.downsamples)
        stored = self._stored[level]
        down = self._source.downsamples[stored]
        index = []
        for axis, (first, last) in enumerate(zip(*window, strict=True)):
            centres = (np.arange(first, last) + 0.5) * (self._downsamples[level][axis] * self._scale[axis] / down[axis])
            index.append(np.minimum(np.floor(centres + 1e-6).astype(np.int64), self._source.levels[stored][axis] - 1))
        area = _area(index, down, self._source.shape)
        part = self._source.read(area, stored)
        labels: NumpyArray = part[0] if self._table is None else label_pixels(part, self._table, self._path)
        for axis, (at, start) in enumerate(zip(index, level_window(area, down)[0], strict=True)):
            at = np.minimum(at - start, labels.shape[axis] - 1)
            if len(at) != labels.shape[axis] or at[0] != 0 or not (np.diff(at) == 1).all():
                labels = labels.take(at, axis=axis)
        return self._hidden(labels, window, level)[None]

    def _hidden(self, labels: NumpyArray, window: Box, level: int) -> NumpyArray:
        for start, stop in [level_window(box, self._downsamples[level]) for box in broken_of(self._image)]:
            low = [max(a, o) - o for a, o in zip(start, window[0], strict=True)]
            high = [min(b, e) - o for b, e, o in zip(stop, window[1], window[0], strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                labels = labels.copy()
                labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = IGNORE
        return labels


def _scale(old: int, new: int) -> float:
    """Pixels of the mask per pixel of the working frame, free of rounding where it is a whole number or fraction."""
    return exact_downsample(old, new) if old >= new else 1 / exact_downsample(new, old)


def _area(index: Sequence[NumpyArray], down: Sequence[float], shape: Sequence[int]) -> Box:
    """The box of the file whose pixels are the wanted ones."""
    start = tuple(
        min(math.floor(int(at[0]) * step + 1e-9), side - 1) for at, step, side in zip(index, down, shape, strict=True)
    )
    stop = (math.ceil((int(at[-1]) + 1) * step - 1e-9) for at, step in zip(index, down, strict=True))
    return start, tuple(min(max(high, low + 1), side) for high, low, side in zip(stop, start, shape, strict=True))


def open_labels(item: Item, data: DataConfig, native: Sequence[int], image: Source) -> Labels:
    """Open the mask of an image as labels in the image's working frame.

    A mask may be a raster of the image's size, or of a whole fraction of it (then each of its pixels is the label of a
    block), or GeoJSON polygons in level-0 pixels. Beside a NIfTI or DICOM image, a NIfTI mask is turned like it.

    Args:
        item: an item with a mask.
        data: the classes.
        native: spatial shape of the image as stored.
        image: the image in its working frame; with ``data.broken: skip`` what it could not decode becomes 255.

    Raises:
        FormatError: the file is unreadable or of another size.
    """
    assert item.mask is not None
    path = item.mask
    seen = image if data.broken == "skip" else None
    if is_annotation(path):
        from foveate.io.geojson import annotation_classes, read_annotations

        names = annotation_classes(data.classes)
        return Labels(read_annotations(path, names, tuple(native), unknown=data.unknown), image.shape, None, path, seen)
    source, known = _mask_source(item, path, ClassTable(data.classes, data.unknown), data)
    _check_fraction(path, source.shape, tuple(native))
    return Labels(source, image.shape, known, path, seen)


def whole_labels(item: Item, data: DataConfig, native: Raster, image: Source) -> UInt8[NumpyArray, "*S"]:
    """The labels of an image that is read whole; its mask must have the image's size.

    Args:
        item: an item with a mask.
        data: the classes.
        native: the image as `open_native` returned it.
        image: the image in its working frame.

    Raises:
        FormatError: the file is unreadable, has another size, or holds values that no class names.
    """
    assert item.mask is not None
    size, shape = tuple(native.shape), tuple(image.shape)
    flat = not is_annotation(item.mask) and not item.mask.is_dir() and not is_volume(item.mask)
    if flat and isinstance(native, Volume) and native.orientation != orientation(native.grid.affine):
        raise FormatError(
            f"{item.mask} does not say how it lies beside {item.image}, which is stored as "
            f"{orientation(native.grid.affine)}: save the mask as NIfTI"
        )
    if flat and size == shape:
        return read_mask(item.mask, ClassTable(data.classes, data.unknown), shape=shape, max_pixels=data.max_pixels)
    labels = open_labels(item, data, size, image)
    return np.ascontiguousarray(labels.read(whole_box(shape))[0])


def is_annotation(path: Path) -> bool:
    """Whether a mask is polygons and not pixels, by its name: any text may be JSON."""
    return path.name.lower().endswith((".geojson", ".json", ".geojson.gz", ".json.gz"))


def _mask_source(item: Item, path: Path, table: ClassTable, data: DataConfig) -> tuple[Source, ClassTable | None]:
    """The mask as stored and its table; or labels without one, where only `read_mask` knows what is stored."""
    if is_volume(path):
        canonical = is_volume(item.image)
        return open_volume(path, max_pixels=data.max_pixels, canonical=canonical), table
    if path.is_dir() or sniff(path) == "tiff":
        source = open_raster(path, max_pixels=data.max_pixels, want="colours" if table.by_colour else "values")
        if path.is_dir() or not isinstance(source, ArrayRaster):
            return source, table
    return ArrayRaster(read_mask(path, table, max_pixels=data.max_pixels)[None]), None


def _check_fraction(path: Path, found: tuple[int, ...], image: tuple[int, ...]) -> None:
    if len(found) == len(image):
        steps = {exact_downsample(full, side) for full, side in zip(image, found, strict=True)}
        if len(steps) == 1 and steps.pop().is_integer():
            return
    sizes = " against ".join(" x ".join(map(str, size)) for size in (found, image))
    raise FormatError(
        f"{path}: {OTHER_SIZE}, {sizes}; give a mask of the image's size, or of the image "
        "made smaller by a whole number"
    )
