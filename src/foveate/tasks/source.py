"""From an item of the data to pixels, whole or lazily: what training, validation and prediction share.

An image is *large* when it is read by box: slides, and everything else that comes with levels or does not fit.

Legend: C channels, L leaves, P samples per side, N spatial axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError
from foveate.geometry.patches import Patches
from foveate.geometry.source import Box, Source
from foveate.io.channels import open_channels
from foveate.io.raster import ArrayRaster, Raster, fits_whole, is_held, open_raster
from foveate.io.volume import Volume, is_volume, open_volume
from foveate.tasks.items import Item
from foveate.tasks.resize import limited_shape, shrink_image, shrink_labels
from foveate.tasks.settings import DataConfig, FitConfig, TreeConfig
from foveate.tasks.values import normalise, value_range, with_channels

GLANCE = 2**20
"""Pixels from which the value scale, the tissue and the classes of a large image are found."""

NO_MPP = "does not say the size of its pixels"

NumpyArray = NDArray[Any]


def is_large(raster: Raster) -> bool:
    """Whether an image is read by box: it has coarser levels, or is too large to hold and not held already."""
    return len(raster.levels) > 1 or not (fits_whole(raster.shape) or is_held(raster))


def open_native(item: Item, data: DataConfig) -> Raster:
    """Open an image as it was stored, but volumes that know where they lie in canonical (RAS) axes.

    A model that learned which side is left must see every volume the same way round; labels go back to the file's own
    grid by ``Volume.to_native``. Slides get the coarse levels that they lack, once, see `with_levels`.

    Args:
        item: the image; its ``mpp`` and ``spacing`` win over what the file says.
        data: ``max_pixels``, ``broken`` and ``spacing``, which wins over what a volume says.

    Raises:
        FormatError: the file is unreadable.
    """
    if item.more:
        spacing = item.spacing or (data.spacing if is_volume(item.image) else None)
        return open_channels([item.image, *item.more], spacing=spacing, max_pixels=data.max_pixels, canonical=True)
    if is_volume(item.image):
        spacing = item.spacing or data.spacing
        return open_volume(item.image, spacing=spacing, max_pixels=data.max_pixels, canonical=True)
    raster = open_raster(item.image, mpp=item.mpp, spacing=item.spacing, max_pixels=data.max_pixels, broken=data.broken)
    if not is_large(raster):
        return raster
    from foveate.io.pyramid_cache import with_levels

    return with_levels(raster)


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
            f"{item.image} {NO_MPP}, but data.mpp={data.mpp:g}: give it in a column mpp of "
            "the manifest, to predict with --mpp X (mpp=X), or set data.mpp to null"
        )
    from foveate.io.view import at_mpp

    view = at_mpp(raster, data.mpp)
    if is_large(raster):
        return view
    return ArrayRaster(view.read(whole_box(view.shape)), view.spacing)


def whole_box(shape: Sequence[int]) -> Box:
    """The box of a whole image."""
    return (0,) * len(shape), tuple(shape)


def spacing_of(item: Item, data: DataConfig, raster: Raster) -> tuple[float, ...] | None:
    """Size of a pixel in mm along each axis of an open image, for distances and for the trees of volumes.

    The manifest wins over the settings, and these over the file, which is believed for volumes alone: what a picture
    says of itself is a print resolution more often than not.

    Args:
        item: the image.
        data: the settings.
        raster: what `open_item` returned.
    """
    if isinstance(raster, Volume):
        return raster.spacing
    given = item.spacing or data.spacing
    return raster.spacing if given is None and len(raster.shape) == 3 else given


def glance(raster: Source, limit: int = GLANCE, *, nearest: bool = False) -> Shaped[NumpyArray, "C *B"]:
    """A whole image at low resolution: its finest level of at most ``limit`` pixels, or a coarser view of the last.

    Args:
        raster: the image, or labels.
        limit: most pixels of the result.
        nearest: take single pixels where no level is small enough, as labels need it, and not the mean.

    Returns:
        ``[C, *B]`` in the image's own type, aligned with it: pixel i covers the share i / B of a side.

    Cost: the pixels of that level in bands of about 2^24; ``limit`` of them are held.
    """
    fits = [level for level, shape in enumerate(raster.levels) if math.prod(shape) <= limit]
    if fits:
        return raster.read(whole_box(raster.shape), fits[0])
    last = len(raster.levels) - 1
    full, side = raster.shape, raster.levels[last]
    shape = limited_shape(side, int(max(side) * (limit / math.prod(side)) ** (1 / len(side))))
    rows = max(1, 2**24 * shape[0] // math.prod(side))
    bands = []
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        start = (first * full[0] // shape[0], *(0,) * (len(full) - 1))
        part = raster.read((start, ((first + count) * full[0] // shape[0], *full[1:])), last)
        small = (count, *shape[1:])
        bands.append(shrink_labels(part[0], small)[None] if nearest else shrink_image(part, small))
    return np.concatenate(bands, axis=1)


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
        ConfigError: the settings ask for something that needs the whole image at once, or for sliding windows.
        FormatError: a tile is broken, or the channels do not fit.

    Cost: as `lazy_patches`.
    """
    from foveate.geometry.lazy import lazy_patches
    from foveate.tasks.tissue import tissue_map

    tree = config.tree
    if config.predict.window is not None:
        raise ConfigError(
            f"predict.window={config.predict.window} slides over images that are held, and this one is read by box: "
            "set it to null"
        )
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
        ConfigError: ``tree.uniform``, ``tree.tolerance``, ``tree.smooth``, ``data.max_side``, ``data.resample`` or
            ``data.normalise: zscore`` is set.
    """
    asked = {
        "tree.uniform": tree.uniform is not None,
        "tree.smooth": tree.smooth > 0,
        "tree.tolerance": tree.tolerance is not None or tree.max_leaves is None,
        "data.max_side": data.max_side is not None,
        "data.resample": data.resample is not None,
        "data.normalise='zscore'": data.normalise == "zscore",
    }
    wrong = next((name for name, is_set in asked.items() if is_set), None)
    if wrong is not None:
        remedies = {
            "data.max_side": "data.mpp chooses the resolution",
            "data.resample": "data.mpp chooses the resolution",
            "data.normalise='zscore'": "'image' scales each slide by itself",
        }
        remedy = remedies.get(wrong, "tree.max_leaves is the budget")
        raise ConfigError(f"{wrong} needs images that are read whole, and this one is read by box: unset it; {remedy}")
    assert tree.max_leaves is not None
    return tree.max_leaves
