"""Soft top-k token pruning (STP): which tokens go on through the encoder, with a gradient through the choice.

Legend: T tokens of a pack, L tokens of an image, K kept or alive, R pruned, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foveate.errors import BudgetError
from foveate.geometry.image import Real
from foveate.geometry.soft_estimators import estimator_of
from foveate.geometry.split import Split, soft_topk
from foveate.nn.attention import Packing

KeepRatio = Real | tuple[Real, ...]
LEAST = 16
"""Tokens of an image below which pruning never goes, unless the image has fewer."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a prune point thought of the tokens that reached it.

    Args:
        rows: their positions in the pack, ascending.
        score: their importance, with gradient.
        kept: positions in ``rows`` of those that went on.
        x: the tokens, without gradient, where there is somebody to read them.
    """

    rows: Int64[Tensor, " K"]
    score: Float[Tensor, " K"]
    kept: Int64[Tensor, " _"]
    x: Float[Tensor, "K D"] | None = None


@dataclass(frozen=True)
class Pruning:
    """How to prune in one call of an encoder.

    Args:
        keep_ratio: instead of the model's own; see `keep_counts`.
        noise: generator of the Gumbel noise that lets training explore; None: the plain top-k, as in evaluation.
        noise_scale: factor on the noise, >= 0; anneal it to 0, so that training ends with the choice that evaluation
            makes.
        scores: receives what each prune point thought of its tokens, for a loss on them.
    """

    keep_ratio: KeepRatio | None = None
    noise: torch.Generator | None = None
    noise_scale: float = 1.0
    scores: list[Scores] | None = None


AS_TRAINED = Pruning()


@dataclass(frozen=True, eq=False)
class Pruned:
    """What one prune point decided about a pack, the pack taken as one sequence.

    Args:
        split: positions in the pack that stay and that leave; ascending, so images stay in order.
        gate: 1 on kept and 0 on pruned tokens, with the gradient of the estimator.
        score: importance of every token.
        packing: kept tokens per image.
        gate_pruned: whether the pruned tokens carry the gate too.
    """

    split: Split
    gate: Float[Tensor, " T"]
    score: Float[Tensor, " T"]
    packing: Packing
    gate_pruned: bool = True

    def apply(self, x_TD: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "K D"], Float[Tensor, "R D"]]:
        """Return the kept and the pruned tokens; where both carry the gate's gradient, it is of opposite sign."""
        kept, pruned = self.split.gather(x_TD[None])
        if not self.gate.requires_grad:
            return kept[0], pruned[0]
        gate_kept, gate_pruned = self.split.gather(self.gate[None, :, None].to(x_TD.dtype))
        return (kept * gate_kept)[0], (pruned * (1 - gate_pruned) if self.gate_pruned else pruned)[0]


def keep_counts(length: int, keep_ratio: KeepRatio, num_stages: int) -> tuple[int, ...]:
    """Tokens of an image that are left after each prune point, in exact arithmetic.

    Args:
        length: tokens of the image before any pruning, L >= 1.
        keep_ratio: in (0, 1]. One number: this share stays at every prune point, again and again. A tuple: the share of
            all L tokens that is left after each prune point, never rising.
        num_stages: prune points.

    Returns:
        Never rising counts, never below min(L, 16).

    Raises:
        BudgetError: a ratio outside (0, 1], a rising one, or not one for each prune point.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522.
    **Differs**: the released code takes int(L * (1 - r)) of what is left in floating point, which goes
    1728 -> 172 -> 17 -> 1 and may reach 0; here counts are rounded from exact fractions of L and have a floor.
    """
    ratios = keep_ratio if isinstance(keep_ratio, tuple) else (keep_ratio,)
    if not all(0 < ratio <= 1 for ratio in ratios) or list(ratios) != sorted(ratios, reverse=True):
        raise BudgetError(f"keep_ratio={keep_ratio} must lie in (0, 1] and never rise; 0.25 keeps a quarter")
    exact = [Fraction(ratio).limit_denominator(10**6) for ratio in ratios]
    if isinstance(keep_ratio, tuple):
        if len(exact) != num_stages:
            raise BudgetError(
                f"keep_ratio={keep_ratio} has {len(exact)} shares for {num_stages} prune points; give one each"
            )
    else:
        exact = [exact[0] ** (stage + 1) for stage in range(num_stages)]
    least = min(length, LEAST)
    return tuple(max(least, round(length * share)) for share in exact)


class TokenPruner(nn.Module):
    """One prune point: score the tokens, keep the best of every image.

    Args:
        scorer: maps tokens ``[T, D]`` and their `Packing` to scores ``[T]``.
        estimator: gradient of the choice: "threshold" (default), "softmax" (published), "lapsum" or "perturbed", see
            `foveate.geometry.soft_estimators`.
        gate_pruned: whether pruned tokens carry the gate as well (published), so that a score learns how useful its
            token would be where it is kept minus how useful it is where it is pruned; otherwise the first alone.

    Raises:
        ConfigError: an unknown estimator.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, soft top-k token pruning.
    **Differs**: index gathers only, the same path in training and inference; noise is optional, comes from a given
    generator and can be annealed; a gate acts once, at its own prune point.
    """

    def __init__(self, scorer: nn.Module, estimator: str = "threshold", *, gate_pruned: bool = True) -> None:
        super().__init__()
        estimator_of(estimator)
        self.scorer, self.estimator, self.gate_pruned = scorer, estimator, gate_pruned

    def forward(
        self, x_TD: Float[Tensor, "T D"], packing: Packing, keep: Sequence[int], pruning: Pruning = AS_TRAINED
    ) -> Pruned:
        """Choose the tokens of every image.

        Args:
            x_TD: tokens of the pack, prefix tokens left out.
            packing: tokens per image.
            keep: tokens to keep of each image.
            pruning: noise of this call; its ``keep_ratio`` has been turned into ``keep`` by the caller.

        Cost: the scorer, and a sort per image.
        """
        score_T = self.scorer(x_TD, packing)
        kept, left, gates, offset = [], [], [], 0
        for score_L, number in zip(score_T.split(list(packing.lengths)), keep, strict=True):
            split, gate = soft_topk(
                score_L[None],
                number,
                noise=pruning.noise,
                noise_scale=pruning.noise_scale,
                estimator=self.estimator,
            )
            kept.append(split.kept[0] + offset)
            left.append(split.pruned[0] + offset)
            gates.append(gate[0])
            offset += len(score_L)
        split = Split(torch.cat(kept)[None], torch.cat(left)[None])
        packing = Packing(tuple(keep), x_TD.device)
        return Pruned(split, torch.cat(gates), score_T, packing, gate_pruned=self.gate_pruned)
