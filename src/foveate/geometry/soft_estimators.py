"""Soft choices of k out of L scores: what `soft_topk` puts behind its hard choice in the backward pass.

Each maps logits (scores over a temperature, finite, padding far below everything else) to a soft choice, of which only
the gradient is used.

Legend: B images, L tokens per image, S samples.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveate.errors import ConfigError

SAMPLES = 64
"""Perturbed choices that `perturbed` averages over."""

Estimator = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]


def softmax(
    logit_BL: Float[Tensor, "B L"], kept_BK: Int64[Tensor, "B K"], noise: torch.Generator | None = None
) -> Float[Tensor, "B L"]:
    """The softmax over the image; sums to 1 whatever k is, and its gradient falls with 1 / L.

    Args:
        logit_BL: logits.
        kept_BK: positions of the hard choice.
        noise: not used.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, soft top-k token pruning.
    """
    return logit_BL.softmax(dim=1)


def threshold(
    logit_BL: Float[Tensor, "B L"], kept_BK: Int64[Tensor, "B K"], noise: torch.Generator | None = None
) -> Float[Tensor, "B L"]:
    """The sigmoid of a logit's distance to the last kept one, which is taken as given; its gradient knows no L.

    Args:
        logit_BL: logits.
        kept_BK: positions of the hard choice.
        noise: not used.
    """
    last_B1 = logit_BL.detach().gather(1, kept_BK).min(dim=1, keepdim=True).values
    return (logit_BL - last_B1).sigmoid()


def lapsum(
    logit_BL: Float[Tensor, "B L"], kept_BK: Int64[Tensor, "B K"], noise: torch.Generator | None = None
) -> Float[Tensor, "B L"]:
    """Laplace distribution functions around the one threshold at which they sum to exactly k.

    Args:
        logit_BL: logits.
        kept_BK: positions of the hard choice; only their number counts.
        noise: not used.

    Cost: O(B L log L), in float64.
    Source: Struski, Bednarczyk, Podolak & Tabor, ICML 2025, arXiv 2503.06242. **Differs**: the sums of exponentials are
    taken in logarithms, so any finite logit will do, and the gradient is that of the implicit function.
    """
    keep, length = kept_BK.shape[1], logit_BL.shape[1]
    if keep == length:
        return torch.ones_like(logit_BL) + 0 * logit_BL
    wide_BL = logit_BL.double()
    centre_B1 = _centre(wide_BL.detach(), keep)
    share_BL = (-(wide_BL.detach() - centre_B1).abs()).softmax(dim=1)
    # the centre moves with the logits so that the sum stays
    centre_B1 = centre_B1 + (share_BL * (wide_BL - wide_BL.detach())).sum(dim=1, keepdim=True)
    distance_BL = wide_BL - centre_B1
    tail_BL = 0.5 * (-distance_BL.abs()).exp()
    return torch.where(distance_BL > 0, 1 - tail_BL, tail_BL).to(logit_BL.dtype)


def _centre(logit_BL: Tensor, keep: int) -> Tensor:
    """Where Laplace distribution functions of the logits sum to ``keep``, which is below L; ``[B, 1]``.

    Between two neighbours the sum is m - a e^c / 2 + b e^-c / 2, with m logits above, a the sum of e^-x of these, and b
    the sum of e^x of the others.
    """
    sorted_BL = logit_BL.sort(dim=1, descending=True).values
    nothing_B1 = torch.full_like(sorted_BL[:, :1], -torch.inf)
    above_BM = torch.cat([nothing_B1, (-sorted_BL).logcumsumexp(dim=1)], dim=1)
    below_BM = torch.cat([sorted_BL.flip(1).logcumsumexp(dim=1).flip(1), nothing_B1], dim=1)
    number_M = torch.arange(1, logit_BL.shape[1] + 1, device=logit_BL.device)
    at_logit_BL = (
        number_M - 0.5 * (above_BM[:, 1:] + sorted_BL).exp() + 0.5 * (below_BM[:, 1:] - sorted_BL).exp().nan_to_num()
    )
    m_B1 = (at_logit_BL <= keep).sum(dim=1, keepdim=True)
    a_B1, b_B1 = above_BM.gather(1, m_B1), below_BM.gather(1, m_B1)
    excess_B1 = (m_B1 - keep).abs()
    product_B1 = a_B1 + b_B1
    root_B1 = torch.where(
        excess_B1 == 0, 0.5 * product_B1, (excess_B1 + (excess_B1**2 + product_B1.exp()).sqrt()).log()
    )
    return torch.where(m_B1 >= keep, root_B1 - a_B1, b_B1 - root_B1)


def perturbed(
    logit_BL: Float[Tensor, "B L"], kept_BK: Int64[Tensor, "B K"], noise: torch.Generator | None = None
) -> Float[Tensor, "B L"]:
    """The hard choice averaged over Gaussian perturbations of the logits; sums to k.

    Args:
        logit_BL: logits.
        kept_BK: positions of the hard choice.
        noise: where the perturbations come from; None: the same ones at every call.

    Returns:
        The hard choice, with a Monte Carlo estimate of the gradient of the average.

    Cost: 64 top-k per image; memory 128 B L numbers.
    Source: Berthet et al., NeurIPS 2020, arXiv 2002.08676. **Differs**: the unperturbed choice is taken off every
    sample, which leaves the mean and lowers the variance; the value is the hard choice itself.
    """
    keep = kept_BK.shape[1]
    hard_BL = torch.zeros_like(logit_BL).scatter(1, kept_BK, 1.0)
    if not logit_BL.requires_grad:
        return hard_BL
    source = noise or torch.Generator(logit_BL.device).manual_seed(0)
    shift_SBL = torch.empty((SAMPLES, *logit_BL.shape), dtype=logit_BL.dtype, device=logit_BL.device)
    shift_SBL.normal_(generator=source)
    chosen_SBK = (logit_BL.detach() + shift_SBL).topk(keep, dim=2, sorted=False).indices
    change_SBL = torch.zeros_like(shift_SBL).scatter_(2, chosen_SBK, 1.0).sub_(hard_BL)
    moved_SB1 = (shift_SBL * (logit_BL - logit_BL.detach())).sum(dim=2, keepdim=True)
    return hard_BL + (change_SBL * moved_SB1).mean(dim=0)


ESTIMATORS: dict[str, Estimator] = {
    "threshold": threshold,
    "softmax": softmax,
    "lapsum": lapsum,
    "perturbed": perturbed,
}


def estimator_of(name: str) -> Estimator:
    """The estimator of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ESTIMATORS:
        raise ConfigError(f"estimator={name!r} is none of {', '.join(ESTIMATORS)}; choose one")
    return ESTIMATORS[name]
