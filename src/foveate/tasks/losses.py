"""The loss on leaves: cross entropy and soft Dice against soft labels, every sample weighted by the pixels it covers.

A leaf is one token however large it is, so an unweighted mean over samples is another loss than the one on pixels: on
a slide, two thirds of the tokens may cover a sixth of the area. Weighted by area, the loss on leaves equals the loss on
pixels of the painted prediction. Dice uses each image's own sums, so it is a sum over images as cross entropy is a sum
over pixels, and a batch may be shared out over processes or steps without changing its value.

Legend: T tokens of the batch, K classes (background first), P samples per side, B images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.errors import ConfigError, ShapeError

SMOOTH = 1.0
"""Pixels added above and below in soft Dice, so that an absent class that is not predicted costs nothing."""


@dataclass(frozen=True, eq=False)
class LossParts:
    """Sums over one part of a batch, which add up over the parts.

    Args:
        ce_sum: cross entropy summed over labelled pixels, with gradient.
        weight_sum: labelled pixels, each times the weight of its class.
        dice_sum: 1 - soft Dice, meaned over classes and summed over images, with gradient.
        num_images: images summed over that have a labelled pixel.
        dice_weight: weight of Dice beside cross entropy.
    """

    ce_sum: Float[Tensor, ""]
    weight_sum: Float[Tensor, ""]
    dice_sum: Float[Tensor, ""]
    num_images: Float[Tensor, ""]
    dice_weight: float

    def total(
        self, weight_sum: Float[Tensor, ""] | None = None, num_images: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, ""]:
        """This part's share of the loss; the shares of all parts sum to the loss of the whole batch.

        Args:
            weight_sum: ``weight_sum`` of the whole batch, summed over all processes and accumulated steps; ``None``:
                this part is the whole batch.
            num_images: ``num_images`` of the whole batch, likewise.

        Returns:
            A scalar to call ``backward()`` on. Where gradients are *averaged* over W processes, as DDP does, multiply
            it by W first.
        """
        pixels = self.weight_sum if weight_sum is None else weight_sum
        images = self.num_images if num_images is None else num_images
        return self.ce_sum / pixels.clamp(min=1e-12) + self.dice_weight * self.dice_sum / images.clamp(min=1.0)

    def sums(self) -> Float[Tensor, "4"]:
        """(ce_sum, weight_sum, dice_sum, num_images) without gradient, to be all-reduced or logged."""
        parts = (self.ce_sum, self.weight_sum, self.dice_sum, self.num_images)
        return torch.stack([part.detach() for part in parts])


def leaf_loss(
    logits: Float[Tensor, "T K *P"],
    soft: Float[Tensor, "T K *P"],
    weight: Float[Tensor, "T *P"],
    *,
    lengths: Sequence[int],
    class_weights: Sequence[float] | None = None,
    dice_weight: float = 1.0,
    groups: Sequence[Sequence[int]] | None = None,
) -> LossParts:
    """Cross entropy and soft Dice of packed predictions, weighted by the pixels that each sample covers.

    Args:
        logits: predictions in any float type; the sums are float32.
        soft: share of each class in each sample, summing to 1 over K.
        weight: labelled pixels under each sample; 0 takes it out.
        lengths: tokens of each image, summing to T.
        class_weights: weight of each class in cross entropy, background first; ``None``: all 1.
        dice_weight: weight of Dice; 0 leaves it out.
        groups: labels of each union of classes that Dice is of; ``None``: every class but the background.

    Returns:
        Sums that add up over any division of the images; see :meth:`LossParts.total`.

    Raises:
        ShapeError: ``lengths`` do not sum to the number of tokens.
        ConfigError: there is not one class weight per class.

    Cost: O(T K P^N), no copy per image.

    Source: the loss of SHF (0.5 BCE + 0.5 Dice, eps 1).

    **Differs**: the published code takes the loss per token in sequence space, unweighted, against labels resampled by
    nearest; here samples count by area and labels are area means, which is the loss on pixels.
    """
    num_classes = logits.shape[1]
    if sum(lengths) != logits.shape[0]:
        raise ShapeError(f"lengths sum to {sum(lengths)} but there are {logits.shape[0]} tokens: give one per image")
    if class_weights is not None and len(class_weights) != num_classes:
        raise ConfigError(f"{len(class_weights)} class weights for {num_classes} classes: give one each")
    logits_TKS = logits.float().flatten(2)
    soft_TKS = soft.float().flatten(2)
    weight_TS = weight.float().flatten(1)
    log_TKS = logits_TKS.log_softmax(dim=1)
    target_TKS = soft_TKS * weight_TS[:, None]
    counted_TKS = target_TKS
    if class_weights is not None:
        counted_TKS = target_TKS * torch.tensor(class_weights, device=logits.device)[None, :, None]
    image_T = torch.repeat_interleave(
        torch.arange(len(lengths), device=logits.device), torch.tensor(lengths, device=logits.device)
    )
    present_B = _per_image(weight_TS.sum(1), image_T, len(lengths)) > 0
    dice_sum = logits_TKS.new_zeros(())
    if dice_weight > 0:
        dice_sum = _dice_sum(log_TKS.exp(), target_TKS, weight_TS, image_T, present_B, groups)
    return LossParts(
        ce_sum=-(log_TKS * counted_TKS).sum(),
        weight_sum=counted_TKS.sum(),
        dice_sum=dice_sum,
        num_images=present_B.sum().float(),
        dice_weight=float(dice_weight),
    )


def _dice_sum(
    prob_TKS: Tensor,
    target_TKS: Tensor,
    weight_TS: Tensor,
    image_T: Tensor,
    present_B: Tensor,
    groups: Sequence[Sequence[int]] | None,
) -> Tensor:
    """1 - Dice, meaned over the classes beside background or their unions, summed over images with a labelled pixel."""
    num_images = len(present_B)
    prob_TGS, target_TGS = prob_TKS[:, 1:], target_TKS[:, 1:]
    if groups is not None:
        prob_TGS, target_TGS = (
            torch.stack([part[:, list(labels)].sum(1) for labels in groups], dim=1) for part in (prob_TKS, target_TKS)
        )
    overlap_BG = _per_image((prob_TGS * target_TGS).sum(2), image_T, num_images)
    guess_BG = _per_image((prob_TGS * weight_TS[:, None]).sum(2), image_T, num_images)
    truth_BG = _per_image(target_TGS.sum(2), image_T, num_images)
    dice_BG = (2 * overlap_BG + SMOOTH) / (guess_BG + truth_BG + SMOOTH)
    return ((1 - dice_BG).mean(1) * present_B).sum()


def _per_image(values_TX: Tensor, image_T: Tensor, num_images: int) -> Tensor:
    sums = values_TX.new_zeros((num_images, *values_TX.shape[1:]))
    return sums.index_add(0, image_T, values_TX)
