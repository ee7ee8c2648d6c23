"""A first look in 8 bits and a second one at the contenders: the choice of float32, for a fraction of its products."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laws
from counting import Counting
from foveate.errors import ConfigError, FormatError, ShapeError
from foveate.geometry.patch_source import TensorPatches
from foveate.models import create_model
from foveate.models.recognition import RecognitionModel
from foveate.nn.fast_copy import fast_copy
from foveate.nn.int8_copy import Int8Projector, int8_copy
from foveate.nn.patch_encoder import create_patch_encoder
from foveate.nn.query_attention import QueryAttention
from foveate.nn.selection import Selection
from foveate.nn.selector import PatchSelector
from foveate.nn.warm_start import WarmStart

FEATURES, KEEP = 96, 40


def features(kind: str, num: int = 3000, seed: int = 0) -> Tensor:
    x = torch.randn(num, FEATURES, generator=torch.Generator().manual_seed(seed))
    return {"even": x, "heavy": x.exp(), "sparse": x.relu() ** 3}[kind].half()


def model(norm: str = "batch", **settings: Any) -> RecognitionModel:
    """With sharp queries, and statistics that are not those of a fresh norm."""
    torch.manual_seed(0)
    settings = {"keep": KEEP, "precision": "int8", **settings}
    made = create_model("ips_features", in_chans=FEATURES, width=64, norm=norm, **settings)
    made.aggregator.attention.query.data *= 9
    for part in made.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            part.running_var.uniform_(0.2, 2.0)  # type: ignore[union-attr]
    return made.eval()


def values(selection: Selection) -> list[Any]:
    return [selection.index, selection.score, selection.logits]


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", ["even", "heavy", "sparse"])
def test_vectors_are_near_those_of_float32(kind: str, norm: str) -> None:
    encoder, x = model(norm).encoder, features(kind, 200).float()
    with torch.no_grad():
        exact, near = encoder(x), int8_copy(encoder)(x)
    assert float((exact - near).norm() / exact.norm()) < 0.06


def test_normalisation_before_and_a_linear_map_behind_stay() -> None:
    torch.manual_seed(0)
    encoder = create_patch_encoder("features", FEATURES, width=32, mean=[1.0] * FEATURES, std=[3.0] * FEATURES)
    encoder.proj = nn.Linear(32, 8)
    x = features("even", 50).float()
    with torch.no_grad():
        torch.testing.assert_close(int8_copy(encoder)(x), encoder.eval()(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("rank", ["mean", "best", "quota"])
@pytest.mark.parametrize("kind", ["even", "heavy", "sparse"])
def test_the_choice_is_that_of_float32(kind: str, rank: str) -> None:
    """Rounding alone changes several of a hundred patches; the second look brings them back."""
    quick = model(rank=rank)
    exact = PatchSelector(fast_copy(quick.encoder), quick.aggregator.attention, KEEP, rank=rank)
    same = []
    for seed in range(3):
        bag = TensorPatches(features(kind, seed=seed))
        chosen, wanted = quick.select(bag), exact.select(bag)
        same.append(float(torch.isin(chosen.index, wanted.index).double().mean()))
        assert chosen.logits is not None
        assert wanted.logits is not None
        assert torch.equal(chosen.logits[chosen.index], wanted.logits[chosen.index])
    assert sum(same) / len(same) >= 0.99


def test_the_choice_does_not_depend_on_chunk_workers_order_or_company_to_the_bit() -> None:
    quick, bags = model(), [TensorPatches(features("heavy", num, num)) for num in (700, 30, 1500)]
    alone = [values(quick.select(one)) for one in bags]
    for workers in (0, 2):
        selector = quick.selector()
        selector.workers = workers
        laws.chunk_invariance(
            lambda chunk, s=selector: [values(one) for one in s.select_all(bags, chunk)],
            lambda _: alone,
            (7, 64, 10_000),
        )
    x, turn = features("heavy", 700, 700), torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert turn[quick.select(x[turn]).index].sort().values.tolist() == alone[0][0].tolist()


def test_the_bits_of_a_row_depend_on_the_row_alone() -> None:
    fast, x = int8_copy(model().encoder), features("sparse", 500).float()
    turn = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    laws.order_invariance(fast, x, turn)


def test_rows_without_deviation_are_the_bias_and_bad_rows_are_named() -> None:
    quick = model()
    x = features("even", 100).float()
    x[3] = 2.5
    with torch.no_grad():
        torch.testing.assert_close(int8_copy(quick.encoder)(x)[3], fast_copy(quick.encoder)(x)[3])
    for bad in (float("nan"), float("inf")):
        x[7, 5] = bad
        with pytest.raises(FormatError, match="patch 7: its attention is not finite; look for NaN in its pixels"):
            quick.select(x)


@pytest.mark.parametrize("precision", ["folded", "bf16", "int8"])
def test_halves_are_looked_at_as_they_are_stored(precision: str) -> None:
    x = features("heavy", 300)
    for settings in ({}, {"mean": (1.0,) * FEATURES, "std": (3.0,) * FEATURES}):
        quick = model(precision=precision, **settings)
        laws.same(values(quick.select(x)), values(quick.select(x.float())), "type of the features")
        mixed = quick.selector().select_all([TensorPatches(x), TensorPatches(x.float())])
        laws.same(values(mixed[0]), values(mixed[1]), "company")


def test_a_judge_sees_the_contenders_alone_and_small_bags_whole() -> None:
    torch.manual_seed(0)
    judge, attention = Counting(nn.Linear(FEATURES, 32)), QueryAttention(32)
    rough = nn.Linear(FEATURES, 32)
    selector = PatchSelector(rough, attention, 700, judge=judge)
    selector.select(features("even").float())
    assert judge.seen == 2048  # 1,400 of 3,000, in two blocks
    x = features("even", 1000)
    laws.same(values(selector.select(x)), values(PatchSelector(judge, attention, 700).select(x)), "judge")


def test_a_warm_start_looks_by_the_judge() -> None:
    quick, bag = model(), TensorPatches(features("heavy"))
    exact = PatchSelector(fast_copy(quick.encoder), quick.aggregator.attention, KEEP)
    found = [WarmStart().select(one, "a", bag) for one in (quick.selector(), exact)]
    laws.same(values(found[0]), values(found[1]), "warm start")


def test_a_model_predicts_and_learns() -> None:
    quick = model().train()
    loss = quick([TensorPatches(features("even", 300))])["label"].sum()
    loss.backward()
    assert all(part.grad is not None for part in quick.encoder.parameters())
    assert not any(isinstance(part, Int8Projector) for part in quick.modules())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ips_cnn", {}, "precision='int8' with encoder='cnn': 8 bits are for stored features; choose bf16"),
        ("ips_features", {"attend": "all"}, "precision='int8' with attend='all' and rule='exact': a second look at"),
        ("ips_features", {"rule": "buffered", "rank": "mean"}, "attend='kept' and rule='buffered': a second look at"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(name, precision="int8", **settings)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ConfigError, match="precision='int8' for SmallCNN: 8 bits are for stored features"):
        int8_copy(create_patch_encoder("cnn", 1))
    with pytest.raises(ConfigError, match="precision='int8' on meta: 8 bits are for the CPU; choose bf16"):
        int8_copy(create_patch_encoder("features", FEATURES).to("meta"))
    with pytest.raises(ShapeError, match=r"patches of \(5,\) for a model of 96 features; give features"):
        model().select(torch.rand(50, 5))
    with pytest.raises(ConfigError, match="a tally with a judge: it would count vectors of the first look"):
        model().selector().select(features("even"), tally=True)
    with pytest.raises(ConfigError, match="a judge with rule='buffered': the published rule looks once"):
        PatchSelector(nn.Identity(), QueryAttention(32), rule="buffered", judge=nn.Identity())
