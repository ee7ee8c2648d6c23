"""The dense reference decoder: UNETR's convolutions on the image grid, for comparison with decoding in token space.

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


class DenseDecoder(nn.Module):
    """UNETR's decoder on a dense canvas: the reference, slow and memory hungry on purpose.

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

    Raises:
        ConfigError: ``patch_size`` is not a power of two >= 2.

    Cost: follows the canvas, not the tokens: 98 kFLOP and 2 kB per pixel with P=16, channels=16 in 2-D.

    Source: UNETR (arXiv 2103.10504, figure 1), with MONAI's blocks.
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
        if num_dims not in (2, 3):
            raise ConfigError(f"num_dims={num_dims}: leaves are 2-D or 3-D; pass 2 or 3")
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ConfigError(f"patch_size={patch_size}: UNETR doubles resolution from 1; use a power of two >= 2")
        if num_hidden < 1:
            raise ConfigError(f"num_hidden={num_hidden}: a decoder needs at least 1; pass num_hidden >= 1")
        from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        self.num_dims, self.num_classes, self.patch_size = num_dims, num_classes, patch_size
        self.num_hidden = num_hidden
        steps = patch_size.bit_length() - 1
        common = {"spatial_dims": num_dims, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        width_at = [width] + [channels * 2 ** (steps - i) for i in range(1, steps + 1)]
        self.picture = UnetrBasicBlock(in_channels=in_chans, out_channels=channels, stride=1, **common)
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(
                in_channels=width,
                out_channels=width_at[i],
                num_layer=i - 1,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **common,
            )
            for i in range(1, steps)
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
        leaf_G, row_Q = canvas(leaves, self.patch_size)
        leaf_G, row_Q = leaf_G.to(pixels.device), row_Q.to(pixels.device)
        x = self._dense(paint(hidden[-1], leaf_G), hidden, leaf_G, paint(pixels.movedim(1, -1).flatten(0, -2), row_Q))
        logits_QK = x[0].flatten(1).t()
        rows = len(pixels) * self.patch_size**self.num_dims
        total_RK = logits_QK.new_zeros((rows, self.num_classes)).index_add(0, row_Q.flatten(), logits_QK)
        count_R = torch.bincount(row_Q.flatten(), minlength=rows).clamp_min(1)
        mean = (total_RK / count_R[:, None]).view(len(pixels), *pixels.shape[2:], self.num_classes)
        return mean.movedim(-1, 1)

    def _dense(self, x: Tensor, hidden: Sequence[Tensor], leaf_G: Tensor, picture: Tensor) -> Tensor:
        """UNETR from the deepest features (1, D, *G) and the picture (1, C, *G P) to logits (1, K, *G P)."""
        for i, up in enumerate(self.ups[:-1]):
            earlier = hidden[max(len(hidden) - 2 - i, 0)]
            x = up(x, self.skips[i](paint(earlier, leaf_G)))
        logits: Tensor = self.out(self.ups[-1](x, self.picture(picture)))
        return logits


def paint(x_RC: Float[Tensor, "R C"], index: Int64[Tensor, "*G"]) -> Float[Tensor, "1 C *G"]:
    """Lay rows out on a grid of row indices, channels first."""
    grid = x_RC.index_select(0, index.flatten()).view(*index.shape, x_RC.shape[1])
    return grid.movedim(-1, 0)[None].contiguous()


def canvas(leaves: Leaves, patch_size: int) -> tuple[Int64[Tensor, "*G"], Int64[Tensor, "*Q"]]:
    """The dense grid of an image: the leaf of every smallest cell, and the sample row under every canvas sample.

    Args:
        leaves: Leaves that cover their image.
        patch_size: P; each smallest cell has P^N canvas samples.

    Returns:
        Leaf index per cell, and row (leaf * P^N + sample) per canvas sample, P times as many along each axis.

    Raises:
        ShapeError: the leaves leave part of the image uncovered.

    Cost: 8 bytes per canvas sample.
    """
    num, cell = leaves.num_dims, torch.tensor(leaves.min_size)
    counts = [-(-extent // side) for extent, side in zip(leaves.shape, leaves.min_size, strict=True)]
    cells_GN = torch.cartesian_prod(*(torch.arange(count) for count in counts)) * cell
    leaf_G = leaves.locate(cells_GN)
    if bool((leaf_G < 0).any()):
        raise ShapeError(
            f"{int((leaf_G < 0).sum())} cells of the image {leaves.shape} lie in no leaf: the dense decoder needs "
            f"leaves that cover the image; use the token decoder for a selection"
        )
    row_GQ = (leaf_G * patch_size**num).view(-1, *(1,) * num)
    inside = 2 * torch.arange(patch_size) + 1  # sample centres in halves, so that integers stay exact
    for axis in range(num):
        offset_G1 = (cells_GN[:, axis] - leaves.start[leaf_G, axis])[:, None] * (2 * patch_size)
        at_GP = (offset_G1 + inside * cell[axis]) // (2 * leaves.size[leaf_G, axis])[:, None]
        shape = [len(leaf_G)] + [patch_size if other == axis else 1 for other in range(num)]
        row_GQ = row_GQ + at_GP.view(shape) * patch_size ** (num - 1 - axis)
    pairs = [axis for i in range(num) for axis in (i, num + i)]
    row = row_GQ.view(*counts, *(patch_size,) * num).permute(pairs)
    return leaf_G.view(counts), row.reshape([count * patch_size for count in counts])
