"""Foreign encoders keep their own answer on their own grid, and work on leaves of any size."""

import copy
from types import ModuleType

import pytest
import torch
from plain_vit import randomise
from torch import nn

import foveate as fv
from foveate.errors import ConfigError
from foveate.models import ModelConfig, SegmentationModel
from foveate.nn.adapters import AdaptedEncoder, adapt
from foveate.nn.decoder import TokenDecoder
from foveate.nn.encoder import EncoderProtocol

NUMBERS = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


def uniform(image: torch.Tensor, size: int = 4) -> fv.Patches:
    return fv.patchify(image, fv.uniform_leaves(image.shape[1:], size), size)


def check(net: AdaptedEncoder, image: torch.Tensor, expected: torch.Tensor) -> None:
    """Own grid: own answer. Any leaves: finite, and the same in any company."""
    assert isinstance(net, EncoderProtocol)
    patches = uniform(image)
    out = net(patches)
    assert len(out.hidden) == net.num_hidden == 4
    torch.testing.assert_close(out.hidden[-1], expected, rtol=1e-5, atol=1e-5)
    tree = fv.patchify(image, fv.adaptive_leaves(image, max_leaves=9, min_size=4), 4)
    alone = net(tree).hidden[-1]
    assert alone.isfinite().all()
    together = net(fv.pack([patches, tree])).hidden[-1][len(patches.pixels) :]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "vit":
        config = transformers.ViTConfig(**NUMBERS, image_size=16, patch_size=4)
        theirs = transformers.ViTModel(config, add_pooling_layer=False)
    else:
        theirs = transformers.Dinov2Model(
            transformers.Dinov2Config(**NUMBERS, mlp_ratio=2, image_size=16, patch_size=4)
        )
    randomise(theirs)
    theirs.eval()
    image = torch.randn(3, 16, 16)
    with torch.no_grad():
        check(adapt(theirs).eval(), image, theirs(image[None]).last_hidden_state[0, 1:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
@pytest.mark.parametrize("num_dims", [2, 3])
def test_monai(num_dims: int, proj_type: str) -> None:
    from monai.networks.nets import ViT

    theirs = ViT(
        in_channels=2, img_size=(16,) * num_dims, patch_size=(4,) * num_dims, hidden_size=24, mlp_dim=48, num_layers=4,
        num_heads=2, proj_type=proj_type, spatial_dims=num_dims,
    )  # fmt: skip
    randomise(theirs)
    theirs.eval()
    image = torch.randn(2, *(16,) * num_dims)
    with torch.no_grad():
        check(adapt(theirs, num_dims=num_dims).eval(), image, theirs(image[None])[0][0])


@pytest.mark.parametrize(
    "changes", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_timm(timm: ModuleType, changes: dict[str, object]) -> None:
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=0, fc_norm=False, **changes
    )
    randomise(theirs)
    theirs.eval()
    image = torch.randn(3, 16, 16)
    with torch.no_grad():
        check(adapt(theirs).eval(), image, theirs.forward_features(image[None])[0, theirs.num_prefix_tokens :])


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=batch_first)
    theirs = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    net = adapt(theirs, in_chans=2, patch_size=4).eval()
    image = torch.randn(2, 16, 16)
    tokens = net.extra(uniform(image))  # type: ignore[misc]
    expected = theirs(tokens[None])[0] if batch_first else theirs(tokens[:, None])[:, 0]
    check(net, image, expected)


def test_adapted_encoder_in_a_segmenter() -> None:
    """Parts in: any encoder meets any decoder, and its own weights learn."""
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    encoder = adapt(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), in_chans=2, patch_size=4)
    decoder = TokenDecoder(
        num_dims=2, in_chans=2, num_classes=3, width=24, patch_size=4, num_hidden=encoder.num_hidden, channels=4
    )
    config = ModelConfig(patch_size=4, in_chans=2, num_classes=3, width=24, depth=2, num_heads=2)
    model = SegmentationModel(config, encoder, decoder)
    image = torch.randn(2, 16, 16)
    logits = model(uniform(image))
    assert logits.shape == (16, 3, 4, 4)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.module.parameters())


@pytest.mark.parametrize("kind", ["torch", "vit"])
def test_a_copy_owns_its_weights(kind: str) -> None:
    """Averaged models are deep copies; the copy must not read the original's weights."""
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
        net = adapt(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), in_chans=3, patch_size=4).eval()
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(**NUMBERS, image_size=16, patch_size=4)
        net = adapt(transformers.ViTModel(config, add_pooling_layer=False)).eval()
    patches = uniform(torch.randn(3, 16, 16))
    again = copy.deepcopy(net)
    before = net(patches).hidden[0]
    randomise(net, seed=3)
    assert torch.equal(again(patches).hidden[0], before)
    assert not torch.equal(net(patches).hidden[0], before)


def test_unknown_encoder() -> None:
    with pytest.raises(ConfigError, match=r"Linear is no encoder that adapt\(\) knows"):
        adapt(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="has no patch projection; give both"):
        adapt(nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, batch_first=True), 1))
