import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_recognition import feature_run, features
from tiny_labels import tiny_labels, write_crosses

from foveate.cli import main
from foveate.errors import FormatError
from foveate.geometry.patch_source import TensorPatches
from foveate.geometry.rings import Polygons
from foveate.io.bags import write_bag
from foveate.tasks.config import config_from_dict, save_config
from foveate.tasks.items import Item
from foveate.tasks.marks import Marks, held_by, inside, marks_of, needle_recall
from foveate.tasks.recognition import build_task, fit
from foveate.tasks.recognition_evaluate import evaluate_labels
from foveate.tasks.recognition_settings import RecognitionConfig, TableConfig
from foveate.tasks.run import read_metrics
from foveate.tasks.table import Row, read_table
from foveate.testing.digits import write_digits

ROW = Row(Item("a", Path("a.png"), None, "a"), {}, 1)


def square(y: float, x: float, side: float) -> np.ndarray:
    return np.array([(y, x), (y, x + side), (y + side, x + side), (y + side, x)], np.float64)


def marks(*rings: np.ndarray) -> Marks:
    return Marks(Path("a.geojson"), Polygons.of((1, [ring]) for ring in rings))


def grid(side: int = 64, patch: int = 16) -> TensorPatches:
    start = torch.cartesian_prod(*[torch.arange(0, side, patch)] * 2)
    boxes = torch.stack([start, start + patch], 1)
    return TensorPatches(torch.zeros(len(boxes), 1, 1, 1), boxes, (side, side))


def recall(found: Marks | None, *index: int, source: TensorPatches | None = None) -> dict[str, float]:
    return needle_recall(found, torch.tensor(index, dtype=torch.int64), source or grid(), ROW, TableConfig())


def test_a_small_mark_is_held_by_the_one_patch_with_its_centre() -> None:
    three = marks(square(0, 0, 4), square(14, 14, 6), square(30, 30, 4))  # the others lie across four patches each
    assert recall(three, 0) == {"needle_recall": 1 / 3, "needle_recall_ceiling": 1 / 3}
    assert recall(three, 5)["needle_recall"] == 1 / 3  # the second: its centre (17, 17) is in patch 5
    assert recall(three, 0, 5, 10) == {"needle_recall": 1, "needle_recall_ceiling": 1}
    assert recall(three, 1, 4, 6)["needle_recall"] == 0
    assert recall(marks(np.array([(16.0, 16.0)])), 5)["needle_recall"] == 1  # a point, on a corner of four patches


def test_a_large_outline_is_held_by_every_patch_whose_centre_lies_in_it() -> None:
    ring = np.array([(0, 0), (0, 64), (64, 64), (64, 48), (16, 48), (16, 0)], np.float64)  # an L upside down
    assert recall(marks(ring), 0)["needle_recall"] == 1
    assert recall(marks(ring), 15)["needle_recall"] == 1
    assert recall(marks(ring), 12)["needle_recall"] == 0  # in its bounds, and not in it
    holed = Marks(Path("a"), Polygons.of([(1, [square(0, 0, 64), square(9, 9, 7)])]))
    assert recall(holed, 0)["needle_recall"] == 1
    holed = Marks(Path("a"), Polygons.of([(1, [square(0, 0, 64), square(1, 1, 15)])]))
    assert recall(holed, 0)["needle_recall"] == 0


def test_the_ceiling_is_what_as_many_patches_could_hold() -> None:
    five = marks(*(square(16 * k, 16 * k, 4) for k in range(4)), square(8, 8, 4))
    assert recall(five, 3) == {"needle_recall": 0, "needle_recall_ceiling": 2 / 5}
    assert recall(five, 3, 7)["needle_recall_ceiling"] == 3 / 5
    boxes = grid().boxes
    assert boxes is not None
    without = TensorPatches(torch.zeros(8, 1, 1, 1), boxes[:8], (64, 64))  # as where glass is never read
    assert recall(five, *range(8), source=without)["needle_recall_ceiling"] == 3 / 5


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert recall(None, 0) == {}
    assert recall(marks(square(0, 0, 4)), 0, source=TensorPatches(torch.zeros(3, 1, 1, 1))) == {}


