"""Learned queries that attend to a bag of vectors: one module that both ranks patches and pools them.

Legend: N vectors of one bag, D width, Q queries, H heads, A = Q * H queries of single heads, E width of a head.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class Tally:
    """Numerator and denominator of attention over vectors that are gone, in double precision.

    Tallies of parts of a bag merge into the tally of the bag, in any order and grouping, so chunks, workers and ranks
    may each make their own.

    Args:
        peak: largest logit seen, per query and head; -inf of nothing.
        total: sum of ``exp(logit - peak)``.
        sum: the same, weighted with the vectors.
    """

    peak: Float[Tensor, " A"]
    total: Float[Tensor, " A"]
    sum: Float[Tensor, "A D"]

    @classmethod
    def of(cls, logits_NA: Float[Tensor, "N A"], x_ND: Float[Tensor, "N D"]) -> "Tally":
        """Count vectors by their logits; no vectors make the tally that changes nothing."""
        logits, x = logits_NA.double(), x_ND.double()
        if not len(logits):
            nothing = logits.new_zeros(logits.shape[1])
            return cls(nothing - math.inf, nothing, x.new_zeros(logits.shape[1], x.shape[1]))
        peak = logits.amax(0)
        weight_NA = (logits - peak).exp()
        return cls(peak, weight_NA.sum(0), weight_NA.T @ x)

    def merge(self, other: "Tally") -> "Tally":
        """The tally of both."""
        peak = torch.maximum(self.peak, other.peak)
        base = torch.where(peak.isinf(), torch.zeros_like(peak), peak)
        ours, theirs = (self.peak - base).exp(), (other.peak - base).exp()
        return Tally(
            peak,
            self.total * ours + other.total * theirs,
            self.sum * ours[:, None] + other.sum * theirs[:, None],
        )

    @staticmethod
    def merge_all(tallies: Iterable["Tally"]) -> "Tally":
        """The tally of all of them; at least one."""
        return reduce(Tally.merge, tallies)


class QueryAttention(nn.Module):
    """Multi-head attention of learned queries, written so that a vector costs A products to rank and to pool.

    Because the queries are the same for every bag, query and key projection fold into one ``(A, D)`` matrix, and the
    value projection is applied to the pooled vector instead of to all of them. Both are the published module's
    numbers, computed in another order.

    Args:
        width: D of the vectors and of the result.
        num_heads: H.
        num_queries: Q, one per task.
        head_width: E; default D // H.
        dropout: on the attention weights, in training.

    Source: iterative patch selection (arXiv 2210.13007), section on cross-attention.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_queries: int = 1,
        head_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_queries < 1 or (head_width is None and width % num_heads):
            raise ConfigError(
                f"num_heads={num_heads}, num_queries={num_queries}, head_width={head_width}: both counts must be at "
                f"least 1 and num_heads must divide width={width}; change them or give head_width"
            )
        self.num_heads, self.num_queries, self.dropout = num_heads, num_queries, dropout
        self.head_width = width // num_heads if head_width is None else head_width
        inner = num_heads * self.head_width
        self.query = nn.Parameter(torch.empty(num_queries, width).uniform_(-1, 1) / math.sqrt(width))
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key = nn.Linear(width, inner, bias=False)
        self.to_value = nn.Linear(width, inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)

    def folded(self) -> Float[Tensor, "A D"]:
        """Queries times key projection: a vector's logits are its products with these rows, query by query."""
        heads = (self.num_heads, self.head_width)
        query_QHE = self.to_query(self.query).unflatten(1, heads) / math.sqrt(self.head_width)
        key_HED = self.to_key.weight.unflatten(0, heads)
        return torch.einsum("qhe,hed->qhd", query_QHE, key_HED).flatten(0, 1)

    def logits(self, x_ND: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B N A"]:
        """Attention of every query and head to every vector before the softmax, float32."""
        return _products(self.folded(), x_ND)

    def still_logits(self) -> Callable[[Tensor], Tensor]:
        """``logits`` with the weights as they are now, folded once for any number of calls."""
        return partial(_products, self.folded())

    def pool(self, x_ND: Float[Tensor, "*B N D"], whole: Tally | None = None) -> Float[Tensor, "*B Q D"]:
        """What the queries read.

        Args:
            x_ND: vectors of a bag, or of equally many bags; with none of them the result is zero.
            whole: tally of the entire bag, these vectors among them. The result is then attention over the entire
                bag, while the gradient flows through these vectors, and through the value projection of all.

        Raises:
            ShapeError: a tally for more than one bag, or of another attention.
        """
        logits_NA = self.logits(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            x = x_ND.float()
            pooled_AD = self._attend(logits_NA, x) if whole is None else self._complete(logits_NA, x, whole)
        heads = (self.num_queries, self.num_heads)
        value_HED = self.to_value.weight.unflatten(0, (self.num_heads, self.head_width))
        read = torch.einsum("...qhd,hed->...qhe", pooled_AD.to(value_HED.dtype).unflatten(-2, heads), value_HED)
        out: Tensor = self.proj(read.flatten(-2))
        return out

    def _attend(self, logits_NA: Tensor, x_ND: Tensor) -> Tensor:
        share_NA = functional.dropout(logits_NA.softmax(-2), self.dropout, self.training)
        return share_NA.transpose(-1, -2) @ x_ND

    def _complete(self, logits_NA: Tensor, x_ND: Tensor, whole: Tally) -> Tensor:
        """Value of the whole bag, gradient of the vectors at hand: ``whole + (here - here.detach())``."""
        if logits_NA.ndim != 2 or whole.sum.shape != (logits_NA.shape[1], x_ND.shape[1]):
            raise ShapeError(
                f"a tally of {tuple(whole.sum.shape)} for vectors {tuple(x_ND.shape)} and {logits_NA.shape[-1]} "
                "queries of heads; pool one bag at a time with the tally of this attention"
            )
        peak = torch.where(whole.peak.isinf(), torch.zeros_like(whole.peak), whole.peak)
        weight_NA = (logits_NA - peak.to(logits_NA)).exp()
        total, summed = weight_NA.sum(0), weight_NA.T @ x_ND
        total = whole.total.to(total) + total - total.detach()
        summed = whole.sum.to(summed) + summed - summed.detach()
        return summed / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]


def _products(folded_AD: Tensor, x_ND: Tensor) -> Tensor:
    with torch.autocast(x_ND.device.type, enabled=False):
        return functional.linear(x_ND.float(), folded_AD.float())
