"""Trees and patches against the published chain, the uniform grid and the optimal pruning.

One thread, CPU time, both sides interleaved in one process, least of n runs; loading and compiling are not counted.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import _published_chain as published
import record
from foveate.geometry.adaptive import adaptive_patches
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import patchify
from foveate.geometry.pyramid import residual_pyramid
from foveate.geometry.tree import adaptive_leaves, cell_sizes

PROTOCOL = """One thread; process CPU time; the two sides in turn in one process, least of n runs each; spread: ratio of
the runs in turn, least and most. Published chain: Gaussian blur 3 and Canny (75, 125) on RGB, greedy list with its
first-largest search, one cubic resize per leaf (3-D: Gaussian and Canny slice by slice, one linear interpolator per
leaf), own plain re-implementation. Ours: residual tree and area means, uint8, planar. Images are drawn from a seed
(smooth ground, blobs of many sizes, thin lines, quiet and noisy parts); reading is one sum over the array."""


def draw(side: int, seed: int) -> np.ndarray:
    """RGB uint8: quiet ground, textured regions with blobs and strokes in 40 % of the area."""
    import cv2

    rng = np.random.default_rng(seed)
    image = np.empty((3, side, side), np.uint8)
    cell = max(64, side // 16)
    busy = rng.random((side // cell, side // cell)) < 0.4
    for c in range(3):
        image[c] = cv2.resize(rng.integers(215, 240, (8, 8)).astype(np.uint8), (side, side))
    for y, x in np.argwhere(busy) * cell:
        part = np.full((cell, cell, 3), rng.integers(120, 200, 3), np.uint8)
        for _ in range(cell * cell // 220):
            centre, radius = rng.integers(0, cell, 2), int(2 + 6 * rng.random() ** 2)
            cv2.circle(part, tuple(map(int, centre)), radius, tuple(map(int, rng.integers(20, 220, 3))), -1)
        image[:, y : y + cell, x : x + cell] = part.transpose(2, 0, 1)
    noise = rng.integers(0, 3, (64, side)).astype(np.uint8)
    for y in range(0, side, 64):
        image[:, y : y + 64] += np.roll(noise, y, 1)[: side - y]
    return image


def draw_volume(side: int, seed: int) -> np.ndarray:
    """Float32 volume in [0, 1]: shells of many sizes."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:side, :side, :side].astype(np.float32)
    volume = np.full((side, side, side), 0.2, np.float32)
    for _ in range(40):
        centre, radius = rng.random(3) * side, side * (0.03 + 0.12 * rng.random())
        far = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        volume[far < radius**2] = rng.random()
    return volume[None]


