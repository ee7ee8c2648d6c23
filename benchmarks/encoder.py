"""Fewer tokens, less time: the encoder's measured speed-up over the one that its FLOPs predict.

Run ``foveate bench encoder`` (about two CPU minutes) or ``--quick`` (seconds; proves nothing).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import record
from _timing import in_turn, speed_up
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.nn.encoder import Encoder, EncoderConfig
from foveate.testing import synthetic_image

PATCH, CHANNELS = 16, 3
PROTOCOL = """
ViT-S encoder (width 384, 6 heads, {depth} blocks, class token), patch size 16, 3 channels, float32, one thread, process
CPU time, one image of {side}^2 (foveate.testing.synthetic_image), all lengths in turn, least of n turns; spread: least
and greatest of one turn. The long sequence is the uniform grid of 16-pixel leaves, the short ones are adaptive leaves
of the same image, least size 16. The call is the whole encoder on packed patches: projection, positions averaged over
the leaves' boxes, code of place and size, blocks, norm; the tree and the patches are made before. Training step:
forward, backward of the mean square of the last hidden state, AdamW. Prediction: ratio of
F(L) = depth (24 L E^2 + 4 L^2 E) + 2 L C P^2 E at the true number of leaves.
"""


def flops(config: EncoderConfig, length: int) -> float:
    """FLOPs of one forward pass over one image."""
    blocks = config.depth * (24 * length * config.width**2 + 4 * length**2 * config.width)
    return blocks + 2 * length * config.in_chans * config.patch_size**2 * config.width


def cut(side: int, budgets: tuple[int, ...]) -> list[Patches]:
    """The image on its uniform grid, and on as many adaptive leaves as each budget allows."""
    pixels, _ = synthetic_image(side, seed=0)
    image = pixels.astype(np.float32) / 255 - 0.5
    trees = [adaptive_leaves(image, max_leaves=budget, min_size=PATCH) for budget in budgets]
    return [patchify(image, leaves, PATCH) for leaves in (uniform_leaves((side, side), PATCH), *trees)]


def forward(encoder: Encoder, patches: Patches) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return encoder(patches)

    return call


def training_step(encoder: Encoder, patches: Patches) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-5)

    def call() -> None:
        optimizer.zero_grad()
        encoder(patches).hidden[-1].square().mean().backward()
        optimizer.step()

    return call


def claims_of(what: str, encoder: Encoder, packs: list[Patches], turns: int) -> list[dict[str, Any]]:
    """One claim per shorter sequence; the first pack is the long one."""
    make = training_step if what == "training" else forward
    calls = {str(len(patches.pixels)): make(encoder, patches) for patches in packs}
    for call in calls.values():
        call()
    taken = in_turn(calls, turns)
    lengths = list(map(int, calls))
    claims = []
    for length in lengths[1:]:
        slow, fast = taken[str(lengths[0])], taken[str(length)]
        measured, spread = speed_up(slow, fast)
        predicted = flops(encoder.config, lengths[0]) / flops(encoder.config, length)
        note = f"measured {measured:.2f}x, predicted {predicted:.2f}x; {min(slow):.2f} s against {min(fast):.3f} s, "
        claims.append(
            record.claim(
                f"encoder.{what}.L{lengths[0]}-L{length}",
                measured / predicted,
                "of predicted",
                "FLOP model",
                0.9,
                spread=[value / predicted for value in spread],
                note=f"{note}n = {turns}",
            )
        )
    return claims


def main(quick: bool = False, out: Path = record.RESULTS) -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side, depth = (256, 2) if quick else (1024, 12)
    budgets = (128, 64) if quick else (2048, 1024, 512)
    config = EncoderConfig(patch_size=PATCH, in_chans=CHANNELS, width=384, depth=depth, num_heads=6)
    encoder = Encoder(config)
    packs = cut(side, budgets)
    claims = claims_of("forward", encoder.eval(), packs, 2 if quick else 5)
    claims += claims_of("training", encoder.train(), [packs[0], *packs[2:]], 2)
    head = "QUICK RUN, proves nothing. " if quick else ""
    return record.write("encoder", head + PROTOCOL.format(depth=depth, side=side), claims, out)


if __name__ == "__main__":
    args = record.arguments(__doc__).parse_args()
    print(main(args.quick, args.out))
