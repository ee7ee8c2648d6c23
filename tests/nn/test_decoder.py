import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import Patches
from foveate.nn import halo
from foveate.nn.decoder import LinearDecoder, TokenDecoder
from foveate.nn.halo import HaloMaps

WIDTH = 12


def mixed_leaves(num_dims: int, shape: tuple[int, ...] = (24, 20, 20)) -> Leaves:
    """Fine 4-pixel leaves in the first corner, 8-pixel leaves elsewhere, the border passed over."""
    shape = shape[:num_dims]
    coarse = uniform_leaves(shape, 8)
    fine = torch.cartesian_prod(*[torch.arange(2)] * num_dims) * 4
    scale = torch.tensor([0] * len(fine) + [1] * (len(coarse) - 1))
    size = torch.where(scale[:, None] == 0, 4, 8).expand(-1, num_dims).contiguous()
    start = torch.cat([fine, coarse.start[1:]])
    return Leaves(start, size, scale, shape, ((4,) * num_dims, (8,) * num_dims))


def build(kind: type[nn.Module] = TokenDecoder, **settings: int) -> nn.Module:
    torch.manual_seed(1)
    defaults = {
        "num_dims": 2,
        "in_chans": 3,
        "num_classes": 2,
        "width": WIDTH,
        "patch_size": 4,
        "num_hidden": 2,
        "channels": 4,
    }
    return kind(**(defaults | settings))


def feed(*leaves: Leaves, patch_size: int = 4, num_hidden: int = 2) -> tuple[tuple[Tensor, ...], Patches]:
    torch.manual_seed(2)
    total = sum(len(one) for one in leaves)
    pixels = torch.randn(total, 3, *(patch_size,) * leaves[0].num_dims)
    return tuple(torch.randn(total, WIDTH) for _ in range(num_hidden)), Patches(pixels, tuple(leaves))


@pytest.mark.parametrize("kind", [LinearDecoder, TokenDecoder])
@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("patch_size", [1, 2, 8])
@pytest.mark.parametrize("num_hidden", [1, 3, 5])
def test_shapes_and_every_weight_learns(kind: type[nn.Module], num_dims: int, patch_size: int, num_hidden: int) -> None:
    decoder = build(kind, num_dims=num_dims, patch_size=patch_size, num_hidden=num_hidden, num_classes=3)
    leaves = mixed_leaves(num_dims)
    hidden, patches = feed(leaves, patch_size=patch_size, num_hidden=num_hidden)
    logits = decoder(hidden, patches)
    assert logits.shape == (len(leaves), 3, *(patch_size,) * num_dims)
    assert logits.is_contiguous()
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, weight in decoder.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("kind", [LinearDecoder, TokenDecoder])
@pytest.mark.parametrize("num_dims", [2, 3])
def test_an_image_gives_the_same_alone_and_in_a_pack(kind: type[nn.Module], num_dims: int) -> None:
    decoder = build(kind, num_dims=num_dims)
    one, two = mixed_leaves(num_dims), uniform_leaves((8, 12, 16)[:num_dims], 4)
    hidden, patches = feed(one, two)
    together = decoder(hidden, patches)
    cut = len(one)
    first = decoder(tuple(x[:cut] for x in hidden), Patches(patches.pixels[:cut], (one,)))
    second = decoder(tuple(x[cut:] for x in hidden), Patches(patches.pixels[cut:], (two,)))
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=0, atol=1e-6)


