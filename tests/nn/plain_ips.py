"""The published selection, written down plainly for one bag: a buffer, chunks, a softmax over both."""

from collections.abc import Callable

import torch
from torch import Tensor


def plain_select(
    patches: Tensor,
    encode: Callable[[Tensor], Tensor],
    attention: Callable[[Tensor], Tensor],
    keep: int,
    chunk: int,
    order: Tensor | None = None,
    code: Tensor | None = None,
) -> Tensor:
    """Positions of the kept patches, in the order that the loop leaves them in.

    Args:
        patches: ``[N, ...]``.
        encode: ``[R, ...]`` to ``[R, D]``.
        attention: ``[R, D]`` to softmax attention over these rows ``[Q, H, R]``.
        keep: buffer size.
        chunk: patches per step.
        order: the shuffled order.
        code: of each patch, added for scoring only.
    """
    num = len(patches)
    order = torch.arange(num) if order is None else order
    if keep >= num:
        return order
    buffer = order[:keep]
    with torch.no_grad():
        embedded = encode(patches[buffer])
        start = keep
        while start < num:
            new = order[start : start + chunk]
            candidates = torch.cat([buffer, new])
            embedding = torch.cat([embedded, encode(patches[new])])
            placed = embedding if code is None else embedding + code[candidates]
            score = attention(placed).mean(1).mean(0)  # heads, then queries
            best = torch.topk(score, keep).indices
            buffer, embedded = candidates[best], embedding[best]
            start += chunk
    return buffer


def plain_attention(
    x: Tensor, query: Tensor, w_query: Tensor, w_key: Tensor, num_heads: int, head_width: int
) -> Tensor:
    """Softmax attention of learned queries, head by head: ``[Q, H, R]``."""
    q = (query @ w_query.T).view(len(query), num_heads, head_width).transpose(0, 1)
    k = (x @ w_key.T).view(len(x), num_heads, head_width).transpose(0, 1)
    return torch.softmax(q @ k.transpose(1, 2) / head_width**0.5, dim=-1).transpose(0, 1)
