"""The laws of the design, over every reducer of the geometry, in 2-D and 3-D. Models add theirs beside."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import laws
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import Patches, pack, patchify, patchify_mask
from foveate.geometry.samples import sample_area, sample_index
from foveate.geometry.split import Split, random_keep, soft_topk, topk
from foveate.geometry.tree import adaptive_leaves
from trees import Tree, random_tree, trees

Chooser = Callable[[Tensor, Tensor], Split]


def by_score(x_BLD: Tensor, valid_BL: Tensor) -> Split:
    return topk(x_BLD[..., 0], 2, valid=valid_BL)


def by_soft_score(x_BLD: Tensor, valid_BL: Tensor) -> Split:
    return soft_topk(x_BLD[..., 0], 2, valid=valid_BL)[0]


def tokens(seed: int, num_images: int = 3, length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BLD = torch.randint(-3, 4, (num_images, length, 4), generator=generator).float()
    lengths = torch.randint(2, length + 1, (num_images, 1), generator=generator)
    return x_BLD, torch.arange(length)[None] < lengths


def image_of(leaves: Leaves, seed: int, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, *leaves.shape), dtype=np.uint8)


def uniform(shape: Sequence[int]) -> Callable[[np.ndarray], Leaves]:
    return lambda image: uniform_leaves(shape, 4)


def adaptive(image: np.ndarray) -> Leaves:
    return adaptive_leaves(image, max_leaves=20, min_size=2)


# law 1: inverse


@given(tree=trees(), seed=st.integers(0, 99), patch_size=st.sampled_from([1, 2, 4]))
def test_painting_inverts_patches(tree: Tree, seed: int, patch_size: int) -> None:
    """An image that is constant on the samples comes back to the bit, whatever the tree and the image's shape."""
    leaves = tree()
    if any(side % patch_size for side in leaves.min_size):
        patch_size = 1
    value = np.random.default_rng(seed).normal(size=(2, len(leaves) * patch_size**leaves.num_dims))
    image = torch.from_numpy(value.astype(np.float32))[:, sample_index(leaves, patch_size).long()]
    for backend in ("numba", "eager"):
        laws.inverse(
            lambda x, how=backend: patchify(x, leaves, patch_size, backend=how).pixels,
            lambda x: unpatchify(x, leaves),
            image,
            tolerance=1e-6,
        )
    steps = (image * 50).round().to(torch.int32)  # whole numbers: to the bit
    laws.inverse(lambda x: patchify(x, leaves, patch_size).pixels, lambda x: unpatchify(x, leaves).int(), steps)


@given(tree=trees(), seed=st.integers(0, 99))
def test_patches_invert_painting(tree: Tree, seed: int) -> None:
    leaves = tree()
    pixels = torch.randint(0, 9, (len(leaves), 2, *(1,) * leaves.num_dims)).float()
    laws.inverse(lambda x: unpatchify(x, leaves), lambda x: patchify(x, leaves, 1).pixels, pixels, tolerance=1e-6)


@given(tree=trees(), seed=st.integers(0, 99))
def test_labels_survive_where_they_are_constant(tree: Tree, seed: int) -> None:
    leaves = tree()
    label = np.random.default_rng(seed).integers(0, 3, len(leaves)).astype(np.uint8)
    mask = torch.from_numpy(label)[sample_index(leaves, 1).long()]
    laws.inverse(lambda x: patchify_mask(x, leaves, 2, 3)[0], lambda x: unpatchify(x, leaves).argmax(0).byte(), mask)


@given(seed=st.integers(0, 99), keep=st.integers(1, 6))
def test_restore_inverts_gather(seed: int, keep: int) -> None:
    x_BLD, _ = tokens(seed)
    for split in (
        topk(x_BLD[..., 0], keep),
        soft_topk(x_BLD[..., 0], keep)[0],
        random_keep((3, 6), keep, torch.Generator().manual_seed(seed)),
    ):
        laws.inverse(split.gather, lambda parts, split=split: split.restore(*parts), x_BLD)


# law 2: padding is never data


@pytest.mark.parametrize("choose", [by_score, by_soft_score])
@given(seed=st.integers(0, 99))
def test_padding_is_never_chosen(choose: Chooser, seed: int) -> None:
    x_BLD, valid_BL = tokens(seed)

    def apply(x: Tensor, valid: Tensor) -> Tensor:
        split = choose(x, valid)
        return split.restore(split.gather(x)[0])

    laws.padding_is_never_data(apply, x_BLD, valid_BL)


