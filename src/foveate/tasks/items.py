"""Which files there are, which mask belongs to which image, and which split each group goes to."""

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError, FormatError
from foveate.tasks.settings import DataConfig, SplitConfig

SPLITS = ("train", "val", "test")
_ENDING = re.compile(r"\.(nii|geojson|json)\.gz$|\.ome\.(tiff?|tf[28]|btf|zarr)$", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One image of the data set.

    Args:
        name: the image's path below the root, without its ending; unique.
        image: file of the image.
        mask: file of the mask, or ``None``.
        group: what must stay on one side of the split.
        split: ``train``, ``val`` or ``test`` where the manifest says so, else ``None``.
        mpp: um per pixel where the manifest says so; wins over what the file says.
        spacing: mm per axis where the manifest says so; wins over what the settings and the file say.
    """

    name: str
    image: Path
    mask: Path | None
    group: str
    split: str | None = None
    mpp: float | None = None
    spacing: tuple[float, ...] | None = None


def find_items(data: DataConfig) -> tuple[Item, ...]:
    """All images of the data set with their masks, in the order of their names.

    Args:
        data: where to look, and by which rule a mask is found.

    Raises:
        ConfigError: no image, no mask or more than one mask is found, or a rule leaves the root.
        FormatError: the manifest is unreadable, or names a file outside the root.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise ConfigError(f"data.root={data.root!r} is not a folder: give the folder with the images (--data.root=DIR)")
    rows = _read_manifest(root, data) if data.manifest else [{"image": p} for p in _glob(root, data.images, "images")]
    items = [_item(root, data, row) for row in rows]
    double = next((name for name, count in Counter(item.name for item in items).items() if count > 1), None)
    if double is not None:
        raise ConfigError(f"{double!r} is named twice in {data.manifest or data.images!r}: name every image once")
    return tuple(sorted(items, key=lambda item: item.name))


def split_items(items: Sequence[Item], data: DataConfig) -> dict[str, tuple[Item, ...]]:
    """Share the images out by whole groups, before anything is varied.

    The manifest's split column wins; a group it leaves open joins the group's other members, and the rest is dealt by
    a seeded hash of the group's name: most groups for training, at least one for every share above 0 while there are
    groups. Adding images of a new group seldom moves an old one, and the order of files never matters.

    Args:
        items: all images.
        data: the shares and the seed.

    Returns:
        ``train``, ``val`` and ``test``, each in the order of ``items``; no group is in two of them.

    Raises:
        ConfigError: a group is in two splits by the manifest, or nothing is left for training.
    """
    chosen: dict[str, str] = {}
    for item in items:
        if item.split is None:
            continue
        other = chosen.setdefault(item.group, item.split)
        if other != item.split:
            raise ConfigError(
                f"group {item.group!r} is in the splits {other!r} and {item.split!r}: put each group into one split"
            )
    open_groups = sorted({item.group for item in items} - chosen.keys())
    chosen |= _deal(open_groups, data.split)
    result = {split: tuple(i for i in items if chosen[i.group] == split) for split in SPLITS}
    if items and not result["train"]:
        raise ConfigError(f"0 of {len(items)} images are for training: name some 'train' in the split column")
    return result


def _deal(groups: Sequence[str], split: SplitConfig) -> dict[str, str]:
    def rank(group: str) -> bytes:
        return hashlib.sha256(f"{split.seed}/{group}".encode()).digest()

    order = sorted(groups, key=rank)
    shares = {"val": split.val, "test": split.test}
    counts = {name: round(share * len(order)) for name, share in shares.items()}
    for place, name in enumerate((name for name in shares if shares[name] > 0), 2):
        if len(order) >= place:  # the first group trains, the second validates, the third tests
            counts[name] = max(counts[name], 1)
    while order and sum(counts.values()) >= len(order):
        counts[max(counts, key=lambda name: (counts[name], name == "test"))] -= 1
    names = ["test"] * counts["test"] + ["val"] * counts["val"]
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))


