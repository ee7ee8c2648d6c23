"""A batch of one long image among fifteen short ones: packed, against padded to the longest with a mask.

Run ``foveate bench ragged`` (about two CPU minutes) or ``--quick`` (seconds; proves nothing).
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import record
from foveate.nn.attention import Packing, attend
from foveate.nn.encoder import Block

LENGTHS = (4096, 96, 112, 136, 152, 184, 208, 232, 256, 280, 304, 336, 368, 400, 448, 512)
QUICK = (256, 6, 8, 8, 9, 11, 13, 14, 16, 17, 19, 21, 23, 25, 28, 32)
WIDTH, HEADS = 384, 6
AGAINST = "padded to the longest image, with a mask over padding"
PROTOCOL = """
Forward, no gradients, one thread, process CPU time, packed and padded interleaved, best of the repeats. Sixteen images
of LENGTHS tokens, the sizes of ViT-S (width 384, 6 heads). Attention: foveate.nn.attention.attend on the pack against
one scaled_dot_product_attention on [16, 6, max, 64] with a boolean key mask. Block: one whole ViT-S block (norms, qkv,
attention, projection, mlp) on the pack against the same weights on [16, max, 384] with that mask. Both sides are
checked to agree on every real token before they are timed. The formula is 24 L E^2 + 4 L^2 E operations for a block,
summed over the images, with L the longest for the padded side; a ratio above the formula's is the mask's own cost.
The spread runs over the repeats, round by round.
"""


def padded_attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, valid_BL: Tensor) -> Tensor:
    """The usual way: keys that are padding get no weight."""
    return functional.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=valid_BL[:, None, None, :])


def padded_block(block: Block, x_BLD: Tensor, valid_BL: Tensor) -> Tensor:
    """A block on a padded batch, with the same weights."""
    qkv = block.attn.qkv(block.norm1(x_BLD)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    mixed = padded_attention(*qkv.unbind(0), valid_BL).transpose(1, 2).flatten(2)
    x_BLD = x_BLD + block.attn.proj(mixed)
    return x_BLD + block.mlp(block.norm2(x_BLD))


def attention_pair(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[Callable[[], Tensor], ...]:
    packing, valid = Packing(lengths), padding(lengths)
    parts = [torch.randn(sum(lengths), HEADS, WIDTH // HEADS).to(dtype) for _ in range(3)]
    padded = [pad(part, lengths).transpose(1, 2).contiguous() for part in parts]
    return lambda: attend(*parts, packing), lambda: padded_attention(*padded, valid).transpose(1, 2)


def block_pair(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[Callable[[], Tensor], ...]:
    packing, valid = Packing(lengths), padding(lengths)
    block = Block(WIDTH, HEADS, 4.0, None).to(dtype).eval()
    x = torch.randn(sum(lengths), WIDTH).to(dtype)
    padded = pad(x, lengths)
    return lambda: block(x, packing), lambda: padded_block(block, padded, valid)


def padding(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def pad(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return pad_sequence(list(x.split(list(lengths))), batch_first=True)


def cpu_seconds(call: Callable[[], Tensor]) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str, formula: float, pair: tuple[Callable[[], Tensor], ...], repeats: int, valid: Tensor) -> Any:
    packed, padded = pair
    torch.testing.assert_close(padded()[valid].float(), packed().float(), rtol=0.05, atol=0.05)
    rounds = [(cpu_seconds(packed), cpu_seconds(padded)) for _ in range(repeats)]
    best = [min(side) for side in zip(*rounds, strict=True)]
    ratios = [slow / fast for fast, slow in rounds]
    note = f"{best[0] * 1e3:.0f} ms against {best[1] * 1e3:.0f} ms; the formula says {formula:.1f} x"
    value = best[1] / best[0]
    return record.claim(name, value, "x", AGAINST, 10, spread=(min(ratios), max(ratios)), note=note)


def main(quick: bool = False, out: Path = record.RESULTS) -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths, repeats = (QUICK, 1) if quick else (LENGTHS, 4)
    longest, total, squares = max(lengths), sum(lengths), sum(length**2 for length in lengths)
    quadratic = len(lengths) * longest**2 / squares
    whole = len(lengths) * longest * (6 * WIDTH + longest) / (6 * WIDTH * total + squares)
    cases = [
        ("ragged.attention.float32", quadratic, attention_pair, torch.float32),
        ("ragged.attention.bfloat16", quadratic, attention_pair, torch.bfloat16),
        ("ragged.block.float32", whole, block_pair, torch.float32),
        ("ragged.block.bfloat16", whole, block_pair, torch.bfloat16),
    ]
    valid = padding(lengths)
    with torch.no_grad():
        claims = [measure(name, ratio, pair(lengths, dtype), repeats, valid) for name, ratio, pair, dtype in cases]
    size = "A quick run with short images, which proves nothing. " if quick else ""
    return record.write("ragged", size + PROTOCOL.replace("LENGTHS", ", ".join(map(str, lengths))), claims, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    print(main(args.quick, args.out))
