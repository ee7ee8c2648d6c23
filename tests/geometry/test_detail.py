"""Details: constructible, monotone, zero where nothing is lost, the same along every axis."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import draw_tissue, squared_error

import foveate as fv
from foveate.errors import ConfigError, FormatError, FoveateError, ShapeError
from foveate.geometry.detail import Edges, Residual, Smooth, get_detail, list_details, paper_edges
from foveate.geometry.edges import edge_map
from foveate.geometry.image import as_image
from foveate.geometry.pyramid import fold, split_ratios
from foveate.geometry.tree import cell_sizes

MIXED = [{"residual": 1, "tv": 2}, [("edges", 0.5), ("entropy", 0.5)]]
ALL = [*list_details(), *MIXED, Residual(smooth=1.0), Smooth("tv", 1)]
KINDS = ["uint8", "float32", "int16"]


def pyramid(detail: object, image: np.ndarray, least: int = 4, patch: int = 4) -> list[np.ndarray]:
    shape = image.shape[1:]
    return get_detail(detail).pyramid(as_image(image), cell_sizes(shape, (least,) * len(shape)), (patch,) * len(shape))


@pytest.mark.parametrize("detail", ALL, ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 45), (1, 64, 64), (2, 20, 33, 17), (1, 1, 1)])
def test_every_detail_constructs(detail: object, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    sizes = cell_sizes(shape[1:], (4,) * (len(shape) - 1))
    levels = pyramid(detail, image)
    for values, size in zip(levels, sizes, strict=True):
        assert values.shape[-len(size) :] == tuple(-(-n // s) for n, s in zip(shape[1:], size, strict=True))
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
        assert (values >= 0).all()
    for low, high, ratio in zip(levels, levels[1:], split_ratios(sizes), strict=False):
        assert (high >= fold(low, ratio, "max")).all()
    assert len(fv.adaptive_leaves(image, 20, min_size=4, detail=detail)) <= 20


@pytest.mark.parametrize("detail", ALL, ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "uint16", "bool"])
def test_constant_volume_has_zero_detail(detail: object, dtype: str) -> None:
    for shape in ((1, 17, 24, 30), (3, 50, 41)):
        assert max(float(values.max()) for values in pyramid(detail, (np.ones(shape) * 3.3).astype(dtype))) < 1e-9
        assert len(fv.adaptive_leaves((np.ones(shape) * 3.3).astype(dtype), 50, min_size=4, detail=detail)) == 1


@given(seed=st.integers(0, 40), patch=st.sampled_from([1, 2, 4, 8]), kind=st.sampled_from(KINDS))
def test_residual_is_the_squared_error_of_coding(seed: int, patch: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    num = 2 + seed % 2
    image = rng.integers(0, 200, (1 + seed % 2, *(32 if num == 2 else 16,) * num)).astype(kind)
    plain = image.astype(np.uint8 if kind == "uint8" else np.float32)
    levels = pyramid("residual", plain, 4, patch)
    for k, values in enumerate(levels):
        size = np.full(num, 4 << k)
        flat = values.reshape(values.shape[-num:])
        for index in ((0,) * num, tuple(n - 1 for n in flat.shape)):
            exact = squared_error(image, np.array([index]) * size, size[None], patch)
            assert flat[index] == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_residual_counts_only_valid_pixels_at_the_border() -> None:
    image = np.random.default_rng(0).integers(0, 255, (1, 37, 22)).astype(np.uint8)
    root = pyramid("residual", image, 4, 1)[-1]
    assert root.item() == pytest.approx(float(image.var()) * image.size)


def test_lossless_cells_are_exactly_zero() -> None:
    image = np.kron(np.random.default_rng(0).integers(0, 65535, (1, 16, 16)), np.ones((1, 4, 4))).astype(np.float32)
    levels = pyramid("residual", image, 4, 4)
    assert (levels[0] == 0).all()
    assert (levels[2] == 0).all()
    assert (levels[3] > 0).all()


def test_detail_3d_is_isotropic() -> None:
    """A sphere has edges all around and along every axis alike; the released code keeps one half of them."""
    z, y, x = np.mgrid[:48, :48, :48] - 23.5
    sphere = (np.sqrt(z**2 + y**2 + x**2) < 15).astype(np.float32)[None]
    edges = edge_map(sphere, 3, None, None, 0.97)
    assert edges.sum() > 1000
    where = np.argwhere(edges) - 23.5
    assert np.abs(where.mean(0)).max() < 1e-9
    for axis in range(3):
        assert np.array_equal(edges, np.flip(edges, axis))
    assert np.array_equal(edges, edges.transpose(1, 2, 0))
    leaves = fv.adaptive_leaves(sphere, 6000, min_size=2, detail="edges")
    assert abs(float(leaves.centre[leaves.scale == 0].mean()) - 24.0) < 4.0


def test_paper_edges_are_opencv_canny() -> None:
    import cv2

    image = draw_tissue(128, 0)
    wanted = cv2.Canny(cv2.GaussianBlur(np.ascontiguousarray(image.transpose(1, 2, 0)), (3, 3), 0), 100, 200)
    assert np.array_equal(edge_map(image, 3, 100, 200, 0.5) * 255, wanted)
    assert paper_edges() == Edges(blur=3, low=100, high=200)


def test_edges_calibrate_to_low_contrast() -> None:
    image = (draw_tissue(256, 0).astype(np.float32) * 0.15 + 100).astype(np.uint8)
    assert edge_map(image, 3, 100, 200, 0.97).sum() == 0
    assert edge_map(image, 3, None, None, 0.97).mean() > 0.005


def test_noise_floor_leaves_noise_alone() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(100, 5, (1, 256, 256)).astype(np.float32)
    image[:, 64:128, 64:128] += rng.integers(0, 2, (64, 64)) * 60
    noisy = fv.adaptive_leaves(image, 200)
    clean = fv.adaptive_leaves(image, 200, detail=Residual(noise_floor=True))
    inside = ((clean.start >= 64) & (clean.start < 128)).all(1)
    assert len(clean) < len(noisy)
    assert float(inside.float().mean()) > 0.7
    smooth = fv.adaptive_leaves(image, 200, detail=Residual(smooth=2.0))
    assert len(smooth) <= 200


def test_own_map_and_function() -> None:
    image = np.zeros((1, 64, 64), np.uint8)
    values = np.zeros((64, 64), bool)
    values[5, 60] = True
    by_map = fv.adaptive_leaves(image, 40, detail=values)
    by_tensor = fv.adaptive_leaves(image, 40, detail=torch.from_numpy(values).double())
    by_function = fv.adaptive_leaves(image, 40, detail=lambda im: values * np.float32(im.shape[1]))
    assert len(by_map) == 10
    assert torch.equal(by_map.start, by_tensor.start)
    assert torch.equal(by_map.start, by_function.start)


def test_mixture_weights_compare() -> None:
    left, right = np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32)
    left[:8, :8], right[-8:, -8:] = 1e6, 1e-3
    image = np.zeros((1, 64, 64), np.uint8)
    leaves = fv.adaptive_leaves(image, 60, min_size=2, detail=[(left, 1.0), (right, 1.0)])
    at = leaves.start[leaves.scale == 0][:, 1]
    assert (at < 8).any()
    assert (at >= 56).any()


BAD = [
    (np.full((8, 8), -1.0), FormatError, "must be >= 0"),
    (np.full((8, 8), np.nan), FormatError, "NaN or Inf"),
    (np.ones((8, 9)), ShapeError, "one value per pixel"),
    ({}, ConfigError, "one above 0"),
    ({"tv": -1.0}, ConfigError, "one above 0"),
    ("nonsense", ConfigError, "choose one of residual, tv"),
    (Residual, ConfigError, r"Residual\(\)"),
    (3, ConfigError, "not a name"),
]


@pytest.mark.parametrize(("detail", "kind", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_details_say_what_is_wrong(detail: object, kind: type[FoveateError], text: str) -> None:
    with pytest.raises(kind, match=text):
        fv.adaptive_leaves(np.zeros((1, 8, 8), np.uint8), 9, detail=detail)


@pytest.mark.parametrize("make", [lambda: Residual(smooth=-1), lambda: Edges(blur=2), lambda: Edges(quantile=1.0)])
def test_bad_options(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_nan_image_is_refused() -> None:
    image = np.zeros((1, 16, 16), np.float32)
    image[0, 3, 3] = np.inf
    with pytest.raises(FormatError, match="1 NaN or Inf values of 256"):
        fv.adaptive_leaves(image, 4)
