"""Sliding windows: an image segmented part by part, the parts' probabilities blended where they overlap.

Legend: L leaves, K classes, C channels, P samples per side, S image sides, B sides of a window.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.source import Box
from foveate.tasks.cut import cut, share_of
from foveate.tasks.settings import FitConfig

_SHARPNESS = 0.125  # sigma of the blending weight as a share of a window's side, as everywhere
_LEAST = 1e-3  # of that weight, so that corners count


def window_boxes(shape: Sequence[int], window: int, overlap: float) -> Iterator[Box]:
    """Windows that cover an image, evenly stepped, the last ones moved back inside.

    Args:
        shape: spatial shape.
        window: side in pixels; an axis that is shorter is kept whole.
        overlap: least share of a side that neighbours have in common, from 0 to below 1.
    """
    sides = [min(window, side) for side in shape]
    starts = []
    for full, side in zip(shape, sides, strict=True):
        steps = math.ceil((full - side) / max(1, int(side * (1 - overlap))))
        starts.append([min(full - side, step * max(1, int(side * (1 - overlap)))) for step in range(steps + 1)])
    for start in itertools.product(*starts):
        yield start, tuple(low + side for low, side in zip(start, sides, strict=True))


def blend_weight(shape: Sequence[int]) -> Float32[Tensor, "*B"]:
    """How much each pixel of a window counts: a Gaussian around its middle, never less than a thousandth."""
    weight = torch.ones(())
    for side in shape:
        place = (torch.arange(side) - (side - 1) / 2) / (_SHARPNESS * side)
        weight = weight[..., None] * torch.exp(-0.5 * place**2)
    return weight.clamp(min=_LEAST)


def slide_windows(
    image: Float32[Tensor, "C *S"],
    config: FitConfig,
    patch_size: int,
    num_classes: int,
    chances: Callable[[Patches, Box], Float32[Tensor, "K *B"]],
) -> tuple[Float32[Tensor, "L K *P"], Leaves]:
    """Cut every window as training does, ask for the probabilities of its leaves, and blend them.

    Args:
        image: normalised, in the frame that the model works in.
        config: settings of the run; ``predict.window`` is set, ``data.spacing`` is the image's.
        patch_size: samples per side of a token.
        num_classes: K, background included.
        chances: probability of each class at every pixel of a window, from its patches.

    Returns:
        Logarithms of the blended probabilities on a uniform grid of leaves whose samples are the image's pixels, so
        that everything that paints leaves paints them too.

    Cost: the model on every window; a pixel lies in 2 to 8 of them at an overlap of 0.5. Memory of 2 K S floats.
    """
    shape = tuple(image.shape[1:])
    assert config.predict.window is not None
    total, weights = torch.zeros(num_classes, *shape), torch.zeros(shape)
    for box in window_boxes(shape, config.predict.window, config.predict.overlap):
        area = tuple(slice(low, high) for low, high in zip(*box, strict=True))
        part = image[(slice(None), *area)]
        tree = share_of(config.tree, part[0].numel() / image[0].numel(), tuple(part.shape[1:]))
        leaves = cut(part, tree, patch_size, config.data.spacing)
        patches = patchify(part, leaves, patch_size)
        weight = blend_weight(part.shape[1:])
        total[(slice(None), *area)] += weight * chances(patches, box)
        weights[area] += weight
    grid = uniform_leaves(shape, patch_size)
    return patchify(total.div_(weights).clamp_(min=1e-6).log_(), grid, patch_size).pixels, grid
