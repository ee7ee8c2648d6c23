"""Bags of patches that can be read by index: what a selector streams, whatever the patches are made of.

Legend: N patches, R patches that are read, C channels, F features, D spatial axes, P sides of a patch, S spatial shape.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry.boxes import check_size
from foveate.geometry.image import plain
from foveate.geometry.lazy_tree import plan_stages
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import patchify
from foveate.geometry.samples import check_patch_size
from foveate.geometry.source import Source
from foveate.geometry.windows import full_shape, read_windows

Ints = NDArray[np.int64]
_MOST_PIXELS = 1 << 22  # of leaves that are read at a time


@runtime_checkable
class PatchSource(Protocol):
    """A bag of N patches of one image, or of none, that can be read by index: any number of times, in any order.

    A source that can tell without reading which of its patches are one and the same (blank ones) may say so as
    ``constant``, see `constant_of`.
    """

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Spatial shape *S of level 0 of the image; None where there is none."""
        ...

    def __len__(self) -> int: ...

    @property
    def boxes(self) -> Int64[Tensor, "N 2 D"] | None:
        """Where each patch lies, (start, stop) in level-0 pixels inside the image; None where nobody said it."""
        ...

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R *rest"]:
        """Returns the patches at ``index``: pixels ``[R, C, *P]``, uint8 or float, or features ``[R, F]``."""
        ...


def constant_of(source: PatchSource) -> Bool[Tensor, " N"] | None:
    """Which patches are known, without reading them, to be all the same constant; None where a source cannot tell."""
    known: Tensor | None = getattr(source, "constant", None)
    return known


def check_index(index: Tensor, num_patches: int) -> Tensor:
    """Returns the positions that a source is asked for, on the CPU.

    Raises:
        ShapeError: not int64 ``[R]``, or outside the bag.
    """
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ShapeError(f"index is {index.dtype} {tuple(index.shape)}; give int64 positions [R]")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_patches:
        raise ShapeError(
            f"index from {int(index.min())} to {int(index.max())} in a bag of {num_patches} patches; "
            f"positions count from 0 to {num_patches - 1}"
        )
    return index.cpu()


