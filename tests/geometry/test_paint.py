"""Painting: samples back to pixels, and what the round trip keeps of thin structures."""

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import ShapeError
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import patchify, patchify_mask
from trees import Tree, random_tree, trees

MODES = ("nearest", "smooth")


@given(tree=trees(), patch_size=st.integers(1, 8), mode=st.sampled_from(MODES))
def test_backends_agree(tree: Tree, patch_size: int, mode: str) -> None:
    leaves = tree()
    some = leaves.select(torch.arange(0, len(leaves), 2))
    for part in (leaves, some):
        pixels = torch.randn(len(part), 2, *(patch_size,) * part.num_dims)
        fast = unpatchify(pixels, part, mode=mode, backend="numba")
        eager = unpatchify(pixels, part, mode=mode, backend="eager")
        torch.testing.assert_close(fast, eager, atol=1e-5, rtol=1e-5)


@given(tree=trees(), patch_size=st.integers(1, 8), mode=st.sampled_from(MODES))
def test_a_constant_stays_constant(tree: Tree, patch_size: int, mode: str) -> None:
    leaves = tree()
    pixels = torch.full((len(leaves), 1, *(patch_size,) * leaves.num_dims), 0.3)
    for backend in ("numba", "eager"):
        assert (unpatchify(pixels, leaves, mode=mode, backend=backend) == pixels.flatten()[0]).all()


@pytest.mark.parametrize("shape", [(16, 24), (8, 8, 12)])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_ramp_over_equal_leaves_stays_a_ramp(shape: tuple[int, ...], patch_size: int) -> None:
    axes = torch.meshgrid(*(torch.arange(float(extent)) for extent in shape), indexing="ij")
    image = sum((place + 1) * axis for place, axis in enumerate(axes))[None]
    leaves = uniform_leaves(shape, 4)
    painted = unpatchify(patchify(image, leaves, patch_size).pixels, leaves, mode="smooth")
    margin = 2 // patch_size + (patch_size == 1)  # the image border repeats its samples
    inner = (0, *(slice(margin, extent - margin) for extent in shape))
    torch.testing.assert_close(painted[inner], image[inner])


def test_smooth_has_no_step_at_a_seam() -> None:
    leaves = uniform_leaves((8, 32), 8)
    pixels = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1, 1)
    line = unpatchify(pixels, leaves, mode="smooth")[0, 4]
    assert line.diff().abs().max() <= 1 / 8 + 1e-6
    assert unpatchify(pixels, leaves)[0, 4].diff().abs().max() == 1


def test_smooth_ignores_samples_outside_the_image() -> None:
    leaves = uniform_leaves((9, 9), 8)
    pixels = torch.zeros(4, 1, 4, 4)
    pixels[1, :, :, 1:] = pixels[3, :, :, 1:] = 1e9
    pixels[2:, :, 1:] = 1e9
    assert not unpatchify(pixels, leaves, mode="smooth").any()


def test_unpatchify_keeps_probabilities() -> None:
    """The released code cast to int, printed, and crashed on one channel."""
    leaves = random_tree((21, 34), 4, 3, 5)
    for classes in (1, 3):
        probability = torch.rand(len(leaves), classes, 4, 4).softmax(1) * 0.999
        for mode in MODES:
            painted = unpatchify(probability, leaves, mode=mode)
            assert painted.dtype == torch.float32
            assert painted.shape == (classes, 21, 34)
            torch.testing.assert_close(painted.sum(0), torch.full((21, 34), 0.999))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16, torch.bool])
def test_nearest_keeps_the_type(dtype: torch.dtype) -> None:
    leaves = random_tree((21, 34), 4, 3, 5)
    image = (torch.rand(1, 21, 34) > 0.5).to(torch.uint8)
    labels = patchify(image, uniform_leaves((21, 34), 1), 1).pixels.to(dtype)
    painted = unpatchify(labels, uniform_leaves((21, 34), 1))
    assert painted.dtype == dtype
    assert torch.equal(painted, image.to(dtype))
    assert unpatchify(labels[: len(leaves)], leaves, mode="smooth").is_floating_point()