def cpu(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], runs: int, slow_runs: int) -> dict[str, object]:
    """Least CPU seconds of both sides, and the spread of their ratio."""
    ours()
    fast, slow, ratios = [], [], []
    for _ in range(slow_runs):
        now = [cpu(ours) for _ in range(max(1, runs // slow_runs))]
        slow.append(cpu(theirs))
        fast += now
        ratios.append(slow[-1] / min(now))
    return {"ours": min(fast), "theirs": min(slow), "spread": [min(ratios), max(ratios)]}


def speed_claims(quick: bool) -> list[dict[str, object]]:
    claims = []
    cases = [(1024, 16384, 8, 4, 300.0, 2), (8192, 16384, 16, 16, 60.0, 2), (16384, 1024, 16, 16, 30.0, 2)]
    for side, leaves, patch, least, target, slow_runs in cases[:1] if quick else cases:
        image = draw(side, 0)

        def ours(image=image, leaves=leaves, patch=patch, least=least):
            return adaptive_patches(image, leaves, patch_size=patch, min_size=least)

        def theirs(image=image, leaves=leaves, patch=patch):
            return published.chain_2d(image, leaves, patch)

        got = in_turn(ours, theirs, 10, slow_runs)
        pixels = ours().pixels
        count = len(published.greedy_tree(published.edges_2d(image), leaves)) if side <= 1024 else None
        note = f"{1e3 * got['ours']:.1f} ms against {1e3 * got['theirs']:.0f} ms; {len(pixels)} leaves"
        note += f" against {count}" if count is not None else ""
        name = f"trees.rgb-{side}.L{leaves}"
        ratio = got["theirs"] / got["ours"]
        claims.append(record.claim(name, ratio, "x", "published chain", target, spread=got["spread"], note=note))
        flat = image.reshape(-1).view(np.uint64)
        read = in_turn(ours, flat.sum, 10, 5)
        times = read["ours"] / read["theirs"]
        note = f"one sum of {image.nbytes / 1e6:.0f} MB {1e3 * read['theirs']:.1f} ms, ours {1e3 * read['ours']:.1f} ms"
        if side == 16384:
            name += ".reads"
            claims.append(record.claim(name, times, "reads", "reading the array once", 4, met=times <= 4, note=note))
        del image
    volume = draw_volume(64 if quick else 128, 0)
    leaves = 512 if quick else 4096
    got = in_turn(
        lambda: adaptive_patches(volume, leaves, patch_size=8, min_size=4),
        lambda: published.chain_3d(volume, leaves, 8),
        10,
        2,
    )
    note = f"{1e3 * got['ours']:.1f} ms against {1e3 * got['theirs']:.0f} ms"
    name = f"trees.volume-{volume.shape[1]}.L{leaves}"
    ratio = got["theirs"] / got["ours"]
    claims.append(record.claim(name, ratio, "x", "published chain", 60, spread=got["spread"], note=note))
    return claims


def error_of(image: np.ndarray, leaves: object, patch: int) -> float:
    """Squared error after patchify and nearest painting."""
    back = unpatchify(patchify(image, leaves, patch).pixels, leaves)
    return float(((back.double() - torch.from_numpy(image).double()) ** 2).sum())


def optimal_error(image: np.ndarray, max_leaves: int, patch: int) -> float:
    """Lower convex hull of the best pruning of the whole tree (BFOS): no tree of as many leaves is below it."""
    shape = image.shape[1:]
    levels = residual_pyramid(image[:, None], shape, cell_sizes(shape, (patch, patch)), (patch, patch))
    errors = [level[0] for level in levels]

    def best(price: float) -> tuple[float, float]:
        cost, count = errors[0], np.ones_like(errors[0])
        for error in errors[1:]:
            pad = [(0, 2 * n - m) for n, m in zip(error.shape, cost.shape, strict=True)]
            fold = [np.pad(v, pad).reshape(error.shape[0], 2, error.shape[1], 2).sum((1, 3)) for v in (cost, count)]
            cut = fold[0] + price * fold[1] < error + price
            cost, count = np.where(cut, fold[0], error), np.where(cut, fold[1], 1.0)
        return float(cost.sum()), float(count.sum())

    low, high = 0.0, float(errors[-1].sum()) + 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if best(middle)[1] <= max_leaves else (middle, high)
    (error, leaves), (under, more) = best(high), best(low)
    if more <= max_leaves:
        return under
    return error + (under - error) * (max_leaves - leaves) / (more - leaves)


def pictures(data: Path | None, quick: bool) -> list[tuple[str, np.ndarray]]:
    """Drawn pictures, and up to two of every folder of ``data``, at most 1024 x 1024."""
    found = [(f"drawn-{seed}", draw(512, seed)) for seed in range(2 if quick else 4)]
    if data is None:
        return found
    import cv2

    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.rglob("images/*") if path.suffix.lower() in {".png", ".jpg", ".tif"})
        for path in files[:: max(1, len(files) // 2)][:2]:
            pixels = cv2.imread(str(path))
            if pixels is not None and min(pixels.shape[:2]) >= 256:
                scale = min(1.0, 1024 / max(pixels.shape[:2]))
                pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                found.append((f"{folder.name}-{path.stem}", np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    return found


def quality_claims(data: Path | None, quick: bool) -> list[dict[str, object]]:
    """Squared error at equal leaves; the worst picture decides."""
    over, gains, patch = {}, {}, 8
    for name, image in pictures(data, quick):
        for cell in (64, 32, 16):
            grid = uniform_leaves(image.shape[1:], cell)
            leaves = adaptive_leaves(image, len(grid), min_size=patch, patch_size=patch)
            ours = error_of(image, leaves, patch)
            gains[f"{name} L={len(grid)}"] = 10 * np.log10(error_of(image, grid, patch) / ours)
            over[f"{name} L={len(grid)}"] = 10 * np.log10(ours / optimal_error(image, len(leaves), patch))
    least, worst = min(gains, key=gains.__getitem__), max(over, key=over.__getitem__)
    note = f"worst: {least}; mean {np.mean(list(gains.values())):.2f} dB over {len(gains)} cases"
    claims = [record.claim("trees.error-vs-uniform", gains[least], "dB less", "uniform grid", 0, note=note)]
    within = np.mean([value <= 0.1 for value in over.values()])
    note = f"worst: {worst}; {100 * within:.0f} % of cases within 0.1 dB, mean {np.mean(list(over.values())):.3f} dB"
    met = over[worst] <= 0.1
    claims.append(
        record.claim("trees.error-vs-optimal", over[worst], "dB more", "optimal pruning", 0.1, met=met, note=note)
    )
    return claims


def main(quick: bool = False, out: Path = record.RESULTS, data: str | Path | None = None) -> Path:
    """Measure and write the record."""
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(1)
    return record.write(
        "trees", PROTOCOL, quality_claims(Path(data) if data else None, quick) + speed_claims(quick), out
    )


if __name__ == "__main__":
    parser = record.arguments(__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("DATA"), help="folders of pictures (default: $DATA)"
    )
    args = parser.parse_args()
    print(main(args.quick, args.out, args.data))
