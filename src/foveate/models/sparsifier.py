"""Token pruning around the blocks of another model, whose own forward stays as it is.

Legend: B images, S positions of the host's sequence, R of them prefix tokens, L the others, K kept, T = B * L, D width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import ShapeError
from foveate.models.alive import Alive, Run, cut, start
from foveate.models.completion import Completion
from foveate.nn.attention import Packing
from foveate.nn.pruner import AS_TRAINED, KeepRatio, Pruning, Scores, TokenPruner, keep_counts
from foveate.nn.scorer import TokenScorer


class Sparsifier(nn.Module):
    """Behind some blocks of a host model tokens are scored and chosen; later blocks see only the kept ones.

    The host sees sequences of full length everywhere: around each block the pruned tokens lie at their places with the
    state that they left with. A forward pass leaves its choice here, so threads must not share a model
    (``torch.nn.DataParallel`` does; use ``DistributedDataParallel``). Recomputation in the backward pass (activation
    checkpointing) repeats the choice of its own forward pass, one of the last 16.

    Args:
        host: the model that owns the blocks.
        blocks: its blocks, in the order in which they run.
        width: D.
        num_heads: of the attention of the completion; must divide D.
        num_prefix: R, tokens in front of the others that are never pruned.
        prune_after: blocks behind which tokens leave.
        keep_ratio: see `foveate.nn.pruner.keep_counts`.
        completion: "cross", "none" or "block", see `Completion`.
        estimator: gradient of the choice, see `foveate.nn.pruner.TokenPruner`.
        scorer: "light" or "published".
        batch_first: whether blocks take ``[B, S, D]``; otherwise ``[S, B, D]``.
    """

    def __init__(
        self,
        host: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        width: int,
        num_heads: int,
        num_prefix: int,
        prune_after: tuple[int, ...],
        keep_ratio: KeepRatio,
        completion: str,
        estimator: str,
        scorer: str,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.num_prefix, self.prune_after, self.keep_ratio = num_prefix, prune_after, keep_ratio
        self.batch_first = batch_first
        self.pruning: Pruning = AS_TRAINED
        """How to prune from now on: another ``keep_ratio``, noise in training."""
        published = scorer == "published"
        self.pruners = nn.ModuleList(
            TokenPruner(TokenScorer(width, published=published), estimator) for _ in prune_after
        )
        self.completion = Completion(width, num_heads, len(prune_after), completion)
        self._run: Run | None = None
        self._last = -1
        self._runs: deque[Run] = deque(maxlen=16)
        self._host, self._blocks = [host], list(blocks)  # lists, which make them no children of this module
        self._before: list[Callable[..., Any] | None] = [vars(block).get("forward") for block in blocks]
        for index, block in enumerate(blocks):
            block.forward = partial(self.around, index)
        host.sparsifier = self

    def remove(self) -> nn.Module:
        """Undo: the host is dense again, with the weights that it has now.

        Returns:
            The host.
        """
        (host,) = self._host
        for block, before in zip(self._blocks, self._before, strict=True):
            vars(block).pop("forward")
            if before is not None:
                block.forward = before
        del host.sparsifier
        return host

    @contextmanager
    def scores(self) -> Iterator[list[Scores]]:
        """Collect what the prune points think of the tokens, with gradient, for a loss on it.

        ``rows`` of a `Scores` are positions in the pack of all images' patch tokens: image * L + place.
        """
        before, found = self.pruning, list[Scores]()
        self.pruning = replace(before, scores=found)
        try:
            yield found
        finally:
            self.pruning = before

    def around(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run block ``index`` of the host on the tokens that are alive there."""
        run, again = self._follow(index, x, kwargs)
        stage = sum(point < index for point in self.prune_after)
        if stage:
            y_BSD, rest = self._on_kept(index, self._turn(x), run, run.alive[stage], args, kwargs)
        else:
            y_BSD, rest = self._inner(index, x, *args, **kwargs)
            if y_BSD.shape != self._turn(x).shape:
                shapes = f"{tuple(self._turn(x).shape)} into {tuple(y_BSD.shape)}"
                raise ShapeError(f"block {index} turns {shapes}; pruning needs blocks that keep the shape")
        if index in self.prune_after:
            y_BSD = self._prune(y_BSD, stage, run, again)
        if index == len(self._blocks) - 1:
            y_BSD = self.completion(y_BSD.flatten(0, 1), run).view_as(y_BSD)
            self._run = None
        return self._turn(y_BSD) if rest is None else (self._turn(y_BSD), *rest)

    def _on_kept(
        self, index: int, x_BSD: Tensor, run: Run, alive: Alive, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Run a block on the tokens that are alive; the others lie where they were."""
        x_SD, rows = x_BSD.flatten(0, 1), alive.index.flatten()
        kept_BKD = x_SD.index_select(0, rows).unflatten(0, alive.index.shape)
        extra = [cut(index, f"argument {place + 2}", value, run, alive) for place, value in enumerate(args)]
        named = {name: cut(index, name, value, run, alive) for name, value in kwargs.items()}
        y_BKD, rest = self._inner(index, self._turn(kept_BKD), *extra, **named)
        y_KD = y_BKD.flatten(0, 1)
        if alive.pad is not None:
            slots = alive.slots()
            y_KD, rows = y_KD.index_select(0, slots), rows.index_select(0, slots)
        dtype = torch.promote_types(x_SD.dtype, y_KD.dtype)
        return x_SD.to(dtype).index_copy(0, rows, y_KD.to(dtype)).view_as(x_BSD), rest

    def _inner(self, index: int, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
        """The tokens behind a block's own forward, and what else it returns, None where that is no tuple."""
        block, before = self._blocks[index], self._before[index]
        out = type(block).forward(block, *args, **kwargs) if before is None else before(*args, **kwargs)
        return (self._turn(out[0]), out[1:]) if isinstance(out, tuple) else (self._turn(out), None)

    def _turn(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)

    def _follow(self, index: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[Run, bool]:
        """The pass that a call of a block belongs to, and whether the backward pass computes it again."""
        if x.is_nested or x.ndim != 3:
            raise ShapeError(
                f"block {index} got {'nested tokens' if x.is_nested else f'{x.ndim} axes'}, and pruning needs "
                "[images, tokens, width]; choose a model on plain sequences (enable_nested_tensor=False in torch)"
            )
        eager = not torch.compiler.is_compiling()
        again = eager and torch._C._current_graph_task_id() != -1
        if again:
            self._run = self._find(index, x.data_ptr())
        elif index == 0:
            self._run = start(self._turn(x), self.num_prefix, kwargs)
            if eager and (torch.is_grad_enabled() or x.requires_grad):
                self._run.pruning = replace(self.pruning, scores=None)
                self._runs.append(self._run)
        run = self._run
        if run is None:
            raise ShapeError(f"block {index} ran before block 0; pruning needs the blocks in their order, from 0 on")
        length = x.shape[1 if self.batch_first else 0]
        if length != run.length:
            raise ShapeError(
                f"block {index} got {length} tokens where block 0 got {run.length}; "
                "pruning needs a model that keeps the number of its tokens"
            )
        if eager and not again and self._runs and self._runs[-1] is run:
            run.inputs.add(x.data_ptr())
        return run, again

    def _find(self, index: int, place: int) -> Run:
        """The pass whose block had its input at a place in memory; inside a recomputed segment, that of the segment."""
        found = next((run for run in reversed(self._runs) if place in run.inputs), None)
        if found is None and index == self._last + 1:
            found = self._run
        self._last = index
        if found is None:
            raise ShapeError(
                f"block {index} is computed again for none of the last {len(self._runs)} forward passes; call backward "
                "before, or do without activation checkpointing"
            )
        return found

    def _prune(self, y_BSD: Tensor, stage: int, run: Run, again: bool) -> Tensor:
        y_SD, alive = y_BSD.flatten(0, 1), run.alive[stage]
        pruning = run.pruning if again and run.pruning is not None else self.pruning
        if pruning.noise is not None and again:
            noise = torch.Generator(pruning.noise.device).set_state(run.noise[stage])
            pruning = replace(pruning, noise=noise)
        elif pruning.noise is not None:
            run.noise.append(pruning.noise.get_state())
        rows = run.rows(alive.tokens)
        x_KD = y_SD.index_select(0, rows)
        ratio = self.keep_ratio if pruning.keep_ratio is None else pruning.keep_ratio
        stages = len(self.prune_after)
        keep = [keep_counts(length, ratio, stages)[stage] for length in run.alive[0].lengths]
        pruned = self.pruners[stage](x_KD, Packing(alive.lengths, rows.device), keep, pruning)
        kept, gone = pruned.split.kept[0], pruned.split.pruned[0]
        if pruned.gate.requires_grad:
            order = rows.index_select(0, torch.cat([kept, gone]))
            y_SD = y_SD.index_copy(0, order, torch.cat(pruned.apply(x_KD)))
        if not again:
            run.go_on(alive.tokens.index_select(0, kept), pruned.packing.lengths)
            run.gone.append(alive.tokens.index_select(0, gone))
            if pruning.scores is not None:
                pruning.scores.append(Scores(alive.tokens, pruned.score, kept))
        return y_SD.view_as(y_BSD)
