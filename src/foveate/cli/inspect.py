"""``foveate inspect IMAGE``: what it is, where its leaves go; ``inspect --data CONFIG.yaml``: is the data sound."""

import argparse
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.parser import VerbParser, count, number, say
from foveate.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry.lazy import Reading
    from foveate.geometry.leaves import Leaves
    from foveate.io.raster import Raster


def run(words: list[str]) -> int:
    """Describe one image, slide or volume and its leaves, or check a data set."""
    parser = VerbParser("inspect", "Show an image's leaves and what they lose, or check a data set.")
    parser.add_argument("image", metavar="IMAGE", type=Path, nargs="?", help="an image, slide or volume")
    parser.add_argument("--data", metavar="CONFIG.yaml", type=Path, help="check the data set of this file instead")
    parser.add_argument("--max-leaves", metavar="N", type=count, default=1024, help="leaves at most (default: 1024)")
    parser.add_argument("--min-size", metavar="N", type=count, default=8, help="smallest leaf in pixels (default: 8)")
    parser.add_argument("--patch-size", metavar="P", type=count, help="samples per leaf side (default: --min-size)")
    parser.add_argument("--detail", default="residual", help="what drives the splitting (default: residual)")
    parser.add_argument("--mpp", metavar="X", type=number, help="size of a pixel in um, instead of what the file says")
    parser.add_argument(
        "--broken",
        choices=("raise", "fill"),
        default="raise",
        help="a tile that cannot be decoded: fail, or background",
    )
    parser.add_argument("--out", metavar="PICTURE.png", type=Path, help="write the image with leaf outlines")
    parser.add_argument("--max-pixels", metavar="N", type=count, help="refuse images with more pixels than this")
    args, overrides = parser.parse_with_overrides(words)
    if (args.image is None) == (args.data is None):
        raise ConfigError("inspect takes one thing: an IMAGE, or --data CONFIG.yaml; see foveate inspect --help")
    if args.data is not None:
        return _inspect_data(args.data, overrides)
    if overrides:
        parser.refuse(f"--{overrides[0]}")
    return _inspect_image(args)


def _inspect_data(path: Path, overrides: list[str]) -> int:
    from foveate.tasks.check import check_data
    from foveate.tasks.config import load_config

    report = check_data(load_config(path, overrides).data)
    say(report.to_text())
    return 2 if any(finding.is_error for finding in report.findings) else 0


def _inspect_image(args: argparse.Namespace) -> int:
    from foveate.io.raster import ArrayRaster, broken_of, describe, mended_of, open_raster
    from foveate.tasks.source import is_large

    most = {} if args.max_pixels is None else {"max_pixels": args.max_pixels}
    raster = open_raster(args.image, mpp=args.mpp, broken=args.broken, **most)
    leaves, lines = (_cut_lazily if is_large(raster) else _cut)(raster, args)
    say(f"{args.image}: {raster.channels} x {' x '.join(map(str, raster.shape))} {raster.dtype}")
    if type(raster) is not ArrayRaster or args.mpp is not None:
        own, affine = getattr(raster, "describe", None), getattr(raster, "affine", None)
        for line in own() if own else describe(raster):
            say(line)
        if affine is not None:
            rows = " | ".join(" ".join(f"{value:.6g}" for value in row) for row in affine[:3])
            say(f"affine: {rows} (x, y, z to mm)")
    for line in lines:
        say(line)
    if holes := broken_of(raster):
        say(f"broken tiles: {len(holes)}, first at {holes[0]}")
    if mended := mended_of(raster):
        say(f"broken tiles of coarser levels, made from finer ones: {len(mended)}, first at {mended[0]}")
    if args.out is not None:
        from foveate.tasks import figures
        from foveate.tasks.views import overview

        figures.save_picture(args.out, figures.outlined(figures.to_rgb(overview(raster)), leaves))
        say(f"picture: {args.out}")
    return 0


def _cut(raster: "Raster", args: argparse.Namespace) -> "tuple[Leaves, Iterator[str]]":
    """Leaves of an image that is read whole, and what they lose."""
    from foveate.geometry.tree import adaptive_leaves

    image = raster.read(((0,) * len(raster.shape), raster.shape))
    leaves = adaptive_leaves(
        image,
        args.max_leaves,
        min_size=args.min_size,
        patch_size=args.patch_size,
        detail=args.detail,
        spacing=raster.spacing if len(raster.shape) == 3 else None,
    )
    return leaves, chain(_scales(leaves), _losses(image, leaves, args.patch_size or args.min_size))


def _cut_lazily(raster: "Raster", args: argparse.Namespace) -> "tuple[Leaves, Iterator[str]]":
    """Leaves of an image that is read by box, and how much of it was decoded for them."""
    from foveate.geometry.lazy import lazy_patches

    patches, reading = lazy_patches(
        raster,
        args.max_leaves,
        patch_size=args.patch_size or args.min_size,
        min_size=args.min_size,
        detail=args.detail,
        spacing=raster.spacing if len(raster.shape) == 3 else None,
    )
    return patches.leaves[0], chain(_scales(patches.leaves[0]), _decoded(reading))


def _decoded(reading: "Reading") -> Iterator[str]:
    """How much of every level was decoded."""
    for level, (shape, pixels, tiles) in enumerate(zip(reading.levels, reading.pixels, reading.tiles, strict=True)):
        share, plural = 100 * pixels / math.prod(shape), "s" * (tiles != 1)
        yield f"decoded of level {level}: {share:.2f} % of its pixels in {tiles:,} tile{plural}"


def _scales(leaves: "Leaves") -> Iterator[str]:
    """Leaves by scale."""
    counts = leaves.scale.bincount(minlength=len(leaves.sizes)).tolist()
    total = sum(leaves.area.tolist())
    yield f"{len(leaves):,} leaves"
    for scale, held in enumerate(counts):
        if held:
            share = float(leaves.area[leaves.scale == scale].sum()) / total
            extent = " x ".join(str(length) for length in leaves.sizes[scale])
            yield f"  {extent:>13} pixels  {held:>9,} leaves  {100 * share:5.1f} % of the image"


def _losses(image: "NDArray[Any]", leaves: "Leaves", patch_size: int) -> Iterator[str]:
    """What the leaves lose beside the finest uniform grid of no more tokens."""
    from foveate.geometry.leaves import uniform_leaves

    side = min(leaves.min_size)
    while _grid(leaves.shape, side) > len(leaves):
        side += 1
    grid = uniform_leaves(leaves.shape, side)
    ours, theirs = _loss(image, leaves, patch_size), _loss(image, grid, patch_size)
    yield f"root mean square error of what is kept: {ours:.3g}"
    yield f"the same of a uniform grid of {len(grid):,} leaves of {side} pixels: {theirs:.3g}"
    if theirs <= 1.02 * ours:
        yield "adaptive leaves have nothing to gain on this image at this budget"


def _grid(shape: tuple[int, ...], side: int) -> int:
    return math.prod(-(-length // side) for length in shape)


def _loss(image: "NDArray[Any]", leaves: "Leaves", patch_size: int) -> float:
    """Root mean square difference between the image and its patches painted back, in the image's own values."""
    import torch

    from foveate.geometry.paint import unpatchify
    from foveate.geometry.patches import patchify

    painted = unpatchify(patchify(image, leaves, patch_size).pixels, leaves)
    difference = painted - torch.as_tensor(image.astype("float32"))
    return float(difference.square().mean().sqrt())
