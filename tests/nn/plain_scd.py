"""The released sparse and dense UNETR, re-implemented plainly in the batch form, with the released names.

Boolean masks, attention as a matrix, a list of masks to put tokens back by sorting, MONAI's blocks as they are. It
knows nothing of foveate. Written from the description of the algorithm (Zhou et al., IPMI 2023, arXiv 2303.06522) and
from the names and shapes of its released parameters. ``gates_once=False`` multiplies earlier gates again, as released.

Legend: B images, L tokens, C width.
"""

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional


def sincos(grid: tuple[int, ...], width: int) -> nn.Parameter:
    """Fixed code of place behind a row of zeros for the class token."""
    share = width // (2 * len(grid))
    omega = 1.0 / 10000.0 ** (torch.arange(share, dtype=torch.float32) / share)
    columns = []
    for index in torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij"):
        angle = index.flatten()[:, None] * omega
        columns += [angle.sin(), angle.cos()]
    code = functional.pad(torch.cat(columns, 1), (0, width - 2 * len(grid) * share, 1, 0))
    return nn.Parameter(code[None], requires_grad=False)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-2, -1) / (width // self.num_heads) ** 0.5).softmax(-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(functional.gelu(self.mlp.fc1(self.norm2(x))))


class Scorer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.in_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_mlp = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_mlp(x)
        half = x.shape[2] // 2
        shared = x[:, :, half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)
        return functional.logsigmoid(self.out_mlp(torch.cat([x[:, :, :half], shared], 2))[:, :, 0])


class Encoder(nn.Module):
    def __init__(self, config: dict[str, int], cells: int, points: tuple[int, ...]) -> None:
        super().__init__()
        width, num_dims = config["width"], config["num_dims"]
        conv = (nn.Conv2d, nn.Conv3d)[num_dims - 2]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = conv(config["in_chans"], width, config["patch_size"], config["patch_size"])
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, cells + 1, width))
        self.blocks = nn.ModuleList(Block(width, config["num_heads"]) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if points:
            self.policy = nn.Parameter(torch.ones(1, cells + 1), requires_grad=False)
            self.score_predictor_list = nn.ModuleList(Scorer(width) for _ in points)
            self.mid_norm_list = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in points)

    def start(self, image: Tensor) -> Tensor:
        x = self.patch_embed.proj(image).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed


