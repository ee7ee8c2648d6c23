"""Which files a data set has: found by a pattern or named by a manifest, and never outside its root."""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError, FormatError
from foveate.tasks.settings import DataConfig

SPLITS = ("train", "val", "test")
MODALITY = "{modality}"
"""Where the name of a modality stands in ``data.images``."""
_ENDING = re.compile(r"\.(nii|geojson|json)\.gz$|\.ome\.(tiff?|tf[28]|btf|zarr)$", re.IGNORECASE)


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


def find_files(root: Path, data: DataConfig) -> list[Path]:
    """The images that ``data.images`` finds, in order; where there are modalities, the files of the first.

    Raises:
        ConfigError: there is none, or the pattern leaves the root.
    """
    import glob

    pattern = data.images
    _check_inside(pattern, "data.images")
    if data.modalities:
        pattern = pattern.replace(MODALITY, glob.escape(data.modalities[0]))
    found = [path for path in sorted(root.glob(pattern)) if is_image(path)]
    if not found:
        raise ConfigError(f"data.images={data.images!r} matches no file below {root}: correct the pattern or data.root")
    return [inside(root, str(path.relative_to(root)), "data.images") for path in found]


def siblings(image: Path, modalities: Sequence[str]) -> tuple[str, tuple[Path, ...]]:
    """What the files of one image have in common, and the files of its further modalities.

    Args:
        image: file of the first modality, whose stem ends with its name.
        modalities: names of all, in the order of the channels.

    Raises:
        ConfigError: the name does not end like that, or a file is missing.
    """
    first, stem = modalities[0], stem_of(image)
    if not stem.endswith(first) or stem == first:
        raise ConfigError(f"{image} is no file of the modality {first!r}, after which its name must end: give that one")
    start, ending = stem.removesuffix(first), image.name[len(stem) :]
    more = tuple(image.with_name(f"{start}{name}{ending}") for name in modalities[1:])
    lost = next((path for path in more if not is_image(path)), None)
    if lost is not None:
        raise ConfigError(f"{lost} is missing beside {image.name}: every image needs {', '.join(modalities)}")
    return start.rstrip("_-. ") or start, more


def mask_of(root: Path, rule: str, image: Path, stem: str) -> Path:
    """The one file that ``data.masks`` names for an image.

    Raises:
        ConfigError: there is none, or there are several, or the rule leaves the root.
    """
    import glob

    _check_inside(rule, "data.masks")
    pattern = rule.replace("{stem}", glob.escape(stem))
    found = [path for path in sorted(root.glob(pattern)) if is_image(path)]
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


def read_manifest(root: Path, data: DataConfig) -> list[dict[str, Any]]:
    """The rows of ``data.manifest``: image, mask, more, group, split, mpp and spacing, as far as it says them.

    Raises:
        FormatError: it is unreadable, or names what is not there or outside the root.
    """
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
    files = {}
    for file in find_files(root, data):
        files[siblings(file, data.modalities)[0] if data.modalities else stem_of(file)] = file
    result = []
    for number, row in enumerate(rows, 1):
        stem = str(row[data.manifest_id])
        if stem not in files:
            raise FormatError(f"{path} row {number} names {stem!r}, no file of data.images={data.images!r}: correct it")
        result.append({**group_split_sizes(path, number, row), "image": files[stem]})
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or JSONL file, or of a JSON list of cases as MONAI and the Decathlon have it.

    Raises:
        FormatError: it is none of them, or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(text.splitlines(), strict=True))
        elif path.suffix.lower() == ".json":
            rows = _cases(path, json.loads(text))
        else:
            raise FormatError(f"{path} is neither .csv, .jsonl nor .json: write the manifest as one of them")
    except FileNotFoundError:
        raise FormatError(f"{path} is not there: check the path, or data.root") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise FormatError(f"{path} cannot be read as a manifest: give a CSV or JSONL file ({error})") from None
    wrong = next((row for row in rows if not isinstance(row, dict) or None in row), None)
    if wrong is not None:
        raise FormatError(f"{path} has the row {wrong!r} that does not fit its columns: give every row the same ones")
    return rows


def _cases(path: Path, content: Any) -> list[Any]:
    """Lists of cases under ``training``, ``validation`` and ``test``; training without validation is shared out."""
    known = {"training": "train", "validation": "val", "test": "test", "testing": "test"}
    found = {key: content[key] for key in known if isinstance(content, dict) and isinstance(content.get(key), list)}
    if not found:
        raise FormatError(f"{path} has no list 'training', 'validation' or 'test': give a list of cases, CSV or JSONL")
    rows: list[Any] = []
    for key, cases in found.items():
        open_split = key == "training" and "validation" not in found
        for case in cases:
            if isinstance(case, dict):
                rows.append({**case, "mask": case.get("label"), "split": None if open_split else known[key]})
            else:  # a name alone, as test images have it
                rows.append({"image": case, "mask": None, "split": known[key]})
    return rows


def group_split_sizes(path: Path, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of group, split, mpp and spacing, checked.

    Args:
        path: the manifest, for messages.
        number: of the row, from 1.
        row: its columns.

    Raises:
        FormatError: a value is not possible.
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
    given = row.get("image")
    texts = {"image": given if isinstance(given, list) else [given], "mask": [row.get("mask")]}
    files: dict[str, list[Path]] = {}
    for column, names in texts.items():
        files[column] = [inside(root, str(name), where) for name in names if name]
        for file, name in zip(files[column], names, strict=False):
            if not is_image(file):
                raise FormatError(f"{where} names {name!r}, which is not a file below {root}: correct it")
    if not files["image"]:
        raise FormatError(f"{where} has no image: name one, or remove the row")
    found = {"image": files["image"][0], "more": tuple(files["image"][1:])}
    return {**group_split_sizes(path, number, row), **found, **({"mask": files["mask"][0]} if files["mask"] else {})}
