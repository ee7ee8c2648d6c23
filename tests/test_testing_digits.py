"""Megapixel digits and needles: exact truth, seeds, splits that share nothing."""

import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.errors import BudgetError, ConfigError, FormatError
from foveate.geometry.patch_source import GridPatches, PatchSource, constant_of
from foveate.io.geojson import read_marks
from foveate.io.raster import open_raster
from foveate.testing.__main__ import main
from foveate.testing.digits import SIDE, DigitBank, digit_image, read_idx, read_mnist, split_bank, write_digits
from foveate.testing.glyphs import draw_digits
from foveate.testing.needles import NeedleBags, glyphs, needle_bag


def bank(each: int = 10) -> DigitBank:
    labels = np.tile(np.arange(10), each)
    return DigitBank(draw_digits(np.random.default_rng(5), labels, SIDE), labels.astype(np.uint8))


def dense(image) -> np.ndarray:
    return image.pixels.read(((0, 0), image.pixels.shape))[0]


@pytest.mark.parametrize("seed", range(6))
def test_five_digits_lie_where_the_truth_says(seed: int) -> None:
    drawn = digit_image(seed, 600, bank(), noise=20)
    picture, known = dense(drawn), bank()
    for digit, (start, stop) in zip(drawn.digits.tolist(), drawn.boxes.tolist(), strict=True):
        found = picture[start[0] : stop[0], start[1] : stop[1]]
        alike = known.images[known.labels == digit]
        assert (alike == found).all(axis=(1, 2)).any()
        picture[start[0] : stop[0], start[1] : stop[1]] = 0
    counts = np.bincount(drawn.digits, minlength=10)
    assert (counts.sum(), counts.max()) == (5, 3)
    assert drawn.labels == {
        "majority": int(counts.argmax()),
        "max": int(drawn.digits.max()),
        "top": int(drawn.digits[drawn.boxes[:, 0, 0].argmin()]),
        "multi": tuple(np.flatnonzero(counts).tolist()),
    }
    assert picture.any()  # noise


def test_a_seed_means_one_image() -> None:
    ours, same, other = digit_image(3), digit_image(3), digit_image(4)
    assert np.array_equal(ours.pixels.index, same.pixels.index)
    assert not np.array_equal(ours.pixels.index, other.pixels.index)
    assert int(ours.pixels.value.astype(np.int64).sum()) == int(same.pixels.value.astype(np.int64).sum())
    assert ours.pixels.shape == (1500, 1500)


def test_a_large_image_is_never_dense_and_knows_its_blank_patches() -> None:
    drawn = digit_image(0, 12000, scale_noise=True, noise=5)
    grid = GridPatches(drawn.pixels, 50)
    blank = constant_of(grid)
    assert isinstance(grid, PatchSource)
    assert (len(grid), blank is not None) == (57600, True)
    held = set((~blank).nonzero()[:, 0].tolist())
    for start, stop in drawn.boxes.tolist():
        corner = (start[0] // 50) * 240 + start[1] // 50
        assert held & {corner, corner + 1, corner + 240, corner + 241}, stop
    some = torch.tensor(sorted(held)[:50] + (blank).nonzero()[:50, 0].tolist())
    assert torch.equal((grid.read(some).flatten(1) == 0).all(1), blank[some])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 20}, "side=20 is too small for 55 pictures of 28 pixels; raise it or lower noise"),
        ({"side": 120}, "side=120 is too small for 55 pictures"),
        ({"digits": bank().part(0, 3), "side": 600}, "no digit . among the 3 given; give every class from 0 to 9"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    with pytest.raises(BudgetError, match=message):
        digit_image(0, **arguments)


def test_idx_files_are_read_plain_and_compressed(tmp_path: Path) -> None:
    known = bank(2)
    head = b"\0\0\x08\x03" + b"".join(side.to_bytes(4, "big") for side in known.images.shape)
    (tmp_path / "images").write_bytes(head + known.images.tobytes())
    (tmp_path / "labels.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x14" + known.labels.tobytes()))
    found = read_mnist(tmp_path / "images", tmp_path / "labels.gz")
    assert np.array_equal(found.images, known.images)
    assert np.array_equal(found.labels, known.labels)
    with pytest.raises(
        FormatError, match=r"images: holds \(20, 28, 28\) for labels \(20, 28, 28\); give pictures of 28"
    ):
        read_mnist(tmp_path / "images", tmp_path / "images")
    (tmp_path / "images").write_bytes(head + known.images.tobytes()[:-1])
    with pytest.raises(FormatError, match=r"is no IDX file of bytes \(it begins with b'.x00.x00.x08.x03'\)"):
        read_idx(tmp_path / "images")
    (tmp_path / "labels.gz").write_bytes((tmp_path / "labels.gz").read_bytes()[:20])
    with pytest.raises(FormatError, match=r"cannot be read .*; fetch the file again"):
        read_idx(tmp_path / "labels.gz")


