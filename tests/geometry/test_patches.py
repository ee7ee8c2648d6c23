"""Patches: pixels of leaves, resampled, packed and padded."""

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import BudgetError, FormatError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import PaddedPatches, Patches, pack, patchify, patchify_mask
from foveate.geometry.samples import halo_index, sample_area, sample_index
from trees import Tree, random_tree, trees

INTEGERS = [np.uint8, np.uint16, np.int16, np.int32, np.bool_]
FLOATS = [np.float32, np.float64]


def noise(shape: tuple[int, ...], dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * 250).astype(dtype)


def slow_sample(image: np.ndarray, leaves: Leaves, leaf: int, patch_size: int, sample: tuple[int, ...]) -> np.ndarray:
    """Average one sample pixel by pixel, in floating point, from the definition (leaves not smaller than patches)."""
    total, norm = np.zeros(len(image)), 0.0
    start, stop, size = (part[leaf].tolist() for part in (leaves.start, leaves.stop, leaves.size))
    spans = []
    for axis, place in enumerate(sample):
        length = size[axis] / patch_size
        last = int(np.ceil((stop[axis] - start[axis]) / length)) - 1
        at = min(place, last)
        spans.append((start[axis] + at * length, min(start[axis] + (at + 1) * length, stop[axis])))
    for pixel in np.ndindex(*leaves.shape):
        shared = [min(b, p + 1) - max(a, p) for p, (a, b) in zip(pixel, spans, strict=True)]
        if min(shared) > 1e-9:
            total += np.prod(shared) * image[(slice(None), *pixel)]
            norm += np.prod(shared)
    return total / norm


@given(tree=trees(), patch_size=st.integers(1, 9), dtype=st.sampled_from(INTEGERS))
def test_backends_agree_to_the_bit_on_integers(tree: Tree, patch_size: int, dtype: type) -> None:
    leaves = tree()
    image = noise((2, *leaves.shape), dtype)
    fast = patchify(image, leaves, patch_size, backend="numba").pixels
    assert torch.equal(fast, patchify(image, leaves, patch_size, backend="eager").pixels)


@given(tree=trees(), patch_size=st.integers(1, 9), dtype=st.sampled_from(FLOATS))
def test_backends_agree_on_floats(tree: Tree, patch_size: int, dtype: type) -> None:
    leaves = tree()
    image = noise((2, *leaves.shape), dtype)
    fast = patchify(image, leaves, patch_size, backend="numba").pixels
    torch.testing.assert_close(fast, patchify(image, leaves, patch_size, backend="eager").pixels)


@pytest.mark.parametrize("shape", [(7, 10), (3, 6, 5)])
def test_patchify_is_the_area_mean_of_the_definition(shape: tuple[int, ...]) -> None:
    image = noise((2, *shape))
    for patch_size in (1, 2, 3, 4):
        leaves = uniform_leaves(shape, 4)
        pixels = patchify(image, leaves, patch_size).pixels
        for leaf in range(len(leaves)):
            for sample in np.ndindex(*(patch_size,) * len(shape)):
                expected = slow_sample(image, leaves, leaf, patch_size, sample)
                np.testing.assert_allclose(pixels[(leaf, slice(None), *sample)].numpy(), expected, rtol=1e-5)


