"""The report is one file, needs no network, and shows user text as text."""

import re
from pathlib import Path

import numpy as np
import torch

from foveate.geometry.leaves import uniform_leaves
from foveate.tasks.predict import Segmented
from foveate.tasks.report import Gallery, Report, format_cell, markdown_table


def make_report() -> Report:
    return Report(
        title="<script>alert(1)</script>",
        lead="a & b",
        table=[{"model": "adaptive <b>", "Dice": 0.91234, "tokens": 4096, "HD95": float("nan")}],
        figures=[('worst: "x".png', np.zeros((4, 4, 3), np.uint8))],
        config="tree:\n  max_leaves: 512  # <none>",
        notes=["Measured once."],
    )


def test_report_escapes_all_text() -> None:
    page = make_report().to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "adaptive &lt;b&gt;" in page
    assert "&lt;none&gt;" in page
    assert "worst: &quot;x&quot;.png" in page


def test_report_is_self_contained() -> None:
    page = make_report().to_html()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 1


def test_report_is_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    make_report().save(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


def test_cells() -> None:
    assert [format_cell(value) for value in (None, float("nan"), 0.91234, 12.34, 4096, 12345.6, "x", True)] == [
        "–", "–", "0.912", "12.3", "4,096", "12,346", "x", "True"
    ]  # fmt: skip


def test_markdown_table_lines_up() -> None:
    text = markdown_table([{"model": "a|b", "Dice": 0.5}, {"model": "uniform", "Dice": None}])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("|:--")
    assert "a\\|b" in lines[2]
    assert "–" in lines[3]


def test_gallery_keeps_the_best_and_the_worst() -> None:
    gallery = Gallery(("background", "thing"), keep=1, side=120)
    truth = np.zeros((32, 32), np.uint8)
    truth[8:24, 8:24] = 1
    image = torch.rand(3, 32, 32)
    for shift in (4, 0, 8, 2):
        labels = torch.from_numpy(np.roll(truth, shift, 1))
        gallery(f"by {shift}", image, torch.from_numpy(truth), Segmented(labels, uniform_leaves((32, 32), 8), 0.1))
    assert [case.name for case in gallery.cases] == ["by 8", "by 0"]
    assert [round(case.dice, 2) for case in gallery.cases] == [0.5, 1.0]
    assert all(case.picture.shape[1] == 6 + 5 * 126 for case in gallery.cases)


def test_gallery_shows_volumes_and_empty_images() -> None:
    gallery = Gallery(("background", "thing"), side=80)
    empty = torch.zeros(8, 16, 16, dtype=torch.uint8)
    gallery("empty", torch.rand(1, 8, 16, 16), empty, Segmented(empty, uniform_leaves((8, 16, 16), 8), 0.1))
    assert np.isnan(gallery.cases[0].dice)
    assert gallery.cases[0].picture.ndim == 3
