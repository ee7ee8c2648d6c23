"""Tissue is found on white, black and grey ground; nothing is thrown away where there is no telling."""

import numpy as np
import pytest

from foveate.tasks.tissue import otsu, tissue_map


def scene(ground: tuple[int, ...], body: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    inside = np.zeros((64, 96), bool)
    inside[10:40, 20:70] = True
    colours = np.where(inside, np.array(body)[:, None, None], np.array(ground)[:, None, None])
    return np.clip(colours + draw.normal(0, 3, colours.shape), 0, 255).astype(np.uint8), inside


@pytest.mark.parametrize(
    ("ground", "body"),
    [
        ((240, 241, 239), (190, 90, 170)),  # H&E on glass
        ((240, 240, 240), (120, 120, 120)),  # grey tissue on glass
        ((3, 3, 3), (20, 160, 40)),  # fluorescence, three colours
        ((10,), (140,)),  # one channel
        ((200,), (60,)),
        ((8, 8, 8, 8), (90, 10, 10, 60)),  # four channels
    ],
)
def test_tissue(ground: tuple[int, ...], body: tuple[int, ...]) -> None:
    image, inside = scene(ground, body)
    assert (tissue_map(image) == inside).mean() > 0.99


def test_a_volume_and_floats() -> None:
    image, inside = scene((10,), (140,))
    volume = np.stack([image, image], axis=1).astype(np.float32) / 255
    assert (tissue_map(volume) == inside).mean() > 0.99


def test_a_constant_image_is_all_tissue() -> None:
    assert tissue_map(np.full((3, 8, 8), 255, np.uint8)).all()


def test_otsu_separates_two_groups() -> None:
    assert 20 < otsu(np.array([10.0, 11, 12, 200, 201, 202])) < 200