def test_patchify_is_plain_pooling_copying_and_interpolation() -> None:
    image = torch.rand(3, 8, 8)
    whole = uniform_leaves((8, 8), 8)
    torch.testing.assert_close(patchify(image, whole, 4).pixels[0], F.avg_pool2d(image, 2))
    assert torch.equal(patchify(image, whole, 8).pixels[0], image)
    up = F.interpolate(image[None], (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(patchify(image, whole, 16).pixels, up)
    volume = torch.rand(1, 4, 4, 4)
    up = F.interpolate(volume[None], (8, 8, 8), mode="trilinear", align_corners=False)
    torch.testing.assert_close(patchify(volume, uniform_leaves((4, 4, 4), 4), 8).pixels, up)


def test_patchify_keeps_channels() -> None:
    """The released code reshaped (L, P, P, C) to (C, -1, P*P): channel 0 held all channels in turn."""
    image = np.stack([np.full((32, 48), value, np.uint8) for value in (1, 2, 3)])
    pixels = patchify(image, random_tree((32, 48), 4, 3, 0), 4).pixels
    for channel, value in enumerate((1, 2, 3)):
        assert (pixels[:, channel] == value).all()


@given(tree=trees(), patch_size=st.sampled_from([1, 2, 4, 5]))
def test_tokens_stay_in_their_leaf(tree: Tree, patch_size: int) -> None:
    """The released code mixed pixels of several leaves in one token."""
    leaves = tree()
    index = leaves.locate(torch.cartesian_prod(*(torch.arange(extent) for extent in leaves.shape)))
    image = index.view(1, *leaves.shape).to(torch.int32)
    pixels = patchify(image, leaves, patch_size).pixels
    assert torch.equal(pixels, torch.arange(len(leaves)).view(-1, *(1,) * (leaves.num_dims + 1)).expand_as(pixels))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 37), (1, 37, 1), (2, 300, 211), (1, 512, 38), (5, 17, 17), (1, 7, 6, 33), (2, 1, 1, 1)]
)
def test_any_shape(shape: tuple[int, ...]) -> None:
    """The released code crashed on anything but square powers of two, and on one grey channel."""
    image = noise(shape, np.uint8)
    for size, patch_size in ((16, 16), (16, 8), (8, 16), (12, 5)):
        leaves = uniform_leaves(shape[1:], size)
        patches = patchify(image, leaves, patch_size)
        assert patches.pixels.shape == (len(leaves), shape[0], *(patch_size,) * (len(shape) - 1))
        assert patches.pixels.min() >= image.min()
        assert patches.pixels.max() <= image.max()


@pytest.mark.parametrize("layout", ["channels last", "reversed", "read only", "sliced"])
def test_patchify_reads_any_layout_without_a_copy(layout: str) -> None:
    image = noise((3, 20, 30), np.uint8)
    leaves = uniform_leaves((20, 30), 8)
    expected = patchify(image, leaves, 4).pixels
    if layout == "channels last":
        image = np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1)
    elif layout == "reversed":
        image = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    elif layout == "read only":
        image.flags.writeable = False
    else:
        big = np.zeros((3, 40, 60), np.uint8)
        big[:, ::2, ::2] = image
        image = big[:, ::2, ::2]
    assert torch.equal(patchify(image, leaves, 4).pixels, expected)


def test_patchify_makes_no_image_copies() -> None:
    image = np.zeros((3, 1024, 1024), np.uint16)
    leaves = uniform_leaves((1024, 1024), 64)
    patchify(image, leaves, 4)
    tracemalloc.start()
    patchify(image, leaves, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.nbytes // 10


def test_patchify_takes_half_floats_and_gives_a_gradient() -> None:
    leaves = random_tree((20, 30), 4, 3, 1)
    image = torch.rand(2, 20, 30)
    half = patchify(image.half(), leaves, 4).pixels
    torch.testing.assert_close(half, patchify(image, leaves, 4).pixels, atol=1e-3, rtol=1e-3)
    image.requires_grad_()
    patchify(image, leaves, 4).pixels.sum().backward()
    assert image.grad is not None
    assert (image.grad > 0).all()


def test_patchify_says_what_is_wrong() -> None:
    leaves = uniform_leaves((8, 8), 4)
    with pytest.raises(ShapeError, match=r"\(8, 8\) has no channel axis; use image\[None\]"):
        patchify(np.zeros((8, 8)), leaves)
    with pytest.raises(ShapeError, match=r"\(1, 8, 9\) is not \(C, \*S\)"):
        patchify(np.zeros((1, 8, 9)), leaves)
    with pytest.raises(ShapeError, match="patch_size=0 must be at least 1"):
        patchify(np.zeros((1, 8, 8)), leaves, 0)
    with pytest.raises(FormatError, match=r"complex128 cannot be averaged exactly; .* astype"):
        patchify(np.zeros((1, 8, 8), complex), leaves)
    with pytest.raises(FormatError, match=r"byte-swapped; use image\.astype"):
        patchify(np.zeros((1, 8, 8), ">u2"), leaves)


# masks


@given(tree=trees(), patch_size=st.integers(1, 8), seed=st.integers(0, 99))
def test_soft_labels_are_the_area_means_of_the_one_hot_mask(tree: Tree, patch_size: int, seed: int) -> None:
    leaves = tree()
    mask = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), leaves.shape)
    soft, weight = patchify_mask(mask, leaves, patch_size, 3)
    known = patchify((mask != 255)[None], leaves, patch_size).pixels
    one_hot = patchify(np.stack([mask == label for label in range(3)]), leaves, patch_size).pixels
    torch.testing.assert_close(soft * known, one_hot)
    torch.testing.assert_close(weight, known[:, 0] * sample_area(leaves, patch_size))
    torch.testing.assert_close(soft.sum(1), (known[:, 0] > 0).float())
    if all(side % patch_size == 0 for size in leaves.sizes for side in size):
        assert weight.sum() == (mask != 255).sum()


