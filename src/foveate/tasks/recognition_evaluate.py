"""Scores of a finished recognition run with intervals, as JSON, text and a page.

Legend: B images, K outputs of a task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import ConfigError, FormatError
from foveate.io.write import atomic_write, write_json
from foveate.tasks.bags import open_bag
from foveate.tasks.class_metrics import mean_score, score_task
from foveate.tasks.config import load_as
from foveate.tasks.figures import training_curves
from foveate.tasks.items import SPLITS
from foveate.tasks.marks import CEILING, RECALL, marks_of, needle_recall
from foveate.tasks.recognise import label_of, load_recognition, recognise
from foveate.tasks.recognition import feature_width
from foveate.tasks.recognition_settings import LabelSpec, RecognitionConfig
from foveate.tasks.report import Report, format_cell
from foveate.tasks.run import CONFIG, METRICS, read_metrics
from foveate.tasks.skipped import UNREADABLE, skipped_line, to_stderr
from foveate.tasks.splits import split_rows
from foveate.tasks.table import read_table
from foveate.tasks.targets import encode

NEEDLES = (
    "Needle recall: share of the marked places held by a chosen patch (the centre of one lies in the other), mean over "
    "the images with marks; its ceiling: what the best choice of as many patches could hold."
)

_SHOWN = 20  # images on the page that were not got right


@dataclass(frozen=True)
class LabelEvaluation:
    """Scores of one split."""

    run: Path
    split: str
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]  # task -> measure -> mean, low, high, num
    rows: tuple[Mapping[str, Any], ...]  # per image: name, truth and said of every task, patches, seconds
    failed: tuple[str, ...] = ()  # one line per image that could not be read, and is in no score
    needles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # recall and its ceiling, of all marked

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row per task and measure, and where images have marks the recall of these, of no task."""
        return [
            {
                "task": task,
                "measure": name,
                "value": one["mean"],
                "low": one["low"],
                "high": one["high"],
                "n": one["num"],
            }
            for task, measures in {**self.scores, **({"-": self.needles} if self.needles else {})}.items()
            for name, one in measures.items()
        ]

    def __str__(self) -> str:
        lines = [f"skipped {line}" for line in self.failed]
        lines.append(f"{self.run}, {len(self.rows)} {self.split} images (95 % intervals by bootstrap over images)")
        for row in self.table:
            value, low, high = (format_cell(row[key]) for key in ("value", "low", "high"))
            lines.append(f"{row['task']:<16}{row['measure']:<24}{value:>8}   {low} to {high}")
        return "\n".join(lines)

    def save(self, folder: Path) -> Path:
        """Write ``<split>.json``, ``.txt`` and ``.html`` into a folder, and return the page."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = {"run": str(self.run), "split": self.split, "scores": self.scores, **self.needles}
        write_json(folder / f"{self.split}.json", {**plain, "images": self.rows, "failed": self.failed})
        with atomic_write(folder / f"{self.split}.txt") as file:
            file.write(f"{self}\n".encode())
        self.report().save(folder / f"{self.split}.html")
        return folder / f"{self.split}.html"

    def report(self) -> Report:
        """The page: scores, curves, what was got wrong, settings."""
        curves = []
        if (self.run / METRICS).is_file():
            records = read_metrics(self.run / METRICS)
            curves = [("training", training_curves({self.run.name: records}, score="score"))]
        wrong = [row for row in self.rows if any(row[task] != row[f"{task} said"] for task in self.scores)]
        notes = ["Intervals: 95 %, by bootstrap over images.", *([NEEDLES] if self.needles else [])]
        for row in wrong[:_SHOWN]:
            said = [f"{task} is {row[task]}, said {row[f'{task} said']}" for task in self.scores]
            notes.append(f"Not got right: {row['image']}: {'; '.join(said)}")
        settings = self.run / CONFIG
        return Report(
            title=f"{self.run}, {self.split} images",
            lead=f"{len(self.rows)} images, {len(wrong)} with a wrong answer in a task, {len(self.failed)} skipped.",
            table=self.table,
            figures=curves,
            config=settings.read_text(encoding="utf-8") if settings.is_file() else "",
            notes=[*notes, *(f"Skipped {line}" for line in self.failed)],
        )


def evaluate_labels(
    run: str | Path, *, split: str = "test", data_root: str | None = None, warn: Callable[[str], Any] | None = None
) -> LabelEvaluation:
    """Score the best model of a recognition run on one split, and write the scores beside it.

    Args:
        run: run folder.
        split: ``test``, ``val`` or ``train``.
        data_root: where the data is, when it has moved since training.
        warn: called with one line per image that cannot be read; None writes it to standard error.

    Returns:
        The scores; ``str()`` of them is a table. An image that cannot be read is named in ``failed``.

    Raises:
        ConfigError: the split is unknown or empty.
        FormatError: there is no trained model, the table is bad, or not one image can be read.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is none of {', '.join(SPLITS)}; choose one")
    run = Path(run)
    model, config = load_recognition(run)
    # the data may have moved since the checkpoint was written, so the run's own file has the last word on the root
    own = load_as(RecognitionConfig, run / CONFIG) if (run / CONFIG).is_file() else config
    data = replace(config.data, root=data_root or own.data.root)
    rows = split_rows(read_table(data), data)[split]
    if not rows:
        raise ConfigError(f"the {split} split has 0 images; change data.split, or choose another --split")
    truth, marks = encode(rows, data.tasks), [marks_of(row) for row in rows]
    found, seen = list[dict[str, Any]](), list[int]()
    lines, failed = list[dict[str, Any]](), list[str]()
    for number, row in enumerate(rows):
        try:
            bag = open_bag(row.item, data, width=feature_width(model))
            one = recognise(model, bag, data.tasks)
            recall = needle_recall(marks[number], one.index, bag, row, data)
        except UNREADABLE as error:
            failed.append(skipped_line(row.item, error))
            (warn or to_stderr)(f"foveate: skipped {failed[-1]}")
            continue
        found.append(one.said)
        seen.append(number)
        line: dict[str, Any] = {"image": row.item.name, "patches": len(one.share), "seconds": round(one.seconds, 3)}
        for name, spec in data.tasks.items():
            line |= {name: row.labels[name], f"{name} said": label_of(one.said[name], spec)}
        lines.append(line | recall)
    if not found:
        raise FormatError(f"none of the {len(rows)} {split} images can be scored (first: {failed[0]}); mend the files")
    scores = {
        name: score_task(spec.kind, np.stack([said[name] for said in found]), _truth(truth[name][seen].numpy(), spec))
        for name, spec in data.tasks.items()
    }
    known = [line for line in lines if RECALL in line]
    needles = {name: mean_score(np.array([line[name] for line in known])) for name in (RECALL, CEILING) if known}
    evaluation = LabelEvaluation(run, split, scores, tuple(lines), tuple(failed), needles)
    evaluation.save(run / "evaluation")
    return evaluation


def _truth(encoded: Any, spec: LabelSpec) -> Any:
    """Labels as the table has them: numbers are not scaled."""
    mean, deviation = spec.scale or (0.0, 1.0)
    return encoded * deviation + mean if spec.kind == "regression" else encoded
