"""From images to labels, with the heatmaps, patches and scores that show why.

Legend: K outputs of a task or chosen patches.
"""

import csv
import difflib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from foveate.errors import ConfigError, FormatError, FoveateError
from foveate.geometry.image import Real
from foveate.io.bags import SUFFIX
from foveate.io.raster import Raster, broken_of
from foveate.io.spacing import check_mpp
from foveate.io.write import append_jsonl, atomic_write, read_jsonl, unwritable
from foveate.models.recognition import RecognitionModel
from foveate.tasks.bags import open_bag
from foveate.tasks.figures import Picture, save_picture
from foveate.tasks.heatmap import TOP, Heat, gallery, heatmap_picture, write_chosen, write_heat_pyramid, write_scores
from foveate.tasks.inputs import find_inputs
from foveate.tasks.items import Item
from foveate.tasks.outputs import name_of, refuse_existing, refuse_kinds, refuse_own
from foveate.tasks.recognise import Recognised, heat_of, label_of, load_recognition, recognise
from foveate.tasks.recognition import feature_width
from foveate.tasks.recognition_settings import LabelSpec, TableConfig
from foveate.tasks.report import Report
from foveate.tasks.skipped import skipped_line, to_stderr
from foveate.tasks.source import open_native
from foveate.tasks.table import read_table

ENDINGS = {
    "png": ("_heatmap.png", "_gallery.png"),
    "geojson": (".geojson",),
    "geojson.gz": (".geojson.gz",),
    "npz": ("_scores.npz",),
    "csv": ("_scores.csv",),
    "ome.tif": ("_heatmap.ome.tif",),
    "tif": ("_heatmap.tif",),
}
"""What each format writes for an image."""
DEFAULT = ("png", "geojson", "npz")
RECORDS, TABLE, PAGE = "predictions.jsonl", "predictions.csv", "report.html"
_SHOWN = 12  # heatmaps on the page


def predict_labels(
    model: str | Path,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    format: str | None = None,  # noqa: A002 - the word people type
    mpp: Real | None = None,
    broken: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_pixels: int | None = None,
    warn: Callable[[str], Any] | None = None,
) -> list[Path]:
    """Write labels, heatmaps and scores for every image; one that cannot be read is reported and the rest goes on.

    Args:
        model: run folder or checkpoint.
        inputs: files, folders, globs, or tables with a column path; bags where the run is about features.
        out: folder, made where needed: ``predictions.csv`` and ``.jsonl``, ``report.html``, and what the formats say of
            every image.
        format: with commas, ``png`` (heatmap and gallery), ``ome.tif`` or ``tif`` (heatmap as a pyramid at the size of
            the image), ``geojson`` or ``geojson.gz`` (chosen patches), ``npz`` or ``csv`` (every patch). None:
            ``png,geojson,npz``.
        mpp: size of a pixel in um, instead of what files or table say.
        broken: what a tile that cannot be decoded does: ``raise`` or ``fill``. None: as in training.
        overwrite: replace what is there already.
        resume: leave images alone that are complete.
        max_pixels: refuse larger images where they are read whole; None: as in training.
        warn: called with one line per failed image; None writes it to standard error.

    Returns:
        The files written now.

    Raises:
        FormatError: at least one image failed; all others are written. Or there is no model.
        ConfigError: there is no input, two inputs have one name, an output exists, or a format or size is none.
    """
    formats = parse_formats(format)
    if mpp is not None:
        check_mpp(mpp)
    network, config = load_recognition(model)
    given: dict[str, Any] = {"max_pixels": max_pixels, "broken": broken}
    data = replace(config.data, **{name: value for name, value in given.items() if value is not None})
    items = find_items([inputs] if isinstance(inputs, str | Path) else inputs, data)
    job = _Job(network, data, Path(out), formats, overwrite, resume)
    job.check(items)
    written: list[Path] = []
    failed: list[str] = []
    done = job.records() if resume else {}
    for item in items:
        if item.name in done and all(goal.exists() for goal in job.goals(item).values()):
            continue
        try:
            written += job.run(item if mpp is None else replace(item, mpp=float(mpp)))
        except (FoveateError, OSError, MemoryError) as error:
            failed.append(skipped_line(item, error))
            (warn or to_stderr)(f"foveate: skipped {failed[-1]}")
    written += job.finish(model, failed)
    if failed:
        raise FormatError(
            f"{len(failed)} of {len(items)} images have no labels (first: {failed[0]}); mend or leave out these files; "
            f"{len(items) - len(failed)} are in {out}"
        )
    return written


