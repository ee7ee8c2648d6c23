"""Iterative patch selection: of a bag of any size, the patches that the model's own attention would look at.

Legend: N patches of a bag, K kept ones, A queries of single heads, D width.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveate.errors import BudgetError, ConfigError
from foveate.geometry.patch_source import PatchSource, TensorPatches
from foveate.nn.buffered import select_buffered
from foveate.nn.fast_copy import FastCopy
from foveate.nn.query_attention import Tally
from foveate.nn.rank import RANKS, score_patches, top_positions
from foveate.nn.selection import (
    Scorer,
    Selection,
    check_finite,
    check_keep,
    device_of,
    relative_centres,
    still_logits,
)
from foveate.nn.stream import Vectors, encoded_bags, evaluating, in_blocks

RULES = ("exact", "buffered")
_SCORED = 1024  # rows that are scored at a time where they are not scored in the blocks that encode them
_CONTENDERS = 2  # times keep: how many a judge looks at


class PatchSelector:
    """Chooses patches without gradient, in memory that does not grow with the bag but for its logits.

    ``exact`` reads the bag once, keeps the logits alone (A floats per patch), and ranks when it has seen everything.
    The choice is that of attention over the entire bag, the same for every ``chunk``, order and number of workers.
    Encoder and scorer are in evaluation mode meanwhile; afterwards, also behind an error, every one of their modules is
    in the mode that it was in.

    A bag of at most ``keep`` patches is kept whole, and an empty bag gives an empty selection. Nothing is ever padded.

    Args:
        encoder: ``[R, C, *P]`` or ``[R, F]`` float32 to ``[R, D]``, each row by itself in evaluation mode.
        scorer: has ``logits``, such as ``QueryAttention``.
        keep: patches that stay.
        rule: ``exact``, or ``buffered`` (published; depends on ``chunk`` where there is more than one head).
        rank: ``mean`` (published), ``best``, ``lse`` or ``quota``, see ``score_patches``.
        position: takes centres relative to the image ``[R, N]`` to codes ``[R, D]`` that are added before scoring.
        shuffle: whether the buffered rule sees the patches in random order; needs a generator.
        workers: threads that read ahead.
        judge: a dearer and better encoder of the same patches. Twice ``keep`` contenders, chosen by ``encoder``, are
            read and encoded again by it, and the choice among them is by the attention that it gives them.

    Raises:
        BudgetError: ``keep`` below 1.
        ConfigError: an unknown rule or rank, or settings that contradict each other.

    Source: Bergner et al., ICLR 2023, arXiv 2210.13007, algorithm 1. **Differs**: the softmax is over all patches
    and not over buffer and chunk, so the working set need not be as large as ``keep`` and does not change the result.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        scorer: Scorer,
        keep: int = 64,
        *,
        rule: str = "exact",
        rank: str = "mean",
        position: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = False,
        workers: int = 0,
        judge: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_keep(keep)
        if rule not in RULES or rank not in RANKS:
            raise ConfigError(
                f"rule={rule!r}, rank={rank!r}: rules are {', '.join(RULES)}, ranks are {', '.join(RANKS)}; "
                "choose one of each"
            )
        if rule == "buffered" and rank != "mean":
            raise ConfigError(f"rank={rank!r} with rule='buffered': the published rule ranks by 'mean'; choose that")
        if shuffle and rule == "exact":
            raise ConfigError("shuffle=True with rule='exact': the order changes nothing; choose rule='buffered'")
        self.encoder, self.scorer, self.keep = encoder, scorer, keep
        self.rule, self.rank, self.position = rule, rank, position
        if judge is not None and rule == "buffered":
            raise ConfigError("a judge with rule='buffered': the published rule looks once; choose rule='exact'")
        self.shuffle, self.workers, self.judge = shuffle, workers, judge

    @torch.no_grad()
    def select(
        self,
        source: PatchSource | Tensor,
        chunk: int = 256,
        generator: torch.Generator | None = None,
        *,
        keep: int | None = None,
        shortcut: bool = False,
        tally: bool = False,
    ) -> Selection:
        """Choose the patches of one bag.

        Args:
            source: the bag, or its patches ``[N, C, *P]`` or features ``[N, F]``.
            chunk: patches read at a time; sets memory and speed, and with the ``exact`` rule nothing else.
            generator: where the order of a shuffled bag comes from.
            keep: instead of the selector's own.
            shortcut: whether a bag of at most ``keep`` patches is kept without a look at it (published).
            tally: whether to count attention over the entire bag as well.

        Raises:
            BudgetError: ``chunk`` or ``keep`` below 1.
            ConfigError: a shuffle without generator, positions of a bag without boxes, or a tally with a judge, who
                does not see what is tallied.
            FormatError: a patch whose logits are not finite.

        Cost: N encodes, one for all blank patches, and ``2 * keep`` by the judge where there is one; ``4 * A * N``
        bytes, and a chunk and its activations.
        """
        source = TensorPatches(source) if isinstance(source, Tensor) else source
        return self.select_all([source], chunk, generator, keep=keep, shortcut=shortcut, tally=tally)[0]

    @torch.no_grad()
    def select_all(
        self,
        sources: Sequence[PatchSource],
        chunk: int = 256,
        generator: torch.Generator | None = None,
        *,
        keep: int | None = None,
        shortcut: bool = False,
        tally: bool = False,
    ) -> list[Selection]:
        """Choose the patches of several bags, of each the same as ``select`` does, on the CPU to the bit.

        With the ``exact`` rule and without tallies the bags share the blocks that are encoded, which small bags alone
        fill badly. Arguments, errors and cost: see ``select``.
        """
        keep = check_keep(self.keep if keep is None else keep)
        if chunk < 1:
            raise BudgetError(f"chunk={chunk} is below 1; 256 suits most machines")
        if tally and self.judge is not None:
            raise ConfigError(
                "a tally with a judge: it would count vectors of the first look; choose a selector without"
            )
        least = keep if shortcut and not tally else 0  # bags of so few patches are kept without a look
        some = [source for source in sources if len(source) > least]
        with evaluating(self.encoder, self.judge, self.scorer, self.position):
            if self.rule == "buffered":
                found = iter([self._buffered(source, keep, chunk, generator) for source in some])
            else:
                found = self._exact(some, keep, chunk, tally)
            return [
                next(found) if len(source) > least else Selection(torch.arange(len(source)), None, len(source))
                for source in sources
            ]

    def _buffered(self, source: PatchSource, keep: int, chunk: int, generator: torch.Generator | None) -> Selection:
        order, num = self._order(len(source), generator), min(keep, len(source))
        return select_buffered(self.encoder, self.scorer, source, num, chunk, order, self.position)

    def _exact(self, sources: list[PatchSource], keep: int, chunk: int, tally: bool) -> Iterator[Selection]:
        every = torch.arange(max(map(len, sources), default=0))
        for group in [[source] for source in sources] if tally else [sources] if sources else []:
            bags = [(source, every[: len(source)]) for source in group]
            logits_RA, whole = self._look(self.encoder, bags, chunk, tally)
            logits = logits_RA.split([len(source) for source in group])
            among = None if self.judge is None else self._judged(self.judge, group, logits, keep, chunk)
            for place, logits_NA in enumerate(logits):
                num = min(keep, len(logits_NA))
                score_N = score_patches(logits_NA, num, self.rank)
                if among is None:
                    index = top_positions(score_N, num)
                else:
                    some = among[place].to(score_N.device)
                    index = some[top_positions(score_N[some], num)]
                yield Selection(index.cpu(), score_N[index].cpu(), len(logits_NA), logits_NA, whole)

    def _judged(
        self,
        judge: Callable[[Tensor], Tensor],
        sources: list[PatchSource],
        logits: Sequence[Tensor],
        keep: int,
        chunk: int,
    ) -> list[Tensor]:
        """The contenders of every bag, ascending, whose logits are the judge's from here on."""
        among = []
        for logits_NA in logits:
            many = min(_CONTENDERS * keep, len(logits_NA))
            among.append(top_positions(score_patches(logits_NA, many, self.rank), many).cpu())
        exact_RA, _ = self._look(judge, list(zip(sources, among, strict=True)), chunk, False)
        for logits_NA, some, exact in zip(logits, among, exact_RA.split([len(some) for some in among]), strict=True):
            logits_NA[some.to(logits_NA.device)] = exact
        return among

    def _order(self, num_patches: int, generator: torch.Generator | None) -> Tensor:
        if not self.shuffle:
            return torch.arange(num_patches)
        if generator is None:
            raise ConfigError("shuffle=True without a generator: give one, so that the order can be had again")
        return torch.randperm(num_patches, generator=generator)

    def look(
        self, source: PatchSource, index: Int64[Tensor, " R"], chunk: int, *, tally: bool = False
    ) -> tuple[Float[Tensor, "R A"], Tally | None]:
        """Logits of some patches in the order of ``index`` (ascending), by the judge where there is one, and their
        tally where asked for.
        """
        return self._look(self.judge or self.encoder, [(source, index)], chunk, tally)

    def _look(
        self,
        encoder: Callable[[Tensor], Tensor],
        bags: Sequence[tuple[PatchSource, Tensor]],
        chunk: int,
        tally: bool,
    ) -> tuple[Float[Tensor, "R A"], Tally | None]:
        """Logits of all bags, one behind the other, and their tally where asked for."""
        device, score = device_of(encoder, self.scorer), still_logits(self.scorer)
        index = torch.cat([index for _, index in bags])
        place = torch.cat([relative_centres(one)[some] for one, some in bags]) if self.position is not None else None
        apart = tally or place is not None  # otherwise no vector outlives its block
        encode = encoder if apart else lambda x: score(encoder(x))
        logits_RA, whole = None, None
        halves = isinstance(encoder, FastCopy) and encoder.halves
        for part in encoded_bags(encode, bags, chunk, device=device, workers=self.workers, halves=halves):
            for at, x_UD, row in self._placed(part, place):
                logits_UA = in_blocks(score, x_UD, _SCORED) if apart else x_UD
                if logits_RA is None:
                    logits_RA = logits_UA.new_empty(len(index), logits_UA.shape[1])
                check_finite(logits_UA, index[at], row)
                logits_RA[at.to(device)] = logits_UA[row]
                if tally:
                    times = row.bincount(minlength=len(x_UD))
                    some = times > 0
                    one = Tally.of((logits_UA.double() + times.log()[:, None])[some], x_UD[some])
                    whole = one if whole is None else whole.merge(one)
        assert logits_RA is not None
        return logits_RA, whole

    def _placed(self, part: Vectors, place: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Places, vectors and which one each place has; with a code of place each has its own."""
        row = part.row.to(part.x.device)
        if place is None or self.position is None:
            return [(part.index, part.x, row)]
        pieces = zip(part.index.split(_SCORED), row.split(_SCORED), strict=True)
        code = self.position
        return [
            (
                at,
                part.x[which] + in_blocks(code, place[at].to(part.x), _SCORED).to(part.x),
                torch.arange(len(at), device=row.device),
            )
            for at, which in pieces
        ]
