"""Values per leaf -> the class of every pixel, tile by tile, without the values of every pixel.

Most tiles of a large image lie in leaves that are of one class throughout; these are known before any tile is painted.

Legend: L leaves, K classes, N spatial axes, P patch_size, B sides of a box.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import FormatError, ShapeError
from foveate.geometry import kernels_labels as kernels
from foveate.geometry.boxes import check_box, check_shape
from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import _own_where_empty, unpatchify
from foveate.geometry.samples import Box, as_volume, cells_of, halo_rows

_CHUNK = 1 << 21  # halo samples looked at together
_MARGIN = 64 * float(np.finfo(np.float32).eps)  # far above what rounding changes in an interpolation

Lines = list[tuple[Tensor, Tensor, Tensor]]  # per axis: the pixels below and above, and the share of the one above


class LabelPainter:
    """Paints the class with the largest value at every pixel: ``unpatchify(values, leaves, mode="smooth").argmax(0)``.

    A tile whose leaves are all of one class, as far as interpolation reaches, is that class without being painted:
    what is largest at all samples is largest between them.

    Args:
        values: ``[L, K, *P]``, logits or shares of the leaves, finite.
        leaves: the cells they belong to.
        shape: frame of the pixels to paint, if it is not that of the leaves: between their pixels values are linear.

    Raises:
        ShapeError: values and leaves do not match, or there are more classes than a label can name.
        FormatError: NaN or Inf among the values.

    Cost: O(L K P^N) once; a tile O(K x pixels), a tile of one class O(L). Memory: the values and 8 (P + 2)^N bytes per
    leaf that touches a tile.
    Source: Zhang et al., SC24, arXiv 2404.09707, painting back of tokens; see `unpatchify`.
    """

    def __init__(self, values: Float[Tensor, "L K *P"], leaves: Leaves, shape: Sequence[int] | None = None) -> None:
        sides = tuple(values.shape[2:])
        if values.ndim != leaves.num_dims + 2 or len(values) != len(leaves) or len(set(sides)) != 1:
            raise ShapeError(
                f"values {tuple(values.shape)} must be (L, K, *P), L = {len(leaves)}, {leaves.num_dims} equal sides; "
                "give the leaves that patchify was given"
            )
        if not 1 <= values.shape[1] <= 256:
            raise ShapeError(f"{values.shape[1]} classes; a label of one byte names 1 to 256")
        if not bool(torch.isfinite(values).all()):
            raise FormatError("values to paint hold NaN or Inf; replace them, e.g. with torch.nan_to_num")
        self.leaves, self.shape = leaves.to("cpu"), leaves.shape if shape is None else check_shape(shape)
        if len(self.shape) != leaves.num_dims:
            raise ShapeError(f"shape {self.shape} has other axes than the leaves {leaves.shape}; give the same number")
        wide = values.dtype in (torch.float32, torch.float64)
        self.values = (values if wide else values.float()).detach().cpu().contiguous()
        self._samples = self.values.numpy().reshape(*values.shape[:2], *as_volume(sides, 1))
        self._start, self._stop, self._size = cells_of(self.leaves)
        self._single = self._unanimous()

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.values.shape[1]

    def tile(self, box: Box) -> UInt8[Tensor, "*B"] | int:
        """The classes of the pixels of a box ``(start, stop)`` of ``shape``; one number where all are the same."""
        box = check_box(box, self.shape)
        window, lines = (box, []) if self.shape == self.leaves.shape else self._below(box)
        which, found = self._touched(window)
        if found is not None:
            return found
        if not lines:
            return self._paint(window, which)
        values = unpatchify(self.values, self.leaves, mode="smooth", box=window)
        best = _between(values[0], lines)
        labels = torch.zeros(best.shape, dtype=torch.uint8)
        for label in range(1, self.num_classes):
            value = _between(values[label], lines)
            labels[value > best] = label
            best = torch.maximum(best, value)
        return labels

    def probability(self, box: Box) -> Float32[Tensor, "K *B"]:
        """The softmax of the values at the pixels of a box ``(start, stop)`` of ``shape``."""
        box = check_box(box, self.shape)
        window, lines = (box, []) if self.shape == self.leaves.shape else self._below(box)
        values = unpatchify(self.values, self.leaves, mode="smooth", box=window)
        if lines:
            values = torch.stack([_between(value, lines) for value in values])
        return values.float().softmax(0)

    def _touched(self, window: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[NDArray[np.int64], int | None]:
        """The leaves that have pixels in a window, and their class where it is one."""
        first, last = as_volume(window[0], 0), as_volume(window[1], 1)
        which = np.empty(len(self._start), np.int64)
        num, pixels = kernels.touched(self._start, self._stop, first, last, which)
        which = which[:num]
        single = self._single[which]
        covered = pixels == math.prod(int(b - a) for a, b in zip(first, last, strict=True))
        if num == 0:
            return which, 0
        alike = single[0] >= 0 and bool((single == single[0]).all())
        return which, int(single[0]) if alike and (covered or single[0] == 0) else None

    def _paint(self, window: tuple[tuple[int, ...], tuple[int, ...]], which: NDArray[np.int64]) -> Tensor:
        single = self._single[which]
        mixed = which[single < 0]
        halo = self._halo(mixed)
        row = np.cumsum(single < 0) - 1
        out = torch.zeros(tuple(b - a for a, b in zip(*window, strict=True)), dtype=torch.uint8)
        volume = out.numpy().reshape(as_volume(out.shape, 1))
        origin = as_volume(window[0], 0)
        cells = (self._start, self._size, self._stop)
        kernels.label_paint(self._samples, halo, row, single, *cells, which, origin, volume)
        return out

    def _halo(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples in and around some leaves, as volumes."""
        patch, num = self.values.shape[-1], self.leaves.num_dims
        rows = _own_where_empty(halo_rows(self.leaves, patch, which, True), torch.from_numpy(which), num)
        return rows.numpy().reshape(len(which), *as_volume((patch + 2,) * num, 1))

    def _unanimous(self) -> NDArray[np.int64]:
        single = np.empty(len(self.leaves), np.int64)
        flat = self._samples.reshape(*self.values.shape[:2], -1)
        each = max(1, _CHUNK // (self.values.shape[-1] + 2) ** self.leaves.num_dims)
        for first in range(0, len(single), each):
            which = np.arange(first, min(first + each, len(single)))
            halo = self._halo(which).reshape(len(which), -1)
            kernels.unanimous(flat, halo, _MARGIN, single[which[0] : which[-1] + 1])
        return single

    def _below(
        self, box: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], Lines]:
        """The pixels of the leaves' frame that a box of the other frame lies between, and where between them."""
        start, stop, lines = [], [], []
        for small, full, first, last in zip(self.leaves.shape, self.shape, *box, strict=True):
            at = ((torch.arange(first, last) + 0.5) * (small / full) - 0.5).clamp(0, small - 1)
            below = at.floor().long()
            above = (below + 1).clamp(max=small - 1)
            start.append(int(below[0]))
            stop.append(int(above[-1]) + 1)
            lines.append((below - start[-1], above - start[-1], at - below))
        return (tuple(start), tuple(stop)), lines


def _between(plane: Tensor, lines: Lines) -> Tensor:
    """Interpolate one class linearly, axis by axis."""
    for axis, (below, above, share) in enumerate(lines):
        weight = share.view([-1 if other == axis else 1 for other in range(plane.ndim)]).to(plane.dtype)
        plane = plane.index_select(axis, below) * (1 - weight) + plane.index_select(axis, above) * weight
    return plane
