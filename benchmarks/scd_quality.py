"""Pruned segmentation of volumes at equal training time: against dense, MONAI's UNETR, merging and other pruning.

    python benchmarks/scd_quality.py [--msd DIR] [--seconds 60] [--runs DIR] [--only PART] [--report] [--quick]

Every run is kept as a JSON file below ``--runs``, so that the benchmark can be continued and its table made again;
``--report`` makes the table of the runs that are there. The hippocampus set of the Medical Segmentation Decathlon is
read from ``--msd`` or the variable FOVEATE_MSD (images/, labels/, split.csv), and left out where neither is given.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import record
from _quality_claims import SEEDS, claims_of
from _quality_data import VolumeSet, hippocampus, marked, organs
from _quality_runs import Side, build, run, score, train, with_model

PROTOCOL = """
Every side trains from scratch on one thread for {seconds:g} CPU seconds of its process (twice that on "organs";
{short:g} in ablations, without pixels and on "marked"): reading of samples, shifts and contrast, cutting of trees and
steps count. Batch 1, AdamW, cosine by time, the same order of the data, the same cross entropy and Dice. Learning
rates: for every side the better of 2e-3 and 4e-3 (UNETR: also 1e-3) on 8 validation volumes of "organs", 32 training
volumes, 30 seconds, one seed; of the two adaptive sides again on all 16 after the full time with all 96 ({rates}).
The last weights are scored, once, on test volumes on which nothing was chosen: Dice per volume and class in voxels at
full resolution. These are seconds of a shared CPU: compared is how far each side gets, not where it would converge.
Sets: "organs", ten organs in 48^3 (foveate.testing.organ_volume; 96 train, 16 val, 16 test); "hippocampus", MSD
Task04 (its val, 32 volumes, is the test; an eighth of its train is val); "marked", four equal balls whose class, one
of two, a mark in a corner names (marked_volume; 256 train, 32 test). Model: ViT of width 96, 6 blocks, 2 heads, patch
size 4, sparse decoder of width 8. "ours": pruned behind the first and third block, scores taught, full resolution for
what the first prune point kept; "adaptive": leaves no smaller than 4 voxels, at most 576, 384 and 144 for the three
sets, of which 75 and then 50 % stay; "uniform": the grid of 4 voxels, of which 50 and then 25 % stay. "dense": the
same without pruning. "ToMe", "Cropr": plain re-implementations (benchmarks/_reductions.py) on the uniform grid with
the dense side's decoder, down to 25 % as ours. "UNETR": MONAI's, patch size 16 (fixed there), 12 blocks of width 96,
feature size 8. Without pixels and on "marked" a linear decoder sees tokens alone, and there is a class token (but in
"no-class-token"); "later" is pruned behind the second and fourth block; both were tried on validation volumes after
"ours" without a class token had failed on the test volumes of "marked", so that set is no longer blind. "identity":
ours-adaptive without transformer blocks; "random": with scores by chance. Boundary recall: share of the tokens with a
label edge that are kept to the end, mean over test volumes. "example": examples/msd-hippocampus-scd.yaml for 24
epochs, 25 % of the leaves kept to the end; its settings were chosen on the volumes that it is judged on, the test
volumes of the other runs. Spread: 95 % t interval over seeds; a gain is the mean of differences with equal seeds.
"""
SETS, SHORT = ("organs", "hippocampus"), 0.6
LONG = {"organs": 2, "hippocampus": 1}  # times as long, as ten organs take longer to learn
LR = {
    "ours-adaptive": 4e-3,
    "ours-uniform": 4e-3,
    "dense-adaptive": 4e-3,
    "dense-uniform": 4e-3,
    "UNETR": 2e-3,
    "ToMe": 4e-3,
    "Cropr": 4e-3,
}
ADAPTIVE = Side("ours-adaptive", lr=LR["ours-adaptive"])
GRID = Side("ours-uniform", leaves="uniform", lr=LR["ours-uniform"])
MAIN = (
    ADAPTIVE,
    replace(ADAPTIVE, name="dense-adaptive", reduce="", lr=LR["dense-adaptive"]),
    replace(GRID, name="dense-uniform", reduce="", lr=LR["dense-uniform"]),
    Side("UNETR", leaves="voxels", reduce="", lr=LR["UNETR"]),
    replace(GRID, name="ToMe", reduce="merge", lr=LR["ToMe"]),
    replace(GRID, name="Cropr", reduce="cropr", lr=LR["Cropr"]),
    GRID,
)
CONTROLS = (replace(ADAPTIVE, name="identity", reduce="identity"), replace(ADAPTIVE, name="random", reduce="random"))
ABLATIONS = (
    *(with_model(ADAPTIVE, f"completion-{kind}", completion=kind) for kind in ("none", "block", "mask")),
    with_model(ADAPTIVE, "estimator-softmax", estimator="softmax"),
    replace(ADAPTIVE, name="untaught", score_weight=0.0),
    with_model(replace(ADAPTIVE, score_weight=0.0), "untaught-softmax", estimator="softmax"),
)
BLIND = {"decoder": "linear", "class_token": True}  # sees tokens alone, no pixels
WITHOUT_PIXELS = (
    with_model(ADAPTIVE, "ours", **BLIND),
    with_model(MAIN[1], "dense", **BLIND),
    with_model(replace(ADAPTIVE, score_weight=0.0), "untaught", **BLIND),
    with_model(replace(ADAPTIVE, reduce="random"), "random", **BLIND),
    with_model(replace(ADAPTIVE, reduce="identity"), "identity", **BLIND),
)
FAR = (
    *WITHOUT_PIXELS,
    with_model(ADAPTIVE, "no-class-token", decoder="linear"),
    with_model(ADAPTIVE, "later", **BLIND, prune_after=(1, 3)),
)
Job = tuple[str, str, Callable[[], dict[str, Any]]]
EPOCHS, BUDGETS = (0, 1, 2, 4), (1.0, 0.5, 0.25, 0.1, 0.05)


def trained(side: Side, data: VolumeSet, seconds: float, seed: int) -> dict[str, Any]:
    return run(side, data, seconds, seed)[0]


def recovery(data: VolumeSet, seconds: float) -> dict[str, Any]:
    """Dice while a pruned model that took over the weights of a trained dense one is trained on."""
    found, dense = run(MAIN[1], data, seconds, 0)
    model = build(ADAPTIVE, data)
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("assembler", "encoder.pruners")) for name in missing)
    curve: dict[str, float] = {}

    def note(epoch: int) -> None:
        if epoch in EPOCHS:
            curve[str(epoch)] = score(model, ADAPTIVE, data, data.test)["dice"]

    train(model, replace(ADAPTIVE, lr=ADAPTIVE.lr / 2), data, 1, epochs=EPOCHS[-1], watch=note)
    return {"dense": found["dice"], "curve": curve}


def budgets(data: VolumeSet, seconds: float) -> dict[str, Any]:
    """One model, trained with drawn budgets, scored at each."""
    side = replace(ADAPTIVE, budgets=(BUDGETS[-1], 1.0))
    found, model = run(side, data, seconds, 0)
    at = {str(left): score(model, side, data, data.test, left) for left in BUDGETS}
    return {
        "steps": found["steps"],
        "at": {left: {key: one[key] for key in ("dice", "predict_seconds")} for left, one in at.items()},
    }


def example(msd: Path, seed: int) -> dict[str, Any]:
    """The example as it is shipped, for 24 epochs whatever the clock says: a quarter of the leaves stays."""
    with tempfile.TemporaryDirectory() as out:
        flags = {"data.root": msd, "train.seed": seed, "train.minutes": "null", "train.epochs": 24}
        flags |= {"train.eval_every": 24, "out": out}
        words = [f"--{name}={value}" for name, value in flags.items()]
        file = Path(__file__).parents[1] / "examples" / "msd-hippocampus-scd.yaml"
        subprocess.run([sys.executable, "-m", "foveate", "fit", str(file), "--overwrite", *words], check=True)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "boundary_recall" in line][-1]
    names = {"boundary": "boundary_recall", "foreground": "foreground_recall", "possible": "boundary_recall_ceiling"}
    return {"dice": last["dice"]} | {ours: last[theirs] for ours, theirs in names.items()}


def jobs(sets: dict[str, VolumeSet], msd: Path | None, seconds: float, seeds: int) -> Iterator[Job]:
    """All runs: what matters most, first."""
    mark, short = sets["marked"], SHORT * seconds
    for seed in range(seeds):
        for name in (name for name in SETS if name in sets):
            for side in (*MAIN, *(CONTROLS if seed == 0 else ())):
                yield name, f"{side.name}-{seed}", partial(trained, side, sets[name], LONG[name] * seconds, seed)
    for side in ABLATIONS:
        yield "organs", f"{side.name}-0", partial(trained, side, sets["organs"], short, 0)
    yield "organs", "short-0", partial(trained, ADAPTIVE, sets["organs"], short, 0)
    yield "organs", "budgets", partial(budgets, sets["organs"], seconds)
    yield "organs", "recovery", partial(recovery, sets["organs"], short)
    for side in FAR:
        yield "marked", f"{side.name}-0", partial(trained, side, mark, short, 0)
    for seed in range(seeds if msd is not None else 0):
        yield "hippocampus", f"example-{seed}", partial(example, msd, seed)  # type: ignore[arg-type]
    for side in WITHOUT_PIXELS:
        yield "organs", f"blind-{side.name}-0", partial(trained, side, sets["organs"], short, 0)


def main(quick: bool, out: Path, msd: Path | None, seconds: float, runs: Path, only: str | None) -> Path:
    """Run what is missing, one after the other, and write the record of what is there."""
    torch.set_num_threads(1)
    sets = {"organs": organs(4, 2), "marked": marked(4, 2)} if quick else {"organs": organs(), "marked": marked()}
    if msd is not None:
        sets["hippocampus"] = hippocampus(msd)
    if quick:
        seconds, runs = 1.0, Path(tempfile.mkdtemp(prefix="foveate-scd-quality-"))
    runs.mkdir(parents=True, exist_ok=True)
    for name, title, job in jobs(sets, None if quick else msd, seconds, 1 if quick else SEEDS):
        path = runs / f"{name}.{title}.json"
        if not path.exists() and only is not None and only in path.stem:
            path.with_suffix(".aside").write_text(json.dumps({**job(), "commit": record._commit()}, indent=1) + "\n")
            path.with_suffix(".aside").rename(path)
            print(path.stem, flush=True)
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(runs.glob("*.json")):
        name, title = path.stem.split(".", 1)
        found.setdefault(name, {})[title] = json.loads(path.read_text())
    rates = ", ".join(f"{name} {lr:g}" for name, lr in LR.items())
    head = "QUICK RUN, proves nothing. " if quick else ""
    commits = ", ".join(sorted({run["commit"] for runs_of in found.values() for run in runs_of.values()}))
    protocol = head + PROTOCOL.format(seconds=seconds, short=SHORT * seconds, rates=rates)
    protocol += f" The runs were made at {commits}."
    return record.write("scd-quality", protocol, claims_of(found), out)


if __name__ == "__main__":
    parser = record.arguments(__doc__)
    given = os.environ.get("FOVEATE_MSD")
    parser.add_argument("--msd", type=Path, default=Path(given) if given else None, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a training run (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/scd-quality"), metavar="DIR")
    parser.add_argument("--only", default="", metavar="PART", help="train the runs whose name holds this")
    parser.add_argument("--report", action="store_true", help="train nothing; write the record of finished runs")
    args = parser.parse_args()
    print(main(args.quick, args.out, args.msd, args.seconds, args.runs, None if args.report else args.only))