def parse_formats(text: str | None) -> tuple[str, ...]:
    """``"png,ome.tif"`` as formats; the default where nothing was asked for.

    Raises:
        ConfigError: one of them is not a format.
    """
    found = tuple(dict.fromkeys(word.strip().lstrip(".").lower() for word in text.split(","))) if text else DEFAULT
    for word in found:
        if word not in ENDINGS:
            near = difflib.get_close_matches(word, ENDINGS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"format={word!r} is unknown{hint} the formats are {', '.join(ENDINGS)}")
    return found


def find_items(inputs: Sequence[str | Path], data: TableConfig) -> list[Item]:
    """Expand files, folders, globs and tables into images or bags, in the order given and each once.

    Args:
        inputs: paths.
        data: settings of the run; where it is about features, a folder stands for the bags in it.

    Raises:
        ConfigError: one of them names nothing.
        FormatError: a table is bad.
    """
    items: dict[Path, Item] = {}
    for path in map(Path, inputs):
        if path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
            table = replace(data, root=str(path.parent), table=path.name)
            found = [row.item for row in read_table(table, labelled=False)]
        elif path.is_dir() and (bags := sorted(path.rglob(f"*{SUFFIX}"))):
            names = [bag.relative_to(path).with_suffix("").as_posix() for bag in bags]
            found = [Item(name, bag, None, name) for name, bag in zip(names, bags, strict=True)]
        else:
            found = [replace(item, name=name_of(item.image)) for item in find_inputs([path])]
        for item in found:
            items.setdefault(item.image, item)
    return list(items.values())


