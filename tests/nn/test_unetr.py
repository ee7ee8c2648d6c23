import math

import pytest
import torch
from plain_vit import randomise
from torch import Tensor, nn

import foveate as fv
import laws
from foveate.errors import ConfigError, ShapeError
from foveate.geometry.leaves import Leaves, uniform_leaves
from foveate.geometry.patches import Patches
from foveate.nn.unetr import DenseDecoder, cells, merge, sample_rows, split
from foveate.nn.unetr_blocks import channels_last

WIDTH = 12


def mixed_leaves() -> Leaves:
    """A 16-pixel leaf beside four of 8 and two of 16, in an image of 30 x 28."""
    start = torch.tensor([[0, 0], [0, 16], [0, 24], [8, 16], [8, 24], [16, 0], [16, 16]])
    scale = torch.tensor([1, 0, 0, 0, 0, 1, 1])
    size = (8 * 2**scale)[:, None].expand(-1, 2).contiguous()
    return Leaves(start, size, scale, (30, 28), ((8, 8), (16, 16)))


def build(**settings: int) -> DenseDecoder:
    torch.manual_seed(1)
    defaults = {
        "num_dims": 2,
        "in_chans": 1,
        "num_classes": 2,
        "width": WIDTH,
        "patch_size": 4,
        "num_hidden": 2,
        "channels": 4,
    }
    return DenseDecoder(**(defaults | settings))


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("num_hidden", [1, 2, 5])
def test_shapes(num_dims: int, num_hidden: int) -> None:
    decoder = build(num_dims=num_dims, num_hidden=num_hidden, num_classes=3)
    leaves = uniform_leaves((8, 12, 8)[:num_dims], 4)
    hidden = tuple(torch.randn(len(leaves), WIDTH) for _ in range(num_hidden))
    logits = decoder(hidden, Patches(torch.randn(len(leaves), 1, *(4,) * num_dims), (leaves,)))
    assert logits.shape == (len(leaves), 3, *(4,) * num_dims)
    logits.square().sum().backward()
    assert [name for name, weight in decoder.named_parameters() if weight.grad is None] == []


