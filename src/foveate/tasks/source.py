"""From an item of the data to pixels, whole or lazily: what training, validation and prediction share.

An image is *large* when it is read by box: slides, and everything else that comes with levels or does not fit.

Legend: C channels, L leaves, P samples per side, N spatial axes.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError
from foveate.geometry.patches import Patches
from foveate.geometry.source import Box
from foveate.io.raster import ArrayRaster, Raster, open_raster
from foveate.tasks.items import Item
from foveate.tasks.resize import limited_shape, shrink_image
from foveate.tasks.settings import DataConfig, FitConfig, TreeConfig
from foveate.tasks.values import normalise, value_range, with_channels

LARGE = 2**26
"""Pixels above which an image is not read whole, unless its reader holds it anyway."""

GLANCE = 2**20
"""Pixels from which the value scale, the tissue and the classes of a large image are found."""

NumpyArray = NDArray[Any]


def is_large(raster: Raster) -> bool:
    """Whether an image is read by box: it has coarser levels, or is too large to hold and not held already."""
    held = tuple(raster.tile_shape(0)) == tuple(raster.shape)
    return len(raster.levels) > 1 or (math.prod(raster.shape) > LARGE and not held)


def open_native(item: Item, data: DataConfig) -> Raster:
    """Open an image as it was stored, with the sizes that the manifest or the settings say.

    Args:
        item: the image; its ``mpp`` and ``spacing`` win over what the file says.
        data: ``max_pixels``, ``broken`` and, for volumes, ``spacing``.

    Raises:
        FormatError: the file is unreadable.
    """
    return open_raster(item.image, mpp=item.mpp, spacing=item.spacing, max_pixels=data.max_pixels, broken=data.broken)


def open_item(item: Item, data: DataConfig, native: Raster | None = None) -> Raster:
    """Open an image in the frame the model works in: at ``data.mpp`` where that is set, else as it was stored.

    Args:
        item: the image.
        data: the settings.
        native: what `open_native` returned for the item, if it is open already.

    Returns:
        A raster whose level 0 is the working frame; `is_large` says whether to read it whole.

    Raises:
        FormatError: the file is unreadable, or ``data.mpp`` is set and nobody said what size its pixels have.
    """
    raster = open_native(item, data) if native is None else native
    if data.mpp is None:
        return raster
    if raster.spacing is None or len(raster.shape) != 2:
        raise FormatError(
            f"{item.image} does not say the size of its pixels, but data.mpp={data.mpp:g}: give it in a column mpp of "
            "the manifest, or set data.mpp to null"
        )
    from foveate.io.view import at_mpp

    view = at_mpp(raster, data.mpp)
    if is_large(raster):
        return view
    return ArrayRaster(view.read(whole_box(view.shape)), view.spacing)


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of a whole image."""
    return (0,) * len(shape), tuple(shape)


def volume_spacing(item: Item, data: DataConfig, raster: Raster) -> tuple[float, ...] | None:
    """Size of a pixel in mm, for distances and for the trees of volumes.

    The manifest wins over the settings, and these over the file, which is believed for volumes alone: what a picture
    says of itself is a print resolution more often than not.

    Args:
        item: the image.
        data: the settings.
        raster: the image, open.
    """
    given = item.spacing or data.spacing
    if given is not None and len(given) == len(raster.shape):
        return given
    return raster.spacing if len(raster.shape) == 3 else given


def glance(raster: Raster, limit: int = GLANCE) -> Shaped[NumpyArray, "C *B"]:
    """A whole image at low resolution: its finest level of at most ``limit`` pixels, or its coarsest made smaller.

    Args:
        raster: the image.
        limit: most pixels of the result.

    Returns:
        ``[C, *B]`` in the image's own type, aligned with it: pixel i covers the share i / B of a side.
    """
    fits = [level for level, shape in enumerate(raster.levels) if math.prod(shape) <= limit]
    level = fits[0] if fits else len(raster.levels) - 1
    image = raster.read(whole_box(raster.shape), level)
    over = math.prod(image.shape[1:]) / limit
    if over <= 1:
        return image
    shape = limited_shape(image.shape[1:], int(max(image.shape[1:]) / over ** (1 / len(raster.shape))))
    return shrink_image(image, shape)


def slide_patches(raster: Raster, config: FitConfig, patch_size: int) -> Patches:
    """Cut a large image lazily and take its patches, with values as the model sees them.

    The value scale of ``data.normalise: image`` and the tissue map come from one low-resolution look. Channels are
    averaged or repeated, and values limited, after the area means and not before: the same but for saturated pixels.

    Args:
        raster: the image in its working frame, see `open_item`.
        config: settings of the run.
        patch_size: samples per side of a token.

    Returns:
        Patches of one image, normalised.

    Raises:
        ConfigError: the settings ask for something that needs the whole image at once.
        FormatError: a tile is broken, or the channels do not fit.

    Cost: as `lazy_patches`.
    """
    from foveate.geometry.lazy import lazy_patches
    from foveate.tasks.tissue import tissue_map

    tree = config.tree
    budget = check_large(tree, config.data)
    small = glance(raster)
    prior = tissue_map(small) if tree.tissue > 0 else None
    patches, _ = lazy_patches(
        raster,
        budget,
        patch_size=patch_size,
        min_size=tree.min_size,
        max_size=tree.max_size,
        detail=tree.detail,
        prior=prior,
        prior_weight=tree.tissue,
        spacing=raster.spacing if len(raster.shape) == 3 else None,
    )
    seen = with_channels(small, config.data.channels, "the slide")
    pixels = with_channels(patches.pixels.movedim(1, 0).numpy(), config.data.channels, "the slide")
    values = normalise(np.ascontiguousarray(pixels), value_range(seen, config.data), config.data)
    return patches.with_pixels(values.movedim(0, 1).contiguous())


def check_large(tree: TreeConfig, data: DataConfig) -> int:
    """The leaf budget of a large image, after checking that its settings can be met without holding it.

    Raises:
        ConfigError: ``tree.uniform``, ``tree.tolerance``, ``tree.smooth`` or ``data.max_side`` is set.
    """
    asked = {
        "tree.uniform": tree.uniform is not None,
        "tree.smooth": tree.smooth > 0,
        "tree.tolerance": tree.tolerance is not None or tree.max_leaves is None,
        "data.max_side": data.max_side is not None,
    }
    wrong = next((name for name, is_set in asked.items() if is_set), None)
    if wrong is not None:
        remedy = "data.mpp chooses the resolution" if wrong == "data.max_side" else "tree.max_leaves is the budget"
        raise ConfigError(f"{wrong} needs images that are read whole, and this one is read by box: unset it; {remedy}")
    assert tree.max_leaves is not None
    return tree.max_leaves
