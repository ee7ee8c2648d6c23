"""Overviews of large images: bands join without seams, coarse probabilities are means of the fine ones."""

import numpy as np
import pytest
import torch

from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.tree import adaptive_leaves
from foveate.io.raster import ArrayRaster
from foveate.tasks import views
from foveate.tasks.figures import to_rgb
from foveate.tasks.painting import Painting
from foveate.testing import synthetic_image

RNG = np.random.default_rng(0)


def test_overview_reads_the_level_that_is_just_large_enough() -> None:
    image = RNG.integers(0, 256, (3, 256, 128), dtype=np.uint8)
    coarse = np.full((3, 64, 32), 7, np.uint8)
    source = ArrayRaster(image, coarser=[image[:, ::2, ::2], coarse])
    assert (views.overview(source, 64) == 7).all()
    assert views.overview(source, 65).shape == (3, 65, 32)
    assert views.overview(source, 65).std() > 1
    assert (views.overview(source, 1000) == image).all()


def test_bands_of_an_overview_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:403, :311].astype(np.float32)
    source = ArrayRaster(np.stack([y, x]))
    whole = views.overview(source, 100)
    monkeypatch.setattr(views, "_HELD", 2 * 311 * 4 * 10)
    assert np.abs(views.overview(source, 100) - whole).max() < 3  # a row of the picture stands for 4.03 of the image
    assert whole.dtype == np.float32


def test_overview_of_a_volume_is_its_middle_plane() -> None:
    volume = np.zeros((1, 6, 20, 30), np.int16)
    volume[:, 3] = 5
    assert (views.overview(ArrayRaster(volume)) == 5).all()


def test_coarse_probability_is_the_mean_of_the_fine_one() -> None:
    image = synthetic_image(256, 0)[0]
    leaves = adaptive_leaves(image, 100, min_size=8)
    values = torch.randn(len(leaves), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fine = views.coarse_probability(values, leaves, 256, 256)
    coarse = views.coarse_probability(values, leaves, 128, 128)
    assert torch.allclose(fine.sum(0), torch.ones(256, 256), atol=1e-5)
    assert torch.allclose(coarse, torch.nn.functional.avg_pool2d(fine, 2), atol=1e-5)


def test_coarse_probability_of_a_volume_is_that_of_its_middle_plane() -> None:
    leaves = uniform_leaves((8, 8, 8), 4)
    values = torch.zeros(8, 2, 4, 4, 4)
    values[4:, 1] = 50.0  # the far half along the first axis, where the middle plane lies
    assert views.coarse_probability(values, leaves, 8, 8)[1].min() > 0.99


def test_mark_covers_the_pixels_that_a_box_touches() -> None:
    labels = np.zeros((10, 10), np.uint8)
    views.mark(labels, [((100, 250), (200, 300))], (1000, 1000))
    assert (labels == 255).sum() == 1
    views.mark(labels, [((7, 0, 0), (8, 100, 100))], (8, 100, 100))  # not in the middle plane
    assert (labels == 255).sum() == 1


@pytest.mark.parametrize("shape", [(300, 200), (9, 60, 40)])
def test_pictures_of_small_images_are_painted_exactly(shape: tuple[int, ...]) -> None:
    image = RNG.integers(0, 256, (1, *shape), dtype=np.uint8)
    leaves = uniform_leaves(shape, 16)
    values = torch.randn(len(leaves), 3, *[4] * len(shape), generator=torch.Generator().manual_seed(0))
    painting = Painting(values, leaves, shape)
    source = ArrayRaster(image)
    assert views.overlay(source, painting).shape[1] >= shape[-1]
    panel = views.heatmap(source, painting, ("background", "one", "two"))
    assert panel.shape[1] > 3 * 512


def test_pictures_of_large_images_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "SIDE", 64)
    image = synthetic_image(256, 0)[0]
    leaves = adaptive_leaves(image, 60, min_size=8)
    values = torch.zeros(len(leaves), 2, 8, 8)
    values[:, 1] = 5.0
    hole = ((0, 0), (64, 64))
    painting = Painting(values, leaves, (256, 256), unknown=[hole])
    monkeypatch.setattr(Painting, "tile", None)  # nothing is painted
    shown = views.overlay(ArrayRaster(image), painting)
    assert max(shown.shape) == 512
    assert shown[10:100, 10:100].mean() < shown[200:, 200:].mean()
    assert to_rgb(views.overview(ArrayRaster(image), 64)).shape == (64, 64, 3)
