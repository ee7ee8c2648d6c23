import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_recognition import feature_run, features
from tiny_labels import tiny_labels, write_crosses

from foveate.cli import main
from foveate.errors import ConfigError, FormatError
from foveate.geometry.patch_source import TensorPatches
from foveate.io.raster import open_raster
from foveate.nn.heads import TaskSpec
from foveate.tasks.fit import task_of_run
from foveate.tasks.heatmap import (
    Heat,
    gallery,
    heatmap_picture,
    paint_boxes,
    sharpness,
    write_heat_pyramid,
    write_scores,
)
from foveate.tasks.recognise import load_recognition, recognise
from foveate.tasks.recognition import fit
from foveate.tasks.recognition_evaluate import evaluate_labels
from foveate.tasks.recognition_predict import predict_labels
from foveate.tasks.splits import split_rows
from foveate.tasks.table import read_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    fit(tiny_labels(write_crosses(root / "data"), root / "run", train={"epochs": 1}))
    return root / "run"


def images(run: Path, *numbers: int) -> list[Path]:
    return [run.parent / f"data/images/{number:02d}.png" for number in numbers]


def test_predict_writes_everything_about_an_image(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = predict_labels(run, images(run, 1, 2), out, format="png,geojson,npz,csv,ome.tif,tif")
    endings = ["_heatmap.png", "_gallery.png", ".geojson", "_scores.npz", "_scores.csv", "_heatmap.ome.tif"]
    expected = {out / f"{name}{end}" for name in ("01", "02") for end in [*endings, "_heatmap.tif"]}
    pages = {out / name for name in ("predictions.csv", "predictions.jsonl", "report.html")}
    assert set(written) == expected | pages == set(out.iterdir())
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["01", "02"]
    assert all(float(row["label_cross"]) + float(row["label_none"]) == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(row["label"] == max(("cross", "none"), key=lambda name: float(row[f"label_{name}"])) for row in rows)
    assert [(row["patches"], row["chosen"]) for row in rows] == [("16", "2")] * 2

    scores = np.load(out / "01_scores.npz")
    assert scores["boxes"].shape == (16, 2, 2)
    assert scores["share"].sum() == pytest.approx(1)
    assert scores["chosen"].sum() == 2
    assert len((out / "01_scores.csv").read_text().splitlines()) == 17
    features = json.loads((out / "01.geojson").read_text())["features"]
    assert [feature["properties"]["measurements"]["rank"] for feature in features] == [1, 2]
    corner = np.array(features[0]["geometry"]["coordinates"][0]).min(0)[::-1]
    best = scores["boxes"][scores["chosen"]][scores["share"][scores["chosen"], 0].argmax()]
    assert corner.tolist() == best[0].tolist()

    heat = open_raster(out / "01_heatmap.ome.tif")
    assert heat.shape == (64, 64)
    pixels = heat.read(((0, 0), (64, 64)))[0]
    times = scores["share"][:, 0] * 16
    expected_heat = np.floor(255 * np.float32(times / (1 + times)) + np.float32(0.5))
    assert np.abs(pixels[::16, ::16].ravel() - expected_heat).max() <= 1
    with tifffile.TiffFile(out / "01_heatmap.tif") as file:
        assert file.pages[0].shape == (64, 64)
    for name in ("01_heatmap.png", "02_gallery.png"):
        with Image.open(out / name) as picture:
            assert picture.size[0] > 128
    page = (out / "report.html").read_text()
    assert "2 images" in page
    assert "<img" in page


def test_unreadable_images_are_skipped_and_the_rest_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(images(run, 1)[0], tmp_path / "images/good.png")
    (tmp_path / "images/bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "slides.csv").write_text("path,id\nimages/bad.png,first\nimages/good.png,second\n")
    out = tmp_path / "out"
    assert main(["predict", str(run), str(tmp_path / "slides.csv"), "--out", str(out), "--format", "npz"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"foveate: skipped {tmp_path}/images/bad.png: ")
    assert "1 of 2 images have no labels (first: " in error
    assert f"1 are in {out}" in error
    assert (out / "second_scores.npz").is_file()
    assert "1 could not be read" in (out / "report.html").read_text()


def test_what_is_there_is_refused_resumed_or_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_labels(run, images(run, 1), out)
    with pytest.raises(ConfigError, match=r"predictions.jsonl exists; add --overwrite to replace it"):
        predict_labels(run, images(run, 2), out)
    before = (out / "01_scores.npz").stat().st_mtime_ns
    written = predict_labels(run, images(run, 1, 2), out, resume=True)
    assert (out / "01_scores.npz").stat().st_mtime_ns == before
    assert out / "02_scores.npz" in written
    assert out / "01_scores.npz" not in written
    assert len((out / "predictions.csv").read_text().splitlines()) == 3
    predict_labels(run, images(run, 2), out, overwrite=True)
    assert len((out / "predictions.csv").read_text().splitlines()) == 2


def test_a_folder_of_bags_may_have_folders(tmp_path: Path) -> None:
    root = features(tmp_path / "data")
    fit(feature_run(root, tmp_path / "run"))
    (root / "bags/deep").mkdir()
    shutil.copy(root / "bags/s1.safetensors", root / "bags/deep/s1.safetensors")
    predict_labels(tmp_path / "run", root / "bags", tmp_path / "out")
    with (tmp_path / "out/predictions.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["deep/s1", *(f"s{index}" for index in range(8))]
    labels = features(tmp_path / "more") / "labels.csv"
    labels.unlink()
    with pytest.raises(FormatError, match=r"labels.csv is not there: check the path, or data.root"):
        fit(feature_run(tmp_path / "more", tmp_path / "run2"))


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"format='ome.tiff' is unknown, did you mean 'ome.tif'\?"):
        predict_labels(run, images(run, 1), tmp_path / "out", format="ome.tiff")
    (tmp_path / "a").mkdir()
    twin = shutil.copy(images(run, 1)[0], tmp_path / "a/01.png")
    with pytest.raises(ConfigError, match="are both called 01; give ids in a table"):
        predict_labels(run, [*images(run, 1), twin], tmp_path / "out")
    with pytest.raises(FormatError, match=r"1 of 1 images have no labels .*above the limit of 5 pixels"):
        predict_labels(run, tmp_path / "a", tmp_path / "out2", max_pixels=5, warn=lambda line: None)
    words = ["predict", str(run), str(twin), "--out", str(tmp_path / "out3"), "--max-leaves", "7"]
    assert main(words) == 2
    assert "--max-leaves is about masks" in capsys.readouterr().err
    assert task_of_run(run) == "recognition"
    assert task_of_run(tmp_path) == "segmentation"


def test_evaluate_scores_with_intervals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = evaluate_labels(run, split="test")
    assert len(evaluation.rows) == 4
    for one in evaluation.scores["label"].values():
        assert np.isnan(one["mean"]) or one["low"] <= one["mean"] <= one["high"]
    saved = json.loads((run / "evaluation/test.json").read_text())
    assert saved["scores"]["label"]["accuracy"]["num"] == 4
    page = (run / "evaluation/test.html").read_text()
    assert "validation score" not in page  # it is in the picture
    wrong = [row for row in evaluation.rows if row["label"] != row["label said"]]
    assert all(f"Not got right: {row['image']}: label is {row['label']}, said" in page for row in wrong)
    assert main(["evaluate", str(run), "--split", "val"]) == 0
    assert "balanced_accuracy" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--precision", "bf16"]) == 2
    assert f"--precision=bf16 is for masks, and {run} says labels; leave it out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="split='all' is none of train, val, test"):
        evaluate_labels(run, split="all")
    data = load_recognition(run)[1].data
    lost = split_rows(read_table(data), data)["val"][0].item.image
    before = lost.read_bytes()
    lost.write_bytes(b"")
    lines: list[str] = []
    assert evaluate_labels(run, split="val", warn=lines.append).failed[0] in lines[0]
    lost.write_bytes(before)


def test_a_bag_that_is_kept_whole_has_a_heatmap_too(run: Path) -> None:
    model, config = load_recognition(run)
    found = recognise(model, TensorPatches(torch.rand(2, 1, 16, 16)), config.data.tasks)
    assert found.index.tolist() == [0, 1]
    assert float(found.share.sum()) == pytest.approx(1)
    assert model.config.tasks == (TaskSpec("label", "classes", 2),)


def heat(share: np.ndarray, shape: tuple[int, int] = (20, 30)) -> Heat:
    boxes = np.array([[[0, 0], [10, 10]], [[0, 10], [10, 20]], [[10, 5], [20, 15]]])
    return Heat(shape, boxes, share, tuple(f"t{n}" for n in range(share.shape[1])), np.array([0, 2]), (1e-3, 1e-3))


@given(
    st.lists(st.tuples(*[st.integers(-3, 11)] * 2, *[st.integers(1, 6)] * 2, st.integers(0, 9)), min_size=1, max_size=9)
)
def test_painting_equals_the_plain_way(drawn: list[tuple[int, int, int, int, int]]) -> None:
    boxes = np.array([[[y, x], [y + h, x + w]] for y, x, h, w, _ in drawn], np.float64)
    values = np.array([[value] for *_, value in drawn], np.float32)
    total, count = np.zeros((8, 9)), np.zeros((8, 9))
    for y, x, h, w, value in drawn:
        top, left = min(max(y, 0), 7), min(max(x, 0), 8)
        area = slice(top, max(min(y + h, 8), top + 1)), slice(left, max(min(x + w, 9), left + 1))
        total[area] += value
        count[area] += 1
    plain = np.where(count > 0, total / np.maximum(count, 1), 0)
    assert np.allclose(paint_boxes(boxes, values, 8, 9)[0], plain, atol=1e-5)


def test_heat_is_told_against_the_mean_patch(tmp_path: Path) -> None:
    flat, peaked = heat(np.full((3, 1), 1 / 3)), heat(np.array([[0.1, 0.8], [0.1, 0.1], [0.8, 0.1]]))
    assert np.allclose(flat.values, 0.5)
    assert peaked.ranked.tolist() == [0, 2]
    assert np.allclose(peaked.values[2], [2.4 / 3.4, 0.3 / 1.3])
    assert heatmap_picture(peaked, None, {"t0": "a"}).shape[1] > 3 * 30
    assert [sharpness(top) for top in (1.04, 2.4)] == ["looks everywhere alike", "highest 2.4 times the mean"]
    assert gallery(np.zeros((2, 3, 4, 4), np.uint8), peaked).shape == (174, 280, 3)
    assert gallery(np.zeros((2, 1, 4, 4), np.float32), peaked).shape == (174, 280, 3)
    write_heat_pyramid(tmp_path / "heat.ome.tif", peaked)
    pixels = open_raster(tmp_path / "heat.ome.tif").read(((0, 0), (20, 30)))
    assert pixels[:, 5, 25].tolist() == [0, 0]
    assert pixels[:, 15, 10].tolist() == [180, 59]
    write_scores(tmp_path / "s.csv", peaked)
    assert (tmp_path / "s.csv").read_text().splitlines()[3] == "10,5,20,15,1,0.8,0.1"