def _item(root: Path, data: DataConfig, row: Mapping[str, Any]) -> Item:
    image: Path = row["image"]
    name = image.relative_to(root).with_name(stem_of(image)).as_posix()
    mask = row.get("mask")
    if mask is None and data.masks is not None:
        mask = _mask_of(root, data.masks, image)
    group = row.get("group") or group_of(stem_of(image), data.split)
    return Item(name, image, mask, str(group), row.get("split"), row.get("mpp"), row.get("spacing"))


def stem_of(path: Path) -> str:
    """The name of an image without its ending, of which ``.nii.gz``, ``.ome.tif`` and their like are one.

    A folder has no ending but ``.zarr``: those of DICOM series are often named by numbers with dots.
    """
    if path.is_dir() and path.suffix.lower() != ".zarr":
        return path.name
    return _ENDING.sub("", path.name) if _ENDING.search(path.name) else path.stem


def is_image(path: Path) -> bool:
    """Whether a path may be an image: a file, a zarr folder, or a folder of DICOM files; hidden ones are not."""
    if path.name.startswith("."):
        return False
    if not path.is_dir():
        return path.is_file()
    if any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray")):
        return True
    with os.scandir(path) as entries:
        first = next((entry.path for entry in entries if entry.is_file() and not entry.name.startswith(".")), None)
    if first is None:
        return False
    with Path(first).open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def group_of(stem: str, split: SplitConfig) -> str:
    """The group of a file: its stem, or what ``group_regex`` finds in it.

    Raises:
        ConfigError: the expression does not match this file.
    """
    if split.by == "file" or split.group_regex is None:
        return stem
    found = re.search(split.group_regex, stem)
    if found is None:
        raise ConfigError(
            f"data.split.group_regex={split.group_regex!r} finds nothing in {stem!r}: make it match every file"
        )
    return next((part for part in found.groups() if part is not None), found.group(0))


def _glob(root: Path, pattern: str, field: str) -> list[Path]:
    _check_inside(pattern, f"data.{field}")
    found = [p for p in sorted(root.glob(pattern)) if is_image(p)]
    if not found:
        raise ConfigError(f"data.{field}={pattern!r} matches no file below {root}: correct the pattern or data.root")
    return [inside(root, str(p.relative_to(root)), f"data.{field}") for p in found]


def _mask_of(root: Path, rule: str, image: Path) -> Path:
    import glob

    _check_inside(rule, "data.masks")
    pattern = rule.replace("{stem}", glob.escape(stem_of(image)))
    found = [p for p in sorted(root.glob(pattern)) if is_image(p)]
    if len(found) != 1:
        what = "no mask" if not found else f"{len(found)} masks"
        raise ConfigError(f"{image.name} has {what} by data.masks={rule!r} below {root}: correct the rule or the files")
    return inside(root, str(found[0].relative_to(root)), "data.masks")


def _check_inside(pattern: str, name: str) -> None:
    if "\0" in pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise ConfigError(f"{name}={pattern!r} leaves data.root: give a pattern relative to data.root, without '..'")


def inside(root: Path, text: str, where: str) -> Path:
    """A path that a file of the data set names, proven to lie below the root.

    Args:
        root: the only folder that may be read.
        text: the path as written, relative to ``root`` (or absolute and below it).
        where: what to call the place in an error.

    Raises:
        FormatError: the path holds a NUL, steps up, or leads out of the root, also by a symbolic link.
    """
    if "\0" in text:
        raise FormatError(f"{where} names {text!r} with a NUL character: remove it")
    if ".." in Path(text).parts:
        raise FormatError(f"{where} names {text!r}, which steps out with '..': write the path below data.root")
    base = root.resolve()
    real = (root / text).resolve()
    if not real.is_relative_to(base):
        raise FormatError(f"{where} names {text!r}, which is outside {base}: only files below data.root are read")
    return root / real.relative_to(base) if Path(text).is_absolute() else root / text


