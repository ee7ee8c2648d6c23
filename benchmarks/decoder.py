"""Decoding in token space against UNETR's dense decoder: time, peak memory, and boundaries of equal quality.

Run ``foveate bench decoder`` (about six CPU minutes) or ``--quick`` (seconds; proves nothing).
"""

import argparse
import gc
import heapq
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

import record
from _timing import cpu_seconds
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import Patches
from foveate.nn.decoder import TokenDecoder
from foveate.nn.unetr import DenseDecoder

PATCH, WIDTH, CHANNELS, CLASSES = 16, 768, 16, 2
CASES = ((2048, 1024), (2048, 4096), (4096, 4096))
DENSE = "MONAI UNETR decoder, feature size 16"
PROTOCOL = """
Inference, float32, one thread, process CPU time, batch of one image, patch size 16, tokens of width 768, four hidden
states, 3 input channels, 2 classes, random weights. Dense side: the blocks of
monai.networks.nets.UNETR after its ViT (encoder1..4, decoder5..2, out; 2-D, feature size 16), fed with hidden states
already laid out on the grid. Token side: TokenDecoder,
channels=16, on a quadtree of the stated number of leaves, the neighbour tables made inside the timed call. Sides are
interleaved; the best of the repeats counts. Peak memory: one fresh process per side, peak resident size during the
call minus resident size before it (inputs and weights made, a small call done). Dense figures beyond the side named
in the note are extrapolated linearly in the number of pixels. Quality: the same tiny encoder from the same seed and
each decoder train for the same number of steps on procedural blobs and tubes in noise, uniform 16-pixel leaves;
boundary Dice counts pixels within 2 of the true boundary, on held-out images, mean over seeds.
"""


