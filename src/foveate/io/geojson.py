"""Polygons of classes as GeoJSON, the way QuPath writes and reads it.

In the file points are (x, y) in level-0 pixels, rings are closed, and a feature's class is
``properties.classification.name``.
"""

import gzip
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.image import Real
from foveate.geometry.rings import Polygons
from foveate.io.annotations import Annotations
from foveate.io.guard import DECODER_ERRORS, bad_file, one_line, undecodable
from foveate.io.masks import IGNORE
from foveate.io.write import atomic_write, label_palette

Array = NDArray[Any]

MAX_BYTES = 2**30  # of text, after gunzip
FARTHEST = 2.0**31  # pixels from the origin
UNCLASSIFIED = "unclassified"  # the name that features without a class go by
_IGNORE_NAME = "Ignore*"  # QuPath's own class for what shall not count


def write_geojson(
    path: str | Path,
    polygons: Polygons,
    names: Sequence[str],
    *,
    colours: Sequence[Sequence[int]] | None = None,
    measurements: Mapping[str, Sequence[Real]] | None = None,
    spacing: Sequence[Real] | None = None,
    object_type: Literal["annotation", "detection"] = "annotation",
    overwrite: bool = False,
) -> None:
    """Writes polygons as a FeatureCollection that QuPath imports as objects of named classes.

    Every polygon is one feature with its area as a measurement, in pixels and, where ``spacing`` is known, in µm². Its
    id is made of its content, so the same polygons give the same file. Label 255 is written as QuPath's ``Ignore*``
    unless it has a name.

    Args:
        path: ``.geojson`` or ``.geojson.gz``.
        polygons: Labelled polygons in level-0 pixels, (y, x).
        names: Name of each label, background first.
        colours: (red, green, blue) of each label, 0..255; the default is that of our masks.
        measurements: Further measurements by name, one value for each polygon.
        spacing: Size of a level-0 pixel in mm along y and x.
        object_type: What QuPath shall make of them: ``annotation``, or ``detection`` where there are very many.
        overwrite: True replaces an existing file.

    Raises:
        FormatError: another suffix, an existing file, or the path cannot be written.
        ShapeError: a label without a name or colour, or measurements of another number.

    Cost: one feature at a time; nothing is held but the polygons.
    """
    path = Path(path)
    if not path.name.lower().endswith((".geojson", ".geojson.gz")):
        raise bad_file(path, "is no name for GeoJSON; name it .geojson or .geojson.gz")
    extra = {name: np.asarray(values, np.float64) for name, values in (measurements or {}).items()}
    for name, values in extra.items():
        if values.shape != (len(polygons),):
            raise ShapeError(f"measurement {name!r} of shape {values.shape}; give one value for each polygon")
    classes = {int(label): _class(int(label), names, colours) for label in np.unique(polygons.labels)}
    columns = {"Area px^2": polygons.areas, **extra}
    if spacing is not None:
        columns["Area µm^2"] = columns["Area px^2"] * float(spacing[0]) * float(spacing[1]) * 1e6
    with atomic_write(path, overwrite=overwrite) as file:
        zipped = path.suffix.lower() == ".gz"
        with gzip.GzipFile("", "wb", 4, file, mtime=0) if zipped else nullcontext(file) as text:
            for piece in _pieces(polygons, classes, columns, object_type):
                text.write(piece)


