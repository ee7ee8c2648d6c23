"""Split: which tokens stay and which leave, with the way back.

Every selection in the library, learned, random or by rank, is this one value.

Legend: B images, L tokens per image, K kept tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from foveate.errors import BudgetError, ShapeError
from foveate.geometry.soft_estimators import estimator_of

_FAR = 1e30  # stands for infinity among scores, so that differences of scores stay finite


@dataclass(frozen=True, eq=False)
class Split:
    """Positions that stay and positions that leave, both ascending, so that the order of the sequence is kept.

    Args:
        kept: positions that stay; every image keeps equally many.
        pruned: all other positions.

    Raises:
        ShapeError: the two disagree about the number of images, or are not int64.
    """

    kept: Int64[Tensor, "B K"]
    pruned: Int64[Tensor, "B R"]

    def __post_init__(self) -> None:
        shapes = tuple(self.kept.shape), tuple(self.pruned.shape)
        if self.kept.ndim != 2 or self.pruned.ndim != 2 or len(self.kept) != len(self.pruned):
            raise ShapeError(f"kept and pruned of shapes {shapes} must be (B, K) and (B, L - K); use topk to make both")

    @property
    def length(self) -> int:
        """Tokens per image before the split, L."""
        return self.kept.shape[1] + self.pruned.shape[1]

    def gather(self, x: Shaped[Tensor, "B L *D"]) -> tuple[Shaped[Tensor, "B K *D"], Shaped[Tensor, "B R *D"]]:
        """Return the kept and the pruned tokens of ``x``.

        Raises:
            ShapeError: ``x`` has other images or another length.
        """
        if x.shape[:2] != (len(self.kept), self.length):
            raise ShapeError(
                f"x {tuple(x.shape)} must begin with {(len(self.kept), self.length)}, as the split was made"
            )
        return x.gather(1, _like(self.kept, x)), x.gather(1, _like(self.pruned, x))

    def restore(
        self, x_kept: Shaped[Tensor, "B K *D"], x_pruned: Shaped[Tensor, "B R *D"] | None = None, fill: float = 0.0
    ) -> Shaped[Tensor, "B L *D"]:
        """Put tokens back where they were: the inverse of ``gather``.

        Args:
            x_kept: tokens that stayed.
            x_pruned: tokens that left; ``fill`` takes their places when left out.
            fill: value of missing tokens.

        Raises:
            ShapeError: the tokens do not have the shape that ``gather`` gives.
        """
        expected = tuple(self.kept.shape), tuple(self.pruned.shape)
        if x_kept.shape[:2] != expected[0] or (x_pruned is not None and x_pruned.shape[:2] != expected[1]):
            raise ShapeError(
                f"restore needs tokens beginning with {expected[0]} and {expected[1]}, as gather gives them"
            )
        whole = x_kept.new_full((len(x_kept), self.length, *x_kept.shape[2:]), fill)
        whole = whole.scatter(1, _like(self.kept, x_kept), x_kept)
        return whole if x_pruned is None else whole.scatter(1, _like(self.pruned, x_pruned), x_pruned)


def _like(index: Tensor, x: Tensor) -> Tensor:
    """Repeat positions [B, K] over the trailing axes of ``x``."""
    return index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def topk(score_BL: Shaped[Tensor, "B L"], keep: int, *, valid: Bool[Tensor, "B L"] | None = None) -> Split:
    """Keep the ``keep`` highest-scoring tokens of every image.

    Args:
        score_BL: importance of each token, any number; of equal scores the earlier position is kept. NaN counts as
            -inf: such tokens leave first.
        keep: tokens to keep per image, ``1 <= keep <= L``.
        valid: False on padding, which is kept only when an image has nothing else.

    Returns:
        The split, positions ascending.

    Raises:
        BudgetError: ``keep`` is not in ``[1, L]``, or (checked on the CPU only, where it needs no waiting) an image
            has fewer than ``keep`` valid tokens.

    Cost: O(B L log L) time.
    """
    length = score_BL.shape[1]
    if not 1 <= keep <= length:
        raise BudgetError(f"keep={keep} must lie in [1, {length}] for a sequence of {length} tokens")
    score_BL = score_BL.detach()
    if score_BL.is_floating_point():
        score_BL = score_BL.masked_fill(score_BL.isnan(), -torch.inf)
    order = score_BL.argsort(dim=1, descending=True, stable=True)
    if valid is not None:
        _check_enough(valid, keep)
        # padding goes last whatever its score, and the order of the rest stays
        order = order.gather(1, (~valid).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    return Split(order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values)


def _check_enough(valid: Tensor, keep: int) -> None:
    if valid.device.type != "cpu" or torch.compiler.is_compiling() or len(valid) == 0:
        return
    least = int(valid.sum(dim=1).min())
    if least < keep:
        raise BudgetError(f"keep={keep} must lie in [1, {least}]: one image has only {least} valid tokens")


def soft_topk(
    score_BL: Float[Tensor, "B L"],
    keep: int,
    *,
    tau: float = 1.0,
    noise: torch.Generator | None = None,
    noise_scale: float = 1.0,
    estimator: str = "softmax",
    valid: Bool[Tensor, "B L"] | None = None,
) -> tuple[Split, Float[Tensor, "B L"]]:
    """Keep the ``keep`` highest-scoring tokens, with a gradient through the choice.

    The forward value is the hard top-k; the backward value is a soft one, so a token that was pruned still tells the
    scorer that it was undervalued.

    Args:
        score_BL: importance of each token. NaN and infinities are no error: NaN counts as -inf and leaves first, and
            none of them has a gradient, so that the gradient of the others stays finite.
        keep: tokens to keep per image, ``1 <= keep <= L``.
        tau: temperature of the soft choice, > 0, in units of the score. Lower is closer to the hard choice.
        noise: where given, Gumbel noise from this generator is added to the scores, so that training explores; the
            generator lives on the device of the scores.
        noise_scale: factor on the noise, >= 0.
        estimator: whose gradient, see `foveate.geometry.soft_estimators`: "softmax" (published; falls with 1 / L),
            "threshold" (the sigmoid of a score's distance to the last kept one), "lapsum" (sums to exactly ``keep``) or
            "perturbed" (Monte Carlo).
        valid: False on padding, which has gate 0 and no gradient, and is kept only when an image has nothing else.

    Returns:
        The split, and ``gate_BL``: 1 on kept and 0 on pruned tokens in the forward pass. Multiply kept tokens by
        ``gate`` and pruned ones by ``1 - gate`` to pass the gradient.

    Raises:
        BudgetError: ``keep`` is not in ``[1, L]``, ``tau`` is not positive or ``noise_scale`` negative; as in ``topk``.
        ConfigError: an unknown estimator.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, soft top-k token pruning.
    Differs from the released code: ``keep`` is a count, not a ratio; ties go to the earlier position; noise only from
    a given generator; training and inference share this one path.
    """
    if not tau > 0:
        raise BudgetError(f"tau={tau} must be positive; 1.0 is usual, lower is closer to the hard choice")
    if not noise_scale >= 0:
        raise BudgetError(f"noise_scale={noise_scale} must be at least 0; 1.0 is the published noise, 0 is none")
    choice = estimator_of(estimator)
    if noise is not None:
        uniform = torch.empty_like(score_BL).exponential_(generator=noise)
        score_BL = score_BL - noise_scale * uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()
    split = topk(score_BL, keep, valid=valid)
    hard = torch.zeros_like(score_BL).scatter(1, split.kept, 1.0)
    logit = score_BL.to(torch.promote_types(score_BL.dtype, torch.float32)) / tau
    logit = logit.masked_fill(logit.isnan(), -_FAR).clamp(-_FAR, _FAR)
    if valid is not None:
        hard = hard * valid
        logit = logit.masked_fill(~valid, torch.finfo(torch.float32).min)
    soft = choice(logit, split.kept, noise).to(score_BL.dtype)
    return split, hard + (soft - soft.detach())


def random_keep(
    shape: Sequence[int], keep: int, generator: torch.Generator, *, valid: Bool[Tensor, "B L"] | None = None
) -> Split:
    """Keep ``keep`` tokens of every image at random: the baseline of every scorer.

    Args:
        shape: (B, L).
        keep: tokens to keep per image, ``1 <= keep <= L``.
        generator: where the chance comes from; the split is on its device.
        valid: False on padding, which is kept only when an image has nothing else.

    Raises:
        BudgetError: as in ``topk``.
    """
    num_images, length = shape
    chance = torch.rand((num_images, length), generator=generator, device=generator.device)
    return topk(chance, keep, valid=valid)