def _read_manifest(root: Path, data: DataConfig) -> list[dict[str, Any]]:
    assert data.manifest is not None
    path = inside(root, data.manifest, "data.manifest")
    rows = read_rows(path)
    if not rows:
        raise FormatError(f"{path} has no rows: name at least one image, or remove data.manifest")
    if "image" in rows[0]:
        return [_paths(root, path, number, row) for number, row in enumerate(rows, 1)]
    if data.manifest_id not in rows[0]:
        raise FormatError(
            f"{path} has the columns {', '.join(rows[0])} but neither 'image' nor {data.manifest_id!r}: "
            "name the files in a column 'image', or set data.manifest_id to the column with the file stems"
        )
    files = {stem_of(file): file for file in _glob(root, data.images, "images")}
    result = []
    for number, row in enumerate(rows, 1):
        stem = str(row[data.manifest_id])
        if stem not in files:
            raise FormatError(f"{path} row {number} names {stem!r}, no file of data.images={data.images!r}: correct it")
        result.append({**group_split_sizes(path, number, row), "image": files[stem]})
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest, every one with the same columns.

    Args:
        path: a CSV or JSONL file.

    Raises:
        FormatError: it is neither, or not readable as what it is.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(text.splitlines(), strict=True))
        else:
            raise FormatError(f"{path} is neither .csv nor .jsonl: write the manifest as one of them")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise FormatError(f"{path} cannot be read as a manifest: give a CSV or JSONL file ({error})") from None
    wrong = next((row for row in rows if not isinstance(row, dict) or None in row), None)
    if wrong is not None:
        raise FormatError(f"{path} has the row {wrong!r} that does not fit its columns: give every row the same ones")
    return rows


def group_split_sizes(path: Path, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says beside its files: ``group``, ``split``, ``mpp`` and ``spacing``, None where it is silent.

    Args:
        path: of the manifest, for messages.
        number: of the row, from 1.
        row: its columns.

    Raises:
        FormatError: an unknown split, or sizes that are none.
    """
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise FormatError(f"{path} row {number} has split={split!r}: write train, val or test, or leave it empty")
    mpp, spacing = _sizes(path, number, row, "mpp"), _sizes(path, number, row, "spacing")
    if mpp is not None and len(mpp) != 1:
        raise FormatError(f"{path} row {number} has mpp={row['mpp']!r}: write one size in um, such as 0.25")
    return {"group": row.get("group") or None, "split": split, "mpp": mpp[0] if mpp else None, "spacing": spacing}


def _sizes(path: Path, number: int, row: Mapping[str, Any], column: str) -> tuple[float, ...] | None:
    """Numbers above 0 from ``0.5``, ``"2.5 0.7 0.7"`` or ``[2.5, 0.7, 0.7]``."""
    given = row.get(column)
    if given is None or given == "":
        return None
    parts = given if isinstance(given, list) else str(given).replace(",", " ").split()
    try:
        sizes = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise FormatError(
            f"{path} row {number} has {column}={given!r}: write sizes above 0, such as 0.5 or '2.5 0.7 0.7'"
        )
    return sizes


def _paths(root: Path, path: Path, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{path} row {number}"
    files: dict[str, Path] = {}
    for column in ("image", "mask"):
        if not row.get(column):
            continue
        files[column] = inside(root, str(row[column]), where)
        if not is_image(files[column]):
            raise FormatError(f"{where} names {row[column]!r}, which is not a file below {root}: correct it")
    if "image" not in files:
        raise FormatError(f"{where} has no image: name one, or remove the row")
    return {**group_split_sizes(path, number, row), **files}


def assign(items: Sequence[Item], split: str) -> tuple[Item, ...]:
    """The same items, all marked as belonging to one split."""
    return tuple(replace(item, split=split) for item in items)
