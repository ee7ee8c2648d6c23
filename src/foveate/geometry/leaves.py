"""Leaves: a disjoint set of cells of an image, the value that every other part reads.

Legend: L leaves, N spatial axes (2 or 3), Q points.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped
from torch import Tensor

from foveate.errors import BudgetError, FormatError, ShapeError
from foveate.geometry.boxes import Sizes, cell_code, check_shape, check_size, check_sizes, run_lengths


@dataclass(frozen=True, eq=False)
class Leaves:
    """Disjoint cells of one image, in the order in which the model reads them.

    Every cell lies on the grid of its own size, counted from the image's first pixel. A border cell may reach past
    the image; its *valid* part is what lies inside.

    Args:
        start: first pixel of each cell, level-0 pixels, array order, inside the image.
        size: full extent of each cell in pixels, also past the border.
        scale: index of each cell's size in ``sizes``; for cubic cells size = min_size * 2**scale.
        shape: spatial shape of the image in pixels.
        sizes: cell size per scale, finest first; every axis stays or doubles from one scale to the next.

    Raises:
        ShapeError: a tensor has the wrong shape or type, or a cell is off its grid or outside the image.
    """

    start: Int64[Tensor, "L N"]
    size: Int64[Tensor, "L N"]
    scale: Int64[Tensor, " L"]
    shape: tuple[int, ...]
    sizes: Sizes

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape(self.shape))
        object.__setattr__(self, "sizes", check_sizes(self.sizes))
        num = len(self.shape)
        for name, tensor, expected in (
            ("start", self.start, (len(self.scale), num)),
            ("size", self.size, (len(self.scale), num)),
            ("scale", self.scale, (len(self.scale),)),
        ):
            if tensor.shape != expected or tensor.dtype != torch.int64:
                raise ShapeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; leaves need int64 {expected}")
        if any(len(size) != num for size in self.sizes):
            raise ShapeError(f"sizes={self.sizes} must have {num} values each for an image of shape {self.shape}")
        if len(self) == 0:
            return
        if int(self.scale.min()) < 0 or int(self.scale.max()) >= len(self.sizes):
            raise ShapeError(f"scale must lie in [0, {len(self.sizes) - 1}], got up to {int(self.scale.max())}")
        if not torch.equal(self.size, self._of_scale(self.sizes)):
            raise ShapeError(f"size must be sizes[scale] with sizes={self.sizes}; build leaves with uniform_leaves")
        inside = (self.start >= 0) & (self.start < self._extent)
        if not bool((inside & (self.start % self.size == 0)).all()):
            raise ShapeError(f"every start must be a multiple of its size inside the image {self.shape}")

    def __len__(self) -> int:
        return self.scale.shape[0]

    def __repr__(self) -> str:
        return f"Leaves({len(self)} of {self.sizes[0]} to {self.sizes[-1]} pixels in an image of {self.shape})"

    def _of_scale(self, table: Sequence[object]) -> Tensor:
        return torch.tensor(table, dtype=torch.int64, device=self.scale.device)[self.scale]

    @property
    def _extent(self) -> Tensor:
        return torch.tensor(self.shape, dtype=torch.int64, device=self.start.device)

    @property
    def num_dims(self) -> int:
        """Number of spatial axes, 2 or 3."""
        return len(self.shape)

    @property
    def min_size(self) -> tuple[int, ...]:
        """Size of the finest possible cell in pixels."""
        return self.sizes[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.start.device

    @cached_property
    def stop(self) -> Int64[Tensor, "L N"]:
        """One past the last valid pixel of each cell: the full cell clipped to the image."""
        return torch.minimum(self.start + self.size, self._extent)

    @cached_property
    def boxes(self) -> Int64[Tensor, "L 2 N"]:
        """Valid part of each cell as (start, stop) in level-0 pixels."""
        return torch.stack([self.start, self.stop], dim=1)

    @cached_property
    def area(self) -> Int64[Tensor, " L"]:
        """Valid pixels in each cell."""
        return (self.stop - self.start).prod(dim=-1)

    @cached_property
    def centre(self) -> Float32[Tensor, "L N"]:
        """Middle of each full cell in level-0 pixels; pixel i covers [i, i + 1)."""
        return (self.start.double() + self.size.double() / 2).float()

    @cached_property
    def _codes(self) -> tuple[Tensor, Tensor]:
        least = torch.tensor(self.min_size, dtype=torch.int64, device=self.device)
        code, order = cell_code(self.start // least, self.shape, self.sizes).sort()
        return code, order

    def locate(self, points: Shaped[Tensor, "Q N"]) -> Int64[Tensor, " Q"]:
        """Return the leaf under each point.

        Args:
            points: level-0 pixel coordinates, array order, integer or real; pixel i covers [i, i + 1).

        Returns:
            Index of the leaf, -1 where the point is outside the image or in no leaf (after ``select``).

        Cost: O((Q + L) log L) time for the first call, O(Q log L) then.
        """
        pixel = (points.floor() if points.is_floating_point() else points).long()
        inside = ((pixel >= 0) & (pixel < self._extent)).all(dim=-1)
        return torch.where(inside, self.cell_at(pixel), -1)

    def cell_at(self, pixel: Int64[Tensor, "Q N"]) -> Int64[Tensor, " Q"]:
        """Return the leaf whose full cell holds each pixel, also past the image border; -1 where there is none."""
        if len(self) == 0:
            return torch.full(pixel.shape[:1], -1, dtype=torch.int64, device=pixel.device)
        least, most = torch.tensor((self.sizes[0], self.sizes[-1]), dtype=torch.int64, device=self.device)
        codes, order = self._codes
        near = torch.minimum(pixel.clamp(min=0), -(-self._extent // most) * most - 1)
        slot = torch.searchsorted(codes, cell_code(near // least, self.shape, self.sizes), right=True) - 1
        leaf = order[slot.clamp(min=0)]
        start = self.start[leaf]
        return torch.where(((pixel >= start) & (pixel < start + self.size[leaf])).all(dim=-1), leaf, -1)

    def covers(self) -> bool:
        """Say whether the leaves are disjoint and together hold every pixel of the image."""
        return self._disjoint() and int(self.area.sum()) == int(self._extent.prod())

    def _disjoint(self) -> bool:
        codes, order = self._codes
        return bool((codes[:-1] + self._of_scale(run_lengths(self.sizes))[order][:-1] <= codes[1:]).all())

    def select(self, index: Int64[Tensor, " K"] | Bool[Tensor, " L"]) -> "Leaves":
        """Return some of the leaves, in the order of ``index`` (positions, or one truth value per leaf)."""
        return Leaves(self.start[index], self.size[index], self.scale[index], self.shape, self.sizes)

    def to(self, device: torch.device | str) -> "Leaves":
        """Return the leaves on another device."""
        if self.device == torch.device(device):
            return self
        return Leaves(self.start.to(device), self.size.to(device), self.scale.to(device), self.shape, self.sizes)

    def save(self, path: str | Path) -> None:
        """Write the leaves to a small ``.npz`` file; an interrupted write leaves the old file as it was.

        Args:
            path: the file to write, replaced as a whole.

        Cost: about 9 bytes per leaf and axis before compression.
        """
        path = Path(path)
        head = json.dumps({"shape": self.shape, "sizes": self.sizes})
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file,
                    head=np.frombuffer(head.encode(), np.uint8),
                    start=self.start.cpu().numpy(),
                    scale=self.scale.cpu().numpy().astype(np.uint8),
                )
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Leaves":
        """Read leaves that ``save`` wrote.

        Raises:
            FormatError: the file is not one of ours, is cut short, or its leaves overlap.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                head = json.loads(data["head"].tobytes())
                start, scale = torch.from_numpy(data["start"]), torch.from_numpy(data["scale"]).long()
            size = torch.tensor(head["sizes"], dtype=torch.int64)[scale]
            leaves = cls(start, size, scale, tuple(head["shape"]), tuple(tuple(side) for side in head["sizes"]))
        except (KeyError, IndexError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise FormatError(f"{path} holds no leaves ({error}); write it again with Leaves.save") from error
        if not leaves._disjoint():
            raise FormatError(f"{path} holds leaves that overlap; write it again with Leaves.save")
        return leaves


def uniform_leaves(shape: Sequence[int], size: int | Sequence[int] = 16) -> Leaves:
    """Cut an image into equal cells in raster order: the token order of a plain ViT.

    Args:
        shape: spatial shape of the image in pixels, (H, W) or (D, H, W).
        size: side of a cell in pixels, or one value per axis. Cells at the border reach past the image.

    Returns:
        Leaves that cover the image.

    Raises:
        ShapeError: the shape or the size is not possible.
        BudgetError: there would be more than 2**31 cells.
    """
    shape = check_shape(shape)
    cell = check_size(size, len(shape))
    counts = [-(-extent // side) for extent, side in zip(shape, cell, strict=True)]
    total = int(np.prod(counts, dtype=object))
    if total >= 1 << 31:
        raise BudgetError(f"size={size} cuts an image of {shape} into {total} leaves; use a size that gives < 2**31")
    axes = [torch.arange(count, dtype=torch.int64) * side for count, side in zip(counts, cell, strict=True)]
    start = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    full = torch.tensor(cell, dtype=torch.int64).expand(total, -1).contiguous()
    return Leaves(start, full, torch.zeros(total, dtype=torch.int64), shape, (cell,))
