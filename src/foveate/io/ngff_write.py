"""Labels as an OME-NGFF 0.5 pyramid (zarr v3), written block by block into a folder aside, which is then renamed."""

import itertools
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import ShapeError
from foveate.geometry.source import Box
from foveate.io.guard import bad_file
from foveate.io.pyramid_tiles import most_frequent
from foveate.io.write import unwritable

Array = NDArray[Any]
Blocks = Callable[[Box], Any]

_CHUNK = {2: 512, 3: 64}


def write_labels_zarr(
    path: str | Path,
    labels: Any,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: Any = None,
    chunk: int | tuple[int, ...] | None = None,
    spacing: tuple[float, ...] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes labels as an OME-NGFF 0.5 image of labels with levels by 2, each the most frequent label of the one below.

    An axis whose pixels are twice as long in mm as the shortest is not halved until the others have caught up.

    Args:
        path: Folder to make, such as ``labels.zarr``.
        labels: ``[H, W]`` or ``[D, H, W]`` integers; or what gives them: called with the box of each chunk, in raster
            order, it returns an array of that shape, or one number where all are equal.
        shape: Spatial shape, where ``labels`` is called.
        dtype: Integer type; that of the array, or uint8.
        chunk: Side or sides of a chunk; 512 in 2-D and 64 in 3-D.
        spacing: Size of a pixel in mm along each axis; without it none is stated.
        overwrite: True replaces an existing folder.

    Returns:
        The path.

    Raises:
        FormatError: the path exists, the disk is full, or the path cannot be written.
        ShapeError: labels, shape, chunk or spacing do not fit each other.

    Cost:
        Memory of ``2^N`` chunks; chunks that are all 0 take no space.
    """
    path = Path(path)
    blocks, shape, kind = _blocks(labels, shape, dtype)
    sides = (chunk or _CHUNK[len(shape)],) * len(shape) if not isinstance(chunk, tuple) else chunk
    if len(sides) != len(shape) or min(sides) < 1:
        raise ShapeError(f"chunk {chunk} for {len(shape)} axes; give one side of at least 1 for each")
    if spacing is not None and (len(spacing) != len(shape) or not all(0 < size < np.inf for size in spacing)):
        raise ShapeError(f"spacing {spacing} for {len(shape)} axes; give one size in mm above 0 for each")
    factors = _factors(shape, sides, spacing)
    with _folder_aside(path, overwrite) as aside:
        with _writing(path):
            group = _group(aside, path.stem, factors, spacing, len(shape))
        fine = None
        for number, factor in enumerate(factors):
            level = tuple(-(-side // step) for side, step in zip(shape, factor, strict=True))
            with _writing(path):
                names = list("zyx"[-len(shape) :])
                array = group.create_array(
                    str(number), shape=level, dtype=kind, chunks=sides, fill_value=0, dimension_names=names
                )
            if fine is not None:
                step = tuple(a // b for a, b in zip(factor, factors[number - 1], strict=True))
                blocks = _coarser(fine, step)
            _fill(path, array, blocks, sides)
            fine = array
    return path


def _blocks(labels: Any, shape: tuple[int, ...] | None, dtype: Any) -> tuple[Blocks, tuple[int, ...], np.dtype[Any]]:
    """What gives the labels of a box, their shape and their type."""
    if callable(labels):
        if shape is None:
            raise ShapeError("labels that are called have no shape; give shape=")
        blocks, kind = labels, np.dtype(dtype or np.uint8)
    else:
        array = np.asarray(labels)
        array = array.view(np.uint8) if array.dtype.kind == "b" else array
        if shape not in (None, array.shape):
            raise ShapeError(f"labels of shape {array.shape}, but shape={shape}; leave shape= out")
        shape, kind = array.shape, np.dtype(dtype or array.dtype)

        def blocks(box: Box) -> Any:
            return array[tuple(slice(low, high) for low, high in zip(*box, strict=True))]

    if len(shape) not in _CHUNK or min(shape) < 1 or kind.kind not in "iu":
        raise ShapeError(f"labels of shape {shape} and dtype {kind}; give [H, W] or [D, H, W] integers")
    return blocks, shape, kind


def _fill(path: Path, array: Any, blocks: Blocks, sides: tuple[int, ...]) -> None:
    """Writes every chunk of a level, in raster order."""
    kind = np.iinfo(array.dtype)
    for start in itertools.product(*(range(0, side, step) for side, step in zip(array.shape, sides, strict=True))):
        stop = tuple(min(low + step, side) for low, step, side in zip(start, sides, array.shape, strict=True))
        block = np.asarray(blocks((start, stop)))
        want = tuple(high - low for low, high in zip(start, stop, strict=True))
        if block.shape not in ((), want) or block.dtype.kind not in "iub":
            raise ShapeError(f"block {block.dtype} {block.shape} for the box {start} to {stop}; give integers {want}")
        low, high = int(block.min()), int(block.max())
        if low < kind.min or high > kind.max:
            raise ShapeError(f"labels from {low} to {high}; {array.dtype} holds {kind.min} to {kind.max}, give dtype=")
        if low or high:  # what is not written is 0
            with _writing(path):
                array[tuple(map(slice, start, stop))] = block.astype(array.dtype)


def _factors(
    shape: tuple[int, ...], sides: tuple[int, ...], spacing: tuple[float, ...] | None
) -> list[tuple[int, ...]]:
    """Level-0 pixels per pixel of each level, until one chunk holds the level."""
    factors = [(1,) * len(shape)]
    while any(-(-side // step) > most for side, step, most in zip(shape, factors[-1], sides, strict=True)):
        size = [step * length for step, length in zip(factors[-1], spacing or (1.0,) * len(shape), strict=True)]
        left = [-(-side // step) for side, step in zip(shape, factors[-1], strict=True)]
        shortest = min(length for length, side in zip(size, left, strict=True) if side > 1)
        factors.append(
            tuple(
                step * 2 if side > 1 and length < 2 * shortest else step
                for step, side, length in zip(factors[-1], left, size, strict=True)
            )
        )
    return factors


def _coarser(fine: Any, step: tuple[int, ...]) -> Blocks:
    """What gives the labels of a box of the level above ``fine``."""

    def blocks(box: Box) -> Array:
        start, stop = (tuple(side * by for side, by in zip(sides, step, strict=True)) for sides in box)
        part = np.asarray(fine[tuple(map(slice, start, stop))])
        short = [high - low - have for low, high, have in zip(start, stop, part.shape, strict=True)]
        part = np.pad(part, [(0, count) for count in short], mode="edge")
        corners = itertools.product(*map(range, step))
        return most_frequent([part[tuple(map(slice, corner, part.shape, step))] for corner in corners])

    return blocks


def _group(aside: Path, name: str, factors: list[tuple[int, ...]], spacing: tuple[float, ...] | None, axes: int) -> Any:
    """The zarr group with its OME metadata; a pixel's place is its centre, as OME has it."""
    import zarr

    size = spacing or (1.0,) * axes
    unit = {} if spacing is None else {"unit": "millimeter"}
    datasets = [
        {
            "path": str(number),
            "coordinateTransformations": [
                {"type": "scale", "scale": [step * length for step, length in zip(factor, size, strict=True)]},
                {
                    "type": "translation",
                    "translation": [(step - 1) / 2 * length for step, length in zip(factor, size, strict=True)],
                },
            ],
        }
        for number, factor in enumerate(factors)
    ]
    scale = {
        "name": name,
        "type": "most frequent",
        "axes": [{"name": letter, "type": "space", **unit} for letter in "zyx"[-axes:]],
        "datasets": datasets,
    }
    ome = {"version": "0.5", "multiscales": [scale], "image-label": {}}
    return zarr.open_group(str(aside), mode="w", zarr_format=3, attributes={"ome": ome})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


@contextmanager
def _folder_aside(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the place of ``path`` when the block ends well, and is removed otherwise."""
    _refuse(path, overwrite)
    aside = path.with_name(f".foveate-{secrets.token_hex(6)}{path.suffix[:16]}")
    with _writing(path):
        aside.mkdir()
    try:
        yield aside
        _refuse(path, overwrite)
        old = aside.with_name(aside.name + ".old")
        with _writing(path):
            if path.exists():
                path.rename(old)
            aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise bad_file(path, "is a file; give the name of a folder, such as labels.zarr")
    if not overwrite and path.exists():
        raise bad_file(path, "exists already; choose another name, or allow it with --overwrite (overwrite=True)")
    if path.exists() and not any((path / mark).is_file() for mark in ("zarr.json", ".zgroup", ".zarray")):
        raise bad_file(path, "is a folder and no zarr, so it is not replaced; choose another name")
