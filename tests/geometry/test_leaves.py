"""Leaves: what they promise, and how they are found, kept and stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import BudgetError, FormatError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves


def some_tree(anisotropic: bool = False) -> Leaves:
    """Two roots: one whole, one cut, with one of its children cut again; the image ends inside the last cells."""
    if anisotropic:
        sizes = ((4, 2, 2), (4, 4, 4), (8, 8, 8))
        parts = [(2, (0, 0, 0)), (1, (0, 0, 8)), (1, (0, 0, 12)), (1, (0, 4, 8))]
        parts += [(0, (0, y, x)) for y in (4, 6) for x in (12, 14)]
        parts += [(1, (4, y, x)) for y in (0, 4) for x in (8, 12)]
        shape: tuple[int, ...] = (7, 8, 15)
    else:
        sizes = ((4, 4), (8, 8), (16, 16))
        parts = [(2, (0, 0)), (1, (0, 16)), (0, (0, 24)), (0, (0, 28)), (0, (4, 24)), (0, (4, 28)), (1, (8, 16))]
        parts += [(1, (8, 24))]
        shape = (13, 31)
    scale = torch.tensor([part[0] for part in parts])
    start = torch.tensor([part[1] for part in parts])
    return Leaves(start, torch.tensor(sizes)[scale], scale, shape, sizes)


@pytest.mark.parametrize("anisotropic", [False, True])
def test_locate_finds_the_leaf_that_holds_the_point(anisotropic: bool) -> None:
    leaves = some_tree(anisotropic)
    assert leaves.covers()
    points = torch.cartesian_prod(*(torch.arange(-2, extent + 2) for extent in leaves.shape))
    holds = ((points[:, None] >= leaves.start) & (points[:, None] < leaves.stop)).all(-1)
    expected = torch.where(holds.any(1), holds.long().argmax(1), -1)
    assert torch.equal(leaves.locate(points), expected)
    assert torch.equal(leaves.locate(points + 0.75), expected)

    kept = torch.tensor([5, 0, 3])
    part = leaves.select(kept)
    assert not part.covers()
    expected = torch.where(holds[:, kept].any(1), holds[:, kept].long().argmax(1), -1)
    assert torch.equal(part.locate(points), expected)
    assert leaves.select(torch.zeros(len(leaves), dtype=torch.bool)).locate(points).unique().tolist() == [-1]


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple),
    size=st.integers(1, 17),
)
def test_uniform_leaves_are_a_raster_that_covers_any_shape(shape: tuple[int, ...], size: int) -> None:
    leaves = uniform_leaves(shape, size)
    assert leaves.covers()
    counts = [-(-extent // size) for extent in shape]
    corner = torch.cartesian_prod(*(torch.arange(count) * size for count in counts))
    assert torch.equal(leaves.start, corner)
    assert torch.equal(leaves.locate(leaves.centre.minimum(leaves.stop - 1)), torch.arange(len(leaves)))


def test_border_leaves_know_their_valid_part() -> None:
    leaves = uniform_leaves((5, 9), (4, 6))
    assert leaves.size.tolist() == [[4, 6]] * 4
    assert leaves.stop.tolist() == [[4, 6], [4, 9], [5, 6], [5, 9]]
    assert leaves.area.tolist() == [24, 12, 6, 3]
    assert leaves.centre.tolist() == [[2, 3], [2, 9], [6, 3], [6, 9]]
    assert leaves.boxes.shape == (4, 2, 2)
    assert leaves.to("cpu") is leaves


def test_leaves_are_frozen() -> None:
    with pytest.raises(AttributeError):
        uniform_leaves((4, 4)).shape = (8, 8)  # type: ignore[misc]


def test_saved_leaves_come_back(tmp_path: Path) -> None:
    for leaves in (some_tree(), some_tree(True)):
        leaves.save(tmp_path / "leaves.npz")
        again = Leaves.load(tmp_path / "leaves.npz")
        assert torch.equal(again.start, leaves.start)
        assert torch.equal(again.size, leaves.size)
        assert (again.shape, again.sizes) == (leaves.shape, leaves.sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["leaves.npz"]


def test_interrupted_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "leaves.npz"
    uniform_leaves((8, 8), 4).save(path)
    old = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        uniform_leaves((16, 16), 4).save(path)
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_load_refuses_what_save_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "leaves.npz"
    some_tree().save(path)
    whole = path.read_bytes()
    for bad in (b"", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(bad)
        with pytest.raises(FormatError, match="holds no leaves"):
            Leaves.load(path)
    np.savez(path, start=np.zeros(3))
    with pytest.raises(FormatError, match="holds no leaves"):
        Leaves.load(path)
    some_tree().select(torch.tensor([0, 1, 1])).save(path)
    with pytest.raises(FormatError, match="overlap"):
        Leaves.load(path)


def test_wrong_leaves_are_refused() -> None:
    good = some_tree()
    parts = (good.start, good.size, good.scale)
    for start, size, scale in (
        (good.start.int(), *parts[1:]),
        (good.start[:, :1], *parts[1:]),
        (good.start + 1, *parts[1:]),
        (good.start + 64, *parts[1:]),
        (good.start, good.size * 2, good.scale),
        (good.start, good.size, good.scale + 1),
    ):
        with pytest.raises((ShapeError, TypeError)):  # the executed annotations may speak first
            Leaves(start, size, scale, good.shape, good.sizes)
    with pytest.raises(ShapeError, match="values each"):
        Leaves(*parts, good.shape, ((4, 4, 4),))


def test_uniform_leaves_refuse_impossible_grids() -> None:
    with pytest.raises(ShapeError, match="2 or 3 axes"):
        uniform_leaves((3, 4, 5, 6))
    with pytest.raises(ShapeError, match="size=0 must be one integer >= 1"):
        uniform_leaves((8, 8), 0)
    with pytest.raises(BudgetError, match="use a size"):
        uniform_leaves((10**6, 10**6), 1)
