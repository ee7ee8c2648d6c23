"""The curves of the needle task as one picture: every seed a line, one column for each side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLUMNS = (
    ("published-1000", "published rule\n1,000 patches"),
    ("ours-1000", "ours\n1,000 patches"),
    ("published-5000", "published rule\n5,000 patches"),
    ("ours-5000", "ours\n5,000 patches"),
)
ROWS = (("recall", "digits that are kept"), ("majority", "majority right"))
BLUE = "#0072b2"


def draw_curves(found: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Recall and accuracy by epoch, on test bags that decide nothing; returns the picture's path where there is one.

    Args:
        found: runs by side, number of patches and seed, each with its ``curve``.
        path: of the picture.
    """
    columns = [(title, curves) for key, title in COLUMNS if (curves := curves_of(found, key))]
    if not columns:
        return None
    figure = Figure(figsize=(2.6 * len(columns), 4.2), dpi=140, layout="constrained", facecolor="white")
    axes = figure.subplots(len(ROWS), len(columns), sharex=True, sharey=True, squeeze=False)
    for column, (title, curves) in enumerate(columns):
        axes[0][column].set_title(f"{title}, {len(curves)} seeds", loc="left", fontsize=9)
        for axis, (key, label) in zip(axes[:, column], ROWS, strict=True):
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), [one[key] for one in curve], color=BLUE, linewidth=1.1, alpha=0.6)
            axis.set_ylabel(label if column == 0 else "", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="0.9", linewidth=0.7)
            axis.set_ylim(0, 1.02)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1][column].set_xlabel("epoch", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def curves_of(found: Mapping[str, Mapping[str, Any]], key: str) -> list[Sequence[Mapping[str, float]]]:
    """The curves of one side, seed by seed."""
    return [run["curve"] for name, run in found.items() if name.rsplit("-", 1)[0] == key]