@given(tree=trees(), data=st.data(), mode=st.sampled_from(MODES))
def test_a_window_is_its_part_of_the_image(tree: Tree, data: st.DataObject, mode: str) -> None:
    leaves = tree()
    pixels = torch.randn(len(leaves), 2, *(4,) * leaves.num_dims)
    start = [data.draw(st.integers(0, extent - 1)) for extent in leaves.shape]
    stop = [data.draw(st.integers(low + 1, extent)) for low, extent in zip(start, leaves.shape, strict=True)]
    window = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    for backend in ("numba", "eager"):
        whole = unpatchify(pixels, leaves, mode=mode, backend=backend)
        part = unpatchify(pixels, leaves, mode=mode, box=(start, stop), backend=backend)
        torch.testing.assert_close(part, whole[window], atol=0, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_painting_has_a_gradient(mode: str) -> None:
    leaves = random_tree((9, 14), 2, 3, 1, anisotropic=True)
    pixels = torch.randn(len(leaves), 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpatchify(x, leaves, mode=mode), pixels)
    with torch.no_grad():
        assert not unpatchify(pixels, leaves, mode=mode).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_paint_makes_no_image_copies(mode: str) -> None:
    """The released GPU path repeated the whole image once per leaf: 206 GB for 1,024 leaves of 4096^2."""
    leaves = uniform_leaves((1024, 1024), 32)
    image = np.random.default_rng(0).random((1, 1024, 1024)).astype(np.float32)
    patches = patchify(image, leaves, 8)
    unpatchify(patches.pixels, leaves, mode=mode)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tracemalloc.start()
        patchify(image, leaves, 8)
        unpatchify(patches.pixels, leaves, mode=mode)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert peak < image.nbytes / 4
    assert allocated < 2 * image.nbytes  # the painted image itself, the patches, and small change


def test_unpatchify_says_what_is_wrong() -> None:
    leaves = uniform_leaves((8, 8), 4)
    for bad in (torch.zeros(3, 1, 2, 2), torch.zeros(4, 2, 2), torch.zeros(4, 1, 2, 3)):
        with pytest.raises(ShapeError, match=r"must be \(L, K, \*P\), L = 4"):
            unpatchify(bad, leaves)
    with pytest.raises(ShapeError, match="mode='cubic' must be 'nearest' or 'smooth'"):
        unpatchify(torch.zeros(4, 1, 2, 2), leaves, mode="cubic")
    with pytest.raises(ShapeError, match="inside the image"):
        unpatchify(torch.zeros(4, 1, 2, 2), leaves, box=((0, 0), (9, 8)))


# the ceiling: how much of a true mask survives being cut and painted


def vessels(side: int, seed: int) -> np.ndarray:
    """Draw thin branching lines, 1 to 3 pixels wide."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((side, side), np.uint8)
    for _ in range(12):
        point, angle = rng.random(2) * side, rng.random() * 2 * np.pi
        for _ in range(60):
            angle += rng.normal() * 0.25
            step = point + 8 * np.array([np.sin(angle), np.cos(angle)])
            ends = [(round(x * 16), round(y * 16)) for y, x in (point, step)]
            cv2.line(mask, *ends, color=1, thickness=int(rng.integers(1, 4)), shift=4)
            point = step
    return mask


def dice(left: np.ndarray, right: np.ndarray) -> float:
    return 2 * float((left & right).sum()) / float(left.sum() + right.sum())


def test_thin_structures_survive_better_than_in_the_published_codec() -> None:
    """Area means and smooth painting against nearest-down and cubic-up, leaf by leaf, over one and the same tree."""
    ours, theirs = [], []
    for seed in range(3):
        mask = vessels(256, seed)
        leaves = random_tree((256, 256), 16, 2, seed)
        soft, _ = patchify_mask(mask, leaves, 8, 2)
        ours.append(dice(unpatchify(soft, leaves, mode="smooth")[1].numpy() > 0.5, mask > 0))
        painted = np.zeros((256, 256), np.float32)
        for (y, x), (height, width) in zip(leaves.start.tolist(), leaves.size.tolist(), strict=True):
            crop = mask[y : y + height, x : x + width]
            small = cv2.resize(crop, (8, 8), interpolation=cv2.INTER_NEAREST).astype(np.float32)
            painted[y : y + height, x : x + width] = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        theirs.append(dice(painted > 0.5, mask > 0))
    assert np.mean(ours) > np.mean(theirs) + 0.08, (ours, theirs)