def test_parts_of_a_bank_share_no_digit() -> None:
    train, val, test = split_bank(bank(10))
    assert [len(part.labels) for part in (train, val, test)] == [64, 16, 20]
    assert [len(part.labels) for part in split_bank(bank(10), test)] == [80, 20, 20]


@pytest.mark.parametrize("form", ["sparse", "png"])
def test_a_data_set_is_a_folder_and_a_table(tmp_path: Path, form: str) -> None:
    path = write_digits(tmp_path / "set", (3, 1, 2), 400, form=form, noise=5, digits=split_bank(bank(20)))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["split"] for row in rows] == ["train"] * 3 + ["val"] + ["test"] * 2
    truth = [json.loads(line) for line in (tmp_path / "set" / "truth.jsonl").read_text().splitlines()]
    for row, known in zip(rows, truth, strict=True):
        raster = open_raster(tmp_path / "set" / row["path"])
        assert raster.shape == (400, 400)
        (top, left), (bottom, right) = known["boxes"][0]
        assert raster.read(((top, left), (bottom, right))).any()
        assert int(row["top"]) == known["digits"][0]
        assert row["multi"] == ";".join(map(str, sorted(set(known["digits"]))))
        assert int(row["max"]) == max(known["digits"])
        assert read_marks(tmp_path / "set" / row["marks"]).boxes.reshape(-1, 2, 2).tolist() == known["boxes"]
    with pytest.raises(ConfigError, match="form='jpg' must be 'sparse' or 'png'"):
        write_digits(tmp_path / "other", (1, 0, 0), form="jpg")


def test_the_command_line_writes_a_data_set(tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["digits", str(tmp_path / "set"), "--counts", "2", "1", "1", "--side", "300", "--noise", "3"]
    monkeypatch.setattr(sys, "argv", ["testing", *words])
    main()
    assert len(list((tmp_path / "set" / "images").iterdir())) == 4
    words = ["digits", str(tmp_path / "other"), "--mnist", str(tmp_path / "none"), str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["testing", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "cannot be read" in said


@pytest.mark.parametrize("num_patches", [5, 6, 1000])
def test_a_bag_hides_five_needles(num_patches: int) -> None:
    bag = needle_bag(1, num_patches)
    known = glyphs(0, 8, 64)
    for digit, place in zip(bag.digits.tolist(), bag.index.tolist(), strict=True):
        assert (known[digit] == bag.pixels[place, 0]).all(axis=(1, 2)).any()
    empty = (bag.pixels.reshape(num_patches, -1) == 0).all(axis=1)
    assert np.array_equal(bag.blank, empty)
    assert bag.blank.sum() == min(num_patches // 2, num_patches - 5)
    assert bag.labels["majority"] == np.bincount(bag.digits).argmax()
    assert bag.recall(torch.from_numpy(bag.index[:3])) == pytest.approx(0.6)
    assert torch.equal(constant_of(bag.source), torch.from_numpy(bag.blank))
    assert bag.source.read(torch.tensor([0])).shape == (1, 1, 8, 8)


def test_parts_of_the_needles_share_no_glyph() -> None:
    parts = [{one.tobytes() for one in glyphs(part, 8, 64).reshape(-1, 64)} for part in range(3)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert not np.array_equal(needle_bag(0).pixels, needle_bag(0, split="test").pixels)
    assert np.array_equal(needle_bag(7).pixels, needle_bag(7).pixels)


def test_bags_are_drawn_when_asked_for() -> None:
    bags = NeedleBags(1600, 50, "test", seed=2)
    assert len(bags) == 1600
    assert np.array_equal(bags[-1].pixels, needle_bag(3 * 1600 - 1, 50, split="test").pixels)
    assert len(bags[:4]) == 4
    with pytest.raises(IndexError):
        bags[1600]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_patches": 4}, BudgetError, "num_patches=4, blank=0.5, corners=0; give 5 patches at least, a share in"),
        ({"blank": 2}, BudgetError, "num_patches=1000, blank=2, corners=0; give 5 patches"),
        ({"corners": -1}, BudgetError, "corners=-1; give 5 patches at least, a share in .* and 0 corners or more"),
        ({"split": "all"}, ConfigError, "split='all' must be one of train, val, test"),
    ],
)
def test_bags_that_cannot_be_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        needle_bag(0, **arguments)