def test_marks_outside_the_image_are_refused() -> None:
    with pytest.raises(FormatError, match=r"a.geojson: mark 2 has its centre at y=66, x=2, outside the image of 64 x"):
        recall(marks(square(0, 0, 4), square(64, 0, 4)), 0)
    assert recall(marks(square(61, 0, 4)), 12)["needle_recall"] == 1  # across the border, its centre inside


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=7))
def test_even_odd_equals_the_plain_way(points: list[tuple[int, int]]) -> None:
    ring = np.array(points, np.int32)
    places = np.array([(y + 0.5, x + 0.25) for y in range(9) for x in range(9)])
    plain = []
    for y, x in places:
        pairs = zip(points, points[1:] + points[:1], strict=True)
        cuts = [(a, b) for a, b in pairs if (a[0] <= y) != (b[0] <= y)]
        plain.append(sum(a[1] + (y - a[0]) * (b[1] - a[1]) / (b[0] - a[0]) > x for a, b in cuts) % 2 == 1)
    assert inside([ring], places).tolist() == plain
    assert held_by([np.array([(3.0, 3.0)])], np.array([3.0, 3.0]), np.array([[[0, 0], [4, 4.0]]])).tolist() == [0]


def test_a_place_on_an_edge_belongs_to_one_of_the_neighbours() -> None:
    """Whichever way round they are drawn; patch centres and outlines along pixels are both whole numbers."""
    places = np.array([(y, x) for y in range(0, 33, 4) for x in range(0, 33, 4)], np.float64) + 100_000
    for turned in range(16):
        four = [square(100_000 + y, 100_000 + x, 16) for y in (0, 16) for x in (0, 16)]
        four = [ring[::-1] if turned >> bit & 1 else ring for bit, ring in enumerate(four)]
        held = sum(inside([ring], places).astype(int) for ring in four)
        assert held.tolist() == [int(y < 100_032 and x < 100_032) for y, x in places]


def geojson(path: Path, *places: tuple[float, float]) -> None:
    shapes = [{"type": "Feature", "geometry": {"type": "Point", "coordinates": [x, y]}} for y, x in places]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": shapes}))


def marked(root: Path) -> Path:
    """The crosses, of which the images with a cross are marked in the middle of the image."""
    write_crosses(root)
    geojson(root / "some.geojson", (40, 40), (5, 20))
    geojson(root / "none.geojson")
    lines = (root / "labels.csv").read_text().splitlines()
    cells = ["marks", *(["", "some.geojson", "none.geojson", "some.geojson"] * 4)]
    (root / "labels.csv").write_text("\n".join(map(",".join, zip(lines, cells, strict=True))) + "\n")
    return root


def test_fit_and_evaluate_say_needle_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_labels(marked(tmp_path / "data"), tmp_path / "run", select={"keep": 1, "keep_start": 1})
    result = fit(config)
    val = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "val"]
    assert all(line["needle_recall"] <= line["needle_recall_ceiling"] == 0.5 for line in val)
    assert f", needle recall {val[-1]['needle_recall']:.3f} of 0.500)" in str(result)
    evaluation = evaluate_labels(tmp_path / "run")
    known = [row["needle_recall"] for row in evaluation.rows if "needle_recall" in row]
    assert len(known) == 2  # of four images; the others have no marks
    assert evaluation.needles["needle_recall"]["mean"] == sum(known) / 2
    assert evaluation.needles["needle_recall"]["num"] == 2
    saved = json.loads((tmp_path / "run/evaluation/test.json").read_text())
    assert saved["needle_recall_ceiling"]["mean"] == 0.5
    assert "needle_recall" in (tmp_path / "run/evaluation/test.html").read_text()
    assert "-               needle_recall " in str(evaluation)
    save_config(config, tmp_path / "run.yaml")
    assert main(["plan", "--data", str(tmp_path / "run.yaml")]) == 0
    assert "marks: 12 of 16 rows say where the evidence lies" in capsys.readouterr().out


