"""``foveate predict RUN_OR_MODEL INPUT... --out DIR``: masks, or labels with heatmaps, of images and slides."""

import argparse
from pathlib import Path

from foveate.cli.parser import VerbParser, count, number, say
from foveate.errors import ConfigError

_FORMATS = (
    "formats of the mask, with commas: png, tif (of a slide a plain pyramid), ome.tif, geojson, geojson.gz, nii.gz, "
    "zarr (default: png; slides ome.tif,geojson.gz; NIfTI and DICOM nii.gz; planes tif; zarr volumes zarr); of a "
    "recognition run: png, ome.tif, tif, geojson, geojson.gz, npz, csv (default: png,geojson,npz)"
)


def run(words: list[str]) -> int:
    """Write a mask, and on request probabilities and pictures, for every input."""
    parser = VerbParser(
        "predict", "Write a mask at its own resolution, or a label with heatmaps, for every image, slide or volume."
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", type=Path, help="a run folder or a saved model")
    parser.add_argument("inputs", metavar="INPUT", type=Path, nargs="+", help="files, folders, globs or manifests")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where masks or labels go")
    parser.add_argument("--format", metavar="LIST", help=_FORMATS)
    parser.add_argument("--mpp", metavar="X", type=number, help="size of a pixel in um, instead of what the file says")
    parser.add_argument(
        "--max-leaves", metavar="N", type=count, help="leaves per image at most (default: as in training)"
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=count,
        help="side of sliding windows in pixels, 0: whole (default: as in training)",
    )
    parser.add_keep_ratio()
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help="auto: bf16 where the device is made for it (default: predict.precision of the run, which is auto)",
    )
    parser.add_argument("--overlay", action="store_true", help="also write a picture of the mask and the leaves")
    parser.add_argument("--heatmap", action="store_true", help="also write a picture of the probabilities")
    parser.add_argument("--probability", action="store_true", help="also write the probabilities, as TIFF")
    parser.add_argument(
        "--broken",
        choices=("raise", "fill", "skip"),
        help="a tile that cannot be decoded: fail, read background, or 255 in the mask (default: as in training)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what is complete (by name, whatever made it), go on with what was interrupted",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    parser.add_argument("--max-pixels", metavar="N", type=count, help="refuse larger images where they are read whole")
    args = parser.parse(words)

    from foveate.tasks.fit import task_of_run

    for path in (_labels if task_of_run(args.model) == "recognition" else _masks)(args):
        say(str(path))
    return 0


def _masks(args: argparse.Namespace) -> list[Path]:
    """Write the masks that were asked for."""
    from foveate.tasks.predict import predict

    return predict(
        args.model,
        args.inputs,
        args.out,
        format=args.format,
        mpp=args.mpp,
        broken=args.broken,
        max_leaves=args.max_leaves,
        window=args.window,
        keep_ratio=args.keep_ratio,
        precision=args.precision,
        probability=args.probability,
        overlay=args.overlay,
        heatmap=args.heatmap,
        overwrite=args.overwrite,
        resume=args.resume,
        max_pixels=args.max_pixels,
    )


def _labels(args: argparse.Namespace) -> list[Path]:
    """Write labels, heatmaps and scores."""
    from foveate.tasks.recognition_predict import predict_labels

    for name in ("max_leaves", "window", "keep_ratio", "precision", "overlay", "probability"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} is about masks, and {args.model} gives labels; leave it out")
    formats = f"{args.format},png" if args.format and args.heatmap else args.format
    names = ("mpp", "broken", "overwrite", "resume", "max_pixels")
    return predict_labels(
        args.model, args.inputs, args.out, format=formats, **{name: getattr(args, name) for name in names}
    )
