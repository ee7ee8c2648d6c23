"""A warm start: exact where it looked at all, honest where it did not."""

import pytest
import torch
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.geometry.patch_source import TensorPatches
from foveate.nn.query_attention import QueryAttention
from foveate.nn.selector import PatchSelector
from foveate.nn.warm_start import WarmStart


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)
        self.rows: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x)
        out: Tensor = self.linear(x)
        return out

    def distinct(self) -> int:
        rows = len(torch.cat(self.rows).unique(dim=0))
        self.rows = []
        return rows


def setting(num: int = 1000) -> tuple[Counting, PatchSelector, TensorPatches]:
    torch.manual_seed(0)
    encoder = Counting()
    selector = PatchSelector(encoder, QueryAttention(24, 4), 10)
    return encoder, selector, TensorPatches(torch.randn(num, 24))


def test_the_first_and_every_nth_look_are_full_passes() -> None:
    encoder, selector, source = setting()
    warm = WarmStart(contenders=4, sample=0.02, every=3)
    exact, counts = [], []
    for _ in range(7):
        selection = warm.select(selector, "a", source)
        assert selection.coverage is not None
        exact.append(selection.coverage.exact)
        counts.append(encoder.distinct())
    assert exact == [True, False, False, True, False, False, True]
    assert all((count == 1000) == full for count, full in zip(counts, exact, strict=True))
    assert all(count <= 40 + 20 for count, full in zip(counts, exact, strict=True) if not full)


def test_with_the_weights_of_the_last_look_nothing_is_missed() -> None:
    _, selector, source = setting()
    warm, expected = WarmStart(), selector.select(source)
    for _ in range(6):
        selection = warm.select(selector, "a", source)
        assert selection.index.tolist() == expected.index.tolist()
    assert selection.coverage is not None
    assert selection.coverage.overlap == 1.0


def test_the_bound_holds_while_the_weights_move() -> None:
    """Over many looks, more is missed than the bound says in few of them."""
    encoder, selector, source = setting()
    warm = WarmStart(contenders=5, sample=0.1, every=1000)
    warm.select(selector, "a", source)
    held = []
    for _ in range(30):
        encoder.linear.weight.data += 0.02 * torch.randn(24, 24)
        selection = warm.select(selector, "a", source)
        exact = selector.select(source).index
        missed = 10 - int(torch.isin(exact, selection.index).sum())
        assert selection.coverage is not None
        held.append(missed <= selection.coverage.missed)
    assert sum(held) >= 27


def test_the_rotating_sample_comes_to_every_patch() -> None:
    encoder, selector, source = setting(500)
    warm = WarmStart(contenders=1, sample=0.1, every=1000)
    warm.select(selector, "a", source)
    encoder.distinct()
    for _ in range(10):
        warm.select(selector, "a", source)
    assert encoder.distinct() == 500


def test_a_bag_of_another_size_is_new_and_small_bags_are_kept_whole() -> None:
    encoder, selector, source = setting(500)
    warm = WarmStart()
    warm.select(selector, "a", source)
    other = warm.select(selector, "a", TensorPatches(torch.randn(300, 24)))
    assert (other.num_patches, other.coverage is not None and other.coverage.exact) == (300, True)
    encoder.distinct()
    assert warm.select(selector, "b", TensorPatches(torch.randn(7, 24))).index.tolist() == list(range(7))
    assert encoder.rows == []


def test_bad_settings_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"contenders=0.5, sample=0.05, every=5: give at least 1, a share in \(0, 1\]"
    ):
        WarmStart(contenders=0.5)
    _, selector, source = setting(50)
    buffered = PatchSelector(selector.encoder, selector.scorer, rule="buffered")
    with pytest.raises(ConfigError, match="rule='buffered' keeps no logits to start from; choose rule='exact'"):
        WarmStart().select(buffered, "a", source)
