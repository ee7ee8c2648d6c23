"""The published patch selection, re-implemented plainly as the thing to compare with.

A buffer of embeddings, topped up chunk by chunk: attention of buffer and chunk, mean over heads and queries, the best
stay; then the chosen patches are encoded again with gradient. Written from the description of the algorithm (Bergner
et al., ICLR 2023, arXiv 2210.13007), eager: all patches of a batch lie in memory. The loss keeps its published form,
the negative log of the softmax plus 1e-6.

Legend: B images, N patches, C channels, P samples per side, D width, H heads, T queries, K kept.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, chans: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(chans, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        matched = stride == 1 and chans == out
        self.shortcut = (
            nn.Identity()
            if matched
            else nn.Sequential(nn.Conv2d(chans, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet18(in_chans: int, stages: int = 2) -> nn.Module:
    """ResNet-18 cut after some of its four stages, then the mean over space: ``[R, C, P, P]`` to ``[R, 64..512]``."""
    widths = (64, 64, 128, 256, 512)[: stages + 1]
    layers: list[nn.Module] = [
        nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    for stage, (chans, out) in enumerate(pairwise(widths)):
        layers += [Residual(chans, out, 1 if stage == 0 else 2), Residual(out, out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def projector(features: int, width: int) -> nn.Module:
    """What stored features go through."""
    return nn.Sequential(
        nn.LayerNorm(features, elementwise_affine=False), nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()
    )


def sine_code(num_patches: int, width: int) -> Tensor:
    """Sine and cosine of the patch's number, ``[N, D]``."""
    at_N1 = torch.arange(num_patches, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([torch.sin(at_N1 * rate), torch.cos(at_N1 * rate)], -1).flatten(1)


class CrossAttention(nn.Module):
    """Learned queries read from patches: the same weights score and aggregate."""

    def __init__(self, width: int, num_heads: int, num_queries: int, inner: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.head = num_heads, width // num_heads
        self.query = nn.Parameter(torch.empty(num_queries, width))
        nn.init.xavier_uniform_(self.query)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.drop, self.drop_attention = nn.Dropout(dropout), nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head)).transpose(-2, -3)

    def attention(self, x_BND: Tensor) -> Tensor:
        """Softmax over the patches that are there, ``[B, H, T, N]``."""
        q_HTE, k_BHNE = self._heads(self.q(self.query)), self._heads(self.k(x_BND))
        return ((q_HTE / self.head**0.5) @ k_BHNE.transpose(-1, -2)).softmax(-1)

    def score(self, x_BND: Tensor) -> Tensor:
        """Mean over heads, then over queries, ``[B, N]``."""
        return self.attention(x_BND).mean(1).mean(1)

    def forward(self, x_BND: Tensor) -> Tensor:
        """One vector per query, ``[B, T, D]``."""
        read = self.drop_attention(self.attention(x_BND)) @ self._heads(self.v(x_BND))
        x_BTD = self.norm1(self.drop(self.out(read.transpose(1, 2).flatten(2))) + self.query)
        return self.norm2(self.drop(self.mlp(x_BTD)) + x_BTD)


class PublishedSelection(nn.Module):
    """Encoder, buffer, cross-attention and one head per task.

    Args:
        encoder: patches or features ``[R, ...]`` to ``[R, D]``.
        tasks: name -> (outputs, "softmax" or "sigmoid").
        num_patches: N of every image; 0: no code of the position.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        tasks: Mapping[str, tuple[int, str]],
        *,
        keep: int,
        chunk: int,
        num_patches: int = 0,
        num_heads: int = 8,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.tasks = encoder, dict(tasks)
        self.keep, self.chunk, self.shuffle = keep, chunk, shuffle
        self.pool = CrossAttention(width, num_heads, len(tasks), 4 * width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, outputs) for name, (outputs, _) in tasks.items()})
        self.code = sine_code(num_patches, width) if num_patches else None

    def encode(self, patches: Tensor) -> Tensor:
        """``[B, n, ...]`` to ``[B, n, D]``."""
        return self.encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])

    @torch.no_grad()
    def select(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers ``[B, K]`` and pixels of the chosen patches."""
        batch, length = patches.shape[:2]
        if self.keep >= length:
            return torch.arange(length).expand(batch, -1), patches
        self.eval()
        order = torch.randperm(length) if self.shuffle else torch.arange(length)
        patches, code = patches[:, order], None if self.code is None else self.code[order]
        buffer, index = self.encode(patches[:, : self.keep]), torch.arange(self.keep).expand(batch, -1)
        for start in range(self.keep, length, self.chunk):
            fresh = patches[:, start : start + self.chunk]
            numbers = torch.arange(start, start + fresh.shape[1]).expand(batch, -1)
            buffer, index = torch.cat([buffer, self.encode(fresh)], 1), torch.cat([index, numbers], 1)
            scored = buffer if code is None else buffer + code[index]
            best = self.pool.score(scored).topk(self.keep, dim=1).indices
            buffer = buffer.gather(1, best[..., None].expand(-1, -1, buffer.shape[-1]))
            index = index.gather(1, best)
        self.train()
        rows = torch.arange(batch)[:, None]
        return order[index], patches[rows, index]

    def predict(self, chosen: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Probabilities of every task, ``[B, outputs]``."""
        x_BKD = self.encode(chosen)
        x_BTD = self.pool(x_BKD if self.code is None else x_BKD + self.code[index])
        out = {}
        for query, (name, (_, kind)) in enumerate(self.tasks.items()):
            logits = self.heads[name](x_BTD[:, query])
            out[name] = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
        return out

    def loss(self, out: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Mean over tasks; labels are class numbers, or 0 and 1 per output for "sigmoid"."""
        losses = []
        for name, (_, kind) in self.tasks.items():
            if kind == "softmax":
                losses.append(functional.nll_loss((out[name] + 1e-6).log(), labels[name]))
            else:
                losses.append(functional.binary_cross_entropy(out[name], labels[name].float()))
        return torch.stack(losses).mean()