def test_a_table_without_marks_has_no_recall(tmp_path: Path) -> None:
    fit(tiny_labels(write_crosses(tmp_path / "data"), tmp_path / "run", train={"epochs": 1}))
    assert not any("needle_recall" in line for line in read_metrics(tmp_path / "run/metrics.jsonl"))
    evaluation = evaluate_labels(tmp_path / "run")
    assert not evaluation.needles
    assert "needle" not in str(evaluation)


def test_marks_that_are_bad(tmp_path: Path) -> None:
    config = tiny_labels(marked(tmp_path / "data"), tmp_path / "run", train={"epochs": 1})
    task = build_task(config)
    lost = next(row for row in task.rows["val"] if row.marks == tmp_path / "data/some.geojson")
    geojson(tmp_path / "data/some.geojson", (5, 900))
    result = fit(config)
    assert len(result.skipped) == len([row for row in task.rows["val"] if row.marks == lost.marks])
    assert "some.geojson: mark 1 has its centre at y=5, x=900, outside the image of 64 x 64" in result.skipped[0]
    (tmp_path / "data/some.geojson").write_text("{")
    with pytest.raises(FormatError, match=r"some.geojson: .*JSON"):
        build_task(config)
    (tmp_path / "data/some.geojson").unlink()
    with pytest.raises(
        FormatError, match=r"labels.csv row 2 has marks='some.geojson', and there is no such file: name a GeoJSON"
    ):
        read_table(config.data)
    assert all(row.marks is None for row in read_table(config.data, labelled=False))


def test_marks_are_level_0_pixels_whatever_size_the_model_reads(tmp_path: Path) -> None:
    write_crosses(tmp_path, 2)
    geojson(tmp_path / "m.geojson", (40, 40))
    (tmp_path / "labels.csv").write_text("path,label,marks,mpp\nimages/00.png,a,m.geojson,0.25\n")
    data = replace(tiny_labels(tmp_path, tmp_path / "run").data, mpp=0.5)
    row = read_table(data)[0]
    half = grid(32)
    assert needle_recall(marks_of(row), torch.tensor([3]), half, row, data)["needle_recall"] == 1
    assert needle_recall(marks_of(row), torch.tensor([0]), half, row, data)["needle_recall"] == 0


def test_stored_features_have_a_recall_too(tmp_path: Path) -> None:
    root = features(tmp_path / "data")
    geojson(root / "m.geojson", (5, 5))
    (root / "labels.csv").write_text(
        "id,label,marks,split\n"
        + "".join(f"s{k},{k % 2},{'m.geojson' if k > 5 else ''},{'train' if k < 6 else 'val'}\n" for k in range(8))
    )
    for name, shape in (("s6", (64, 64)), ("s7", None)):
        (root / f"bags/{name}.safetensors").unlink()
        boxes = grid().boxes if shape else None
        write_bag(root / f"bags/{name}.safetensors", torch.randn(16, 6), boxes, shape, half=False)
    config = feature_run(root, tmp_path / "run")
    task = build_task(config)
    with torch.no_grad():
        assert task.validate(task.model.eval())["needle_recall"] in (0.0, 1.0)  # s7 does not say where it is from


def test_generated_digits_show_it_out_of_the_box(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", (4, 1, 1), side=128, noise=0, form="png")
    values = {
        "data": {
            "root": str(tmp_path / "digits"),
            "tasks": {"max": {}, "multi": {"kind": "labels"}},
            "channels": 1,
            "patch_size": 32,
        },
        "select": {"keep": 2},
        "model": {"overrides": {"width": 16}},
        "train": {"epochs": 1, "augment": False},
        "out": str(tmp_path / "run"),
    }
    task = build_task(config_from_dict(values, RecognitionConfig))
    with torch.no_grad():
        scores = task.validate(task.model.eval())
    assert 0 <= scores["needle_recall"] <= scores["needle_recall_ceiling"] < 1
