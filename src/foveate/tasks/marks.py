"""Needle recall: how much of the evidence, where somebody marked it, lies in the patches that were chosen.

A mark is held by a patch when the centre of one lies in the other: a small mark by the patch (of a grid exactly one)
in which its centre lies, a large outline also by every patch whose centre lies in it. Touching is not enough, for then
a patch that shows one pixel of it would do; covering is not asked for, for then no patch could hold a large outline.

Legend: N patches, G marks, K chosen patches, V points of a ring, M places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.geometry.patch_source import PatchSource
from foveate.geometry.rings import Polygons
from foveate.io.geojson import read_marks
from foveate.io.guard import bad_file
from foveate.tasks.recognition_settings import TableConfig
from foveate.tasks.source import open_native
from foveate.tasks.table import Row

RECALL, CEILING = "needle_recall", "needle_recall_ceiling"

_BESIDE = (2.0**-30, 2.0**-20)  # down and right, less than outlines are drawn to


@dataclass(frozen=True, eq=False)
class Marks:
    """Places of an image that somebody marked, and the file that says so."""

    path: Path
    places: Polygons


def marks_of(row: Row) -> Marks | None:
    """The marks of a row; None where it has none.

    Args:
        row: of the table.

    Raises:
        FormatError: the file is no GeoJSON.
    """
    places = None if row.marks is None else read_marks(row.marks)
    return Marks(row.marks, places) if row.marks is not None and places is not None and len(places) else None


def needle_recall(
    marks: Marks | None, index: Int64[Tensor, " K"], source: PatchSource, row: Row, data: TableConfig
) -> dict[str, float]:
    """Share of the marks that chosen patches hold, and what share the best choice of as many patches could hold.

    The ceiling adds up what the K patches with the most marks hold: exact where no mark is held by two patches, as on a
    grid with marks smaller than a patch, and never too low.

    Args:
        marks: of the image, in level-0 pixels of its file.
        index: chosen patches.
        source: the bag that they were chosen from.
        row: the image's.
        data: the settings.

    Returns:
        ``needle_recall`` and ``needle_recall_ceiling``; nothing where there are no marks, or nobody knows where the
        patches lie.

    Raises:
        FormatError: a mark has its centre outside the image.

    Cost: O(N G), and the header of the image once more where ``data.mpp`` is set.
    """
    if marks is None or source.boxes is None or source.shape is None or len(source.shape) != 2:
        return {}
    shape: tuple[int, ...] = source.shape
    if data.mpp is not None and data.features is None:  # boxes of stored features are level-0 pixels already
        shape = tuple(open_native(row.item, data.pixels).shape)
    bounds = marks.places.boxes.reshape(-1, 2, 2)
    centre = bounds.mean(1)
    outside = ((centre < 0) | (centre >= np.array(shape))).any(1)
    if outside.any():
        first = int(outside.argmax())
        y, x = centre[first]
        sides = " x ".join(map(str, shape))
        raise bad_file(
            marks.path,
            f"mark {first + 1} has its centre at y={y:g}, x={x:g}, outside the image of {sides} pixels; give places in "
            "level-0 pixels",
        )
    boxes = source.boxes.numpy() * (np.array(shape) / np.array(source.shape))
    holders = [held_by(marks.places.rings(place), middle, boxes) for place, middle in enumerate(centre)]
    chosen = np.zeros(len(boxes), bool)
    chosen[index.cpu().numpy()] = True
    most = np.sort(np.bincount(np.concatenate(holders), minlength=len(boxes)))[::-1][: len(index)].sum()
    reachable = sum(len(one) > 0 for one in holders)
    return {
        RECALL: sum(bool(chosen[one].any()) for one in holders) / len(holders),
        CEILING: min(reachable, int(most)) / len(holders),
    }


def held_by(
    rings: Sequence[Shaped[np.ndarray, "V 2"]], centre: Float64[np.ndarray, "2"], boxes: Float64[np.ndarray, "N 2 2"]
) -> Int64[np.ndarray, " _"]:
    """The patches that hold a mark.

    Args:
        rings: of the mark, (y, x); of a point that alone.
        centre: of the mark's bounds.
        boxes: of the patches, in the same pixels.
    """
    held: NDArray[np.bool_] = np.all((boxes[:, 0] <= centre) & (centre < boxes[:, 1]), axis=1)
    middle = boxes.mean(1)
    near = np.flatnonzero(((rings[0].min(0) <= middle) & (middle <= rings[0].max(0))).all(1) & ~held)
    held[near] = inside(rings, middle[near])
    return np.flatnonzero(held)


def inside(rings: Sequence[Shaped[np.ndarray, "V 2"]], places: Float64[np.ndarray, "M 2"]) -> Bool[np.ndarray, " M"]:
    """Whether places lie in a polygon, by the even-odd rule over all its rings.

    Args:
        rings: of the polygon, (y, x).
        places: (y, x); one on an edge belongs to what lies right of the edge, or below it.
    """
    from matplotlib.path import Path as Outline  # which leaves open where its edges belong

    beside = places + _BESIDE
    odd: NDArray[np.bool_] = np.logical_xor.reduce([Outline(ring).contains_points(beside) for ring in rings])
    return odd
