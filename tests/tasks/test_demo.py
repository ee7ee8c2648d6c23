"""The demonstration runs, compares like with like, and reports what it found."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from foveate.tasks.demo import QUICK, DemoSize, demo_configs, run_demo, verdict, write_data


def test_runs_differ_only_in_the_cut() -> None:
    runs = demo_configs(Path("demo"), DemoSize())
    adaptive, uniform = runs["adaptive"], runs["uniform"]
    assert adaptive.tree.uniform is None
    assert uniform.tree.uniform == adaptive.tree.min_size
    assert replace(uniform, tree=adaptive.tree, out=adaptive.out) == adaptive


def test_test_images_are_not_trained_on(tmp_path: Path) -> None:
    write_data(tmp_path, QUICK)
    with (tmp_path / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] + ["test"] * 2
    assert len({row["image"] for row in rows}) == len(rows)
    assert all((tmp_path / row["image"]).is_file() and (tmp_path / row["mask"]).is_file() for row in rows)


def test_verdict_is_honest() -> None:
    rows = [{"tokens": 512, "Dice": 0.6}, {"tokens": 4096, "Dice": 0.7}]
    assert verdict(rows) == "With 8.0x fewer tokens, adaptive leaves are 0.100 Dice worse after the same training time."
    assert "better" in verdict([rows[0] | {"Dice": 0.9}, rows[1]])


@pytest.mark.filterwarnings("ignore")
def test_quick_demo_writes_everything(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_demo(tmp_path, quick=True, say=lines.append)
    assert [row["model"] for row in result.rows] == ["adaptive", "uniform"]
    assert result.rows[0]["tokens"] <= QUICK.max_leaves < result.rows[1]["tokens"] == 64
    assert all(0 <= row["Dice"] <= 1 and 0 < row["ceiling"] <= 1 for row in result.rows)
    assert [path.name for path in result.files] == ["picture.png", "table.md", "report.html"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1600
    assert (tmp_path / "table.md").read_text().startswith("| model ")
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in result.to_text()
    assert any("training the uniform model" in line for line in lines)