@given(seed=st.integers(0, 99))
def test_padding_never_moves_the_gate(seed: int) -> None:
    x_BLD, valid_BL = tokens(seed)

    def apply(x: Tensor, valid: Tensor) -> Tensor:
        return soft_topk(x[..., 0], 2, valid=valid)[1][..., None] * x

    laws.padding_is_never_data(apply, x_BLD, valid_BL, tolerance=1e-6)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_padded_patches_hold_the_packed_ones(num_dims: int) -> None:
    def ragged(seed: int) -> Patches:
        leaves = random_tree((11, 14, 9)[:num_dims], 2, 3, seed)
        return patchify(image_of(leaves, seed), leaves, 4)

    patches = pack([ragged(seed) for seed in range(4)])
    longest = max(patches.lengths)
    for length in (longest, longest + 5):
        laws.inverse(lambda one, length=length: one.pad(length), lambda one: one.pack(), patches)


# law 3: batch invariance


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("kind", ["uniform", "adaptive"])
def test_an_image_is_the_same_in_any_batch(num_dims: int, kind: str) -> None:
    shapes = [(19, 12, 8), (8, 8, 8), (5, 30, 9)]
    images = [
        np.random.default_rng(s).random((2, *shape[:num_dims])).astype(np.float32) for s, shape in enumerate(shapes)
    ]

    def cut(batch: list[np.ndarray]) -> list[Patches]:
        make = adaptive if kind == "adaptive" else None
        return pack([patchify(x, make(x) if make else uniform_leaves(x.shape[1:], 4), 2) for x in batch]).split()

    laws.batch_invariance(cut, images)
    laws.batch_invariance(lambda batch: pack(cut(batch)).pad(80).pack().split(), images)


@given(seed=st.integers(0, 99))
def test_a_choice_is_the_same_in_any_batch(seed: int) -> None:
    x_BLD, valid_BL = tokens(seed)
    rows = list(zip(x_BLD, valid_BL, strict=True))

    def choose(batch: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        score, valid = torch.stack([x[:, 0] for x, _ in batch]), torch.stack([v for _, v in batch])
        split, gate = soft_topk(score, 2, valid=valid)
        return list(zip(split.kept, gate, strict=True))

    laws.batch_invariance(choose, rows)


# law 4: chunk invariance


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize("shape", [(21, 30), (9, 12, 7)])
def test_painting_in_windows_is_painting_at_once(mode: str, shape: tuple[int, ...]) -> None:
    leaves = random_tree(shape, 2, 3, 3)
    pixels = torch.randn(len(leaves), 2, *(2,) * len(shape))
    whole = unpatchify(pixels, leaves, mode=mode)
    for step in (1, 4, 50):
        starts = range(0, shape[0], step)
        boxes = [((a, *(0,) * (len(shape) - 1)), (min(a + step, shape[0]), *shape[1:])) for a in starts]
        laws.chunk_invariance(
            lambda box: unpatchify(pixels, leaves, mode=mode, box=box),
            lambda box: whole[:, box[0][0] : box[1][0]],
            boxes,
        )


# law 5: order and determinism


@given(tree=trees(), seed=st.integers(0, 99))
def test_the_order_of_leaves_carries_no_meaning(tree: Tree, seed: int) -> None:
    leaves = tree()
    image = image_of(leaves, seed)
    turn = torch.randperm(len(leaves), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(len(leaves))
    laws.order_invariance(lambda at: patchify(image, leaves.select(at), 2).pixels, place, turn)
    laws.order_invariance(lambda at: sample_area(leaves.select(at), 2), place, turn)
    pixels = torch.randn(len(leaves), 1, *(2,) * leaves.num_dims)
    for mode in ("nearest", "smooth"):
        turned = unpatchify(pixels[turn], leaves.select(turn), mode=mode)
        laws.same(turned, unpatchify(pixels, leaves, mode=mode), "painting permuted leaves")


@pytest.mark.parametrize("shape", [(19, 12), (7, 6, 9)])
def test_geometry_is_deterministic(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random((2, *shape)).astype(np.float32)

    def run() -> list[Tensor]:
        leaves = adaptive(image)
        pixels = patchify(image, leaves, 2).pixels
        generator = torch.Generator().manual_seed(0)
        split, gate = soft_topk(pixels.flatten(1).sum(1)[None], 2, noise=generator)
        chance = random_keep((2, 9), 4, generator)
        return [leaves.start, pixels, unpatchify(pixels, leaves, mode="smooth"), split.kept, gate, chance.kept]

    laws.deterministic(run)


# law 6 (the tree equals the published greedy algorithm) has its oracle beside the tree


@pytest.mark.parametrize("shape", [(19, 12), (7, 6, 9), (1, 1), (1, 33), (40, 3, 3)])
@pytest.mark.parametrize("make", ["uniform", "adaptive"])
def test_leaves_are_a_disjoint_cover(shape: tuple[int, ...], make: str) -> None:
    image = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    leaves = adaptive(image) if make == "adaptive" else uniform(shape)(image)
    assert leaves.covers()
    assert (leaves.area > 0).all()
