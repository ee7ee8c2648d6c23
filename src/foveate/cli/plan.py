"""``foveate plan``: what a model will cost on an image, or what a data set needs, before anything runs."""

import argparse
from pathlib import Path

from foveate.cli.parser import VerbParser, count, parse_shape, say
from foveate.errors import ConfigError


def run(words: list[str]) -> int:
    """Print the plan of one image or of a data set."""
    parser = VerbParser("plan", "Tokens, FLOPs and bytes of each stage, before anything runs.")
    parser.add_argument("image", metavar="IMAGE_OR_SHAPE", nargs="?", help="an image file, or a shape: 4096x4096")
    parser.add_argument("--data", metavar="CONFIG.yaml", type=Path, help="what the data set of this file needs")
    parser.add_argument("--model", default="apf_vit_small", help="a model's name (default: apf_vit_small)")
    parser.add_argument("--max-leaves", metavar="N", type=count, default=1024, help="leaves per image (default: 1024)")
    parser.add_argument("--min-size", metavar="N", type=count, default=8, help="smallest leaf in pixels (default: 8)")
    parser.add_argument("--batch-size", metavar="B", type=count, default=1, help="images at once (default: 1)")
    parser.add_argument("--training", action="store_true", help="plan a training step instead of inference")
    parser.add_argument("--checkpoint", action="store_true", help="keep only block inputs while training")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    args, overrides = parser.parse_with_overrides(words)
    if (args.image is None) == (args.data is None):
        raise ConfigError("plan takes one thing: an IMAGE_OR_SHAPE, or --data CONFIG.yaml; see foveate plan --help")
    if args.data is not None:
        return _plan_data(args.data, overrides)
    if overrides:
        parser.refuse(f"--{overrides[0]}")
    return _plan_image(args)


def _plan_data(path: Path, overrides: list[str]) -> int:
    from foveate.tasks.check import plan_data
    from foveate.tasks.config import load_config

    config = load_config(path, overrides)
    from foveate.models import create_config

    patch_size = create_config(config.model.name, **config.model.overrides).patch_size
    say(plan_data(config, patch_size=patch_size).to_text())
    return 0


def _plan_image(args: argparse.Namespace) -> int:
    if Path(args.image).exists():
        from foveate.io.image import read_image

        shape = tuple(read_image(args.image).shape)[1:]
    else:
        shape = parse_shape(args.image)
    from foveate.plan import plan_image

    say(
        plan_image(
            args.model,
            shape,
            max_leaves=args.max_leaves,
            min_size=args.min_size,
            batch_size=args.batch_size,
            training=args.training,
            checkpoint=args.checkpoint,
            dtype=args.dtype,
        )
    )
    return 0
