"""Where an image shows something: tissue on a slide, an object on a plain background.

Legend: C channels, S image sides.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray

NumpyArray = NDArray[Any]


def tissue_map(image: Shaped[NumpyArray, "C *S"]) -> Bool[NumpyArray, "*S"]:
    """What is not background, by one threshold found in the image itself.

    A stained slide is colour on white or on black glass: its saturation is split, and what is neither bright nor dark
    glass counts too, so that grey or black tissue is kept. Any other image is split by its brightness, and what
    is further from the most frequent value is the object.

    Args:
        image: a low-resolution view, any number type; 3 channels are taken for colour.

    Returns:
        True on tissue; all True where nothing can be told apart.

    Cost: a few passes; meant for about 2^20 pixels.
    """
    values = image.astype(np.float32)
    high, low = values.max(axis=0), values.min(axis=0)
    if len(image) == 3:
        spread = high - low
        away = np.maximum(spread, np.abs(low - _mode(low)) / 2)
    else:
        mean = values.mean(axis=0)
        away = np.abs(mean - _mode(mean))
    if float(away.max()) <= 0:
        return np.ones(away.shape, dtype=bool)
    tissue: NumpyArray = away > otsu(away)
    return tissue if tissue.any() else np.ones(away.shape, dtype=bool)


def otsu(values: Shaped[NumpyArray, "..."]) -> float:
    """The threshold that separates two groups of values best (largest variance between them), of 256.

    Source: Otsu, IEEE Trans. SMC 9(1), 1979.
    """
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    total = np.cumsum(counts * centres)
    apart = np.where(
        (below > 0) & (above > 0),
        below * above * (total[:-1] / np.maximum(below, 1) - (total[-1] - total[:-1]) / np.maximum(above, 1)) ** 2,
        0.0,
    )
    return float(edges[1:-1][apart >= apart.max() * (1 - 1e-9)].mean())  # in the middle of an empty gap


def _mode(values: NumpyArray) -> float:
    """The most frequent value, by a histogram of 64 bins."""
    counts, edges = np.histogram(values, bins=64)
    at = int(counts.argmax())
    return float(edges[at] + edges[at + 1]) / 2
