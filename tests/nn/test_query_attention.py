"""Learned queries: the published numbers, tallies that merge, and a prediction from all patches."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_ips import plain_attention
from torch import Tensor

import laws
from foveate.errors import ConfigError, ShapeError
from foveate.nn.aggregator import Aggregator, PlaceCode
from foveate.nn.query_attention import QueryAttention, Tally


def attention(width: int = 16, heads: int = 4, queries: int = 3, head_width: int | None = None) -> QueryAttention:
    torch.manual_seed(0)
    module = QueryAttention(width, heads, queries, head_width)
    module.query.data *= 5
    return module


def vectors(num: int, seed: int = 0, width: int = 16) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_width", [None, 5])
def test_folded_logits_and_pooling_are_the_published_ones(head_width: int | None) -> None:
    module, x = attention(head_width=head_width), vectors(30)
    share = plain_attention(x, module.query, module.to_query.weight, module.to_key.weight, 4, module.head_width)
    logits = module.logits(x)
    assert logits.shape == (30, 12)
    torch.testing.assert_close(logits.softmax(0).T.unflatten(0, (3, 4)), share)
    value = (x @ module.to_value.weight.T).view(30, 4, module.head_width)
    read = torch.einsum("qhn,nhe->qhe", share, value).flatten(1)
    torch.testing.assert_close(module.pool(x), module.proj(read))


def test_bags_of_one_length_pool_together() -> None:
    module, x = attention(), torch.stack([vectors(9, seed) for seed in range(4)])
    torch.testing.assert_close(module.pool(x), torch.stack([module.pool(one) for one in x]))


def test_order_of_patches_carries_no_meaning() -> None:
    module, turn = attention(), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    laws.order_invariance(module.logits, vectors(20), turn)
    torch.testing.assert_close(module.pool(vectors(20)[turn]), module.pool(vectors(20)))


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_tallies_merge_in_any_grouping(seed: int, cuts: list[int]) -> None:
    module, x = attention(), vectors(40, seed) * 30
    logits = module.logits(x).detach()
    edges = [0, *sorted(cuts), 40]
    parts = [Tally.of(logits[a:b], x[a:b]) for a, b in itertools.pairwise(edges)]
    expected = Tally.of(logits, x)
    for order in (parts, parts[::-1]):
        laws.same(Tally.merge_all(order), expected, "merged", 1e-9)
    if len(parts) > 2:
        left, right = parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(parts[1].merge(parts[2]))
        laws.same(left, right, "associative", 1e-12)


def test_a_tally_of_nothing_changes_nothing() -> None:
    module, x = attention(), vectors(7)
    nothing, one = Tally.of(torch.zeros(0, 12), x[:0]), Tally.of(module.logits(x).detach(), x)
    laws.same(nothing.merge(one), one, "nothing")
    laws.same(nothing.merge(nothing), nothing, "nothing twice")


def test_with_a_tally_the_value_is_that_of_all_and_the_gradient_that_of_the_kept() -> None:
    module, x = attention(), vectors(50)
    whole = Tally.of(module.logits(x).detach(), x)
    kept = x[:8].clone().requires_grad_()
    out = module.pool(kept, whole)
    torch.testing.assert_close(out, module.pool(x))
    everything = x.clone().requires_grad_()
    weight = vectors(3, 5)
    (expected,) = torch.autograd.grad((module.pool(everything) * weight).sum(), everything)
    (found,) = torch.autograd.grad((out * weight).sum(), kept, retain_graph=True)
    torch.testing.assert_close(found, expected[:8])
    value = [module.to_value.weight]
    exact = torch.autograd.grad((module.pool(x) * weight).sum(), value)[0]
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), value)[0], exact)


def test_an_empty_bag_pools_to_zero() -> None:
    module = attention()
    laws.same(module.pool(vectors(0)), module.proj(torch.zeros(3, 16)), "empty")
    laws.same(module.pool(vectors(0), Tally.of(torch.zeros(0, 12), vectors(0))), torch.zeros(3, 16), "empty tally")


def test_aggregator_of_one_bag_is_that_of_many() -> None:
    aggregator = Aggregator(attention()).eval()
    x = torch.stack([vectors(9, seed) for seed in range(4)])
    out = aggregator(x)
    assert out.shape == (4, 3, 16)
    torch.testing.assert_close(out, torch.stack([aggregator(one) for one in x]))
    assert aggregator(vectors(0)).isfinite().all()


@pytest.mark.parametrize("num_dims", [2, 3])
def test_a_code_of_place_knows_places_apart_for_any_image(num_dims: int) -> None:
    centre = torch.rand(200, num_dims, generator=torch.Generator().manual_seed(0))
    code = PlaceCode("sine", 30, num_dims)(centre)
    assert code.shape == (200, 30)
    distance = torch.cdist(code, code) + 9 * torch.eye(200)
    assert float(distance.min()) > 1e-3
    assert not PlaceCode("sine", 30, num_dims).state_dict()


def test_a_learned_code_starts_at_zero_and_is_kept_in_the_state_dict() -> None:
    """In the released code it is a plain attribute, lost in checkpoints."""
    code = PlaceCode("learned", 16)
    assert sorted(code.state_dict()) == ["linear.bias", "linear.weight"]
    assert not code(torch.rand(5, 2)).any()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="num_heads=3, num_queries=1, head_width=None: both counts must be at least 1"
    ):
        QueryAttention(16, 3)
    with pytest.raises(ConfigError, match="position='index' is none of none, sine, learned; choose one"):
        PlaceCode("index", 16)
    module, x = attention(), vectors(5)
    whole = Tally.of(module.logits(x).detach(), x)
    with pytest.raises(ShapeError, match=r"a tally of \(12, 16\) for vectors \(2, 5, 16\) and 12 queries of heads"):
        module.pool(torch.stack([x, x]), whole)
