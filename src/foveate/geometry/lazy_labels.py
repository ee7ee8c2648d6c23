"""Soft labels of leaves from a mask that is too large to read: large leaves need coarse labels only.

Legend: L leaves, K classes, P patch_size.
"""

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from foveate.errors import BudgetError, FormatError, ShapeError
from foveate.geometry import kernels_labels as kernels
from foveate.geometry.lazy_read import Counter, decode, level_shape, tiles_of, whole_steps
from foveate.geometry.leaves import Leaves
from foveate.geometry.patches import IGNORE
from foveate.geometry.resample import make_taps
from foveate.geometry.samples import as_volume, cells_of, check_patch_size, sample_area
from foveate.geometry.source import Source


def lazy_soft_labels(
    mask: Source,
    leaves: Leaves,
    patch_size: int = 16,
    num_classes: int = 2,
    *,
    ignore: int = IGNORE,
    oversample: int = 4,
) -> tuple[Float32[Tensor, "L K *P"], Float32[Tensor, "L *P"]]:
    """The share of each class in every sample, as `patchify_mask`, reading of a mask only what the leaves need.

    A leaf takes its labels from the coarsest level that still has ``oversample`` of them per side of a sample; of a
    mask of one level the result is that of `patchify_mask`, to the bit.

    Args:
        mask: integer labels, one channel, in the frame of the leaves; coarser levels hold the most frequent or the
            nearest label.
        leaves: the cells.
        patch_size: samples per side, P >= 1.
        num_classes: K >= 1.
        ignore: the label of pixels that are not to be learned.
        oversample: labels per side of a sample, >= 1.

    Returns:
        The shares, which sum to 1 where the weight is positive, and the weight: labelled level-0 pixels per sample.

    Raises:
        ShapeError: the mask has another shape than the leaves, or more than one channel.
        FormatError: the mask is not integer, or holds an unknown label.
        BudgetError: ``num_classes`` or ``oversample`` is below 1.

    Cost: every tile of a level that a leaf touches is decoded once; 4 L (2 K + 1) P^N bytes.
    """
    check_patch_size(patch_size)
    if mask.shape != leaves.shape or mask.channels != 1:
        raise ShapeError(
            f"mask of {mask.channels} channels and shape {mask.shape} for leaves of {leaves.shape}; give one channel "
            "in the frame of the image"
        )
    if mask.dtype.kind not in "ui":
        raise FormatError(f"mask of type {mask.dtype} must hold integer labels; convert it to uint8")
    if num_classes < 1 or oversample < 1:
        raise BudgetError(f"num_classes={num_classes} and oversample={oversample} must be at least 1")
    leaves = leaves.to("cpu")
    sides = (patch_size,) * leaves.num_dims
    soft, known = torch.zeros((len(leaves), num_classes, *sides)), torch.zeros((len(leaves), *sides))
    level_of = torch.tensor(_levels(mask, leaves, patch_size * oversample))[leaves.scale]
    for level in level_of.unique().tolist():
        which = (level_of == level).nonzero().squeeze(1)
        votes, norm = _count(mask, level, leaves.select(which), patch_size, num_classes, ignore)
        total = votes.sum(1)
        for label in range(num_classes):
            soft[which, label] = torch.from_numpy(votes[:, label] / np.maximum(total, 1)).float().view(-1, *sides)
        known[which] = torch.from_numpy(total / norm).float().view(-1, *sides)
    return soft, known * sample_area(leaves, patch_size)


def _levels(mask: Source, leaves: Leaves, labels: int) -> list[int]:
    """The level that serves each scale."""
    return [
        max(
            level
            for level, step in whole_steps(mask).items()
            if level == 0 or all(by * labels <= n and n % by == 0 for by, n in zip(step, size, strict=True))
        )
        for size in leaves.sizes
    ]


def _count(
    mask: Source, level: int, leaves: Leaves, patch_size: int, num_classes: int, ignore: int
) -> tuple[np.ndarray, np.ndarray]:
    """The labels in every sample, weighted by the part that lies in it, and what the parts of a sample sum to."""
    step = whole_steps(mask)[level]
    low = int(leaves.scale.min())
    chain = tuple(tuple(side // by for side, by in zip(size, step, strict=True)) for size in leaves.sizes[low:])
    scale, by = leaves.scale - low, torch.tensor(step)
    near = Leaves(leaves.start // by, leaves.size // by, scale, level_shape(mask, step), chain)
    taps = make_taps(near, patch_size)
    start, stop, _ = cells_of(near)
    patch = as_volume((patch_size,) * leaves.num_dims, 1)
    weights = [taps.weight[axis].sum(-1)[taps.kind[:, axis], : patch[axis]] for axis in range(3)]
    norm = weights[0][:, :, None, None] * weights[1][:, None, :, None] * weights[2][:, None, None, :]
    votes = np.zeros((len(near), num_classes, *patch), np.int32 if norm.max() < 1 << 31 else np.int64)
    near_tile = np.empty(len(near), np.int64)
    for span in tiles_of(mask, level, near.shape):
        first, last = as_volume(span[0], 0), as_volume(span[1], 1)
        which = near_tile[: kernels.touched(start, stop, first, last, near_tile)[0]]
        if not len(which):
            continue
        tile = decode(mask, level, step, span, Counter.of(mask))[0]
        tile = tile.reshape(as_volume(tile.shape, 1))
        wrong = kernels.count_votes(
            tile, first, start, taps.kind, taps.first, taps.count, taps.weight, ignore, which, votes
        )
        if wrong != -1:
            label = wrong if wrong >= 0 else wrong + 1
            raise FormatError(
                f"mask holds label {label}, not in 0..{num_classes - 1} or {ignore}; map it in the class table"
            )
    return votes, norm
