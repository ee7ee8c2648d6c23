"""Outlines of label images, traced and filled: against connected components, crossing counts and each other."""

from fractions import Fraction
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import Delaunay

from foveate.errors import ShapeError
from foveate.geometry.rings import Polygons, Tracer, fill, simplified, trace


@st.composite
def label_images(draw):
    height, width = draw(st.integers(1, 17)), draw(st.integers(1, 17))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.choice(draw(st.sampled_from([(0, 1), (0, 1, 1, 1), (0, 0, 1, 2, 255), (1, 2)])), (height, width))
    if draw(st.booleans()):
        labels = np.kron(labels, np.ones((2, 3), int))[:height, :width]
    return np.ascontiguousarray(labels.astype(np.uint8))


def whole(labels) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, 0), labels.shape


def traced(labels, *, tile: int = 5, constant: bool = True, **options) -> Polygons:
    def tiles(box):
        part = labels[box[0][0] : box[1][0], box[0][1] : box[1][1]]
        return int(part[0, 0]) if constant and (part == part[0, 0]).all() else part

    return trace(tiles, labels.shape, tile=tile, **options)


@given(label_images(), st.integers(1, 20), st.booleans())
def test_fill_gives_back_what_was_traced(labels, tile: int, constant: bool) -> None:
    polygons = traced(labels, tile=tile, constant=constant)
    np.testing.assert_array_equal(fill(polygons, whole(labels)), labels)
    assert polygons.areas.sum() == np.count_nonzero(labels)


@given(label_images(), st.integers(1, 20))
def test_the_tiling_does_not_matter(labels, tile: int) -> None:
    one, other = traced(labels, tile=tile), traced(labels, tile=32, constant=False)
    assert one.points.dtype == np.int32
    for name in ("points", "ring_start", "polygon_start", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@given(label_images())
def test_rings_are_simple_and_polygons_are_the_regions(labels) -> None:
    """One polygon for each connected component, one hole for each component of what is around it but the outermost."""
    expected = []
    for label in np.unique(labels[labels > 0]):
        count, regions = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=4)
        for region in range(1, count):
            around = np.pad(regions != region, 1, constant_values=True).astype(np.uint8)
            holes = cv2.connectedComponents(around, connectivity=4)[0] - 2
            expected.append((int(label), int((regions == region).sum()), holes))
    polygons = traced(labels)
    found = [(label, int(area), len(rings) - 1) for (label, rings), area in zip(polygons, polygons.areas, strict=True)]
    assert sorted(found) == sorted(expected)
    for _, rings in polygons:
        for index, ring in enumerate(rings):
            assert len(np.unique(ring, axis=0)) == len(ring), "no point twice"
            steps = np.roll(ring, -1, 0) - ring
            assert ((steps == 0).sum(1) == 1).all(), "along pixel edges"
            assert ((steps[:, 0] == 0) != (np.roll(steps, -1, 0)[:, 0] == 0)).all(), "no collinear points"
            assert (cv2.contourArea(np.ascontiguousarray(ring[:, ::-1]), oriented=True) > 0) == (index == 0)


def test_a_region_within_a_hole_within_a_region() -> None:
    labels = np.ones((9, 9), np.uint8)
    labels[1:8, 1:8], labels[2:7, 2:7], labels[3:6, 3:6], labels[4, 4] = 0, 1, 2, 1
    found = [(label, [len(ring) for ring in rings]) for label, rings in traced(labels)]
    assert found == [(1, [4, 4]), (1, [4, 4]), (1, [4]), (2, [4, 4])]
    outer, hole = traced(labels).rings(0)
    assert outer.tolist() == [[0, 0], [0, 9], [9, 9], [9, 0]]
    assert hole.tolist() == [[1, 1], [8, 1], [8, 8], [1, 8]]


def test_holes_far_from_their_outline_find_it() -> None:
    labels = np.ones((3, 5000), np.uint8)
    labels[1, [40, 4000, 4990]] = 0
    assert [len(rings) for _, rings in traced(labels, tile=512)] == [4]


def test_small_regions_are_left_out_and_small_holes_filled() -> None:
    labels = np.zeros((10, 20), np.uint8)
    labels[1:9, 1:9] = 1
    labels[3:5, 3:5] = 2
    labels[6, 6] = 0
    labels[2:4, 12:15] = 3
    labels[9, 19] = 4
    kept = traced(labels, min_area=4)
    wanted = np.where((labels == 4) | (np.arange(20) == 19), 0, labels)
    wanted[6, 6] = 1
    np.testing.assert_array_equal(fill(kept, whole(labels)), wanted)
    assert traced(labels, min_area=5).labels.tolist() == [1, 3]


def test_background_may_be_any_label() -> None:
    labels = np.array([[0, 0, 7], [0, 7, 7]], np.uint8)
    polygons = traced(labels, background=7)
    assert polygons.labels.tolist() == [0]
    np.testing.assert_array_equal(fill(polygons, whole(labels), background=7), labels)


