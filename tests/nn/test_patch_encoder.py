"""Encoders of patches: shapes, names that others' weights have, what freezing freezes, and fast copies."""

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import laws
from foveate.errors import ConfigError, FormatError, MissingExtraError, ShapeError
from foveate.nn.fast_copy import fast_copy
from foveate.nn.patch_encoder import (
    ForeignNet,
    PatchEncoder,
    create_patch_encoder,
    freeze,
    load_patch_weights,
    uses_batch_statistics,
)
from foveate.nn.schedule import KeepSchedule
from foveate.nn.stream import in_blocks

NAMES = ["cnn", "vit", "resnet18", "resnet50", "features"]


def encoder_of(name: str, in_chans: int = 3, norm: str = "group", width: int | None = 24, **more: int) -> PatchEncoder:
    torch.manual_seed(0)
    return create_patch_encoder(name, in_chans, norm=norm, width=width, patch_size=16, stages=2, depth=1, **more)


def patches_of(name: str, num: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand(num, 3, generator=generator)
        if name == "features"
        else torch.rand(num, 3, 16, 16, generator=generator)
    )


def learned_statistics(encoder: PatchEncoder, name: str) -> PatchEncoder:
    for _ in range(3):
        encoder.train()(patches_of(name, 32))
    return encoder.eval()


@pytest.mark.parametrize("width", [None, 24])
@pytest.mark.parametrize("name", NAMES)
def test_patches_become_vectors_each_by_itself(name: str, width: int | None) -> None:
    encoder, x = encoder_of(name, width=width).eval(), patches_of(name)
    with torch.no_grad():
        out = encoder(x)
        assert out.shape == (6, encoder.width)
        assert width is None or encoder.width == width
        alone = torch.cat([in_blocks(encoder, one[None], 16) for one in x])
        laws.same(in_blocks(encoder, x, 16), alone, "alone and in company")  # to the bit
        torch.testing.assert_close(out, alone)


def test_resnet_18_has_the_names_and_sizes_of_torchvision() -> None:
    encoder = create_patch_encoder("resnet18", norm="batch")
    names = encoder.net.state_dict()
    assert sum(value.numel() for value in encoder.net.parameters()) == 11_689_512 - 513_000  # without the classifier
    assert names["layer4.1.bn2.running_mean"].shape == (512,)
    assert names["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    fifty = create_patch_encoder("resnet50", norm="batch").net
    assert sum(value.numel() for value in fifty.parameters()) == 25_557_032 - 2_049_000


def test_weights_of_a_whole_resnet_load_into_a_cut_one_for_grey_images(tmp_path: Path) -> None:
    whole = create_patch_encoder("resnet18", norm="batch").net
    state = {**whole.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet18.pth")
    save_file(state, tmp_path / "resnet18.safetensors")
    for file in ("resnet18.pth", "resnet18.safetensors"):
        cut = create_patch_encoder("resnet18", 1, norm="batch", stages=2)
        load_patch_weights(cut, tmp_path / file)
        assert torch.equal(cut.net.get_parameter("layer2.1.conv2.weight"), state["layer2.1.conv2.weight"])
        grey = torch.rand(2, 1, 32, 32)
        expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), state["conv1.weight"], stride=2, padding=3)
        torch.testing.assert_close(cut.net.get_submodule("conv1")(grey), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        FormatError, match=r"does not fit the encoder: no tensor of that name and size for blocks\.0\.0\.weight"
    ):
        load_patch_weights(create_patch_encoder("cnn"), tmp_path / "resnet18.pth")


@pytest.mark.parametrize(("last", "trained"), [(0, 0), (1, 1), (2, 2), (99, 3), (None, 3)])
def test_freezing_leaves_the_last_blocks(last: int | None, trained: int) -> None:
    encoder = freeze(encoder_of("cnn", norm="batch"), last)
    parts = [all(value.requires_grad for value in part.parameters()) for part in encoder.parts()]
    assert parts == [False] * (3 - trained) + [True] * trained
    assert encoder.proj.weight.requires_grad
    encoder.train()
    assert [part.training for part in encoder.parts()] == parts
    assert uses_batch_statistics(encoder) == (trained > 0)
    assert all(value.requires_grad for value in freeze(encoder, None).parameters())


def test_what_is_taken_from_channels_and_divided_by() -> None:
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 0.5)
    x = patches_of("cnn")
    torch.manual_seed(0)
    encoder = create_patch_encoder("cnn", mean=mean, std=std)
    normed = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(encoder(x), encoder.net(normed))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet50", "features"])