def test_mask_of_any_integer_type() -> None:
    leaves = uniform_leaves((6, 9), 4)
    mask = np.random.default_rng(0).integers(0, 2, (6, 9))
    expected = patchify_mask(mask, leaves, 2)[0]
    for dtype in (np.uint8, np.int16, np.bool_):
        assert torch.equal(patchify_mask(mask.astype(dtype), leaves, 2)[0], expected)
    assert torch.equal(patchify_mask(torch.from_numpy(mask), leaves, 2)[0], expected)


@pytest.mark.parametrize("label", [2, 254, -1, -7])
def test_unknown_label_is_named(label: int) -> None:
    mask = np.zeros((8, 8), np.int64)
    mask[5, 5] = label
    with pytest.raises(FormatError, match=rf"mask holds label {label}, not in 0..1 or 255"):
        patchify_mask(mask, uniform_leaves((8, 8), 4), 2)


def test_mask_says_what_is_wrong() -> None:
    leaves = uniform_leaves((8, 8), 4)
    with pytest.raises(ShapeError, match=r"is not \(\*S\)"):
        patchify_mask(np.zeros((1, 8, 8), np.uint8), leaves)
    with pytest.raises(FormatError, match="must hold integer labels"):
        patchify_mask(np.zeros((8, 8)), leaves)
    with pytest.raises(BudgetError, match="num_classes=0"):
        patchify_mask(np.zeros((8, 8), np.uint8), leaves, 2, 0)


# samples


@given(tree=trees(), patch_size=st.integers(1, 9))
def test_sample_maps_agree_with_their_eager_twins(tree: Tree, patch_size: int) -> None:
    leaves = tree()
    some = leaves.select(torch.arange(0, len(leaves), 2))
    for part in (leaves, some):
        assert torch.equal(sample_index(part, patch_size), sample_index(part, patch_size, backend="eager"))
        for border in ("empty", "repeat"):
            fast = halo_index(part, patch_size, border=border)
            assert torch.equal(fast, halo_index(part, patch_size, border=border, backend="eager"))


@given(tree=trees(), patch_size=st.integers(1, 9))
def test_sample_areas_sum_to_the_leaf(tree: Tree, patch_size: int) -> None:
    leaves = tree()
    area = sample_area(leaves, patch_size)
    torch.testing.assert_close(area.flatten(1).sum(1), leaves.area.float())
    if all(side % patch_size == 0 for size in leaves.sizes for side in size):
        counts = torch.bincount(sample_index(leaves, patch_size).flatten().long(), minlength=area.numel())
        assert torch.equal(area.flatten(), counts.float())


