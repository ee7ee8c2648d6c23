"""Samples of leaves -> pixels of the image: the way back from patches.

Legend: L leaves, K channels, N spatial axes, P patch_size, S pixels of the window, Q leaves that touch the window.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor

from foveate.errors import ShapeError
from foveate.geometry import kernels_paint as kernels
from foveate.geometry.boxes import check_box
from foveate.geometry.leaves import Leaves
from foveate.geometry.samples import Box, as_volume, cells_of, halo_rows, sample_index

_NATIVE = (torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64)


def unpatchify(
    pixels: Shaped[Tensor, "L K *P"],
    leaves: Leaves,
    *,
    mode: str = "nearest",
    box: Box | None = None,
    backend: str = "auto",
) -> Shaped[Tensor, "K *S"]:
    """Paint the samples of every leaf back to the pixels that it covers: the inverse of ``patchify``.

    Args:
        pixels: samples of the leaves: an image, logits or probabilities. Floats stay what they are.
        leaves: the cells that the samples belong to, in the same order.
        mode: "nearest" gives every pixel the sample under its centre, the exact inverse on images that are constant
            on the samples. "smooth" interpolates linearly between sample centres and across the seams, where it takes
            the neighbour's sample; a constant stays constant, a ramp over equal leaves stays a ramp.
        box: window (start, stop) in level-0 pixels; the whole image when left out. A window holds exactly what the
            whole image would hold there.
        backend: "auto", "numba" (CPU, no gradient), or "eager" (plain torch, any device, gradient to ``pixels``).

    Returns:
        The window, in the type of ``pixels`` ("smooth": floating); 0 where no leaf lies.

    Raises:
        ShapeError: the samples and the leaves do not match, the mode is unknown, or the box leaves the image.

    Cost: O(K x pixels of the window) time and the window as memory, whatever the image; eager also holds one index
    per pixel ("smooth": about 2^N windows).
    Source: Zhang et al., SC24, arXiv 2404.09707, painting back of tokens.
    Differs from the released code: probabilities stay floats; any number of channels; neighbours blend without seams.
    """
    if pixels.ndim != leaves.num_dims + 2 or len(pixels) != len(leaves) or len(set(pixels.shape[2:])) != 1:
        raise ShapeError(
            f"pixels {tuple(pixels.shape)} must be (L, K, *P), L = {len(leaves)}, {leaves.num_dims} equal sides; "
            "give the leaves that patchify was given"
        )
    if mode not in ("nearest", "smooth"):
        raise ShapeError(f"mode={mode!r} must be 'nearest' or 'smooth'")
    start, stop = check_box(box, leaves.shape) if box is not None else ((0,) * leaves.num_dims, leaves.shape)
    leaves = leaves.to("cpu")
    if mode == "smooth" and not pixels.is_floating_point():
        pixels = pixels.float()
    if backend == "auto":
        plain = pixels.device.type == "cpu" and pixels.dtype in _NATIVE
        backend = "eager" if not plain or (pixels.requires_grad and torch.is_grad_enabled()) else "numba"
    which = _touched(leaves, start, stop)
    if mode == "nearest":
        if backend == "eager":
            return _nearest_eager(pixels, leaves, which, start, stop)
    else:
        halo = _own_where_empty(halo_rows(leaves, pixels.shape[-1], which.numpy(), True), which, leaves.num_dims)
        if backend == "eager":
            return _smooth_eager(pixels, leaves, which, halo, start, stop)
    window = tuple(b - a for a, b in zip(start, stop, strict=True))
    out = pixels.new_zeros((pixels.shape[1], *window), requires_grad=False)
    patch = as_volume(pixels.shape[2:], 1)
    samples = pixels.detach().contiguous().numpy().reshape(*pixels.shape[:2], *patch)
    volume = out.numpy().reshape(-1, *as_volume(window, 1))
    first, last, size = cells_of(leaves)
    if len(which) and mode == "nearest":
        kernels.nearest_paint(samples, first, size, last, which.numpy(), as_volume(start, 0), volume)
    elif len(which):
        rows = halo.numpy().reshape(len(which), *as_volume(halo.shape[1:], 1))
        kernels.smooth_paint(samples, rows, first, size, last, which.numpy(), as_volume(start, 0), volume)
    return out


def _touched(leaves: Leaves, start: tuple[int, ...], stop: tuple[int, ...]) -> Tensor:
    """Return the leaves that have pixels in the window."""
    first, last = torch.tensor(start), torch.tensor(stop)
    return ((leaves.start < last) & (leaves.stop > first)).all(dim=-1).nonzero().squeeze(1)


def _own_where_empty(halo: Tensor, which: Tensor, num_dims: int) -> Tensor:
    """Let a leaf without a neighbour go on with its own nearest sample."""
    if bool((halo >= 0).all()):
        return halo
    side = halo.shape[-1]
    near = torch.arange(side).clamp(1, side - 2)
    own = halo
    for axis in range(1, num_dims + 1):
        own = own.index_select(axis, near)
    return torch.where(halo >= 0, halo, own)


def _rows(pixels: Tensor) -> Tensor:
    """Return ``[K, L * P^N]``: one column per flat sample index."""
    return pixels.movedim(1, 0).flatten(1)


def _nearest_eager(
    pixels: Tensor, leaves: Leaves, which: Tensor, start: tuple[int, ...], stop: tuple[int, ...]
) -> Tensor:
    index = sample_index(leaves.select(which), pixels.shape[-1], (start, stop))
    part = pixels if len(which) == len(pixels) else pixels[which.to(pixels.device)]
    empty = index < 0
    flat = index.clamp(min=0).flatten().to(pixels.device)
    painted = _rows(part).index_select(1, flat).view(-1, *index.shape)
    return painted.masked_fill(empty.to(pixels.device), 0) if bool(empty.any()) else painted


def _smooth_eager(
    pixels: Tensor, leaves: Leaves, which: Tensor, halo: Tensor, start: tuple[int, ...], stop: tuple[int, ...]
) -> Tensor:
    num, side, device = leaves.num_dims, halo.shape[-1], pixels.device
    near = leaves.select(which)
    slot_S = sample_index(near, 1, (start, stop)).long().to(device)  # one sample per leaf: the leaf itself
    empty_S = slot_S < 0
    base_S = slot_S = slot_S.clamp(min=0)
    begin, size, parts = near.start.to(device), near.size.to(device), []
    for axis in range(num):
        place = torch.arange(start[axis], stop[axis], device=device).view(-1, *(1,) * (num - 1 - axis))
        size_S = size[slot_S, axis]
        twice_S = (2 * (place - begin[slot_S, axis]) + 1) * (side - 2) - size_S
        low_S = twice_S.div(2 * size_S, rounding_mode="floor")
        base_S = base_S * side + (low_S + 1).clamp(0, side - 2)
        parts.append((twice_S - 2 * size_S * low_S).to(pixels.dtype) / (2 * size_S))
    field = _rows(pixels).index_select(1, halo.flatten().to(device))

    def blend(axis: int, at_S: Tensor) -> Tensor:
        if axis == num:
            return field.index_select(1, at_S.flatten()).view(-1, *at_S.shape)
        near_KS, far_KS = blend(axis + 1, at_S), blend(axis + 1, at_S + side ** (num - 1 - axis))
        return near_KS + parts[axis] * (far_KS - near_KS)

    return blend(0, base_S).masked_fill(empty_S, 0)
