"""The selector against the laws, against one look at everything, and against the published loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_ips import plain_attention, plain_select
from torch import Tensor, nn

import laws
from counting import Counting
from foveate.errors import BudgetError, ConfigError, FormatError
from foveate.geometry.patch_source import TensorPatches
from foveate.nn.patch_encoder import PatchEncoder, create_patch_encoder
from foveate.nn.query_attention import QueryAttention
from foveate.nn.rank import RANKS, best_rank, score_patches, top_positions
from foveate.nn.selection import Selection
from foveate.nn.selector import PatchSelector

CHUNKS = (1, 7, 64, 10_000)


def bag(seed: int, num: int = 150, blank: float = 0.4, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(num, 1, side, side, generator=generator)
    pixels[torch.rand(num, generator=generator) < blank] = 0.0
    pixels[torch.rand(num, generator=generator) < 0.05] = 0.5
    return pixels


def features(seed: int, num: int = 300, width: int = 24) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def cnn(seed: int = 0) -> PatchEncoder:
    torch.manual_seed(seed)
    return create_patch_encoder("cnn", 1, width=32)


def scorer(seed: int = 0, width: int = 32, queries: int = 2, sharp: float = 9.0) -> QueryAttention:
    torch.manual_seed(seed)
    attention = QueryAttention(width, 8, queries)
    attention.query.data *= sharp
    return attention


def centred(seed: int, num: int) -> TensorPatches:
    start = torch.randint(0, 56, (num, 2), generator=torch.Generator().manual_seed(seed))
    return TensorPatches(bag(seed, num), torch.stack([start, start + 8], 1), (64, 64))


class Place(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 32)

    def forward(self, centre: Tensor) -> Tensor:
        return self.linear(centre)


def values(selection: Selection) -> list[Any]:
    return [selection.index, selection.score, selection.logits]


# law 4: chunk invariance, to the bit


@pytest.mark.parametrize("rank", RANKS)
def test_the_choice_is_that_of_one_look_at_everything(rank: str) -> None:
    """100 % for every chunk size, where the published rule reaches 79 to 97 %."""
    encoder, attention = cnn(), scorer()
    selector = PatchSelector(encoder, attention, 16, rank=rank)
    for seed in range(2):
        pixels = bag(seed)
        encoder.eval()
        with torch.no_grad():
            logits = attention.logits(encoder(pixels))
        expected = top_positions(score_patches(logits, 16, rank), 16)
        laws.chunk_invariance(
            lambda chunk, pixels=pixels: selector.select(pixels, chunk).index, lambda _, want=expected: want, CHUNKS
        )


@pytest.mark.parametrize("placed", [False, True])
def test_the_choice_does_not_depend_on_chunk_or_workers_to_the_bit(placed: bool) -> None:
    torch.manual_seed(0)
    source = centred(3, 150)
    selectors = [
        PatchSelector(cnn(), scorer(), 16, position=Place() if placed else None, workers=workers)
        for workers in (0, 1, 3)
    ]
    for selector in selectors[1:]:
        if placed:
            selector.position.load_state_dict(selectors[0].position.state_dict())  # type: ignore[union-attr]
    expected = values(selectors[0].select(source, 256))
    for selector in selectors:
        laws.chunk_invariance(lambda c, s=selector: values(s.select(source, c)), lambda _: expected, CHUNKS)


# law 5: order and determinism


@given(seed=st.integers(0, 99), rank=st.sampled_from(RANKS))
def test_a_permuted_bag_gives_the_same_patches(seed: int, rank: str) -> None:
    x, turn = features(seed), torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    selector = PatchSelector(nn.Identity(), scorer(width=24), 16, rank=rank)
    expected = selector.select(x, 64).index
    assert turn[selector.select(x[turn], 50).index].sort().values.tolist() == expected.tolist()


def test_selection_is_deterministic_and_draws_nothing() -> None:
    selector = PatchSelector(cnn(), scorer(), 16)
    laws.deterministic(lambda: values(selector.select(bag(0))))


# law 1 and 2: inverse, padding


def test_scores_scattered_back_are_the_heatmap() -> None:
    selection = PatchSelector(cnn(), scorer(), 16).select(bag(1))
    share = selection.attention()
    assert share.sum().item() == pytest.approx(1.0)
    assert selection.score is not None
    laws.inverse(
        lambda s: s[selection.index], lambda s: torch.zeros(150).double().scatter(0, selection.index, s), share * 0
    )
    assert torch.equal(share[selection.index], selection.score)


def test_small_bags_are_kept_whole_and_empty_bags_are_empty() -> None:
    """Released code fills short images with zero patches, and attends to them."""
    selector = PatchSelector(cnn(), scorer(), 16)
    for num in (1, 15, 16):
        selection = selector.select(bag(0, num))
        assert selection.index.tolist() == list(range(num))
        assert selection.logits is not None
        assert len(selection.logits) == num
        assert selector.select(bag(0, num), shortcut=True).logits is None
    empty = selector.select(bag(0, 0))
    assert (len(empty.index), empty.num_patches) == (0, 0)


def test_equal_patches_are_chosen_by_position() -> None:
    pixels = torch.zeros(40, 1, 8, 8)
    pixels[20] = 1.0
    for rank in RANKS:
        index = PatchSelector(cnn(), scorer(), 5, rank=rank).select(pixels, 7).index.tolist()
        assert index in ([0, 1, 2, 3, 20], [0, 1, 2, 3, 4])


# what is encoded, and how


def test_blank_patches_are_encoded_once() -> None:
    pixels = torch.zeros(3000, 1, 8, 8)
    pixels[::50] = torch.rand(60, 1, 8, 8)
    pixels[7::100] = 0.25
    counting = Counting(cnn())
    selection = PatchSelector(counting, scorer(), 16).select(pixels, 128)
    assert counting.seen == 64  # 60 patches and two constants, in two blocks
    with torch.no_grad():
        expected = scorer().logits(cnn().eval()(pixels))
    torch.testing.assert_close(selection.logits, expected)


class Reads(TensorPatches):
    """Counts what is read."""

    num_read = 0

    def read(self, index: Tensor) -> Tensor:
        self.num_read += len(index)
        return super().read(index)


def test_patches_known_to_be_blank_are_not_read() -> None:
    pixels = bag(0)
    blank = (pixels == 0).flatten(1).all(1)
    source = Reads(pixels, constant=blank)
    selector = PatchSelector(cnn(), scorer(), 16)
    laws.same(values(selector.select(source, 20)), values(selector.select(pixels, 256)), "known blanks")
    assert source.num_read == int((~blank).sum()) + 1


# several bags at a time


def company() -> list[TensorPatches]:
    """Bags of other sizes, types and blanks."""
    known = bag(1, 70)
    grey = torch.where((known == 0).flatten(1).all(1)[:, None, None, None], 0.25, known)
    bytes_ = (bag(2, 33) * 255).byte()
    return [
        TensorPatches(bag(0)),
        TensorPatches(known, constant=(known == 0).flatten(1).all(1)),
        TensorPatches(grey, constant=(grey == 0.25).flatten(1).all(1)),
        TensorPatches(bag(3, 0)),
        TensorPatches(bytes_),
        TensorPatches(bag(4, 9)),
        TensorPatches(bytes_, constant=torch.zeros(33, dtype=torch.bool)),
    ]


@pytest.mark.parametrize("shortcut", [False, True])
def test_a_bag_does_not_depend_on_its_company_to_the_bit(shortcut: bool) -> None:
    bags, selector = company(), PatchSelector(cnn(), scorer(), 16)
    alone = [values(selector.select(one, 40, shortcut=shortcut)) for one in bags]
    for workers in (0, 2):
        selector.workers = workers
        laws.chunk_invariance(
            lambda chunk: [values(one) for one in selector.select_all(bags, chunk, shortcut=shortcut)],
            lambda _: alone,
            CHUNKS,
        )


def test_places_tallies_and_the_published_rule_are_those_of_each_bag() -> None:
    torch.manual_seed(0)
    bags = [centred(seed, num) for seed, num in ((0, 150), (1, 40), (2, 77))]
    for settings in ({"position": Place()}, {"rule": "buffered"}):
        selector = PatchSelector(cnn(), scorer(), 16, **settings)
        alone = [values(selector.select(one, 20)) for one in bags]
        laws.same([values(one) for one in selector.select_all(bags, 20)], alone, str(settings))
    selector = PatchSelector(cnn(), scorer(), 16)
    for one, source in zip(selector.select_all(bags, 20, tally=True), bags, strict=True):
        own = selector.select(source, 20, tally=True)
        assert one.whole is not None
        assert own.whole is not None
        laws.same(vars(one.whole), vars(own.whole), "tally")


def test_bags_share_blocks() -> None:
    counting = Counting(cnn())
    bags = [TensorPatches(bag(seed, 16, blank=0.0)) for seed in range(8)]
    found = PatchSelector(counting, scorer(), 4).select_all(bags, 5)
    assert len(found) == 8
    assert counting.seen == 128


def test_a_patch_that_cannot_be_ranked_is_named_by_its_place_in_its_bag() -> None:
    x = features(0)
    x[7] = float("nan")
    with pytest.raises(FormatError, match="patch 7: its attention is not finite"):
        PatchSelector(nn.Identity(), scorer(width=24), 16).select_all([TensorPatches(features(1)), TensorPatches(x)])


# released defect I3, I10: modes


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_in_its_mode_again_even_after_an_exception(fails: bool) -> None:
    """The released code leaves the encoder in evaluation mode after an exception, and unfreezes batch norms."""
    encoder: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.BatchNorm1d(32))
    if fails:
        encoder.append(Fails())  # type: ignore[operator]
    encoder.train()
    encoder[2].eval()  # type: ignore[index]
    flags = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    selector = PatchSelector(encoder, scorer(), 4)
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            selector.select(bag(0))
    else:
        selector.select(bag(0))
    assert [module.training for module in encoder.modules()] == flags
    laws.same(encoder.state_dict(), before, "statistics")


# the published rule


def published(attention: QueryAttention) -> Callable[[Tensor], Tensor]:
    return lambda x: plain_attention(
        x,
        attention.query,
        attention.to_query.weight,
        attention.to_key.weight,
        attention.num_heads,
        attention.head_width,
    )


@pytest.mark.parametrize("chunk", [5, 16, 37, 400])
@pytest.mark.parametrize("shuffle", [False, True])
def test_buffered_is_the_published_loop(chunk: int, shuffle: bool) -> None:
    attention = scorer(width=24)
    for seed in range(3):
        x = features(seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed)) if shuffle else None
        selector = PatchSelector(nn.Identity(), attention, 16, rule="buffered", shuffle=shuffle)
        expected = plain_select(x, nn.Identity(), published(attention), 16, chunk, order)
        assert selector.select(x, chunk, generator).index.tolist() == expected.sort().values.tolist()


def test_buffered_scores_with_the_code_of_place() -> None:
    torch.manual_seed(0)
    encoder, attention, place, source = cnn(), scorer(), Place(), centred(0, 150)
    selector = PatchSelector(encoder, attention, 16, rule="buffered", position=place)
    index = selector.select(source, 20).index
    centre = source.boxes.double().mean(1).float() / 64  # type: ignore[union-attr]
    encoder.eval()
    with torch.no_grad():
        expected = plain_select(bag(0, 150), encoder, published(attention), 16, 20, code=place(centre))
    assert index.tolist() == expected.sort().values.tolist()


def overlap(rule: str, heads: int) -> float:
    """Mean share of the patches that chunks of 16 and one look have in common."""
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        attention = QueryAttention(24, heads)
        attention.query.data *= 9
        selector = PatchSelector(nn.Identity(), attention, 16, rule=rule)
        x = features(seed, 512)
        parts = [set(selector.select(x, chunk).index.tolist()) for chunk in (16, 10_000)]
        shares.append(len(parts[0] & parts[1]) / 16)
    return sum(shares) / len(shares)


def test_the_published_rule_depends_on_the_chunk_and_ours_does_not() -> None:
    """Released code takes the mean of heads after a softmax whose normaliser is that of buffer and chunk."""
    assert overlap("buffered", 8) < 0.95
    assert overlap("exact", 8) == 1.0
    assert overlap("buffered", 1) == 1.0


def test_buffered_keeps_small_bags_without_a_look() -> None:
    selector = PatchSelector(Fails(), scorer(), 16, rule="buffered")
    assert selector.select(bag(0, 16)).index.tolist() == list(range(16))


# ranks


def test_best_rank_of_equal_logits_follows_position() -> None:
    logits = torch.tensor([[0.0, 1.0], [-0.0, -2.0], [3.0, 1.0], [-1.0, -3.0]])
    assert best_rank(logits, 3).tolist() == [0, 2, 0, 3]


def test_no_head_is_averaged_away() -> None:
    """One head has found patch 7; the mean over many sharp heads overlooks it."""
    logits = torch.zeros(50, 8)
    logits[:, 1:] = torch.arange(50.0, 0.0, -1.0)[:, None]
    logits[7, 0] = 0.5
    for rank, found in (("mean", False), ("best", True), ("quota", True)):
        assert (7 in top_positions(score_patches(logits, 4, rank), 4).tolist()) == found


# settings


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (BudgetError, {"keep": 0}, "keep=0 is below 1; keep at least one patch, 64 is usual"),
        (ConfigError, {"rule": "greedy"}, "rule='greedy', rank='mean': rules are exact, buffered, ranks are mean"),
        (
            ConfigError,
            {"rule": "buffered", "rank": "best"},
            "rank='best' with rule='buffered': the published rule ranks",
        ),
        (ConfigError, {"shuffle": True}, "shuffle=True with rule='exact': the order changes nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(error: type[Exception], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchSelector(nn.Identity(), scorer(), **settings)


def test_bad_calls_are_refused() -> None:
    selector = PatchSelector(nn.Identity(), scorer(width=24), 16)
    with pytest.raises(BudgetError, match="chunk=0 is below 1; 256 suits most machines"):
        selector.select(features(0), 0)
    with pytest.raises(BudgetError, match="keep=-1 is below 1"):
        selector.select(features(0), keep=-1)
    x = features(0)
    x[[5, 9]] = float("nan")
    with pytest.raises(FormatError, match="patch 5: its attention is not finite; look for NaN in its pixels"):
        selector.select(x)
    shuffling = PatchSelector(nn.Identity(), scorer(width=24), 16, rule="buffered", shuffle=True)
    with pytest.raises(ConfigError, match="shuffle=True without a generator: give one"):
        shuffling.select(features(0))
    with pytest.raises(ConfigError, match="no logits of all 300 patches"):
        PatchSelector(nn.Identity(), scorer(width=24), 16, rule="buffered").select(features(0)).attention()
    placed = PatchSelector(nn.Identity(), scorer(width=24), 16, position=Place())
    with pytest.raises(ConfigError, match="a code of place for a bag without boxes or shape"):
        placed.select(features(0))