def test_the_order_of_the_leaves_carries_no_meaning() -> None:
    decoder, leaves = build(), mixed_leaves(2)
    hidden, patches = feed(leaves)
    order = torch.randperm(len(leaves))
    shuffled = Leaves(leaves.start[order], leaves.size[order], leaves.scale[order], leaves.shape, leaves.sizes)
    found = decoder(tuple(x[order] for x in hidden), Patches(patches.pixels[order], (shuffled,)))
    torch.testing.assert_close(found, decoder(hidden, patches)[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["pixels", "hidden"])
def test_a_change_reaches_neighbours_of_any_size_and_stays_local(what: str) -> None:
    decoder, leaves = build(), mixed_leaves(2, (40, 36))
    hidden, patches = feed(leaves)
    before = decoder(hidden, patches)
    fine = 3  # the 4-pixel leaf at (4, 4): fine neighbours at its left and top, 8-pixel ones right and below
    if what == "pixels":
        pixels = patches.pixels.clone()
        pixels[fine] += 1
        after = decoder(hidden, Patches(pixels, patches.leaves))
    else:
        changed = hidden[-1].clone()
        changed[fine] += torch.randn(WIDTH)
        after = decoder((*hidden[:-1], changed), patches)
    moved = (after - before).abs().amax(dim=(1, 2, 3)) > 1e-6
    starts = [tuple(start) for start in leaves.start[moved].tolist()]
    assert {(0, 4), (4, 0), (4, 4), (0, 8), (8, 0), (8, 8)} <= set(starts)
    assert (32, 32) not in starts


@pytest.mark.parametrize("num_dims", [2, 3])
def test_small_chunks_without_gradient_give_the_same(num_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = build(num_dims=num_dims)
    hidden, patches = feed(mixed_leaves(num_dims), uniform_leaves((8, 12, 16)[:num_dims], 4))
    expected = decoder(hidden, patches)
    monkeypatch.setattr(halo, "CHUNK", 600)
    with torch.no_grad():
        torch.testing.assert_close(decoder(hidden, patches), expected.detach(), rtol=0, atol=1e-5)


def test_the_size_of_a_leaf_is_seen_once_learned_and_ignored_before() -> None:
    decoder = build()
    small, large = uniform_leaves((8, 8), 4), uniform_leaves((32, 32), 16)
    hidden, patches = feed(small)
    other = Patches(patches.pixels, (large,))
    assert torch.equal(decoder(hidden, patches), decoder(hidden, other))
    for name, weight in decoder.named_parameters():
        if "modulation" in name:
            nn.init.normal_(weight)
    assert not torch.allclose(decoder(hidden, patches), decoder(hidden, other))


def test_cost_follows_tokens_not_pixels() -> None:
    decoder = build(patch_size=8, num_hidden=4)

    def flops(*leaves: Leaves) -> int:
        hidden, patches = feed(*leaves, patch_size=8, num_hidden=4)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(hidden, patches)
        return int(counter.get_total_flops())

    small, large = flops(uniform_leaves((32, 32), 8)), flops(uniform_leaves((1024, 1024), 256))
    assert small == large  # 16 leaves both
    assert math.isclose(flops(uniform_leaves((64, 64), 8)), 4 * small, rel_tol=0.01)


@pytest.mark.parametrize("learn", [True, False])
def test_half_precision(learn: bool) -> None:
    decoder = build()
    hidden, patches = feed(mixed_leaves(2))
    expected = decoder(hidden, patches).detach()
    with torch.set_grad_enabled(learn), torch.autocast("cpu", torch.bfloat16):
        mixed = decoder(hidden, patches)
    with torch.set_grad_enabled(learn):
        pure = build().bfloat16()(tuple(x.bfloat16() for x in hidden), patches)
    for found in (mixed, pure):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.detach().float(), expected, rtol=0.1, atol=0.1)


def test_neighbour_tables_can_be_handed_in() -> None:
    decoder, leaves = build(), mixed_leaves(2)
    hidden, patches = feed(leaves)
    maps = HaloMaps([leaves])
    assert torch.equal(decoder(hidden, patches, maps), decoder(hidden, patches))
    assert torch.equal(decoder(hidden, patches, maps), decoder(hidden, patches, maps))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 12}, r"patch_size=12: .* must be a power of two; use 8 or decoder='linear'"),
        ({"num_dims": 4}, r"num_dims=4: leaves are 2-D or 3-D; pass 2 or 3"),
        ({"num_hidden": 0}, r"num_hidden=0: a decoder needs at least 1; pass num_hidden >= 1"),
        ({"channels": 0}, r"channels=0: a decoder needs at least 1; pass channels >= 1"),
        ({"num_classes": 0}, r"num_classes=0: a decoder needs at least 1; pass num_classes >= 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


@pytest.mark.parametrize("kind", [LinearDecoder, TokenDecoder])
def test_inputs_are_checked(kind: type[nn.Module]) -> None:
    decoder = build(kind)
    hidden, patches = feed(mixed_leaves(2))
    with pytest.raises(ShapeError, match=r"1 hidden states: the decoder was built for 2; give the encoder as many"):
        decoder(hidden[:1], patches)
    with pytest.raises(ShapeError, match=r"hidden states of \[8, 8\] tokens for 12 patches: drop the prefix tokens"):
        decoder(tuple(x[:8] for x in hidden), patches)
    wide = feed(mixed_leaves(2), patch_size=8)[1]
    with pytest.raises(ShapeError, match=r"patches of 8 samples per side: the decoder was built for 4; call patchify"):
        decoder(hidden, wide)