def read_annotations(
    path: str | Path,
    classes: Mapping[str, int],
    shape: tuple[int, ...],
    *,
    unknown: str = "error",
    spacing: tuple[float, ...] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Annotations:
    """Reads annotations, such as QuPath exports, as a label raster that is painted where it is read.

    A FeatureCollection, a Feature, a list of them or a bare geometry, as text or gzip. Polygons and MultiPolygons are
    filled by the even-odd rule, each polygon for itself; later features cover earlier ones; z is ignored. Points and
    lines are left out, which ``notes`` of the result counts, as it does rings that cross themselves.

    Args:
        path: The file; told by its content.
        classes: Label 0..255 of each class name, see ``annotation_classes``. Names are compared exactly, then without
            regard to case. Features without a class are called ``unclassified``, and ``Ignore*`` is label 255 unless
            it is named here.
        shape: (H, W) of the image in level-0 pixels; what lies outside is cut off.
        unknown: What becomes of features whose class has no name here: ``error``, ``ignore`` (label 255) or
            ``background`` (left out, so that what lies under them is seen).
        spacing: Size of a level-0 pixel in mm along each axis, if known.
        max_bytes: Most bytes of text, after gunzip.

    Returns:
        The label raster; a file without features is all background.

    Raises:
        FormatError: no GeoJSON; too long; a ring of fewer than 3 points, or points that are no numbers, not finite or
            farther than 2^31; features of unknown class.
        ConfigError: ``unknown`` is none of the three.
        ShapeError: ``shape`` is not (H, W).
    """
    path = Path(path)
    if unknown not in ("error", "ignore", "background"):
        raise ConfigError(f"unknown={unknown!r} is none of 'error', 'ignore' and 'background'; give one of them")
    if len(shape) != 2 or min(shape) < 1:
        raise ShapeError(f"annotations on an image of shape {shape}; give (H, W)")
    features = _features(path, _parsed(path, _text(path, max_bytes)))
    labels, lost = _labels(features, classes)
    if lost and unknown == "error":
        raise bad_file(
            path,
            f"holds classes of no name: {_counted(lost)}; classes are {', '.join(classes)}: name these, "
            "or set unknown to ignore or background",
        )
    drawn = [label if label >= 0 else IGNORE for label in labels]
    kept = [at for at, label in enumerate(labels) if label >= 0 or unknown == "ignore"]
    polygons = Polygons.of((drawn[at], rings) for at in kept for rings in features[at].geometry.polygons)
    return Annotations(polygons, tuple(shape), spacing, tuple(_notes(polygons, shape, features, lost, unknown)))


def read_marks(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Polygons:
    """Reads places marked in an image, whatever their classes, such as a QuPath export of points or outlines.

    Every point (of a MultiPoint each) and every polygon (of a MultiPolygon each) is one mark. Lines, and features of
    QuPath's class ``Ignore*``, are none.

    Args:
        path: GeoJSON as `read_annotations` takes it.
        max_bytes: Most bytes of text, after gunzip.

    Returns:
        The marks in their order, a point as a polygon of one point; none of them where the file has no features.

    Raises:
        FormatError: no GeoJSON; too long; coordinates as in `read_annotations`.
    """
    path = Path(path)
    geometries = [
        feature.geometry
        for feature in _features(path, _parsed(path, _text(path, max_bytes)))
        if feature.name.casefold() != _IGNORE_NAME.casefold()
    ]
    places = (place for one in geometries for place in (*one.polygons, *([point] for point in one.points)))
    return Polygons.of((1, rings) for rings in places)


def annotation_classes(classes: Mapping[str, Any]) -> dict[str, int]:
    """Label of each name that an annotation may carry, for classes declared as for ``ClassTable``.

    A class goes by its own name, and by its rule or rules where these are text: ``{"tumour": ["Tumor", "Tumor 2"]}``.

    Args:
        classes: Rule of each class name, background first or left out; ``ignore`` is label 255.
    """
    labels = {"background": 0, "ignore": IGNORE}
    labels |= {name: label for label, name in enumerate((name for name in classes if name not in labels), 1)}
    rules = ((name, rule if isinstance(rule, list | tuple) else (rule,)) for name, rule in classes.items())
    return {str(one): labels[name] for name, several in rules for one in several if isinstance(one, str)} | labels


def _class(label: int, names: Sequence[str], colours: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """QuPath's record of a class."""
    if label >= len(names) and label != IGNORE:
        raise ShapeError(f"polygons of label {label}, but only {len(names)} names; name every label, background first")
    name = names[label] if label < len(names) else _IGNORE_NAME
    if colours is None or (label == IGNORE and label >= len(colours)):
        return {"name": name, "color": list(label_palette()[3 * label : 3 * label + 3])}
    if label >= len(colours):
        raise ShapeError(f"polygons of label {label}, but only {len(colours)} colours; give one for every label")
    return {"name": name, "color": [int(value) for value in colours[label]]}


def _pieces(
    polygons: Polygons, classes: Mapping[int, dict[str, Any]], columns: Mapping[str, Array], object_type: str
) -> Iterator[bytes]:
    """The text of a file, feature by feature."""
    yield b'{"type":"FeatureCollection","features":['
    for index, (label, rings) in enumerate(polygons):
        digest = hashlib.sha1(repr((index, label)).encode(), usedforsecurity=False)
        for ring in rings:
            digest.update(np.ascontiguousarray(ring).data)
        values = {name: column[index].item() for name, column in columns.items()}
        properties = {
            "objectType": object_type,
            "classification": classes[label],
            "isLocked": False,
            "measurements": {name: value for name, value in values.items() if np.isfinite(value)},
        }
        yield (
            f'{"," * bool(index)}\n{{"type":"Feature","id":"{uuid.UUID(bytes=digest.digest()[:16], version=5)}",'
            f'"geometry":{{"type":"Polygon","coordinates":[{",".join(map(_closed, rings))}]}},'
            f'"properties":{json.dumps(properties, separators=(",", ":"))}}}'
        ).encode()
    yield b"\n]}\n"


def _closed(ring: Array) -> str:
    """Points (x, y) as text, the first one again at the end; many times faster than by way of nested lists."""
    flat = np.concatenate([ring, ring[:1]])[:, ::-1].ravel().tolist()
    return f"[{('[%r,%r],' * (len(ring) + 1))[:-1] % tuple(flat)}]"


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Polygons of a geometry, how many other shapes it has, what is wrong with it, and its points ``[1, 2]``."""

    polygons: list[list[Array]]
    others: int = 0
    wrong: str = ""
    points: tuple[Array, ...] = ()


@dataclass(frozen=True, slots=True)
class _Feature:
    """The class of a feature and its geometry."""

    name: str
    geometry: _Geometry


def _text(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file, inflated if they are gzip, no more than allowed."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if zipped else nullcontext(file) as text:
                data = text.read(max_bytes + 1)
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.strerror:
            raise bad_file(path, f"cannot be read ({error.strerror}); check the path") from None
        raise undecodable(path, "gzip", error) from None
    if len(data) > max_bytes:
        raise bad_file(path, f"holds more than {max_bytes} bytes of text; split it, or allow more (max_bytes=)")
    return data


def _parsed(path: Path, text: bytes) -> Any:
    """The JSON value, in which geometries and features are arrays already: lists of points would fill the memory."""
    try:
        return json.loads(text, object_hook=_compact)
    except RecursionError:
        raise bad_file(path, "is nested too deep to be GeoJSON; fetch or export the file again") from None
    except DECODER_ERRORS as error:
        raise undecodable(path, "JSON", error) from None


def _compact(record: dict[str, Any]) -> Any:
    """A geometry or a feature of the file as ours; other records as they are."""
    kind = record.get("type")
    if kind in ("Polygon", "MultiPolygon") and "coordinates" in record:
        return _polygons(record["coordinates"], kind == "MultiPolygon")
    if kind in ("Point", "MultiPoint") and "coordinates" in record:
        return _points(record["coordinates"], kind == "MultiPoint")
    if kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        return _Geometry([], 1)
    if kind == "GeometryCollection":
        parts = [part for part in record.get("geometries") or () if isinstance(part, _Geometry)]
        wrong = "".join([part.wrong for part in parts if part.wrong][:1])
        points = tuple(point for part in parts for point in part.points)
        polygons = [one for part in parts for one in part.polygons]
        return _Geometry(polygons, sum(part.others for part in parts), wrong, points)
    if kind == "Feature":
        geometry = record.get("geometry")
        if not isinstance(geometry, _Geometry):
            geometry = _Geometry([], 1, "" if geometry is None else "a geometry of no kind that GeoJSON knows")
        return _Feature(_class_name(record.get("properties")), geometry)
    return record


def _class_name(properties: Any) -> str:
    """The class of a feature, with QuPath's colon between the names of a derived class."""
    given = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(given, dict):
        several = given.get("names")
        given = ": ".join(map(str, several)) if isinstance(several, list) else given.get("name")
    return UNCLASSIFIED if given is None or given == "" else str(given)


def _polygons(coordinates: Any, several: bool) -> _Geometry:
    """The rings of a Polygon or a MultiPolygon, or what is wrong with them."""
    try:
        polygons = [[_ring(ring) for ring in rings] for rings in (coordinates if several else [coordinates]) if rings]
    except _Wrong as wrong:
        return _Geometry([], 0, str(wrong))
    except DECODER_ERRORS:
        return _Geometry([], 0, "coordinates that are not lists of numbers")
    return _Geometry(polygons, int(not polygons))


def _points(coordinates: Any, several: bool) -> _Geometry:
    """The points of a Point or a MultiPoint, which have no area, or what is wrong with them."""
    try:
        given = [point for point in (coordinates if several else [coordinates]) if point]
        points = _pairs(given)[:, 1::-1] if given else np.empty((0, 2))
    except _Wrong as wrong:
        return _Geometry([], 1, str(wrong))
    except DECODER_ERRORS:
        return _Geometry([], 1, "coordinates that are not lists of numbers")
    return _Geometry([], 1, "", tuple(points[:, None]))


class _Wrong(Exception):
    """What is wrong with a ring or a point."""


def _pairs(given: Any) -> Array:
    """Points (x, y[, z]) as numbers."""
    try:
        points = np.array(given, np.float64)
    except ValueError:  # points of two numbers and of three
        points = np.array([point[:2] for point in given], np.float64)
    if points.ndim != 2 or points.shape[1] < 2:
        raise _Wrong("a ring without points" if not points.size else "points that are no pairs of numbers")
    if not (np.abs(points) <= FARTHEST).all():
        raise _Wrong("coordinates that are not finite, or farther than 2^31 pixels")
    return points


def _ring(given: Any) -> Array:
    """Points (y, x) of a ring, not closed."""
    points = _pairs(given)
    if len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    if len(points) < 3:
        raise _Wrong(f"a ring of {len(points)} points, which encloses nothing")
    return points[:, 1::-1]


def _features(path: Path, root: Any) -> list[_Feature]:
    """All features of the file in their order."""
    members = root.get("features") if isinstance(root, dict) and root.get("type") == "FeatureCollection" else root
    members = members if isinstance(members, list) else [members]
    features = [_Feature(UNCLASSIFIED, one) if isinstance(one, _Geometry) else one for one in members]
    for number, feature in enumerate(features, 1):
        if not isinstance(feature, _Feature):
            raise bad_file(path, "is JSON, but no GeoJSON of features; export annotations as GeoJSON")
        if feature.geometry.wrong:
            name = one_line(feature.name)[:80]
            raise bad_file(path, f"feature {number} ({name}) has {feature.geometry.wrong}; mend or delete it")
    return features


def _labels(features: Sequence[_Feature], classes: Mapping[str, int]) -> tuple[list[int], Counter[str]]:
    """Label of each feature, -1 where its class is unknown, and how often each unknown class comes."""
    known = {_IGNORE_NAME.casefold(): IGNORE} | {name.casefold(): label for name, label in classes.items()}
    labels = [classes.get(feature.name, known.get(feature.name.casefold(), -1)) for feature in features]
    return labels, Counter(feature.name for feature, label in zip(features, labels, strict=True) if label < 0)


def _notes(
    polygons: Polygons, shape: Sequence[int], features: Sequence[_Feature], lost: Counter[str], unknown: str
) -> Iterator[str]:
    """What the user should know, one line each."""
    if lost:
        become = "count as ignore" if unknown == "ignore" else "are left out"
        yield f"features of classes without a name {become}: {_counted(lost)}"
    if others := sum(feature.geometry.others for feature in features):
        yield f"{others} geometries without an area (points, lines, empty ones) are left out"
    if crossed := polygons.num_crossed:
        yield f"{crossed} rings cross themselves and are filled by the even-odd rule"
    low, high = polygons.boxes[:, :2], polygons.boxes[:, 2:]
    if outside := int(((low >= shape) | (high <= 0)).any(1).sum()):
        yield f"{outside} polygons lie outside the image of {' x '.join(map(str, shape))} pixels"


def _counted(lost: Counter[str]) -> str:
    shown = ", ".join(f"{one_line(name)[:80]!r} ({count} features)" for name, count in lost.most_common(5))
    return shown + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
