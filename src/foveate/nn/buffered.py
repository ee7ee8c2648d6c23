"""The published selection rule: a buffer of the best so far, and the softmax over buffer and chunk alone.

Legend: N patches, K kept ones, R patches of a chunk, A queries of single heads.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from foveate.geometry.patch_source import PatchSource
from foveate.nn.selection import Scorer, Selection, check_finite, device_of, relative_centres
from foveate.nn.stream import as_float


def select_buffered(
    encoder: Callable[[Tensor], Tensor],
    scorer: Scorer,
    source: PatchSource,
    keep: int,
    chunk: int,
    order: Int64[Tensor, " N"],
    position: Callable[[Tensor], Tensor] | None = None,
) -> Selection:
    """The patches that the published loop keeps.

    The buffer starts with the first ``keep`` patches. Every chunk is ranked together with the buffer by the attention
    among these alone, averaged over heads and queries. With one head that orders patches as attention over the whole
    bag does. With more it does not: the normaliser of each head depends on what happens to be in the buffer, so the
    result depends on ``chunk`` and on the order.

    Args:
        encoder: in evaluation mode.
        scorer: in evaluation mode.
        source: the bag.
        keep: at most N; all N are kept without a look.
        chunk: R.
        order: the patches in the order in which they come.
        position: code of place, added for the scoring alone.

    Source: arXiv 2210.13007, algorithm 1.
    """
    if keep == len(order):
        return Selection(order.sort().values, None, len(order))
    device = device_of(encoder, scorer)
    place = relative_centres(source) if position is not None else None

    def encode(index: Tensor) -> Tensor:
        return encoder(as_float(source.read(index).to(device)))

    def score(index: Tensor, x: Tensor) -> Tensor:
        if place is not None and position is not None:
            x = x + position(place[index].to(x)).to(x)
        logits = scorer.logits(x)
        check_finite(logits, index, torch.arange(len(index), device=logits.device))
        return logits.softmax(0).mean(1)

    buffer, x_KD = order[:keep], encode(order[:keep])
    best = x_KD.new_zeros(keep)
    for part in order[keep:].split(chunk):
        index, x = torch.cat([buffer, part]), torch.cat([x_KD, encode(part)])
        top = score(index, x).topk(keep)
        buffer, x_KD, best = index[top.indices.cpu()], x[top.indices], top.values
    ascending = buffer.sort()
    return Selection(ascending.values, best.cpu().double()[ascending.indices], len(order))
