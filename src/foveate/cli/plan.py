"""``foveate plan``: what a model will cost on an image or a slide, or what a data set needs, before anything runs."""

import argparse
from pathlib import Path
from typing import Any

from foveate.cli.parser import VerbParser, count, number, parse_shape, say
from foveate.errors import ConfigError

MODEL = "apf_vit_small"


def run(words: list[str]) -> int:
    """Print the plan of one image or slide, or of a data set."""
    parser = VerbParser("plan", "Tokens, FLOPs and bytes of each stage, before anything runs.")
    parser.add_argument("image", metavar="FILE_OR_SHAPE", nargs="?", help="an image or a slide, or a shape: 4096x4096")
    parser.add_argument("--data", metavar="CONFIG.yaml", type=Path, help="what the data set of this file needs")
    parser.add_argument("--limit", metavar="N", type=count, help="images of --data to look at, 0: all (default: 16)")
    parser.add_argument("--model", metavar="NAME_OR_RUN", default=MODEL, help=f"a model or a run (default: {MODEL})")
    parser.add_argument("--max-leaves", metavar="N", type=count, help="leaves per image (default: the run's, or 1024)")
    parser.add_argument(
        "--min-size", metavar="N", type=count, help="smallest leaf in pixels (default: the run's, or 8)"
    )
    parser.add_argument("--mpp", metavar="X", type=number, help="size of a pixel in um, instead of what the file says")
    parser.add_argument("--budget", metavar="BYTES", help="memory of the process, such as 4GB: choose what fits")
    parser.add_argument("--batch-size", metavar="B", type=count, default=1, help="images at once (default: 1)")
    parser.add_argument("--training", action="store_true", help="plan a training step instead of inference")
    parser.add_argument("--checkpoint", action="store_true", help="keep only block inputs while training")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    args, overrides = parser.parse_with_overrides(words)
    if (args.image is None) == (args.data is None):
        raise ConfigError("plan takes one thing: a FILE_OR_SHAPE, or --data CONFIG.yaml; see foveate plan --help")
    if args.data is not None:
        if args.limit is not None and args.limit < 0:
            raise ConfigError(f"--limit={args.limit} is negative; give a number of images, or 0 for all")
        return _plan_data(args.data, overrides, {} if args.limit is None else {"limit": args.limit or None})
    if args.limit is not None:
        raise ConfigError(f"--limit={args.limit} is for --data, and {args.image} is one image; leave it out")
    if overrides:
        parser.refuse(f"--{overrides[0]}")
    return _plan_image(args)


def _plan_data(path: Path, overrides: list[str], given: dict[str, Any]) -> int:
    from foveate.tasks.config import load_as, load_config, read_settings, task_of

    if task_of(read_settings(path, overrides)) == "recognition":
        from foveate.tasks.recognition_plan import plan_table
        from foveate.tasks.recognition_settings import RecognitionConfig

        say(plan_table(load_as(RecognitionConfig, path, overrides), **given))
        return 0
    from foveate.tasks.check import plan_data

    config = load_config(path, overrides)
    from foveate.models import create_config

    patch_size = create_config(config.model.name, **config.model.overrides).patch_size
    say(plan_data(config, patch_size=patch_size, **given).to_text())
    return 0


def _plan_image(args: argparse.Namespace) -> int:
    from foveate.tasks.settings import FitConfig, TreeConfig, parse_bytes

    budget = None if args.budget is None else parse_bytes(args.budget)
    model, run = args.model, FitConfig(tree=TreeConfig(max_leaves=1024))
    if Path(args.model).exists():
        model, run = _trained(args.model)
    source, shape = _open(args, run)
    settings: dict[str, Any] = {
        "max_leaves": (run.tree.max_leaves or 1024) if args.max_leaves is None else args.max_leaves,
        "min_size": run.tree.min_size if args.min_size is None else args.min_size,
        "dtype": args.dtype,
        "budget": budget,
    }
    if _is_slide(source, shape) and not args.training:
        from foveate.plan_slide import plan_slide

        say(plan_slide(model, shape if source is None else source, **settings).to_text())
        return 0
    from foveate.plan import plan_image

    settings |= {"batch_size": args.batch_size, "training": args.training, "checkpoint": args.checkpoint}
    say(plan_image(model, shape, itemsize=1 if source is None else source.dtype.itemsize, **settings))
    return 0


def _trained(path: str) -> tuple[Any, Any]:
    """Configuration and settings of a run, without its weights."""
    from foveate.tasks.predict import load_model

    network, run = load_model(path)
    return network.config, run


def _open(args: argparse.Namespace, run: Any) -> tuple[Any, tuple[int, ...]]:
    """The image in the frame that the run works in, if it is a file, and its shape."""
    path = Path(args.image)
    if not path.exists():
        return None, parse_shape(args.image)
    from foveate.io.raster import open_raster
    from foveate.tasks.items import Item
    from foveate.tasks.source import open_item

    item = Item(path.stem, path, None, path.stem, mpp=args.mpp)
    source = open_item(item, run.data, open_raster(path, mpp=args.mpp, max_pixels=run.data.max_pixels))
    return source, tuple(source.shape)


def _is_slide(source: Any, shape: tuple[int, ...]) -> bool:
    """Whether the image would be read by box."""
    from foveate.io.raster import fits_whole
    from foveate.tasks.source import is_large

    return len(shape) == 2 and (not fits_whole(shape) if source is None else is_large(source))
