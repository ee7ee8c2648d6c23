"""Pictures: exact to the pixel, legible at any size, for images and volumes."""

from pathlib import Path

import numpy as np
import pytest

from foveate.errors import ShapeError
from foveate.geometry.leaves import uniform_leaves
from foveate.io.write import label_palette
from foveate.tasks import figures

RNG = np.random.default_rng(0)


def test_a_class_has_one_colour_in_masks_outlines_and_pictures() -> None:
    assert tuple(label_palette()[:12]) == (0, 0, 0, *figures.ORANGE, *figures.SKY, *figures.GREEN)
    for value in (1, 7, 8, 19, 20, 254):
        labels = np.zeros((3, 3), np.uint8)
        labels[1, 1] = value  # a region of one pixel is all outline, so its colour is pure
        shown = figures.label_overlay(np.full((3, 3, 3), 200, np.uint8), labels)
        assert shown[1, 1].tolist() == list(label_palette()[3 * value : 3 * value + 3])


def test_to_rgb_keeps_bytes() -> None:
    image = RNG.integers(0, 256, (3, 5, 7), dtype=np.uint8)
    assert np.array_equal(figures.to_rgb(image), image.transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.bool_])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_to_rgb_takes_any_type_and_channel_count(dtype: type, channels: int) -> None:
    image = (RNG.random((channels, 20, 30)) * 500).astype(dtype)
    picture = figures.to_rgb(image)
    assert picture.shape == (20, 30, 3)
    assert picture.dtype == np.uint8
    assert picture.max() > 200


def test_to_rgb_of_constant_image_and_of_volume() -> None:
    assert figures.to_rgb(np.full((1, 4, 4), 7.0)).shape == (4, 4, 3)
    volume = np.zeros((1, 6, 4, 5), np.uint8)
    volume[:, 2] = 9
    assert figures.to_rgb(volume, plane=2).min() == 9
    assert figures.to_rgb(volume).max() == 0


def test_to_rgb_refuses_a_flat_array() -> None:
    with pytest.raises(ShapeError, match=r"\(4, 4\) is not possible; give \[C, H, W\]"):
        figures.to_rgb(np.zeros((4, 4)))


def test_leaf_overlay_draws_one_pixel_lines() -> None:
    image = np.zeros((3, 64, 64), np.uint8)
    picture = figures.leaf_overlay(image, uniform_leaves((64, 64), 32), side=64)
    lines = (picture > 0).any(-1)
    assert lines[0].all()
    assert lines[32].all()
    assert lines[:, 63].all()
    assert not lines[1:31, 1:31].any()


def test_leaf_overlay_keeps_lines_when_it_shrinks_and_in_volumes() -> None:
    big = figures.leaf_overlay(np.zeros((1, 300, 600), np.uint8), uniform_leaves((300, 600), 100), side=60)
    assert big.shape == (30, 60, 3)
    assert (big[:, 10] > 0).any(-1).all()
    volume = figures.leaf_overlay(np.zeros((1, 8, 16, 16), np.uint8), uniform_leaves((8, 16, 16), 8), side=32)
    assert volume.shape == (32, 32, 3)


def test_leaf_overlay_of_a_window_and_of_leaves_of_a_smaller_image() -> None:
    image = np.zeros((3, 64, 64), np.uint8)
    window = (slice(16, 48), slice(24, 56))
    zoomed = figures.leaf_overlay(image, uniform_leaves((64, 64), 32), side=320, window=window)
    lines = (zoomed > 0).any(-1)
    assert lines[160].all()
    assert lines[:, 80].all()
    assert lines.sum() == 4 * 320 - 4
    shrunk = figures.leaf_overlay(image, uniform_leaves((32, 32), 16), side=64)
    assert (shrunk[32] > 0).any(-1).all()


def test_outline_is_the_border_of_the_region() -> None:
    region = np.zeros((9, 9), np.bool_)
    region[2:7, 2:7] = True
    assert figures.outline(region).sum() == 16
    assert figures.outline(region, 2).sum() == 24


