"""Iterative patch selection against the published loop: memory, equality, speed, and what is learned.

    python benchmarks/ips.py [--only PART] [--quick] [--report] [--runs DIR] [--work DIR] [--out DIR]

Parts: memory, equal, steps, features, all, batch, needles, digits. What a part has found is kept below ``--runs``, and
the record is made of all parts that are there; ``--report`` measures nothing. FOVEATE_MNIST names a folder with MNIST's
IDX files; digits are drawn where it is not set.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import _ips_data as data
import _ips_jobs
import _ips_learn
import _ips_speed
import record
from _ips_learn import Digits, Needles

PROTOCOL = """
One thread; process CPU time, all sides in turn, least of n turns, spread: least and greatest ratio of one turn.
Memory: the most that a process of its own ever had (VmHWM) above what it had with everything loaded, that is, behind
a training step on 8 patches ("step") or with the model built ("select"); in "memory" and "batch" glibc gives freed
blocks back at once (MALLOC_MMAP_THRESHOLD_), without which the peaks of equal runs differ by a tenth. Baseline: the
published loop, plainly re-implemented (benchmarks/_published_ips.py): float32, all patches of a batch in memory
before the time begins, shuffled, the buffer topped up chunk by chunk. "memory": ResNet-18 cut behind two stages on
drawn patches of 3 x 32^2, batch 2, keep 512, chunk 256, selection in bfloat16; and stored features (512 wide,
float16), batch 4, keep 5000, chunk 4096. "steps": megapixel digits with the paper's network (width 128, 8 heads, 4
tasks, patch 50, keep = chunk = 100; norms by batch there, by group in ours, as the library has them), noise as dense
as the paper's, ours reading its patches from the sparse image in the time that counts; blank patches, which the image
tells, are encoded once; "float32": selection by a copy with folded norms, channels last; "bfloat16": that copy in
bfloat16 and autocast in the passes with gradient; weights untrained. "features": {patches:,} patches of {width}
stored features to 512, keep 5000, chunk 5000 (published) and 1024 (ours, which chooses the same with any), one
process for each; ours reads the file in the time that counts, the published rule before; "int8": a first look in 8
bits, and one in float32 at twice as many as are kept; drawn features, fresh weights: the logits lie close together,
which is hard to rank. "all": attention over all patches with gradient, small CNN, patches of 3 x 16^2, keep 64.
"batch": a training step on 16 bags of 250,000 patches of 2,048 features, keep 5000. "needles":
foveate.testing.needles as flat pixels, keep 10, 1,600 bags to train and 200 to test with, 12 epochs, batch 16, AdamW
1e-3, decay 0.1; every side with the same optimiser and order of data, norm, rank and schedule of ours as the library
has them when nothing is said, selection by a copy with folded norms; the share chosen by detail was settled on five
seeds of these test bags, with norms by batch, and the norm by group on other test bags; time: of all steps; curves
are of a quarter of the test bags, but for their last epoch; the other patches are blank or straight lines, which have
less ink than digits, so that half of what ours keeps at first, chosen by variance, are digits above chance; "no
detail" does without; "batch norm": ours with the published norm, by an earlier commit, the looks in plain float32;
"bent lines" have as much ink as digits, and some look like a 1 or a 4: each bag holds at most three classes of ten,
so that what is never kept can be told from its absence, and the labels alone ask for a recall of 0.9. "digits":
{digits}; learning rate a cosine over them, ours in bfloat16 and without schedule. Parts were measured at: {commits}.
"""


ENCODES = "see how much the convolutions alone allow"
GRADIENT = "bound by the convolutions of the passes with gradient, which bfloat16 makes 3 times as fast"
WHY = {
    "ips.n900.selection": ENCODES,
    "ips.n10000.selection": ENCODES,
    "ips.n900.step": GRADIENT,
    "ips.n10000.step": ENCODES,
    "ips.digits1500.": "neither has learned within that time, and both are at chance",
    "ips.features": "half of it and more is one product of matrices",
}
"""Why a target is missed, by the beginning of the claim."""


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    pixels: Sequence[int] = (1_000, 10_000, 100_000)
    features: Sequence[int] = (10_000, 100_000, 1_000_000)
    equal: tuple[int, int, int, int] = (512, 16, 20, 3)
    paper: tuple[int, int, int] = (1500, 16, 2)  # side, batch, turns
    large: tuple[int, int, int] = (5000, 16, 2)
    keep: int = 100
    warm: tuple[int, int] = (10_000, 3)
    wide: tuple[int, int] = (250_000, 2048)
    turns: int = 3
    all: int = 10_000
    needles: Needles = field(default_factory=Needles)
    digits: Sequence[Digits] = (Digits(), Digits(1500, 100, 5000, 200, 1500.0, 20))


QUICK = Sizes(
    pixels=(300, 600),
    features=(6_000, 8_000),
    equal=(64, 8, 2, 1),
    paper=(300, 2, 1),
    large=(400, 1, 1),
    keep=20,
    warm=(300, 2),
    wide=(8_000, 64),
    turns=1,
    all=300,
    needles=Needles((100,), 1, (1,), 1, 32, 8, 2),
    digits=(Digits(300, 20, 32, 8, 2.0, 5),),
)
Claims = list[dict[str, Any]]
CHUNK = 1024  # of ours where features are read
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed is given back, so that equal runs have equal peaks


@dataclass(frozen=True)
class Run:
    """Where a run keeps what."""

    sizes: Sizes
    work: Path
    runs: Path
    report: bool


def job(name: str, *, tidy: bool = False, **arguments: Any) -> dict[str, Any]:
    """One job in a process of its own; ``tidy`` costs time, and makes the peaks of equal runs equal."""
    command = [sys.executable, _ips_jobs.__file__, name, json.dumps(arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(RETURNED if tidy else {})}
    )
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} ended with {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    answer["above"] = answer["rss"] - answer.get("program", 0)
    return answer


def below(name: str, value: float, unit: str, against: str, target: float, **more: Any) -> dict[str, Any]:
    """A claim of which less is better."""
    return record.claim(name, value, unit, against, target, met=value <= target, **more)


def stored(run: Run, patches: int, width: int) -> str:
    """A bag of drawn features in the folder of the run."""
    path = run.work / f"features-{patches}-{width}.safetensors"
    if not path.exists():
        job("write_features", path=str(path), patches=patches, width=width)
    return str(path)


def growth(kind: str, counts: Sequence[int], found: Sequence[dict[str, Any]]) -> Claims:
    """Of the memory of a step beyond the logits, against the shortest bag."""
    claims = []
    least = found[0]["above"] - found[0]["logits"]
    for count, one in zip(counts[1:], found[1:], strict=True):
        more = (one["above"] - one["logits"] - least) / max(least, 1)
        note = f"{found[0]['above'] / 2**20:.0f} MiB, then {one['above'] / 2**20:.0f} MiB, of which "
        note += f"{one['logits'] / 2**20:.1f} MiB are logits; {one['seconds_cpu']:.0f} CPU s"
        title = f"ips.memory.{kind}.n{count}"
        claims.append(below(title, more, "growth", f"{counts[0]:,} patches", 0.02, note=note))
    return claims


def memory(run: Run) -> Claims:
    """Training steps on bags of growing size."""
    sizes = run.sizes
    keep = min(512, sizes.pixels[0] // 2)
    pixels = [job("step_pixels", tidy=True, patches=num, keep=keep, chunk=256, batch=2) for num in sizes.pixels]
    path = stored(run, sizes.features[-1], 512)
    rows = [
        job("step_features", tidy=True, path=path, keep=5000, chunk=4096, batch=4, rows=num) for num in sizes.features
    ]
    return growth("pixels", sizes.pixels, pixels) + growth("features", sizes.features, rows)


def equal(run: Run) -> Claims:
    """Selection against attention over all patches."""
    return _ips_speed.equal(*run.sizes.equal)


def steps(run: Run) -> Claims:
    """Selection and step against the published loop, and warm starts."""
    sizes, claims = run.sizes, []
    for side, batch, turns in (sizes.paper, sizes.large):
        claims += _ips_speed.steps(side, batch, sizes.keep, turns, (50, 10))
    return claims + _ips_speed.warm(*sizes.warm)


def features(run: Run) -> Claims:
    """Selection from features on disk, time and memory."""
    patches, width = run.sizes.wide
    keep = min(5000, patches // 4)
    path = stored(run, patches, width)
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "published": lambda: job("published_features", path=path, keep=keep, chunk=keep),
        "float32": lambda: job("select_features", path=path, keep=keep, chunk=CHUNK),
        "bfloat16": lambda: job("select_features", path=path, keep=keep, chunk=CHUNK, precision="bf16"),
        "int8": lambda: job("select_features", path=path, keep=keep, chunk=CHUNK, precision="int8"),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(run.sizes.turns):
        for name, call in kinds.items():
            found[name].append(call())
    theirs = [one["seconds_cpu"] for one in found["published"]]
    held = max(one["above"] for one in found["published"]) / 2**20
    claims = []
    wanted = set(found["float32"][0]["kept"])
    for name in ("float32", "bfloat16", "int8"):
        times, spread = _ips_speed.speed_up(theirs, [one["seconds_cpu"] for one in found[name]])
        note = f"{min(theirs):.2f} s against {min(one['seconds_cpu'] for one in found[name]):.2f} s, n = {len(theirs)}"
        title = f"ips.features.n{patches}.select.{name}"
        claims.append(record.claim(title, times, "x", "published rule", 5, spread=spread, note=note))
        above = max(one["above"] for one in found[name]) / 2**20
        note = f"published: {held:.0f} MiB, the features in float32 and their shuffled copy"
        title = f"ips.features.n{patches}.memory.{name}"
        claims.append(below(title, above, "MiB", "above the model", 100, note=note))
        same = len(wanted.intersection(found[name][0]["kept"])) / keep
        title = f"ips.features.n{patches}.same.{name}"
        claims.append(record.claim(title, same, "of the kept", "the choice of float32", "what is lost", met=True))
    count = run.sizes.features[-1]
    long = job("select_features", path=stored(run, count, 512), keep=keep, chunk=CHUNK, precision="bf16")
    note = f"512 wide, {long['seconds_cpu']:.1f} CPU s, bfloat16"
    title = f"ips.features.n{count}.memory"
    return [*claims, below(title, long["above"] / 2**20, "MiB", "above the model", 150, note=note)]


def everything(run: Run) -> Claims:
    """Memory of a step against attention over all patches with gradient."""
    num = run.sizes.all
    whole, kept = job("attend_all", patches=num), job("attend_kept", patches=num, keep=min(64, num // 4))
    note = f"{whole['above'] / 2**20:.0f} MiB against {kept['above'] / 2**20:.0f} MiB; "
    note += f"{whole['seconds_cpu']:.1f} against {kept['seconds_cpu']:.1f} CPU s"
    title = f"ips.all.n{num}.memory"
    return [record.claim(title, whole["above"] / kept["above"], "x", "attention over all patches", 20, note=note)]


def batch(run: Run) -> Claims:
    """A training step on 16 large bags."""
    patches, width = run.sizes.wide
    path, keep = stored(run, patches, width), min(5000, patches // 4)
    claims = []
    for name, half in (("float32", False), ("bfloat16", True)):
        one = job("step_features", tidy=True, path=path, keep=keep, chunk=CHUNK, batch=16, half=half)
        note = f"CPU memory in place of an accelerator's; {one['seconds_cpu']:.0f} CPU s"
        gib = one["above"] / 2**30
        claims.append(below(f"ips.batch16.n{patches}.{name}", gib, "GiB", "above the program", 2, note=note))
    return claims


def needles(run: Run) -> Claims:
    """What is learned of needles."""
    return _ips_learn.needle_claims(run.sizes.needles, run.runs / "needles", run.report)


def digits(run: Run) -> Claims:
    """What is learned of megapixel digits."""
    return _ips_learn.digit_claims(run.sizes.digits, run.runs / "digits", run.report)


PARTS = {
    "memory": memory,
    "equal": equal,
    "steps": steps,
    "features": features,
    "all": everything,
    "batch": batch,
    "needles": needles,
    "digits": digits,
}
LEARNED = ("needles", "digits")  # keep their runs themselves


def claims_of(name: str, run: Run) -> dict[str, Any] | None:
    """What a part finds, or found when it was measured."""
    path = run.runs / f"{name}.json"
    if name in LEARNED:
        claims = PARTS[name](run)
        return {"commit": _ips_learn.commits(run.runs / name), "claims": claims} if claims else None
    if run.report:
        return json.loads(path.read_text()) if path.exists() else None
    found = {"commit": record._commit(), "claims": PARTS[name](run)}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def explained(claim: dict[str, Any]) -> dict[str, Any]:
    """A claim that misses its target says why."""
    why = next((reason for name, reason in WHY.items() if claim["claim"].startswith(name)), "")
    return claim if claim["met"] or not why else {**claim, "note": f"{claim['note']}; {why}"}


def main(quick: bool, out: Path, only: str, report: bool, runs: Path, work: Path | None) -> Path:
    """Measure the parts that are asked for, and write the record of all that are there."""
    torch.set_num_threads(1)
    sizes, runs = (QUICK, runs / "quick") if quick else (Sizes(), runs)
    runs.mkdir(parents=True, exist_ok=True)
    claims, commits = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for name in PARTS:
            asked = not report and name.startswith(only)
            found = claims_of(name, Run(sizes, work or Path(temporary), runs, not asked))
            if found is not None:
                claims += map(explained, found["claims"])
                commits.append(f"{name} {found['commit']}")
                print(
                    name, *(f"\n  {one['claim']} {one['value']} {one['unit']} {one['note']}" for one in found["claims"])
                )
    count, width = sizes.wide
    said = "drawn digits" if data.banks()[0] is None else "MNIST's digits"
    for digit in sizes.digits:
        said += f", images of {digit.side}^2, keep {digit.keep}, {digit.train} to train and {digit.test} to test with, "
        said += f"{digit.seconds:g} CPU seconds of steps each"
        said += f" (and ours with keep {digit.fewer} in 0.6 of that)" if digit.fewer else ""
    protocol = PROTOCOL.format(patches=count, width=width, digits=said, commits=", ".join(commits))
    return record.write("ips", ("QUICK RUN, proves nothing. " if quick else "") + protocol, claims, out)


if __name__ == "__main__":
    parser = record.arguments(__doc__)
    parser.add_argument("--only", default="", metavar="PART", help="measure the parts whose name begins with this")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the record of what is there")
    parser.add_argument("--runs", type=Path, default=Path("runs/ips"), metavar="DIR", help="what parts found")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where bags of features are kept (default: nowhere)")
    args = parser.parse_args()
    print(main(args.quick, args.out, args.only, args.report, args.runs, args.work))
