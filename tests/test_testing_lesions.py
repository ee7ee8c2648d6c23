"""Slides with tiny lesions: the truth is exact, however a slide is cut."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from foveate.errors import BudgetError, ConfigError
from foveate.io.geojson import read_marks
from foveate.io.raster import open_raster
from foveate.testing.lesions import KINDS, LesionSlide, write_lesions

SIDE = 512


@pytest.fixture(scope="module")
def slides() -> dict[str, LesionSlide]:
    return {kind: LesionSlide(SIDE, 3, kind) for kind in KINDS}


def test_lesions_are_few_and_tiny_and_on_tissue(slides) -> None:
    assert len(slides["none"].boxes) == 0
    for kind in KINDS[1:]:
        boxes = slides[kind].boxes
        assert 1 <= len(boxes) <= 4
        sides = boxes[:, 1] - boxes[:, 0]
        assert (sides[:, 0] == sides[:, 1]).all()
        assert 10 <= sides.min() <= sides.max() <= 40
        for start, stop in boxes.tolist():
            assert np.all(np.equal(slides[kind].labels((tuple(start), tuple(stop))), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_shows_what_the_whole_shows(slides, kind) -> None:
    slide = slides[kind]
    whole = slide.pixels(((0, 0), (SIDE, SIDE)))
    assert whole.shape == (3, SIDE, SIDE)
    for start in (0, 100, 259):
        assert np.array_equal(slide.pixels(((start, 7), (start + 200, 507))), whole[:, start : start + 200, 7:507])


def test_kinds_look_different(slides) -> None:
    centre = {}
    for kind in KINDS[1:]:
        (y, x), (b, r) = slides[kind].boxes[0].tolist()
        part = slides[kind].pixels(((y, x), (b, r))).astype(float)
        middle = slice((b - y) // 2 - 2, (b - y) // 2 + 2)
        centre[kind] = part[:, middle, middle].mean()
        assert np.abs(part - slides["none"].pixels(((y, x), (b, r)))).mean() > 10
    assert centre["ring"] > 200 > centre["cluster"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((100, 0, "ring"), BudgetError, "side=100, tissue=0.43; the side is at least 256, the tissue from 0.05 to 0.8"),
        ((512, 0, "blob"), ConfigError, "kind='blob' must be one of none, cluster, ring"),
    ],
)
def test_slides_that_cannot_be_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        LesionSlide(*arguments)


def test_a_slide_without_room_is_refused(slides, monkeypatch) -> None:
    monkeypatch.setattr("foveate.testing.lesions._TRIES", 0)
    with pytest.raises(BudgetError, match="side=512 has no room for 2 lesions and smudges on tissue; raise it"):
        slides["ring"]._places(np.random.default_rng(0), np.array([12, 30]))


def test_a_data_set_is_a_folder_and_a_table(tmp_path: Path) -> None:
    path = write_lesions(tmp_path, (1, 0, 2), SIDE)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["label"], row["split"]) for row in rows] == [("none", "train"), ("none", "test"), ("cluster", "test")]
    truth = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [len(known["boxes"]) > 0 for known in truth] == [False, False, True]
    assert [row["marks"] for row in rows] == ["", "", "marks/test-0001.geojson"]
    assert read_marks(tmp_path / rows[2]["marks"]).boxes.reshape(-1, 2, 2).tolist() == truth[2]["boxes"]
    raster = open_raster(tmp_path / rows[2]["path"])
    assert (raster.shape, len(raster.levels), raster.spacing) == ((SIDE, SIDE), 2, (0.0005, 0.0005))
