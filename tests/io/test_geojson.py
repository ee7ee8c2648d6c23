"""Outlines into GeoJSON and annotations out of it: QuPath's conventions, round trips, and files that lie."""

import gzip
import json
import pickle
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from foveate.errors import ConfigError, FormatError, ShapeError
from foveate.geometry.rings import Polygons, trace
from foveate.io.geojson import annotation_classes, read_annotations, read_marks, write_geojson
from foveate.io.raster import Raster

CLASSES = {"Tumor": 1, "Stroma": 2}


@pytest.fixture
def labels():
    image = np.zeros((40, 70), np.uint8)
    image[5:30, 10:50] = 1
    image[10:20, 20:30] = 2
    image[12:14, 22:24] = 0
    image[30:33, 50:60] = 2
    return image


def traced(labels) -> Polygons:
    return trace(lambda box: labels[box[0][0] : box[1][0], box[0][1] : box[1][1]], labels.shape, tile=16)


def square(y: float, x: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def polygon(*rings) -> dict:
    return {"type": "Polygon", "coordinates": list(rings)}


def feature(geometry, name: str | None = "Tumor", **classification) -> dict:
    given = {"classification": {"name": name, **classification}} if name is not None else {}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation", **given}}


def save(folder: Path, value, name: str = "slide.geojson") -> Path:
    path = folder / name
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def collection(*features) -> dict:
    return {"type": "FeatureCollection", "features": list(features)}


def painted(path: Path, shape=(20, 30), classes=CLASSES, **options):
    return read_annotations(path, classes, shape, **options).read(((0, 0), shape))[0]


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_what_is_written_reads_back_the_same(tmp_path: Path, labels, name: str) -> None:
    write_geojson(tmp_path / name, traced(labels), ("background", "Tumor", "Stroma"))
    np.testing.assert_array_equal(painted(tmp_path / name, labels.shape), labels)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_writes_what_qupath_reads(tmp_path: Path, labels) -> None:
    polygons = traced(labels)
    score = {"Score": [0.5, np.nan, 1.0]}
    options = {"colours": [(0, 0, 0), (200, 0, 0), (150, 200, 150)], "measurements": score, "spacing": (0.001, 0.0005)}
    write_geojson(tmp_path / "a.geojson", polygons, ("background", "Tumor", "Stroma"), **options)
    found = json.loads((tmp_path / "a.geojson").read_text())
    assert found["type"] == "FeatureCollection"
    first, second, third = found["features"]
    assert first["geometry"]["type"] == "Polygon"
    assert first["geometry"]["coordinates"][0] == [[10, 5], [50, 5], [50, 30], [10, 30], [10, 5]], "x, y; closed"
    assert first["geometry"]["coordinates"][1][0] == first["geometry"]["coordinates"][1][-1] == [20, 10]
    assert first["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "isLocked": False,
        "measurements": {"Area px^2": 900.0, "Area µm^2": pytest.approx(450), "Score": 0.5},
    }
    assert "Score" not in second["properties"]["measurements"]
    assert third["properties"]["classification"] == {"name": "Stroma", "color": [150, 200, 150]}
    ids = [uuid.UUID(one["id"]) for one in found["features"]]
    assert len(set(ids)) == 3
    assert all(one.version == 5 for one in ids)
    for name in ("b.geojson.gz", "c.geojson.gz"):
        write_geojson(tmp_path / name, polygons, ("", "Tumor", "Stroma"), object_type="detection")
    assert (tmp_path / "b.geojson.gz").read_bytes() == (tmp_path / "c.geojson.gz").read_bytes()
    again = json.loads(gzip.decompress((tmp_path / "b.geojson.gz").read_bytes()))["features"]
    assert [uuid.UUID(one["id"]) for one in again] == ids
    assert {one["properties"]["objectType"] for one in again} == {"detection"}


def test_ignored_pixels_go_by_the_name_that_qupath_ignores(tmp_path: Path) -> None:
    labels = np.array([[255, 1], [0, 0]], np.uint8)
    write_geojson(tmp_path / "a.geojson", traced(labels), ("background", "Tumor"), colours=[(0, 0, 0), (9, 9, 9)])
    found = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert found[1]["properties"]["classification"] == {"name": "Ignore*", "color": [255, 255, 255]}
    np.testing.assert_array_equal(painted(tmp_path / "a.geojson", (2, 2)), labels)


def test_nothing_to_write_is_background(tmp_path: Path) -> None:
    write_geojson(tmp_path / "a.geojson", traced(np.zeros((3, 3), np.uint8)), ("background",), spacing=(1, 1))
    assert json.loads((tmp_path / "a.geojson").read_text()) == collection()
    assert not painted(tmp_path / "a.geojson").any()


def test_refuses_to_write(tmp_path: Path, labels) -> None:
    polygons, names = traced(labels), ("background", "Tumor", "Stroma")
    with pytest.raises(FormatError, match=r"name it .geojson or .geojson.gz"):
        write_geojson(tmp_path / "a.json", polygons, names)
    with pytest.raises(ShapeError, match="polygons of label 2, but only 2 names; name every label, background first"):
        write_geojson(tmp_path / "a.geojson", polygons, names[:2])
    with pytest.raises(ShapeError, match="polygons of label 2, but only 2 colours; give one for every label"):
        write_geojson(tmp_path / "a.geojson", polygons, names, colours=[(0, 0, 0)] * 2)
    with pytest.raises(ShapeError, match=r"measurement 'a' of shape \(1,\); give one value for each polygon"):
        write_geojson(tmp_path / "a.geojson", polygons, names, measurements={"a": [1]})
    (tmp_path / "a.geojson").write_text("precious")
    with pytest.raises(FormatError, match="exists already"):
        write_geojson(tmp_path / "a.geojson", polygons, names)
    assert (tmp_path / "a.geojson").read_text() == "precious"
    write_geojson(tmp_path / "a.geojson", polygons, names, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.geojson"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, labels, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveate.io.geojson._closed", full)
    with pytest.raises(FormatError, match=r"No space left on device.*free some space"):
        write_geojson(tmp_path / "a.geojson.gz", traced(labels), ("background", "Tumor", "Stroma"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.geojson", "a.json.gz", "a.txt"])
@pytest.mark.parametrize("wrap", ["collection", "list", "feature", "geometry", "parts"])
def test_reads_every_wrapping(tmp_path: Path, name: str, wrap: str) -> None:
    geometry = polygon(square(2, 3, 10), square(4, 5, 2))
    one = feature(geometry)
    parts = {"type": "GeometryCollection", "geometries": [geometry, {"type": "Point", "coordinates": [1, 2]}]}
    roots = {"collection": collection(one), "list": [one], "feature": one, "geometry": geometry, "parts": parts}
    expected = np.zeros((20, 30), np.uint8)
    expected[2:12, 3:13], expected[4:6, 5:7] = 1, 0
    path = save(tmp_path, roots[wrap], name)
    np.testing.assert_array_equal(painted(path, classes={**CLASSES, "unclassified": 1}), expected)


@pytest.mark.parametrize(
    "classification",
    [{"name": "Tumor", "colorRGB": -3670016}, {"name": "TUMOR", "color": [200, 0, 0]}, {"names": ["Tumor"]}, "tumor"],
)
def test_reads_classes_of_every_version(tmp_path: Path, classification) -> None:
    one = feature(polygon(square(2, 3, 10)))
    one["properties"]["classification"] = classification
    assert painted(save(tmp_path, collection(one))).sum() == 100


def test_exact_names_come_before_names_without_case(tmp_path: Path) -> None:
    path = save(tmp_path, collection(feature(polygon(square(0, 0, 2)), "a"), feature(polygon(square(0, 5, 2)), "A")))
    found = painted(path, classes={"a": 1, "A": 2})
    assert (found[0, 0], found[0, 5]) == (1, 2)


def test_derived_classes_are_named_whole(tmp_path: Path) -> None:
    one = feature(polygon(square(0, 0, 2)), names=["Tumor", "Positive"])
    assert painted(save(tmp_path, one), classes={"Tumor: Positive": 7})[0, 0] == 7


def test_later_features_cover_earlier_ones_and_each_polygon_is_filled_for_itself(tmp_path: Path) -> None:
    several = {"type": "MultiPolygon", "coordinates": [[square(0, 0, 6)], [square(4, 4, 6), square(6, 6, 2)]]}
    path = save(tmp_path, collection(feature(several), feature(polygon(square(8, 8, 8)), "Stroma")))
    found = painted(path)
    assert (found[5, 5], found[7, 7], found[9, 9], found[15, 15], found[16, 16]) == (1, 0, 2, 2, 0)


def test_z_open_rings_and_points_beside_pixels_do_no_harm(tmp_path: Path) -> None:
    ring = [[3.25, 2.5, 0], [13.25, 2.5], [13.25, 12.5, 7, 8], [3.25, 12.5]]
    expected = np.zeros((20, 30), np.uint8)
    expected[2:12, 3:13] = 1
    np.testing.assert_array_equal(painted(save(tmp_path, feature(polygon(ring)))), expected)


@given(st.integers(0, 2**32 - 1))
def test_agrees_with_another_point_in_polygon(tmp_path_factory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
    ring = np.stack([15 + rng.uniform(4, 14, 12) * np.cos(angle), 10 + rng.uniform(4, 9, 12) * np.sin(angle)], 1)
    y, x = np.mgrid[:20, :30] + 0.5
    expected = Outline([*ring, ring[0]]).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(20, 30)
    path = save(tmp_path_factory.mktemp("star"), feature(polygon(ring.tolist())))
    np.testing.assert_array_equal(painted(path), expected)


def test_is_a_lazy_raster_of_exact_levels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (87, 111)), np.ones((25, 17), int)).astype(np.uint8)[:2173, :1875]
    write_geojson(tmp_path / "a.geojson", traced(labels), ("background", "Tumor", "Stroma"))
    raster = pickle.loads(pickle.dumps(read_annotations(tmp_path / "a.geojson", CLASSES, labels.shape)))
    assert isinstance(raster, Raster)
    assert (raster.shape, raster.channels, raster.dtype, raster.spacing) == (labels.shape, 1, np.uint8, None)
    assert raster.downsamples == ((1, 1), (4, 4), (16, 16))
    assert raster.levels == ((2173, 1875), (543, 469), (136, 117))
    assert raster.tile_shape(1) == (512, 469)
    for level, step in enumerate((1, 4, 16)):
        coarse = labels[step // 2 :: step, step // 2 :: step]
        assert coarse.shape == raster.levels[level]
        found = raster.read(((0, 0), labels.shape), level)[0]
        assert found.shape == (-(-2173 // step), -(-1875 // step))
        np.testing.assert_array_equal(found[: len(coarse), : coarse.shape[1]], coarse)
    np.testing.assert_array_equal(found[:, -1], found[:, -2]), "the last pixel is repeated"
    np.testing.assert_array_equal(raster.read(((1003, 998), (1021, 1200)), 2)[0], coarse[62:64, 62:75])
    with pytest.raises(ShapeError, match="give start < stop inside the image"):
        raster.read(((0, 0), (2174, 5)))


@pytest.mark.parametrize(("unknown", "value"), [("ignore", 255), ("background", 1)])
def test_unknown_classes_as_declared(tmp_path: Path, unknown: str, value: int) -> None:
    known, other = feature(polygon(square(0, 0, 9))), feature(polygon(square(2, 2, 2)), "Region\x1b*")
    path = save(tmp_path, collection(known, other, feature(polygon(square(2, 2, 1)), None)))
    with pytest.raises(FormatError) as caught:
        read_annotations(path, CLASSES, (20, 30))
    assert str(caught.value) == (
        f"{path}: holds classes of no name: 'Region?*' (1 features), 'unclassified' (1 features); classes are Tumor, "
        "Stroma: name these, or set unknown to ignore or background"
    )
    raster = read_annotations(path, CLASSES, (20, 30), unknown=unknown)
    assert raster.read(((0, 0), (20, 30)))[0, 2, 2] == value
    assert raster.notes[0].startswith("features of classes without a name")
    with pytest.raises(ConfigError, match="unknown='drop' is none of 'error', 'ignore' and 'background'"):
        read_annotations(path, CLASSES, (20, 30), unknown="drop")


def test_says_what_it_left_out_and_what_crosses(tmp_path: Path) -> None:
    bow = polygon([[0, 0], [10, 10], [10, 0], [0, 10]])
    line = {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}
    members = [feature(bow), feature(line), feature(None), feature(polygon()), feature(polygon(square(90, 90, 3)))]
    raster = read_annotations(save(tmp_path, collection(*members)), CLASSES, (20, 30))
    assert raster.notes == (
        "3 geometries without an area (points, lines, empty ones) are left out",
        "1 rings cross themselves and are filled by the even-odd rule",
        "1 polygons lie outside the image of 20 x 30 pixels",
    )
    found = raster.read(((0, 0), (20, 30)))[0]
    assert (found[2, 5], found[5, 2], found[5, 8], found[8, 5]) == (0, 1, 1, 0)
    assert found.sum() == 50


def test_rings_that_only_touch_do_not_cross(tmp_path: Path) -> None:
    touching = polygon([[0, 0], [4, 0], [4, 4], [8, 4], [8, 8], [4, 8], [4, 4], [0, 4]])
    raster = read_annotations(save(tmp_path, feature(touching)), CLASSES, (20, 30))
    assert raster.notes == ()
    assert raster.read(((0, 0), (20, 30))).sum() == 32


def test_names_come_from_the_declared_classes() -> None:
    classes = {"ignore": "Blur", "tumour": ["Tumor", "Tumor 2"], "stroma": 3}
    assert annotation_classes(classes) == {
        "Blur": 255,
        "Tumor": 1,
        "Tumor 2": 1,
        "background": 0,
        "ignore": 255,
        "tumour": 1,
        "stroma": 2,
    }


HUGE = "9" * 400
DAMAGE = {
    "truncated or corrupt JSON": b'{"type": "FeatureCollection", "features": [',
    "truncated or corrupt JSON (Expecting value": b"",
    "truncated or corrupt JSON ('utf-8": b'{"a": "\xff"}',
    "nested too deep": b"[" * 100_000,
    "is JSON, but no GeoJSON of features": b'{"features": []}',
    "is JSON, but no GeoJSON of features; ": b"null",
    "feature 1 (Tumor) has coordinates that are not finite": feature(polygon([[0, 0], [1, float("nan")], [2, 2]])),
    "not finite, or farther than 2^31 pixels; mend": feature(polygon([[0, 0], [1, 3e9], [2, 2]])),
    "has a ring of 2 points, which encloses nothing": feature(polygon([[0, 0], [1, 1], [0, 0]])),
    "has a ring without points": feature(polygon([])),
    "has points that are no pairs of numbers": feature(polygon([[1], [2], [3]])),
    "has coordinates that are not lists of numbers": feature(polygon([["a", 1], [1, 1], [2, 3]])),
    "points that are no pairs of numbers; mend": feature(polygon([0, 0], 1)),
    "coordinates that are not lists of numbers; mend": feature({"type": "Polygon", "coordinates": 5}),
    "not lists of numbers": b'{"type": "Polygon", "coordinates": [[[0, 0], [1, %s], [2, 2]]]}' % HUGE.encode(),
    "has a geometry of no kind that GeoJSON knows": feature({"type": "Circle", "coordinates": [0, 0]}),
    "feature 2 (Stroma) has a ring of 1 points": collection(
        feature(polygon(square(0, 0, 1))), feature({"type": "MultiPolygon", "coordinates": [[[[0, 0]]]]}, "Stroma")
    ),
}


@pytest.mark.parametrize("reason", DAMAGE)
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, reason: str, name: str) -> None:
    path = save(tmp_path, DAMAGE[reason], name)
    with pytest.raises(FormatError, match=re.escape(reason)) as caught:
        read_annotations(path, CLASSES, (20, 30))
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_truncation_is_never_silent(tmp_path: Path, labels, share: float, name: str) -> None:
    write_geojson(tmp_path / name, traced(labels), ("background", "Tumor", "Stroma"))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match="truncated or corrupt"):
        painted(tmp_path / name)


def test_a_bomb_is_refused_before_it_bursts(tmp_path: Path) -> None:
    path = save(tmp_path, b" " * 2_000_000, "a.geojson.gz")
    assert path.stat().st_size < 10_000
    with pytest.raises(FormatError, match=r"holds more than 1000000 bytes of text; split it, or allow more"):
        read_annotations(path, CLASSES, (20, 30), max_bytes=1_000_000)


def test_refuses_missing_files_and_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot be read \(No such file or directory\); check the path"):
        read_annotations(tmp_path / "none.geojson", CLASSES, (20, 30))
    with pytest.raises(ShapeError, match=r"annotations on an image of shape \(1, 2, 3\); give \(H, W\)"):
        read_annotations(tmp_path / "none.geojson", CLASSES, (1, 2, 3))


def test_marks_are_points_and_polygons_one_by_one(tmp_path: Path) -> None:
    several = {"type": "MultiPolygon", "coordinates": [[square(0, 0, 2)], [square(5, 5, 2), square(5.5, 5.5, 1)]]}
    shapes = [
        feature({"type": "Point", "coordinates": [3, 4, 1]}),
        feature({"type": "MultiPoint", "coordinates": [[1, 2], [7, 8, 0]]}, None),
        feature({"type": "MultiPoint", "coordinates": []}),
        feature({"type": "LineString", "coordinates": [[1, 2], [7, 8]]}),
        feature(several),
        feature(polygon(square(0, 0, 2)), "Ignore*"),
    ]
    found = read_marks(save(tmp_path, collection(*shapes)))
    assert found.boxes.tolist() == [
        [4, 3, 4, 3], [2, 1, 2, 1], [8, 7, 8, 7], [0, 0, 2, 2], [5, 5, 7, 7],
    ]  # fmt: skip
    assert len(found.rings(4)) == 2
    assert len(read_marks(save(tmp_path, collection()))) == 0
    for coordinates, message in (([1], "points that are no pairs"), ([1, "a"], "coordinates that are not lists")):
        with pytest.raises(FormatError, match=rf"slide.geojson: feature 1 \(Tumor\) has {message}"):
            read_marks(save(tmp_path, collection(feature({"type": "Point", "coordinates": coordinates}))))
    with pytest.raises(FormatError, match="is JSON, but no GeoJSON of features"):
        read_marks(save(tmp_path, [[1, 2]]))
