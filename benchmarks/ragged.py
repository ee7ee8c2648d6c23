"""One long image among short ones: packed attention and blocks against padding to the longest.

Run ``foveate bench ragged`` (under three CPU minutes) or ``--quick`` (seconds; proves nothing).

Legend: T tokens of the pack, B images, L longest image, D width, H heads, E width of a head.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import record
from _timing import in_turn, speed_up
from foveate.nn.attention import Packing, attend
from foveate.nn.encoder import Block

WIDTH, HEADS = 384, 6
PADDED = "padding to the longest, SDPA with a bool mask of valid keys"
PROTOCOL = """
ViT-S (width 384, 6 heads), float32, one thread, process CPU time, both sides in turn, least of n turns each; spread:
least and greatest ratio of one turn. {lengths}. Packed: the library's attention and blocks. Padded: the same weights
on (images, longest, width), one SDPA call with a bool mask of the valid keys, its input already padded. Attention
alone: queries, keys and values given. Blocks: {depth} pre-norm block(s) with all their linear maps. Backward: of a
fixed random weighting of the valid outputs, to inputs and weights. Outputs of both sides on valid tokens are required
to be equal within 1e-5 (of the largest entry, where that is above 1) before timing, and gradients of the inputs in the
timed passes; otherwise nothing is written. Ideal: ratio of the FLOPs, 4 L^2 D per image for attention and 24 L D^2 for
the rest of a block.
"""

Inputs = tuple[Tensor, ...]
Side = Callable[..., Tensor]


def draw_lengths(longest: int, num_short: int, short: int) -> tuple[int, ...]:
    """One long image in the middle of short ones, which vary by 40 % around their mean."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(int(0.6 * short), int(1.4 * short), num_short).tolist()
    return (*lengths[: num_short // 2], longest, *lengths[num_short // 2 :])


def pad(x_TX: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(x_TX.split(list(lengths))), batch_first=True)


def masked_attention(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor, valid_BL: Tensor) -> Tensor:
    q, k, v = (x_BLHE.transpose(1, 2) for x_BLHE in (q_BLHE, k_BLHE, v_BLHE))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=valid_BL[:, None, None, :]).transpose(1, 2)


def masked_block(block: Block, x_BLD: Tensor, valid_BL: Tensor) -> Tensor:
    qkv = block.attn.qkv(block.norm1(x_BLD)).unflatten(2, (3, HEADS, -1))
    x_BLD = x_BLD + block.attn.proj(masked_attention(*qkv.unbind(2), valid_BL).flatten(2))
    return x_BLD + block.mlp(block.norm2(x_BLD))


def ideal(lengths: tuple[int, ...], *, blocks: bool) -> float:
    """Ratio of the FLOPs of padding to those of packing."""

    def flops(length: int) -> int:
        return 4 * length**2 * WIDTH + (24 * length * WIDTH**2 if blocks else 0)

    return len(lengths) * flops(max(lengths)) / sum(map(flops, lengths))


class Case:
    """One thing to measure on both sides: packed inputs and padded copies, with and without a backward pass."""

    def __init__(self, inputs: Inputs, lengths: tuple[int, ...], packed: Side, padded: Side) -> None:
        self.lengths, self.valid_BL = lengths, pad(torch.ones(sum(lengths)), lengths).bool()
        self.sides = {"packed": packed, "padded": padded}
        self.inputs = {"packed": inputs, "padded": tuple(pad(x, lengths) for x in inputs)}
        weight = torch.randn(packed(*inputs).shape)
        self.weight = {"packed": weight, "padded": pad(weight, lengths)}

    def forward(self, side: str) -> Tensor:
        with torch.no_grad():
            return self.sides[side](*self.inputs[side])

    def both(self, side: str) -> Inputs:
        """Gradients of the inputs; those of the weights come with them and are dropped."""
        inputs = tuple(x.detach().requires_grad_() for x in self.inputs[side])
        self.sides[side](*inputs).backward(self.weight[side])
        return tuple(x.grad for x in inputs if x.grad is not None)

    def gap(self, results: dict[str, Inputs]) -> float:
        """Largest difference of the two sides; ends the run where it is above 1e-5."""
        worst = 0.0
        for packed, padded in zip(results["packed"], results["padded"], strict=True):
            scale = max(1.0, float(packed.abs().max()))
            worst = max(worst, float((packed - padded[self.valid_BL]).abs().max()) / scale)
        if not worst <= 1e-5:
            raise SystemExit(f"packed and padded differ by {worst:.1e}, above 1e-5: nothing is written")
        return worst


def claims_of(name: str, case: Case, turns: int, *, backward: bool, blocks: bool) -> list[dict[str, Any]]:
    results: dict[str, Inputs] = {}

    def call(side: str) -> None:
        results[side] = case.both(side) if backward else (case.forward(side),)

    for side in ["packed"] if backward else case.sides:  # padded gradients are too dear to be made once more
        call(side)
    if not backward:
        case.gap(results)
    taken = in_turn({side: partial(call, side) for side in case.sides}, turns)
    error = case.gap(results)
    ratio, spread = speed_up(taken["padded"], taken["packed"])
    bound = ideal(case.lengths, blocks=blocks)
    what = "gradients" if backward else "outputs"
    note = (
        f"{min(taken['packed']):.3f} s against {min(taken['padded']):.2f} s, n = {turns}; ideal {bound:.1f}x; {what} "
    )
    note += f"{error:.0e} apart"
    if backward:
        return [record.claim(name, ratio, "x", PADDED, "reported", met=True, spread=spread, note=note)]
    part = tuple(value / bound for value in spread)
    return [
        record.claim(name, ratio, "x", PADDED, 10, spread=spread, note=note),
        record.claim(f"{name}.of_ideal", ratio / bound, "of ideal", "ratio of the FLOPs", 0.9, spread=part),
    ]


def main(quick: bool = False, out: Path = record.RESULTS) -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = draw_lengths(256, 3, 32) if quick else draw_lengths(4096, 15, 350)
    depth = 1
    packing = Packing(lengths)
    valid_BL = pad(torch.ones(sum(lengths)), lengths).bool()
    stack = nn.ModuleList(Block(WIDTH, HEADS, 4.0, None) for _ in range(depth))

    def packed_stack(x: Tensor) -> Tensor:
        for block in stack:
            x = block(x, packing)
        return x

    def padded_stack(x: Tensor) -> Tensor:
        for block in stack:
            assert isinstance(block, Block)
            x = masked_block(block, x, valid_BL)
        return x

    qkv = tuple(torch.randn(sum(lengths), HEADS, WIDTH // HEADS) for _ in range(3))
    attention = Case(
        qkv, lengths, lambda q, k, v: attend(q, k, v, packing), lambda q, k, v: masked_attention(q, k, v, valid_BL)
    )
    blocks = Case((torch.randn(sum(lengths), WIDTH),), lengths, packed_stack, padded_stack)
    claims = claims_of("ragged.attention.forward", attention, 2 if quick else 3, backward=False, blocks=False)
    claims += claims_of("ragged.block.forward", blocks, 2 if quick else 3, backward=False, blocks=True)
    claims += claims_of("ragged.attention.forward_backward", attention, 2, backward=True, blocks=False)
    claims += claims_of("ragged.block.forward_backward", blocks, 2, backward=True, blocks=True)
    mean = sum(lengths) / len(lengths)
    text = f"{len(lengths)} images, the longest of {max(lengths)} tokens, the others {min(lengths)} to "
    text += f"{sorted(lengths)[-2]}, {mean:.0f} on average"
    head = "QUICK RUN, proves nothing. " if quick else ""
    return record.write("ragged", head + PROTOCOL.format(lengths=text, depth=depth), claims, out)


if __name__ == "__main__":
    args = record.arguments(__doc__).parse_args()
    print(main(args.quick, args.out))
