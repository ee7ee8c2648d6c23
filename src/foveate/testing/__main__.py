"""``python -m foveate.testing OUT --side 65536 --mask MASK`` writes a synthetic slide.

``python -m foveate.testing digits DIR`` writes images with hidden digits and ``lesions DIR`` slides with tiny lesions,
each with a table of their labels.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.testing.digits import read_mnist, split_bank, write_digits
from foveate.testing.lesions import write_lesions
from foveate.testing.slides import write_slide


def main() -> None:
    """Writes the slide or the data set that the command line asks for, and makes its folders."""
    kind = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in ("digits", "lesions") else "slide"
    parser = argparse.ArgumentParser(prog="python -m foveate.testing", description=f"Write synthetic {kind}.")
    if kind != "slide":
        parser.add_argument("kind", choices=(kind,))
    parser.add_argument("out", help="the slide; .ome.tif for OME-TIFF" if kind == "slide" else "a folder")
    parser.add_argument("--seed", type=int, default=0)
    write = {"slide": _slide, "digits": _digits, "lesions": _lesions}[kind]
    try:
        write(parser)
    except (FoveateError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _slide(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, default=8192, help="pixels along each axis (%(default)s)")
    parser.add_argument("--mask", help="where to write the exact mask: 0 glass, 1 tissue, 2 tumour")
    parser.add_argument("--tissue", type=float, default=0.43, help="share of the pixels (%(default)s)")
    parser.add_argument("--mpp", type=float, default=0.25, help="um per pixel (%(default)s)")
    parser.add_argument("--tile", type=int, default=512, help="side of a stored tile (%(default)s)")
    parser.add_argument("--quality", type=int, default=80, help="of JPEG (%(default)s)")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--num-workers", type=int, default=2)
    given = vars(parser.parse_args())
    for path in filter(None, (given["out"], given["mask"])):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_slide(given.pop("out"), given.pop("side"), **given)


def _digits(parser: argparse.ArgumentParser) -> None:
    files: dict[str, Any] = {"type": Path, "nargs": 2, "metavar": ("IMAGES", "LABELS")}
    _counts(parser, (1000, 200, 200))
    parser.add_argument("--side", type=int, default=1500, help="pixels along each axis (%(default)s)")
    parser.add_argument("--noise", type=int, default=50, help="patterns of random lines (%(default)s)")
    parser.add_argument("--scale-noise", action="store_true", help="as many per area as in 1,500 x 1,500 pixels")
    parser.add_argument("--form", choices=("sparse", "png"), default="sparse")
    parser.add_argument("--mnist", help="IDX files to take the digits from, instead of drawing them", **files)
    parser.add_argument("--mnist-test", help="the same for the test images alone", **files)
    given = _given(parser)
    mnist, test = given.pop("mnist"), given.pop("mnist_test")
    digits = None if mnist is None else split_bank(read_mnist(*mnist), None if test is None else read_mnist(*test))
    write_digits(given.pop("out"), given.pop("counts"), given.pop("side"), digits=digits, **given)


def _lesions(parser: argparse.ArgumentParser) -> None:
    _counts(parser, (60, 20, 20))
    parser.add_argument("--side", type=int, default=4096, help="pixels along each axis (%(default)s)")
    given = _given(parser)
    write_lesions(given.pop("out"), given.pop("counts"), given.pop("side"), **given)


def _counts(parser: argparse.ArgumentParser, default: tuple[int, int, int]) -> None:
    name = ("TRAIN", "VAL", "TEST")
    parser.add_argument("--counts", type=int, nargs=3, default=default, metavar=name, help="images (%(default)s)")


def _given(parser: argparse.ArgumentParser) -> dict[str, Any]:
    given = vars(parser.parse_args())
    del given["kind"]
    return given | {"counts": tuple(given["counts"])}


if __name__ == "__main__":
    main()
