"""What ``predict`` writes for an input, under which names, and which formats fit which kind of image."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from foveate.errors import ConfigError
from foveate.io.ngff import is_zarr
from foveate.io.raster import ArrayRaster, Raster
from foveate.tasks.items import stem_of
from foveate.tasks.source import is_large

IMAGE, SLIDE, STACK, VOLUME, ZARR = "image", "slide", "stack", "volume", "zarr volume"
"""An ordinary image; one too large to hold; planes of a TIFF or NPY; NIfTI or DICOM; a volume in zarr."""

PROBABILITY, OVERLAY, HEATMAP = "_probability.tif", "_overlay.png", "_heatmap.png"
"""Endings of what goes with a mask."""

_FIT = {
    IMAGE: ("png", "tif", "ome.tif", "geojson.gz", "geojson"),
    SLIDE: ("ome.tif", "tif", "geojson.gz", "geojson", "zarr"),
    STACK: ("tif", "ome.tif", "nii.gz", "zarr"),
    VOLUME: ("nii.gz", "tif", "ome.tif", "zarr"),
    ZARR: ("zarr", "ome.tif", "nii.gz", "tif"),
}
_DEFAULT = {
    IMAGE: ("png",),
    SLIDE: ("ome.tif", "geojson.gz"),
    STACK: ("tif",),
    VOLUME: ("nii.gz",),
    ZARR: ("zarr",),
}
FORMATS = tuple(dict.fromkeys(ending for endings in _FIT.values() for ending in endings))


def kind_of(raster: Raster) -> str:
    """Which kind of image a raster is."""
    held = isinstance(raster, ArrayRaster)
    if len(raster.shape) == 2:
        return IMAGE if held and not is_large(raster) else SLIDE
    from foveate.io.volume import Volume

    return VOLUME if isinstance(raster, Volume) else STACK if held else ZARR


def parse_formats(text: str | None) -> tuple[str, ...]:
    """``"ome.tif,geojson"`` as endings; none of them where nothing was asked for.

    Raises:
        ConfigError: One of them is not a format.
    """
    endings = tuple(dict.fromkeys(word.strip().lstrip(".").lower() for word in text.split(","))) if text else ()
    for ending in endings:
        if ending not in FORMATS:
            near = difflib.get_close_matches(ending, FORMATS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"format={ending!r} is unknown{hint} the formats are {', '.join(FORMATS)}")
    return endings


def fitting(formats: Sequence[str], kind: str, name: str) -> tuple[str, ...]:
    """The formats to write for an image of a kind: those asked for, or the kind's own.

    Args:
        formats: From `parse_formats`.
        kind: One of the kinds above.
        name: What to call the image in an error.

    Raises:
        ConfigError: A format cannot hold the mask of such an image.
    """
    for ending in formats:
        if ending not in _FIT[kind]:
            raise ConfigError(f"{name}: format={ending!r} does not fit a {kind}; choose among {', '.join(_FIT[kind])}")
    return tuple(formats) or _DEFAULT[kind]


def name_of(path: Path) -> str:
    """What the names of all outputs of an input begin with: its own without the ending, which a series has not."""
    return path.name if path.is_dir() and path.suffix.lower() != ".zarr" else stem_of(path)


def targets(file: Path, out: Path, endings: Sequence[str], extras: Sequence[str]) -> dict[str, Path]:
    """Everything that is written for a file, by ending: the masks, then the extras.

    Args:
        file: The input.
        out: Folder of the outputs.
        endings: Formats of the masks.
        extras: What goes with them.
    """
    name = name_of(file)
    return {end: out / f"{name}.{end}" for end in endings} | {extra: out / f"{name}{extra}" for extra in extras}


def refuse_own(file: Path, goals: Iterable[Path]) -> None:
    """Raise ConfigError when an output is the input itself."""
    if any(goal.resolve() == file.resolve() for goal in goals):
        raise ConfigError(f"{file} would be overwritten by its own mask; give another --out")


def refuse_kinds(goals: Iterable[Path]) -> None:
    """Raise ConfigError when a folder is where a file shall be, or what is no zarr where a zarr shall be."""
    for goal in goals:
        if goal.suffix == ".zarr" and goal.exists() and not (goal.is_dir() and is_zarr(goal)):
            raise ConfigError(f"{goal} is no zarr folder and is not replaced; move it, or give another --out")
        if goal.suffix != ".zarr" and goal.is_dir():
            raise ConfigError(f"{goal} is a folder and is not replaced; move it, or give another --out")


def refuse_existing(goals: Iterable[Path]) -> None:
    """Raise ConfigError when an output is there already."""
    there = next((goal for goal in goals if goal.exists()), None)
    if there is not None:
        raise ConfigError(f"{there} exists; add --overwrite to replace it, or give another --out")


def check_targets(
    files: Sequence[Path], out: Path, formats: Sequence[str], extras: Sequence[str], *, replace: bool
) -> None:
    """Refuse at the door what would end with one output on top of another, or of an input.

    Args:
        files: The inputs.
        out: Folder of the outputs.
        formats: From `parse_formats`; where there are none, any mask of the input's name counts.
        extras: As in `targets`.
        replace: Outputs that exist may be replaced, or were made before.

    Raises:
        ConfigError: Two inputs have one name, an input would be overwritten, an output exists, or ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, and masks go into a folder; give another --out")
    endings = formats or tuple(dict.fromkeys(ending for own in _DEFAULT.values() for ending in own))
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(name_of(file), file)
        if other != file:
            raise ConfigError(f"{other} and {file} would both be written to {out / name_of(file)}.*; separate them")
        goals = list(targets(file, out, endings, extras).values())
        if formats:
            refuse_own(file, goals)
            refuse_kinds(goals)
        if not replace:
            refuse_existing(goal for goal in goals if goal.resolve() != file.resolve())


def is_finished(file: Path, out: Path, formats: Sequence[str], extras: Sequence[str]) -> bool:
    """Say whether an input has all its outputs already; of formats that nobody chose, those of one kind."""
    kinds = [tuple(formats)] if formats else list(_DEFAULT.values())
    return any(all(goal.exists() for goal in targets(file, out, endings, extras).values()) for endings in kinds)


def missing(goals: Mapping[str, Path], endings: Sequence[str]) -> dict[str, Path]:
    """What to write when a prediction is resumed: where all masks are there, only what goes with them and is not.

    Args:
        goals: From `targets`.
        endings: Formats of the masks among them.
    """
    absent = {ending: goal for ending, goal in goals.items() if not goal.exists()}
    return dict(goals) if not absent or any(ending in absent for ending in endings) else absent
