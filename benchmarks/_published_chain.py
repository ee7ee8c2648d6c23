"""The published adaptive patching, re-implemented plainly as the thing to compare with.

Blur, Canny, a list that is searched for its first largest node and spliced at every split, one cubic resize per leaf;
in 3-D slice-wise edges and one linear interpolator per leaf. Written from the description of the algorithm (Zhang et
al., SC24; Listing 1 of its successor), with its stop rule and its costs and without its random thresholds.
"""

from itertools import product

import numpy as np

Node = tuple[tuple[int, ...], int, int]  # start, side, value


def edges_2d(image_CHW: np.ndarray, blur: int = 3, low: int = 75, high: int = 125) -> np.ndarray:
    """0/255 edge map of a uint8 image."""
    import cv2

    pixels = np.ascontiguousarray(image_CHW.transpose(1, 2, 0))
    return cv2.Canny(cv2.GaussianBlur(pixels, (blur, blur), 0), low, high)


def edges_3d(volume_CDHW: np.ndarray, sigma: float = 1.0, low: int = 75, high: int = 125) -> np.ndarray:
    """0/255 edge map of a float volume in [0, 1]: Gaussian, then Canny on every slice of the first channel."""
    import cv2
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(volume_CDHW[0], sigma)
    return np.stack([cv2.Canny((plane * 255).astype(np.uint8), low, high) for plane in smooth])


def greedy_tree(edges: np.ndarray, max_leaves: int, norm: int = 255, least: int = 2) -> list[Node]:
    """Split the first node of largest value until there are enough leaves or a smallest node comes up."""

    def node(start: tuple[int, ...], side: int) -> Node:
        box = tuple(slice(s, s + side) for s in start)
        return start, side, int(np.sum(edges[box]) / norm)

    nodes = [node((0,) * edges.ndim, edges.shape[0])]
    while len(nodes) < max_leaves:
        largest = max(nodes, key=lambda entry: entry[2])
        i = nodes.index(largest)
        start, side, _ = largest
        if side == least:
            break
        half = side // 2
        steps = ((1, 0), (1, 1), (0, 0), (0, 1)) if edges.ndim == 2 else tuple(product((0, 1), repeat=3))
        children = [node(tuple(s + half * d for s, d in zip(start, step, strict=True)), half) for step in steps]
        nodes = nodes[:i] + children + nodes[i + 1 :]
    return nodes


def patches_2d(image_CHW: np.ndarray, nodes: list[Node], patch_size: int) -> np.ndarray:
    """Every leaf by one cubic resize, ``[L, P, P, C]`` float32."""
    import cv2

    pixels = image_CHW.transpose(1, 2, 0)
    if not pixels.flags.c_contiguous:
        pixels = np.ascontiguousarray(pixels)
    found = []
    for (y, x), side, _ in nodes:
        part = pixels[y : y + side, x : x + side]
        found.append(cv2.resize(part, (patch_size, patch_size), interpolation=cv2.INTER_CUBIC))
    return np.asarray(found, np.float32)


def patches_3d(volume_CDHW: np.ndarray, nodes: list[Node], patch_size: int) -> np.ndarray:
    """Every leaf by one linear interpolator per channel, ``[L, C, P, P, P]`` float32."""
    from scipy.interpolate import RegularGridInterpolator

    found = []
    for start, side, _ in nodes:
        axis = np.linspace(0, side, side)
        want = np.linspace(0, side, patch_size)
        points = np.stack(np.meshgrid(want, want, want, indexing="ij"), -1).reshape(-1, 3)
        part = volume_CDHW[(slice(None), *(slice(s, s + side) for s in start))]
        cells = [RegularGridInterpolator((axis, axis, axis), channel)(points) for channel in part]
        found.append(np.stack(cells).reshape(-1, patch_size, patch_size, patch_size))
    return np.asarray(found, np.float32)


def chain_2d(image_CHW: np.ndarray, max_leaves: int, patch_size: int, least: int = 2) -> np.ndarray:
    """Image to patches."""
    nodes = greedy_tree(edges_2d(image_CHW), max_leaves, least=least)
    return patches_2d(image_CHW, nodes, patch_size)


def chain_3d(volume_CDHW: np.ndarray, max_leaves: int, patch_size: int, least: int = 2) -> np.ndarray:
    """Volume to patches."""
    nodes = greedy_tree(edges_3d(volume_CDHW), max_leaves, least=least)
    return patches_3d(volume_CDHW, nodes, patch_size)
