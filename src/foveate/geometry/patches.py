"""Patches: the pixels of leaves of any size, resampled to one size, packed or padded.

Packed is the canonical form: the tokens of all images one after the other, with no padding between.

Legend: B images, T tokens of all images, L longest image, C channels, K classes, N spatial axes, P patch_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from numpy.typing import NDArray
from torch import Tensor

from foveate.errors import BudgetError, FormatError, ShapeError
from foveate.geometry.leaves import Leaves
from foveate.geometry.resample import as_array, class_shares, resample
from foveate.geometry.samples import check_patch_size, sample_area
from foveate.geometry.samples import halo_index as halo_index
from foveate.geometry.samples import sample_index as sample_index

IGNORE = 255


@dataclass(frozen=True, eq=False)
class Patches:
    """Resampled pixels of the leaves of one or more images, packed.

    Args:
        pixels: samples in the image's own value range, images one after the other.
        leaves: the cells of each image, in the order of ``pixels``; they stay on the CPU.

    Raises:
        ShapeError: the tokens and the leaves do not match.
    """

    pixels: Float[Tensor, "T C *P"]
    leaves: tuple[Leaves, ...]

    def __post_init__(self) -> None:
        sides = set(self.pixels.shape[2:])
        dims = {leaves.num_dims for leaves in self.leaves}
        if not self.leaves or dims != {self.pixels.ndim - 2} or len(sides) != 1:
            raise ShapeError(
                f"pixels {tuple(self.pixels.shape)} must be (tokens, channels, P, P[, P]), and leaves as flat"
            )
        if sum(self.lengths) != len(self.pixels):
            raise ShapeError(f"{len(self.pixels)} patches for {sum(self.lengths)} leaves; give each leaf its patch")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per image, on the host."""
        return tuple(len(leaves) for leaves in self.leaves)

    @cached_property
    def cu_seqlens(self) -> Int32[Tensor, " B1"]:
        """Where each image begins, and the total: B + 1 offsets on the device of the pixels."""
        offsets = np.cumsum([0, *self.lengths], dtype=np.int32)
        return torch.from_numpy(offsets).to(self.pixels.device)

    @cached_property
    def boxes(self) -> Int64[Tensor, "T 2 N"]:
        """Valid part of each leaf, (start, stop) in level-0 pixels of its image, on the device of the pixels."""
        return torch.cat([leaves.boxes for leaves in self.leaves]).to(self.pixels.device)

    @property
    def patch_size(self) -> int:
        """Samples per side of a patch, P."""
        return self.pixels.shape[-1]

    @property
    def num_images(self) -> int:
        """Number of images, B."""
        return len(self.leaves)

    @property
    def num_dims(self) -> int:
        """Number of spatial axes, N."""
        return self.pixels.ndim - 2

    def with_pixels(self, pixels: Float[Tensor, "T C2 *P2"]) -> "Patches":
        """Return the same leaves with other samples, such as normalised ones."""
        return replace(self, pixels=pixels)

    def to(self, device: torch.device | str) -> "Patches":
        """Return the patches with their pixels on another device; the leaves stay where they are."""
        return self if self.pixels.device == torch.device(device) else replace(self, pixels=self.pixels.to(device))

    def split(self) -> "list[Patches]":
        """Return the patches of each image alone, as views."""
        parts = self.pixels.split(self.lengths)
        return [Patches(part, (leaves,)) for part, leaves in zip(parts, self.leaves, strict=True)]

    def select(self, index: Sequence[Int64[Tensor, " _"]]) -> "Patches":
        """Return some tokens of each image: one tensor of positions per image, relative to the image."""
        parts = zip(self.split(), index, strict=True)
        return pack([Patches(one.pixels[at], (one.leaves[0].select(at.cpu()),)) for one, at in parts])

    def pad(self, length: int | None = None) -> "PaddedPatches":
        """Return the patches as one rectangle, zeros behind each image.

        Args:
            length: tokens per image, at least the longest image; the longest image when left out.

        Raises:
            BudgetError: an image has more tokens than ``length``.
        """
        longest = max(self.lengths)
        length = longest if length is None else length
        if length < longest:
            raise BudgetError(f"length={length} must be at least {longest}, the longest image; cut with max_leaves")
        parts = self.pixels.split(self.lengths)
        return PaddedPatches(torch.stack([_pad(part, length) for part in parts]), self.leaves)


@dataclass(frozen=True, eq=False)
class PaddedPatches:
    """Patches as a rectangle, for encoders that know no packing; the packed form wastes nothing.

    Args:
        pixels: samples; whatever lies behind an image's own tokens is padding and never data.
        leaves: the cells of each image.

    Raises:
        ShapeError: the rectangle and the leaves do not match.
    """

    pixels: Float[Tensor, "B L C *P"]
    leaves: tuple[Leaves, ...]

    def __post_init__(self) -> None:
        longest = max((len(leaves) for leaves in self.leaves), default=0)
        if len(self.leaves) != len(self.pixels) or self.pixels.shape[1] < longest:
            raise ShapeError(
                f"pixels {tuple(self.pixels.shape)} must hold {len(self.leaves)} images of up to {longest} tokens; "
                "use Patches.pad()"
            )

    @cached_property
    def valid(self) -> Bool[Tensor, "B L"]:
        """True where a token is data."""
        lengths = torch.tensor([len(leaves) for leaves in self.leaves], device=self.pixels.device)
        return torch.arange(self.pixels.shape[1], device=self.pixels.device)[None] < lengths[:, None]

    @cached_property
    def boxes(self) -> Int64[Tensor, "B L 2 N"]:
        """Valid part of each leaf, (start, stop) in level-0 pixels; zeros on padding."""
        parts = [_pad(leaves.boxes, self.pixels.shape[1]) for leaves in self.leaves]
        return torch.stack(parts).to(self.pixels.device)

    def pack(self) -> Patches:
        """Return the patches without their padding."""
        parts = [one[: len(leaves)] for one, leaves in zip(self.pixels, self.leaves, strict=True)]
        return Patches(torch.cat(parts), self.leaves)


