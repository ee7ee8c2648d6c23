"""Pruned segmentation of volumes against the dense model, naive and fused, and against the published sparse model.

Run ``foveate bench scd`` (about six CPU minutes) or ``--quick`` (seconds; proves nothing).
"""

import time
from collections.abc import Callable
from dataclasses import replace
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
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.tree import adaptive_leaves
from foveate.models import ModelConfig, build_model
from foveate.testing import synthetic_image

PATCH, CLASSES, POINTS = 8, 14, (2, 5, 8)
BASELINES = {"dense naive": (15, 18), "dense SDPA": (11, 13), "published": (8, 9)}  # targets: forward, training
PROTOCOL = """
One volume of {side}^3 with one channel (foveate.testing.synthetic_image, 3-D), patch size 8, ViT of width {width} and
12 blocks, class token, 14 classes, untrained weights, float32, one thread, process CPU time, all sides in turn, least
of n turns; spread: least and greatest ratio of one turn. Baselines (benchmarks/_published_scd.py): "dense naive" and
"dense SDPA", ViT with the dense UNETR decoder and attention as a matrix or as torch's fused kernel; "published", the
published sparse model, attention naive, pruning 1728 -> 172 -> 17 -> 1. Ours: "uniform .1", the same share on the
same grid (173, then 17, 16), the 173 decoded at full resolution; "uniform .25", the default of scd_vit_base_3d (864,
432, 432), 432 decoded at full resolution; "adaptive", {leaves} adaptive leaves, a quarter of them kept and decoded at
full resolution, cutting the tree and the patches timed, and in inference painting all logits to voxels too. Training
step: forward and backward of the mean square of the logits; the optimiser, equal for all up to the weights, is left
out. Saved: bytes of different storages that autograd keeps for the backward pass, weights not counted. Speed alone:
accuracy is measured elsewhere.
"""
Calls = dict[str, Callable[[], object]]


def ours(width: int, keep_ratio: tuple[float, ...], **changes: Any) -> nn.Module:
    config = ModelConfig(num_dims=3, patch_size=PATCH, in_chans=1, pos_grid=6, num_classes=CLASSES)
    sizes = {"width": width, "num_heads": width // 64, "prune_after": POINTS, "decoder": "sparse"}
    return build_model(replace(config, **sizes, keep_ratio=keep_ratio, **changes))


def volume(side: int) -> np.ndarray:
    pixels, _ = synthetic_image(side, seed=0, num_dims=3)
    return pixels[:1].astype(np.float32) / 255 - 0.5


def sides(side: int, width: int, leaves: int) -> dict[str, tuple[nn.Module, Callable[[nn.Module, bool], Tensor]]]:
    """Every side: a model, and how it comes from the volume to logits."""
    image = volume(side)
    tensor = torch.from_numpy(image)[None]
    grid = patchify(image, uniform_leaves((side,) * 3, PATCH), PATCH)
    dense = {"side": side, "width": width, "num_heads": width // 64, "num_classes": CLASSES}

    def whole(model: nn.Module, paint: bool) -> Tensor:
        return model(tensor)

    def packed(model: nn.Module, paint: bool) -> Tensor:
        return model(grid)

    def adaptive(model: nn.Module, paint: bool) -> Tensor:
        patches: Patches = patchify(image, adaptive_leaves(image, max_leaves=leaves, min_size=PATCH), PATCH)
        logits = model(patches)
        return unpatchify(logits, patches.leaves[0], mode="smooth") if paint else logits

    return {
        "dense naive": (PublishedSegmenter(**dense), whole),
        "dense SDPA": (PublishedSegmenter(**dense, fused=True), whole),
        "published": (PublishedSegmenter(**dense, ratio=0.9 if side > 32 else 0.5), whole),
        "uniform .1": (ours(width, (0.1, 0.01, 0.01), active_stage=0), packed),
        "uniform .25": (ours(width, (0.5, 0.25, 0.25)), packed),
        "adaptive": (ours(width, (0.25, 0.0625, 0.0625), active_stage=0), adaptive),
    }


def forward(model: nn.Module, apply: Callable[[nn.Module, bool], Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return apply(model.eval(), True)

    return call


def training_step(model: nn.Module, apply: Callable[[nn.Module, bool], Tensor]) -> Callable[[], object]:
    def call() -> None:
        apply(model.train(), False).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return call


def saved_bytes(model: nn.Module, apply: Callable[[nn.Module, bool], Tensor]) -> int:
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


def claims_of(what: str, calls: Calls, turns: int) -> list[dict[str, Any]]:
    """Speed-up of each of our sides over each baseline."""
    for name, call in calls.items():
        if name not in BASELINES:
            call()
    taken = in_turn(calls, turns)
    claims = []
    for name in (name for name in calls if name not in BASELINES):
        for against, targets in BASELINES.items():
            times, spread = speed_up(taken[against], taken[name])
            claims.append(
                record.claim(
                    f"scd.{what}.{name}",
                    times,
                    "x",
                    against,
                    targets[what == "training"],
                    spread=spread,
                    note=f"{min(taken[against]):.2f} s against {min(taken[name]):.3f} s, n = {turns}",
                )
            )
    return claims


def memory(parts: dict[str, tuple[nn.Module, Callable[[nn.Module, bool], Tensor]]]) -> list[dict[str, Any]]:
    """Bytes kept for the backward pass by the published model over those of each of our sides."""
    published = saved_bytes(*parts["published"])
    claims = []
    for name in (name for name in parts if name not in BASELINES):
        own = saved_bytes(*parts[name])
        note = f"{published / 2**20:.0f} MiB against {own / 2**20:.0f} MiB"
        claims.append(record.claim(f"scd.saved.{name}", published / own, "x", "published", 10, note=note))
    return claims


def main(quick: bool = False, out: Path = record.RESULTS) -> Path:
    """Measure the family and write its record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side, width, leaves, turns = (32, 128, 32, 1) if quick else (96, 768, 432, 3)
    started = time.process_time()
    parts = sides(side, width, leaves)
    claims = memory(parts)
    claims += claims_of("forward", {name: forward(*part) for name, part in parts.items()}, turns)
    claims += claims_of("training", {name: training_step(*part) for name, part in parts.items()}, max(1, turns - 1))
    print(f"{time.process_time() - started:.0f} CPU seconds")
    head = "QUICK RUN, proves nothing. " if quick else ""
    return record.write("scd", head + PROTOCOL.format(side=side, width=width, leaves=leaves), claims, out)


if __name__ == "__main__":
    args = record.arguments(__doc__).parse_args()
    print(main(args.quick, args.out))
