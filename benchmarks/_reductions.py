"""Two other ways to make tokens fewer, re-implemented plainly from their papers, in front of any decoder of ours.

Merging after ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461) and pruning after Cropr (Bergner et al., CVPR 2025,
arXiv 2412.00965). Both run the embedding, the blocks and the norm of an `Encoder` of ours without prefix tokens, image
by image, so that the reduction alone differs.

Legend: L tokens of an image, D width, K classes, Q queries, H heads, E width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import Patches
from foveate.nn.attention import Packing
from foveate.nn.embed import grid_weights
from foveate.nn.encoder import Encoder, EncoderOutput

CELLS = 4  # of Cropr's auxiliary grid along an axis


class ReducedEncoder(nn.Module):
    """What both have in common: an encoder of ours, taken apart."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.width, self.patch_size, self.num_hidden = encoder.width, encoder.patch_size, encoder.num_hidden

    def forward(self, patches: Patches) -> EncoderOutput:
        encoder = self.encoder
        place = grid_weights(patches, encoder.config.pos_grid) @ encoder.pos_embed[0]
        x_TD = encoder.patch_embed(patches) + place + encoder.geometry_embed(patches)
        images = [self.encode(x_LD, index) for index, x_LD in enumerate(x_TD.split(list(patches.lengths)))]
        hidden = tuple(torch.cat(parts) for parts in zip(*images, strict=True))
        return EncoderOutput(hidden, x_TD.new_zeros(patches.num_images, 0, self.width))

    def encode(self, x_LD: Tensor, image: int) -> list[Tensor]:
        """Hidden states of one image, all of its tokens in each."""
        raise NotImplementedError


