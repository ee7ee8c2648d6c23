"""A prediction that has not been painted: logits of the leaves, and the labels of any box of the image on request.

Legend: L leaves, K classes, P samples per side, S image sides, B sides of a box.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.source import Box
from foveate.tasks.figures import IGNORE
from foveate.tasks.metrics import tiles


class Painting:
    """Classes of an image of any size; only what is asked for is painted, never classes x pixels.

    Args:
        values: Logits, or shares per class, of the leaves.
        leaves: In the frame that the model saw.
        shape: Spatial shape of the image as stored, which the labels have.
        spacing: Size of its pixels in mm along each axis, where known.
        unknown: Boxes of the image that become 255.
    """

    def __init__(
        self,
        values: Float[Tensor, "L K *P"],
        leaves: Leaves,
        shape: Sequence[int],
        spacing: tuple[float, ...] | None = None,
        unknown: Sequence[Box] = (),
    ) -> None:
        self.values, self.leaves, self.shape, self.spacing = values, leaves, tuple(shape), spacing
        self.unknown = tuple(unknown)
        self._painter = LabelPainter(values, leaves, self.shape)

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return self.values.shape[1]

    def tile(self, box: Box) -> UInt8[np.ndarray, "*B"] | int:
        """The class of every pixel of a box, as one number where they are all the same."""
        tile = self._painter.tile(box)
        hidden = [part for part in self.unknown if _meet(part, box)]
        if not hidden:
            return tile
        out = np.full([high - low for low, high in zip(*box, strict=True)], tile, np.uint8)
        for start, stop in hidden:
            out[tuple(slice(max(a - o, 0), b - o) for a, b, o in zip(start, stop, box[0], strict=True))] = IGNORE
        return out

    def probability(self, box: Box) -> Float32[np.ndarray, "K *B"]:
        """The probability of every class at every pixel of a box."""
        return self._painter.probability(box)

    @cached_property
    def labels(self) -> UInt8[Tensor, "*S"]:
        """The class of every pixel, at one byte each: for images that may be held."""
        labels = torch.zeros(self.shape, dtype=torch.uint8)
        array = labels.numpy()
        for box in tiles(self.shape):
            array[tuple(slice(first, last) for first, last in zip(*box, strict=True))] = self.tile(box)
        return labels


def _meet(one: Box, other: Box) -> bool:
    return all(a < d and c < b for a, b, c, d in zip(*one, *other, strict=True))


class LabelPainter:
    """Stands in."""

    def __init__(self, values: Tensor, leaves: Leaves, shape: tuple[int, ...]) -> None:
        self.args = values, leaves, shape

    def tile(self, box: Box) -> UInt8[np.ndarray, "*B"] | int:
        """Labels."""
        return _paint_tile(*self.args, box).argmax(0).to(torch.uint8).numpy()

    def probability(self, box: Box) -> Float32[np.ndarray, "K *B"]:
        """Chances."""
        return _paint_tile(*self.args, box).softmax(0).numpy()


def _paint_tile(values: Tensor, leaves: Leaves, shape: tuple[int, ...], box: Box) -> Tensor:
    if tuple(leaves.shape) == shape:
        return unpatchify(values, leaves, mode="smooth", box=box)
    # linear interpolation about pixel centres, as torch's `interpolate` does it, but of this tile alone
    low, high, share, start, stop = [], [], [], [], []
    for small, full, first, last in zip(leaves.shape, shape, *box, strict=True):
        at = ((torch.arange(first, last) + 0.5) * (small / full) - 0.5).clamp(0, small - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=small - 1)
        start.append(int(below[0]))
        stop.append(int(above[-1]) + 1)
        low.append(below - start[-1])
        high.append(above - start[-1])
        share.append(at - below)
    tile = unpatchify(values, leaves, mode="smooth", box=(tuple(start), tuple(stop)))
    for axis, (below, above, part) in enumerate(zip(low, high, share, strict=True), start=1):
        view = [1] * tile.ndim
        view[axis] = -1
        weight = part.view(view).to(tile.dtype)
        tile = tile.index_select(axis, below) * (1 - weight) + tile.index_select(axis, above) * weight
    return tile
