"""Variations of a training image together with its labels, in 2-D and 3-D, before the tree is cut.

The light part (mirror images and quarter turns) is two tensor operations here; the rest (rotation, zoom, shift,
contrast, brightness, noise) is MONAI's. MONAI takes about ten seconds to import, more than a short run can spare, so
it is imported only when ``strength`` asks for it (above 0.5) and never for prediction.

Legend: C channels, S image sides.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray
from torch import Tensor

LIGHT = 0.5
"""Strength up to which images are only mirrored and turned."""

NumpyArray = NDArray[Any]


def random_window(
    labels: UInt8[NumpyArray, "*S"], window: int, generator: np.random.Generator, balance: float = 0.5
) -> tuple[slice, ...]:
    """Where a random part of an image lies; a share of them hold a pixel of a class, so that sparse ones are seen.

    Args:
        labels: of the whole image; 0 and 255 do not attract windows.
        window: side in pixels; an axis that is shorter is kept whole.
        generator: source of all chance.
        balance: share of the windows that hold a pixel of a class, each class of the image alike.

    Cost: one or two passes over the labels.
    """
    sides = [min(window, side) for side in labels.shape]
    start = [int(generator.integers(side - part + 1)) for side, part in zip(labels.shape, sides, strict=True)]
    if generator.random() < balance:
        there = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[1:255]) + 1
        if len(there):
            wanted = np.flatnonzero(labels == there[int(generator.integers(len(there)))])
            point = np.unravel_index(int(wanted[int(generator.integers(len(wanted)))]), labels.shape)
            spans = zip(point, labels.shape, sides, strict=True)
            start = [min(max(int(at) - int(generator.integers(part)), 0), side - part) for at, side, part in spans]
    return tuple(slice(first, first + part) for first, part in zip(start, sides, strict=True))


def augment(
    image: Float32[Tensor, "C *S"],
    labels: UInt8[Tensor, "*S"],
    strength: float,
    generator: np.random.Generator,
    *,
    quarters: bool = True,
) -> tuple[Float32[Tensor, "C *s"], UInt8[Tensor, "*s"]]:
    """One variation of an image and its labels, drawn only from ``generator``.

    Args:
        image: normalised image; interpolated linearly.
        labels: class per pixel; taken by nearest, so no class appears that was not there.
        strength: 0 returns the input; up to 0.5 mirrors and quarter turns (of the last two axes, the planes of a
            volume); above, MONAI's variations grow with it and are full at 1.
        generator: source of all chance, seeded from (seed, epoch, item) by the caller.
        quarters: allow quarter turns; False where pixels are not square, as on some planes of volumes: half turns then.

    Returns:
        New tensors; a quarter turn swaps the sides of a non-square image.

    Cost: a copy, and above 0.5 one resampling of the image.
    """
    if strength <= 0:
        return image, labels
    image, labels = _mirror_and_turn(image, labels, generator, quarters)
    if strength > LIGHT:
        image, labels = _vary(image, labels, (strength - LIGHT) / (1 - LIGHT), int(generator.integers(2**31)))
    return image, labels


def trim(
    image: Float32[Tensor, "C *S"], labels: UInt8[Tensor, "*S"], most: int, generator: np.random.Generator
) -> tuple[Float32[Tensor, "C *s"], UInt8[Tensor, "*s"]]:
    """Cut off up to ``most`` pixels at every side, so that leaves lie elsewhere; at least half of each axis stays.

    Args:
        image: normalised image.
        labels: class per pixel.
        most: pixels; 0 returns the input and draws nothing.
        generator: source of all chance.
    """
    if most <= 0:
        return image, labels
    cuts = [generator.integers(min(most, side // 4) + 1, size=2) for side in labels.shape]
    box = tuple(slice(int(cut[0]), side - int(cut[1])) for cut, side in zip(cuts, labels.shape, strict=True))
    return image[(slice(None), *box)].contiguous(), labels[box].contiguous()


def _mirror_and_turn(
    image: Tensor, labels: Tensor, generator: np.random.Generator, quarters: bool
) -> tuple[Tensor, Tensor]:
    axes = [axis - labels.ndim for axis in range(labels.ndim) if generator.random() < 0.5]
    turns = int(generator.integers(4))
    turns = turns if quarters else turns // 2 * 2
    changed = [torch.rot90(torch.flip(part, axes), turns, (-2, -1)).contiguous() for part in (image, labels)]
    return changed[0], changed[1]


def _vary(image: Tensor, labels: Tensor, amount: float, seed: int) -> tuple[Tensor, Tensor]:
    transform = _transforms(labels.ndim, amount)
    transform.set_random_state(seed=seed)
    result = transform({"image": image, "labels": labels[None].float()})
    plain = {name: torch.as_tensor(value.as_tensor()) for name, value in result.items()}
    return plain["image"].float().contiguous(), plain["labels"][0].round().to(torch.uint8).contiguous()


@functools.lru_cache(maxsize=8)
def _transforms(num_dims: int, amount: float) -> Any:
    """MONAI's variations of one strength; stateless but for the seed that every call sets."""
    from monai.transforms import (
        Compose,
        EnsureTyped,
        RandAdjustContrastd,
        RandAffined,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    turn = math.radians(20) * amount
    rotate = (turn,) if num_dims == 2 else (turn, 0.0, 0.0)
    return Compose(
        [
            EnsureTyped(keys=("image", "labels")),
            RandAffined(
                keys=("image", "labels"),
                prob=0.8,
                rotate_range=rotate,
                scale_range=(0.25 * amount,) * num_dims,
                shear_range=(0.1 * amount,) * 2 if num_dims == 2 else None,
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            ),
            RandAdjustContrastd(keys="image", prob=0.3, gamma=(1 - 0.4 * amount, 1 + 0.6 * amount)),
            RandScaleIntensityd(keys="image", prob=0.5, factors=0.3 * amount),
            RandShiftIntensityd(keys="image", prob=0.5, offsets=0.1 * amount),
            RandGaussianNoised(keys="image", prob=0.2, std=0.05 * amount),
        ]
    )
