"""The one place that turns settings into a tree."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.tasks.settings import TreeConfig


def cut(
    image: Tensor | NDArray[Any],
    tree: TreeConfig,
    patch_size: int,
    spacing: tuple[float, ...] | None = None,
) -> Leaves:
    """Cut an image as the settings say: adaptively, or into a uniform grid.

    Args:
        image: ``[C, *S]``, any value range.
        tree: budget, sizes and measure; ``tree.uniform`` wins over all of them.
        patch_size: samples per side of a token, which the residual is measured against.
        spacing: pixel size in mm per axis, for volumes whose axes differ; ``None``: all axes alike.

    Returns:
        Leaves in the pixel frame of ``image``.

    Raises:
        BudgetError: the budget is smaller than the number of cells that cover the image.
        ShapeError: the image is neither 2-D nor 3-D, or ``spacing`` has another number of axes.

    Cost: one pass over the pixels, plus O(max_leaves).
    """
    shape = tuple(image.shape[1:])
    if tree.uniform is not None:
        return uniform_leaves(shape, tree.uniform)
    from foveate.geometry.tree import adaptive_leaves

    return adaptive_leaves(
        blurred(image, tree.smooth) if tree.smooth else image,
        tree.max_leaves,
        tolerance=tree.tolerance,
        min_size=tree.min_size,
        max_size=tree.max_size,
        patch_size=patch_size,
        detail=tree.detail,
        spacing=spacing,
    )


def share_of(tree: TreeConfig, share: float, shape: Sequence[int] = ()) -> TreeConfig:
    """The settings for a window of an image, with its share of the leaves, so that it is cut as finely as the whole.

    Args:
        tree: settings for the whole image.
        share: pixels of the window over pixels of the image, in (0, 1].
        shape: spatial shape of the window, which gets at least the leaves that cover it.
    """
    if tree.max_leaves is None:
        return tree
    least = 1 if tree.max_size is None else math.prod(-(-side // tree.max_size) for side in shape)
    return replace(tree, max_leaves=max(least, round(tree.max_leaves * share)))


def blurred(image: Tensor | NDArray[Any], sigma: float) -> Float[NDArray[Any], "C *S"]:
    """The image after a Gaussian, as float32: what the measure sees, never what the model sees.

    Photographic noise has detail everywhere; a blur of about its grain lets the budget go to structure instead.

    Args:
        image: ``[C, *S]``.
        sigma: standard deviation in pixels.
    """
    array = np.asarray(image, dtype=np.float32)
    if array.ndim == 3:
        import cv2

        return np.stack([cv2.GaussianBlur(plane, (0, 0), sigma) for plane in np.ascontiguousarray(array)])
    from scipy.ndimage import gaussian_filter

    return np.stack([gaussian_filter(volume, sigma) for volume in array])
