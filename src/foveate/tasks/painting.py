"""A prediction that has not been painted: logits of the leaves, and the labels of any box of the image on request.

Legend: L leaves, K classes, P samples per side, S image sides, B sides of a box.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from foveate.geometry.labels import LabelPainter
from foveate.geometry.leaves import Leaves
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
        left: Prune point at which each leaf's token left, see `left_at`, of a model that prunes.
    """

    def __init__(
        self,
        values: Float[Tensor, "L K *P"],
        leaves: Leaves,
        shape: Sequence[int],
        spacing: tuple[float, ...] | None = None,
        unknown: Sequence[Box] = (),
        left: Int64[Tensor, " L"] | None = None,
    ) -> None:
        self.values, self.leaves, self.shape, self.spacing = values, leaves, tuple(shape), spacing
        self.unknown, self.left = tuple(unknown), left
        self._painter = LabelPainter(values, leaves, self.shape)

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return self.values.shape[1]

    def tile(self, box: Box) -> UInt8[np.ndarray, "*B"] | int:
        """The class of every pixel of a box, as one number where they are all the same."""
        found = self._painter.tile(box)
        tile = found if isinstance(found, int) else found.numpy()
        hidden = [part for part in self.unknown if _meet(part, box)]
        if not hidden:
            return tile
        out = np.full([high - low for low, high in zip(*box, strict=True)], tile, np.uint8)
        for start, stop in hidden:
            out[tuple(slice(max(a - o, 0), b - o) for a, b, o in zip(start, stop, box[0], strict=True))] = IGNORE
        return out

    def probability(self, box: Box) -> Float32[np.ndarray, "K *B"]:
        """The probability of every class at every pixel of a box."""
        return self._painter.probability(box).numpy()

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
