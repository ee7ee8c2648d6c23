"""What is learned: needles in bags of patches, and megapixel digits; every run is a file, so that all can go on.

Legend: N patches.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import _ips_data as data
import record
from _ips_curves import draw_curves
from _ips_train import Bags, Budget, Ours, Published, train
from _published_ips import PublishedSelection, projector
from foveate.geometry.patch_source import TensorPatches
from foveate.models import create_model
from foveate.tasks.recognition_settings import SelectConfig
from foveate.testing.needles import NeedleBags

Claims = list[dict[str, Any]]
KEEP, LEARNS, FINDS = 10, 0.9, 0.95


@dataclass(frozen=True)
class Needles:
    """Sizes of the needle task."""

    patches: Sequence[int] = (1000, 5000)
    seeds: int = 20
    published: Sequence[int] = (5, 2)  # seeds of the published rule, by number of patches
    ablations: int = 3  # seeds of ours without one of its parts, and on lines that look like digits
    train: int = 1600
    test: int = 200
    epochs: int = 12


@lru_cache(maxsize=4)
def needles(count: int, patches: int, split: str, corners: int) -> Bags:
    """Bags of needles as flat pixels, 0 to 255."""
    drawn = list(NeedleBags(count, patches, split, corners=corners))
    flat = [torch.from_numpy(bag.pixels.reshape(patches, -1)) for bag in drawn]
    sources = [
        TensorPatches(pixels, constant=torch.from_numpy(bag.blank)) for pixels, bag in zip(flat, drawn, strict=True)
    ]

    def dense(rows: Sequence[int]) -> Tensor:
        return torch.stack([flat[row] for row in rows]).float() / 255

    targets = data.targets_of([bag.labels for bag in drawn], data.NEEDLE)
    return Bags(sources, targets, [bag.index for bag in drawn], dense)


def our_needles(seed: int, keep: int = KEEP, norm: str = "group", **select: Any) -> Ours:
    """Our model of flat pixels, with the library's own norm, rank and schedule where nothing else is said."""
    torch.manual_seed(seed)
    chosen = SelectConfig(keep=keep, **select)
    settings = {"rule": chosen.rule, "rank": chosen.rank, "precision": "folded", "keep": keep, "chunk": 8192}
    model = create_model("ips_features", in_chans=64, width=128, norm=norm, tasks=data.tasks(data.NEEDLE), **settings)
    return Ours(model, chosen.schedule(1))


def published_needles(seed: int) -> Published:
    """The published model of the same features."""
    torch.manual_seed(seed)
    model = PublishedSelection(
        projector(64, 128), 128, data.published_tasks(data.NEEDLE), keep=KEEP, chunk=100, num_patches=0
    )
    return Published(model)


def needle_run(
    make: Callable[[], Ours | Published], patches: int, sizes: Needles, seed: int, corners: int = 0
) -> dict[str, Any]:
    bags, test = needles(sizes.train, patches, "train", corners), needles(sizes.test, patches, "test", corners)
    return train(make(), bags, test, Budget(epochs=sizes.epochs), seed)


