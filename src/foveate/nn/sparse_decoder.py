"""A decoder whose cost follows the active leaves: coarse for every leaf, at full resolution where tokens are alive.

Legend: T leaves of a pack, A active leaves, P samples per side of a patch, Q of the trunk, p at a stage, S = p^N,
M rim samples, C channels of a stage, D token width, K classes, N dimensions.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError
from foveate.geometry.patches import Patches
from foveate.nn.active import ActiveLevel, active_levels
from foveate.nn.halo import HaloMaps, by_chunks, halo_pad
from foveate.nn.stages import HaloBlock, check_hidden, check_settings, double, log_scale

COARSE = 4  # samples of a patch per sample of the trunk and axis
RANK = 128  # numbers through which a token becomes the samples of its leaf


@dataclass(frozen=True, eq=False)
class SparseLogits:
    """Logits of a pack before they are painted: coarse ones of every leaf, and what active leaves add to them.

    Args:
        coarse: one per sample of the trunk.
        fine: added to the interpolated coarse logits of the active leaves.
        active: positions of the active leaves in the pack.
        spread: share of every coarse sample in each sample of a patch.
    """

    coarse: Float[Tensor, "T K Q_N"]
    fine: Float[Tensor, "A K P_N"]
    active: Int64[Tensor, " A"]
    spread: Float[Tensor, "Q_N P_N"]

    def dense(self) -> Float[Tensor, "T K P_N"]:
        """Logits of every sample. Cost: 2 T K P^N Q^N FLOPs."""
        logits = self.coarse @ self.spread.to(self.coarse.dtype)
        return logits.index_add_(0, self.active, self.fine.to(logits.dtype)) if len(self.active) else logits


class SparseDecoder(nn.Module):
    """Decode every leaf at a quarter of its resolution, and the active leaves at half and at full resolution.

    The trunk turns the tokens into Q = P / 4 samples per side and leaf and convolves them across all leaves. From there
    each stage doubles the resolution inside the active leaves, adds their pixels, and passes a residual convolution.
    Other leaves show their coarse logits, interpolated within the leaf.

    *Halo rule.* An active leaf reads one sample beyond its border. Where an active leaf lies there, it is that leaf's
    own sample, so that with all leaves active the stages are dense convolutions. Where another leaf lies, it is the
    sample that this leaf would have without the convolutions of the stages: the trunk's features doubled, plus pixels.
    It is made for the samples that are read and for no others. The convolutions of the first stage are therefore
    exact everywhere; those of the second lack, in a ring of one sample, one residual of the first.

    Args:
        num_dims: N, 2 or 3.
        in_chans: channels of the patches.
        num_classes: K.
        width: D of the tokens.
        patch_size: P, a power of two.
        num_hidden: hidden states handed over; the trunk reads all of them.
        channels: C at full resolution; twice as many at half, four times as many in the trunk.

    Raises:
        ConfigError: an impossible setting.

    Cost: trunk 2 * 3^N * (4 C)^2 FLOPs per coarse sample; per active sample 2 * 3^N * C^2, and half as much again (in
    2-D as much again) at half resolution. Logits of all samples are the floor: `decode` gives them unpainted.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, whose decoder is a dense UNETR and half of the sparse forward.
    **Differs**: only leaves whose tokens stayed are decoded at full resolution; norms per sample, not per instance.
    """

    wants_active = True
    linear: Tensor

    def __init__(
        self,
        *,
        num_dims: int,
        in_chans: int,
        num_classes: int,
        width: int,
        patch_size: int,
        num_hidden: int,
        channels: int = 16,
    ) -> None:
        super().__init__()
        check_settings(num_dims, num_classes, patch_size, num_hidden, channels)
        if patch_size & (patch_size - 1):
            raise ConfigError(
                f"patch_size={patch_size}: the sparse decoder doubles resolution up to patch_size, which must be a "
                f"power of two; use {2 ** (patch_size.bit_length() - 1)} or decoder='linear'"
            )
        self.num_dims, self.num_classes, self.patch_size = num_dims, num_classes, patch_size
        self.num_hidden = num_hidden
        self.side = max(1, patch_size // COARSE)
        self.sides = [self.side << step for step in range((patch_size // self.side).bit_length())]
        chans = [channels * patch_size // side for side in self.sides]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_hidden))
        self.narrow = nn.ModuleList(nn.Linear(width, min(width, RANK), bias=False) for _ in range(num_hidden))
        self.spread = nn.Linear(min(width, RANK), chans[0] * self.side**num_dims)
        self.block = HaloBlock(num_dims, chans[0])
        self.coarse = nn.Linear(chans[0], num_classes)
        self.stages = nn.ModuleList(
            _FineStage(num_dims, in_chans * (patch_size // side) ** num_dims, below, own, side)
            for side, below, own in zip(self.sides[1:], chans, chans[1:], strict=False)
        )
        self.fine = nn.Linear(chans[-1], num_classes)
        self.register_buffer("linear", _interpolation(self.side, patch_size, num_dims), persistent=False)

    def forward(
        self,
        hidden: tuple[Float[Tensor, "T D"], ...],
        patches: Patches,
        active: Int64[Tensor, " A"] | None = None,
    ) -> Float[Tensor, "T K *P"]:
        """Logits of every sample, packed as ``patches.pixels``; see `decode`."""
        logits = self.decode(hidden, patches, active).dense()
        return logits.view(-1, self.num_classes, *(self.patch_size,) * self.num_dims)

    def decode(
        self,
        hidden: tuple[Float[Tensor, "T D"], ...],
        patches: Patches,
        active: Int64[Tensor, " A"] | None = None,
    ) -> SparseLogits:
        """Logits that are not painted yet.

        Args:
            hidden: features of the patch tokens after the chosen blocks, shallow to deep.
            patches: what the tokens were made of.
            active: ascending positions in the pack of the leaves to decode at full resolution; None: all.

        Raises:
            ShapeError: hidden states or patches that the decoder was not built for.
        """
        check_hidden(hidden, patches, self.num_hidden, self.patch_size)
        device = patches.pixels.device
        active = torch.arange(len(patches.pixels)) if active is None else active.cpu()
        scale_TN = log_scale(patches.leaves, self.patch_size).to(device, self.coarse.weight.dtype)
        trunk_RC = self._trunk(hidden, patches, scale_TN)
        coarse = self.coarse(trunk_RC).view(len(scale_TN), -1, self.num_classes).transpose(1, 2)
        fine = coarse.new_empty(0, self.num_classes, self.patch_size**self.num_dims)
        if len(active):
            fine = self._fine(trunk_RC, patches, active, scale_TN)
        return SparseLogits(coarse, fine, active.to(device), self.linear)

    def _fine(self, trunk_RC: Tensor, patches: Patches, active: Tensor, scale_TN: Tensor) -> Tensor:
        """What the stages add to the logits of the active leaves, "A K P^N"."""
        levels = [level.to(trunk_RC.device) for level in active_levels(patches.leaves, active, self.sides)]
        active = active.to(trunk_RC.device)
        pixels = patches.pixels.to(self.coarse.weight.dtype)
        own_RC = trunk_RC.view(len(scale_TN), -1).index_select(0, active).view(-1, trunk_RC.shape[1])
        rim_MC = trunk_RC.index_select(0, levels[0].rim)
        scale_AN = scale_TN.index_select(0, active)
        for stage, level in zip(self.stages, levels[1:], strict=True):
            own_RC, rim_MC = stage(own_RC, rim_MC, pixels, active, scale_AN, level)
        logits: Tensor = self.fine(own_RC)
        return logits.view(len(active), -1, self.num_classes).transpose(1, 2).contiguous()

    def _trunk(self, hidden: tuple[Tensor, ...], patches: Patches, scale_TN: Tensor) -> Tensor:
        """Features of all leaves at a quarter of the resolution, rows "T * Q^N C"."""
        parts = [narrow(norm(x_TD)) for norm, narrow, x_TD in zip(self.norms, self.narrow, hidden, strict=True)]
        x_RC = self.spread(reduce(torch.add, parts)).view(-1, self.coarse.in_features)
        index_TH = HaloMaps(patches.leaves, x_RC.device).at(self.side)
        samples = self.side**self.num_dims

        def refine(start: int, stop: int) -> Tensor:
            padded = halo_pad(x_RC, index_TH[start:stop])
            out: Tensor = x_RC[start * samples : stop * samples] + self.block(padded, scale_TN[start:stop])
            return out

        return by_chunks(refine, len(scale_TN), samples, x_RC.shape[1])


class _FineStage(nn.Module):
    """One resolution of the active leaves: double what lies below, add the pixels, convolve across leaves."""

    def __init__(self, num_dims: int, in_chans: int, below: int, channels: int, side: int) -> None:
        super().__init__()
        self.num_dims, self.channels, self.side = num_dims, channels, side
        self.up = nn.Linear(below, channels * 2**num_dims)
        self.stem = nn.Linear(in_chans, channels)
        self.block = HaloBlock(num_dims, channels)

    def forward(
        self, own_RC: Tensor, rim_MC: Tensor, pixels: Tensor, active: Tensor, scale_AN: Tensor, level: ActiveLevel
    ) -> tuple[Tensor, Tensor]:
        """Samples of the active leaves and of their rim at this resolution, from those at half of it."""
        blocks = _pixel_blocks(pixels, self.side)
        own_RC = double(self.up(own_RC), self.side // 2, self.num_dims)
        own_RC = own_RC + functional.gelu(self.stem(blocks.index_select(0, active).view(len(own_RC), -1)))
        rim_MC = self.up(rim_MC).view(-1, self.channels).index_select(0, level.origin)
        rim_MC = rim_MC + functional.gelu(self.stem(_blocks_at(blocks, level.rim, self.side)))
        x_RC = torch.cat([own_RC, rim_MC]) if len(rim_MC) else own_RC
        samples = self.side**self.num_dims

        def refine(start: int, stop: int) -> Tensor:
            padded = halo_pad(x_RC, level.index[start:stop])
            out: Tensor = own_RC[start * samples : stop * samples] + self.block(padded, scale_AN[start:stop])
            return out

        return by_chunks(refine, len(active), samples, self.channels), rim_MC


def _pixel_blocks(pixels: Tensor, side: int) -> Tensor:
    """A view of patches "T C *P" as "T *side *step C": the pixels under each of side^N samples."""
    num_dims = pixels.ndim - 2
    step = pixels.shape[-1] // side
    cut = pixels.view(*pixels.shape[:2], *(side, step) * num_dims)
    return cut.permute(0, *range(2, 2 + 2 * num_dims, 2), *range(3, 3 + 2 * num_dims, 2), 1)


def _blocks_at(blocks: Tensor, row_M: Tensor, side: int) -> Tensor:
    """The pixels under some samples, "M step^N C"."""
    num_dims = (blocks.ndim - 2) // 2
    at = [row_M // side ** (num_dims - 1 - axis) % side for axis in range(num_dims)]
    return blocks[(row_M // side**num_dims, *at)].flatten(1)


def _interpolation(side: int, patch_size: int, num_dims: int) -> Tensor:
    """Share of each of ``side``^N samples of a leaf in each of its P^N samples, linear between their centres."""
    at_P = ((torch.arange(patch_size) + 0.5) * (side / patch_size) - 0.5).clamp(0, side - 1)
    share_QP = (1 - (torch.arange(side)[:, None] - at_P).abs()).clamp_min(0)
    return reduce(torch.kron, [share_QP] * num_dims)