def block_order(boxes: Int64[Tensor, "N 2 D"], chunk: int) -> Int64[Tensor, " N"]:
    """An order in which chunks are compact blocks of neighbours, so that storage tiles are decoded least often.

    Args:
        boxes: of patches of about one size, in level-0 pixels.
        chunk: patches read at a time.
    """
    if not len(boxes):
        return torch.arange(0)
    centre = boxes.double().mean(1)
    extent = (boxes[:, 1] - boxes[:, 0]).max(0).values
    block = (centre // (extent * max(1, round(chunk ** (1 / boxes.shape[2]))))).long()
    order = torch.arange(len(boxes))
    for key in (*centre.unbind(1)[::-1], *block.unbind(1)[::-1]):  # the last one counts most
        order = order[key[order].sort(stable=True).indices]
    return order


class TensorPatches:
    """Patches or features that are held.

    Args:
        values: pixels ``[N, C, *P]``, uint8 or float, or features ``[N, F]``; N may be 0.
        boxes: where each lies, level-0 pixels.
        shape: spatial shape of the image that they are from, in pixels.
        constant: which of them are one and the same constant, see `constant_of`.

    Raises:
        ShapeError: values, boxes, shape and constant do not fit each other.
    """

    def __init__(
        self,
        values: Shaped[Tensor, "N *rest"] | Shaped[np.ndarray, "N *rest"],
        boxes: Int64[Tensor, "N 2 D"] | None = None,
        shape: Sequence[int] | None = None,
        constant: Bool[Tensor, " N"] | None = None,
    ) -> None:
        self._values = torch.as_tensor(values)
        if self._values.ndim not in (2, 4, 5):
            raise ShapeError(f"bag of shape {tuple(self._values.shape)}; give [N, C, P, P(, P)] pixels or [N, F]")
        self.shape = None if shape is None else tuple(int(side) for side in shape)
        check_boxes(boxes, len(self._values), self.shape)
        if constant is not None and len(constant) != len(self._values):
            raise ShapeError(f"constant of {len(constant)} for {len(self._values)} patches; give each one truth value")
        self._boxes, self.constant = boxes, constant

    def __len__(self) -> int:
        return len(self._values)

    @property
    def boxes(self) -> Int64[Tensor, "N 2 D"] | None:
        """As given."""
        return self._boxes

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R *rest"]:
        """Returns the patches at ``index``, in the type that they are held in."""
        return self._values[check_index(index, len(self)).to(self._values.device)]


def check_boxes(boxes: Tensor | None, num_patches: int, shape: tuple[int, ...] | None) -> None:
    """Refuses boxes that are not one ``(start, stop)`` per patch inside the image.

    Raises:
        ShapeError: other type, number or axes, empty boxes, or boxes that leave the image.
    """
    if boxes is None:
        return
    dims = (2, 3) if shape is None else (len(shape),)
    if boxes.dtype != torch.int64 or boxes.ndim != 3 or boxes.shape[1] != 2 or boxes.shape[2] not in dims:
        of = "" if shape is None else f" of an image of {shape}"
        raise ShapeError(f"boxes are {boxes.dtype} {tuple(boxes.shape)}; give int64 [N, 2, D], start and stop{of}")
    if len(boxes) != num_patches:
        raise ShapeError(f"{len(boxes)} boxes for {num_patches} patches; give each patch its box")
    start, stop = boxes.unbind(1)
    inside = (start >= 0) & (start < stop)
    if shape is not None:
        inside &= stop <= torch.tensor(shape)
    if not bool(inside.all()):
        bad = int((~inside).any(dim=1).nonzero()[0])
        where = "" if shape is None else f" of {shape}"
        raise ShapeError(f"box {bad} is {boxes[bad].tolist()}; give 0 <= start < stop inside the image{where}")


class GridPatches:
    """A regular grid of patches over an image, read when asked for.

    The grid covers the image: where the last patch of a row or column reaches beyond the edge, the image's last pixels
    are repeated, and its box ends at the edge.

    Args:
        source: image or volume of any size.
        patch_size: side of a patch in pixels of the level, or one per axis.
        stride: distance between the starts of neighbours in pixels of the level, at most ``patch_size``, which it is
            by default.
        level: which level the pixels are from; boxes are in level-0 pixels all the same.
        keep: one truth value per cell of the grid (``grid``, row by row), such as where tissue is. The bag holds these
            alone; of the others no pixel is read.

    Raises:
        ShapeError: a size, the level or ``keep`` does not fit the image.

    Cost: `read` decodes each storage tile at most once per call, so long chunks of neighbours cost least.
    """

    def __init__(
        self,
        source: Source,
        patch_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] | None = None,
        level: int = 0,
        keep: Bool[Tensor, " M"] | None = None,
    ) -> None:
        num = len(source.shape)
        if not 0 <= level < len(source.levels):
            raise ShapeError(f"level {level} of a source of {len(source.levels)}; give 0 to {len(source.levels) - 1}")
        self.source, self.level, self.shape = source, level, tuple(source.shape)
        self.patch_size = check_size(patch_size, num, "patch_size")
        self.stride = self.patch_size if stride is None else check_size(stride, num, "stride")
        if any(step > side for step, side in zip(self.stride, self.patch_size, strict=True)):
            raise ShapeError(
                f"stride={self.stride} above patch_size={self.patch_size} would leave pixels out; lower it"
            )
        self._full = full_shape(source, level)
        sides = zip(self._full, self.patch_size, self.stride, strict=True)
        self.grid = tuple(max(0, -(-(full - side) // step)) + 1 for full, side, step in sides)
        """Number of patches along each axis, before ``keep``."""
        cells = np.stack(np.unravel_index(np.arange(int(np.prod(self.grid))), self.grid), axis=1)
        if keep is not None:
            if keep.dtype != torch.bool or tuple(keep.shape) != (len(cells),):
                raise ShapeError(
                    f"keep is {keep.dtype} {tuple(keep.shape)}; give one bool for each of the {len(cells)} patches "
                    f"of the grid {self.grid}"
                )
            cells = cells[keep.cpu().numpy()]
        self._start: Ints = cells * np.array(self.stride)

    def __len__(self) -> int:
        return len(self._start)

    @cached_property
    def boxes(self) -> Int64[Tensor, "N 2 D"]:
        """The part of each patch that lies inside the image, in level-0 pixels."""
        step = np.array(self.source.downsamples[self.level])
        stop = np.minimum(self._start + np.array(self.patch_size), np.array(self._full))
        low = np.floor(self._start * step + 1e-9).astype(np.int64)
        high = np.minimum(np.ceil(stop * step - 1e-9).astype(np.int64), np.array(self.shape))
        return torch.from_numpy(np.stack([low, high], axis=1))

    @cached_property
    def constant(self) -> Bool[Tensor, " N"] | None:
        """Patches that hold background alone, where the source can tell so from its storage, else None."""
        blank = getattr(self.source, "blank", None)
        if blank is None or self.level != 0:
            return None
        return torch.from_numpy(blank(self.boxes.numpy()))

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R C *P"]:
        """Returns the patches at ``index``: uint8 where the image is, else float32."""
        start = self._start[check_index(index, len(self)).numpy()]
        return _as_pixels(read_windows(self.source, start, self.patch_size, self.level))


class LeavesPatches:
    """The leaves of an image as patches of one size, resampled when asked for.

    Args:
        image: an image ``[C, *S]`` that is held, or a source. A leaf of a source is resampled from the coarsest level
            whose pixels divide its samples.
        leaves: cells of that image.
        patch_size: samples per side, P >= 1.

    Raises:
        ShapeError: the leaves are of another image, or ``patch_size`` is below 1.
    """

    def __init__(self, image: Source | Shaped[Tensor, "C *S"], leaves: Leaves, patch_size: int = 16) -> None:
        check_patch_size(patch_size)
        shape = tuple(image.shape[1:] if isinstance(image, Tensor) else image.shape)
        if shape != leaves.shape:
            raise ShapeError(f"leaves of an image of {leaves.shape} for one of {shape}; cut this image's own leaves")
        self.image, self.leaves, self.patch_size, self.shape = image, leaves.to("cpu"), patch_size, leaves.shape

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def boxes(self) -> Int64[Tensor, "N 2 D"]:
        """Valid part of each leaf."""
        return self.leaves.boxes

    def read(self, index: Int64[Tensor, " R"]) -> Shaped[Tensor, "R C *P"]:
        """Returns the samples of the leaves at ``index``, float32."""
        only, back = check_index(index, len(self)).unique(return_inverse=True)
        some = self.leaves.select(only)
        if isinstance(self.image, Tensor):
            return patchify(self.image, some, self.patch_size).pixels[back]
        out = torch.empty((len(some), self.image.channels, *(self.patch_size,) * len(self.shape)))
        for stage in plan_stages(self.image, some.sizes, (self.patch_size,) * len(self.shape)):
            step = np.array(stage.step)
            full = np.array(full_shape(self.image, stage.level))
            for scale in range(stage.low, stage.high + 1):
                which = (some.scale == scale).nonzero()[:, 0].numpy()
                size = np.array(some.sizes[scale]) // step
                start = some.start.numpy()[which] // step
                for rows in np.array_split(
                    np.arange(len(which)), max(1, len(which) * int(size.prod()) // _MOST_PIXELS)
                ):
                    pixels = read_windows(self.image, start[rows], size.tolist(), stage.level)
                    valid = np.minimum(full - start[rows], size)
                    out[torch.from_numpy(which[rows])] = _resampled(pixels, valid, self.patch_size)
        return out[back]


def _resampled(pixels: NDArray[Any], valid: Ints, patch_size: int) -> Tensor:
    """Samples ``[R, C, *P]`` of cells of one size, each of which counts as far as it is valid."""
    size = pixels.shape[2:]
    out = torch.empty((*pixels.shape[:2], *(patch_size,) * len(size)))
    for side in np.unique(valid, axis=0):
        same = np.flatnonzero((valid == side).all(axis=1))
        part = pixels[same][(slice(None), slice(None), *map(slice, side.tolist()))]
        whole = [axis for axis, (have, full) in enumerate(zip(side, size, strict=True)) if have == full]
        axis = whole[0] if whole else 0
        for rows in [np.arange(len(same))] if whole else np.arange(len(same))[:, None]:
            stack = np.concatenate(list(part[rows]), axis=1 + axis)
            start = torch.zeros(len(rows), len(size), dtype=torch.int64)
            start[:, axis] = torch.arange(len(rows)) * size[axis]
            scale = torch.zeros(len(rows), dtype=torch.int64)
            cells = Leaves(start, torch.tensor(size).repeat(len(rows), 1), scale, stack.shape[1:], (tuple(size),))
            out[torch.from_numpy(same[rows])] = patchify(stack, cells, patch_size).pixels
    return out


def _as_pixels(array: NDArray[Any]) -> Tensor:
    """Pixels in one of the two types that encoders take."""
    array = plain(array)
    return torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))
