"""Which tokens of a pack are still on their way through an encoder, and where the others left.

Legend: T tokens of a pack without prefixes, K of them alive, A alive tokens with prefixes, R tokens that left, D width.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveate.nn.attention import Packing
from foveate.nn.pruner import Pruned


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens that left the encoder at one point.

    Args:
        rows: their positions in the pack, ascending.
        x: the tokens.
        lengths: how many of them belong to each image, on the host.
    """

    rows: Int64[Tensor, " R"]
    x: Float[Tensor, "R D"]
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Trail:
    """The tokens that are alive at one place of the encoder, images in order, each behind its prefix tokens.

    Args:
        lengths: alive tokens of each image, prefixes not counted, on the host.
        num_prefix: prefix tokens of each image.
        rows: positions in the pack of the alive tokens; None: all of them.
        device: where indices live.
    """

    lengths: tuple[int, ...]
    num_prefix: int
    rows: Int64[Tensor, " K"] | None
    device: torch.device

    @property
    def packing(self) -> Packing:
        """Alive tokens of each image, prefixes counted."""
        return Packing(tuple(length + self.num_prefix for length in self.lengths), self.device)

    @property
    def positions(self) -> Int64[Tensor, " K"]:
        """``rows``, spelled out."""
        return torch.arange(sum(self.lengths), device=self.device) if self.rows is None else self.rows

    def with_prefix(self, x_KD: Tensor, prefix: Tensor) -> Tensor:
        """Put prefix tokens, ``[B, num_prefix, D]``, in front of each image's tokens."""
        images = zip(prefix, x_KD.split(list(self.lengths)), strict=True)
        return torch.cat([piece for pair in images for piece in pair]) if self.num_prefix else x_KD

    def take_apart(self, x_AD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[K, D]`` and prefix tokens ``[B, num_prefix, D]``."""
        images = x_AD.split(list(self.packing.lengths))
        prefix = torch.stack([image[: self.num_prefix] for image in images])
        return (torch.cat([image[self.num_prefix :] for image in images]) if self.num_prefix else x_AD), prefix

    def after(self, pruned: Pruned) -> "Trail":
        """The trail behind a prune point."""
        kept = pruned.split.kept[0]
        rows = kept if self.rows is None else self.rows.index_select(0, kept)
        return replace(self, lengths=pruned.packing.lengths, rows=rows)

    def part(self, x_KD: Tensor) -> Part:
        """The alive tokens as a part."""
        return Part(self.positions, x_KD, self.lengths)

    def left(self, pruned: Pruned, x_RD: Tensor) -> Part:
        """The tokens that a prune point sends away as a part."""
        gone = tuple(had - kept for had, kept in zip(self.lengths, pruned.packing.lengths, strict=True))
        return Part(self.positions.index_select(0, pruned.split.pruned[0]), x_RD, gone)