def quadtree(side: int, num_leaves: int) -> Leaves:
    """A tree of this many leaves around a slanted curve: cells of the greatest distance-to-size demand split first."""
    step = (num_leaves - 1) // 3
    cells = [(0.0, 0, 0, side)]
    for _ in range(step):
        _, y, x, size = heapq.heappop(cells)
        half = size // 2
        for child_y, child_x in ((y, x), (y, x + half), (y + half, x), (y + half, x + half)):
            mid_y, mid_x = (child_y + half / 2) / side, (child_x + half / 2) / side
            away = abs(mid_y - 0.5 - 0.3 * math.sin(6 * mid_x))
            heapq.heappush(cells, (away - half / side * 2 if half > 4 else 9.0, child_y, child_x, half))
    size_L = torch.tensor([cell[3] for cell in cells])
    least, most = int(size_L.min()), int(size_L.max())
    sizes = tuple((least << k,) * 2 for k in range((most // least).bit_length()))
    start = torch.tensor([cell[1:3] for cell in cells])
    scale = (size_L // least).log2().round().long()
    return Leaves(start, size_L[:, None].expand(-1, 2).contiguous(), scale, (side, side), sizes)


def token_side(side: int, num_leaves: int) -> Callable[[], Tensor]:
    leaves = quadtree(side, num_leaves)
    decoder = TokenDecoder(
        num_dims=2,
        in_chans=3,
        num_classes=CLASSES,
        width=WIDTH,
        patch_size=PATCH,
        num_hidden=4,
        channels=CHANNELS,
    ).eval()
    hidden = tuple(torch.randn(len(leaves), WIDTH) for _ in range(4))
    patches = Patches(torch.rand(len(leaves), 3, PATCH, PATCH), (leaves,))
    return lambda: decoder(hidden, patches)


def dense_side(side: int) -> Callable[[], Tensor]:
    net = DenseDecoder(
        num_dims=2,
        in_chans=3,
        num_classes=CLASSES,
        width=WIDTH,
        patch_size=PATCH,
        num_hidden=4,
        channels=CHANNELS,
    ).eval()
    hidden = [torch.randn(1, WIDTH, side // PATCH, side // PATCH) for _ in range(4)]
    image = torch.rand(1, 3, side, side)

    def decode() -> Tensor:
        x = hidden[3]
        for up, skip, earlier in zip(net.ups[:-1], net.skips, hidden[2::-1], strict=True):
            x = up(x, skip(earlier))
        return net.out(net.ups[-1](x, net.picture(image)))

    return decode


def times(dense_sides: tuple[int, ...], cases: tuple[tuple[int, int], ...], repeats: int) -> list[dict[str, Any]]:
    tokens = {case: token_side(*case) for case in cases}
    taken: dict[Any, list[float]] = {}
    for call in tokens.values():
        call()
    for _ in range(repeats):
        for side in dense_sides:
            dense = dense_side(side)
            taken.setdefault(side, []).append(cpu_seconds(dense))
            del dense
        for case, call in tokens.items():
            taken.setdefault(case, []).extend(cpu_seconds(call) for _ in range(2))
    claims = []
    for case in cases:
        against, note = dense_at(case[0], {side: min(taken[side]) for side in dense_sides})
        best, usual = min(taken[case]), statistics.median(taken[case])
        claims.append(
            record.claim(
                f"decoder.time.{case[0]}.L{case[1]}",
                against / best,
                "x",
                DENSE,
                20,
                spread=(against / usual, against / best),
                note=f"{best:.2f} s against {against:.1f} s; {note}; spread: median to best of the token side",
            )
        )
    return claims


def dense_at(side: int, measured: dict[int, float]) -> tuple[float, str]:
    """The dense cost at ``side``: measured, or linear in pixels from the largest measured side."""
    if side in measured:
        return measured[side], f"dense measured at {side}"
    base = max(other for other in measured if other <= side)
    return measured[base] * (side / base) ** 2, f"dense extrapolated from {base}"


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_of(spec: list[str]) -> int:
    """Run in a fresh process: bytes that one call adds to the resident size at its highest."""
    torch.set_num_threads(1)
    sizes = [int(value) for value in spec[1:]]
    with torch.no_grad():
        build = token_side if spec[0] == "token" else dense_side
        build(*((256, 64) if spec[0] == "token" else (64,)))()
        call = build(*sizes)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before


def measure_peak(*spec: object) -> float:
    command = [sys.executable, __file__, "--peak", *map(str, spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory(dense_sides: tuple[int, ...], cases: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    dense = {side: measure_peak("dense", side) for side in dense_sides}
    claims = []
    for case in cases:
        against, note = dense_at(case[0], dense)
        peak = measure_peak("token", *case)
        note = f"{peak / 2**20:.0f} MiB against {against / 2**20:.0f} MiB; {note}"
        if against / peak < 50:
            note += f"; {case[1]} patches hold {case[0] ** 2 // (case[1] * PATCH**2)} times fewer samples than pixels"
        claims.append(record.claim(f"decoder.memory.{case[0]}.L{case[1]}", against / peak, "x", DENSE, 50, note=note))
    return claims


def scene(rng: np.random.Generator, side: int) -> tuple[Tensor, Tensor]:
    """Blobs and tubes, brighter than a ground of coarse and fine noise: image (1, S, S) and mask (S, S)."""
    y, x = np.mgrid[:side, :side]
    mask = np.zeros((side, side), bool)
    for _ in range(rng.integers(2, 6)):
        centre, radius = rng.uniform(0, side, 2), rng.uniform(0.03, 0.12) * side
        angle = np.arctan2(y - centre[0], x - centre[1])
        wobble = 1 + 0.25 * np.sin(rng.integers(2, 6) * angle + rng.uniform(0, 6))
        mask |= np.hypot(y - centre[0], x - centre[1]) < radius * wobble
    for _ in range(rng.integers(1, 4)):
        tilt, phase, bend = rng.uniform(-1, 1), rng.uniform(0, 6), rng.uniform(5, 15)
        line = rng.uniform(0, side) + tilt * (x - side / 2) + bend * np.sin(x / 20 + phase)
        mask |= np.abs(y - line) / np.hypot(1, tilt) < rng.uniform(1, 4)
    coarse = ndimage.gaussian_filter(rng.normal(size=(side, side)), 8) * 8
    image = ndimage.gaussian_filter(mask.astype(float), 0.7) * 1.5 + coarse * 0.5 + rng.normal(size=(side, side)) * 0.6
    return torch.tensor(image, dtype=torch.float32)[None], torch.tensor(mask)


class TinySegmenter(nn.Module):
    """Linear embedding, four transformer blocks, a decoder; uniform leaves."""

    def __init__(self, decoder: nn.Module, leaves: Leaves, width: int) -> None:
        super().__init__()
        self.leaves, self.decoder = leaves, decoder
        self.embed = nn.Linear(PATCH**2, width)
        self.place = nn.Parameter(torch.randn(len(leaves), width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(4)
        )

    def forward(self, image_B1SS: Tensor) -> Tensor:
        cut = image_B1SS.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5)
        pixels = cut.reshape(-1, 1, PATCH, PATCH)
        x = self.embed(pixels.flatten(1)).view(len(image_B1SS), len(self.leaves), -1) + self.place
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x.flatten(0, 1))
        logits = self.decoder(tuple(hidden), Patches(pixels, (self.leaves,) * len(image_B1SS)))
        grid = self.leaves.shape[0] // PATCH
        parts = logits.view(-1, grid, grid, CLASSES, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return parts.reshape(-1, CLASSES, *self.leaves.shape)


def boundary_dice(model: nn.Module, images: Tensor, masks: Tensor) -> tuple[float, float]:
    """Dice over pixels within 2 of the true boundary, and over all pixels."""
    with torch.no_grad():
        guess = torch.cat([model(image[None]).argmax(1) for image in images]).bool()
    bands = []
    for mask in masks.numpy():
        bands.append(ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_erosion(mask, iterations=2))
    band = torch.tensor(np.stack(bands))

    def dice(where: Tensor) -> float:
        both = (guess & masks & where).sum()
        return float(2 * both / ((guess & where).sum() + (masks & where).sum()))

    return dice(band), dice(torch.ones_like(band))


def train(kind: type[nn.Module], seed: int, steps: int, side: int) -> tuple[float, float, float]:
    """Boundary Dice, Dice, and training seconds of one decoder."""
    rng = np.random.default_rng(seed)
    leaves, width = uniform_leaves((side, side), PATCH), 64
    torch.manual_seed(seed)
    decoder = kind(
        num_dims=2, in_chans=1, num_classes=CLASSES, width=width, patch_size=PATCH, num_hidden=4, channels=CHANNELS
    )
    torch.manual_seed(seed)
    model = TinySegmenter(decoder, leaves, width)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.process_time()
    for _ in range(steps):
        images, masks = (torch.stack(part) for part in zip(*(scene(rng, side) for _ in range(2)), strict=True))
        logits = model(images)
        prob, truth = logits.softmax(1)[:, 1], masks.float()
        overlap = (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)
        loss = functional.cross_entropy(logits, masks.long()) + 1 - overlap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    test = np.random.default_rng(10_000)
    images, masks = (torch.stack(part) for part in zip(*(scene(test, side) for _ in range(24)), strict=True))
    return *boundary_dice(model.eval(), images, masks), seconds


def quality(seeds: int, steps: int, side: int) -> list[dict[str, Any]]:
    token = [train(TokenDecoder, seed, steps, side) for seed in range(seeds)]
    dense = [train(DenseDecoder, seed, steps, side) for seed in range(seeds)]
    gap = [t[0] - d[0] for t, d in zip(token, dense, strict=True)]
    mean = [[statistics.mean(column) for column in zip(*runs, strict=True)] for runs in (token, dense)]
    note = (
        f"{steps} steps, {seeds} seeds, {side}^2: boundary {mean[0][0]:.4f} against {mean[1][0]:.4f}, all pixels "
        f"{mean[0][1]:.4f} against {mean[1][1]:.4f}, training {mean[0][2]:.0f} s against {mean[1][2]:.0f} s per run"
    )
    worth = statistics.mean(gap)
    claim = record.claim(
        "decoder.boundary_dice.uniform",
        worth,
        "token minus dense",
        "DenseDecoder (UNETR, MONAI blocks), feature size 16",
        ">= -0.01",
        met=worth >= -0.01,
        spread=(min(gap), max(gap)),
        note=note,
    )
    return [claim]


def main(quick: bool = False, out: Path = record.RESULTS) -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    dense_sides = (256,) if quick else (1024, 2048)
    cases = ((512, 64), (512, 256)) if quick else CASES
    with torch.no_grad():
        claims = times(dense_sides, cases, 1 if quick else 3)
    claims += memory(dense_sides, cases)
    claims += quality(1, 3, 64) if quick else quality(2, 200, 128)
    return record.write("decoder", PROTOCOL, claims, out)


if __name__ == "__main__":
    parser = record.arguments(__doc__)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_of(args.peak))
    else:
        print(main(args.quick, args.out))
