"""What training starts with: the most detailed patches, whatever attention thinks of them."""

import pytest
import torch
from torch import Tensor

from foveate.errors import BudgetError, ConfigError
from foveate.geometry.patch_source import TensorPatches
from foveate.models import create_model
from foveate.nn.detail_prior import DetailPrior, detail
from foveate.nn.schedule import KeepSchedule


class Counted(TensorPatches):
    """Patches that remember how many were read."""

    count = 0

    def read(self, index: Tensor) -> Tensor:
        self.count += len(index)
        return super().read(index)


def bag(num: int = 40, blank: int = 0) -> Counted:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (num, 1, 8, 8), dtype=torch.uint8)
    pixels[:blank] = 7
    return Counted(pixels, constant=torch.arange(num) < blank)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_detail_is_the_variance_of_a_patch_whatever_the_chunk(chunk: int) -> None:
    source = bag()
    expected = source.read(torch.arange(40)).flatten(1).double().var(1, correction=0)
    assert torch.equal(detail(source, chunk), detail(source))
    torch.testing.assert_close(detail(source), expected)


def test_what_is_known_to_be_blank_is_not_read() -> None:
    source = bag(blank=30)
    found = detail(source)
    assert source.count == 10
    assert not found[:30].any()
    assert bool((found[30:] > 0).all())


def test_a_bag_is_read_for_its_detail_once() -> None:
    source, prior = bag(), DetailPrior(5)
    first = prior.order("a", source)
    assert len(first) == 5
    assert source.count == 40
    assert prior.order("a", source) is first
    assert source.count == 40
    assert detail(source)[first].tolist() == sorted(detail(source).tolist(), reverse=True)[:5]


def test_the_chosen_are_those_of_attention_and_the_most_detailed_of_the_others() -> None:
    source = bag(60)
    model = create_model("ips_cnn", in_chans=1, patch_size=8, keep=10).train()
    alone = model.choose([source], 6).selections[0].index
    both = model.choose([source], 10, prior=DetailPrior(10), by_detail=4, names=["a"]).selections[0].index
    order = detail(source).argsort(descending=True, stable=True)
    more = [int(place) for place in order if place not in alone][:4]
    assert both.tolist() == sorted([*alone.tolist(), *more])


@pytest.mark.parametrize("num", [3, 8, 10])
def test_a_bag_of_few_patches_is_kept_whole(num: int) -> None:
    model = create_model("ips_cnn", in_chans=1, patch_size=8, keep=10)
    chosen = model.choose([bag(num)], 10, prior=DetailPrior(10), by_detail=4, names=["a"])
    assert chosen.selections[0].index.tolist() == list(range(num))


def test_the_share_falls_to_nothing_and_leaves_one_to_attention() -> None:
    schedule = KeepSchedule(80, 10, 6, 0.5)
    assert [schedule.by_detail_at(epoch) for epoch in (0, 3, 6, 9)] == [40, 7, 0, 0]
    assert KeepSchedule(1, 1, 6, 0.9).by_detail_at(0) == 0
    assert KeepSchedule(8, 2, 6).by_detail_at(0) == 0


def test_bad_input_says_what_to_do() -> None:
    model, source = create_model("ips_cnn", in_chans=1, patch_size=8, keep=10), bag()
    with pytest.raises(BudgetError, match="most=0 is below 1; remember at least as many patches as the first epoch"):
        DetailPrior(0)
    with pytest.raises(ConfigError, match=r"by_detail=1.0 is outside 0 to below 1: leave some patches to attention"):
        KeepSchedule(8, 2, 6, 1.0)
    with pytest.raises(ConfigError, match="1 bags with 0 names: name each bag, as they are remembered by name"):
        model.choose([source], prior=DetailPrior(10), by_detail=4)
    with pytest.raises(ConfigError, match="by_detail=10 of 10 patches: give a prior, and leave one patch at least"):
        model.choose([source], prior=DetailPrior(10), by_detail=10, names=["a"])
    with pytest.raises(ConfigError, match="by_detail=4 of 10 patches: give a prior"):
        model.choose([source], by_detail=4, names=["a"])
