"""From logits of many queries and heads to the patches that stay. Equal scores: the earlier position stays.

Legend: N patches, A queries of single heads, K kept patches.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

RANKS = ("mean", "best", "lse", "quota")
_MOST = 1 << 19  # numbers in double precision at a time


def attention_share(logits_NA: Float[Tensor, "N A"]) -> Float[Tensor, " N"]:
    """Softmax over all patches, averaged over queries and heads, in double precision; sums to 1."""
    share = logits_NA.new_zeros(len(logits_NA), dtype=torch.float64)
    if not len(share):
        return share
    for part in logits_NA.split(_columns(len(share)), dim=1):
        share += part.double().softmax(0).sum(1)
    return share / logits_NA.shape[1]


def best_rank(logits_NA: Float[Tensor, "N A"], keep: int) -> Int64[Tensor, " N"]:
    """Place that a patch takes in the query and head that likes it most, 0 the first, ``keep`` where beyond it."""
    num = len(logits_NA)
    order = torch.arange(num - 1, -1, -1, device=logits_NA.device)
    place = torch.arange(keep, device=logits_NA.device)
    best = torch.full((num,), keep, device=logits_NA.device)
    for part in logits_NA.split(_columns(num), dim=1):
        key = (part.float() + 0.0).contiguous().view(torch.int32).long()  # 0.0 makes one zero of two
        key = torch.where(key < 0, -(key & 0x7FFFFFFF), key) << 32  # as floats are ordered
        for column in key.unbind(1):  # equal logits differ by their position
            best.scatter_reduce_(0, (column + order).topk(keep).indices, place, "amin")
    return best


def _columns(num: int) -> int:
    """Queries of heads that are ranked at a time, so that memory hardly grows with their number."""
    return max(1, _MOST // max(1, num))


def score_patches(logits_NA: Float[Tensor, "N A"], keep: int, rank: str = "mean") -> Float[Tensor, " N"]:
    """What patches are ranked by.

    Args:
        logits_NA: attention before the softmax.
        keep: how many will stay, at most N.
        rank: ``mean`` of the attention over queries and heads (published); ``best`` place in any query and head, ties
            by the mean; ``lse``: log-sum-exp of the logits, the one rule that asks nothing of other patches;
            ``quota``: half of what stays by ``best``, the rest by ``mean``.

    Returns:
        Double precision, higher stays.
    """
    if rank == "lse":
        return logits_NA.double().logsumexp(1)
    share = attention_share(logits_NA)
    if rank == "mean":
        return share
    place = best_rank(logits_NA, keep)
    if rank == "best":
        return share - place
    first = top_positions(share - place, keep // 2)
    return share.index_add(0, first, torch.ones_like(share[first]))


def top_positions(score_N: Float[Tensor, " N"], keep: int) -> Int64[Tensor, " K"]:
    """Positions of the ``keep`` highest scores, ascending; of equal scores the earlier positions."""
    if keep == 0:
        return torch.zeros(0, dtype=torch.int64, device=score_N.device)
    least = score_N.topk(keep).values[-1]
    above = (score_N > least).nonzero()[:, 0]
    equal = (score_N == least).nonzero()[:, 0]
    return torch.cat([above, equal[: keep - len(above)]]).sort().values
