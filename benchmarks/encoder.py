"""What fewer leaves save in the encoder: measured against what the count of operations predicts.

Run ``foveate bench encoder`` (about two CPU minutes) or ``--quick`` (seconds; proves nothing).
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import record
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.nn.encoder import Encoder, EncoderConfig

PATCH, CHANNELS = 16, 3
PROTOCOL = """
ViT-S (width 384, 6 heads, patch size 16, class token), 6 blocks of its 12 so that a run stays short; every block costs
the same. One image of 1024^2: the uniform grid of 4,096 leaves of 16 pixels against adaptive leaves of at least 16
pixels, from patches to hidden states, embedding and positions included, tree and patches not. One thread, process CPU
time, the four sides interleaved, best of the repeats. Predicted: F(4096) / F(L) with
F(L) = depth (24 L E^2 + 4 L^2 E) + 2 L C P^2 E, L with the class token. The claim is measured speed-up / predicted
speed-up, at least 0.9. Training is forward and backward of the sum of squares of the hidden states. The spread runs
over the repeats, round by round.
"""


def operations(length: int, config: EncoderConfig) -> float:
    """Operations of the encoder for one image: the formula of the protocol."""
    width, tokens = config.width, length + config.num_prefix
    blocks = config.depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    return blocks + 2 * length * config.in_chans * config.patch_size**config.num_dims * width


def sides(image: Tensor, counts: tuple[int, ...]) -> list[Leaves]:
    trees = [adaptive_leaves(image, max_leaves=count, min_size=PATCH, patch_size=PATCH) for count in counts]
    return [uniform_leaves(image.shape[1:], PATCH), *trees]


def runner(net: Encoder, image: Tensor, leaves: Leaves, training: bool) -> Callable[[], None]:
    patches = patchify(image, leaves, PATCH)

    def forward() -> None:
        with torch.no_grad():
            net(patches)

    def step() -> None:
        torch.stack([hidden.float().square().sum() for hidden in net(patches).hidden]).sum().backward()

    return step if training else forward


def cpu_seconds(call: Callable[[], None]) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(
    name: str, net: Encoder, image: Tensor, trees: list[Leaves], repeats: int, training: bool = False
) -> list[dict[str, Any]]:
    calls = [runner(net, image, leaves, training) for leaves in trees]
    calls[-1]()
    rounds = [[cpu_seconds(call) for call in calls] for _ in range(repeats)]
    best = [min(side) for side in zip(*rounds, strict=True)]
    claims = []
    for index, leaves in enumerate(trees[1:], 1):
        predicted = operations(len(trees[0]), net.config) / operations(len(leaves), net.config)
        measured = best[0] / best[index]
        note = (
            f"{best[0] * 1e3:.0f} ms -> {best[index] * 1e3:.0f} ms with {len(leaves)} leaves: {measured:.2f} x, "
            f"predicted {predicted:.2f} x"
        )
        ratios = [one[0] / one[index] / predicted for one in rounds]
        against = f"operations of {len(trees[0])} leaves / of {len(leaves)}"
        claims.append(
            record.claim(
                f"encoder.{name}.L{len(leaves)}",
                measured / predicted,
                "of predicted",
                against,
                0.9,
                spread=(min(ratios), max(ratios)),
                note=note,
            )
        )
    return claims


def main(quick: bool = False, out: Path = record.RESULTS) -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side, counts, depth = (256, (128, 64, 32), 1) if quick else (1024, (2048, 1024, 512), 6)
    config = EncoderConfig(patch_size=PATCH, in_chans=CHANNELS, width=384, depth=depth, num_heads=6)
    net = Encoder(config).eval()
    image = torch.randn(CHANNELS, side, side)
    trees = sides(image, counts)
    claims = measure("float32", net, image, trees, 1 if quick else 4)
    claims += measure("training.float32", net, image, trees, 1 if quick else 2, training=True)
    claims += measure("bfloat16", net.bfloat16(), image, trees, 1 if quick else 5)
    size = "A quick run at far smaller sizes than these, which proves nothing. " if quick else ""
    return record.write("encoder", size + PROTOCOL, claims, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    print(main(args.quick, args.out))
