"""The compiled loops equal their plain twins."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.geometry import kernels_detail, kernels_gather, kernels_tree
from foveate.geometry import tree as tree_module
from foveate.geometry.pyramid import _fusible, residual_pyramid, sample_sizes, triple
from foveate.geometry.samples import cells_of
from foveate.geometry.tree import cell_sizes


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(64, 180), st.integers(64, 180)),
    cells=st.sampled_from([(8, 8), (16, 16), (4, 8), (16, 4), (8, 2), (8, 12), (2, 2)]),
    seed=st.integers(0, 99),
)
def test_fused_merge_equals_the_eager_pyramid(shape: tuple[int, ...], cells: tuple[int, int], seed: int) -> None:
    least, patch = cells
    image = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    image[:, : shape[1] // 3] = 255 * (seed % 2)
    volume, sizes = image[:, None], cell_sizes(shape[1:], (least, least))
    fast = residual_pyramid(volume, shape[1:], sizes, (patch, patch))
    slow = residual_pyramid(volume, shape[1:], sizes, (patch, patch), backend="eager")
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
        assert np.array_equal(a == 0, b == 0)


def test_the_fused_path_is_taken() -> None:
    image, sizes = np.zeros((3, 1, 256, 256), np.uint8), cell_sizes((256, 256), (8, 8))
    assert _fusible(image, sample_sizes(sizes, (8, 8)), [triple(size) for size in sizes]) == [1, 2, 3, 4]


def test_fused_merge_survives_the_largest_sums() -> None:
    image = np.zeros((1, 256, 256), np.uint8)
    image[:, :128] = 255
    image[:, ::2, ::2] ^= 255
    fast, slow = (
        residual_pyramid(image[:, None], (256, 256), cell_sizes((256, 256), (128, 128)), (2, 2), backend=backend)
        for backend in ("numba", "eager")
    )
    assert [float(v.sum()) for v in fast] == [float(v.sum()) for v in slow]


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    ratio=st.tuples(*[st.sampled_from([1, 2])] * 3),
    extent=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 99),
)
def test_haar_step_equals_eager(shape, ratio, extent, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = rng.random(shape).astype(np.float32)
    length = tuple(int(n * e - rng.integers(0, e)) for n, e in zip(shape[1:], extent, strict=True))
    dims = [-(-n // r) for n, r in zip(shape[1:], ratio, strict=True)]
    out = []
    for step in (kernels_detail.haar_step, kernels_detail.haar_step_eager):
        sums, energy = np.zeros((shape[0], *dims)), np.zeros([n // 2 + 1 for n in dims])
        step(samples, sums, energy, extent, length, ratio, (1, 0, 1), (2, 2, 2))
        out.append((sums, energy))
    np.testing.assert_allclose(out[0][0], out[1][0], rtol=1e-12)
    np.testing.assert_allclose(out[0][1], out[1][1], rtol=1e-6, atol=1e-12)


@given(shape=st.tuples(*[st.integers(1, 12)] * 4), cell=st.tuples(*[st.integers(1, 5)] * 3), kind=st.booleans())
def test_sums_and_histograms_equal_eager(shape, cell, kind: bool) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8 if kind else np.float32)
    dims = [-(-n // c) for n, c in zip(shape[1:], cell, strict=True)]
    for name in ("cell_sum", "variation_sum"):
        fast, slow = np.zeros(dims), np.zeros(dims)
        getattr(kernels_detail, name)(image, fast, cell)
        getattr(kernels_detail, name + "_eager")(image, slow, cell)
        np.testing.assert_array_equal(fast, slow)
    counts = [np.zeros((*dims, 7), np.int32) for _ in range(2)]
    kernels_detail.histogram(image, counts[0], cell, 0.0, 255 / 7)
    kernels_detail.histogram_eager(image, counts[1], cell, 0.0, 255 / 7)
    np.testing.assert_array_equal(*counts)


@given(
    shape=st.one_of(st.tuples(*[st.integers(1, 90)] * 2), st.tuples(*[st.integers(1, 24)] * 3)),
    budget=st.integers(1, 300),
    levels=st.sampled_from([2, 5, 10**6]),
    stop=st.sampled_from(["fill", "reference"]),
    seed=st.integers(0, 99),
)
def test_walk_equals_eager(shape, budget: int, levels: int, stop: str, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)
    image = np.zeros((1, *shape), np.uint8)
    fast = fv.adaptive_leaves(image, budget, min_size=3, detail=values, stop=stop)
    saved, tree_module.kernels.best_first = kernels_tree.best_first, kernels_tree.best_first_eager
    try:
        slow = fv.adaptive_leaves(image, budget, min_size=3, detail=values, stop=stop)
    finally:
        tree_module.kernels.best_first = saved
    assert torch.equal(fast.start, slow.start)
    assert torch.equal(fast.size, slow.size)


def test_tolerance_walk_equals_the_unbounded_search() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 90, 130)).astype(np.uint8)
    image[:, 30:] //= 16
    one = fv.adaptive_leaves(image, tolerance=2000.0, min_size=2, patch_size=2)
    other = fv.adaptive_leaves(image, 10**6, tolerance=2000.0, min_size=2, patch_size=2)
    assert torch.equal(one.start, other.start)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize(("num", "patch"), [(2, 8), (2, 16), (3, 8), (2, 4)])
def test_fast_gather_equals_patchify_eager(dtype: str, num: int, patch: int) -> None:
    rng = np.random.default_rng(0)
    side = 256 if num == 2 else 32
    image = (rng.random((2, *(side,) * num)) * 255).astype(dtype)
    image[..., side // 2 :] = 0
    leaves = fv.adaptive_leaves(image, 200, min_size=patch, patch_size=patch)
    start, _, size = cells_of(leaves)
    sides = (1,) * (3 - num) + (patch,) * num
    out = np.full((len(leaves), 2, *sides), np.nan, np.float32)
    which = np.arange(len(leaves))
    left = kernels_gather.gather(image.reshape(2, *triple((side,) * num)), start, size, sides, which, out)
    wanted = fv.patchify(image, leaves, patch, backend="eager").pixels.numpy().reshape(out.shape)
    done = np.setdiff1d(which, left)
    assert len(done) == len(leaves) or (dtype == "uint8" and patch == 4)
    np.testing.assert_array_equal(out[done], wanted[done])


def test_a_picture_with_channels_last_in_memory_has_the_same_residual() -> None:
    """Files are decoded so; a fused kernel that took rows for words once summed neighbours of other channels."""
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    sizes, view = cell_sizes((128, 128), (16, 16)), image.transpose(2, 0, 1)[:, None]
    found = residual_pyramid(view, (128, 128), sizes, (16, 16))
    expected = residual_pyramid(np.ascontiguousarray(view), (128, 128), sizes, (16, 16))
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)