def test_a_fast_copy_changes_rounding_alone(name: str, norm: str) -> None:
    encoder = learned_statistics(encoder_of(name, norm=norm), name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    x = patches_of(name, 20)
    with torch.no_grad():
        expected = encoder(x)
        torch.testing.assert_close(fast_copy(encoder)(x), expected, rtol=1e-3, atol=1e-4)
        half = fast_copy(encoder, torch.bfloat16)(x)
    assert half.dtype == torch.float32
    assert float((half - expected).norm() / expected.norm()) < 0.02
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in fast_copy(encoder).modules())
    laws.same(encoder.state_dict(), before, "the original")


class Output:
    def __init__(self, pooled: Tensor | None, last: Tensor) -> None:
        self.pooler_output, self.last_hidden_state = pooled, last


class Foreign(nn.Module):
    num_features = 5

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Flatten()
        self.blocks = nn.Sequential(nn.Linear(768, 5), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> object:
        out = self.blocks(self.stem(x))
        if self.kind == "tensor":
            return out
        return Output(out if self.kind == "pooled" else None, torch.stack([out, 0 * out], 1))


@pytest.mark.parametrize("kind", ["tensor", "pooled", "tokens"])
def test_any_module_may_encode_patches(kind: str) -> None:
    module = Foreign(kind)
    encoder = PatchEncoder(ForeignNet(module), 7)
    x = patches_of("cnn")
    torch.testing.assert_close(encoder.net(x), module.blocks(module.stem(x)))
    assert encoder(x).shape == (6, 7)
    assert len(freeze(encoder, 1).parts()) == 3
    assert [part.weight.requires_grad for part in module.blocks] == [False, True]


def test_timm_encodes_patches(timm: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = create_patch_encoder("timm:resnet10t", 1, width=9)
        assert encoder.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 9)
        with pytest.raises(ConfigError, match="timm builds no 'resnet9000'"):
            create_patch_encoder("timm:resnet9000")


def test_a_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"encoder='timm:resnet18' needs timm: pip install foveate\[timm\]"):
        create_patch_encoder("timm:resnet18")


def test_keep_falls_by_the_same_factor_and_stays() -> None:
    schedule = KeepSchedule(160, 10, 4)
    assert [schedule.at(epoch) for epoch in (0, 1, 2.0, 3, 4, 9)] == [160, 80, 40, 20, 10, 10]
    assert KeepSchedule(10, 10, 0).at(0) == 10
    with pytest.raises(ConfigError, match="keep from 5 to 10 within 4 epochs: start must be at least stop"):
        KeepSchedule(5, 10, 4)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="encoder='resnet19' is none of cnn, vit, resnet18, resnet34, resnet50, "):
        create_patch_encoder("resnet19")
    with pytest.raises(ConfigError, match="norm='layer' is none of group, batch; choose one"):
        create_patch_encoder("cnn", norm="layer")
    with pytest.raises(ConfigError, match="stages=5: a ResNet has 1 to 4; 2 suits patches of about 50 pixels"):
        create_patch_encoder("resnet18", stages=5)
    with pytest.raises(ConfigError, match="last_blocks=-1 is negative; 0 freezes all, None trains all"):
        freeze(encoder_of("cnn"), -1)
    with pytest.raises(ConfigError, match=r"mean=\(0.5,\) and std=\(\): give both, one number per channel"):
        create_patch_encoder("cnn", mean=(0.5,))
    with pytest.raises(ConfigError, match="Linear does not say how many features it gives; give width"):
        ForeignNet(nn.Linear(3, 3))
    with pytest.raises(ShapeError, match=r"patches of \(3, 8, 8\) for a model of 3 features; give features \[N, 3\]"):
        encoder_of("features")(torch.rand(2, 3, 8, 8))
    with pytest.raises(ShapeError, match=r"patches of \(8, 8\) for an encoder of patch_size=16; cut patches of"):
        encoder_of("vit")(torch.rand(2, 3, 8, 8))


def test_long_bags_of_half_precision_features_are_normed_in_blocks_and_learn_as_a_whole() -> None:
    encoder = encoder_of("features", 5, norm="batch").train()
    x = torch.rand(5000, 5, generator=torch.Generator().manual_seed(2)).half()
    goal = torch.rand(5000, 24, generator=torch.Generator().manual_seed(3))
    found = encoder(x)
    (found * goal).mean().backward()
    weight = encoder.get_parameter("net.layers.1.weight")
    gradient, weight.grad = weight.grad, None
    expected = encoder.proj(encoder.get_submodule("net.layers")(x.float()))
    (expected * goal).mean().backward()
    torch.testing.assert_close(found, expected)
    assert gradient is not None
    torch.testing.assert_close(gradient, weight.grad)
