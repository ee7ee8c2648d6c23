"""The encoder: the plain ViT on a uniform grid, geometry and nothing but geometry elsewhere."""

import math

import pytest
import torch
from plain_vit import PlainVit, randomise

import foveate as fv
from foveate.errors import ConfigError, ShapeError
from foveate.nn.embed import axis_weights, rotary_angles, rotate
from foveate.nn.encoder import Encoder, EncoderConfig, EncoderProtocol, evenly_spaced

SMALL = {"patch_size": 4, "in_chans": 2, "width": 24, "depth": 3, "num_heads": 2, "pos_grid": 4}


def encoder(**changes: object) -> Encoder:
    net = Encoder(EncoderConfig(**{**SMALL, **changes}))  # type: ignore[arg-type]
    randomise(net)
    return net.eval()


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False},
        {"num_registers": 2},
        {"num_registers": 2, "embed_prefix": False},
        {"layer_scale": 0.5},
    ],
    ids=str,
)
def test_uniform_grid_is_the_plain_vit(num_dims: int, changes: dict[str, object]) -> None:
    """Neutrality: with every reduction off, the tokens are the plain ViT's."""
    net = encoder(num_dims=num_dims, **changes)
    image = torch.randn(2, *(16,) * num_dims)
    patches = fv.patchify(image, fv.uniform_leaves(image.shape[1:], 4), 4)
    out = net(patches)
    plain = PlainVit(net.state_dict(), net.config)(image[None])
    num_prefix = net.config.num_prefix
    assert len(out.hidden) == len(net.config.blocks)
    for block, hidden in zip(net.config.blocks, out.hidden, strict=True):
        torch.testing.assert_close(hidden, plain[block][0, num_prefix:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.prefix[0], plain[-1][0, :num_prefix], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [False, True])
def test_an_image_has_the_same_tokens_in_any_company(rope: bool) -> None:
    """Batch invariance, to the bit, also for an image of one leaf."""
    net = encoder(rope=rope, num_registers=1)
    packs = []
    for seed, shape in enumerate([(16, 16), (40, 24), (8, 8), (4, 4)]):
        image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
        packs.append(fv.patchify(image, fv.adaptive_leaves(image, max_leaves=12, min_size=4), 4))
    together = net(fv.pack(packs)).hidden[-1].split([len(pack.pixels) for pack in packs])
    for pack, part in zip(packs, together, strict=True):
        assert torch.equal(net(pack).hidden[-1], part)
    assert net(packs[-1]).hidden[-1].shape == (1, 24)
    assert net(packs[-1]).prefix.shape == (1, 2, 24)


def test_order_of_leaves_carries_no_meaning() -> None:
    net = encoder()
    image = torch.randn(2, 32, 32)
    leaves = fv.adaptive_leaves(image, max_leaves=20, min_size=4)
    patches = fv.patchify(image, leaves, 4)
    order = torch.randperm(len(leaves), generator=torch.Generator().manual_seed(0))
    shuffled = fv.Patches(patches.pixels[order], (leaves.select(order),))
    torch.testing.assert_close(net(shuffled).hidden[-1], net(patches).hidden[-1][order], rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    image = torch.randn(2, 16, 16)
    patches = fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4)
    gradients = []
    for checkpoint in (False, True):
        net = encoder(checkpoint=checkpoint).train()
        net(patches).hidden[-1].square().sum().backward()
        gradients.append(net.patch_embed.proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradient_reaches_every_parameter() -> None:
    net = encoder(rope=True)
    image = torch.randn(2, 16, 16)
    out = net(fv.patchify(image, fv.adaptive_leaves(image, max_leaves=7, min_size=4), 4))
    (sum(hidden.square().sum() for hidden in out.hidden) + out.prefix.square().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if name not in ("geometry_embed.fc1.weight", "geometry_embed.fc1.bias"):  # behind the zero start
            assert parameter.grad.abs().sum() > 0, name


def test_half_precision() -> None:
    net = encoder(rope=True)
    image = torch.randn(2, 16, 16)
    patches = fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4)
    full = net(patches).hidden[-1]
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(patches).hidden[-1].float() - full).norm() < 0.05 * full.norm()
    assert net.bfloat16()(patches).hidden[-1].dtype == torch.bfloat16


def test_axis_weights_are_box_averages() -> None:
    table = torch.tensor([1.0, 2.0, 4.0, 8.0])
    start = torch.tensor([0, 16, 0, 0, 20])
    stop = torch.tensor([8, 24, 16, 32, 22])
    values = axis_weights(start, stop, 32, 4) @ table
    assert values.tolist() == pytest.approx([1.0, 4.0, 1.5, 3.75, 4.0 + 4.0 * (21 / 8 - 2.5)])


def test_rotation_keeps_length_and_tells_distance() -> None:
    image = torch.zeros(1, 32, 32)
    patches = fv.patchify(image, fv.uniform_leaves((32, 32), 8), 8)
    angles = rotary_angles(patches, 8)
    x = torch.randn(1, 1, 8).expand(16, 1, 8)
    turned = rotate(x, angles)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    products = (turned[:, 0] @ turned[:, 0].T).view(4, 4, 4, 4)
    assert math.isclose(products[0, 0, 0, 1], products[2, 1, 2, 2], rel_tol=1e-4)


def test_protocol_and_defaults() -> None:
    assert isinstance(encoder(), EncoderProtocol)
    assert evenly_spaced(12) == (2, 5, 8, 11)
    assert evenly_spaced(1) == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_dims": 4}, "num_dims=4: images are 2-D or 3-D"),
        ({"depth": 0}, "depth=0 is below 1"),
        ({"out_blocks": (0, 5)}, r"out_blocks=\(0, 5\) must ascend within 0..2"),
    ],
)
def test_impossible_numbers(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(**changes)


def test_wrong_patches() -> None:
    image = torch.zeros(3, 16, 16)
    with pytest.raises(ShapeError, match=r"patches of \(3, 4, 4\).*wants \(2, 4, 4\)"):
        encoder()(fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4))
