"""Painting classes: the argmax of smooth painting, and tiles that need no painting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import FormatError, ShapeError
from foveate.geometry.labels import LabelPainter
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.paint import unpatchify
from trees import Tree, trees

Box = tuple[tuple[int, ...], tuple[int, ...]]


def windows(shape: tuple[int, ...], seed: int, count: int = 4) -> list[Box]:
    rng = np.random.default_rng(seed)
    ends = [np.sort(rng.choice(side + 1, 2, replace=False)) for _ in range(count) for side in shape]
    boxes = [ends[i : i + len(shape)] for i in range(0, len(ends), len(shape))]
    some = [(tuple(int(a) for a, _ in box), tuple(int(b) for _, b in box)) for box in boxes]
    return [((0,) * len(shape), shape), *some]


def dense(found: Tensor | int, box: Box) -> Tensor:
    sides = [b - a for a, b in zip(*box, strict=True)]
    return found if isinstance(found, Tensor) else torch.full(sides, found, dtype=torch.uint8)


def blocky(num: int, classes: int, patch: int, num_dims: int, seed: int) -> Tensor:
    """Values in which many leaves are of one class, and some samples are equal."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, (num, classes, *(patch,) * num_dims), generator=rng).float()
    strong = torch.randint(0, classes, (num,), generator=rng)
    strong[: num // 2] = 0
    values[torch.arange(num), strong] += 9 * torch.randint(0, 2, (num,), generator=rng).view(-1, *(1,) * num_dims)
    return values


@given(tree=trees(), patch=st.integers(1, 4), classes=st.integers(1, 4), seed=st.integers(0, 99))
def test_tiles_are_the_argmax_of_smooth_painting(tree: Tree, patch: int, classes: int, seed: int) -> None:
    leaves = tree()
    leaves = leaves if seed % 3 else leaves.select(torch.arange(0, len(leaves), 2))
    values = blocky(len(leaves), classes, patch, leaves.num_dims, seed)
    values = values if seed % 2 else values + torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    painter = LabelPainter(values, leaves)
    for box in windows(leaves.shape, seed):
        expected = unpatchify(values, leaves, mode="smooth", box=box)
        assert torch.equal(dense(painter.tile(box), box), expected.argmax(0).byte())
        torch.testing.assert_close(painter.probability(box), expected.softmax(0))


def test_a_tile_of_one_class_is_a_number() -> None:
    leaves = uniform_leaves((64, 64), 16)
    values = torch.zeros(16, 3, 4, 4)
    values[:, 2] = 1.0
    values[0, 1] = 5.0  # the first corner is of another class, and reaches into its neighbours
    painter = LabelPainter(values, leaves)
    assert painter.tile(((32, 32), (64, 64))) == 2
    assert isinstance(painter.tile(((0, 0), (12, 12))), Tensor)
    mixed = painter.tile(((0, 0), (64, 64)))
    assert isinstance(mixed, Tensor)
    assert set(mixed.unique().tolist()) == {1, 2}


def test_equal_values_are_painted_and_go_to_the_lowest_class() -> None:
    leaves = uniform_leaves((8, 8), 4)
    found = LabelPainter(torch.full((4, 3, 2, 2), 0.7), leaves).tile(((0, 0), (8, 8)))
    assert isinstance(found, Tensor)
    assert not found.any()


def test_pixels_without_a_leaf_are_class_0() -> None:
    leaves = uniform_leaves((8, 8), 4).select(torch.tensor([0]))
    values = torch.zeros(1, 2, 2, 2)
    values[:, 1] = 1
    painter = LabelPainter(values, leaves)
    assert painter.tile(((0, 0), (4, 4))) == 1
    assert painter.tile(((4, 4), (8, 8))) == 0
    whole = painter.tile(((0, 0), (8, 8)))
    assert isinstance(whole, Tensor)
    assert int(whole.sum()) == 16


@pytest.mark.parametrize("shape", [(23, 31), (40, 64), (9, 7)])
def test_another_frame_is_interpolated_between_painted_pixels(shape: tuple[int, int]) -> None:
    leaves = uniform_leaves((20, 16), 4)
    values = torch.randn(len(leaves), 3, 2, 2, generator=torch.Generator().manual_seed(1))
    painter = LabelPainter(values, leaves, shape)
    painted = unpatchify(values, leaves, mode="smooth")
    expected = torch.nn.functional.interpolate(painted[None], shape, mode="bilinear", align_corners=False)[0]
    for box in windows(shape, 5):
        area = (slice(None), *(slice(a, b) for a, b in zip(*box, strict=True)))
        torch.testing.assert_close(painter.probability(box), expected[area].softmax(0))
        second, first = expected[area].sort(0).values[-2:]
        clear = first - second > 1e-4
        assert torch.equal(dense(painter.tile(box), box)[clear], expected[area].argmax(0).byte()[clear])
    values[:, 1] = 50
    assert LabelPainter(values, leaves, shape).tile(((1, 2), (8, 7))) == 1


def test_values_that_cannot_be_painted_are_refused() -> None:
    leaves = uniform_leaves((8, 8), 4)
    with pytest.raises(ShapeError, match=r"values \(3, 2, 2, 2\) must be \(L, K, \*P\), L = 4"):
        LabelPainter(torch.zeros(3, 2, 2, 2), leaves)
    with pytest.raises(ShapeError, match="300 classes; a label of one byte names 1 to 256"):
        LabelPainter(torch.zeros(4, 300, 1, 1), leaves)
    with pytest.raises(FormatError, match="values to paint hold NaN or Inf; replace them"):
        LabelPainter(torch.full((4, 2, 1, 1), torch.nan), leaves)
    with pytest.raises(ShapeError, match=r"shape \(8, 8, 8\) has other axes than the leaves \(8, 8\)"):
        LabelPainter(torch.zeros(4, 2, 1, 1), leaves, (8, 8, 8))
    with pytest.raises(ShapeError, match="inside the image"):
        LabelPainter(torch.zeros(4, 2, 1, 1), leaves).tile(((0, 0), (9, 8)))
