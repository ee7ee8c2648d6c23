"""Neighbour tables of some leaves of a pack: their own samples, and the rim of other leaves' samples around them.

Legend: T leaves of a pack, A active leaves, p samples per side at a level, S = p^N samples of a leaf, H = (p+2)^N of
them with the halo, M rim samples, N dimensions. A *row* is leaf * S + sample, counted through the pack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry.kernels_rim import number_rows
from foveate.geometry.leaves import Leaves
from foveate.geometry.samples import halo_rows


@dataclass(frozen=True, eq=False)
class ActiveLevel:
    """One resolution of the active leaves.

    Args:
        side: p.
        rim: rows of other leaves' samples that are needed here, each once.
        index: what lies under each padded cell of every active leaf: a position in the active leaves' samples followed
            by the rim; -1 outside the image. Empty at the coarsest level, which nothing convolves.
        origin: for each rim sample the position of its parent in the rim of the level below, times 2^N, plus which of
            the parent's sub-samples it is. Empty at the coarsest level.
    """

    side: int
    rim: Int64[Tensor, " M"]
    index: Int[Tensor, "A H"]
    origin: Int64[Tensor, " M2"]

    def to(self, device: torch.device) -> "ActiveLevel":
        """The level on another device."""
        return ActiveLevel(self.side, self.rim.to(device), self.index.to(device), self.origin.to(device))


@torch.no_grad()
def active_levels(leaves: Sequence[Leaves], active: Int64[Tensor, " A"], sides: Sequence[int]) -> list[ActiveLevel]:
    """Tables of the active leaves at each resolution, coarse to fine; a level's rim holds the parents of the next one.

    Args:
        leaves: one per image, in the order of the pack.
        active: positions in the pack of the active leaves, ascending, on the CPU.
        sides: p of each level, doubling.

    Raises:
        ShapeError: ``active`` does not ascend, or leaves the pack.

    Cost: follows the active leaves: time and 4 bytes per padded sample of theirs, at the finest level foremost; while
    they are made, 4 bytes per sample of all leaves.
    """
    num_dims = leaves[0].num_dims
    total = sum(map(len, leaves))
    if len(active) and (bool((active.diff() <= 0).any()) or int(active[0]) < 0 or int(active[-1]) >= total):
        raise ShapeError(
            f"active leaves must ascend within 0..{total - 1}, got {len(active)} from {int(active[0])} to "
            f"{int(active[-1])}; sort them"
        )
    slot_T = torch.full((total,), -1, dtype=torch.int64)
    slot_T[active] = torch.arange(len(active))
    levels: list[ActiveLevel] = []
    parent_M = part_M = active.new_empty(0)  # of the rim of the level above
    for level, side in reversed(list(enumerate(sides))):
        book = _Book(slot_T, len(active), side**num_dims)
        index_AH = (
            torch.cat([book.find(*rows) for rows in _halo(leaves, active, side)]) if level else active.new_empty(0)
        )
        origin_M = book.find(parent_M) - book.first
        if levels:
            levels[-1] = replace(levels[-1], origin=origin_M * 2**num_dims + part_M)
        rim = book.rim
        levels.append(ActiveLevel(side, rim, index_AH.view(-1, (side + 2) ** num_dims), active.new_empty(0)))
        parent_M, part_M = _parents(rim, side, num_dims)
    return levels[::-1]


def _halo(leaves: Sequence[Leaves], active: Tensor, side: int) -> Iterator[tuple[Tensor, int]]:
    """Rows under the padded cells of the active leaves of each image, -1 outside, and the image's first row."""
    first = 0
    for one in leaves:
        own = active[(active >= first) & (active < first + len(one))] - first
        yield halo_rows(one, side, own.numpy(), repeat=False).flatten(), first * side**one.num_dims
        first += len(one)


class _Book:
    """Where the samples of a level are found: those of active leaves by slot, then others in the order asked for."""

    def __init__(self, slot_T: Tensor, num_active: int, samples: int) -> None:
        self.slot_T, self.samples, self.first = slot_T, samples, num_active * samples
        self.number = torch.full((len(slot_T) * samples,), -1, dtype=torch.int32)
        self.rim = slot_T.new_empty(0)

    def find(self, row_Q: Tensor, offset: int = 0) -> Tensor:
        """Positions of rows; -1 stays -1."""
        rim, index_Q = row_Q.new_empty(len(self.rim) + len(row_Q)), torch.empty(len(row_Q), dtype=torch.int32)
        rim[: len(self.rim)] = self.rim
        slot, number, listed, index = (part.numpy() for part in (self.slot_T, self.number, rim, index_Q))
        count = number_rows(row_Q.numpy(), offset, self.samples, slot, self.first, number, listed, len(self.rim), index)
        self.rim = rim[:count].clone()
        return index_Q


def _parents(row_M: Tensor, side: int, num_dims: int) -> tuple[Tensor, Tensor]:
    """Row of each sample's parent at half the resolution, and which of its sub-samples it is."""
    parent_M, part_M = row_M // side**num_dims, torch.zeros_like(row_M)
    for axis in range(num_dims):
        at_M = row_M // side ** (num_dims - 1 - axis) % side
        parent_M, part_M = parent_M * (side // 2) + at_M // 2, part_M * 2 + at_M % 2
    return parent_M, part_M
