import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import tiny_config, write_discs

from foveate.cli import main
from foveate.errors import ConfigError, FormatError
from foveate.tasks.evaluate import evaluate
from foveate.tasks.predict import predict
from foveate.tasks.segmentation import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    write_discs(root / "data")
    fit(tiny_config(root / "data", root / "run", train={"epochs": 30, "lr": 1e-2, "eval_every": 10}))
    return root / "run"


def test_scores_are_those_of_the_predicted_files(run: Path, tmp_path: Path) -> None:
    result = evaluate(run)
    assert len(result.rows) == 2
    for row in result.rows:
        image = run.parent / "data" / f"{row['name']}.png"
        (mask,) = predict(run, image, tmp_path / Path(row["name"]).name)
        guess = np.asarray(Image.open(mask)) == 1
        truth = np.asarray(Image.open(run.parent / "data/masks" / image.name)) > 127
        assert row["dice"]["disc"] == pytest.approx(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
        assert row["tokens"] <= 40
        assert 0.9 < row["ceiling"]["disc"] <= 1
    assert result.dice == pytest.approx(np.mean([row["dice"]["disc"] for row in result.rows]))


def test_the_record_is_complete(run: Path) -> None:
    result = evaluate(run, split="val")
    record = json.loads((run / "evaluation/val.json").read_text())
    assert record["classes"] == ["disc"]
    assert record["summary"]["dice"]["disc"].keys() == {"mean", "low", "high", "num"}
    assert record["summary"]["tokens"].keys() == {"mean", "min", "max"}
    assert record["summary"]["seconds"]["mean"] > 0
    assert len(record["images"]) == 2
    text = (run / "evaluation/val.txt").read_text()
    assert text == str(result) + "\n"
    assert "dice" in text.splitlines()[0]
    assert "ceiling" in text.splitlines()[-1]


def test_figures_can_be_drawn_on_the_way(run: Path) -> None:
    seen: list[Any] = []
    evaluate(run, on_image=lambda *what: seen.append(what))
    assert [image.shape for _, image, _, _ in seen] == [(3, 64, 64)] * 2


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split='all' is none of train, val, test"):
        evaluate(run, split="all")
    with pytest.raises(FormatError, match="holds no trained model"):
        evaluate(tmp_path)
    data = {
        "root": str(run.parent / "data"),
        "classes": {"disc": ">=128"},
        "split": {"train": 0.7, "val": 0.3, "test": 0},
    }
    fit(tiny_config(run.parent / "data", tmp_path / "run", data=data, train={"epochs": 1}))
    with pytest.raises(ConfigError, match="the test split has 0 images"):
        evaluate(tmp_path / "run")


def test_images_that_have_no_score_are_an_error_after_the_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run.parent / "data" / f"{evaluate(run).rows[0]['name']}.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    try:
        assert main(["evaluate", str(run)]) == 2
    finally:
        image.write_bytes(whole)
    said = capsys.readouterr()
    assert f"1 of 2 images have no score (first: {image}" in said.err
    assert "1 test images: dice" in said.out
    assert f"report: {run / 'evaluation' / 'test.html'}" in said.out
