"""Images made smaller before the tree, and predictions brought back to full resolution.

Images by area mean (no pixel is skipped), labels by nearest (no class is invented), predictions by linear
interpolation (a boundary between two samples stays smooth).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import FormatError
from foveate.tasks.settings_data import DataConfig

NumpyArray = NDArray[Any]


def limited_shape(shape: tuple[int, ...], max_side: int | None) -> tuple[int, ...]:
    """The shape with its longest side at most ``max_side``, in the same proportions, no side below 1.

    Args:
        shape: spatial shape in pixels.
        max_side: longest side allowed, in pixels; ``None``: the shape as it is.
    """
    if max_side is None or max(shape) <= max_side:
        return shape
    factor = max_side / max(shape)
    return tuple(max(1, round(side * factor)) for side in shape)


def working_shape(shape: tuple[int, ...], data: DataConfig) -> tuple[int, ...]:
    """The shape that an image is cut at: at ``data.resample``, at most ``data.max_side``, or its own.

    Args:
        shape: spatial shape in pixels, as stored.
        data: settings with the ``spacing`` of this image.

    Raises:
        FormatError: ``data.resample`` is set and nobody said what size the voxels have, or there are not three axes.
    """
    if data.resample is None:
        return limited_shape(shape, data.max_side)
    if data.spacing is None or len(shape) != 3:
        raise FormatError(
            f"an image of {' x '.join(map(str, shape))} has no size of a voxel along three axes, which data.resample="
            f"{list(data.resample)} needs: give data.spacing, or set data.resample to null"
        )
    sizes = zip(shape, data.spacing, data.resample, strict=True)
    return tuple(max(1, round(side * have / want)) for side, have, want in sizes)


def resized_spacing(
    spacing: Sequence[float] | None, shape: Sequence[int], new: Sequence[int]
) -> tuple[float, ...] | None:
    """Size of a pixel after an image of a shape was brought to a new one; None stays None."""
    if spacing is None:
        return None
    return tuple(size * old / side for size, old, side in zip(spacing, shape, new, strict=True))


def resized_image(image: Shaped[NumpyArray, "C *S"], shape: tuple[int, ...]) -> Shaped[NumpyArray, "C *s"]:
    """An image brought to another shape: area mean along the axes that shrink, linear along those that grow.

    Args:
        image: as `shrink_image`.
        shape: spatial shape wanted.
    """
    small = tuple(min(old, new) for old, new in zip(image.shape[1:], shape, strict=True))
    image = shrink_image(image, small)
    if small == shape:
        return image
    grown = restore_size(torch.from_numpy(image.astype(np.float32)), shape).numpy()
    return grown.round().astype(image.dtype) if image.dtype.kind in "ui" else grown


def shrink_image(image: Shaped[NumpyArray, "C *S"], shape: tuple[int, ...]) -> Shaped[NumpyArray, "C *s"]:
    """An image area-averaged down to ``shape``.

    Args:
        image: ``[C, *S]``; uint8, uint16 and float32 keep their type, all else becomes float32.
        shape: spatial shape wanted, no side larger than the image's.

    Cost: one pass over the pixels.
    """
    if image.shape[1:] == shape:
        return image
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        image = image.astype(np.float32)
    if len(shape) == 2:
        import cv2

        size = (shape[1], shape[0])
        return np.stack([cv2.resize(np.ascontiguousarray(p), size, interpolation=cv2.INTER_AREA) for p in image])
    volume = torch.from_numpy(image.astype(np.float32))[None]
    small = torch.nn.functional.interpolate(volume, size=shape, mode="area")[0].numpy()
    return (small.round() if image.dtype != np.float32 else small).astype(image.dtype)


def shrink_labels(labels: Shaped[NumpyArray, "*S"], shape: tuple[int, ...]) -> Shaped[NumpyArray, "*s"]:
    """Labels at the pixel nearest to each wanted pixel's centre; no label that was not there appears.

    Args:
        labels: integer labels ``[*S]``.
        shape: spatial shape wanted.
    """
    for axis, (old, new) in enumerate(zip(labels.shape, shape, strict=True)):
        if old != new:
            nearest = ((np.arange(new) + 0.5) * old / new).astype(np.int64)
            labels = labels.take(np.minimum(nearest, old - 1), axis=axis)
    return labels


def restore_size(values: Float[Tensor, "K *s"], shape: tuple[int, ...]) -> Float[Tensor, "K *S"]:
    """Logits or probabilities linearly interpolated to ``shape``; the inverse of shrinking, up to what shrinking lost.

    Args:
        values: one map per class.
        shape: spatial shape of the image before it was made smaller.

    Cost: K x pixels of memory; for very large images call it box by box.
    """
    if tuple(values.shape[1:]) == tuple(shape):
        return values
    mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
    return torch.nn.functional.interpolate(values[None], size=tuple(shape), mode=mode, align_corners=False)[0]
