"""Label images as polygons with holes, and back: exact outlines, traced and filled tile by tile.

Corners lie between pixels: pixel (y, x) covers ``[y, y + 1) x [x, x + 1)`` in level-0 pixels, so outlines of a label
image are integers, and filling them at pixel centres gives the labels back.

Legend: V points, R rings, M polygons, B sides of a box.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.geometry import kernels_rings as kernels
from foveate.geometry.image import Real
from foveate.geometry.source import Box, level_window

Array = NDArray[Any]

_CHUNK = 2**18  # corners collected at a time


@dataclass(frozen=True, eq=False)
class Polygons:
    """Polygons with holes, one label each, in drawn order: where they overlap, the later one is seen.

    A point lies in a polygon if a ray from it meets the polygon's rings an odd number of times (even-odd), whatever
    their directions and crossings. Rings are not closed: the first point is not repeated.

    Args:
        points: Points of all rings, (y, x) in level-0 pixels, int32 or float64.
        ring_start: First point of each ring, and the number of points at the end.
        polygon_start: First ring of each polygon, its outer one, and the number of rings at the end.
        labels: Label of each polygon.
    """

    points: Shaped[Array, "V 2"]
    ring_start: Int64[Array, "_"]
    polygon_start: Int64[Array, "_"]
    labels: UInt8[Array, "M"]

    @classmethod
    def of(cls, polygons: Iterable[tuple[int, list[Array]]]) -> "Polygons":
        """Collects polygons given as label and rings ``[n, 2]``, the outer one first."""
        labels: list[int] = []
        rings: list[Array] = []
        polygon_start = [0]
        for label, members in polygons:
            labels.append(label)
            rings.extend(members)
            polygon_start.append(len(rings))
        ring_start = np.cumsum([0, *map(len, rings)], dtype=np.int64)
        points = np.concatenate(rings) if rings else np.empty((0, 2), np.int32)
        return cls(points, ring_start, np.array(polygon_start, np.int64), np.array(labels, np.uint8))

    def __len__(self) -> int:
        return len(self.labels)

    def rings(self, index: int) -> list[Array]:
        """Rings ``[n, 2]`` of one polygon, (y, x), the outer one first; views."""
        bounds = self.ring_start[self.polygon_start[index] : self.polygon_start[index + 1] + 1]
        return [self.points[low:high] for low, high in pairwise(bounds.tolist())]

    def __iter__(self) -> Iterator[tuple[int, list[Array]]]:
        return ((int(label), self.rings(index)) for index, label in enumerate(self.labels))

    @cached_property
    def boxes(self) -> Float64[Array, "M 4"]:
        """Bounds of each polygon: y and x of its start and of its stop."""
        begin = self.ring_start[self.polygon_start[:-1]]
        if not len(self):
            return np.empty((0, 4))
        low, high = (np.asarray(reduce.reduceat(self.points, begin)) for reduce in (np.minimum, np.maximum))
        return np.concatenate([low, high], 1).astype(np.float64)

    @property
    def areas(self) -> Float64[Array, "M"]:
        """Area of each polygon in square pixels, holes taken off; of rings that cross themselves, what they enclose
        in one direction less what they enclose in the other."""
        area = np.abs(kernels.ring_areas(self.points, self.ring_start))
        begin = self.polygon_start[:-1]
        return 2 * area[begin] - np.add.reduceat(area, begin) if len(self) else np.empty(0)

    @property
    def num_crossed(self) -> int:
        """Number of rings that cross themselves; rings that only touch do not count."""
        return int(kernels.crossed_rings(self.points, self.ring_start))


class Tracer:
    """Collects the outlines of a label image whose tiles come in raster order, each once.

    Args:
        shape: (H, W) of the image.
        background: Label that is not traced; outside the image is background too.

    Raises:
        ShapeError: not 2-D, a side of 0 or of 2^26 or more.

    Cost: memory for the corners of the outlines and one row of pixels; a constant tile costs its border.
    """

    def __init__(self, shape: tuple[int, ...], *, background: int = 0) -> None:
        if len(shape) != 2 or not all(1 <= side < 2**kernels.SIDE_BITS for side in shape):
            raise ShapeError(f"labels of {shape} have no outlines; give (H, W) from 1 to {2**kernels.SIDE_BITS - 1}")
        self._shape = tuple(int(side) for side in shape)
        self._background = background
        self._above = np.full(self._shape[1] + 2, background, np.uint8)  # the row above the tiles, rimmed
        self._below = self._above.copy()
        self._left = np.empty(0, np.uint8)  # the column left of the next tile
        self._row, self._column = (0, 0), 0  # rows of the tiles that come now, and where the next one begins
        self._free = np.empty(max(_CHUNK, 4 * self._shape[1] + 8), np.int64)
        self._used = 0
        self._full: list[Array] = []

    def add(self, box: Box, labels: UInt8[Array, "..."] | int) -> None:
        """Takes the next tile: its labels ``[h, w]``, or the one label of a constant tile.

        Raises:
            ShapeError: a tile out of raster order, outside the image, or whose labels are not as large as its box.
        """
        (y0, x0), (y1, x1) = box
        height, width = self._shape
        if x0 == 0 and self._column == 0 and y0 == self._row[1]:
            self._row = (y0, y1)
            self._left = np.full(min(y1, height) - y0, self._background, np.uint8)
        wanted = (y0, x0, y1) == (self._row[0], self._column, self._row[1])
        if not wanted or not y0 < y1 <= height or not x0 < x1 <= width:
            raise ShapeError(
                f"tile {box} after row {self._row}, column {self._column} of {self._shape}; keep the order"
            )
        if not isinstance(labels, int) and labels.shape != (y1 - y0, x1 - x0):
            raise ShapeError(f"labels {labels.shape} for the tile {box}; give [{y1 - y0}, {x1 - x0}], or one int")
        if isinstance(labels, int):
            self._constant(box, labels)
        else:
            self._scan(self._framed(box, labels), y0, x0)
        self._left = np.full(y1 - y0, labels, np.uint8) if isinstance(labels, int) else labels[:, -1].copy()
        self._below[x0 + 1 : x1 + 1] = labels if isinstance(labels, int) else labels[-1]
        self._column = x1 % width
        if x1 == width:
            self._above, self._below = self._below, self._above

    def finish(self, *, min_area: Real = 0) -> Polygons:
        """Links what was collected; by label, then along the rows. The tracer is empty afterwards.

        Args:
            min_area: Regions of fewer pixels are left out, and holes of fewer pixels filled.

        Raises:
            ShapeError: tiles are missing.
        """
        if self._row[1] != self._shape[0] or self._column:
            raise ShapeError(f"tiles end at row {self._row[1]}, column {self._column} of {self._shape}; add them all")
        keys = np.concatenate([*self._full, self._free[: self._used]])
        self._full, self._free = [], np.empty(0, np.int64)
        keys.sort()
        return _linked(keys, self._shape[1], min_area)

    def _framed(self, box: Box, labels: Array) -> Array:
        """A tile with the pixels above and left of it, and the outside below and right of the last tiles."""
        (y0, x0), (y1, x1) = box
        last = (y1 == self._shape[0], x1 == self._shape[1])
        block = np.full((y1 - y0 + 1 + last[0], x1 - x0 + 1 + last[1]), self._background, np.uint8)
        block[0] = self._above[x0 : x0 + block.shape[1]]
        block[1 : y1 - y0 + 1, 0] = self._left
        block[1 : y1 - y0 + 1, 1 : x1 - x0 + 1] = labels
        return block

    def _constant(self, box: Box, label: int) -> None:
        """Visits the upper and the left border of a constant tile; along the others there is nothing but the end."""
        (y0, x0), (y1, x1) = box
        last = (y1 == self._shape[0], x1 == self._shape[1])
        outside = label != self._background
        around = self._above[x0 : x1 + 1 + last[1]]
        if (self._left == label).all() and (around == label).all() and not (outside and any(last)):
            return
        top = np.full((2, len(around)), self._background, np.uint8)
        top[0], top[1, 0], top[1, 1 : x1 - x0 + 1] = around, self._left[0], label
        self._scan(top, y0, x0)
        side = np.full((y1 - y0 + last[0], 2), self._background, np.uint8)
        side[: y1 - y0, 0], side[: y1 - y0, 1] = self._left, label
        self._scan(side, y0 + 1, x0)
        if all(last) and outside:
            end = np.full((2, 2), self._background, np.uint8)
            end[0, 0] = label
            self._scan(end, y1, x1)

    def _scan(self, block: Array, y: int, x: int) -> None:
        row = 0
        while True:
            row, self._used = kernels.corners(block, y, x, self._background, row, self._free, self._used)
            if row >= len(block) - 1:
                return
            self._full.append(self._free[: self._used].copy())
            self._used = 0


def trace(
    tiles: Callable[[Box], UInt8[Array, "..."] | int],
    shape: tuple[int, ...],
    *,
    tile: int = 512,
    min_area: Real = 0,
    background: int = 0,
) -> Polygons:
    """Outlines of the regions of a label image, exact along pixel edges, read tile by tile.

    A region is a set of pixels of one label that are connected along their edges. Rings are simple: where a region
    touches itself at a corner, two rings touch there. Outer rings have the region on their right hand as seen on a
    screen, holes on their left, and collinear points are merged.

    Args:
        tiles: Gives the labels ``[h, w]`` of a box, or an int where they are all the same; called in raster order.
        shape: (H, W) of the image.
        tile: Side of the boxes in pixels; the last ones end with the image.
        min_area: As in ``Tracer.finish``.
        background: Label that is not traced.

    Returns:
        Polygons of int32 points, by label, then along the rows. ``fill`` gives the labels back.

    Raises:
        ShapeError: as ``Tracer``.

    Cost: memory of about 28 bytes for each corner of the outlines; a constant tile costs its border.
    """
    tracer = Tracer(shape, background=background)
    height, width = shape
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            box = ((y, x), (min(y + tile, height), min(x + tile, width)))
            tracer.add(box, tiles(box))
    return tracer.finish(min_area=min_area)


def fill(polygons: Polygons, box: Box, downsample: int = 1, *, background: int = 0) -> UInt8[Array, "*B"]:
    """Labels of the pixels of a box: each pixel has the label of the last polygon that its centre lies in.

    A centre on an edge belongs to what lies right of the edge, or below it, so polygons that share an edge neither
    overlap nor leave a gap. The test is exact for coordinates that are multiples of 1/2 below 2^24.

    Args:
        polygons: What to fill.
        box: Start and stop in level-0 pixels; it may lie anywhere.
        downsample: Level-0 pixels per pixel; centres lie at ``(i + 1/2) * downsample``.
        background: Label where no polygon is.

    Returns:
        uint8 labels of the window of the box, see ``level_window``.

    Cost: one look at every polygon's bounds, the points of those that meet the window, and the pixels they cover.
    """
    start, stop = level_window(box, (float(downsample),) * 2)
    out = np.full([high - low for low, high in zip(start, stop, strict=True)], background, np.uint8)
    parts = (polygons.points, polygons.ring_start, polygons.polygon_start, polygons.boxes, polygons.labels)
    kernels.fill_polygons(*parts, float(downsample), start, out)
    return out


def simplified(polygons: Polygons, tolerance: Real) -> Polygons:
    """Rings of fewer points, none farther than ``tolerance`` pixels from where the outline was (Douglas-Peucker).

    Holes that vanish are left out; an outer ring that would vanish stays as it is. Neighbours are simplified each for
    itself, so they may overlap or part by up to twice the tolerance.
    """
    import cv2

    def simpler(ring: Array) -> Array:
        return np.asarray(cv2.approxPolyDP(ring.reshape(-1, 1, 2), tolerance, True)).reshape(-1, 2)

    def thinned(rings: Iterable[Array]) -> Iterator[Array]:
        for index, ring in enumerate(rings):
            fewer = simpler(ring if ring.dtype == np.int32 else ring.astype(np.float32))
            if len(fewer) >= 3 and cv2.contourArea(fewer) > 0:
                yield fewer.astype(ring.dtype)
            elif index == 0:
                yield ring

    return Polygons.of((label, list(thinned(rings))) for label, rings in polygons) if tolerance > 0 else polygons


def _linked(keys: Array, width: int, min_area: Real) -> Polygons:
    """Polygons of sorted corners."""
    across, along = kernels.pair_up(keys, width)
    ring = np.empty(len(keys), np.int32)
    kernels.number(keys, across, along, ring)
    kernels.part_rings(keys, across, ring)
    count = kernels.number(keys, across, along, ring)
    first, length, area = kernels.measure(keys, across, along, ring, count)
    parent = kernels.parents(keys, along, ring, first, area, width)
    net = np.bincount(parent, weights=area, minlength=count)
    order = np.flatnonzero((net[parent] >= min_area) & (np.abs(area) >= min_area))
    order = order[np.argsort(parent[order], kind="stable")]  # outer rings come before their holes
    points = np.empty((int(length[order].sum()), 2), np.int32)
    kernels.write_rings(keys, across, along, first, order, points)
    outer = np.flatnonzero(parent[order] == order)
    return Polygons(
        points,
        np.concatenate([[0], np.cumsum(length[order], dtype=np.int64)]),
        np.concatenate([outer, [len(order)]]).astype(np.int64),
        (keys[first[order[outer]]] >> kernels.LABEL_SHIFT).astype(np.uint8),
    )
