"""Remember what attention thought of a bag the last time, and look again at those alone that may be chosen.

Legend: N patches of a bag, K kept ones, A queries of single heads, R patches looked at.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveate.errors import ConfigError
from foveate.geometry.image import Real
from foveate.geometry.patch_source import PatchSource
from foveate.nn.rank import score_patches, top_positions
from foveate.nn.selection import Coverage, Selection, check_keep
from foveate.nn.selector import PatchSelector
from foveate.nn.stream import evaluating

_SURE = 0.95  # of the bound on what may be missed


@dataclass(eq=False)
class _Memory:
    logits: Float[Tensor, "N A"]
    order: Int64[Tensor, " N"]
    looks: int = 0


class WarmStart:
    """Selects from bags that come again in every epoch, at a fraction of the encodes.

    Each look encodes the ``contenders * keep`` patches that stood highest the last time and a sample of the others,
    which rotates so that every patch comes up again; every few looks it encodes all. What it may have missed is
    reported with each selection (`Coverage`): the share of the sampled patches that turn out to belong to the chosen
    ones, with its uncertainty, holds for the others too.

    Args:
        contenders: patches that are looked at each time, as a multiple of ``keep``.
        sample: share of the others that is looked at each time, in (0, 1].
        every: a full pass at each so many looks; 1: always.

    Raises:
        ConfigError: a number out of range.

    Cost: ``4 * A * N`` bytes for each bag that is remembered.
    """

    def __init__(self, contenders: Real = 8.0, sample: Real = 0.05, every: int = 5) -> None:
        if contenders < 1 or not 0 < sample <= 1 or every < 1:
            raise ConfigError(
                f"contenders={contenders}, sample={sample}, every={every}: give at least 1, a share in (0, 1] and at "
                "least 1"
            )
        self.contenders, self.sample, self.every = contenders, sample, every
        self._bags: dict[str, _Memory] = {}

    @torch.no_grad()
    def select(
        self, selector: PatchSelector, name: str, source: PatchSource, chunk: int = 256, *, keep: int | None = None
    ) -> Selection:
        """Choose the patches of a bag, with what is remembered of it.

        Args:
            selector: rule ``exact``.
            name: of the bag, the same in every epoch.
            source: the bag; one of another size is new.
            chunk: patches read at a time.
            keep: instead of the selector's own.

        Returns:
            With ``coverage``; ``logits`` hold what was seen last of each patch.

        Raises:
            ConfigError: a selector of the buffered rule, which keeps no logits.
        """
        if selector.rule != "exact":
            raise ConfigError(f"rule={selector.rule!r} keeps no logits to start from; choose rule='exact'")
        keep = min(check_keep(selector.keep if keep is None else keep), len(source))
        if keep == len(source):
            return Selection(torch.arange(keep), None, keep)
        memory = self._bags.get(name)
        if memory is None or len(memory.logits) != len(source):
            memory = self._bags[name] = self._new(selector, source, chunk)
            return self._chosen(selector, memory, keep, Coverage(1.0, 0.0))
        memory.looks += 1
        index, first = self._plan(selector, memory, keep)
        full = memory.looks % self.every == 0
        looked = torch.arange(len(source)) if full else index
        with evaluating(selector.encoder, selector.scorer, selector.position):
            logits_RA, _ = selector.look(source, looked, chunk)
        memory.logits[looked] = logits_RA.cpu()
        score_N = score_patches(memory.logits, keep, selector.rank)
        if full:
            exact = top_positions(score_N, keep)
            seen = float(torch.isin(exact, index).double().mean())
            return self._chosen(selector, memory, keep, Coverage(1.0, 0.0, seen))
        among = top_positions(score_N[index], keep)
        found = index[among]
        sampled = index[~torch.isin(index, first)]
        surprises = int(torch.isin(found, sampled).sum())
        missed = min(float(keep), _upper_share(surprises, len(sampled)) * (len(source) - len(index)))
        coverage = Coverage(len(index) / len(source), missed)
        return Selection(found, score_N[found], len(source), memory.logits, coverage=coverage)

    def _new(self, selector: PatchSelector, source: PatchSource, chunk: int) -> _Memory:
        with evaluating(selector.encoder, selector.scorer, selector.position):
            logits_NA, _ = selector.look(source, torch.arange(len(source)), chunk)
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
        return _Memory(logits_NA.cpu(), order)

    def _plan(self, selector: PatchSelector, memory: _Memory, keep: int) -> tuple[Tensor, Tensor]:
        """What to look at, ascending, and the contenders in it."""
        num = len(memory.logits)
        many = min(num, max(keep, round(self.contenders * keep)))
        first = top_positions(score_patches(memory.logits, many, selector.rank), many)
        count = -(-num // max(1, round(1 / self.sample)))
        start = memory.looks * count % num
        turn = memory.order.roll(-start)[:count]
        return torch.cat([first, turn]).unique(), first

    def _chosen(self, selector: PatchSelector, memory: _Memory, keep: int, coverage: Coverage) -> Selection:
        score_N = score_patches(memory.logits, keep, selector.rank)
        index = top_positions(score_N, keep)
        return Selection(index, score_N[index], len(score_N), memory.logits, coverage=coverage)


def _upper_share(hits: int, trials: int) -> float:
    """Largest share that, at the given certainty, is compatible with ``hits`` of ``trials`` (Clopper and Pearson)."""
    if hits >= trials:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(_SURE, hits + 1, trials - hits))
