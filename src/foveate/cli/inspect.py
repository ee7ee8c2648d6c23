"""``foveate inspect IMAGE``: where the leaves go; ``foveate inspect --data CONFIG.yaml``: is the data sound."""

import argparse
from pathlib import Path

from foveate.cli.parser import VerbParser, count, say
from foveate.errors import ConfigError


def run(words: list[str]) -> int:
    """Describe one image and its leaves, or check a data set."""
    parser = VerbParser("inspect", "Show an image's leaves and what they lose, or check a data set.")
    parser.add_argument("image", metavar="IMAGE", type=Path, nargs="?", help="an image file")
    parser.add_argument("--data", metavar="CONFIG.yaml", type=Path, help="check the data set of this file instead")
    parser.add_argument("--max-leaves", metavar="N", type=count, default=1024, help="leaves at most (default: 1024)")
    parser.add_argument("--min-size", metavar="N", type=count, default=8, help="smallest leaf in pixels (default: 8)")
    parser.add_argument("--patch-size", metavar="P", type=count, help="samples per leaf side (default: --min-size)")
    parser.add_argument("--detail", default="residual", help="what drives the splitting (default: residual)")
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

    say(check_data(load_config(path, overrides)).to_text())
    return 0


def _inspect_image(args: argparse.Namespace) -> int:
    from foveate.geometry.tree import adaptive_leaves
    from foveate.io.image import read_image
    from foveate.tasks.figures import describe_leaves, leaf_overlay, save_picture

    image = read_image(args.image, **({} if args.max_pixels is None else {"max_pixels": args.max_pixels}))
    leaves = adaptive_leaves(
        image, args.max_leaves, min_size=args.min_size, patch_size=args.patch_size, detail=args.detail
    )
    say(f"{args.image}: {image.shape[0]} x {' x '.join(map(str, image.shape[1:]))} {image.dtype}")
    say(describe_leaves(image, leaves, args.patch_size or args.min_size))
    if args.out is not None:
        save_picture(args.out, leaf_overlay(image, leaves))
        say(f"picture: {args.out}")
    return 0
