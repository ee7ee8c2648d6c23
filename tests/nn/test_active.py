"""Tables of active leaves: they name the same samples as the tables of all leaves, and each of the others once."""

import pytest
import torch
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.tree import adaptive_leaves
from foveate.nn.active import active_levels
from foveate.nn.halo import HaloMaps


def trees(num_dims: int) -> list[Leaves]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *(32,) * num_dims, generator=generator)
    image[:, : 32 // 2] *= 0.1
    return [
        adaptive_leaves(image, max_leaves=40, min_size=4),
        uniform_leaves((12, 9, 8)[:num_dims], 4),
        adaptive_leaves(image.flip(1), max_leaves=40, min_size=4),
    ]


def place(row_M: Tensor, side: int, num_dims: int) -> Tensor:
    """Leaf and place within it of rows, "M 1+N"."""
    steps = [side**power for power in range(num_dims - 1, -1, -1)]
    return torch.stack([row_M // side**num_dims, *(row_M // step % side for step in steps)], 1)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_dims", [2, 3])
def test_tables_name_the_samples_of_the_whole_pack(num_dims: int, share: float) -> None:
    leaves, sides = trees(num_dims), [1, 2, 4]
    total = sum(map(len, leaves))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    active = order[: round(total * share)].sort().values
    maps, below = HaloMaps(leaves), None
    for side, level in zip(sides, active_levels(leaves, active, sides), strict=True):
        samples = side**num_dims
        assert not bool(torch.isin(level.rim // samples, active).any())
        assert len(level.rim.unique()) == len(level.rim)
        if below is not None:
            own = (active[:, None] * samples + torch.arange(samples)).flatten()
            found = torch.cat([own, level.rim, torch.tensor([-1])])[level.index.long()]
            assert torch.equal(found, maps.at(side)[active].long())
            at, parent = place(level.rim, side, num_dims), place(below.rim, below.side, num_dims)
            of, part = level.origin // 2**num_dims, place(level.origin % 2**num_dims, 2, num_dims)[:, 1:]
            assert torch.equal(parent[of, 0], at[:, 0])
            assert torch.equal(2 * parent[of, 1:] + part, at[:, 1:])
        below = level
    assert len(level.rim) == 0 or share < 1


@pytest.mark.parametrize("active", [[3, 1], [2, 2], [-1, 4], [70, 1000]])
def test_active_leaves_ascend_within_the_pack(active: list[int]) -> None:
    leaves = trees(2)
    with pytest.raises(ShapeError, match=rf"must ascend within 0\.\.{sum(map(len, leaves)) - 1}, got 2 from"):
        active_levels(leaves, torch.tensor(active), [1, 2])
