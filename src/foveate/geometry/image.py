"""Images as the kernels want them: checked once, in one of three number types, without a copy where possible.

Legend: C channels, S spatial axes, D H W pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import FormatError, ShapeError
from foveate.geometry.pyramid import triple

Image = NDArray[Any]
Real = float | int


def as_array(values: Image | Tensor) -> Image:
    """A numpy array that shares memory with an array or a CPU tensor."""
    return np.asarray(values.detach().cpu().numpy()) if isinstance(values, Tensor) else np.asarray(values)


def as_image(image: Image | Tensor) -> Image:
    """The image as a checked C-contiguous array ``[C, *S]`` of uint8, float32 or (rarely) float64.

    Raises:
        ShapeError: not 2-D or 3-D with a channel axis in front, or empty.
        FormatError: NaN, Inf, or no numbers at all.
    """
    array = as_array(image)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ShapeError(f"image has shape {array.shape}; give [C, H, W] or [C, D, H, W] with no empty axis")
    array = np.ascontiguousarray(plain(array))
    check_finite(array, "image")
    return array


def as_volume(image: Image) -> Image:
    """``[C, *S]`` as ``[C, D, H, W]``."""
    return np.ascontiguousarray(image.reshape(image.shape[0], *triple(image.shape[1:])))


def check_finite(array: Image, name: str) -> None:
    """Refuse NaN and Inf in one pass without a copy."""
    if array.dtype.kind == "f" and not np.isfinite(np.add.reduce(array, axis=None, dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise FormatError(
            f"{name} has {bad} NaN or Inf values of {array.size}; replace them, e.g. with numpy.nan_to_num"
        )


def smoothed(image: Image, sigma: Real) -> Image:
    """The image after a Gaussian of ``sigma`` pixels over the spatial axes, float32; the image itself for 0."""
    if sigma == 0:
        return image
    from scipy.ndimage import gaussian_filter

    return np.stack([gaussian_filter(channel.astype(np.float32), sigma, mode="nearest") for channel in image])


def plain(array: Image) -> Image:
    """Number types that the kernels are compiled for: uint8, and float32 for all that it holds exactly."""
    if array.dtype.kind not in "buif":
        raise FormatError(f"image or map of type {array.dtype} holds no real numbers; convert it to uint8 or float32")
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    if array.dtype in (np.uint8, np.float32):
        return array
    if array.dtype.itemsize <= 2:
        return array.astype(np.float32)
    return array.astype(np.float64, copy=False)
