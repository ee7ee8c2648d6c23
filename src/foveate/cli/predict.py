"""``foveate predict RUN_OR_MODEL INPUT... --out DIR``: write masks."""

from pathlib import Path

from foveate.cli.parser import VerbParser, count, say


def run(words: list[str]) -> int:
    """Write a mask, and on request the probabilities, for every input image."""
    parser = VerbParser("predict", "Write one mask per input image, at the image's own resolution.")
    parser.add_argument("model", metavar="RUN_OR_MODEL", type=Path, help="a run folder or a saved model")
    parser.add_argument("inputs", metavar="INPUT", type=Path, nargs="+", help="images or folders of images")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the masks go")
    parser.add_argument("--probability", action="store_true", help="also write the probabilities, as TIFF")
    parser.add_argument("--overlay", action="store_true", help="also write a picture of the mask and the leaves")
    parser.add_argument("--overwrite", action="store_true", help="replace masks that are there already")
    parser.add_argument("--max-pixels", metavar="N", type=count, help="refuse images with more pixels than this")
    args = parser.parse(words)

    from foveate.tasks.predict import predict

    written = predict(
        args.model,
        args.inputs,
        args.out,
        probability=args.probability,
        overlay=args.overlay,
        overwrite=args.overwrite,
        max_pixels=args.max_pixels,
    )
    for path in written:
        say(str(path))
    return 0
