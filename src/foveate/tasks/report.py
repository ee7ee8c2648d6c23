"""One HTML page about a run: table, curves, best and worst cases, settings. It needs no other file and no network."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.tasks import figures
from foveate.tasks.figures import Picture, png_bytes
from foveate.tasks.metrics import PixelMetrics, mean_known
from foveate.tasks.pruned_view import with_legend

if TYPE_CHECKING:
    from foveate.tasks.evaluate import Evaluation
    from foveate.tasks.predict import Segmented

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1240px;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.lead { color: #444; margin-top: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1a1a1a; }
figure { margin: 0 0 1.6rem; } figure img { max-width: 100%; height: auto; } figcaption { color: #444; }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
div.wide { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Report:
    """What a report shows; every text is escaped.

    Args:
        title: heading of the page.
        lead: one or two sentences below it.
        table: rows as column -> value, such as Dice, ceiling, tokens, seconds; None and NaN are shown as a dash.
        figures: caption and picture, in order, such as the curves and the best and worst cases.
        config: the resolved settings as text.
        notes: what the reader has to know about the figures, one paragraph each.
    """

    title: str
    lead: str = ""
    table: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[tuple[str, Picture]] = ()
    config: str = ""
    notes: Sequence[str] = ()

    def to_html(self) -> str:
        """The page."""
        parts = [f"<h1>{html.escape(self.title)}</h1>", f'<p class="lead">{html.escape(self.lead)}</p>']
        if self.table:
            parts.append(f'<div class="wide">{_html_table(self.table)}</div>')
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes]
        for caption, picture in self.figures:
            data = base64.b64encode(png_bytes(picture)).decode("ascii")
            text = html.escape(caption)
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure><figcaption>{text}</figcaption>{image}</figure>")
        if self.config:
            parts.append(f"<h2>Settings</h2><pre>{html.escape(self.config)}</pre>")
        body = "\n".join(parts)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
        )

    def save(self, path: str | Path) -> None:
        """Write the page, as a whole or not at all."""
        from foveate.io.write import atomic_write

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as file:
            file.write(self.to_html().encode())


def format_cell(value: Any) -> str:
    """A table value as text: three decimals for fractions, none for large numbers, a dash for what is not there."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; the columns are those of the first row."""
    columns = list(rows[0])
    cells = [[format_cell(row.get(column)).replace("|", "\\|") for column in columns] for row in rows]
    widths = [max(len(column), 3, *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = [columns, *cells]
    text = ["| " + " | ".join(_align(cell, w, i) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) + " |"
            for line in lines]  # fmt: skip
    rule = "|" + "|".join(":" + "-" * (w + 1) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(format_cell(row.get(column)))}</td>" for column in columns) + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


@dataclass(frozen=True)
class Case:
    """One image of a gallery: its name, its Dice, and its panel."""

    name: str
    dice: float
    picture: Picture


class Gallery:
    """Draws the panel of every image it is called with, and keeps the best and the worst few.

    Args:
        class_names: all classes, background first.
        groups: as in `PixelMetrics`.
        keep: how many of each to keep.
        side: longest side of one picture in a panel, in pixels.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        groups: Mapping[str, Sequence[int]] | None = None,
        keep: int = 2,
        side: int = 400,
    ) -> None:
        self.class_names, self.groups, self.keep, self.side = tuple(class_names), groups, keep, side
        self.cases: list[Case] = []

    def __call__(self, name: str, image: Any, labels: Any, result: "Segmented") -> None:
        """Take one image, its true labels, and what the model made of it."""
        metrics = PixelMetrics(self.class_names, groups=self.groups, distances=False)
        dice = mean_known(metrics.update(name, result.labels, labels)["dice"])
        rank = sum(_rank(case.dice) < _rank(dice) for case in self.cases)
        if self.keep <= rank < len(self.cases) + 1 - self.keep:
            return
        prediction, truth = result.labels.numpy(), labels.numpy()
        picture = case_panel(image.numpy(), truth, prediction, result.leaves, dice, side=self.side, left=result.left)
        self.cases = sorted([*self.cases, Case(name, dice, picture)], key=lambda case: _rank(case.dice))
        if len(self.cases) > 2 * self.keep:
            del self.cases[self.keep]


def _rank(dice: float) -> float:
    """Images in which there is nothing to find, and nothing was found, have no Dice; they are among the best."""
    return 2.0 if math.isnan(dice) else dice


def case_panel(
    image: Any, truth: Any, prediction: Any, leaves: Any, dice: float, *, side: int = 400, left: Any = None
) -> Picture:
    """Image, leaves, prediction, errors and truth side by side, and magnified below.

    Args:
        image: ``[C, *S]``; of a volume the plane with the most structure is shown.
        truth: class per pixel, 255 where unknown.
        prediction: class per pixel.
        leaves: of the image.
        dice: for the title; NaN where there is none.
        side: longest side of one picture, in pixels.
        left: of `left_at`; the leaves are tinted by it.
    """
    plane = None
    if truth.ndim == 3:
        plane = int(((truth > 0) & (truth != figures.IGNORE)).sum((1, 2)).argmax())
        truth, prediction = truth[plane], prediction[plane]
    picture = figures.to_rgb(image, plane=plane)
    window = figures.busiest_window(truth, max(picture.shape[:2]) // 4)
    shown = [
        picture,
        figures.label_overlay(picture, prediction),
        figures.error_map(picture, prediction, truth),
        figures.label_overlay(picture, truth),
    ]
    whole = [*shown[:1], figures.leaf_overlay(image, leaves, side=side, plane=plane, left=left), *shown[1:]]
    zoom = figures.leaf_overlay(image, leaves, side=side, window=window, plane=plane, left=left)
    near = [shown[0][window], zoom, *(one[window] for one in shown[1:])]
    size = " x ".join(map(str, image.shape[1:]))
    titles = [f"image\n{size}", f"leaves\n{len(leaves):,} tokens", f"prediction\nDice {format_cell(dice)}"]
    note = "errors: green found, red invented or confused, blue missed; below: magnified"
    panel = figures.panel([whole, near], [*titles, "errors", "truth"], side=side, note=note)
    return panel if left is None else with_legend(panel, left)


def run_report(evaluation: "Evaluation", gallery: Gallery) -> Report:
    """The page about one evaluated run: scores per image, curves, best and worst cases, settings.

    Args:
        evaluation: what ``evaluate`` returned.
        gallery: what it was given as ``on_image``.
    """
    from foveate.tasks.run import CONFIG, METRICS, read_metrics

    unit = evaluation.summary["hd95_unit"]
    rows = [
        {
            "image": row["name"],
            "Dice": mean_known(row["dice"]),
            "ceiling": mean_known(row["ceiling"]),
            "IoU": mean_known(row["iou"]),
            f"HD95 {unit}": mean_known(row["hd95"]),
            "tokens": row["tokens"],
            "seconds": row["seconds"],
        }
        for row in evaluation.rows
    ]
    means = {name: mean_known([float(row[name]) for row in rows]) for name in list(rows[0])[1:]}
    curves = []
    if (evaluation.run / METRICS).is_file():
        records = read_metrics(evaluation.run / METRICS)
        curves = [("training", figures.training_curves({evaluation.run.name: records}))]
    number = len(gallery.cases)
    cases = [
        (f"{'worst' if rank < number / 2 else 'best'}: {case.name}, Dice {format_cell(case.dice)}", case.picture)
        for rank, case in enumerate(gallery.cases)
    ]
    settings = evaluation.run / CONFIG
    return Report(
        title=f"{evaluation.run}, {evaluation.split} images",
        lead=f"Dice {format_cell(evaluation.dice)}, ceiling of the trees {format_cell(evaluation.ceiling)}, "
        f"{evaluation.tokens:,.0f} tokens and {evaluation.seconds:.2f} s per image.",
        table=[{"image": "mean", **means}, *rows],
        figures=[*curves, *cases],
        config=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        notes=[
            "Scores are in pixels at full resolution; the ceiling is the true mask encoded and decoded by the tree."
        ],
    )
