"""Slow, plain oracles: the published greedy search, the optimal pruning, squared errors; images drawn on the spot."""

from collections.abc import Sequence
from itertools import product

import numpy as np

Box = tuple[tuple[int, ...], tuple[int, ...]]


def published_leaves(detail: np.ndarray, max_leaves: int, norm: float = 1.0, least: int = 2) -> list[Box]:
    """The published fixed-length search on a square or cube: (start, size) of every leaf, in its order.

    While there are too few leaves: take the first one of largest value, stop for good if it has the smallest side, else
    put its children in its place (2-D: x fast, y from the far end; 3-D: x fast, then y, then z).
    """
    num = detail.ndim

    def value(start: tuple[int, ...], side: int) -> int:
        return int(detail[tuple(slice(s, s + side) for s in start)].sum() / norm)

    origin = (0,) * num
    leaves = [(origin, detail.shape[0], value(origin, detail.shape[0]))]
    while len(leaves) + 2**num - 1 <= max_leaves:
        best = max(leaf[2] for leaf in leaves)
        i = next(i for i, leaf in enumerate(leaves) if leaf[2] == best)
        start, side, _ = leaves[i]
        if side == least:
            break
        half = side // 2
        steps = [(dy, dx) for dy, dx in product((1, 0), (0, 1))] if num == 2 else list(product((0, 1), repeat=3))
        children = [tuple(s + half * d for s, d in zip(start, step, strict=True)) for step in steps]
        leaves[i : i + 1] = [(child, half, value(child, half)) for child in children]
    return [(start, (side,) * num) for start, side, _ in leaves]


def block_means(image: np.ndarray, start: Sequence[int], size: Sequence[int], patch_size: int) -> np.ndarray:
    """What a decoder with nearest painting returns for one leaf: every pixel is the mean of its sample."""
    cell = image[(slice(None), *(slice(s, s + z) for s, z in zip(start, size, strict=True)))].astype(np.float64)
    out = cell.copy()
    step = [max(1, z // patch_size) for z in size]
    for corner in product(*(range(0, n, s) for n, s in zip(cell.shape[1:], step, strict=True))):
        part = (slice(None), *(slice(c, c + s) for c, s in zip(corner, step, strict=True)))
        axes = tuple(range(1, cell.ndim))
        out[part] = cell[part].mean(axis=axes, keepdims=True)
    return out


def squared_error(image: np.ndarray, start: np.ndarray, size: np.ndarray, patch_size: int) -> float:
    """Squared error of coding an image by the sample means of its leaves."""
    total = 0.0
    for s, z in zip(start, size, strict=True):
        cell = image[(slice(None), *(slice(a, a + b) for a, b in zip(s, z, strict=True)))].astype(np.float64)
        total += float(((cell - block_means(image, s, z, patch_size)) ** 2).sum())
    return total


def optimal_error(image: np.ndarray, max_leaves: int, least: int, patch_size: int) -> float:
    """A lower bound of the squared error of any tree of at most ``max_leaves`` leaves on a square image.

    Optimal pruning (Breiman et al., Gersho): the lower convex hull of error against leaves, by a Lagrange multiplier.
    """
    side = image.shape[1]
    errors: dict[int, np.ndarray] = {}
    size = least
    while size <= side:
        corners = product(range(0, side, size), repeat=2)
        flat = [squared_error(image, [corner], [(size, size)], patch_size) for corner in corners]
        grid = np.array(flat).reshape(side // size, -1)
        errors[size] = grid
        size *= 2

    def best(price: float) -> tuple[float, int]:
        cost, leaves = errors[least].copy(), np.ones_like(errors[least])
        size = least
        while size < side:
            size *= 2
            kids = cost.reshape(side // size, 2, side // size, 2).sum((1, 3))
            count = leaves.reshape(side // size, 2, side // size, 2).sum((1, 3))
            cut = kids + price * count < errors[size] + price
            cost, leaves = np.where(cut, kids, errors[size]), np.where(cut, count, 1)
        return float(cost[0, 0]), int(leaves[0, 0])

    low, high = 0.0, float(errors[side][0, 0]) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if best(middle)[1] <= max_leaves else (middle, high)
    (error, leaves), (under, more) = best(high), best(low)
    if more <= max_leaves:
        return under
    return error + (under - error) * (max_leaves - leaves) / (more - leaves)


def draw_tissue(side: int, seed: int, channels: int = 3) -> np.ndarray:
    """A uint8 picture with large quiet areas, sharp blobs of many sizes and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([200 + 25 * np.sin(3 * x + c) * np.cos(2 * y + c) for c in range(channels)])
    for _ in range(24):
        cy, cx = rng.random(2)
        radius = 0.01 + 0.12 * rng.random() ** 3
        inside = (y - cy) ** 2 + ((x - cx) * (0.5 + rng.random())) ** 2 < radius**2
        image[:, inside] = rng.integers(20, 180, (channels, 1))
    image += rng.normal(0, 2.0, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_vessels(side: int, seed: int) -> np.ndarray:
    """A uint8 grey picture of thin random walks on a smooth ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    image = 120 + 60 * np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) * 4)
    for _ in range(6):
        place, angle = rng.random(2) * side, rng.random() * 7
        for _ in range(2 * side):
            angle += rng.normal(0, 0.15)
            place = (place + np.array([np.sin(angle), np.cos(angle)])) % side
            image[int(place[0]) % side, int(place[1]) % side] -= 40
    return np.clip(image, 0, 255).astype(np.uint8)[None]
