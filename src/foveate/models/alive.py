"""Which tokens of another model's sequence are alive at a block, and what that block gets of its other arguments.

Legend: B images, S positions of the sequence, R of them prefix tokens, L the others, K alive, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.errors import ConfigError, ShapeError
from foveate.nn.pruner import Pruning

PADDING = ("src_key_padding_mask", "key_padding_mask")
ROTARY = ("rope", "position_embeddings")


@dataclass(frozen=True, eq=False)
class Alive:
    """Tokens that a block sees.

    Args:
        tokens: their positions in the pack of all patch tokens, ``[B * L]``, ascending.
        lengths: how many belong to each image, on the host.
        index: positions in the flat sequence ``[B * S]`` of what the block gets, prefix tokens first, ``[B, R + K]``.
        pad: True where ``index`` only fills up a shorter image; None: nowhere.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    index: Tensor
    pad: Tensor | None

    def slots(self) -> Tensor:
        """Positions in the flat ``index`` that are no filling."""
        width, num_prefix = self.index.shape[1], self.index.shape[1] - max(self.lengths)
        ends = [torch.arange(length + num_prefix) + image * width for image, length in enumerate(self.lengths)]
        return torch.cat(ends).to(self.index.device)


@dataclass(eq=False)
class Run:
    """What one forward pass has decided so far.

    Args:
        length: S.
        num_prefix: R.
        alive: tokens before the first prune point, then behind each.
        gone: tokens that left at each prune point.
        noise: state of the generator of the noise at each.
        pruning: how it prunes, for its recomputation; None: it will not be computed again.
        inputs: where the inputs of the blocks lie in memory; recomputation finds its pass by them.
    """

    length: int
    num_prefix: int
    alive: list[Alive] = field(default_factory=list)
    gone: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    pruning: Pruning | None = None
    inputs: set[int] = field(default_factory=set)

    def rows(self, tokens: Tensor) -> Tensor:
        """Positions in the flat sequence of patch tokens."""
        if not self.num_prefix:
            return tokens
        return tokens + (tokens // (self.length - self.num_prefix) + 1) * self.num_prefix

    def go_on(self, tokens: Tensor, lengths: tuple[int, ...]) -> None:
        """Only these tokens from here on."""
        index, pad, device = self.rows(tokens), None, tokens.device
        if len(set(lengths)) == 1:
            index = index.view(len(lengths), -1)
        else:
            index = pad_sequence(index.split(list(lengths)), batch_first=True)
            ends = torch.tensor(lengths, device=device)[:, None]
            pad = torch.arange(index.shape[1], device=device)[None] >= ends
        if self.num_prefix:
            first = torch.arange(len(lengths), device=device)[:, None] * self.length
            index = torch.cat([first + torch.arange(self.num_prefix, device=device), index], 1)
            pad = None if pad is None else torch.cat([pad.new_zeros(len(lengths), self.num_prefix), pad], 1)
        self.alive.append(Alive(tokens, lengths, index, pad))


def start(x_BSD: Tensor, num_prefix: int, kwargs: Mapping[str, Any]) -> Run:
    """A new pass: every token that is no padding is alive.

    Args:
        x_BSD: what the first block gets.
        num_prefix: R.
        kwargs: named arguments of the first block, a mask of padding perhaps among them.

    Raises:
        ShapeError: there are no images, or prefix tokens only.
    """
    num_images, length, _ = x_BSD.shape
    run, number = Run(length, num_prefix), length - num_prefix
    if number < 1 or num_images < 1:
        raise ShapeError(
            f"{num_images} images of {length} tokens, {num_prefix} of them prefix tokens, leave none to prune; give "
            "images, and as num_prefix what the model has"
        )
    masks = [kwargs[name] for name in PADDING if kwargs.get(name) is not None]
    if not masks:
        run.go_on(torch.arange(num_images * number, device=x_BSD.device), (number,) * num_images)
        return run
    valid_BL = (masks[0].logical_not() if masks[0].dtype == torch.bool else masks[0] == 0)[:, num_prefix:]
    run.go_on(valid_BL.flatten().nonzero()[:, 0], tuple(valid_BL.sum(1).tolist()))
    return run


def cut(index: int, name: str, value: Any, run: Run, alive: Alive) -> Any:
    """What another argument of a block is for the tokens that are alive.

    Masks of padding and rotary positions are cut; what does not depend on the number of tokens passes.

    Args:
        index: the block.
        name: of the argument.
        value: of the argument.
        run: the pass.
        alive: the tokens.

    Raises:
        ConfigError: it depends on the number of tokens in a way that is not known.
    """
    if name in ROTARY and isinstance(value, tuple):
        return tuple(cut(index, name, part, run, alive) for part in value)
    lengths = (run.length, run.length - run.num_prefix)
    if not isinstance(value, Tensor) or not set(lengths) & set(value.shape):
        return value
    if name in PADDING:
        mask_BK = value.flatten().index_select(0, alive.index.flatten()).view_as(alive.index)
        full = True if mask_BK.dtype == torch.bool else float("-inf")
        return mask_BK if alive.pad is None else mask_BK.masked_fill(alive.pad, full)
    if name in ROTARY and value.ndim in (2, 3) and value.shape[-2] in lengths:
        skip = run.num_prefix if value.shape[-2] == run.length - run.num_prefix else 0
        place_BK = alive.index[:, skip:] % run.length - skip
        angles = value.index_select(-2, place_BK.flatten()).unflatten(-2, place_BK.shape).movedim(-3, 0)
        return angles[:, None] if value.ndim == 2 else angles
    raise ConfigError(
        f"block {index} takes {name} of shape {tuple(value.shape)}, which pruning cannot cut to the kept tokens; "
        f"choose a model without it, or prune_after blocks from {index} on"
    )