@given(label_images(), st.sampled_from([1, 2, 3, 4, 16]), st.data())
def test_fill_samples_centres_at_any_downsample_by_any_box(labels, step: int, data) -> None:
    height, width = labels.shape
    rows, columns = (np.arange(-(-side // step)) * step + step // 2 for side in (height, width))
    padded = np.pad(labels, ((0, 16), (0, 16)))
    expected = padded[np.ix_(rows, columns)]
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    found = fill(traced(labels), ((y0, x0), (y1, x1)), step)
    np.testing.assert_array_equal(found, expected[y0 // step : -(-y1 // step), x0 // step : -(-x1 // step)])


def crossings(ring, y: Fraction, x: Fraction) -> int:
    """Edges that a ray to the left meets, by exact arithmetic."""
    count = 0
    for (ya, xa), (yb, xb) in pairwise([*ring, ring[0]]):
        if (ya <= y) != (yb <= y):
            count += xa + (xb - xa) * (y - ya) / (yb - ya) <= x
    return count


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(3, 9))
def test_fill_is_exact_for_rings_that_cross_themselves(seed: int, step: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rings = [rng.integers(-4, 40, (count, 2)) / 2 for _ in range(2)]
    found = fill(Polygons.of([(1, rings)]), ((0, 0), (16, 16)), step)
    exact = [[[Fraction(value) for value in point] for point in ring.tolist()] for ring in rings]
    for (i, j), value in np.ndenumerate(found):
        centre = Fraction(2 * i + 1, 2) * step, Fraction(2 * j + 1, 2) * step
        assert value == sum(crossings(ring, *centre) for ring in exact) % 2


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_neighbours_neither_overlap_nor_leave_gaps(seed: int, whole_numbers: bool) -> None:
    rng = np.random.default_rng(seed)
    inner = rng.integers(1, 24, (12, 2)) if whole_numbers else rng.uniform(0, 25, (12, 2))
    points = np.concatenate([[[0, 0], [0, 25], [25, 0], [25, 25]], inner]).astype(float)
    triangles = Delaunay(points).simplices
    covers = sum(fill(Polygons.of([(1, [points[t]])]), ((0, 0), (25, 25))).astype(int) for t in triangles)
    assert (covers == 1).all()


def test_later_polygons_are_seen_and_parts_outside_are_cut_off() -> None:
    square = np.array([[-5, -5], [-5, 3], [3, 3], [3, -5]])
    polygons = Polygons.of([(1, [square]), (2, [square + 2]), (3, [square - 100])])
    labels = fill(polygons, ((0, 0), (6, 6)))
    assert labels.tolist() == [[2] * 5 + [0]] * 5 + [[0] * 6]
    assert polygons.boxes[1].tolist() == [-3, -3, 5, 5]
    assert polygons.areas.tolist() == [64, 64, 64]


def test_no_polygons() -> None:
    polygons = traced(np.zeros((4, 4), np.uint8))
    assert (len(polygons), len(polygons.areas), len(polygons.boxes), list(polygons)) == (0, 0, 0, [])
    assert not fill(polygons, ((0, 0), (4, 4))).any()
    assert not fill(Polygons.of([]), ((0, 0), (4, 4))).any()


def test_fewer_points_stay_near_the_outline() -> None:
    y, x = np.mgrid[:200, :200]
    far = np.hypot(y - 100, x - 100)
    labels = ((far < 90) & (far > 30)).astype(np.uint8)
    labels[5, 5] = 2
    exact = traced(labels, tile=64)
    fewer = simplified(exact, 1.5)
    assert len(fewer.points) < len(exact.points) / 4
    assert [len(rings) for _, rings in fewer] == [2, 1]
    changed = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) == 0
    np.testing.assert_array_equal(fill(fewer, whole(labels))[changed], labels[changed])
    assert simplified(exact, 0) is exact
    assert fill(simplified(exact, 3), whole(labels))[5, 5] == 2, "an outer ring does not vanish"


def test_refuses_what_is_no_label_image() -> None:
    with pytest.raises(ShapeError, match=r"labels of \(4, 4, 4\) have no outlines; give \(H, W\)"):
        Tracer((4, 4, 4))
    with pytest.raises(ShapeError, match="give \\(H, W\\) from 1 to 67108863"):
        Tracer((0, 4))
    tracer = Tracer((4, 4))
    with pytest.raises(ShapeError, match="keep the order"):
        tracer.add(((0, 2), (2, 4)), 0)
    tracer.add(((0, 0), (2, 2)), 1)
    with pytest.raises(ShapeError, match="keep the order"):
        tracer.add(((0, 2), (3, 4)), 0)
    with pytest.raises(ShapeError, match=r"labels \(3, 3\) for the tile \(\(0, 2\), \(2, 4\)\); give \[2, 2\]"):
        tracer.add(((0, 2), (2, 4)), np.zeros((3, 3), np.uint8))
    with pytest.raises(ShapeError, match=r"tiles end at row 2, column 2 of \(4, 4\); add them all"):
        tracer.finish()
