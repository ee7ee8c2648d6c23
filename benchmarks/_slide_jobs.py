"""The jobs of the slide family, one process each, so that peak memory is that of the job alone.

``python _slide_jobs.py NAME '{"argument": value}'`` prints one line of JSON: what the job returns, ``rss``, the most
bytes that the process ever had in memory (program and libraries included), and ``program``, what it had when the job
began.
"""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]


def peak_bytes() -> int:
    """High-water mark of this program; getrusage alone remembers that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text())
        if found:
            return 1024 * int(found.group(1))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def clock(result: Result, name: str) -> Iterator[None]:
    """Wall seconds of a block into ``result[name]``, and its CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    result[name] = time.perf_counter() - wall
    result[f"{name}_cpu"] = time.process_time() - cpu


def warm_up() -> None:
    """Imports and compiled kernels, which are not part of a job."""
    from foveate.geometry.lazy import lazy_patches
    from foveate.io.raster import ArrayRaster

    image = np.random.default_rng(0).integers(0, 255, (3, 512, 512), np.uint8)
    coarse = [image[:, ::4, ::4], image[:, ::16, ::16]]
    lazy_patches(ArrayRaster(image, coarser=coarse), 64)


def cut(slide: str, leaves: int, patch_size: int = 16, mpp: float | None = None) -> Result:
    """Slide to leaves and patches, lazily."""
    from foveate.geometry.lazy import lazy_patches
    from foveate.io.raster import open_raster

    warm_up()
    result: Result = {"program": peak_bytes()}
    with clock(result, "seconds"):
        patches, reading = lazy_patches(open_raster(slide, mpp=mpp), leaves, patch_size=patch_size)
    sizes, counts = np.unique(patches.leaves[0].size[:, 0].numpy(), return_counts=True)
    result |= {
        "leaves": len(patches.pixels),
        "share": reading.share,
        "share_level_0": reading.share_level_0,
        "sizes": {int(size): int(count) for size, count in zip(sizes, counts, strict=True)},
    }
    return result


def cut_flat(slide: str, cache: str, leaves: int) -> Result:
    """A file without levels: the levels are built into a cache, then the slide is cut."""
    from foveate.geometry.lazy import lazy_patches
    from foveate.io.pyramid_cache import with_levels
    from foveate.io.raster import open_raster

    warm_up()
    result: Result = {"program": peak_bytes()}
    with clock(result, "build"):
        raster = with_levels(open_raster(slide), cache)
    with clock(result, "seconds"):
        patches, _ = lazy_patches(raster, leaves)
    return result | {"leaves": len(patches.pixels)}


def published(slide: str, leaves: int, patch_size: int = 16) -> Result:
    """The published chain on a slide that is read whole; the parts apart, so that each can be extrapolated."""
    import tifffile

    import _published_chain as chain

    result: Result = {"program": peak_bytes()}
    with clock(result, "read"):
        image = np.ascontiguousarray(tifffile.imread(slide, level=0)).transpose(2, 0, 1)
    with clock(result, "edges"):
        edges = chain.edges_2d(image)
    with clock(result, "tree"):
        found = chain.greedy_tree(edges, leaves)
    with clock(result, "patches"):
        chain.patches_2d(image, found, patch_size)
    parts = ("read", "edges", "tree", "patches")
    return result | {"leaves": len(found), "seconds": sum(result[part] for part in parts)}


def residual(slide: str, leaves: list[int], patch_size: int = 16) -> Result:
    """Squared error of the lazy tree over that of the tree made from all pixels of level 0, and what it decoded."""
    from foveate.geometry.lazy import lazy_patches
    from foveate.geometry.pyramid import residual_pyramid
    from foveate.geometry.tree import adaptive_leaves
    from foveate.io.raster import open_raster

    raster = open_raster(slide)
    shape = raster.shape
    image = raster.read(((0, 0), shape))
    whole = [adaptive_leaves(image, count, min_size=patch_size) for count in leaves]
    levels = residual_pyramid(image[:, None], shape, whole[0].sizes, (patch_size, patch_size))

    def error(tree: Any) -> float:
        total = 0.0
        for scale, size in enumerate(tree.sizes):
            place = (tree.start[tree.scale == scale] // size[0]).numpy()
            total += float(levels[scale][0][place[:, 0], place[:, 1]].sum())
        return total

    found = []
    for count, full in zip(leaves, whole, strict=True):
        patches, reading = lazy_patches(open_raster(slide), count, patch_size=patch_size)
        tree = patches.leaves[0]
        if tree.sizes != full.sizes:
            raise ValueError(f"{tree.sizes} is not {full.sizes}: the two trees must have one chain of sizes")
        found.append({"leaves": count, "ratio": error(tree) / error(full), "share": reading.share, "got": len(tree)})
    return {"rows": found}


def predict(slide: str, run: str, out: str, mask: str) -> Result:
    """Slide to mask and outlines, through the public path, and how much of the mask is true (not in the seconds)."""
    from foveate.io.raster import open_raster
    from foveate.tasks import predict as task

    warm_up()
    result: Result = {"program": peak_bytes()}
    with clock(result, "seconds"):
        written = task.predict(run, slide, out, overwrite=True)
    result |= {"rss": peak_bytes(), "files": {path.name: path.stat().st_size for path in written}}
    labels, truth = open_raster(next(path for path in written if path.suffix == ".tif")), open_raster(mask)
    whole = ((0, 0), truth.shape)
    level = next(i for i, side in enumerate(truth.levels) if max(side) <= 4096)
    same = next(i for i, side in enumerate(labels.levels) if side == truth.levels[level])
    return result | {"agreement": float((labels.read(whole, same) == truth.read(whole, level)).mean())}


def random_reads(slide: str, mpp: float, count: int, side: int = 256, seed: int = 0) -> Result:
    """Windows of ``side`` pixels at another resolution, ours and openslide's in turn, handles open and warm."""
    import cv2
    import openslide

    from foveate.io.raster import open_raster
    from foveate.io.view import at_mpp

    raster = open_raster(slide)
    view = at_mpp(raster, mpp)
    peer = openslide.OpenSlide(slide)
    assert raster.spacing is not None
    factor = mpp / (1000 * raster.spacing[0])
    level = peer.get_best_level_for_downsample(factor)
    scale = factor / peer.level_downsamples[level]
    rng = np.random.default_rng(seed)
    places = rng.integers(0, [length - side for length in view.shape], (count + 8, 2))
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}

    def ours(y: int, x: int) -> np.ndarray:
        return view.read(((y, x), (y + side, x + side)))

    def theirs(y: int, x: int) -> np.ndarray:
        wide = max(1, round(side * scale))
        part = np.asarray(peer.read_region((round(x * factor), round(y * factor)), level, (wide, wide)))[..., :3]
        return cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)

    worst = 0.0
    for turn, (y, x) in enumerate(places.tolist()):
        got = {}
        order = (("ours", ours), ("theirs", theirs))
        for name, read in order if turn % 2 else order[::-1]:
            begin = time.perf_counter()
            got[name] = read(y, x)
            if turn >= 8:
                taken[name].append(time.perf_counter() - begin)
        mine = got["ours"].transpose(1, 2, 0).astype(np.int16)
        worst = max(worst, float(np.abs(mine - got["theirs"]).mean()))
    return {name: list(map(float, values)) for name, values in taken.items()} | {"difference": worst, "level": level}


JOBS = {job.__name__: job for job in (cut, cut_flat, published, residual, predict, random_reads)}

if __name__ == "__main__":
    answer = JOBS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"rss": peak_bytes()} | answer))
