"""Pruned segmentation of volumes and an image against the dense model, naive and fused, and the published sparse model.

Run ``foveate bench scd`` (about twenty CPU minutes) or ``--quick`` (seconds; proves nothing). ``--only PART`` runs the
cases whose name holds PART and writes a record of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import record
from _published_scd import PublishedSegmenter
from _timing import in_turn, speed_up
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.models import ModelConfig, build_model, create_model
from foveate.testing import synthetic_image

PROTOCOL = """
Volumes with untrained weights, float32, one thread, process CPU time, all sides of a case in turn, least of n turns;
spread: least and greatest ratio of one turn. Cases: "vit-b.96", 96^3, 1 channel, patch size 8, ViT-B, 14 classes;
"vit-b.128", 128^3, 4 channels, patch size 8, ViT-B, 3 classes; "vit-s16.96", 96^3, 1 channel, patch size 16, ViT-S,
14 classes; "vit-s.1024", an image of 1024^2, 3 channels, patch size 8, ViT-S, 5 classes; 12 blocks and a class token
each (foveate.testing.synthetic_image). Baselines (benchmarks/_published_scd.py): "dense naive" and "dense SDPA", ViT
with the dense UNETR decoder and attention as a matrix or as torch's fused kernel; "published", the published sparse
model, attention naive, pruning 1728 -> 172 -> 17 -> 1 at 96^3 and 4096 -> 1024 -> 256 -> 64 at 128^3. Ours prunes
behind the same blocks ("vit-s.1024", which has no published model: behind the 1st, 3rd and 6th), keeps the stated
shares of all tokens and decodes at full resolution what the first prune point kept, with no fewer than 16 tokens left;
"uniform": on the same grid; "adaptive": on a quarter as many adaptive leaves, the cutting of tree and patches timed,
and in inference also the painting of all logits to voxels; "exact": scd_unetr_base_3d_p8 in exact mode, the published
model in our modules, on the same grid. Training step: forward and backward of the mean square of
the logits; the optimiser is left out. Saved: bytes of the different storages that autograd keeps for the backward
pass, weights not counted. Speed alone: accuracy is measured elsewhere.
"""
Apply = Callable[[nn.Module, bool], Tensor]
Sides = dict[str, tuple[nn.Module, Apply]]


@dataclass(frozen=True)
class Case:
    """A volume, a model, and what its sides have to reach: baseline -> times (forward, training)."""

    name: str
    side: int
    in_chans: int
    num_classes: int
    patch_size: int
    width: int
    ratio: float
    ours: dict[str, tuple[float, ...]]
    targets: dict[str, tuple[float, float]]
    turns: int = 3
    num_dims: int = 3
    prune_after: tuple[int, ...] = (2, 5, 8)


TENTH, QUARTER, HALF = (0.1, 0.01, 0.01), (0.25, 0.0625, 0.0156), (0.5, 0.25, 0.25)
ALL = {"dense naive": (15, 18), "dense SDPA": (11, 13), "published": (8, 9)}
PLANE = {"dense SDPA": (5, 5)}
EXACT: tuple[float, ...] = ()  # the published counts
CASES = (
    Case("vit-b.96", 96, 1, 14, 8, 768, 0.9, {"uniform": TENTH, "adaptive": QUARTER}, ALL),
    Case("vit-s16.96", 96, 1, 14, 16, 384, 0.9, {"uniform": QUARTER}, {"dense SDPA": (4, 4)}),
    Case("vit-b.128", 128, 4, 3, 8, 768, 0.75, {"adaptive": QUARTER}, {"published": (12, 12)}, turns=2),
    Case("exact.vit-b.96", 96, 1, 14, 8, 768, 0.9, {"exact": EXACT}, {"published": (1.7, 1.5)}),
    Case("vit-s.1024", 1024, 3, 5, 8, 384, 0.0, {"uniform": QUARTER, "adaptive": QUARTER}, PLANE, 1, 2, (0, 2, 5)),
)
QUICK = (
    Case("quick", 32, 1, 3, 8, 128, 0.5, {"uniform": HALF, "adaptive": QUARTER}, ALL, turns=1),
    Case("quick.2d", 64, 3, 3, 8, 128, 0.0, {"adaptive": QUARTER}, PLANE, turns=1, num_dims=2),
)


def ours(case: Case, keep_ratio: tuple[float, ...]) -> nn.Module:
    if keep_ratio == EXACT:
        return create_model("scd_unetr_base_3d_p8", exact=True, in_chans=case.in_chans, num_classes=case.num_classes)
    return build_model(
        ModelConfig(
            num_dims=case.num_dims,
            patch_size=case.patch_size,
            in_chans=case.in_chans,
            num_classes=case.num_classes,
            pos_grid=6,
            width=case.width,
            num_heads=case.width // 64,
            prune_after=case.prune_after,
            keep_ratio=keep_ratio,
            active_stage=0,
            decoder="sparse",
        )
    )


def baseline(case: Case, name: str) -> nn.Module:
    ratio = case.ratio if name == "published" else 0.0
    sizes = {"side": case.side, "in_chans": case.in_chans, "num_classes": case.num_classes, "width": case.width}
    heads = {"num_heads": case.width // 64, "patch_size": case.patch_size, "num_dims": case.num_dims}
    return PublishedSegmenter(**sizes, **heads, ratio=ratio, fused=name == "dense SDPA")


def volume(case: Case) -> np.ndarray:
    parts = [synthetic_image(case.side, seed=seed, num_dims=case.num_dims)[0][:1] for seed in range(case.in_chans)]
    return np.concatenate(parts).astype(np.float32) / 255 - 0.5


def sides(case: Case) -> Sides:
    """Every side of a case: a model, and how it comes from the volume to logits."""
    image, patch_size = volume(case), case.patch_size
    tensor = torch.from_numpy(image)[None]
    grid = patchify(image, uniform_leaves(image.shape[1:], patch_size), patch_size)

    def whole(model: nn.Module, paint: bool) -> Tensor:
        return model(tensor)

    def uniform(model: nn.Module, paint: bool) -> Tensor:
        return model(grid)

    def adaptive(model: nn.Module, paint: bool) -> Tensor:
        leaves = adaptive_leaves(image, max_leaves=len(grid.pixels) // 4, min_size=patch_size)
        logits = model(patchify(image, leaves, patch_size))
        return unpatchify(logits, leaves, mode="smooth") if paint else logits

    kinds = {"uniform": uniform, "exact": uniform, "adaptive": adaptive}
    parts: Sides = {name: (baseline(case, name), whole) for name in case.targets}
    return parts | {name: (ours(case, ratio), kinds[name]) for name, ratio in case.ours.items()}


def forward(model: nn.Module, apply: Apply) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return apply(model.eval(), True)

    return call


def training_step(model: nn.Module, apply: Apply) -> Callable[[], object]:
    def call() -> None:
        apply(model.train(), False).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return call


def saved_bytes(model: nn.Module, apply: Apply) -> int:
    """Bytes that autograd keeps for the backward pass, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = apply(model.train(), False)
    del logits
    return sum(kept.values())


