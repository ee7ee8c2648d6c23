"""Pixels of a leaf -> P^N samples: exact area means down, linear interpolation up.

Along one axis a leaf of size s with v valid pixels has P samples. For s >= P a sample is the mean over the pixels
that it covers, each with the covered length as weight; for s < P it is the linear interpolation at its centre, inside
the leaf. Only valid pixels count; a sample wholly outside repeats the last valid one. All weights are whole numbers,
so the result is exact for integer pixels and the two backends agree to the bit.

Legend: L leaves, G leaves of one size, C channels, K classes, N spatial axes, P patch_size, U kinds of axis.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import FormatError
from foveate.geometry import kernels_patches as kernels
from foveate.geometry.kernels_gather import gather
from foveate.geometry.leaves import Leaves
from foveate.geometry.samples import as_volume, cells_of

Ints = NDArray[np.int64]
_CHUNK = 1 << 22  # pixels gathered at a time by the eager twin


@dataclass(frozen=True)
class Taps:
    """The pixels of each sample along each axis: ``first`` and ``count`` [3, U, P], ``weight`` [3, U, P, taps]."""

    kind: Ints
    first: Ints
    count: Ints
    weight: Ints


def make_taps(leaves: Leaves, patch_size: int) -> Taps:
    """Work out which pixels, relative to a leaf's start, make each of its samples, and with which weight."""
    start, stop, size = cells_of(leaves)
    patch = as_volume((patch_size,) * leaves.num_dims, 1)
    axes = []
    kind = np.empty_like(start)
    for axis in range(3):
        pairs, inverse = np.unique(
            np.stack([size[:, axis], (stop - start)[:, axis]], axis=1), axis=0, return_inverse=True
        )
        kind[:, axis] = inverse.reshape(-1)
        axes.append(_axis_taps(pairs[:, :1], pairs[:, 1:], int(patch[axis])))
    rows = (3, max(len(first) for first, _, _ in axes), patch_size)
    table = Taps(kind, np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros((*rows, 1), np.int64))
    weight = np.zeros((*rows, max(w.shape[-1] for _, _, w in axes)), np.int64)
    for axis, (first, count, taps) in enumerate(axes):
        num, samples, longest = taps.shape
        table.first[axis, :num, :samples] = first
        table.count[axis, :num, :samples] = count
        weight[axis, :num, :samples, :longest] = taps
    return Taps(kind, table.first, table.count, weight)


