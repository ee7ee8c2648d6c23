"""Adaptive leaves: exact, for any shape and count, never wasteful, never starving."""

import heapq
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import draw_tissue, draw_vessels, optimal_error, published_leaves, squared_error

import foveate as fv
from foveate.errors import BudgetError, ConfigError, FormatError, ShapeError
from foveate.geometry import kernels_tree
from foveate.geometry.adaptive import adaptive_patches
from foveate.geometry.edges import edge_map
from foveate.geometry.tree import cell_sizes

SHAPES = st.one_of(st.tuples(*[st.integers(1, 70)] * 2), st.tuples(*[st.integers(1, 24)] * 3))


@cache
def edges_of(side: int, seed: int) -> np.ndarray:
    return edge_map(draw_tissue(side, seed), 3, 75, 125, 0.97) * np.uint8(255)


def detail_map(case: int) -> tuple[np.ndarray, float]:
    """The detail of one case and its norm: noise of all densities, few levels (ties), empty, real edges."""
    rng = np.random.default_rng(case)
    num = 2 if case % 3 else 3
    side = int(rng.choice([8, 16, 32, 64] if num == 2 else [4, 8, 16, 32]))
    shape = (side,) * num
    kind = case % 7
    if kind == 0 and num == 2 and side >= 32:
        return edges_of(side, case % 5), 255.0
    if kind <= 2:
        return (rng.random(shape) < rng.random() ** 2).astype(np.uint8) * np.uint8(255), 255.0
    if kind == 3:
        return np.zeros(shape, np.uint8), 1.0
    if kind == 4:
        return np.full(shape, 3, np.uint8), 1.0
    values = rng.integers(0, int(rng.choice([2, 5, 250])), shape).astype(np.uint8)
    if kind == 5:
        values[tuple(slice(side // 2, None) for _ in shape)] = 0
    return values, 1.0


def check_published(case: int) -> None:
    detail, norm = detail_map(case)
    norm = norm if detail.max() == 255 else 1.0
    rng = np.random.default_rng([case, 1])
    least = int(rng.choice([2, 2, 4]))
    budget = int(rng.integers(1, min(detail.size // 2, 300) + 2))
    image = np.zeros((1, *detail.shape), np.uint8)
    leaves = fv.adaptive_leaves(image, budget, min_size=least, detail=detail, stop="reference")
    found = [(tuple(s), tuple(z)) for s, z in zip(leaves.start.tolist(), leaves.size.tolist(), strict=True)]
    assert found == published_leaves(detail, budget, norm, least), case


def test_ordered_leaves_are_the_published_ones() -> None:
    for case in range(1000):
        check_published(case)


@pytest.mark.slow
def test_ordered_leaves_are_the_published_ones_many() -> None:
    for case in range(1000, 11000):
        check_published(case)


def test_published_order_at_128() -> None:
    for seed, budget in ((0, 700), (1, 1000)):
        detail = edges_of(128, seed)
        leaves = fv.adaptive_leaves(draw_tissue(128, seed), budget, min_size=2, detail=detail, stop="reference")
        assert leaves.start.tolist() == [list(start) for start, _ in published_leaves(detail, budget, 255.0)]


def check_cover(leaves: fv.Leaves, max_leaves: int | None, shape: tuple[int, ...]) -> None:
    assert max_leaves is None or 1 <= len(leaves) <= max_leaves
    assert leaves.shape == shape
    assert leaves.covers()
    canvas = np.zeros(shape, np.int64)
    for start, stop in leaves.boxes.tolist():
        canvas[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] += 1
    assert (canvas == 1).all()
    codes, order = leaves._codes
    assert order.tolist() == list(range(len(leaves)))
    assert (codes.diff() > 0).all()


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, max_leaves=st.integers(1, 400), least=st.sampled_from([1, 2, 3, 8, 16]), seed=st.integers(0, 99))
def test_any_shape(shape: tuple[int, ...], max_leaves: int, least: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 255, (1 + seed % 3, *shape)).astype(np.uint8)
    check_cover(fv.adaptive_leaves(image, max_leaves, min_size=least, patch_size=4), max_leaves, shape)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 97), (64, 1), (300, 300), (512, 384), (1, 1, 1), (64, 64, 32), (5, 1, 33)]
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    check_cover(fv.adaptive_leaves(image, 60, min_size=4), 60, shape)


def test_any_max_leaves() -> None:
    image = draw_tissue(128, 0)
    for max_leaves in range(1, 202):
        found = len(fv.adaptive_leaves(image, max_leaves, min_size=4))
        assert max_leaves - 3 < found <= max_leaves


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, max_size=st.sampled_from([4, 8, (8, 16), 20]), seed=st.integers(0, 9))
def test_forest(shape: tuple[int, ...], max_size: int | tuple[int, int], seed: int) -> None:
    if isinstance(max_size, tuple):
        max_size = (*max_size, 8)[: len(shape)]
    image = np.random.default_rng(seed).random((1, *shape))
    leaves = fv.adaptive_leaves(image, tolerance=0.5, min_size=4, max_size=max_size)
    check_cover(leaves, None, shape)
    assert (leaves.size <= torch.tensor(max_size)).all()


def test_same_image_same_leaves() -> None:
    image = draw_tissue(200, 1)
    first = fv.adaptive_leaves(image, 150, detail="edges")
    for _ in range(3):
        again = fv.adaptive_leaves(torch.from_numpy(image.copy()), 150, detail="edges")
        assert torch.equal(first.start, again.start)
        assert torch.equal(first.size, again.size)


def test_bright_spot_does_not_starve() -> None:
    image = draw_tissue(256, 2).astype(np.float32)
    image[:, 100:102, 100:102] = 1e6
    leaves = fv.adaptive_leaves(image, 196, min_size=2, patch_size=2)
    assert len(leaves) > 193
    spot = leaves.locate(torch.tensor([[100, 100], [200, 30]]))
    assert int(leaves.size[spot[0], 0]) <= 4  # two samples of 4 pixels see the spot without loss
    assert int((leaves.scale == 0).sum()) < 100
    hot = np.zeros((256, 256), np.float32)
    hot[100:102, 100:102] = 1e6
    reference = fv.adaptive_leaves(image, 196, min_size=2, detail=hot + 1.0, stop="reference")
    assert len(reference) < 30  # the published rule ends at the first smallest cell


def test_flat_image_is_not_refined() -> None:
    flat = np.full((3, 128, 128), 77, np.uint8)
    assert len(fv.adaptive_leaves(flat, 100)) == 1
    flat[:, :8, :8] = np.arange(64).reshape(8, 8)
    assert len(fv.adaptive_leaves(flat, 1000, min_size=4, patch_size=4)) == 1 + 5 * 3
    assert len(fv.adaptive_leaves(np.zeros((1, 64, 64), np.uint8), 22, min_size=2, stop="reference")) == 16


def test_constant_part_of_a_float_image_is_not_refined() -> None:
    image = np.full((1, 96, 96), 0.1, np.float64)
    image[0, 50:, :40] += np.random.default_rng(0).random((46, 40))
    leaves = fv.adaptive_leaves(image, 1000, min_size=2, patch_size=2)
    assert (leaves.size[leaves.locate(torch.tensor([[2, 2], [2, 94], [94, 94]]))] >= 32).all()


def test_tolerance_bounds_every_leaf() -> None:
    image = draw_tissue(160, 3)
    leaves = fv.adaptive_leaves(image, tolerance=5000.0, min_size=8)
    padded = np.pad(image, ((0, 0), (0, 96), (0, 96)))
    for start, size in zip(leaves.start.numpy(), leaves.size.numpy(), strict=True):
        inside = (start + size <= 160).all()
        assert not inside or size[0] == 8 or squared_error(padded, [start], [size], 8) <= 5000.0
    capped = fv.adaptive_leaves(image, 50, tolerance=5000.0)
    assert len(capped) <= 50 < len(leaves)
    assert len(fv.adaptive_leaves(image, 10**6, tolerance=5000.0)) == len(leaves)


def test_batch_spends_leaves_where_they_are_needed() -> None:
    busy, quiet = draw_tissue(128, 0), np.full((3, 64, 100), 9, np.uint8)
    one, other = fv.adaptive_leaves_batch([busy, quiet], 100)
    assert len(other) == 1
    assert torch.equal(one.start, fv.adaptive_leaves(busy, 99).start)
    same = fv.adaptive_leaves_batch([busy, busy], 100)
    assert sum(map(len, same)) <= 100
    assert abs(len(same[0]) - len(same[1])) <= 3
    for leaves in same:
        check_cover(leaves, 100, (128, 128))


def test_anisotropic_cells_become_cubic() -> None:
    sizes = cell_sizes((40, 256, 256), (8, 8, 8), None, (3.0, 1.0, 1.0))
    assert sizes[:4] == ((8, 8, 8), (8, 16, 16), (8, 32, 32), (16, 64, 64))
    assert cell_sizes((33, 20), (8, 8)) == ((8, 8), (16, 16), (32, 32), (64, 64))
    volume = np.random.default_rng(0).random((1, 13, 60, 50)).astype(np.float32)
    leaves = fv.adaptive_leaves(volume, 200, min_size=4, spacing=(2.5, 0.7, 0.7))
    check_cover(leaves, 200, (13, 60, 50))


@pytest.mark.parametrize("draw", [draw_tissue, draw_vessels])
@pytest.mark.parametrize("max_leaves", [16, 64, 256])
def test_error_never_above_uniform_and_near_optimal(draw, max_leaves: int) -> None:
    image, patch = draw(256, 5), 8
    least = 4
    leaves = fv.adaptive_leaves(image, max_leaves, min_size=least, patch_size=patch)
    found = squared_error(image, leaves.start.numpy(), leaves.size.numpy(), patch)
    uniform = fv.uniform_leaves((256, 256), 256 // int(max_leaves**0.5))
    assert found <= squared_error(image, uniform.start.numpy(), uniform.size.numpy(), patch)
    best = optimal_error(image, len(leaves), least, patch)
    assert 10 * np.log10(found / best) <= 0.1


def test_tree_cost_is_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 times the leaves take 16 times the splits, each one look at a heap; a list is searched at every split."""
    looks = 0

    def pop(heap: list[object]) -> object:
        nonlocal looks
        looks += 1
        return heapq.heappop(heap)

    counted = SimpleNamespace(heapify=heapq.heapify, heappush=heapq.heappush, heappop=pop)
    monkeypatch.setattr(kernels_tree, "heapq", counted)
    monkeypatch.setattr(kernels_tree, "best_first", kernels_tree.best_first_eager)
    values = np.random.default_rng(0).random((128, 128)).astype(np.float32)
    for max_leaves in (256, 4096):
        looks = 0
        leaves = fv.adaptive_leaves(np.zeros((1, 128, 128), np.uint8), max_leaves, min_size=2, detail=values)
        assert looks == (len(leaves) - 1) // 3


@pytest.mark.parametrize(("side", "max_leaves", "patch"), [(512, 60, 8), (700, 40, 4), (700, 2000, 8), (100, 9, 16)])
def test_patches_in_one_go_are_the_same(side: int, max_leaves: int, patch: int) -> None:
    image = draw_tissue(side, 1)[:, : side - side % 3]
    leaves = fv.adaptive_leaves(image, max_leaves, min_size=patch)
    wanted = fv.patchify(image, leaves, patch)
    for pixels in (image, torch.from_numpy(image)):
        found = adaptive_patches(pixels, max_leaves, patch_size=patch)
        assert torch.equal(found.leaves[0].start, leaves.start)
        assert torch.equal(found.pixels, wanted.pixels)
    volume = np.random.default_rng(0).random((1, 20, 24, 30)).astype(np.float32)
    assert len(adaptive_patches(volume, 40, patch_size=4).pixels) <= 40


BAD = [
    (lambda im: fv.adaptive_leaves(im, 0), BudgetError, "max_leaves=0 must be at least 1"),
    (lambda im: fv.adaptive_leaves(im), BudgetError, "bound nothing"),
    (lambda im: fv.adaptive_leaves(im, tolerance=-1.0), BudgetError, "tolerance=-1.0 must be finite"),
    (lambda im: fv.adaptive_leaves(im, 3, max_size=16), BudgetError, "raise it to 16"),
    (lambda im: fv.adaptive_leaves(im, 3, max_size=4), ShapeError, "max_size=4 must not be below"),
    (lambda im: fv.adaptive_leaves(im, 3, min_size=0), ShapeError, "min_size=0"),
    (lambda im: fv.adaptive_leaves(im, 3, detail="edge"), ConfigError, "detail='edge' is unknown"),
    (lambda im: fv.adaptive_leaves(im, 3, spacing=(1.0,)), ShapeError, "spacing="),
    (lambda im: fv.adaptive_leaves(im[0], 3), ShapeError, "give"),
    (lambda im: fv.adaptive_leaves(im[:, :0], 3), ShapeError, "no empty axis"),
    (lambda im: fv.adaptive_leaves(im / 0 * 0, 3), FormatError, "NaN or Inf"),
    (lambda im: fv.adaptive_leaves(im.astype(complex), 3), FormatError, "no real numbers"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_errors_say_value_rule_and_remedy(call, kind: type[Exception], text: str) -> None:
    image = np.ones((1, 64, 64), np.float32)
    with np.errstate(all="ignore"), pytest.raises(kind, match=re.escape(text)) as caught:
        call(image)
    assert "\n" not in str(caught.value)
