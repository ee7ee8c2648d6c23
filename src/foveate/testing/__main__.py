"""``python -m foveate.testing OUT --side 65536 --mask MASK`` writes a synthetic slide."""

import argparse
from pathlib import Path

from foveate.errors import FoveateError
from foveate.testing.slides import write_slide


def main() -> None:
    """Writes the slide that the command line asks for, and makes its folders."""
    parser = argparse.ArgumentParser(prog="python -m foveate.testing", description="Write a synthetic slide.")
    parser.add_argument("out", help="the slide; .ome.tif for OME-TIFF")
    parser.add_argument("--side", type=int, default=8192, help="pixels along each axis (%(default)s)")
    parser.add_argument("--mask", help="where to write the exact mask: 0 glass, 1 tissue, 2 tumour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tissue", type=float, default=0.43, help="share of the pixels (%(default)s)")
    parser.add_argument("--mpp", type=float, default=0.25, help="um per pixel (%(default)s)")
    parser.add_argument("--tile", type=int, default=512, help="side of a stored tile (%(default)s)")
    parser.add_argument("--quality", type=int, default=80, help="of JPEG (%(default)s)")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--num-workers", type=int, default=2)
    given = vars(parser.parse_args())
    try:
        for path in filter(None, (given["out"], given["mask"])):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_slide(given.pop("out"), given.pop("side"), **given)
    except (FoveateError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
