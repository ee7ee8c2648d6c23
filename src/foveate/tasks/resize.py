"""Images made smaller before the tree, and predictions brought back to full resolution.

Images by area mean (no pixel is skipped), labels by nearest (no class is invented), predictions by linear
interpolation (a boundary between two samples stays smooth).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

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
