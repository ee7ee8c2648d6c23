"""Tokens to samples, at a cost that follows the tokens: a linear head per leaf, and a pyramid of leaf convolutions.

Legend: T leaves of a pack, n leaves of a chunk, P samples per side of a patch, p at a stage of the pyramid, S = p^N,
R = T * S rows, C channels of a stage, D token width, K classes, N dimensions.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError
from foveate.geometry.patches import Patches
from foveate.nn.halo import HaloConv, HaloMaps, by_chunks, halo_pad
from foveate.nn.stages import HaloBlock, check_hidden, check_settings, double, log_scale

MAX_RANK = 128  # of a skip from tokens to samples: D x C x p^N weights would dwarf the encoder in 3-D
MAX_GROWTH = 8  # of the channels towards one sample per leaf, as in UNETR


class LinearDecoder(nn.Module):
    """Logits of every leaf from its own token: the cheapest head, blind to the neighbours.

    Args:
        num_dims: N, 2 or 3.
        in_chans: Channels of the patches; unused, every decoder takes the same settings.
        num_classes: K.
        width: D of the tokens.
        patch_size: P.
        num_hidden: How many hidden states the encoder hands over; only the deepest is read.
        channels: Unused, as ``in_chans``.

    Source: APF (arXiv 2404.09707) decodes the strip of tokens with a dense head. **Differs**: one linear map per leaf,
    trained on soft labels of the same leaf, so that nothing is ever painted to the image grid.
    """

    def __init__(
        self,
        *,
        num_dims: int,
        in_chans: int,
        num_classes: int,
        width: int,
        patch_size: int,
        num_hidden: int,
        channels: int,
    ) -> None:
        super().__init__()
        check_settings(num_dims, num_classes, patch_size, num_hidden, channels)
        self.num_dims, self.num_classes, self.patch_size = num_dims, num_classes, patch_size
        self.num_hidden = num_hidden
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes * patch_size**num_dims)

    def forward(self, hidden: tuple[Float[Tensor, "T D"], ...], patches: Patches) -> Float[Tensor, "T K *P"]:
        """Logits of every sample, packed as ``patches.pixels``."""
        check_hidden(hidden, patches, self.num_hidden, self.patch_size)
        logits: Tensor = self.head(self.norm(hidden[-1]))
        return logits.view(-1, self.num_classes, *(self.patch_size,) * self.num_dims)


class TokenDecoder(nn.Module):
    """Multi-scale decoding inside the leaves: from one sample per leaf to P^N, neighbours talking at every step.

    The shape of a UNETR, without its image: features start as one sample per leaf (the deepest hidden state), double
    their resolution inside the leaf step by step, take a skip from an earlier hidden state at each (the raw pixels at
    full resolution), and pass a residual convolution that reads the adjoining samples of the neighbouring leaves,
    whatever their size. Each stage knows the physical size of its leaves through a zero-initialised modulation.

    Args:
        num_dims: N, 2 or 3.
        in_chans: Channels of the patches.
        num_classes: K.
        width: D of the tokens.
        patch_size: P, a power of two.
        num_hidden: Hidden states handed over, shallow to deep, >= 1. The deepest starts the pyramid; the i-th before it
            joins at 2^i samples per side; those beyond the last stage below P join there.
        channels: C at full resolution; doubles with every halving, up to 8 C and ``width``.

    Cost: per sample about 2 * 3^N * C^2 FLOPs at full resolution and as much or less again at each coarser stage;
    memory without gradient is two 2C-channel maps at half resolution, a quarter of the samples. Image size does not
    enter.

    Source: UNETR (arXiv 2103.10504, section 3.1). **Differs**: no dense grid; normalisation per sample over channels
    (batch-invariant) instead of instance norm; sub-pixel linear maps instead of stacks of transposed convolutions.
    """

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
                f"patch_size={patch_size}: the token decoder doubles resolution from 1 to patch_size, which must be a "
                f"power of two; use {2 ** (patch_size.bit_length() - 1)} or decoder='linear'"
            )
        self.num_dims, self.num_classes, self.patch_size = num_dims, num_classes, patch_size
        self.num_hidden = num_hidden
        sides = [2**i for i in range(patch_size.bit_length())]
        stage_of = [min(depth, max(len(sides) - 2, 0)) for depth in range(num_hidden)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_hidden))
        self.skips = nn.ModuleList()  # deepest first
        stages: list[_Stage] = []
        for step, side in enumerate(sides):
            chans = min(channels * min(patch_size // side, MAX_GROWTH), width)
            below = stages[-1].channels if stages else None
            stages.append(_Stage(num_dims, chans, side, below, in_chans if side == patch_size else None))
            self.skips.extend(_token_skip(width, chans * side**num_dims) for at in stage_of if at == step)
        self.stages = nn.ModuleList(stages)
        self._stage_of = tuple(stage_of)
        self.head = nn.Linear(stages[-1].channels, num_classes)

    def forward(
        self,
        hidden: tuple[Float[Tensor, "T D"], ...],
        patches: Patches,
        maps: HaloMaps | None = None,
    ) -> Float[Tensor, "T K *P"]:
        """Logits of every sample, packed as ``patches.pixels``.

        Args:
            hidden: Features of the patch tokens after the chosen blocks, shallow to deep.
            patches: What the tokens were made of.
            maps: Neighbour tables of these leaves from an earlier call; made here when missing.
        """
        check_hidden(hidden, patches, self.num_hidden, self.patch_size)
        device = patches.pixels.device
        maps = HaloMaps(patches.leaves, device) if maps is None else maps
        scale_TN = log_scale(patches.leaves, self.patch_size).to(device, self.head.weight.dtype)
        pixels = patches.pixels.to(self.head.weight.dtype)
        x_RC: Tensor | None = None
        for step, stage in enumerate(self.stages):
            skips = [
                (hidden[-1 - depth], nn.Sequential(self.norms[depth], self.skips[depth]))
                for depth, at in enumerate(self._stage_of)
                if at == step
            ]
            last = step == len(self.stages) - 1
            x_RC = stage(x_RC, skips, pixels if last else None, scale_TN, maps, self.head if last else None)
        assert x_RC is not None
        return x_RC.view(len(scale_TN), self.num_classes, *(self.patch_size,) * self.num_dims)


class _Stage(nn.Module):
    """One resolution: double the stage below, add the skips, convolve across the leaves."""

    def __init__(self, num_dims: int, channels: int, side: int, below: int | None, in_chans: int | None) -> None:
        super().__init__()
        self.num_dims, self.channels, self.side = num_dims, channels, side
        self.up = nn.Linear(below, channels * 2**num_dims) if below is not None else None
        self.stem = HaloConv(num_dims, in_chans, channels) if in_chans is not None else None
        self.block = HaloBlock(num_dims, channels)

    def forward(
        self,
        below_RC: Tensor | None,
        skips: list[tuple[Tensor, nn.Module]],
        pixels: Tensor | None,
        scale_TN: Tensor,
        maps: HaloMaps,
        head: nn.Module | None,
    ) -> Tensor:
        """Rows "T*S C" of this resolution; logits "T K S" when a head is given."""
        num_leaves, samples = len(scale_TN), self.side**self.num_dims
        index_TH = maps.at(self.side)
        pixel_rows = None if pixels is None else pixels.movedim(1, -1).reshape(-1, pixels.shape[1])

        def merge(start: int, stop: int) -> Tensor:
            parts = [project(x_TD[start:stop]).view(-1, self.channels) for x_TD, project in skips]
            if self.up is not None and below_RC is not None:
                rows = slice(start * samples >> self.num_dims, stop * samples >> self.num_dims)
                parts.append(double(self.up(below_RC[rows]), self.side // 2, self.num_dims))
            if self.stem is not None and pixel_rows is not None:
                parts.append(functional.gelu(self.stem(pixel_rows, index_TH[start:stop])))
            total: Tensor = sum(parts[1:], parts[0])
            return total

        def finish(own_RC: Tensor, padded_nHC: Tensor, scale_nN: Tensor) -> Tensor:
            out_RC: Tensor = own_RC + self.block(padded_nHC, scale_nN)
            return out_RC if head is None else head(out_RC).view(len(scale_nN), samples, -1).transpose(1, 2)

        if below_RC is not None and pixel_rows is not None and not torch.is_grad_enabled():
            around = _Around(self, below_RC, pixel_rows, index_TH)

            def stream(start: int, stop: int) -> Tensor:
                own_RC = merge(start, stop)
                return finish(own_RC, around.pad(own_RC, start, stop), scale_TN[start:stop])

            return by_chunks(stream, num_leaves, samples, self.channels)

        x_RC = by_chunks(merge, num_leaves, samples, self.channels)

        def refine(start: int, stop: int) -> Tensor:
            own_RC = x_RC[start * samples : stop * samples]
            return finish(own_RC, halo_pad(x_RC, index_TH[start:stop]), scale_TN[start:stop])

        joined = by_chunks(refine, num_leaves, samples, self.channels)
        return joined if head is None else joined.contiguous()


class _Around:
    """The full-resolution samples around a chunk of leaves, made again from what they come from.

    Without gradient the widest map of the decoder then never exists as a whole: half the memory for a few percent of
    the time.
    """

    def __init__(self, stage: _Stage, below_RC: Tensor, pixel_rows: Tensor, index_TH: Tensor) -> None:
        self.stage, self.below_RC, self.pixel_rows = stage, below_RC, pixel_rows
        self.index_TH = index_TH
        num, side, device = stage.num_dims, stage.side, index_TH.device
        padded = torch.arange((side + 2) ** num, device=device).view(*(side + 2,) * num)
        inner = padded[(slice(1, -1),) * num].flatten()
        rim = torch.ones(len(padded.flatten()), dtype=torch.bool, device=device)
        rim[inner] = False
        self.inner, self.rim = inner, padded.flatten()[rim]
        near = padded
        for axis in range(num):
            near = near.unfold(axis, 3, 1)
        self.near_SJ = near.reshape(side**num, 3**num)
        at_SN = torch.cartesian_prod(*(torch.arange(side, device=device),) * num)
        powers = torch.arange(num - 1, -1, -1, device=device)
        self.parent_S = (at_SN // 2 * (side // 2) ** powers).sum(-1)
        self.part_S = (at_SN % 2 * 2**powers).sum(-1)

    def pad(self, own_RC: Tensor, start: int, stop: int) -> Tensor:
        """The samples of the leaves start..stop with one sample of their neighbours around them, "n H C"."""
        stage = self.stage
        rows_M = self.index_TH[start:stop, self.rim].flatten()
        padded = own_RC.new_empty((stop - start, self.index_TH.shape[1], stage.channels))
        padded.index_copy_(1, self.inner, own_RC.view(stop - start, -1, stage.channels))
        around_MC = self._make(rows_M.clamp_min(0)).masked_fill_((rows_M < 0)[:, None], 0.0)
        return padded.index_copy_(1, self.rim, around_MC.to(padded.dtype).view(stop - start, -1, stage.channels))

    def _make(self, rows_M: Tensor) -> Tensor:
        stage, samples = self.stage, len(self.near_SJ)
        assert stage.up is not None
        assert stage.stem is not None
        leaf_M, sample_M = rows_M // samples, rows_M % samples
        parent_M = leaf_M * (samples >> stage.num_dims) + self.parent_S.index_select(0, sample_M)
        wide = stage.up(self.below_RC.index_select(0, parent_M)).view(-1, stage.channels)
        part_M = torch.arange(0, len(wide), 2**stage.num_dims, device=rows_M.device)
        up = wide.index_select(0, part_M + self.part_S.index_select(0, sample_M))
        near_MJ = (leaf_M * self.index_TH.shape[1])[:, None] + self.near_SJ.index_select(0, sample_M)
        near_MJ = self.index_TH.view(-1).index_select(0, near_MJ.flatten()).view_as(near_MJ)
        near = halo_pad(self.pixel_rows, near_MJ).flatten(1)
        stem = functional.linear(near, stage.stem.rows_weight(), stage.stem.bias)
        made: Tensor = up + functional.gelu(stem)
        return made


def _token_skip(width: int, out: int) -> nn.Module:
    """Token to all samples of its leaf, through at most ``MAX_RANK`` numbers."""
    if min(width, out) <= MAX_RANK:
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, MAX_RANK, bias=False), nn.Linear(MAX_RANK, out))
