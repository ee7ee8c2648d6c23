"""What the finished runs of the quality benchmark say, as claims."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from scipy.stats import t as student

import record

Runs = Mapping[str, dict[str, Any]]
SEEDS = 3
AGAINST = {
    "dense-uniform": ("dense, uniform grid", -0.3),
    "dense-adaptive": ("dense, same leaves", -0.3),
    "UNETR": ("MONAI UNETR", 0.0),
    "ToMe": ("ToMe-style merging", 0.0),
    "Cropr": ("Cropr-style pruning", 0.0),
    "random": ("scores by chance", "reported"),
    "identity": ("no transformer", "reported"),
}


KEPT = {"ours-uniform": "25 % of the grid", "ours-adaptive": "half of the leaves", "example": "25 % of the leaves"}


def mean_and_spread(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean and its 95 % t interval; no interval of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, [mean - half, mean + half]


def claims_of(found: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """All claims that the runs there are allow, ``found`` by set and run."""
    claims: list[dict[str, Any]] = []
    for name in ("organs", "hippocampus"):
        claims += set_claims(name, found.get(name, {}))
    organs = found.get("organs", {})
    claims += ablation_claims("organs.ablation", organs, "short", UNDER_TEST, "same leaves, shorter runs")
    blind = {title.removeprefix("blind-"): run for title, run in organs.items() if title.startswith("blind-")}
    claims += ablation_claims("organs.without_pixels", blind, "ours", BLIND, "decoder that sees no pixels")
    far = found.get("marked", {})
    claims += ablation_claims("long_range", far, "ours", BLIND, "decoder that sees no pixels")
    if "recovery" in organs:
        claims += recovery_claims(organs["recovery"])
    if "budgets" in organs:
        claims += budget_claims(organs["budgets"])
    return claims


UNDER_TEST = (
    "completion-none",
    "completion-block",
    "completion-mask",
    "estimator-softmax",
    "untaught",
    "untaught-softmax",
)
BLIND = ("dense", "untaught", "random", "no-class-token", "later", "identity")


def by_seed(runs: Runs, side: str) -> dict[int, dict[str, Any]]:
    """Finished runs of a side."""
    keys = {seed: f"{side}-{seed}" for seed in range(SEEDS)}
    return {seed: runs[key] for seed, key in keys.items() if key in runs}


def set_claims(name: str, runs: Runs) -> list[dict[str, Any]]:
    """Dice of every side of one set, our distance to each, and the recall of boundary tokens."""
    claims = []
    sides = ("ours-adaptive", "ours-uniform", *AGAINST)
    for side in sides:
        if own := by_seed(runs, side):
            mean, spread = mean_and_spread([run["dice"] for run in own.values()])
            title = f"scd.quality.{name}.dice.{side}"
            claims.append(
                record.claim(
                    title, mean, "Dice", "test, voxels", "reported", met=True, spread=spread, note=described(own)
                )
            )
    for ours, others in (("ours-adaptive", tuple(AGAINST)), ("ours-uniform", ("dense-uniform", "ToMe", "Cropr"))):
        for side in others:
            title = f"scd.quality.{name}.gain.{ours}"
            claims += gain_claims(title, by_seed(runs, ours), by_seed(runs, side), *AGAINST[side])
        if own := by_seed(runs, ours):
            claims.append(recall_claim(f"scd.quality.{name}.boundary_recall.{ours}", own))
    if own := by_seed(runs, "example"):
        claims.append(recall_claim(f"scd.quality.{name}.boundary_recall.example", own))
    return claims


def described(own: Mapping[int, dict[str, Any]]) -> str:
    runs = list(own.values())

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    parts = [
        "Dice " + ", ".join(f"{run['dice']:.3f}" for run in runs),
        f"HD95 {mean('hd95'):.2f} mm",
        f"{mean('steps'):.0f} steps in {mean('train_seconds'):.0f} s",
        f"{mean('predict_seconds'):.2f} s per volume",
        f"{runs[0]['params'] / 1e6:.2f} M parameters",
    ]
    if not math.isnan(mean("ceiling")):
        parts.insert(1, f"ceiling {mean('ceiling'):.3f}, {mean('tokens'):.0f} tokens")
    return "; ".join(parts)


def gain_claims(
    title: str,
    own: Mapping[int, dict[str, Any]],
    other: Mapping[int, dict[str, Any]],
    against: str,
    target: float | str,
) -> list[dict[str, Any]]:
    """Our mean distance to another side in points of Dice, over the seeds that both have."""
    both = sorted(set(own) & set(other))
    if not both:
        return []
    mean, spread = mean_and_spread([100 * (own[seed]["dice"] - other[seed]["dice"]) for seed in both])
    reported = isinstance(target, str)
    met = reported or (mean >= target and len(both) == SEEDS)
    note = "" if reported else seeds_of(both)
    return [record.claim(title, mean, "points of Dice", against, target, met=met, spread=spread, note=note)]


def seeds_of(runs: Sequence[Any]) -> str:
    """How many seeds there are; a target is met by all of them only."""
    return f"{len(runs)} seeds" if len(runs) == SEEDS else f"{len(runs)} of {SEEDS} seeds so far, so not met yet"


def recall_claim(title: str, own: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    runs = list(own.values())
    mean, spread = mean_and_spread([run["boundary"] for run in runs])
    kept = KEPT[title.rsplit(".", 1)[1]]
    possible = statistics.fmean(run["possible"] for run in runs)
    foreground = statistics.fmean(run["foreground"] for run in runs)
    dice = ", ".join(f"{run['dice']:.3f}" for run in runs)
    note = f"possible {possible:.3f}; foreground {foreground:.3f}; Dice {dice}; {seeds_of(runs)}"
    against, met = f"tokens with a label edge, {kept} kept", mean >= 0.95 and len(runs) == SEEDS
    return record.claim(title, mean, "share", against, 0.95, met=met, spread=spread, note=note)


def ablation_claims(title: str, runs: Runs, base: str, names: Sequence[str], against: str) -> list[dict[str, Any]]:
    """Dice and recall of the base, and the distance of every other run to it."""
    own = runs.get(f"{base}-0")
    if own is None:
        return []
    start = f"scd.quality.{title}"
    claims = [record.claim(f"{start}.ours", own["dice"], "Dice", against, "reported", met=True, note=short(own))]
    for name in names:
        if other := runs.get(f"{name}-0"):
            gain = 100 * (other["dice"] - own["dice"])
            claims.append(
                record.claim(f"{start}.{name}", gain, "points of Dice", "ours", "reported", met=True, note=short(other))
            )
    return claims


def short(run: dict[str, Any]) -> str:
    recall = f"; boundary recall {run['boundary']:.3f}, foreground {run['foreground']:.3f}" if "boundary" in run else ""
    return f"Dice {run['dice']:.3f}; {run['steps']} steps in {run['train_seconds']:.0f} s{recall}; one seed"


def recovery_claims(run: dict[str, Any]) -> list[dict[str, Any]]:
    """From dense weights to a pruned model, epoch by epoch."""
    note = f"dense {run['dense']:.3f}; one seed"
    return [
        record.claim(
            f"scd.quality.organs.recovery.epoch_{epoch}",
            100 * (dice - run["dense"]),
            "points of Dice",
            "the dense model whose weights it took",
            "reported",
            met=True,
            note=f"Dice {dice:.3f}, {note}",
        )
        for epoch, dice in run["curve"].items()
    ]


def budget_claims(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One checkpoint at every budget, and whether less never costs more or scores higher."""
    at = {float(left): one for left, one in run["at"].items()}
    note = f"one model, {run['steps']} steps with drawn budgets; one seed"
    claims = [
        record.claim(
            f"scd.quality.organs.any_budget.keep_{left:g}",
            one["dice"],
            "Dice",
            "test, voxels",
            "reported",
            met=True,
            note=f"{one['predict_seconds']:.3f} s per volume; {note}",
        )
        for left, one in at.items()
    ]
    order = [at[left] for left in sorted(at, reverse=True)]
    rise = max(100 * (less["dice"] - more["dice"]) for more, less in pairwise(order))
    dearer = max(less["predict_seconds"] / more["predict_seconds"] for more, less in pairwise(order))
    claims.append(
        record.claim(
            "scd.quality.organs.any_budget.largest_rise",
            rise,
            "points of Dice",
            "the next larger budget",
            0.5,
            met=rise <= 0.5 and dearer <= 1.05,
            note=f"less is better; at most {dearer:.2f} times the cost of the next larger budget",
        )
    )
    return claims
