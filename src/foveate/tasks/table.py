"""A table of images with labels: one row per image, one column per thing to recognise."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError, FormatError
from foveate.io.bags import SUFFIX
from foveate.tasks.files import group_split_sizes, inside, read_rows, stem_of
from foveate.tasks.items import Item, group_of
from foveate.tasks.recognition_settings import TableConfig

MARKS = "marks"
"""Column that names, for each image, where the evidence lies; unless a task has it."""


@dataclass(frozen=True)
class Row:
    """One image of the table, and what is known of it.

    Args:
        item: its name (the column ``id``, else its path without the ending), file, group, split and mpp. Where the
            run is about features, the file is the bag.
        labels: text of every task's column, empty where nobody knows.
        number: of the row in the table, from 1.
        marks: GeoJSON that says where in the image the evidence lies, where the column ``marks`` names one.
    """

    item: Item
    labels: Mapping[str, str]
    number: int
    marks: Path | None = None


def read_table(data: TableConfig, *, labelled: bool = True) -> tuple[Row, ...]:
    """The rows of a table in their order; whether the images can be read is seen when they are.

    Args:
        data: where the table is, and what its columns mean.
        labelled: False where labels are neither needed nor looked at.

    Raises:
        ConfigError: the root is no folder, or two rows have one id.
        FormatError: the table is unreadable, lacks a column or a label, or names a file outside the root or marks that
            are not there.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise ConfigError(f"data.root={data.root!r} is not a folder: give the folder of the table (--data.root=DIR)")
    path = inside(root, data.table, "data.table")
    given = read_rows(path)
    if not given:
        raise FormatError(f"{path} has no rows: name at least one image")
    columns = ["path"] if data.features is None or "id" not in given[0] else ["id"]
    if labelled:
        columns += _columns(data)
    lost = next((column for column in columns if column not in given[0]), None)
    if lost is not None:
        raise FormatError(
            f"{path} has the columns {', '.join(given[0])} but no {lost!r}: add it, or correct data.tasks"
        )
    rows = [_row(root, path, number, row, data, labelled) for number, row in enumerate(given, 1)]
    _refuse_twice(path, rows)
    return tuple(rows)


def _row(root: Path, path: Path, number: int, given: Mapping[str, Any], data: TableConfig, labelled: bool) -> Row:
    where = f"{path} row {number}"
    known = group_split_sizes(path, number, given)
    text, name = str(given.get("path") or ""), str(given.get("id") or "")
    if not text and (data.features is None or not name):
        raise FormatError(f"{where} has no path: name an image, or remove the row")
    image = inside(root, text, where) if text else root
    name = name or image.relative_to(root).with_name(stem_of(image)).as_posix()
    if data.features is not None:
        image = inside(root, f"{data.features}/{name}{SUFFIX}", where)
    group = known["group"] or group_of(name, data.split)
    item = Item(name, image, None, str(group), known["split"], known["mpp"], known["spacing"])
    labels = {}
    for task, spec in data.tasks.items() if labelled else ():
        value = given.get(spec.column or task)
        labels[task] = "" if value is None else str(value).strip()
        if not labels[task] and data.missing == "error":
            raise FormatError(
                f"{where} ({name}) has no label in column {spec.column or task!r}: write one, remove the row, or set "
                "data.missing to ignore"
            )
    marks = None if not labelled or MARKS in _columns(data) else _marks(root, where, given)
    return Row(item, labels, number, marks)


def _columns(data: TableConfig) -> list[str]:
    """Columns of the tasks."""
    return [spec.column or name for name, spec in data.tasks.items()]


def _marks(root: Path, where: str, given: Mapping[str, Any]) -> Path | None:
    text = str(given.get(MARKS) or "").strip()
    if not text:
        return None
    path = inside(root, text, where)
    if not path.is_file():
        raise FormatError(
            f"{where} has {MARKS}={text!r}, and there is no such file: name a GeoJSON below data.root, or leave it "
            "empty"
        )
    return path


def _refuse_twice(path: Path, rows: list[Row]) -> None:
    for kind in ("name", "image"):
        seen: dict[Any, Row] = {}
        for row in rows:
            other = seen.setdefault(getattr(row.item, kind), row)
            if other is not row:
                splits = {other.item.split, row.item.split} - {None}
                between = f" (in the splits {' and '.join(sorted(map(str, splits)))})" if len(splits) > 1 else ""
                raise ConfigError(
                    f"{path} rows {other.number} and {row.number} are both {getattr(row.item, kind)}{between}: name "
                    "every image once, and give it an id of its own"
                )
