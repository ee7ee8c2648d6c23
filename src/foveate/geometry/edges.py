"""Edge maps: blur and Canny in 2-D, its isotropic counterpart in 3-D; thresholds from the image unless they are given.

Legend: C channels, S spatial axes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.geometry.image import Real

LOW_SHARE = 0.4


def edge_map(image: NDArray[Any], blur: int, low: Real | None, high: Real | None, quantile: float) -> NDArray[np.uint8]:
    """1 on edges, 0 elsewhere, ``[*S]``; a constant image has no edges.

    Args:
        image: ``[C, *S]``, finite; other types than uint8 are scaled from their own range to 0..255.
        blur: side of the Gaussian kernel in pixels, odd.
        low: lower threshold on the gradient, or None.
        high: upper threshold, or None for the ``quantile`` of the image's gradients.
        quantile: in (0, 1).

    Returns:
        The edges.
    """
    if image.dtype != np.uint8:
        least, most = float(image.min()), float(image.max())
        image = (image.astype(np.float32) - least) * (255.0 / (most - least or 1.0))
    return (
        _edges_2d(image, blur, low, high, quantile) if image.ndim == 3 else _edges_3d(image, blur, low, high, quantile)
    )


def _thresholds(
    strength: NDArray[Any], low: Real | None, high: Real | None, quantile: float, least: float
) -> tuple[float, float]:
    """Both thresholds; never below ``least``, so that rounding noise on a flat image is no edge."""
    if high is None:
        flat = strength.reshape(-1)
        high = max(float(np.quantile(flat[:: max(1, flat.size >> 20)], quantile)), least, low or 0.0)
    return float(LOW_SHARE * high if low is None else min(low, high)), float(high)


def _edges_2d(
    image: NDArray[Any], blur: int, low: Real | None, high: Real | None, quantile: float
) -> NDArray[np.uint8]:
    import cv2

    best: tuple[NDArray[Any], ...] | None = None
    for channel in np.rint(image).astype(np.uint8):
        grey = cv2.GaussianBlur(channel, (blur, blur), 0) if blur > 1 else channel
        dx = cv2.Sobel(grey, cv2.CV_16S, 1, 0, borderType=cv2.BORDER_REPLICATE)
        dy = cv2.Sobel(grey, cv2.CV_16S, 0, 1, borderType=cv2.BORDER_REPLICATE)
        strength = np.abs(dx) + np.abs(dy)
        if best is not None:  # the strongest channel decides, as in cv2.Canny on colour
            keep = strength > best[2]
            dx, dy, strength = (np.where(keep, new, old) for new, old in zip((dx, dy, strength), best, strict=True))
        best = dx, dy, strength
    assert best is not None
    lower, upper = _thresholds(best[2], low, high, quantile, 1.0)
    return (np.asarray(cv2.Canny(best[0], best[1], lower, upper)) > 0).astype(np.uint8)


def _edges_3d(
    image: NDArray[Any], blur: int, low: Real | None, high: Real | None, quantile: float
) -> NDArray[np.uint8]:
    from scipy.ndimage import correlate1d, gaussian_filter, generate_binary_structure, label

    sigma = 0.3 * ((blur - 1) * 0.5 - 1) + 0.8 if blur > 1 else 0.0  # OpenCV's sigma of a kernel of this side
    power = np.zeros(image.shape[1:], np.float32)
    for channel in image.astype(np.float32):
        grey = gaussian_filter(channel, sigma, mode="nearest") if sigma > 0 else channel
        # central differences, times 4 for the weight of a Sobel kernel, so that thresholds mean the same in 2-D
        slopes = (4.0 * correlate1d(grey, [-1.0, 0.0, 1.0], axis=axis, mode="nearest") for axis in range(3))
        np.maximum(power, sum(slope * slope for slope in slopes), out=power)
    strength = np.sqrt(power)
    lower, upper = _thresholds(strength, low, high, quantile, 1e-3)
    groups, num = label(strength > lower, structure=generate_binary_structure(3, 3))
    strong = np.zeros(num + 1, bool)
    strong[groups[strength > upper]] = True
    strong[0] = False
    edges: NDArray[np.uint8] = strong[groups].astype(np.uint8)
    return edges
