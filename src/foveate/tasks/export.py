"""A painting as files: one writer for each format, tile by tile where the image is too large to hold."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.rings import Polygons, Tracer
from foveate.geometry.source import Box
from foveate.io.raster import Raster
from foveate.io.volume import Volume
from foveate.tasks.metrics import tiles
from foveate.tasks.outputs import HEATMAP, OVERLAY, PROBABILITY
from foveate.tasks.painting import Painting
from foveate.tasks.part import Part

TILE = 512
"""Side of the tiles of a mask's pyramid."""


def write_outputs(
    painting: Painting,
    part: Part,
    goals: Mapping[str, Path],
    native: Raster,
    names: Sequence[str],
    *,
    pyramids: bool,
    values: Sequence[int] | None = None,
) -> None:
    """Write every output into the part folder; what is there already is kept.

    Args:
        painting: What was predicted.
        part: Where files grow.
        goals: Final path by ending, see `targets`.
        native: The image as stored.
        names: Names of the classes, background first.
        pyramids: TIFFs are pyramids, written tile by tile.
        values: What NIfTI holds for every class; None: its number.
    """
    outlines = _Outlines(painting) if any(ending.startswith("geojson") for ending in goals) else None
    for ending in sorted(goals, key=lambda ending: ending.startswith("geojson")):  # outlines grow with the pyramid
        goal, path = goals[ending], part.path(goals[ending])
        if path.exists():
            continue
        if ending in (OVERLAY, HEATMAP):
            _write_view(painting, path, ending, native, names)
        elif ending == PROBABILITY:
            if pyramids:
                _write_chances(painting, part, goal, names)
            else:
                _write_chances_whole(painting, path, native)
        elif len(painting.shape) == 2 and (ending == "ome.tif" or (ending == "tif" and pyramids)):
            _write_pyramid(painting, part, goal, names if ending == "ome.tif" else None, outlines)
        elif outlines and ending.startswith("geojson"):
            _write_geojson(outlines, path, painting, names)
        else:
            _write_whole(painting, path, ending, native, values)


class _Outlines:
    """Traces the labels while a pyramid asks for them, and paints itself what no pyramid asked for."""

    def __init__(self, painting: Painting) -> None:
        self._painting = painting
        self._tracer = Tracer(painting.shape)
        self._boxes = tiles(painting.shape, TILE)

    def add(self, box: Box, labels: Any) -> None:
        """Takes the labels of a tile; those before it that were not seen are painted."""
        for earlier in self._boxes:
            self._tracer.add(earlier, labels if earlier == box else self._painting.tile(earlier))
            if earlier == box:
                return

    @cached_property
    def polygons(self) -> Polygons:
        """The outlines of the whole image."""
        for box in self._boxes:
            self._tracer.add(box, self._painting.tile(box))
        return self._tracer.finish()


def _write_pyramid(
    painting: Painting, part: Part, goal: Path, names: Sequence[str] | None, outlines: _Outlines | None
) -> None:
    """Labels as a pyramid; OME-TIFF, which says what they mean, where there are names."""
    from foveate.io.pyramid import write_pyramid

    def tile(box: Box) -> Any:
        labels = painting.tile(box)
        if outlines:
            outlines.add(box, labels)
        return labels if isinstance(labels, int) else labels[None]

    write_pyramid(
        part.path(goal),
        tile,
        shape=painting.shape,
        dtype=np.uint8,
        tile=TILE,
        spacing=painting.spacing,
        kind="tiff" if names is None else "ome",
        reduce="mode",
        description=None if names is None else ", ".join(f"{label} {name}" for label, name in enumerate(names)),
        spool=part.spool(goal),
    )


def _write_chances(painting: Painting, part: Part, goal: Path, names: Sequence[str]) -> None:
    """Probabilities as a pyramid of bytes, 255 standing for 1, tile by tile."""
    from foveate.io.pyramid import write_pyramid

    write_pyramid(
        part.path(goal),
        lambda box: np.rint(painting.probability(box) * 255).astype(np.uint8),
        shape=painting.shape,
        dtype=np.uint8,
        channels=painting.num_classes,
        spacing=painting.spacing,
        reduce="mean",
        rgb=False,
        names=names,
        spool=part.spool(goal),
    )


def _write_chances_whole(painting: Painting, path: Path, native: Raster) -> None:
    """Probabilities as float16; those of an image not compressed, for only then can tiles be written as they come."""
    shape = (painting.num_classes, *painting.shape)
    if isinstance(native, Volume):
        from foveate.io.write import write_probability

        held = np.empty(shape, np.float16)
        _fill(held, painting)
        write_probability(path, np.stack([native.to_native(chance) for chance in held]))
        return
    import tifffile

    axes = {"axes": "CYX" if len(shape) == 3 else "CZYX"}
    big, aside = 2 * math.prod(shape) > 2**31, path.with_name(f"aside-{path.name}")
    chances = tifffile.memmap(
        aside, shape=shape, dtype=np.float16, photometric="minisblack", metadata=axes, bigtiff=big
    )
    _fill(chances, painting)
    chances.flush()
    aside.replace(path)


def _fill(chances: NDArray[np.float16], painting: Painting) -> None:
    for box in tiles(painting.shape):
        chances[(slice(None), *map(slice, *box))] = painting.probability(box)


def _write_geojson(outlines: _Outlines, path: Path, painting: Painting, names: Sequence[str]) -> None:
    from foveate.io.geojson import write_geojson

    write_geojson(path, outlines.polygons, names, spacing=painting.spacing)


def _write_whole(painting: Painting, path: Path, ending: str, native: Raster, values: Sequence[int] | None) -> None:
    """Labels in the grid that the input stores."""
    if ending == "nii.gz":
        from foveate.io.write_volume import write_volume

        like = native if isinstance(native, Volume) else None
        labels = painting.labels.numpy()
        if values is not None:
            table = np.full(256, 255, np.uint16)
            table[: len(values)] = values
            labels = table[labels]
        write_volume(path, labels, like, spacing=None if like else painting.spacing)
    elif ending == "zarr":
        from foveate.io.ngff_write import write_labels_zarr

        if isinstance(native, Volume):
            write_labels_zarr(path, native.to_native(painting.labels.numpy()), spacing=native.grid.spacing)
        else:
            write_labels_zarr(path, painting.tile, shape=painting.shape, spacing=painting.spacing)
    else:
        from foveate.io.write import write_mask

        labels, spacing = painting.labels.numpy(), painting.spacing
        if isinstance(native, Volume):
            labels, spacing = native.to_native(labels), native.grid.spacing
        if ending == "ome.tif":
            _write_ome_volume(path, labels, spacing)
        else:
            write_mask(path, labels)


def _write_ome_volume(path: Path, labels: NDArray[np.uint8], spacing: tuple[float, ...] | None) -> None:
    import tifffile

    from foveate.io.write import atomic_write

    metadata: dict[str, Any] = {"axes": "ZYX"}
    for axis, size in zip("ZYX", spacing or (), strict=bool(spacing)):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "mm"}
    with atomic_write(path) as file:
        tifffile.imwrite(file, labels, ome=True, compression="zlib", photometric="minisblack", metadata=metadata)


def _write_view(painting: Painting, path: Path, ending: str, native: Raster, names: Sequence[str]) -> None:
    from foveate.tasks import views
    from foveate.tasks.figures import save_picture

    save_picture(path, views.overlay(native, painting) if ending == OVERLAY else views.heatmap(native, painting, names))
