"""Estimators of the choice: exact counts, true gradients, finite whatever the scores are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import laws
from foveate.errors import ConfigError
from foveate.geometry.soft_estimators import ESTIMATORS, lapsum, perturbed, softmax, threshold
from foveate.geometry.split import soft_topk, topk
from foveate.nn.attention import Packing
from foveate.nn.pruner import TokenPruner
from foveate.nn.scorer import TokenScorer


def chosen(logit: Tensor, keep: int) -> Tensor:
    return topk(logit, keep).kept


@settings(deadline=None)
@given(length=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 0.01, 1.0, 1e4]))
def test_lapsum_sums_to_exactly_k(length: int, data: st.DataObject, seed: int, scale: float) -> None:
    keep = data.draw(st.integers(1, length))
    logit = scale * torch.randn(3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    soft = lapsum(logit, chosen(logit, keep))
    torch.testing.assert_close(soft.sum(1), torch.full((3,), float(keep), dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert bool(((soft >= 0) & (soft <= 1)).all())
    order = logit.argsort(dim=1)
    assert bool((soft.gather(1, order).diff(dim=1) >= -1e-12).all()), "a higher score is never less kept"


@pytest.mark.parametrize("keep", [1, 3, 5, 7, 8])
@pytest.mark.parametrize("estimator", [softmax, lapsum], ids=["softmax", "lapsum"])
def test_gradients_are_those_of_the_function(estimator: object, keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    logit = torch.randn(2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    kept = chosen(logit, keep)
    assert torch.autograd.gradcheck(lambda x: estimator(x, kept), (logit,))  # type: ignore[operator]


def test_threshold_is_a_sigmoid_around_the_last_kept() -> None:
    logit = torch.tensor([[2.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    soft = threshold(logit, chosen(logit, 2))
    torch.testing.assert_close(soft, (logit.detach() - 1.0).sigmoid())
    (gradient,) = torch.autograd.grad(soft.sum(), logit)
    torch.testing.assert_close(gradient, (soft * (1 - soft)).detach())


def test_perturbed_estimates_the_gaussian_average() -> None:
    """Of two scores the better one, perturbed, wins with the probability of a normal difference."""
    logit = torch.tensor([0.3, -0.2], dtype=torch.float64).expand(4000, 2).clone().requires_grad_()
    soft = perturbed(logit, chosen(logit, 1), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(soft[:, 0].sum() / len(soft), logit)
    true = math.exp(-(0.5**2) / 4) / math.sqrt(4 * math.pi)
    assert float(gradient[:, 0].sum()) == pytest.approx(true, rel=0.03)
    assert float(gradient[:, 1].sum()) == pytest.approx(-true, rel=0.03)


def test_perturbed_moves_no_global_generator() -> None:
    logit = torch.randn(2, 9, requires_grad=True)

    def apply() -> Tensor:
        (gradient,) = torch.autograd.grad(perturbed(logit, chosen(logit, 3))[:, :4].sum(), logit)
        return gradient

    laws.deterministic(apply)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4, 1e30])
def test_finite_for_any_finite_score(estimator: str, scale: float) -> None:
    score = (scale * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))).requires_grad_()
    for tau in (1.0, 1e-3, 1e3):
        split, gate = soft_topk(score, 7, tau=tau, estimator=estimator)
        assert torch.equal(gate.detach(), torch.zeros(2, 50).scatter(1, split.kept, 1.0))
        (gradient,) = torch.autograd.grad((gate * torch.arange(50.0)).sum(), score)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tokens_of_no_number_leave_first(estimator: str) -> None:
    """NaN counts as -inf; whatever is not finite has no gradient, and takes none from the others."""
    score = torch.tensor([[math.nan, 1.0, math.inf, -math.inf, 0.5, 2.0, -1.0, math.inf]], requires_grad=True)
    for keep, kept in ((1, [2]), (3, [2, 5, 7]), (6, [1, 2, 4, 5, 6, 7]), (7, [0, 1, 2, 4, 5, 6, 7])):
        split, gate = soft_topk(score, keep, tau=0.5, estimator=estimator)
        assert split.kept[0].tolist() == kept
        (gradient,) = torch.autograd.grad((gate * torch.arange(8.0)).sum(), score)
        assert bool(torch.isfinite(gradient).all())
        assert not gradient[0, [0, 2, 3, 7]].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_has_no_gate_and_no_gradient(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 9, generator=generator)
    valid = torch.arange(9)[None] < torch.tensor([[5], [9]])
    weight = torch.randn(2, 9, generator=generator)
    alone, both = score[:1, :5].clone().requires_grad_(), score.requires_grad_()
    for keep in (2, 5):
        _, gate = soft_topk(both, keep, estimator=estimator, valid=valid)
        (gradient,) = torch.autograd.grad((gate * weight).sum(), both)
        assert not gate[~valid].any()
        assert not gradient[~valid].any()
        (expected,) = torch.autograd.grad(
            (soft_topk(alone, keep, estimator=estimator)[1] * weight[:1, :5]).sum(), alone
        )
        if estimator != "perturbed":  # its samples depend on the length
            torch.testing.assert_close(gradient[:1, :5], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_choice_does_not_depend_on_the_estimator(estimator: str) -> None:
    torch.manual_seed(0)
    scorer, x_TD = TokenScorer(16), torch.randn(90, 16)
    pruned = TokenPruner(scorer, estimator)(x_TD, Packing((30, 60)), [7, 20])
    plain = TokenPruner(scorer)(x_TD, Packing((30, 60)), [7, 20])
    assert torch.equal(pruned.split.kept, plain.split.kept)
    assert pruned.packing.lengths == (7, 20)
    kept, _ = pruned.apply(x_TD)
    kept.square().sum().backward()
    gradient = scorer.embed.weight.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize("estimator", ["lapsum", "perturbed"])
def test_what_one_token_gains_the_others_lose(estimator: str) -> None:
    """The soft choice sums to k, so its gradient sums to nothing over the tokens that share the budget."""
    score = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_topk(score, 8, estimator=estimator)[1].sum(), score)
    assert float(gradient.abs().max()) < 1e-6


def test_unknown_estimators_are_refused() -> None:
    with pytest.raises(ConfigError, match="estimator='sinkhorn' is none of threshold, softmax, lapsum, perturbed"):
        soft_topk(torch.zeros(1, 3), 1, estimator="sinkhorn")
