"""Decoding of active leaves: the dense convolutions on a uniform grid, a declared halo elsewhere, its cost."""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import laws
from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import Patches, pack
from foveate.nn import halo
from foveate.nn.sparse_decoder import SparseDecoder

WIDTH = 12


def mixed_leaves(num_dims: int) -> Leaves:
    """Fine 4-pixel leaves in the first corner, 8-pixel leaves elsewhere, the border passed over."""
    shape = (24, 20, 20)[:num_dims]
    coarse = uniform_leaves(shape, 8)
    fine = torch.cartesian_prod(*[torch.arange(2)] * num_dims) * 4
    scale = torch.tensor([0] * len(fine) + [1] * (len(coarse) - 1))
    size = torch.where(scale[:, None] == 0, 4, 8).expand(-1, num_dims).contiguous()
    return Leaves(torch.cat([fine, coarse.start[1:]]), size, scale, shape, ((4,) * num_dims, (8,) * num_dims))


def grid(num_dims: int, patch_size: int = 4) -> Leaves:
    return uniform_leaves(tuple(patch_size * count for count in (4, 3, 3)[:num_dims]), patch_size)


def build(**settings: int) -> SparseDecoder:
    torch.manual_seed(1)
    defaults = {"num_dims": 2, "in_chans": 2, "num_classes": 3, "width": WIDTH, "num_hidden": 2, "channels": 4}
    decoder = SparseDecoder(**(defaults | {"patch_size": 4} | settings))
    for name, weight in decoder.named_parameters():
        if "modulation" in name:
            nn.init.normal_(weight, std=0.3)  # a fresh one treats all sizes alike
    return decoder


def feed(*leaves: Leaves, patch_size: int = 4, num_hidden: int = 2) -> tuple[tuple[Tensor, ...], Patches]:
    generator = torch.Generator().manual_seed(2)
    total = sum(len(one) for one in leaves)
    pixels = torch.randn(total, 2, *(patch_size,) * leaves[0].num_dims, generator=generator)
    hidden = tuple(torch.randn(total, WIDTH, generator=generator) for _ in range(num_hidden))
    return hidden, Patches(pixels, leaves)


def some(total: int, share: float, seed: int = 3) -> Tensor:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(total * share))].sort().values


# the plain version on the image grid: [*S, C] images, ordinary convolutions with zero padding, a mask of active leaves

LEAVES = {2: "(h w) a b c -> (h a) (w b) c", 3: "(d h w) z a b c -> (d z) (h a) (w b) c"}
DOUBLE = {2: "h w (a b c) -> (h a) (w b) c", 3: "d h w (z a b c) -> (d z) (h a) (w b) c"}
BLOCKS = {2: "(h a) (w b) c -> h w (a b c)", 3: "(d z) (h a) (w b) c -> d h w (z a b c)"}