def test_a_uniform_canvas_is_the_image() -> None:
    leaves = uniform_leaves((8, 12), 4)
    leaf = cells(leaves)
    row = sample_rows(leaves, leaf, 4)
    assert leaf.tolist() == [[0, 1, 2], [3, 4, 5]]
    y, x = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    assert torch.equal(row, leaf[y // 4, x // 4] * 16 + y % 4 * 4 + x % 4)


def test_a_large_leaf_covers_several_cells() -> None:
    leaf = cells(mixed_leaves())
    row = sample_rows(mixed_leaves(), leaf, 4)
    assert leaf.tolist() == [[0, 0, 1, 2], [0, 0, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]]
    assert row.shape == (16, 16)
    assert torch.equal(row[:8, :8], torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(row[:4, 8:12], 16 + torch.arange(16).view(4, 4))


def test_an_image_gives_the_same_alone_and_in_a_pack() -> None:
    decoder = build()
    one, two = mixed_leaves(), uniform_leaves((8, 12), 4)
    hidden = tuple(torch.randn(len(one) + len(two), WIDTH) for _ in range(2))
    pixels = torch.randn(len(one) + len(two), 1, 4, 4)
    cut = len(one)
    together = decoder(hidden, Patches(pixels, (one, two)))
    first = decoder(tuple(x[:cut] for x in hidden), Patches(pixels[:cut], (one,)))
    torch.testing.assert_close(together[:cut], first, rtol=0, atol=1e-6)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"patch_size=6: UNETR doubles resolution from 1; use a power of two >= 2"):
        build(patch_size=6)
    with pytest.raises(ConfigError, match=r"num_dims=1: leaves are 2-D or 3-D; pass 2 or 3"):
        build(num_dims=1)
    with pytest.raises(ConfigError, match=r"num_hidden=0: a decoder needs at least 1; pass num_hidden >= 1"):
        build(num_hidden=0)


def test_a_selection_cannot_be_painted() -> None:
    leaves = mixed_leaves()
    part = Leaves(leaves.start[:5], leaves.size[:5], leaves.scale[:5], leaves.shape, leaves.sizes)
    with pytest.raises(ShapeError, match=r"8 cells of the image \(30, 28\) lie in no leaf: .* use the token decoder"):
        cells(part)


def test_inputs_are_checked() -> None:
    decoder, leaves = build(), mixed_leaves()
    patches = Patches(torch.zeros(len(leaves), 1, 4, 4), (leaves,))
    x_TD = torch.zeros(len(leaves), WIDTH)
    with pytest.raises(ShapeError, match=r"1 hidden states: the decoder was built for 2; give the encoder as many"):
        decoder((x_TD,), patches)
    wide = Patches(torch.zeros(len(leaves), 1, 8, 8), (leaves,))
    with pytest.raises(ShapeError, match=r"patches of 8 samples per side: the decoder was built for 4; call patchify"):
        decoder((x_TD, x_TD), wide)


def monai_unetr(num_dims: int, side: int) -> nn.Module:
    from monai.networks.nets import UNETR

    net = UNETR(2, 3, side, feature_size=4, hidden_size=24, mlp_dim=96, num_heads=3, spatial_dims=num_dims)
    randomise(net)
    return net.eval()


def as_ours(net: nn.Module) -> dict[str, Tensor]:
    """Its weights by our names."""
    names = (
        ("vit.patch_embedding.patch_embeddings.", "encoder.patch_embed.proj."),
        ("vit.patch_embedding.position_embeddings", "encoder.pos_embed"),
        ("vit.", "encoder."),
        (".linear1.", ".fc1."),
        (".linear2.", ".fc2."),
        (".out_proj.", ".proj."),
        ("encoder1.", "decoder.picture."),
        *((f"encoder{4 - i}.", f"decoder.skips.{i}.") for i in range(3)),
        *((f"decoder{5 - i}.", f"decoder.ups.{i}.") for i in range(4)),
        ("out.conv", "decoder.out.conv"),
    )
    state = {}
    for name, value in net.state_dict().items():
        for theirs, own in names:
            if name.startswith(theirs) or theirs.startswith("."):
                name = name.replace(theirs, own, 1)
        state[name] = value
    return state


@pytest.mark.parametrize(("num_dims", "side"), [(2, 64), (3, 32)])
def test_without_prune_points_it_is_monai_unetr(num_dims: int, side: int) -> None:
    """Neutrality: the same weights give the same logits."""
    net = monai_unetr(num_dims, side)
    name = "scd_unetr_small" if num_dims == 2 else "scd_unetr_small_3d"
    sizes = {"width": 24, "num_heads": 3, "decoder_width": 4, "pos_grid": side // 16, "class_token": False}
    model = fv.create_model(name, in_chans=2, num_classes=3, prune_after=(), **sizes).eval()  # type: ignore[arg-type]
    state, ours = as_ours(net), model.state_dict()
    assert all("geometry_embed" in key or key.endswith("qkv.bias") for key in ours if key not in state)
    model.load_state_dict({key: state.get(key, torch.zeros_like(value)) for key, value in ours.items()})
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    image, leaves = torch.randn(2, *(side,) * num_dims), fv.uniform_leaves((side,) * num_dims, 16)
    with torch.no_grad():
        found = fv.unpatchify(model(fv.patchify(image, leaves, 16)), leaves)
        torch.testing.assert_close(found, net(image[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize("pooled", [True, False])
def test_blocks_run_as_monai_runs_them(num_dims: int, pooled: bool) -> None:
    """Forward and backward in double precision, channels and extents of every kind."""
    decoder = build(num_dims=num_dims, num_hidden=3, patch_size=8, pooled=pooled).double()
    hidden = [torch.randn(1, WIDTH, *(4, 6, 4)[:num_dims], dtype=torch.float64, requires_grad=True) for _ in range(3)]
    picture = torch.randn(1, 1, *(32, 48, 32)[:num_dims], dtype=torch.float64)

    def monai() -> Tensor:
        average = (nn.AvgPool2d, nn.AvgPool3d)[num_dims - 2](3, 2, 1)
        x = average(hidden[-1]) if pooled else hidden[-1]
        for i, (up, skip) in enumerate(zip(decoder.ups, decoder.skips, strict=False)):
            x = up(x, skip(hidden[max(1 - i, 0)]))
        return decoder.out(decoder.ups[-1](x, decoder.picture(picture)))

    results = []
    for run in (monai, lambda: decoder._dense([channels_last(x) for x in hidden], channels_last(picture))):
        logits = run()
        own = [*hidden, *decoder.parameters()]
        weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        results.append((logits, *torch.autograd.grad((logits * weight).sum(), own, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_patches_side_by_side_and_apart() -> None:
    for counts in ((3, 2), (2, 3, 2)):
        num = math.prod(counts)
        pixels = torch.randn(num, 5, *(4,) * len(counts))
        picture = merge(pixels, counts)
        assert picture.shape == (1, 5, *(4 * count for count in counts))
        assert picture.is_contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[len(counts) - 2])
        second = picture[0, ..., 4:8][(slice(None), *(slice(4),) * (len(counts) - 1))]
        assert torch.equal(second, pixels[1])
        laws.inverse(lambda x, counts=counts: merge(x, counts), lambda x: split(x, 4), pixels)


@pytest.mark.parametrize("counts", [(1, 1), (3, 5), (1, 2, 3)])
def test_any_grid_may_be_pooled(counts: tuple[int, ...]) -> None:
    decoder = build(num_dims=len(counts), num_hidden=1, patch_size=8, pooled=True)
    leaves = uniform_leaves([8 * count for count in counts], 8)
    patches = Patches(torch.randn(len(leaves), 1, *(8,) * len(counts)), (leaves,))
    logits = decoder((torch.randn(len(leaves), WIDTH),), patches)
    logits.square().sum().backward()
    assert bool(torch.isfinite(logits).all())
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in decoder.parameters() if weight.grad is not None)


def test_the_order_of_cells_carries_no_meaning() -> None:
    decoder = build(num_hidden=1)
    leaves = uniform_leaves((8, 12), 4)
    pixels, x_TD = torch.randn(6, 1, 4, 4), torch.randn(6, WIDTH)

    def apply(turn: Tensor) -> Tensor:
        logits: Tensor = decoder((x_TD[turn],), Patches(pixels[turn], (leaves.select(turn),)))
        return logits

    laws.order_invariance(apply, torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2]), tolerance=1e-6)


def test_half_precision() -> None:
    """No kernel is missing on the CPU, and numbers stay near."""
    decoder = build(num_dims=3, num_hidden=1, patch_size=8, pooled=True)
    leaves = uniform_leaves((16, 16, 24), 8)
    patches = Patches(torch.randn(len(leaves), 1, 8, 8, 8), (leaves,))
    x_TD = torch.randn(len(leaves), WIDTH)
    with torch.no_grad():
        exact = decoder((x_TD,), patches)
        half = decoder.bfloat16()((x_TD.bfloat16(),), patches.with_pixels(patches.pixels.bfloat16()))
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).norm() / exact.norm()) < 0.05
