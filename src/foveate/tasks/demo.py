"""The demonstration: the same ViT on adaptive and on uniform leaves, on synthetic images, for the same CPU minutes."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.leaves import Leaves
from foveate.io.write import atomic_write
from foveate.tasks import figures
from foveate.tasks.evaluate import evaluate
from foveate.tasks.report import Report, markdown_table
from foveate.tasks.run import CONFIG, METRICS, read_metrics
from foveate.tasks.segmentation import fit
from foveate.tasks.settings import DataConfig, FitConfig, ModelSpec, TrainConfig, TreeConfig

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSize:
    """How large the demonstration is.

    Args:
        side: of the images, in pixels.
        splits: number of training, validation and test images.
        min_size: smallest leaf, and the leaf of the uniform grid, in pixels.
        max_leaves: leaves per image of the adaptive model.
        minutes: of training for each model.
        overrides: fields of ``apf_vit_tiny`` that are changed.
    """

    side: int = 1024
    splits: tuple[int, int, int] = (24, 3, 6)
    min_size: int = 16
    max_leaves: int = 512
    minutes: float = 1.5
    overrides: tuple[tuple[str, int], ...] = (("depth", 4), ("decoder_width", 16))


QUICK = DemoSize(128, (4, 1, 2), 16, 32, 0.05, (("depth", 1), ("width", 48), ("num_heads", 3), ("decoder_width", 8)))


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found and wrote.

    Args:
        rows: one per model, as column -> value.
        files: what was written.
    """

    rows: tuple[Mapping[str, Any], ...]
    files: tuple[Path, ...]

    def to_text(self) -> str:
        """The table and the paths."""
        paths = "\n".join(f"  {path}" for path in self.files)
        return f"{markdown_table(self.rows)}\n{verdict(self.rows)}\n{paths}"


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence that says which model won, also when it is the uniform one."""
    adaptive, uniform = rows[0], rows[1]
    ratio = uniform["tokens"] / adaptive["tokens"]
    gain = adaptive["Dice"] - uniform["Dice"]
    how = "better" if gain > 0 else "worse"
    return (
        f"With {ratio:.1f}x fewer tokens, adaptive leaves are {abs(gain):.3f} Dice {how} after the same training time."
    )


def run_demo(
    out: str | Path, *, minutes: float | None = None, quick: bool = False, say: Say = lambda text: None
) -> DemoResult:
    """Write a data set, train both models, score them on test images at full resolution, and draw the result.

    Args:
        out: folder to write into; runs that an earlier demonstration left there are replaced.
        minutes: of training for each of the two models.
        quick: seconds instead of minutes and tiny images: shows that everything runs, proves nothing.
        say: takes one line of progress at a time.

    Returns:
        The table and what was written: ``picture.png``, ``table.md``, ``report.html``.

    Cost: about 4 minutes on two idle cores by default.
    """
    folder, size = Path(out), QUICK if quick else DemoSize()
    if minutes is not None:
        size = replace(size, minutes=minutes)
    say(f"drawing {sum(size.splits)} synthetic images of {size.side} x {size.side} pixels in {folder / 'data'}")
    write_data(folder / "data", size)
    shown: dict[str, _Shown] = {}
    rows = []
    for name, config in demo_configs(folder, size).items():
        say(f"training the {name} model for {60 * size.minutes:.0f} seconds")
        result = fit(config, overwrite=True)
        shown[name] = _Shown()
        scores = evaluate(config.out, split="test", on_image=shown[name])
        rows.append(_row(name, result, scores))
    files = _draw(folder, rows, shown)
    return DemoResult(tuple(rows), files)


class _Shown:
    """Remembers what the model made of the first test image."""

    name = ""
    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    leaves: Leaves

    def __call__(self, name: str, image: Any, labels: Any, result: Any) -> None:
        if not self.name:
            self.name, self.image, self.truth = name, image.numpy(), labels.numpy()
            self.prediction, self.leaves = result.labels.numpy(), result.leaves


def _row(name: str, result: Any, scores: Any) -> dict[str, Any]:
    place = result.loop.position
    unit = scores.summary["hd95_unit"]
    return {
        "model": name,
        "tokens": round(scores.tokens),
        "Dice": scores.dice,
        "ceiling": scores.ceiling,
        "IoU": float(scores.summary["iou"]["mean"]["mean"]),
        f"HD95 {unit}": float(scores.summary["hd95"]["mean"]["mean"]),
        "training s": round(place.seconds),
        "steps": place.step,
        "s per image": scores.seconds,
    }


def _draw(folder: Path, rows: Sequence[Mapping[str, Any]], shown: Mapping[str, _Shown]) -> tuple[Path, ...]:
    """Write the picture, the table and the report; return their paths."""
    picture = _picture(rows, shown)
    figures.save_picture(folder / "picture.png", picture)
    with atomic_write(folder / "table.md") as file:
        file.write(f"{markdown_table(rows)}\n{verdict(rows)}\n".encode())
    curves = figures.training_curves({name: read_metrics(folder / name / METRICS) for name in shown})
    errors = [figures.error_map(figures.to_rgb(one.image), one.prediction, one.truth) for one in shown.values()]
    report = Report(
        title="foveate: adaptive and uniform leaves, same model, same training time",
        lead=verdict(rows),
        table=rows,
        figures=[
            (f"test image {shown['adaptive'].name}", picture),
            ("training", curves),
            ("errors: green found, red invented, blue missed", figures.panel([errors], list(shown), side=760)),
        ],
        config=(folder / "adaptive" / CONFIG).read_text(encoding="utf-8"),
        notes=[
            "Both models are the same ViT with the same decoder, trained on the same synthetic images for the same "
            "seconds on the same machine, and scored once on test images, in pixels at full resolution.",
            "The ceiling is the Dice of the true mask after it is encoded and decoded by the leaves alone.",
        ],
    )
    report.save(folder / "report.html")
    return tuple(folder / name for name in ("picture.png", "table.md", "report.html"))


def _picture(rows: Sequence[Mapping[str, Any]], shown: Mapping[str, _Shown]) -> figures.Picture:
    """Image, leaves, both predictions and the truth, whole and magnified."""
    one, side = shown["adaptive"], 480
    picture = figures.to_rgb(one.image)
    window = figures.busiest_window(one.truth, picture.shape[0] // 4)
    found = [figures.label_overlay(picture, shown[row["model"]].prediction) for row in rows]
    rest = [*found, figures.label_overlay(picture, one.truth)]
    whole = [picture, figures.leaf_overlay(one.image, one.leaves, side=side), *rest]
    zoom = figures.leaf_overlay(one.image, one.leaves, side=side, window=window)
    near = [picture[window], zoom, *(each[window] for each in rest)]
    titles = ["image\n" + " x ".join(map(str, picture.shape[:2])), f"leaves\n{len(one.leaves)} tokens"]
    titles += [f"{row['model']}\n{row['tokens']:,} tokens, test Dice {row['Dice']:.3f}" for row in rows]
    return figures.panel([whole, near], [*titles, "truth"], side=side)


def demo_configs(folder: Path, size: DemoSize) -> dict[str, FitConfig]:
    """Settings of the two runs: they differ in how an image is cut, and in nothing else."""
    base = FitConfig(
        data=DataConfig(root=str(folder / "data"), manifest="manifest.csv", classes={"structure": 1}),
        model=ModelSpec(name="apf_vit_tiny", overrides=dict(size.overrides)),
        train=TrainConfig(
            epochs=None, minutes=size.minutes, batch_size=1, lr=1e-3, augment=0.5, eval_every=4, schedule="cosine"
        ),
    )
    adaptive = TreeConfig(max_leaves=size.max_leaves, min_size=size.min_size)
    return {
        "adaptive": replace(base, tree=adaptive, out=str(folder / "adaptive")),
        "uniform": replace(base, tree=TreeConfig(uniform=size.min_size), out=str(folder / "uniform")),
    }


def write_data(folder: Path, size: DemoSize) -> None:
    """Draw the images and write the manifest that says which of them train, validate and test."""
    from foveate.testing import write_dataset

    write_dataset(folder, sum(size.splits), size.side, seed=1)
    names = [split for split, number in zip(("train", "val", "test"), size.splits, strict=True) for _ in range(number)]
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "split"])
        writer.writerows([f"images/{i:03d}.png", f"masks/{i:03d}.png", split] for i, split in enumerate(names))