@pytest.mark.parametrize("shape", [(16, 24), (13, 22), (8, 12, 8), (5, 9, 7)])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_halo_convolution_is_the_dense_convolution(shape: tuple[int, ...], patch_size: int) -> None:
    num = len(shape)
    leaves = uniform_leaves(shape, 4)
    x = torch.randn(len(leaves), 3, *(patch_size,) * num, dtype=torch.float64)
    weight = torch.randn(5, 3, *(3,) * num, dtype=torch.float64)
    conv = F.conv2d if num == 2 else F.conv3d
    counts = [-(-extent // 4) for extent in shape]
    inner = [axis for place in range(num) for axis in (2 + place, 2 + num + place)]

    def dense(tokens: torch.Tensor) -> torch.Tensor:
        grid = tokens.view(*counts, *tokens.shape[1:]).movedim(num, 0).unsqueeze(0)
        order = [0, 1, *inner]
        return grid.permute(order).reshape(1, -1, *(count * patch_size for count in counts))

    rows = x.movedim(1, 0).flatten(1)
    index = halo_index(leaves, patch_size)
    halo = (rows[:, index.clamp(min=0)] * (index >= 0)).movedim(1, 0)
    torch.testing.assert_close(dense(conv(halo, weight)), conv(dense(x), weight, padding=1))


def test_halo_of_unequal_neighbours() -> None:
    """A coarse leaf sees the fine sample under its halo point; a fine leaf sees the coarse sample."""
    leaves = random_tree((4, 8), 2, 2, seed=0).select(torch.tensor([], dtype=torch.int64))
    start = torch.tensor([[0, 0], [0, 4], [0, 6], [2, 4], [2, 6]])
    scale = torch.tensor([1, 0, 0, 0, 0])
    sizes = ((2, 2), (4, 4))
    leaves = Leaves(start, torch.tensor(sizes)[scale], scale, (4, 8), sizes)
    assert halo_index(leaves, 1)[:, 1, 1].tolist() == [0, 1, 2, 3, 4]
    one = halo_index(leaves, 1)
    assert one[0].tolist() == [[-1, -1, -1], [-1, 0, 4], [-1, -1, -1]]
    assert one[1].tolist() == [[-1, -1, -1], [0, 1, 2], [0, 3, 4]]
    two = halo_index(leaves, 2)
    # leaf 0 has samples 0..3 of 2 pixels; beside it leaves 1 and 3 with samples of 1 pixel, hit one pixel in
    assert two[0, 1:3, 3].tolist() == [1 * 4 + 3, 3 * 4 + 3]
    assert two[3, 1:3, 0].tolist() == [3, 3]


# values


def some_patches(seed: int, length: int) -> Patches:
    leaves = uniform_leaves((8, 8 * length), 8)
    return patchify(noise((2, 8, 8 * length), seed=seed), leaves, 4)


def test_packed_and_padded_are_the_same_data() -> None:
    images = [some_patches(seed, length) for seed, length in enumerate((3, 1, 4))]
    patches = pack(images)
    assert patches.lengths == (3, 1, 4)
    assert patches.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert patches.cu_seqlens.dtype == torch.int32
    assert (patches.patch_size, patches.num_images, patches.num_dims) == (4, 3, 2)
    assert patches.boxes.shape == (8, 2, 2)
    padded = patches.pad()
    assert padded.pixels.shape == (3, 4, 2, 4, 4)
    assert padded.valid.sum(1).tolist() == [3, 1, 4]
    assert torch.equal(padded.boxes[padded.valid], patches.boxes)
    assert not padded.pixels[~padded.valid].any()
    assert patches.pad(7).valid.shape == (3, 7)
    for back in (padded.pack(), patches.pad(7).pack(), pack(patches.split())):
        assert torch.equal(back.pixels, patches.pixels)
        assert back.leaves == patches.leaves
    assert patches.to("cpu") is patches
    assert torch.equal(patches.with_pixels(patches.pixels * 2).pixels, patches.pixels * 2)


def test_select_keeps_tokens_and_leaves_together() -> None:
    patches = pack([some_patches(0, 3), some_patches(1, 4)])
    part = patches.select([torch.tensor([2, 0]), torch.tensor([3])])
    assert part.lengths == (2, 1)
    assert torch.equal(part.pixels, patches.pixels[[2, 0, 6]])
    assert torch.equal(part.boxes, patches.boxes[[2, 0, 6]])


def test_values_say_what_is_wrong() -> None:
    patches = some_patches(0, 3)
    with pytest.raises(ShapeError, match="3 patches for 2 leaves"):
        Patches(patches.pixels, (patches.leaves[0].select(torch.arange(2)),))
    with pytest.raises(ShapeError, match="must be \\(tokens, channels"):
        Patches(patches.pixels[..., :3], patches.leaves)
    with pytest.raises(ShapeError, match="must hold 1 images of up to 3 tokens"):
        PaddedPatches(patches.pixels[None, :2], patches.leaves)
    with pytest.raises(BudgetError, match="length=2 must be at least 3"):
        patches.pad(2)
    with pytest.raises(ShapeError, match="cannot be packed"):
        pack([])
