"""Draw image | leaves | prediction | truth, whole and magnified, for one held-out image of a run.

python examples/panel.py RUN PICTURE.png [--split test] [--image NAME] [--data-root DIR]
"""

import argparse
from pathlib import Path
from typing import Any

from foveate.tasks import figures
from foveate.tasks.evaluate import evaluate


def draw(image: Any, labels: Any, result: Any, note: str) -> figures.Picture:
    """The panel of one image."""
    pixels, truth, found = image.numpy(), labels.numpy(), result.labels.numpy()
    picture = figures.to_rgb(pixels)
    window = figures.busiest_window(truth, min(picture.shape[:2]) // 3)
    leaves = result.leaves
    layers = [picture, figures.label_overlay(picture, found), figures.label_overlay(picture, truth)]
    whole, near = list(layers), [layer[window] for layer in layers]
    whole.insert(1, figures.leaf_overlay(pixels, leaves, side=480))
    near.insert(1, figures.leaf_overlay(pixels, leaves, side=480, window=window))
    size = " x ".join(map(str, picture.shape[:2]))
    titles = [f"image\n{size}", f"leaves\n{len(leaves)} tokens", "prediction", "truth"]
    return figures.panel([whole, near], titles, side=480, note=note)


def main() -> None:
    """Score the split and draw one image of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--image", default="", help="part of the image's name; default: the best of the split")
    parser.add_argument("--data-root")
    args = parser.parse_args()
    seen: dict[str, tuple[Any, Any, Any]] = {}
    scores = evaluate(
        args.run, split=args.split, data_root=args.data_root, on_image=lambda name, *rest: seen.update({name: rest})
    )
    rows = [row for row in scores.rows if args.image in row["name"]]
    best = max(rows, key=lambda row: max(row["dice"].values()))
    dice = ", ".join(f"{name} Dice {value:.3f}" for name, value in best["dice"].items())
    figures.save_picture(args.picture, draw(*seen[best["name"]], note=f"{best['name']}: {dice}"))
    print(args.picture)


if __name__ == "__main__":
    main()
