"""The published decoder: UNETR's convolutions on the dense image grid.

Legend: T leaves of a pack, L leaves of an image, P samples per side of a patch, G cells of the canvas, Q canvas
samples, R = L * P^N rows, C channels, D token width, K classes, N dimensions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import Patches
from foveate.nn.unetr_blocks import basic, join, last, pool, project


class DenseDecoder(nn.Module):
    """UNETR's decoder on a dense canvas, whose cost follows the image and not the tokens.

    The canvas has one cell of P^N samples for every smallest leaf size, so a uniform grid of P-pixel leaves gives the
    image itself. Tokens are painted over the cells that their leaf covers and the picture is repainted from the
    patches; logits are averaged back to the samples of the leaves. One image at a time.

    Args:
        num_dims: N, 2 or 3.
        in_chans: Channels of the patches.
        num_classes: K.
        width: D of the tokens.
        patch_size: P, a power of two, >= 2.
        num_hidden: Hidden states handed over, shallow to deep, >= 1. The deepest starts at one sample per cell, the
            i-th before it joins at 2^i; the shallowest serves the stages that are left.
        channels: Feature size at full resolution (16 in the paper).
        pooled: Start at half a sample per cell, the mean of 3^N cells, and let the others join one stage earlier: as
            many stages at P=8 as otherwise at P=16.

    Raises:
        ConfigError: ``patch_size`` is not a power of two >= 2.

    Cost: follows the canvas, not the tokens: 98 kFLOP and 2 kB per pixel with P=16, channels=16 in 2-D.

    Source: UNETR (arXiv 2103.10504, figure 1) with MONAI's weights and names; its two forms for P=8 are those released
    by Zhou et al., IPMI 2023, arXiv 2303.06522. Hidden states of blocks 3, 6, 9 and the last make it MONAI's UNETR; one
    alone, which every skip then sees, makes it the decoder of the released sparse model.
    **Differs**: any power of two for P; grids with an odd number of cells when pooled.
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
        pooled: bool = False,
    ) -> None:
        super().__init__()
        if num_dims not in (2, 3):
            raise ConfigError(f"num_dims={num_dims}: leaves are 2-D or 3-D; pass 2 or 3")
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ConfigError(f"patch_size={patch_size}: UNETR doubles resolution from 1; use a power of two >= 2")
        if num_hidden < 1:
            raise ConfigError(f"num_hidden={num_hidden}: a decoder needs at least 1; pass num_hidden >= 1")
        from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        self.num_dims, self.num_classes, self.patch_size = num_dims, num_classes, patch_size
        self.num_hidden, self.pooled = num_hidden, pooled
        steps = patch_size.bit_length() - 1 + pooled
        common = {"spatial_dims": num_dims, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        width_at = [width] + [channels * 2 ** (steps - i) for i in range(1, steps + 1)]
        self.picture = UnetrBasicBlock(in_channels=in_chans, out_channels=channels, stride=1, **common)
        self.skips = nn.ModuleList()
        for i in range(1, steps):
            sizes = {"in_channels": width, "out_channels": width_at[i], "stride": 1, **common}
            if pooled and i == 1:
                self.skips.append(UnetrBasicBlock(**sizes))
                continue
            self.skips.append(
                UnetrPrUpBlock(num_layer=i - 1 - pooled, upsample_kernel_size=2, conv_block=True, **sizes)
            )
        self.ups = nn.ModuleList(
            UnetrUpBlock(in_channels=width_at[i - 1], out_channels=width_at[i], upsample_kernel_size=2, **common)
            for i in range(1, steps + 1)
        )
        self.out = UnetOutBlock(spatial_dims=num_dims, in_channels=channels, out_channels=num_classes)

    def forward(self, hidden: tuple[Float[Tensor, "T D"], ...], patches: Patches) -> Float[Tensor, "T K *P"]:
        """Logits of every sample, packed as ``patches.pixels``; samples wholly outside the image get 0."""
        if len(hidden) != self.num_hidden:
            raise ShapeError(
                f"{len(hidden)} hidden states: the decoder was built for {self.num_hidden}; "
                f"give the encoder as many out_blocks"
            )
        if patches.pixels.shape[-1] != self.patch_size:
            raise ShapeError(
                f"patches of {patches.pixels.shape[-1]} samples per side: the decoder was built for {self.patch_size}; "
                f"call patchify with patch_size={self.patch_size}"
            )
        parts, start = [], 0
        for leaves in patches.leaves:
            own = slice(start, start + len(leaves))
            parts.append(self._decode([x_TD[own] for x_TD in hidden], patches.pixels[own], leaves))
            start += len(leaves)
        return torch.cat(parts)

    def _decode(self, hidden: Sequence[Tensor], pixels: Tensor, leaves: Leaves) -> Tensor:
        leaf_G = cells(leaves)
        tokens = [paint(x_LD, leaf_G.to(pixels.device)) for x_LD in hidden]
        if leaf_G.numel() == len(leaves):
            index_L = leaf_G.flatten()
            raster = bool((index_L.diff() == 1).all())  # of a uniform grid
            index_L = index_L.to(pixels.device)
            whole = self._dense(tokens, merge(pixels if raster else pixels.index_select(0, index_L), leaf_G.shape))
            logits = split(whole, self.patch_size)
            return logits if raster else logits.index_select(0, index_L.argsort())
        row_Q = sample_rows(leaves, leaf_G, self.patch_size).to(pixels.device)
        x = self._dense(tokens, paint(pixels.movedim(1, -1).flatten(0, -2), row_Q))
        logits_QK = x[0].flatten(1).t()
        rows = len(pixels) * self.patch_size**self.num_dims
        total_RK = logits_QK.new_zeros((rows, self.num_classes)).index_add(0, row_Q.flatten(), logits_QK)
        count_R = torch.bincount(row_Q.flatten(), minlength=rows).clamp_min(1)
        mean = (total_RK / count_R[:, None]).view(len(pixels), *pixels.shape[2:], self.num_classes)
        return mean.movedim(-1, 1)

    def _dense(self, hidden: Sequence[Tensor], picture: Tensor) -> Tensor:
        """UNETR from features (1, D, *G), shallow to deep, and the picture (1, C, *G P) to logits (1, K, *G P)."""
        x = pool(hidden[-1]) if self.pooled else hidden[-1]
        for i, up in enumerate(self.ups[:-1]):
            earlier, skip = hidden[max(len(hidden) - 2 - i, 0)], self.skips[i]
            x = join(up, x, basic(skip, earlier) if self.pooled and i == 0 else project(skip, earlier))
        x = join(self.ups[-1], x, basic(self.picture, picture))
        return last(self.out, x)


def paint(x_RC: Float[Tensor, "R C"], index: Int64[Tensor, "*G"]) -> Float[Tensor, "1 C *G"]:
    """Lay rows out on a grid of row indices, channels-last."""
    grid = x_RC.index_select(0, index.flatten()).view(1, *index.shape, x_RC.shape[1])
    return grid.movedim(-1, 1)


def merge(pixels: Float[Tensor, "L C *P"], counts: Sequence[int]) -> Float[Tensor, "1 C *Q"]:
    """Put patches in raster order side by side, channels-last.

    Args:
        pixels: one patch for every cell of the grid.
        counts: cells along each axis.
    """
    num = len(counts)
    pairs = [axis for i in range(num) for axis in (i, num + 1 + i)]
    grid = pixels.view(*counts, *pixels.shape[1:]).permute(*pairs, num)
    return grid.reshape(1, *(n * pixels.shape[-1] for n in counts), pixels.shape[1]).movedim(-1, 1)


def split(picture: Float[Tensor, "1 C *Q"], side: int) -> Float[Tensor, "L C *P"]:
    """Cut a picture into patches of ``side`` samples in raster order: the inverse of `merge`."""
    num, channels = picture.ndim - 2, picture.shape[1]
    pairs = [n for extent in picture.shape[2:] for n in (extent // side, side)]
    grid = picture[0].movedim(0, -1).reshape(*pairs, channels)
    order = [*range(0, 2 * num, 2), 2 * num, *range(1, 2 * num, 2)]
    return grid.permute(order).reshape(-1, channels, *(side,) * num)


def cells(leaves: Leaves) -> Int64[Tensor, "*G"]:
    """The leaf of every cell of the smallest leaf size.

    Args:
        leaves: Leaves that cover their image.

    Raises:
        ShapeError: the leaves leave part of the image uncovered.
    """
    counts = _counts(leaves)
    leaf_G = leaves.locate(_corners(leaves))
    if bool((leaf_G < 0).any()):
        raise ShapeError(
            f"{int((leaf_G < 0).sum())} cells of the image {leaves.shape} lie in no leaf: the dense decoder needs "
            f"leaves that cover the image; use the token decoder for a selection"
        )
    grid: Tensor = leaf_G.view(counts)
    return grid


def _counts(leaves: Leaves) -> list[int]:
    return [-(-extent // side) for extent, side in zip(leaves.shape, leaves.min_size, strict=True)]


def _corners(leaves: Leaves) -> Tensor:
    axes = (torch.arange(count) for count in _counts(leaves))
    return torch.cartesian_prod(*axes) * torch.tensor(leaves.min_size)


def sample_rows(leaves: Leaves, leaf_G: Int64[Tensor, "*G"], patch_size: int) -> Int64[Tensor, "*Q"]:
    """The sample under every canvas sample, as a row: leaf * P^N + sample.

    Args:
        leaves: Leaves that cover their image.
        leaf_G: What `cells` gives of them.
        patch_size: P; each smallest cell has P^N canvas samples.

    Cost: 8 bytes per canvas sample.
    """
    num, cell, counts = leaves.num_dims, leaves.min_size, list(leaf_G.shape)
    corner_GN, leaf_G = _corners(leaves), leaf_G.flatten()
    row_GQ = (leaf_G * patch_size**num).view(-1, *(1,) * num)
    inside = 2 * torch.arange(patch_size) + 1  # sample centres in halves, so that integers stay exact
    for axis in range(num):
        offset_G1 = (corner_GN[:, axis] - leaves.start[leaf_G, axis])[:, None] * (2 * patch_size)
        at_GP = (offset_G1 + inside * cell[axis]) // (2 * leaves.size[leaf_G, axis])[:, None]
        shape = [len(leaf_G)] + [patch_size if other == axis else 1 for other in range(num)]
        row_GQ = row_GQ + at_GP.view(shape) * patch_size ** (num - 1 - axis)
    pairs = [axis for i in range(num) for axis in (i, num + i)]
    row = row_GQ.view(*counts, *(patch_size,) * num).permute(pairs)
    whole: Tensor = row.reshape([count * patch_size for count in counts])
    return whole