def counts(leaves: Leaves) -> dict[str, int]:
    full = [-(-extent // side) for extent, side in zip(leaves.shape, leaves.min_size, strict=True)]
    return dict(zip("dhw"[3 - len(full) :], full, strict=True))


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    convolve = functional.conv2d if x.ndim == 3 else functional.conv3d
    y = convolve(x.movedim(-1, 0)[None], block.conv.weight, block.conv.bias, padding=1)[0].movedim(0, -1)
    gain, shift = block.modulation(torch.zeros(x.ndim - 1, dtype=x.dtype)).chunk(2)
    return functional.gelu(block.norm(y) * (1 + gain) + shift)


def plain(decoder: SparseDecoder, hidden: tuple[Tensor, ...], patches: Patches, active: Tensor) -> Tensor:
    """Logits as leaves, "T K *P", by way of the whole image."""
    (leaves,), num_dims, patch_size = patches.leaves, patches.num_dims, patches.patch_size
    cells, step = counts(leaves), dict.fromkeys("zab"[3 - num_dims :], 2)

    def image(rows_TC: Tensor, side: int) -> Tensor:
        return rearrange(rows_TC.view(len(leaves), *(side,) * num_dims, -1), LEAVES[num_dims], **cells)

    alive = torch.zeros(len(leaves), 1, dtype=torch.bool).index_fill_(0, active, True)
    picture = image(patches.pixels.movedim(1, -1), patch_size)
    tokens = sum(narrow(norm(x)) for narrow, norm, x in zip(decoder.narrow, decoder.norms, hidden, strict=True))
    x = image(decoder.spread(tokens), decoder.side)
    x = x + plain_block(decoder.block, x)
    low = rearrange(x, f"{LEAVES[num_dims].split(' -> ')[1]} -> {LEAVES[num_dims].split(' -> ')[0]}", **cells)
    low = decoder.coarse(low).movedim(-1, 1)
    mode = "bilinear" if num_dims == 2 else "trilinear"
    logits = functional.interpolate(low, size=(patch_size,) * num_dims, mode=mode, align_corners=False)
    for stage in decoder.stages:
        below, ratio = x, patch_size // stage.side
        blocks = rearrange(picture, BLOCKS[num_dims], **dict.fromkeys(step, ratio))
        x = rearrange(stage.up(below), DOUBLE[num_dims], **step) + functional.gelu(stage.stem(blocks))
        mask = image(alive.expand(-1, stage.side**num_dims), stage.side)
        x = torch.where(mask, x + plain_block(stage.block, x), x)
    high = rearrange(x, f"{LEAVES[num_dims].split(' -> ')[1]} -> {LEAVES[num_dims].split(' -> ')[0]}", **cells)
    fine = decoder.fine(high).movedim(-1, 1)
    return logits + torch.where(alive.view(-1, *(1,) * (num_dims + 1)), fine, 0)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_dims", [2, 3])
def test_equals_the_dense_convolutions(num_dims: int, patch_size: int, share: float) -> None:
    """All leaves active: the dense decoder. Some: that decoder where inactive leaves pass no convolution of a stage."""
    decoder = build(num_dims=num_dims, patch_size=patch_size).double()
    hidden, patches = feed(grid(num_dims, patch_size), patch_size=patch_size)
    inputs = [x.double().requires_grad_() for x in (*hidden, patches.pixels)]
    active = some(len(patches.pixels), share)
    weight = torch.randn(len(patches.pixels), 3, *patches.pixels.shape[2:], dtype=torch.float64)
    results = []
    for decode in (decoder, lambda *args: plain(decoder, *args)):
        decoder.zero_grad()
        logits = decode(tuple(inputs[:-1]), patches.with_pixels(inputs[-1]), active)
        gradients = torch.autograd.grad((logits * weight).sum(), inputs + list(decoder.parameters()), allow_unused=True)
        results.append([logits.detach(), *(torch.zeros(()) if x is None else x for x in gradients)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_an_active_leaf_hardly_notices_who_else_is_active(num_dims: int) -> None:
    """Inactive neighbours are as good as dense but for one residual in a ring of one sample, at any size of leaf."""
    decoder = build(num_dims=num_dims, patch_size=8)
    hidden, patches = feed(mixed_leaves(num_dims), patch_size=8)
    dense = decoder(hidden, patches)
    one = torch.tensor([2**num_dims])  # a leaf between fine and coarse ones
    inner = (slice(None), *(slice(1, -1),) * num_dims)
    torch.testing.assert_close(decoder(hidden, patches, one)[one][:, *inner], dense[one][:, *inner])
    assert not torch.allclose(decoder(hidden, patches, one)[one], dense[one], atol=1e-4)
    blank = patches.with_pixels(
        patches.pixels * (torch.arange(len(patches.pixels)) == one).view(-1, *(1,) * (num_dims + 1))
    )
    assert not torch.allclose(decoder(hidden, blank, one)[one], decoder(hidden, patches, one)[one], atol=1e-4)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_other_leaves_show_their_coarse_logits(num_dims: int) -> None:
    decoder = build(num_dims=num_dims, patch_size=8)
    hidden, patches = feed(mixed_leaves(num_dims), patch_size=8)
    active = some(len(patches.pixels), 0.3)
    others = torch.ones(len(patches.pixels), dtype=torch.bool).index_fill_(0, active, False)
    nothing = decoder(hidden, patches, active[:0])
    logits, lazy = decoder(hidden, patches, active), decoder.decode(hidden, patches, active)
    assert torch.equal(logits[others], nothing[others])
    assert bool((logits[active] != nothing[active]).any(1).all())
    assert lazy.coarse.shape == (len(others), 3, 2**num_dims)
    assert lazy.fine.shape == (len(active), 3, 8**num_dims)
    assert torch.equal(lazy.dense().view_as(logits), logits)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_every_weight_and_every_input_learns(num_dims: int) -> None:
    decoder = build(num_dims=num_dims, patch_size=8)
    hidden, patches = feed(mixed_leaves(num_dims), patch_size=8)
    hidden = tuple(x.requires_grad_() for x in hidden)
    patches.pixels.requires_grad_()
    active = some(len(patches.pixels), 0.3)
    logits = decoder(hidden, patches, active)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    assert all(bool(x.grad.any(1).all()) for x in hidden)
    assert bool(patches.pixels.grad[active].flatten(1).all(1).all())


@pytest.mark.parametrize("num_dims", [2, 3])
def test_an_image_gives_the_same_alone_and_in_a_pack(num_dims: int) -> None:
    decoder = build(num_dims=num_dims)
    samples = []
    for leaves, share in ((mixed_leaves(num_dims), 0.3), (grid(num_dims), 0.5), (grid(num_dims), 0.0)):
        hidden, patches = feed(leaves)
        samples.append((hidden, patches, some(len(leaves), share)))

    def apply(batch: list[tuple[tuple[Tensor, ...], Patches, Tensor]]) -> list[Tensor]:
        lengths = [len(patches.pixels) for _, patches, _ in batch]
        starts = [sum(lengths[:place]) for place in range(len(batch))]
        active = torch.cat([one[2] + start for one, start in zip(batch, starts, strict=True)])
        hidden = tuple(torch.cat(depth) for depth in zip(*(one[0] for one in batch), strict=True))
        return list(decoder(hidden, pack([one[1] for one in batch]), active).split(lengths))

    laws.batch_invariance(apply, samples, tolerance=1e-5)


def test_the_order_of_the_leaves_carries_no_meaning() -> None:
    decoder, leaves = build(), mixed_leaves(2)
    hidden, patches = feed(leaves)
    alive = torch.zeros(len(leaves), dtype=torch.bool).index_fill_(0, some(len(leaves), 0.4), True)

    def apply(place: Tensor) -> Tensor:
        return decoder(tuple(x[place] for x in hidden), patches.select([place]), alive[place].nonzero()[:, 0])

    order = torch.randperm(len(leaves), generator=torch.Generator().manual_seed(0))
    laws.order_invariance(apply, torch.arange(len(leaves)), order, tolerance=1e-5)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_small_chunks_without_gradient_give_the_same(num_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = build(num_dims=num_dims)
    hidden, patches = feed(mixed_leaves(num_dims))
    active = some(len(patches.pixels), 0.5)
    expected = decoder(hidden, patches, active)
    monkeypatch.setattr(halo, "CHUNK", 600)
    with torch.no_grad():
        torch.testing.assert_close(decoder(hidden, patches, active), expected.detach(), rtol=0, atol=1e-5)


def test_a_choice_without_gradient_is_deterministic() -> None:
    decoder = build(patch_size=8)
    hidden, patches = feed(mixed_leaves(2), patch_size=8)
    laws.deterministic(lambda: decoder(hidden, patches, some(len(patches.pixels), 0.4)))


@pytest.mark.parametrize("learn", [True, False])
def test_half_precision(learn: bool) -> None:
    decoder = build()
    hidden, patches = feed(mixed_leaves(2))
    active = some(len(patches.pixels), 0.4)
    expected = decoder(hidden, patches, active).detach()
    with torch.set_grad_enabled(learn), torch.autocast("cpu", torch.bfloat16):
        mixed = decoder(hidden, patches, active)
    with torch.set_grad_enabled(learn):
        pure = build().bfloat16()(tuple(x.bfloat16() for x in hidden), patches, active)
    for found in (mixed, pure):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.detach().float(), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_cost_follows_the_active_leaves(num_dims: int) -> None:
    decoder = build(num_dims=num_dims, patch_size=8, channels=8)
    leaves = uniform_leaves((64,) * num_dims if num_dims == 2 else (40,) * 3, 8)
    hidden, patches = feed(leaves, patch_size=8)

    def flops(number: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(hidden, patches, torch.arange(number) * len(leaves) // max(number, 1))
        return int(counter.get_total_flops())

    total = len(leaves)
    costs = [flops(round(total * share)) for share in (0, 0.1, 0.25, 0.5, 1)]
    assert costs == sorted(costs)
    above = [cost - costs[0] for cost in costs]
    assert above[2] <= 0.3 * above[4]  # a rim around every active leaf
    assert costs[1] <= (0.55 if num_dims == 2 else 0.35) * costs[4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 12}, r"patch_size=12: the sparse decoder .* power of two; use 8 or decoder='linear'"),
        ({"num_dims": 4}, r"num_dims=4: leaves are 2-D or 3-D; pass 2 or 3"),
        ({"num_hidden": 0}, r"num_hidden=0: a decoder needs at least 1; pass num_hidden >= 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_inputs_are_checked() -> None:
    decoder = build()
    hidden, patches = feed(mixed_leaves(2))
    with pytest.raises(ShapeError, match=r"1 hidden states: the decoder was built for 2; give the encoder as many"):
        decoder(hidden[:1], patches)
    with pytest.raises(ShapeError, match=r"active leaves must ascend within 0\.\.11, got 3 from 5 to 12"):
        decoder(hidden, patches, torch.tensor([5, 3, 12]))
