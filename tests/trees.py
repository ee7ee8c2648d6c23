"""Trees for tests: small, odd in shape, and made without the library's own tree builder."""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from hypothesis import strategies as st

from foveate.geometry.leaves import Leaves

Tree = Callable[[], Leaves]


def random_tree(shape: tuple[int, ...], least: int, num_scales: int, seed: int, anisotropic: bool = False) -> Leaves:
    """Return a forest of cells over ``shape``, cut at random; a cell wholly outside the image does not exist."""
    rng = np.random.default_rng(seed)
    sizes = [(least,) * len(shape)]
    for _ in range(num_scales - 1):
        grow = rng.random(len(shape)) < 0.6 if anisotropic else np.ones(len(shape), bool)
        if not grow.any():
            grow[-1] = True
        sizes.append(tuple(int(side) * (2 if more else 1) for side, more in zip(sizes[-1], grow, strict=True)))
    found: list[tuple[int, tuple[int, ...]]] = []

    def walk(start: tuple[int, ...], scale: int) -> None:
        if any(begin >= extent for begin, extent in zip(start, shape, strict=True)):
            return
        if scale == 0 or rng.random() < 0.4:
            found.append((scale, start))
            return
        steps = [range(0, side, fine) for side, fine in zip(sizes[scale], sizes[scale - 1], strict=True)]
        for step in product(*steps):
            walk(tuple(a + b for a, b in zip(start, step, strict=True)), scale - 1)

    for root in product(*(range(0, extent, side) for extent, side in zip(shape, sizes[-1], strict=True))):
        walk(root, num_scales - 1)
    scale = torch.tensor([item[0] for item in found])
    start = torch.tensor([item[1] for item in found])
    return Leaves(start, torch.tensor(sizes)[scale], scale, shape, tuple(sizes))


@st.composite
def trees(draw: st.DrawFn, num_dims: int | None = None) -> Tree:
    """Draw a tree over an image of any shape, 2-D or 3-D, with cubic or unequal cells; call it to build it.

    It is built outside the strategy because runtime shape checks draw random numbers, which a strategy must not.
    """
    num = draw(st.sampled_from([2, 3])) if num_dims is None else num_dims
    most = 40 if num == 2 else 14
    shape = tuple(draw(st.lists(st.integers(1, most), min_size=num, max_size=num)))
    least, scales = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 4 if num == 2 else 3))
    return partial(random_tree, shape, least, scales, draw(st.integers(0, 2**16)), draw(st.booleans()))
