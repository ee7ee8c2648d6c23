"""Boxes and cell codes."""

import pytest
import torch

from foveate.errors import BudgetError, ShapeError
from foveate.geometry.boxes import (
    cell_code,
    check_box,
    check_shape,
    check_size,
    check_sizes,
    morton_encode,
    overlap,
    run_lengths,
)


def grid(*counts: int) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.arange(count) for count in counts))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_morton_is_a_z_order(num_dims: int) -> None:
    cells = grid(*(8,) * num_dims)
    code = morton_encode(cells)
    assert sorted(code.tolist()) == list(range(8**num_dims))
    first = cells[code.argsort()][: 2**num_dims]
    assert first.tolist() == grid(*(2,) * num_dims).tolist()  # the last axis is the fastest


def test_cell_code_of_cubic_cells_is_morton() -> None:
    sizes = ((4, 4), (8, 8), (16, 16), (32, 32))
    cells = grid(8, 8)
    assert torch.equal(cell_code(cells, (32, 32), sizes), morton_encode(cells))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((30, 50), ((8, 8), (16, 16))),
        ((40, 9), ((3, 3), (6, 6), (12, 12))),
        ((9, 33, 20), ((4, 2, 2), (4, 4, 4), (8, 8, 8))),
        ((5, 7), ((2, 2),)),
    ],
)
def test_every_cell_is_one_run_of_codes(shape: tuple[int, ...], sizes: tuple[tuple[int, ...], ...]) -> None:
    counts = [-(-extent // side) for extent, side in zip(shape, sizes[0], strict=True)]
    cells = grid(*counts)
    code = cell_code(cells, shape, sizes)
    assert len(code.unique()) == len(code)
    for size, run in zip(sizes, run_lengths(sizes), strict=True):
        ratio = torch.tensor([side // least for side, least in zip(size, sizes[0], strict=True)])
        owner = cells // ratio
        same_cell = (owner[:, None] == owner[None]).all(-1)
        assert torch.equal(same_cell, (code // run)[:, None] == (code // run)[None])


def test_cell_code_refuses_what_63_bits_cannot_number() -> None:
    with pytest.raises(BudgetError, match="63 bits; use a larger min_size"):
        cell_code(torch.zeros(1, 3, dtype=torch.int64), (2**22,) * 3, ((1, 1, 1),))


def test_overlap_counts_shared_pixels() -> None:
    boxes = torch.tensor([[[0, 0], [4, 4]], [[2, 3], [6, 6]], [[4, 0], [5, 1]]])
    assert overlap(boxes, boxes).tolist() == [[16, 2, 0], [2, 12, 0], [0, 0, 1]]


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3, 4), (0, 3), (3, -1)])
def test_check_shape_says_the_rule(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"spatial shape .* must"):
        check_shape(shape)


def test_check_size_says_the_rule() -> None:
    assert check_size(4, 3) == (4, 4, 4)
    assert check_size((4, 2), 2) == (4, 2)
    for bad in (0, (4,), (4, 0)):
        with pytest.raises(ShapeError, match="one integer >= 1, or 2 of them"):
            check_size(bad, 2)


@pytest.mark.parametrize(
    "box",
    [((0, 0), (0, 4)), ((-1, 0), (2, 2)), ((0, 0), (5, 4)), ((0, 0, 0), (1, 1, 1)), ((0, 0),)],
)
def test_check_box_says_the_rule(box: tuple[tuple[int, ...], ...]) -> None:
    assert check_box(((1, 2), (3, 4)), (4, 4)) == ((1, 2), (3, 4))
    with pytest.raises(ShapeError, match="box="):
        check_box(box, (4, 4))


@pytest.mark.parametrize("sizes", [(), ((0, 1),), ((4, 4), (12, 12)), ((4, 4), (4, 4)), ((4, 4), (8, 8, 8))])
def test_check_sizes_says_the_rule(sizes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ShapeError, match="sizes="):
        check_sizes(sizes)
