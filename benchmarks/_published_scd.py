"""The published sparse segmenter and its dense baseline, re-implemented plainly as the things to compare with.

ViT with naive attention (or the fused kernel), softmax straight-through top-k by boolean masks behind blocks 2, 5 and
8, assembly of all prune points with a full-length block, and the dense UNETR decoder on MONAI's blocks. Written from
the description of the algorithm (Zhou et al., IPMI 2023, arXiv 2303.06522), with its costs and its schedule of
int(length * (1 - ratio)), which goes 1728 -> 172 -> 17 -> 1. Its parameters (ViT-B 93.3 and 107.6 million) and its
multiply-adds at 96^3 (258.3 and 131.8 G) are those of the released code.

Legend: B volumes, L tokens with the class token, C width, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional


class PlainBlock(nn.Module):
    """A pre-norm transformer block whose attention is an L x L matrix, or the fused kernel."""

    def __init__(self, width: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BLC: Tensor) -> Tensor:
        batch, length, width = x_BLC.shape
        qkv = self.qkv(self.norm1(x_BLC)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.fused:
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(-2, -1)) * (width // self.num_heads) ** -0.5).softmax(-1) @ v
        x_BLC = x_BLC + self.proj(out.transpose(1, 2).reshape(batch, length, width))
        return x_BLC + self.mlp(self.norm2(x_BLC))


class PlainScorer(nn.Module):
    """Four linear maps over a token and the mean of its volume, and a log-sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU())
        self.outer = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 1),
        )

    def forward(self, x_BLC: Tensor) -> Tensor:
        own, shared = self.inner(x_BLC).chunk(2, dim=-1)
        return functional.logsigmoid(
            self.outer(torch.cat([own, shared.mean(1, keepdim=True).expand_as(own)], -1))[..., 0]
        )


class DenseUnetr(nn.Module):
    """UNETR's decoder for patch size 16, or for 8 with the token grid pooled once more, so that levels are as many."""

    def __init__(
        self,
        in_chans: int,
        width: int,
        num_classes: int,
        side: int,
        patch_size: int,
        num_dims: int = 3,
        channels: int = 16,
    ) -> None:
        super().__init__()
        common = {"spatial_dims": num_dims, "kernel_size": 3, "stride": 1, "norm_name": "instance", "res_block": True}
        self.cells, eight = (side,) * num_dims, patch_size == 8
        up = {**common, "upsample_kernel_size": 2}
        del up["stride"]
        skip = {**common, "upsample_kernel_size": 2, "conv_block": True, "in_channels": width}
        self.encoder1 = UnetrBasicBlock(in_channels=in_chans, out_channels=channels, **common)
        self.encoder2 = UnetrPrUpBlock(out_channels=2 * channels, num_layer=1 if eight else 2, **skip)
        self.encoder3 = UnetrPrUpBlock(out_channels=4 * channels, num_layer=0 if eight else 1, **skip)
        if eight:
            self.encoder4 = UnetrBasicBlock(in_channels=width, out_channels=8 * channels, **common)
        else:
            self.encoder4 = UnetrPrUpBlock(out_channels=8 * channels, num_layer=0, **skip)
        pool = nn.AvgPool3d if num_dims == 3 else nn.AvgPool2d
        self.pool = pool(3, 2, 1) if eight else nn.Identity()
        widths = (width, 8 * channels, 4 * channels, 2 * channels, channels)
        self.ups = nn.ModuleList(UnetrUpBlock(in_channels=a, out_channels=b, **up) for a, b in pairwise(widths))
        self.out = UnetOutBlock(spatial_dims=num_dims, in_channels=channels, out_channels=num_classes)

    def forward(self, image: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        x3, x6, x9, last = (x.transpose(1, 2).unflatten(2, self.cells).contiguous() for x in hidden)
        x = self.ups[0](self.pool(last), self.encoder4(x9))
        x = self.ups[1](x, self.encoder3(x6))
        x = self.ups[2](x, self.encoder2(x3))
        return self.out(self.ups[3](x, self.encoder1(image)))


class PublishedSegmenter(nn.Module):
    """Volume (or image) to logits: dense where ``ratio`` is 0, else the published sparse model.

    Args:
        side: voxels of the volume per axis; the model is made for this size alone.
        ratio: share of the tokens that leaves at each prune point.
        fused: attend with the fused kernel.
        num_dims: 3, or 2 for images.
    """

    def __init__(
        self,
        *,
        side: int,
        in_chans: int = 1,
        num_classes: int = 14,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 8,
        ratio: float = 0.0,
        fused: bool = False,
        num_dims: int = 3,
    ) -> None:
        super().__init__()
        self.ratio, cells = ratio, side // patch_size
        self.embed = (nn.Conv3d if num_dims == 3 else nn.Conv2d)(in_chans, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, cells**num_dims + 1, width) * 0.02)
        self.blocks = nn.ModuleList(PlainBlock(width, num_heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = DenseUnetr(in_chans, width, num_classes, cells, patch_size, num_dims)
        self.points = (2, 5, 8) if ratio else ()
        if ratio:
            self.scorers = nn.ModuleList(PlainScorer(width) for _ in self.points)
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in self.points)
            self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
            self.codes = nn.Parameter(torch.zeros(4, width))
            self.fixed = nn.Parameter(torch.randn(1, cells**num_dims + 1, width) * 0.02, requires_grad=False)
            self.fusion = PlainBlock(width, num_heads, fused)
            self.last = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.place
        places = torch.arange(x.shape[1] - 1).expand(len(x), -1)
        hidden, parts, left = [], [], []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in (3, 6, 9):
                hidden.append(x[:, 1:])
            if index in self.points:
                stage = len(parts)
                x, places, gone, gone_places = self._prune(self.scorers[stage], x, places)
                parts.append(self.maps[stage](self.norms[stage](gone)) + self.codes[stage])
                left.append(gone_places)
        x = self.norm(x)
        if not self.points:
            return self.decoder(image, [*hidden, x[:, 1:]])
        x = self.maps[3](x) + self.codes[3]
        order = torch.cat([*left, places], 1).argsort(1)
        tokens = torch.cat([*parts, x[:, 1:]], 1).gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        whole = self.last(self.fusion(torch.cat([x[:, :1], tokens], 1) + self.fixed))[:, 1:]
        return self.decoder(image, [whole] * 4)

    def _prune(self, scorer: nn.Module, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kept tokens behind the class token, their places, the tokens that leave, and theirs."""
        prefix, tokens = x[:, :1], x[:, 1:]
        batch, length, width = tokens.shape
        keep = int(length * (1 - self.ratio))
        score = scorer(tokens)
        if self.training:
            noise = -torch.empty_like(score).exponential_().log()
            soft = (score + noise).softmax(-1)
            hard = torch.zeros_like(soft).scatter(1, soft.topk(keep, 1).indices, 1.0)
            gate = hard - soft.detach() + soft
            kept, gone = tokens * gate[..., None], tokens * (1 - gate[..., None])
        else:
            hard = torch.zeros_like(score).scatter(1, score.topk(keep, 1).indices, 1.0)
            kept = gone = tokens
        stay = hard.bool()
        x = torch.cat([prefix, kept[stay].view(batch, keep, width)], 1)
        leave = gone[~stay].view(batch, length - keep, width)
        return x, places[stay].view(batch, keep), leave, places[~stay].view(batch, -1)