@dataclass(frozen=True)
class _Job:
    """What all inputs of one call share."""

    model: RecognitionModel
    data: TableConfig
    out: Path
    formats: tuple[str, ...]
    overwrite: bool
    resume: bool

    def goals(self, item: Item) -> dict[str, Path]:
        """Files of an image by their ending."""
        endings = [end for form in self.formats for end in ENDINGS[form]]
        if self.data.features is not None:
            endings = [end for end in endings if end != "_gallery.png"]  # of features there is nothing to see
        return {end: self.out / f"{_file_name(item.name)}{end}" for end in endings}

    def check(self, items: Sequence[Item]) -> None:
        """Refuse at the door what would end with one output on top of another, and make the folder."""
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file, and labels go into a folder; give another --out")
        seen: dict[str, Item] = {}
        for item in items:
            other = seen.setdefault(_file_name(item.name), item)
            if other is not item:
                raise ConfigError(f"{other.image} and {item.image} are both called {item.name}; give ids in a table")
            goals = self.goals(item).values()
            refuse_own(item.image, goals)
            refuse_kinds(goals)
        if not (self.overwrite or self.resume):
            refuse_existing([self.out / RECORDS, *(goal for item in items for goal in self.goals(item).values())])
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                (self.out / RECORDS).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.out, error) from None

    def records(self) -> dict[str, dict[str, Any]]:
        """What has been said so far, by name; the last word counts."""
        path = self.out / RECORDS
        return {record["id"]: record for record in read_jsonl(path)} if path.exists() else {}

    def run(self, item: Item) -> list[Path]:
        """Write everything about one image."""
        goals = self.goals(item)
        native = None if self.data.features is not None else open_native(item, self.data.pixels)
        source = open_bag(item, self.data, width=feature_width(self.model), native=native)
        found = recognise(self.model, source, self.data.tasks)
        labels = {name: label_of(found.said[name], spec) for name, spec in self.data.tasks.items()}
        heat = heat_of(found, source, native, tuple(self.data.tasks))
        if heat is not None:
            titles = {name: _title(found.said[name], spec) for name, spec in self.data.tasks.items()}
            pixels = _in_rank_order(found, heat)
            for end, goal in goals.items():
                _write(end, goal, heat, native, titles, pixels)
        values = {name: [float(value) for value in said] for name, said in found.said.items()}
        record = {
            "id": item.name,
            "path": str(item.image),
            "labels": labels,
            "values": values,
            "patches": len(source),
            "chosen": len(found.index),
            "seconds": round(found.seconds, 3),
            "broken": len(broken_of(native)),
        }
        append_jsonl(self.out / RECORDS, record)
        return [goal for goal in goals.values() if heat is not None and goal.exists()]

    def finish(self, model: str | Path, failed: Sequence[str]) -> list[Path]:
        """Write the table and the page about everything in the folder."""
        records = list(self.records().values())
        if not records:
            return []
        with atomic_write(self.out / TABLE) as file:
            file.write(_table(records, self.data.tasks).encode())
        pictures: list[tuple[str, Picture]] = []
        for record in records[:_SHOWN]:
            path = self.out / f"{_file_name(record['id'])}_heatmap.png"
            if path.exists():
                pictures.append((f"{record['id']}: {_sentence(record['labels'])}", _read_picture(path)))
        few = [f"Heatmaps of the first {_SHOWN} images."] if len(records) > _SHOWN else []
        Report(
            title=f"{model}, {len(records)} images",
            lead=f"Labels of {len(records)} images; {len(failed)} could not be read.",
            table=[
                {"image": one["id"], **one["labels"], "patches": one["patches"], "seconds": one["seconds"]}
                for one in records
            ],
            figures=pictures,
            notes=[*few, *(f"Skipped {line}" for line in failed)],
        ).save(self.out / PAGE)
        return [self.out / RECORDS, self.out / TABLE, self.out / PAGE]


def _in_rank_order(found: Recognised, heat: Heat) -> Shaped[np.ndarray, "K *rest"]:
    place = np.searchsorted(heat.index, heat.ranked[:TOP])
    return found.patches.cpu().numpy()[place]


def _write(
    end: str,
    goal: Path,
    heat: Heat,
    native: Raster | None,
    titles: Mapping[str, str],
    pixels: Shaped[np.ndarray, "K *rest"],
) -> None:
    if end == "_heatmap.png":
        save_picture(goal, heatmap_picture(heat, native, titles))
    elif end == "_gallery.png":
        save_picture(goal, gallery(pixels, heat))
    elif end.startswith(".geojson"):
        write_chosen(goal, heat, overwrite=True)
    elif end.startswith("_scores"):
        write_scores(goal, heat, overwrite=True)
    else:
        write_heat_pyramid(goal, heat, kind="ome" if end.endswith("ome.tif") else "tiff", overwrite=True)


def _title(said: Float[np.ndarray, " K"], spec: LabelSpec) -> str:
    if spec.kind in ("classes", "ordinal"):
        return f"{label_of(said, spec)} ({said.max():.2f})"
    return label_of(said, spec)


def _file_name(name: str) -> str:
    return name.replace("/", "_")


def _sentence(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {label}" for name, label in labels.items())


def _table(records: Sequence[Mapping[str, Any]], tasks: Mapping[str, LabelSpec]) -> str:
    """Labels and probabilities, one row per image."""
    text = io.StringIO()
    head = ["id", "path", *tasks]
    head += [f"{name}_{value}" for name, spec in tasks.items() for value in spec.names]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "patches", "chosen", "seconds"])
    for record in records:
        row = [record["id"], record["path"], *(record["labels"][name] for name in tasks)]
        row += [f"{v:.6g}" for name, spec in tasks.items() if spec.names for v in record["values"][name]]
        writer.writerow([*row, record["patches"], record["chosen"], record["seconds"]])
    return text.getvalue()


def _read_picture(path: Path) -> Picture:
    from PIL import Image

    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))