class Fusion(nn.Module):
    def __init__(self, grid: tuple[int, ...], enc: int, width: int, depth: int, heads: int, num_parts: int) -> None:
        super().__init__()
        self.pre_linear_list = nn.ModuleList(nn.Linear(enc, width) for _ in range(num_parts))
        self.completion = nn.Module()
        self.completion.layer_tokens = nn.ParameterList(torch.randn(1, 1, width) for _ in range(num_parts))
        self.completion.pos_embed = sincos(grid, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out_norm, self.out_linear = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, enc)

    def forward(self, tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        parts = zip(tokens, self.pre_linear_list, self.completion.layer_tokens, strict=True)
        x = torch.cat([linear(x) + code for x, linear, code in parts], 1)
        order = torch.cat([mask.nonzero()[:, 1].view(len(mask), -1) for mask in masks], 1).argsort(1)
        x = x.gather(1, order[:, :, None].expand_as(x)) + self.completion.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.out_linear(self.out_norm(x))[:, 1:]


class Decoder(nn.Module):
    """``unetr`` (P=16), ``x8`` and ``x8v2`` (P=8)."""

    def __init__(self, config: dict[str, int], kind: str, grid: tuple[int, ...], channels: int) -> None:
        super().__init__()
        width, self.grid, self.kind = config["width"], grid, kind
        common = {"spatial_dims": len(grid), "kernel_size": 3, "norm_name": "instance", "res_block": True}

        def skip(out: int, layers: int) -> nn.Module:
            sizes = {"in_channels": width, "out_channels": out, "stride": 1, **common}
            return UnetrPrUpBlock(num_layer=layers, upsample_kernel_size=2, conv_block=True, **sizes)

        def up(inside: int, out: int) -> nn.Module:
            return UnetrUpBlock(in_channels=inside, out_channels=out, upsample_kernel_size=2, **common)

        basic = {"in_channels": config["in_chans"], "out_channels": channels, "stride": 1, **common}
        self.encoder1 = UnetrBasicBlock(**basic)
        more = kind == "unetr"
        self.encoder2, self.encoder3 = skip(2 * channels, 1 + more), skip(4 * channels, int(more))
        if kind != "x8":
            eight = {**basic, "in_channels": width, "out_channels": 8 * channels}
            self.encoder4 = skip(8 * channels, 0) if more else UnetrBasicBlock(**eight)
            self.decoder5 = up(width, 8 * channels)
        self.decoder4 = up(width if kind == "x8" else 8 * channels, 4 * channels)
        self.decoder3, self.decoder2 = up(4 * channels, 2 * channels), up(2 * channels, channels)
        self.out = UnetOutBlock(spatial_dims=len(grid), in_channels=channels, out_channels=config["num_classes"])

    def forward(self, image: Tensor, x: Tensor, hidden: list[Tensor]) -> Tensor:
        def lay(x: Tensor) -> Tensor:
            return x.transpose(1, 2).unflatten(2, self.grid).contiguous()

        x = lay(x)
        if self.kind == "x8":
            x2, x3 = hidden[4], hidden[8]
        else:
            pool = (functional.avg_pool2d, functional.avg_pool3d)[len(self.grid) - 2]
            x2, x3, x4 = hidden[3], hidden[6], hidden[9]
            x = self.decoder5(pool(x, 3, 2, 1) if self.kind == "x8v2" else x, self.encoder4(lay(x4)))
        x = self.decoder3(self.decoder4(x, self.encoder3(lay(x3))), self.encoder2(lay(x2)))
        return self.out(self.decoder2(x, self.encoder1(image)))


class PlainScd(nn.Module):
    """Images to logits; dense where there are no prune points.

    Args:
        config: num_dims, patch_size, in_chans, num_classes, width, depth, num_heads.
        side: pixels of an image along each axis.
        points: blocks behind which tokens leave.
        ratio: share of the tokens that leaves at each of them.
        kind: of decoder.
        completion: width, blocks and heads.
    """

    def __init__(
        self,
        config: dict[str, int],
        side: int,
        points: tuple[int, ...],
        ratio: float,
        kind: str,
        completion: tuple[int, int, int],
        channels: int = 4,
    ) -> None:
        super().__init__()
        grid = (side // config["patch_size"],) * config["num_dims"]
        cells = grid[0] ** len(grid)
        self.points, self.ratio, self.gates_once = points, ratio, True
        self.noise: torch.Generator | None = None
        self.encoder = Encoder(config, cells, points)
        self.decoder = Decoder(config, kind, grid, channels)
        if points:
            self.completion_net = Fusion(grid, config["width"], *completion, len(points) + 1)

    def forward(self, image: Tensor) -> Tensor:
        x, tokens, masks, hidden = self.encoder.start(image), [], [], []
        policy = torch.ones(x.shape[:2])
        for index, block in enumerate(self.encoder.blocks):
            x = block(x)
            hidden.append(x[:, 1:])
            if index in self.points:
                stage = len(tokens)
                x, gone, policy, left = self._prune(x, policy, self.encoder.score_predictor_list[stage])
                tokens.append(self.encoder.mid_norm_list[stage](gone))
                masks.append(left.detach())
        x = self.encoder.norm(x)
        if not self.points:
            return self.decoder(image, x[:, 1:], hidden)
        x = self.completion_net([*tokens, x], [*masks, policy.detach()])
        return self.decoder(image, x, [x] * 12)

    def _prune(self, x: Tensor, policy: Tensor, scorer: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, length = len(x), x.shape[1] - 1
        score = scorer(x[:, 1:])
        keep = int(length * (1 - self.ratio))
        if self.training and self.noise is not None:
            score = score - torch.empty_like(score).exponential_(generator=self.noise).log()
        soft = score.softmax(1)
        hard = torch.zeros_like(score).scatter(1, score.topk(keep, 1).indices, 1.0)
        current = hard - soft.detach() + soft if self.training else hard
        current = torch.cat([torch.ones(batch, 1), current], 1)
        alive, stay = policy.bool(), current.bool()
        if self.gates_once:
            policy = policy.detach()
        kept_policy, gone_policy = policy.clone(), policy.clone()
        kept_policy[alive] = current.flatten() * policy[alive]
        gone_policy[alive] = (1.0 - current.flatten()) * policy[alive]
        kept = x[stay].view(batch, keep + 1, -1)
        gone = x[~stay].view(batch, length - keep, -1)
        if self.training:
            kept = kept * kept_policy[kept_policy.bool()].view(batch, keep + 1, 1)
            gone = gone * gone_policy[gone_policy.bool()].view(batch, length - keep, 1)
        return kept, gone, kept_policy, gone_policy
