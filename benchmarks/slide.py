"""Gigapixel slides on an ordinary machine: seconds, peak memory, and how much of a slide is looked at.

Run ``foveate bench slide`` (about twenty minutes and 10 GB of disk on two cores, most of it for drawing the slides) or
``--quick`` (slides of 4K and 8K, two minutes; proves nothing). ``--work DIR`` keeps the slides for the next time.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _slide_jobs
import record

Claims = list[dict[str, Any]]

PROTOCOL = """Synthetic slides (foveate.testing.write_slide: tiles of 512, JPEG quality 80, levels 1, 4, 16, ..., 43 %
tissue, 0.25 um/px). Every job is a process of its own with all cores; seconds are wall time after imports and compiled
kernels, files in the page cache; the least of n runs where there are several, spread: least and most. RSS is the
high-water mark of the whole process, program and libraries included. Published chain: the slide read whole, Gaussian
blur 3 and Canny (75, 125), greedy list, one cubic resize per leaf (own plain re-implementation); where it does not fit
into memory its parts are extrapolated on a straight line in the number of pixels through two measured sizes, and the
claim says so."""

MPP = 0.25
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """Sides and counts of one run of the family."""

    large: int
    series: tuple[int, ...]  # for memory at equal leaves
    chain: tuple[int, int]  # where the published chain is measured
    exact: int  # where the full-resolution tree is made
    flat: int
    leaves: int
    few: int
    residuals: tuple[int, ...]
    reads: int
    runs: int
    train_minutes: float


FULL = Sizes(
    large=65536,
    series=(8192, 16384, 32768, 65536),
    chain=(8192, 16384),
    exact=8192,
    flat=16384,
    leaves=16384,
    few=4096,
    residuals=(1024, 4096, 16384),
    reads=400,
    runs=3,
    train_minutes=2.0,
)
QUICK = Sizes(
    large=8192,
    series=(4096, 8192),
    chain=(4096, 8192),
    exact=4096,
    flat=9216,  # above what is read at once
    leaves=1024,
    few=256,
    residuals=(256, 1024),
    reads=60,
    runs=1,
    train_minutes=0.2,
)


def run_job(name: str, **arguments: Any) -> dict[str, Any]:
    """One job in a process of its own."""
    command = [sys.executable, _slide_jobs.__file__, name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} ended with {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_jobs(count: int, name: str, **arguments: Any) -> list[dict[str, Any]]:
    """The same job several times, each in a process of its own."""
    return [run_job(name, **arguments) for _ in range(count)]


def slide_of(work: Path, side: int) -> Path:
    """The slide of a side, drawn once into ``work`` with its mask beside it."""
    path = work / f"s{side}.tif"
    if not path.exists():
        from foveate.testing import write_slide

        write_slide(path, side, seed=0, mpp=MPP, mask=mask_of(path))
    return path


def mask_of(slide: Path) -> Path:
    return slide.with_name(f"{slide.stem}_mask.tif")


def flat_of(work: Path, side: int) -> Path:
    """The same pixels in a file without further levels."""
    path = work / f"flat_{side}.tif"
    if not path.exists():
        from foveate.io.pyramid import write_pyramid
        from foveate.io.raster import open_raster

        raster = open_raster(slide_of(work, side))
        write_pyramid(
            path,
            raster.read,
            shape=raster.shape,
            dtype=raster.dtype,
            channels=raster.channels,
            spacing=raster.spacing,
            levels=1,
            kind="tiff",
            compression="jpeg",
            reduce="mean",
        )
    return path


def below(name: str, value: float, unit: str, against: str, target: float, **more: Any) -> dict[str, Any]:
    """A claim whose value must not be above its target."""
    return record.claim(name, value, unit, against, target, met=value <= target, **more)


def cut_claims(work: Path, sizes: Sizes) -> Claims:
    """Slide to leaves and patches: seconds, memory, and the published chain beside them."""
    side, leaves = sizes.large, sizes.leaves
    found = run_jobs(sizes.runs, "cut", slide=str(slide_of(work, side)), leaves=leaves)
    seconds, peak = [one["seconds"] for one in found], max(one["rss"] for one in found)
    name = f"slide.cut-{side}.L{leaves}"
    cpu = min(one["seconds_cpu"] for one in found)
    note = f"{found[0]['leaves']} leaves, {100 * found[0]['share']:.2f} % of the pixels decoded, CPU {cpu:.1f} s"
    program = max(one["program"] for one in found)
    claims = [
        below(f"{name}.seconds", min(seconds), "s", "the clock", 60, spread=(min(seconds), max(seconds)), note=note),
        below(f"{name}.rss", peak / GB, "GB", "1 GB", 1, note=f"{program / GB:.2f} GB before the slide is opened"),
    ]
    return claims + chain_claims(work, sizes, min(seconds))


def chain_claims(work: Path, sizes: Sizes, ours_large: float) -> Claims:
    """The published chain, measured at two sizes and extrapolated to the large one."""
    leaves, claims, measured = sizes.leaves, [], {}
    for side in sizes.chain:
        slide = str(slide_of(work, side))
        slow = run_jobs(sizes.runs, "published", slide=slide, leaves=leaves)
        fast = run_jobs(sizes.runs, "cut", slide=slide, leaves=leaves)
        best = min(slow, key=lambda one: one["seconds"])
        measured[side] = best
        ours = min(one["seconds"] for one in fast)
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(slow, fast, strict=True)]
        note = f"{ours:.2f} s against {best['seconds']:.1f} s ({parts_of(best)}), {best['rss'] / GB:.1f} GB"
        name = f"slide.cut-{side}.L{leaves}.vs-published"
        ratio = best["seconds"] / ours
        claims.append(record.claim(name, ratio, "x", "published chain, measured", 1, spread=spread(ratios), note=note))
    small, large = sizes.chain
    side = sizes.large
    if side in sizes.chain:
        return claims
    guess = {}
    for part in ("read", "edges", "tree", "patches"):
        slope = (measured[large][part] - measured[small][part]) / (large**2 - small**2)
        guess[part] = max(measured[large][part], measured[large][part] + slope * (side**2 - large**2))
    total = sum(guess.values())
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in guess.items())
    memory = measured[large]["rss"] * side**2 / large**2 / GB
    note = f"extrapolated from {small} and {large}: {total:.0f} s ({parts}) and about {memory:.0f} GB; ours measured"
    name = f"slide.cut-{side}.L{leaves}.vs-published"
    claims.append(record.claim(name, total / ours_large, "x", "published chain, extrapolated", 30, note=note))
    return claims


def parts_of(job: dict[str, Any]) -> str:
    return ", ".join(f"{part} {job[part]:.2f}" for part in ("read", "edges", "tree", "patches"))


def spread(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def share_claims(work: Path, sizes: Sizes) -> Claims:
    """How much of a slide is decoded, and what the tree loses by it."""
    claims = []
    for side in dict.fromkeys((sizes.exact, sizes.large)):
        found = run_job("cut", slide=str(slide_of(work, side)), leaves=sizes.few)
        note = f"leaves by side: {', '.join(f'{size} px {count}' for size, count in found['sizes'].items())}"
        name = f"slide.share-{side}.L{sizes.few}"
        against = "pixels of level 0; 43 % tissue"
        claims.append(below(f"{name}.level-0", 100 * found["share_level_0"], "%", against, 3.5, note=note))
        note = "pixels of all levels, storage tiles of 512 counted whole"
        claims.append(below(f"{name}.all-levels", 100 * found["share"], "%", against, 3.5, note=note))
    rows = run_job("residual", slide=str(slide_of(work, sizes.exact)), leaves=list(sizes.residuals))["rows"]
    for row in rows:
        note = f"{100 * row['share']:.2f} % of the pixels decoded"
        name = f"slide.residual-{sizes.exact}.L{row['leaves']}"
        excess = 100 * (row["ratio"] - 1)
        claims.append(below(name, excess, "% more", "tree of all pixels of level 0", 1, note=note))
    return claims


def memory_claims(work: Path, sizes: Sizes) -> Claims:
    """Memory at equal leaves, from the small slide to the large one."""
    found = {side: run_job("cut", slide=str(slide_of(work, side)), leaves=sizes.few) for side in sizes.series}
    peaks = {side: job["rss"] for side, job in found.items()}
    rise = 100 * (max(peaks.values()) / min(peaks.values()) - 1)
    note = "; ".join(
        f"{side}: {job['rss'] / 1e6:.0f} MB ({(job['rss'] - job['program']) / 1e6:.0f} above the program)"
        for side, job in found.items()
    )
    first, last = sizes.series[0], sizes.series[-1]
    return [below(f"slide.rss-{first}-to-{last}.L{sizes.few}", rise, "%", "the least of them", 10, note=note)]


def predict_claims(work: Path, sizes: Sizes) -> Claims:
    """Slide to segmentation, OME-TIFF and GeoJSON, through the public path."""
    side, leaves = sizes.large, sizes.leaves
    slide = slide_of(work, side)
    run = train(work, sizes)
    out = work / "predicted"
    shutil.rmtree(out, ignore_errors=True)
    found = run_job("predict", slide=str(slide), run=str(run), out=str(out), mask=str(mask_of(slide)))
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["files"].items())
    name = f"slide.predict-{side}.L{leaves}"
    agreed = f"{100 * found['agreement']:.1f} % of the pixels have their true class"
    program = f"{found['program'] / GB:.2f} GB before the slide is opened"
    return [
        below(f"{name}.seconds", found["seconds"], "s", "the clock", 180, note=f"{MODEL}; {files}; {agreed}"),
        below(f"{name}.rss", found["rss"] / GB, "GB", "1.5 GB", 1.5, note=program),
    ]


MODEL = "apf_vit_small"


def train(work: Path, sizes: Sizes) -> Path:
    """A small ViT, trained for minutes on windows of the smallest slide, cut as finely as the large one will be."""
    from foveate.tasks.config import config_from_dict, load_config, save_config
    from foveate.tasks.predict import SETTINGS
    from foveate.tasks.run import find_model
    from foveate.tasks.segmentation import fit

    side = sizes.series[0]
    slide = slide_of(work, side)
    run = work / "run"
    leaves = max(16, sizes.leaves * side**2 // sizes.large**2)
    config = {
        "data": {
            "root": str(work),
            "images": slide.name,
            "masks": mask_of(slide).name,
            "split": {"train": 1.0, "val": 0.0, "test": 0.0},
            "classes": {"tissue": 1, "tumour": 2},
            "window": side // 4,
            "whole": 0.0,
            "windows": 64,
        },
        "tree": {"max_leaves": leaves, "min_size": 16},
        "model": {"name": MODEL},
        "train": {"epochs": None, "minutes": sizes.train_minutes, "batch_size": 8, "lr": 1e-3},
        "out": str(run),
    }
    fit(config_from_dict(config), overwrite=True)
    settings = find_model(run) / SETTINGS
    trained = load_config(settings, [f"tree.max_leaves={sizes.leaves}"])
    save_config(trained, settings)
    return run


def read_claims(work: Path, sizes: Sizes) -> Claims:
    """Windows at another resolution than any level has, beside openslide-python."""
    claims = []
    slide = str(slide_of(work, sizes.large))
    for mpp in (0.4, 0.5, 3.0):
        found = run_job("random_reads", slide=slide, mpp=mpp, count=sizes.reads)
        ours, theirs = (statistics.median(found[side]) for side in ("ours", "theirs"))
        pairs = [b / a for a, b in zip(found["ours"], found["theirs"], strict=True)]
        edges = statistics.quantiles(pairs, n=20)
        note = (
            f"median {1e3 * ours:.2f} ms against {1e3 * theirs:.2f} ms over {len(pairs)} windows, spread 5 to 95 %; "
            f"mean difference at most {found['difference']:.1f} of 255"
        )
        claims.append(
            record.claim(
                f"slide.reads-256.mpp{mpp}",
                theirs / ours,
                "x",
                "openslide-python read_region and cv2.resize",
                1,
                spread=(edges[0], edges[-1]),
                note=note,
            )
        )
    return claims


def flat_claims(work: Path, sizes: Sizes) -> Claims:
    """A file without levels: what building them once costs."""
    slide = flat_of(work, sizes.flat)
    with tempfile.TemporaryDirectory(dir=work) as cache:
        found = run_job("cut_flat", slide=str(slide), cache=cache, leaves=sizes.few)
    name = f"slide.flat-{sizes.flat}"
    rate = sizes.flat**2 / found["build"] / 1e6
    note = f"{rate:.0f} Mpx/s; cutting it then takes {found['seconds']:.2f} s"
    return [
        below(f"{name}.build", found["build"], "s", "the clock", 60, note=note),
        below(f"{name}.rss", found["rss"] / GB, "GB", "1 GB", 1, note="building the levels, then cutting"),
    ]


FAMILIES = {
    "cut": cut_claims,
    "share": share_claims,
    "memory": memory_claims,
    "predict": predict_claims,
    "reads": read_claims,
    "flat": flat_claims,
}


def main(quick: bool = False, out: Path = record.RESULTS, work: Path | None = None, only: str = "") -> Path:
    """Measure and write the record."""
    work = work or Path(tempfile.gettempdir()) / "foveate-slides"
    work.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if quick else FULL
    chosen = only.split(",") if only else list(FAMILIES)
    claims = [entry for name in chosen for entry in FAMILIES[name](work, sizes)]
    return record.write("slide", PROTOCOL, claims, out)


if __name__ == "__main__":
    parser = record.arguments(__doc__)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where the slides are kept (default: a temporary folder)"
    )
    parser.add_argument("--only", default="", help=f"some of {','.join(FAMILIES)}; a record must hold all")
    args = parser.parse_args()
    print(main(args.quick, args.out, args.work, args.only))
