"""Pixel values as the model sees them: how many channels, and on which scale.

Legend: c channels of the file, C channels the model sees, S image sides.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import FormatError
from foveate.tasks.settings import DataConfig

NumpyArray = NDArray[Any]


def with_channels(image: Shaped[NumpyArray, "c *S"], channels: int, name: str) -> Shaped[NumpyArray, "C *S"]:
    """The image with the number of channels the model sees: grey repeated, or channels averaged to grey.

    Raises:
        FormatError: neither is possible.
    """
    have = image.shape[0]
    if have == channels:
        return image
    if have == 1:
        return np.broadcast_to(image, (channels, *image.shape[1:])).copy()
    if channels == 1:
        mean: NumpyArray = image.mean(axis=0, dtype=np.float32, keepdims=True)
        return mean if np.issubdtype(image.dtype, np.floating) else mean.round().astype(image.dtype)
    raise FormatError(f"{name} has {have} channels but data.channels={channels}: set data.channels={have} or 1")


def value_range(image: Shaped[NumpyArray, "C *S"], data: DataConfig) -> tuple[float, ...]:
    """The value scale of an image: zero, low and high; for ``zscore`` means, then deviations, one per channel.

    ``image``: median and percentiles 1 and 99 over all channels together, so that colours keep their relation; where
    these coincide, as on a sparse image, the extremes; from at most about 2^20 of its pixels. ``limits``: their middle,
    and they themselves. Otherwise zero, zero and the largest value of the data type.
    """
    if data.normalise == "zscore":
        return _moments(image)
    if data.limits is not None:
        return (sum(data.limits) / 2, *data.limits)
    if data.normalise != "image":
        high = float(np.iinfo(image.dtype).max) if np.issubdtype(image.dtype, np.integer) else 1.0
        return (0.0, 0.0, high)
    step = max(1, round((image[0].size / 2**20) ** (1 / (image.ndim - 1))))
    some = image[(slice(None), *(slice(None, None, step) for _ in image.shape[1:]))].astype(np.float32)
    low, middle, high = (float(value) for value in np.percentile(some, (1, 50, 99)))
    if high <= low:
        low, high = float(image.min()), float(image.max())
    return (middle, low, high)


def _moments(image: NumpyArray) -> tuple[float, ...]:
    """Mean of every channel over its values that are not 0, then their deviations (1 where they do not vary)."""
    inside = [channel[channel != 0].astype(np.float64) for channel in image]
    means = [float(values.mean()) if values.size else 0.0 for values in inside]
    return (*means, *(float(values.std()) if values.size and values.std() > 0 else 1.0 for values in inside))


def normalise(image: Shaped[NumpyArray, "C *S"], scale: tuple[float, ...], data: DataConfig) -> Float32[Tensor, "C *S"]:
    """Pixel values as the model sees them.

    ``image``: median at 0 and the robust range of length 1, limited to -5..5 so that one hot pixel cannot rule; a
    constant image is all 0. ``range``: 0..1. ``fixed``: ``range``, then the declared mean and deviation. ``limits``:
    -1..1. ``zscore``: every channel by its own mean and deviation, and 0 where the file has 0. No scale: as they are.
    """
    values = torch.from_numpy(image.astype(np.float32))
    if not scale:
        return values
    if data.normalise == "zscore":
        mean, deviation = torch.tensor(scale).view(2, -1, *(1,) * (values.ndim - 1))
        return torch.where(values == 0, values, (values - mean) / deviation)
    zero, low, high = scale
    spread = high - low
    if data.normalise == "limits":
        return values.sub_(zero).mul_(2 / spread).clamp_(-1, 1)
    if data.normalise == "image":
        return values.sub_(zero).div_(spread).clamp_(-5, 5) if spread > 0 else torch.zeros_like(values)
    values = values.div_(spread)
    if data.normalise == "fixed":
        assert data.mean is not None
        assert data.std is not None
        sides = (1,) * (values.ndim - 1)
        values = values.sub_(torch.tensor(data.mean).view(-1, *sides)).div_(torch.tensor(data.std).view(-1, *sides))
    return values
