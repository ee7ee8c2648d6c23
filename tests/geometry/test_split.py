"""Splits: what stays, what leaves, and the gradient through the choice."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import BudgetError, ShapeError
from foveate.geometry.split import Split, random_keep, soft_topk, topk


def some_scores(num_images: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw scores from few values, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (num_images, length), generator=generator).float()


@given(length=st.integers(1, 20), data=st.data(), seed=st.integers(0, 99))
def test_topk_is_the_stable_order(length: int, data: st.DataObject, seed: int) -> None:
    keep = data.draw(st.integers(1, length))
    score = some_scores(3, length, seed)
    split = topk(score, keep)
    for row in range(3):
        ranked = sorted(range(length), key=lambda place: (-score[row, place].item(), place))
        assert split.kept[row].tolist() == sorted(ranked[:keep])
        assert split.pruned[row].tolist() == sorted(ranked[keep:])
    assert split.length == length


def test_padding_is_kept_only_when_there_is_nothing_else() -> None:
    score = torch.tensor([[9.0, -float("inf"), 1.0, 9.0, float("nan")]])
    valid = torch.tensor([[False, True, True, False, False]])
    assert topk(score, 2, valid=valid).kept.tolist() == [[1, 2]]
    with pytest.raises(BudgetError, match=r"keep=3 must lie in \[1, 2\]: one image has only 2 valid tokens"):
        topk(score, 3, valid=valid)


def test_gather_and_restore_keep_trailing_axes() -> None:
    x = torch.randn(2, 7, 3, 4)
    split = topk(some_scores(2, 7), 3)
    kept, pruned = split.gather(x)
    assert kept.shape == (2, 3, 3, 4)
    assert torch.equal(split.restore(kept, pruned), x)
    alone = split.restore(kept, fill=-1.0)
    assert torch.equal(alone.gather(1, split.kept[:, :, None, None].expand_as(kept)), kept)
    assert (alone == -1).all(dim=(2, 3)).sum() == 2 * 4
    flat = torch.arange(14).view(2, 7)
    assert torch.equal(split.restore(*split.gather(flat)), flat)
    assert topk(torch.zeros(2, 5), 5).gather(x[:, :5])[1].shape == (2, 0, 3, 4)


def test_gate_is_hard_forward_and_soft_backward() -> None:
    score = torch.randn(2, 6, requires_grad=True)
    split, gate = soft_topk(score, 2, tau=0.5)
    assert torch.equal(gate.detach(), torch.zeros(2, 6).scatter(1, split.kept, 1.0))
    weight = torch.randn(2, 6)
    (gradient,) = torch.autograd.grad((gate * weight).sum(), score)
    soft_score = score.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(((soft_score / 0.5).softmax(1) * weight).sum(), soft_score)
    torch.testing.assert_close(gradient, expected)
    assert gradient.gather(1, split.pruned).abs().min() > 0


def test_gate_of_padding_is_zero_without_gradient() -> None:
    score = torch.randn(1, 5, requires_grad=True)
    valid = torch.tensor([[True, True, False, True, False]])
    _, gate = soft_topk(score, 2, valid=valid)
    (gradient,) = torch.autograd.grad((gate * torch.randn(1, 5)).sum(), score)
    assert not gate[~valid].any()
    assert not gradient[~valid].any()


def test_noise_comes_from_its_generator_only() -> None:
    score = torch.zeros(4, 50)
    first = soft_topk(score, 10, noise=torch.Generator().manual_seed(0))[0].kept
    again = soft_topk(score, 10, noise=torch.Generator().manual_seed(0))[0].kept
    other = soft_topk(score, 10, noise=torch.Generator().manual_seed(1))[0].kept
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert soft_topk(score, 10)[0].kept.tolist() == [list(range(10))] * 4


def test_random_keep_is_uniform() -> None:
    split = random_keep((4000, 6), 2, torch.Generator().manual_seed(0))
    share = torch.bincount(split.kept.flatten(), minlength=6) / 4000
    assert (share - 2 / 6).abs().max() < 0.03
    valid = torch.tensor([[True] * 3 + [False] * 3]).expand(4000, -1)
    assert random_keep((4000, 6), 2, torch.Generator().manual_seed(0), valid=valid).kept.max() == 2


def test_bfloat16_scores() -> None:
    score = torch.randn(2, 9, dtype=torch.bfloat16, requires_grad=True)
    gate = soft_topk(score, 3)[1]
    assert gate.dtype == torch.bfloat16
    assert gate.sum() == 6


@pytest.mark.parametrize("keep", [0, -1, 11])
def test_keep_out_of_range_is_named(keep: int) -> None:
    with pytest.raises(BudgetError, match=rf"keep={keep} must lie in \[1, 10\] for a sequence of 10 tokens"):
        topk(torch.zeros(1, 10), keep)


def test_splits_say_what_is_wrong() -> None:
    with pytest.raises(BudgetError, match=r"tau=0\.0 must be positive"):
        soft_topk(torch.zeros(1, 3), 1, tau=0.0)
    split = topk(torch.zeros(1, 3), 1)
    with pytest.raises(ShapeError, match=r"must begin with \(1, 3\)"):
        split.gather(torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="as gather gives them"):
        split.restore(torch.zeros(1, 2))
    with pytest.raises((ShapeError, TypeError)):  # the executed annotations may speak first
        Split(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))


def test_topk_maps_over_a_further_axis() -> None:
    score = torch.randn(5, 2, 8)
    kept = torch.func.vmap(lambda one: topk(one, 3).kept)(score)
    assert torch.equal(kept, torch.stack([topk(one, 3).kept for one in score]))


@pytest.mark.slow
def test_soft_topk_compiles_without_a_break() -> None:
    """In a process of its own: the runtime shape checks of the tests cannot be compiled."""
    code = """
import torch
from foveate.geometry.split import soft_topk
chosen = torch.compile(lambda score, valid: soft_topk(score, 2, valid=valid)[1], backend="eager", fullgraph=True)
score, valid = torch.randn(2, 8), torch.arange(8)[None] < torch.tensor([[5], [8]])
assert torch.equal(chosen(score, valid), soft_topk(score, 2, valid=valid)[1])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
