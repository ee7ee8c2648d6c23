"""Tree and patches in one go: the sums that price the cells are the area means of the large leaves.

Legend: L leaves, C channels, P patch_size, S spatial axes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.geometry.image import Real, as_array
from foveate.geometry.kernels_gather import sums_gather
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import Patches, patchify
from foveate.geometry.pyramid import Triple, triple
from foveate.geometry.tree import Size, _grow, _Options


def adaptive_patches(
    image: Shaped[Tensor, "C *S"] | Shaped[np.ndarray, "C *S"],
    max_leaves: int | None = None,
    *,
    patch_size: int = 16,
    tolerance: Real | None = None,
    min_size: Size | None = None,
    max_size: Size | None = None,
    detail: Any = "residual",
    spacing: Sequence[Real] | None = None,
) -> Patches:
    """Cut an image into adaptive leaves and resample them, reading the pixels once where it can.

    The same as ``patchify(image, adaptive_leaves(image, ...), patch_size)``, to the bit. For uint8 images and the
    residual the tree already knows the sums that large leaves need, so a large picture is not read a second time.

    Args:
        image: as in `adaptive_leaves`.
        max_leaves: as in `adaptive_leaves`.
        patch_size: samples per side, P >= 1; the residual is measured against it.
        tolerance: as in `adaptive_leaves`.
        min_size: as in `adaptive_leaves`; default ``patch_size``.
        max_size: as in `adaptive_leaves`.
        detail: as in `adaptive_leaves`.
        spacing: as in `adaptive_leaves`.

    Returns:
        The patches of one image, with its leaves.

    Raises:
        As `adaptive_leaves` and `patchify`.

    Cost: one pass over the image, and one read of the leaves that are smaller than 16 P.
    Source: Zhang et al., SC24, arXiv 2404.09707.
    **Differs**: see `adaptive_leaves` and `patchify`.
    """
    least = patch_size if min_size is None else min_size
    num = image.ndim - 1
    options = _Options.check(max_leaves, tolerance, least, max_size, patch_size, detail, spacing, "fill", num)
    array = as_array(image)
    share = array.dtype == np.uint8 and isinstance(detail, str) and detail == "residual"
    keep: dict[Triple, NDArray[Any]] | None = {} if share else None
    leaves = _grow([array], options, keep)[0]
    if not keep:
        return patchify(image, leaves, patch_size)
    pixels = torch.empty((len(leaves), len(array), *(patch_size,) * num))
    rest = _from_sums(keep, leaves, patch_size, pixels)
    if len(rest) == len(leaves):
        return patchify(array, leaves, patch_size)
    if len(rest):
        pixels[rest] = patchify(array, leaves.select(rest), patch_size).pixels
    return Patches(pixels, (leaves,))


def _from_sums(sums: dict[Triple, NDArray[Any]], leaves: Leaves, patch_size: int, pixels: Tensor) -> Tensor:
    """Write the means of all leaves that whole sums make up; return the others."""
    patch = triple((patch_size,) * leaves.num_dims)
    out = pixels.numpy().reshape(len(leaves), pixels.shape[1], *patch)
    start, scale = leaves.start.numpy(), leaves.scale.numpy()
    start = np.pad(start, ((0, 0), (3 - leaves.num_dims, 0)))
    inner = (leaves.stop - leaves.start == leaves.size).all(1).numpy()
    done = np.zeros(len(leaves), bool)
    for k, size in enumerate(leaves.sizes):
        ratio = [s / p for s, p in zip(triple(size), patch, strict=True)]
        fits = [e for e in sums if max(e) > 1 and all(r % step == 0 for r, step in zip(ratio, e, strict=True))]
        which = np.flatnonzero(inner & (scale == k)) if fits else np.zeros(0, np.int64)
        if len(which):
            extent = max(fits)
            times = triple([int(r) // step for r, step in zip(ratio, extent, strict=True)])
            sums_gather(sums[extent], start, which, extent, times, out)
            done[which] = True
    return torch.from_numpy(np.flatnonzero(~done))
