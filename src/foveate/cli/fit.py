"""``foveate fit CONFIG.yaml``: train a segmenter, or with ``task: recognition`` a classifier."""

import argparse
import os
from pathlib import Path

from foveate.cli.parser import VerbParser, say


def run(words: list[str]) -> int:
    """Train as the file says; any value can be changed as ``--section.key=value``."""
    parser = VerbParser(
        "fit", "Train a segmenter or a classifier. Any value of the file can be changed as --section.key=value."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="what to train on, and how")
    parser.add_argument("--out", metavar="DIR", help="run folder instead of the file's own")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what the run folder holds")
    args, overrides = parser.parse_with_overrides(words)
    if args.out is not None:
        overrides.append(f"out={args.out}")

    result = _fit(args, overrides)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        say(str(result))
    return 0


def _fit(args: argparse.Namespace, overrides: list[str]) -> object:
    from foveate.tasks.config import load_as, load_config, read_settings, task_of

    how = {"resume": args.resume, "overwrite": args.overwrite}
    if task_of(read_settings(args.config, overrides)) == "recognition":
        from foveate.tasks import recognition
        from foveate.tasks.recognition_settings import RecognitionConfig

        return recognition.fit(load_as(RecognitionConfig, args.config, overrides), **how)
    config = load_config(args.config, overrides)
    from foveate.tasks import segmentation

    return segmentation.fit(config, **how)