class MergingEncoder(ReducedEncoder):
    """ToMe: behind the attention of a block the most similar tokens become one, and are told apart again at the end.

    Args:
        encoder: whose weights to run.
        left: share of an image's tokens that is left after each block.
    """

    def __init__(self, encoder: Encoder, left: Sequence[float]) -> None:
        super().__init__(encoder)
        self.left = tuple(left)

    def encode(self, x_LD: Tensor, image: int) -> list[Tensor]:
        length, hidden = len(x_LD), []
        size, group = x_LD.new_ones(length), torch.arange(length)
        for index, (block, share) in enumerate(zip(self.encoder.blocks, self.left, strict=True)):
            attention = block.attn
            qkv = attention.qkv(block.norm1(x_LD)).unflatten(1, (3, attention.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)[:, None].unbind(0)
            read = functional.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[None, None, None])
            x_LD = x_LD + attention.proj(read[0].transpose(0, 1).flatten(1))
            number = min(len(x_LD) - round(length * share), len(x_LD) // 2)
            if number > 0:
                to = matched(k[0].mean(0).detach(), number)
                x_LD, size = merged(x_LD, size, to)
                group = to[group]
            x_LD = x_LD + block.mlp(block.norm2(x_LD))
            if index in self.encoder.config.blocks[:-1]:
                hidden.append(x_LD[group])
        return [*hidden, self.encoder.norm(x_LD)[group]]


def matched(key_LE: Tensor, number: int) -> Tensor:
    """New position of every token after the ``number`` closest pairs are joined, by bipartite soft matching."""
    key_LE = functional.normalize(key_LE, dim=1)
    closeness, partner = (key_LE[::2] @ key_LE[1::2].T).max(1)
    order = closeness.argsort(descending=True)
    stay = order[number:].sort().values
    to = torch.empty(len(key_LE), dtype=torch.int64)
    to[1::2] = len(stay) + torch.arange(len(key_LE) // 2)
    to[2 * stay] = torch.arange(len(stay))
    to[2 * order[:number]] = len(stay) + partner[order[:number]]
    return to


def merged(x_LD: Tensor, size_L: Tensor, to_L: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that share a new position, weighted by how many they stand for, and the new sizes."""
    number = int(to_L.max()) + 1
    size = size_L.new_zeros(number).index_add(0, to_L, size_L)
    total = x_LD.new_zeros(number, x_LD.shape[1]).index_add(0, to_L, x_LD * size_L[:, None])
    return total / size[:, None], size


class CroprEncoder(ReducedEncoder):
    """Cropr: cross-attention scores, taught by auxiliary heads on detached tokens; all tokens meet in the last block.

    Each prune point has one query for each cell of a coarse grid, whose head says the shares of the classes in that
    cell. The score of a token is its attention logit summed over the queries.

    Args:
        encoder: whose weights to run.
        prune_after: blocks behind which tokens are pruned.
        left: share of an image's tokens that is left after each.
        num_classes: K.
    """

    def __init__(self, encoder: Encoder, prune_after: Sequence[int], left: Sequence[float], num_classes: int) -> None:
        super().__init__(encoder)
        self.left = dict(zip(prune_after, left, strict=True))
        width, queries = encoder.width, CELLS**encoder.config.num_dims
        self.scorers = nn.ModuleDict({str(block): CroprScorer(width, queries, num_classes) for block in prune_after})
        self.guesses: list[tuple[int, Tensor]] = []

    def forward(self, patches: Patches) -> EncoderOutput:
        self.guesses = []
        return super().forward(patches)

    def encode(self, x_LD: Tensor, image: int) -> list[Tensor]:
        length, hidden = len(x_LD), []
        rows, gone = torch.arange(length), list[tuple[Tensor, Tensor]]()
        for index, block in enumerate(self.encoder.blocks):
            if index == len(self.encoder.blocks) - 1:
                x_LD, rows, gone = whole(x_LD, rows, gone), torch.arange(length), []
            x_LD = block(x_LD, Packing((len(x_LD),)))
            if index in self.encoder.config.blocks[:-1]:
                hidden.append(whole(x_LD, rows, gone))
            if index in self.left:
                score, guess = self.scorers[str(index)](x_LD.detach(), self.training)
                if guess is not None:
                    self.guesses.append((image, guess))
                order = score.argsort(descending=True)
                keep = max(16, round(length * self.left[index]))
                stay, leave = order[:keep].sort().values, order[keep:]
                gone.append((rows[leave], x_LD[leave]))
                x_LD, rows = x_LD[stay], rows[stay]
        return [*hidden, self.encoder.norm(x_LD)]

    def auxiliary_loss(self, patches: Patches, soft: Tensor, weight: Tensor) -> Tensor:
        """Cross entropy of the guesses of the last call against the shares of the classes in every cell."""
        parts = (labels.split(patches.lengths) for labels in (soft, weight))
        targets = [cell_shares(*part) for part in zip(patches.leaves, *parts, strict=True)]
        losses = [-(targets[image] * guess.log_softmax(1)).sum(1).mean() for image, guess in self.guesses]
        return torch.stack(losses).mean()


class CroprScorer(nn.Module):
    """Learned queries that read the tokens; after training one summed query would do."""

    def __init__(self, width: int, num_queries: int, num_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.norm, self.key, self.value = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_classes)
        )

    def forward(self, x_LD: Tensor, taught: bool) -> tuple[Tensor, Tensor | None]:
        """Score of every token, and in training what the queries guess, ``[Q, K]``."""
        x_LD = self.norm(x_LD)
        if not taught:
            return self.key(x_LD) @ self.query.sum(0), None
        logit_QL = self.query @ self.key(x_LD).T / x_LD.shape[1] ** 0.5
        return logit_QL.sum(0).detach(), self.head(self.query + logit_QL.softmax(1) @ self.value(x_LD))


def whole(x_KD: Tensor, rows: Tensor, gone: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All tokens of an image in order: those alive, and the others as they left."""
    if not gone:
        return x_KD
    index = torch.cat([rows, *(rows for rows, _ in gone)])
    return torch.cat([x_KD, *(x for _, x in gone)])[index.argsort()]


def cell_shares(leaves: Leaves, soft: Tensor, weight: Tensor) -> Tensor:
    """Share of each class in every cell of the coarse grid, ``[Q, K]``."""
    boxes = leaves.boxes
    middle = boxes.float().mean(1) / torch.tensor(leaves.shape)
    at = (middle * CELLS).long().clamp(0, CELLS - 1)
    cell = (at * CELLS ** torch.arange(at.shape[1] - 1, -1, -1)).sum(1)
    area_LK = (soft.flatten(2) * weight.flatten(1)[:, None]).sum(2)
    area_QK = area_LK.new_zeros(CELLS ** at.shape[1], area_LK.shape[1]).index_add(0, cell, area_LK)
    return area_QK / area_QK.sum(1, keepdim=True).clamp(min=1e-6)
