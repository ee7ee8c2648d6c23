"""``foveate embed SLIDES.csv --out DIR --encoder NAME``: write the features of every patch, one file per slide."""

from pathlib import Path

from foveate.cli.parser import VerbParser, count, number, say


def run(words: list[str]) -> int:
    """Write one bag of features per row of the table."""
    parser = VerbParser("embed", "Write a bag of features for every image or slide of a table.")
    parser.add_argument("table", metavar="SLIDES.csv", type=Path, help="columns path and, as needed, id and mpp")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the bags go")
    parser.add_argument(
        "--encoder",
        metavar="NAME_OR_RUN",
        required=True,
        help="a run folder or saved recognition model, or cnn, vit, resnet18, resnet34, resnet50, timm:NAME",
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of an encoder given by name (default: random)")
    parser.add_argument("--mpp", metavar="X", type=number, help="um per pixel to cut patches at (default: as scanned)")
    parser.add_argument("--patch-size", metavar="P", type=count, help="pixels per side (default: 224, or the run's)")
    parser.add_argument("--stride", metavar="N", type=count, help="pixels from patch to patch (default: --patch-size)")
    parser.add_argument(
        "--tissue", metavar="X", type=number, default=0.05, help="least share of tissue in a patch (default: 0.05)"
    )
    parser.add_argument("--batch", metavar="N", type=count, default=256, help="patches read at a time (default: 256)")
    parser.add_argument("--shard", metavar="I/N", default="1/1", help="only every N-th row, from the I-th on")
    parser.add_argument(
        "--broken",
        choices=("raise", "fill"),
        default="raise",
        help="a tile that cannot be decoded: fail, or background",
    )
    parser.add_argument("--float32", action="store_true", help="store float32 (default: float16)")
    parser.add_argument("--resume", action="store_true", help="leave bags alone that were made with the same settings")
    parser.add_argument("--overwrite", action="store_true", help="replace bags that are there already")
    args = vars(parser.parse(words))

    from foveate.tasks.embed import embed

    half = not args.pop("float32")
    for path in embed(args.pop("table"), args.pop("out"), half=half, **args):
        say(str(path))
    return 0