def test_error_map_names_every_outcome() -> None:
    truth = np.array([[1, 1, 0, 0, 255]])
    prediction = np.array([[1, 0, 1, 0, 1]])
    picture = figures.error_map(np.zeros((1, 5, 3), np.uint8), prediction, truth)
    greenest = picture[0].argmax(-1)
    assert greenest[0] == 1
    assert greenest[1] == 2
    assert greenest[2] == 0
    assert len({tuple(pixel) for pixel in picture[0]}) == 4


def test_label_and_contour_overlays_leave_their_input_alone() -> None:
    picture = np.full((20, 20, 3), 90, np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    labels[5:10, 5:10], labels[12:18, 12:18], labels[0, 0] = 1, 2, 255
    shown = figures.label_overlay(picture, labels)
    assert (picture == 90).all()
    assert tuple(shown[5, 5]) == figures.ORANGE
    assert tuple(shown[12, 12]) == figures.SKY
    contours = figures.contour_overlay(picture, labels, labels)
    assert tuple(contours[7, 7]) == (90, 90, 90)


def test_heat_overlay_shows_the_picture_where_nothing_is_and_yellow_where_it_is_certain() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    chance = np.zeros((4, 6), np.float32)
    chance[0], chance[1] = 1.0, 0.5
    shown = figures.heat_overlay(picture, chance).astype(int)
    assert (shown[2:] == shown[3, 0, 0]).all()
    assert shown[0, 0, 0] > shown[0, 0, 2] + 50
    assert shown[1, 0, 1] > shown[1, 0, 0]


def test_busiest_window_finds_the_structure() -> None:
    labels = np.zeros((100, 80), np.uint8)
    labels[60:70, 50:60] = 1
    rows, columns = figures.busiest_window(labels, 32)
    assert rows.start <= 60
    assert rows.stop >= 70
    assert columns.start <= 50
    assert columns.stop >= 60
    assert figures.busiest_window(labels, 500)[1] == slice(0, 80)


def test_panel_has_the_size_it_promises() -> None:
    picture = np.zeros((50, 100, 3), np.uint8)
    shown = figures.panel([[picture, picture]], ["image", "truth\nDice 0.9"], side=240, note="small print")
    assert shown.shape[1] == 6 + 2 * 246
    assert (shown[0] == 255).all()
    with pytest.raises(ShapeError, match="do not match 3 titles"):
        figures.panel([[picture, picture]], ["a", "b", "c"])


def test_training_curves_from_records() -> None:
    records = [{"step": step, "seconds": 1.0 * step, "loss": 1 / (step + 1)} for step in range(500)]
    records += [{"step": 500, "seconds": 500.0, "dice": 0.8}, {"step": 501, "seconds": 501.0, "dice": float("nan")}]
    picture = figures.training_curves({"adaptive": records, "uniform": records[:50]}, width=800)
    assert picture.shape[1] == 800
    assert (picture[:, 0] == 255).all()
    assert figures.training_curves({"empty": []}, width=400).shape[2] == 3


def test_save_picture_makes_folders(tmp_path: Path) -> None:
    from PIL import Image

    picture = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    figures.save_picture(tmp_path / "a" / "b.png", picture)
    with Image.open(tmp_path / "a" / "b.png") as saved:
        assert np.array_equal(np.asarray(saved), picture)


def test_a_long_note_goes_on_below() -> None:
    picture = np.zeros((50, 50, 3), np.uint8)
    short, long = (figures.panel([[picture]], ["image"], side=240, note=note) for note in ("words", "words " * 30))
    assert short.shape[1] == long.shape[1]
    assert long.shape[0] > short.shape[0] + 20
    assert (long[:, -6:] == 255).all()  # nothing is cut off at the border
    bottom = [(shown[-20:] < 255).any() for shown in (short, long)]
    assert bottom == [True, True]
