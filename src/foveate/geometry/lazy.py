"""Tree and patches of an image that is too large to read: coarse levels first, finer ones where they promise something.

The gain of a split is the Haar energy of merging the samples of the children, so it needs only a level as fine as
these, and so do the patches of the children: what is decoded to decide on a split is what its leaves are made of.

Legend: L leaves, C channels, N spatial axes, P patch_size, S spatial shape, K scales.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import ConfigError, FormatError, ShapeError
from foveate.geometry.detail import get_detail
from foveate.geometry.image import Real, as_array, check_finite, plain
from foveate.geometry.lazy_tree import Growth
from foveate.geometry.patches import Patches
from foveate.geometry.source import Source
from foveate.geometry.tree import Size, _Options, cell_sizes


@dataclass(frozen=True)
class Reading:
    """What was decoded of a source; a storage tile counts whole.

    Args:
        levels: spatial shape of every level.
        pixels: pixels decoded of every level.
        tiles: storage tiles decoded of every level.
    """

    levels: tuple[tuple[int, ...], ...]
    pixels: tuple[int, ...]
    tiles: tuple[int, ...]

    @property
    def share(self) -> float:
        """Pixels decoded of all levels over those that level 0 has."""
        return sum(self.pixels) / math.prod(self.levels[0])

    @property
    def share_level_0(self) -> float:
        """Pixels decoded of level 0 over those that it has."""
        return self.pixels[0] / math.prod(self.levels[0])


def lazy_patches(
    source: Source,
    max_leaves: int,
    *,
    patch_size: int = 16,
    min_size: Size | None = None,
    max_size: Size | None = None,
    detail: Any = "residual",
    prior: Shaped[Tensor, "*s"] | Shaped[np.ndarray, "*s"] | None = None,
    prior_weight: Real = 0.0,
    spacing: Sequence[Real] | None = None,
) -> tuple[Patches, Reading]:
    """Cut an image into adaptive leaves and resample them, reading of each level only what the tree needs.

    The coarsest level is read whole and the tree grown as far as it tells; then the cells whose split may be worth a
    leaf are read at the next finer level, and so on. Leaves are resampled from the level whose pixels are their samples
    or divide them. Of a source of one level the result is that of `adaptive_patches`, to the bit; with levels that are
    area means it differs by the leaves whose detail no coarser level gives away.

    Args:
        source: image or volume of one or more levels. Levels count whose downsample is a whole number along each axis
            and divides the samples of the cells; others are not read.
        max_leaves: never more leaves than this, >= 1.
        patch_size: samples per side, P >= 1; the residual is measured against it.
        min_size: side of the smallest leaf in level-0 pixels, or one per axis; default ``patch_size``.
        max_size: upper bound of the side of the largest leaf; default: one cell that covers the image.
        detail: as in `adaptive_leaves`. A map ``[*s]`` may be of any resolution. All but ``"residual"`` are measured on
            a level that is read whole, the coarsest on which no leaf needs a finer one.
        prior: map ``[*s]`` over the image, >= 0, of any resolution, such as a probability of tissue; one more additive
            detail, so that leaves go there first and nothing is thrown away.
        prior_weight: weight of the prior, whose total counts as much as the image's own detail at 1.
        spacing: size of a pixel in mm per axis, as in `adaptive_leaves`; it is not taken from the source.

    Returns:
        The patches of one image with its leaves, and what was read for them.

    Raises:
        BudgetError: ``max_leaves`` is below 1 or the number of roots, or a level that must be held has more pixels than
            fit in memory.
        ShapeError: a size, the spacing or the prior has an impossible shape.
        FormatError: NaN, Inf or negative values in image, map or prior.
        ConfigError: an unknown detail.

    Cost: every tile of a level is decoded at most once; memory O(L C (P f)^N) for levels that are a factor f apart,
    beside the coarsest level.
    Source: Zhang et al., SC24, arXiv 2404.09707.
    **Differs**: see `adaptive_leaves`; the published patcher reads the whole slide.
    """
    num = len(source.shape)
    least = patch_size if min_size is None else min_size
    options = _Options.check(max_leaves, None, least, max_size, patch_size, detail, spacing, "fill", num)
    sizes = cell_sizes(source.shape, options.min_size, options.max_size, options.spacing)
    if not 0 <= prior_weight < math.inf:
        raise ConfigError(f"prior_weight={prior_weight} must be finite and >= 0; 1 counts as much as the image")
    before = None if prior is None else _map(prior, "prior", num)
    growth = Growth(source, sizes, options, before, float(prior_weight))
    if isinstance(detail, np.ndarray | Tensor):
        leaves = growth.by_map(_map(detail, "detail map", num))
    elif detail == "residual":
        leaves = growth.by_residual()
    else:
        leaves = growth.by_detail(get_detail(detail))
    pixels = growth.patches(leaves, patch_size)
    count = growth.count
    return Patches(pixels, (leaves,)), Reading(source.levels, tuple(count.pixels), tuple(count.tiles))


def _map(values: NDArray[Any] | Tensor, name: str, num_dims: int) -> NDArray[Any]:
    """A checked map over the image."""
    found = as_array(values)
    if found.ndim != num_dims or 0 in found.shape:
        raise ShapeError(f"{name} has shape {found.shape}; give {num_dims} axes over the image, none empty")
    found = plain(found)
    check_finite(found, name)
    if found.min() < 0:
        raise FormatError(f"{name} reaches {found.min():.4g}; values must be >= 0, clip it first")
    return found