def needle_jobs(sizes: Needles) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and run of everything, what matters most first; the two sides in turn, so that both meet the same load."""
    made: list[tuple[str, int, int, Callable[[], Ours | Published], int]] = []
    for patches, published in zip(sizes.patches, sizes.published, strict=True):
        for seed in range(sizes.seeds):
            made.append(("ours", patches, seed, partial(our_needles, seed), 0))
            if seed < published:
                made.append(("published", patches, seed, partial(published_needles, seed), 0))
    first = sizes.patches[0]
    for seed in range(sizes.ablations):
        plain = partial(our_needles, seed, by_detail=0.0)
        made.append(("no detail", first, seed, plain, 0))
        made.append(("no detail, best of heads", first, seed, partial(plain, rank="best"), 0))
        made.append(("not annealed", first, seed, partial(plain, keep_start=KEEP), 0))
        made.append(("bent lines", first, seed, partial(our_needles, seed), 2))
        made.append(("bent lines, published", first, seed, partial(published_needles, seed), 2))
    made.append(("all patches", first, 0, partial(our_needles, 0, first), 0))
    for patches in sizes.patches:
        for seed in range(sizes.seeds):
            made.append(("batch norm", patches, seed, partial(our_needles, seed, norm="batch"), 0))
    return [
        (f"{side}-{patches}-{seed}", partial(needle_run, make, patches, sizes, seed, corners))
        for side, patches, seed, make, corners in made
    ]


def resume(jobs: Sequence[tuple[str, Callable[[], dict[str, Any]]]], runs: Path, report: bool) -> dict[str, Any]:
    """Run what no file is there of, unless only to ``report``; returns what is there."""
    runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, job in jobs:
        path = runs / f"{name.replace(', ', ' ').replace(' ', '-')}.json"
        if not path.exists() and not report:
            path.with_suffix(".aside").write_text(json.dumps({**job(), "commit": record._commit()}, indent=1) + "\n")
            path.with_suffix(".aside").rename(path)
            print(name, flush=True)
        if path.exists():
            found[name] = json.loads(path.read_text())
    return found


def commits(runs: Path) -> str:
    """What the runs were made at."""
    return "/".join(sorted({json.loads(path.read_text())["commit"] for path in runs.glob("*.json")}))


def needle_claims(sizes: Needles, runs: Path, report: bool) -> Claims:
    """How many seeds learn, how well, and at what time against the published rule; their curves beside the runs."""
    found = resume(needle_jobs(sizes), runs, report)
    draw_curves(found, runs / "curves.png")
    claims: Claims = []
    for place, patches in enumerate(sizes.patches):
        sides = {name.rsplit("-", 2)[0] for name in found if name.rsplit("-", 2)[1] == str(patches)}
        for side in sorted(sides, key=lambda name: (name != "ours", name)):
            some = [one for name, one in found.items() if name.rsplit("-", 1)[0] == f"{side}-{patches}"]
            claims.append(_learned(side, patches, some, goal=(20, 18)[place] if side == "ours" else None))
        pairs = [
            (found[f"ours-{patches}-{seed}"]["seconds"], found[f"published-{patches}-{seed}"]["seconds"])
            for seed in range(sizes.seeds)
            if {f"ours-{patches}-{seed}", f"published-{patches}-{seed}"} <= set(found)
        ]
        if pairs:
            ratios = [ours / theirs for ours, theirs in pairs]
            value = sum(ours for ours, _ in pairs) / sum(theirs for _, theirs in pairs)
            note = f"CPU seconds of all steps, {len(pairs)} seeds"
            title = f"ips.needles.n{patches}.time"
            spread = (min(ratios), max(ratios))
            met = value <= 1.3
            claims.append(record.claim(title, value, "x", "published rule", 1.3, met=met, spread=spread, note=note))
    return claims


def _learned(side: str, patches: int, runs: Sequence[dict[str, Any]], goal: int | None) -> dict[str, Any]:
    learned = [one["majority"] >= LEARNS and one["recall"] >= FINDS for one in runs]
    means = {key: float(np.mean([one[key] for one in runs])) for key in ("majority", "max", "multi", "recall")}
    means["seconds"] = float(np.mean([one["seconds"] for one in runs]))
    note = "mean " + ", ".join(f"{key} {value:.3g}" for key, value in means.items())
    note += f"; majority >= {LEARNS} alone: {sum(one['majority'] >= LEARNS for one in runs)} of {len(runs)}"
    found = [one["recall"] for one in runs]
    target = f"{goal} of 20" if goal else "no target: the comparison"
    return record.claim(
        f"ips.needles.n{patches}.{side}".replace(", ", " ").replace(" ", "-"),
        sum(learned),
        f"of {len(runs)} seeds learn",
        f"majority >= {LEARNS} and recall >= {FINDS}",
        target,
        met=goal is None or (len(runs) == 20 and sum(learned) >= goal),
        spread=(min(found), max(found)),
        note=f"{note}; spread: recall",
    )


@dataclass(frozen=True)
class Digits:
    """Sizes of the megapixel digits task."""

    side: int = 500
    keep: int = 20
    train: int = 1000
    test: int = 200
    seconds: float = 240.0
    fewer: int = 0  # ours once more with so many kept, in 0.6 of the time; 0: not


def digit_bags(sizes: Digits, part: int) -> Bags:
    """Images to train (0) or to test with (2)."""
    count = (sizes.train, 0, sizes.test)[part]
    images = data.draw(part * 10**7, count, sizes.side, data.banks()[part])
    targets = data.targets_of([image.labels for image in images])
    return Bags(data.grids(images), targets, (), lambda rows: data.dense([images[row] for row in rows]))


def digit_run(side: str, sizes: Digits, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    bags, test = digit_bags(sizes, 0), digit_bags(sizes, 2)
    num = len(bags.sources[0])
    if side == "published":
        model = data.published_model(sizes.keep, sizes.keep, num)
        return train(Published(model), bags, test, Budget(seconds=sizes.seconds), seed)
    chosen = SelectConfig(keep=sizes.keep, precision="bf16", keep_start=sizes.keep)
    ours = data.our_model(sizes.keep, 1024, precision=chosen.precision, rank=chosen.rank)
    return train(Ours(ours, chosen.schedule(1), half=True), bags, test, Budget(seconds=sizes.seconds), seed)


def digit_claims(every: Sequence[Digits], runs: Path, report: bool) -> Claims:
    """The four tasks at equal CPU time, for images of every size."""
    return [claim for sizes in every for claim in _digit_claims(sizes, runs, report)]


def _digit_claims(sizes: Digits, runs: Path, report: bool) -> Claims:
    jobs = [(f"{side}-{sizes.side}", partial(digit_run, side, sizes, 0)) for side in ("published", "ours")]
    if sizes.fewer:
        few = replace(sizes, keep=sizes.fewer, seconds=0.6 * sizes.seconds)
        jobs.append((f"fewer-{sizes.side}", partial(digit_run, "ours", few, 0)))
    found = resume(jobs, runs, report)
    if len(found) < len(jobs):
        return []
    theirs, claims = found[jobs[0][0]], []
    for name, _ in jobs[1:]:
        ours, kept = found[name], f".keep{sizes.fewer}" if name.startswith("fewer") else ""
        note = f"{ours['steps']} steps in {ours['seconds']:.0f} CPU seconds against {theirs['steps']} in "
        note += f"{theirs['seconds']:.0f}, one seed"
        for task in data.FOUR:
            title, target = f"ips.digits{sizes.side}{kept}.{task}", round(theirs[task], 4)
            claims.append(record.claim(title, ours[task], "accuracy", "published", target, note=note))
    return claims
