"""Patches in which something is to be seen: what training starts with, while attention does not know what to look for.

Legend: N patches of a bag, M positions that are remembered, R patches that are read.
"""

from dataclasses import replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from foveate.errors import BudgetError
from foveate.geometry.patch_source import PatchSource, constant_of
from foveate.nn.selection import Selection
from foveate.nn.stream import in_blocks

_ROWS = 64  # at a time, always, so that the bits do not depend on the chunk


class DetailPrior:
    """Remembers the most detailed patches of bags that come again in every epoch.

    Detail is the variance of a patch's own numbers, pixels or features, so it depends on no weight and on no other
    patch, and a bag is read for it once. What is blank by `constant_of` has none and is not read.

    Args:
        most: positions that are remembered of each bag, M; what is asked for later is at most that.

    Raises:
        BudgetError: ``most`` below 1.

    Cost: one pass over each bag without encoding, then ``8 * M`` bytes for it.
    Source: the start of iterative patch selection (arXiv 2210.13007) is chance. **Differs**: with few kept patches and
    sparse evidence that is a lottery, which this draws from the better end.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise BudgetError(f"most={most} is below 1; remember at least as many patches as the first epoch takes")
        self.most = most
        self._order: dict[str, Tensor] = {}

    def order(self, name: str, source: PatchSource, chunk: int = 256) -> Int64[Tensor, " M"]:
        """Positions of the most detailed patches, most first; of equal ones the earlier first.

        Args:
            name: of the bag, the same in every epoch.
            source: the bag.
            chunk: patches read at a time.
        """
        if name not in self._order:
            rank = detail(source, chunk).argsort(descending=True, stable=True)
            self._order[name] = rank[: self.most].clone()
        return self._order[name]

    def add(self, selection: Selection, name: str, source: PatchSource, count: int, chunk: int = 256) -> Selection:
        """The selection and ``count`` patches more, the most detailed ones that it lacks."""
        order = self.order(name, source, chunk)
        more = order[~torch.isin(order, selection.index)][:count]
        return replace(selection, index=torch.cat([selection.index, more]).sort().values, score=None)


def detail(source: PatchSource, chunk: int = 256) -> Float64[Tensor, " N"]:
    """Variance of the numbers of every patch, in double precision; 0 for patches that are known to be constant."""
    found = torch.zeros(len(source), dtype=torch.float64)
    blank = constant_of(source)
    index = torch.arange(len(source)) if blank is None else (~blank).nonzero()[:, 0]
    for some in index.split(chunk):
        values_RX = source.read(some).flatten(1)
        found[some] = in_blocks(_variance, values_RX, _ROWS).cpu()
    return found


def _variance(values_RX: Tensor) -> Tensor:
    return values_RX.double().var(1, correction=0)