def speed(case: Case, what: str, parts: Sides) -> list[dict[str, Any]]:
    """Speed-up of each of our sides over each baseline."""
    make, turns = (forward, case.turns) if what == "forward" else (training_step, max(1, case.turns - 1))
    calls = {name: make(*part) for name, part in parts.items()}
    for name in case.ours:
        calls[name]()
    taken = in_turn(calls, turns)
    claims = []
    for name, against in product(case.ours, case.targets):
        times, spread = speed_up(taken[against], taken[name])
        note = f"{min(taken[against]):.2f} s against {min(taken[name]):.3f} s, n = {turns}"
        target = case.targets[against][what == "training"]
        title = f"scd.{case.name}.{what}.{name}"
        claims.append(record.claim(title, times, "x", against, target, spread=spread, note=note))
    return claims


def memory(case: Case, parts: Sides) -> list[dict[str, Any]]:
    """Bytes kept for the backward pass by the published model over those of each of our sides."""
    if "published" not in parts or "exact" in case.ours:
        return []
    published = saved_bytes(*parts["published"])
    claims = []
    for name in case.ours:
        own = saved_bytes(*parts[name])
        note = f"{published / 2**20:.0f} MiB against {own / 2**20:.0f} MiB"
        claims.append(record.claim(f"scd.{case.name}.saved.{name}", published / own, "x", "published", 10, note=note))
    return claims


def main(quick: bool = False, out: Path = record.RESULTS, only: str = "") -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    claims = []
    for case in QUICK if quick else CASES:
        if only in case.name:
            parts = sides(case)
            claims += speed(case, "forward", parts) + speed(case, "training", parts) + memory(case, parts)
    head = "QUICK RUN, proves nothing. " if quick else ""
    return record.write("scd" + f"-{only}" * bool(only), head + PROTOCOL, claims, out)


if __name__ == "__main__":
    parser = record.arguments(__doc__)
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name holds this")
    args = parser.parse_args()
    print(main(args.quick, args.out, args.only))
