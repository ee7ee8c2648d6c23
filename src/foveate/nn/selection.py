"""What a selection is, and what every rule of selection checks and needs.

Legend: N patches of a bag, K kept ones, A queries of single heads, D width or spatial axes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foveate.errors import BudgetError, ConfigError, FormatError
from foveate.geometry.patch_source import PatchSource
from foveate.nn.query_attention import QueryAttention, Tally
from foveate.nn.rank import attention_share


@runtime_checkable
class Scorer(Protocol):
    """What ranks patches; ``QueryAttention`` is one."""

    def logits(self, x_ND: Tensor, /) -> Tensor:
        """``[N, D]`` to ``[N, A]``, each row by itself."""
        ...


def still_logits(scorer: Scorer) -> Callable[[Tensor], Tensor]:
    """``scorer.logits`` for many calls while its weights stay as they are."""
    return scorer.still_logits() if isinstance(scorer, QueryAttention) else scorer.logits


@dataclass(frozen=True)
class Coverage:
    """How much of a bag a selection has looked at.

    Args:
        looked: share of the patches that were encoded with the present weights; 1: the selection is exact.
        missed: with 95 % certainty, at most so many of the kept patches would be others after a look at all; 0 where
            the selection is exact.
        overlap: where a full pass was made in the end, the share of its choice that a look at the remembered
            contenders and the sample would have seen; else None.
    """

    looked: float
    missed: float
    overlap: float | None = None

    @property
    def exact(self) -> bool:
        """Whether every patch was looked at."""
        return self.looked == 1.0


@dataclass(frozen=True, eq=False)
class Selection:
    """The patches of a bag that stay.

    Args:
        index: their positions, ascending.
        score: what each was ranked by, in the order of ``index``; None where all stay and none was looked at.
        num_patches: N.
        logits: attention of every patch before the softmax; None where not all patches have been looked at.
        whole: attention over the entire bag, where asked for; see ``QueryAttention.pool``.
        coverage: of a warm start, how far the selection can be trusted.
    """

    index: Int64[Tensor, " K"]
    score: Float[Tensor, " K"] | None
    num_patches: int
    logits: Float[Tensor, "N A"] | None = None
    whole: Tally | None = None
    coverage: Coverage | None = None

    def attention(self) -> Float[Tensor, " N"]:
        """Share of the attention that each patch of the bag gets, mean over queries and heads: the heatmap.

        Raises:
            ConfigError: not all patches have been looked at.
        """
        if self.logits is None:
            raise ConfigError(
                f"no logits of all {self.num_patches} patches: the bag was kept whole or by the buffered rule; "
                "select with rule='exact' and shortcut=False"
            )
        return attention_share(self.logits)


def check_keep(keep: int) -> int:
    """Returns ``keep``.

    Raises:
        BudgetError: it is below 1.
    """
    if keep < 1:
        raise BudgetError(f"keep={keep} is below 1; keep at least one patch, 64 is usual")
    return keep


def check_finite(logits_UA: Float[Tensor, "U A"], at: Int64[Tensor, " R"], row: Int64[Tensor, " R"]) -> None:
    """Refuses logits that cannot be ranked.

    Args:
        logits_UA: of distinct vectors.
        at: positions in the bag.
        row: the vector of each position.

    Raises:
        FormatError: NaN or infinite.
    """
    # the sum is quick and tells nearly always, but may overflow
    if not bool(logits_UA.sum().isfinite()) and not bool(logits_UA.isfinite().all()):
        bad = (~logits_UA.isfinite()).any(1)
        first = int(at[bad[row].cpu()].min())
        raise FormatError(
            f"patch {first}: its attention is not finite; look for NaN in its pixels, features or weights"
        )


def device_of(*modules: object) -> torch.device:
    """Device of the first parameter found; the CPU where there is none."""
    for module in modules:
        if isinstance(module, nn.Module):
            for tensor in module.parameters():
                return tensor.device
    return torch.device("cpu")


def relative_centres(source: PatchSource) -> Float[Tensor, "N D"]:
    """Centre of every patch over the size of its image, 0 to 1.

    Raises:
        ConfigError: the bag has no boxes or no image size.
    """
    if source.boxes is None or source.shape is None:
        raise ConfigError(
            "a code of place for a bag without boxes or shape: give both with the patches, or position='none'"
        )
    return source.boxes.double().mean(1).div(torch.tensor(source.shape, dtype=torch.float64)).float()