def _axis_taps(size: Ints, valid: Ints, patch: int) -> tuple[Ints, Ints, Ints]:
    """Return first, count [U, P] and weight [U, P, taps] for sizes and valid lengths [U, 1]."""
    sample = np.minimum(np.arange(patch)[None], -(-valid * patch // size) - 1)
    # linear, in units of 1/(2 P) pixel
    centre = np.clip((2 * sample + 1) * size - patch, 0, 2 * patch * (valid - 1))
    low = centre // (2 * patch)
    part = centre - 2 * patch * low
    # area, in units of 1/P pixel
    left, right = sample * size, np.minimum((sample + 1) * size, valid * patch)
    area = np.broadcast_to(size >= patch, sample.shape)
    first = np.where(area, left // patch, low)
    count = np.where(area, -(-right // patch) - left // patch, 1 + (part > 0))
    pixel = first[..., None] + np.arange(count.max())
    shared = np.minimum((pixel + 1) * patch, right[..., None]) - np.maximum(pixel * patch, left[..., None])
    linear = np.select(
        [pixel == low[..., None], pixel == low[..., None] + 1], [2 * patch - part[..., None], part[..., None]]
    )
    return first, count, np.where(area[..., None], np.maximum(shared, 0), linear)


def resample(image: NDArray[np.generic] | Tensor, leaves: Leaves, patch_size: int, backend: str) -> Tensor:
    """Return ``[L, C, *P]`` float32 samples of an image ``[C, *S]``; shapes are the caller's care."""
    if backend == "auto":
        special = isinstance(image, Tensor) and (image.device.type != "cpu" or image.requires_grad)
        half = image.dtype in (torch.float16, torch.bfloat16, np.float16)
        backend = "eager" if special or half else "numba"
    if backend == "eager":
        return _eager(image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)), leaves, patch_size)
    volume = as_array(image)
    volume = volume[:, None] if volume.ndim == 3 else volume
    start, stop, size = cells_of(leaves)
    patch = as_volume((patch_size,) * leaves.num_dims, 1)
    out = torch.empty((len(leaves), len(volume), *(patch_size,) * leaves.num_dims))
    result = out.numpy().reshape(len(leaves), len(volume), *patch)
    whole = (size % patch == 0).all(axis=1)
    real = volume.dtype.kind == "f"
    inner = whole & (stop - start == size).all(axis=1)
    rest = gather(volume, start, size, patch, np.flatnonzero(inner), result) if inner.any() else np.flatnonzero(inner)
    rest = np.concatenate([rest, np.flatnonzero(whole & ~inner)])
    if len(rest):
        ratio = size // patch
        small = volume.itemsize == 1 and ratio.prod(axis=1).max() < 1 << 24
        row = np.empty(int(size[:, 2].max()), np.float64 if real else np.uint32 if small else np.int64)
        kernels.area_gather(volume, start, stop, ratio, rest, row, result)
    if not whole.all():
        which = np.flatnonzero(~whole)
        taps = make_taps(leaves.select(torch.from_numpy(which)), patch_size)
        kind = np.zeros_like(start)
        kind[which] = taps.kind
        zero = np.float64(0) if real else np.int64(0)
        kernels.taps_gather(volume, start, kind, which, taps.first, taps.count, taps.weight, zero, result)
    return out


def as_array(image: NDArray[np.generic] | Tensor) -> NDArray[np.generic]:
    """Return the pixels as a numpy array that the kernels can read, without a copy."""
    array = image.detach().numpy() if isinstance(image, Tensor) else image
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    if array.dtype.kind not in "uif" or array.dtype in (np.uint64, np.float16, np.longdouble):
        raise FormatError(f"pixels of type {array.dtype} cannot be averaged exactly; convert them with astype(float32)")
    if not array.dtype.isnative:
        raise FormatError(
            f"pixels of type {array.dtype} are byte-swapped; use image.astype(image.dtype.newbyteorder('='))"
        )
    return array


def _eager(image: Tensor, leaves: Leaves, patch_size: int) -> Tensor:
    """The same in plain torch, on the image's device and with a gradient, leaf size by leaf size in chunks."""
    num, device = leaves.num_dims, image.device
    leaves = leaves.to("cpu")
    taps = make_taps(leaves, patch_size)
    parts, places = [], []
    for scale in leaves.scale.unique().tolist():
        group = (leaves.scale == scale).nonzero().squeeze(1)
        step = max(1, _CHUNK // int(leaves.size[group[0]].prod()) // len(image))
        for index in group.split(step):
            parts.append(_eager_group(image, leaves.select(index), index, taps, patch_size))
            places.append(index)
    if not parts:
        return image.new_zeros((0, len(image), *(patch_size,) * num), dtype=torch.float32)
    return torch.cat(parts)[torch.cat(places).argsort().to(device)]


def _eager_group(image: Tensor, group: Leaves, index: Tensor, taps: Taps, patch_size: int) -> Tensor:
    num, device = group.num_dims, image.device
    pixels, weights = [], []
    for axis in range(num):
        side = int(group.size[0, axis])
        pixel = torch.minimum(group.start[:, axis, None] + torch.arange(side), group.stop[:, axis, None] - 1)
        shape = [len(group)] + [side if other == axis else 1 for other in range(num)]
        pixels.append(pixel.view(shape).to(device))
        kind = taps.kind[index.numpy(), axis - num]
        weights.append(torch.from_numpy(_dense(taps, axis - num, kind, side, patch_size)).double().to(device))
    where: tuple[slice | Tensor, ...] = (slice(None), *pixels)
    x = image[where].double()  # [C, G, *size]
    norm = torch.ones((), dtype=torch.float64, device=device)
    for axis, weight_GPs in enumerate(weights):
        x = torch.einsum("gps,cgs...->cg...p", weight_GPs, x)
        norm = norm[..., None] * weight_GPs.sum(-1).view(len(group), *(1,) * axis, patch_size)
    return (x / norm).movedim(0, 1).float()


def _dense(taps: Taps, axis: int, kind: Ints, side: int, patch_size: int) -> Ints:
    dense = np.zeros((len(kind), patch_size, side), np.int64)
    first, weight = taps.first[axis, kind, :patch_size], taps.weight[axis, kind, :patch_size]
    for tap in range(min(weight.shape[-1], side)):
        place = np.minimum(first + tap, side - 1)[..., None]
        add = np.take_along_axis(dense, place, axis=-1) + weight[..., tap, None]
        np.put_along_axis(dense, place, add, axis=-1)
    return dense


def class_shares(
    mask: NDArray[np.generic], leaves: Leaves, patch_size: int, num_classes: int, ignore: int
) -> tuple[Tensor, Tensor, int]:
    """Return the share of each class ``[L, K, *P]``, the labelled part ``[L, *P]``, and a wrong label or -1."""
    taps = make_taps(leaves, patch_size)
    patch = as_volume((patch_size,) * leaves.num_dims, 1)
    sides = (patch_size,) * leaves.num_dims
    soft, known = torch.empty((len(leaves), num_classes, *sides)), torch.empty((len(leaves), *sides))
    volume = mask[None] if mask.ndim == 2 else mask
    wrong = kernels.mask_gather(
        volume,
        cells_of(leaves)[0],
        taps.kind,
        taps.first,
        taps.count,
        taps.weight,
        ignore,
        soft.numpy().reshape(len(leaves), num_classes, *patch),
        known.numpy().reshape(len(leaves), *patch),
    )
    return soft, known, int(wrong)