def _pad(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros((length - len(x), *x.shape[1:]))])


def pack(patches: Sequence[Patches]) -> Patches:
    """Put the patches of several images one after the other; the inverse of ``Patches.split``.

    Args:
        patches: at least one; all with the same channels, patch size and number of axes.

    Raises:
        ShapeError: there is none, or their patches differ in shape.
    """
    shapes = {tuple(one.pixels.shape[1:]) for one in patches}
    if len(shapes) != 1:
        raise ShapeError(f"patches of shapes {sorted(shapes)} cannot be packed; cut all images with one patch_size")
    return Patches(torch.cat([one.pixels for one in patches]), tuple(leaf for one in patches for leaf in one.leaves))


def patchify(image: NDArray[Any] | Tensor, leaves: Leaves, patch_size: int = 16, *, backend: str = "auto") -> Patches:
    """Resample every leaf to ``patch_size`` samples per side: area means down, linear interpolation up.

    Area means are the exact projection of the image on the samples, so nothing aliases, and ``unpatchify`` gives back
    any image that is constant on the samples. Border leaves average their valid pixels only.

    Args:
        image: ``[C, *S]``, numpy or torch; bool, 8/16/32-bit integers, or floats. NaN spreads into its samples.
        leaves: cells of an image of shape ``*S``.
        patch_size: samples per side, P >= 1.
        backend: "auto", "numba" (CPU), or "eager" (plain torch; any device, float16, gradient to the image).

    Returns:
        Patches of one image, float32, in the image's value range.

    Raises:
        ShapeError: the image has no channel axis or another shape than the leaves.
        FormatError: the pixel type is not one of those above.

    Cost: one read of the image; 4 L C P^N bytes of result and no copy of the image.
    Source: Zhang et al., SC24, arXiv 2404.09707, adaptive patching.
    Differs from the released code: area mean instead of cubic resize without antialiasing; channels stay apart.
    """
    check_patch_size(patch_size)
    _check_image(tuple(image.shape), leaves, channels=True)
    return Patches(resample(image, leaves, patch_size, backend), (leaves.to("cpu"),))


def patchify_mask(
    mask: NDArray[Any] | Tensor, leaves: Leaves, patch_size: int = 16, num_classes: int = 2, *, ignore: int = IGNORE
) -> tuple[Float32[Tensor, "L K *P"], Float32[Tensor, "L *P"]]:
    """Turn a label mask into the share of each class in every sample, without a one-hot image.

    With soft labels and weights a loss over samples is the loss over pixels.

    Args:
        mask: integer labels ``[*S]`` in 0 .. num_classes - 1, or ``ignore``.
        leaves: cells of an image of the same shape.
        patch_size: samples per side, P >= 1.
        num_classes: K >= 1.
        ignore: the label of pixels that are not to be learned.

    Returns:
        The shares, which sum to 1 where the weight is positive, and the weight: labelled valid pixels per sample.

    Raises:
        ShapeError: the mask has another shape than the leaves.
        FormatError: the mask is not integer, or holds an unknown label.

    Cost: one read of the mask; 4 L (K + 1) P^N bytes of result.
    """
    check_patch_size(patch_size)
    _check_image(tuple(mask.shape), leaves, channels=False)
    if num_classes < 1:
        raise BudgetError(f"num_classes={num_classes} must be at least 1; count the background too")
    array = as_array(mask.cpu() if isinstance(mask, Tensor) else mask)
    if array.dtype.kind not in "ui":
        raise FormatError(f"mask of type {array.dtype} must hold integer labels; use mask.astype('uint8')")
    soft, known, wrong = class_shares(array, leaves, patch_size, num_classes, ignore)
    if wrong != -1:
        label = wrong if wrong >= 0 else wrong + 1
        raise FormatError(
            f"mask holds label {label}, not in 0..{num_classes - 1} or {ignore}; map it in the class table"
        )
    return soft, known * sample_area(leaves.to("cpu"), patch_size)


def _check_image(shape: tuple[int, ...], leaves: Leaves, channels: bool) -> None:
    if channels and len(shape) == leaves.num_dims:
        raise ShapeError(f"image of shape {shape} has no channel axis; use image[None]")
    if shape[1:] != leaves.shape if channels else shape != leaves.shape:
        layout = "(C, *S)" if channels else "(*S)"
        raise ShapeError(
            f"shape {shape} is not {layout} with S = {leaves.shape} of the leaves; cut this image's own leaves"
        )
