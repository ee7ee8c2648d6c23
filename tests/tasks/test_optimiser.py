"""The optimiser of the recipes: layer-wise rates, no decay on norms, tokens, codes and places."""

import dataclasses
from types import ModuleType

import pytest
from torch import nn
from torch.optim import Optimizer
from toy_task import toy_config

from foveate.errors import ConfigError
from foveate.models import create_model
from foveate.nn.patch_encoder import create_patch_encoder, freeze
from foveate.tasks.optimiser import layers_of, make_optimizer
from foveate.tasks.settings import TrainConfig

SMALL = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "prune_after": (0, 1), "keep_ratio": 0.5}


def shares(model: nn.Module, optimizer: Optimizer, what: str = "share") -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(one)]: group[what] for group in optimizer.param_groups for one in group["params"]}


def test_rates_fall_from_block_to_block_and_what_is_new_has_the_full_one() -> None:
    model = create_model("scd_vit_tiny_3d", in_chans=1, num_classes=2, **SMALL)
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, betas=(0.9, 0.95), weight_decay=0.05))
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert all(group["weight_decay"] in (0.05, 0.0) for group in optimizer.param_groups)
    share = shares(model, optimizer)
    decayed = shares(model, optimizer, "weight_decay")
    decayed = {name for name, decay in decayed.items() if decay}
    assert len(share) == len(list(model.parameters())), "every parameter once"
    assert share["encoder.patch_embed.proj.weight"] == share["encoder.pos_embed"] == 0.5**4
    assert [share[f"encoder.blocks.{block}.mlp.fc1.weight"] for block in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert share["encoder.norm.weight"] == 1
    full = [name for name in share if name.startswith(("decoder.", "assembler.", "encoder.pruners."))]
    assert {share[name] for name in full} == {1}
    spared = set(share) - decayed
    assert {"encoder.pos_embed", "encoder.cls_token", "assembler.codes", "encoder.blocks.1.norm1.weight"} <= spared
    assert not [name for name in spared if name.endswith("fc1.weight")]
    assert not [name for name in decayed if name.endswith("bias")]


def test_without_layer_decay_there_are_two_groups_as_before() -> None:
    groups = make_optimizer(create_model("apf_vit_tiny", width=32, depth=2, num_heads=2), toy_config()).param_groups
    assert [group["share"] for group in groups] == [1, 1]
    assert [group["weight_decay"] > 0 for group in groups] == [True, False]
    vit = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})  # inside an adapter
    found = layers_of(nn.ModuleDict({"encoder": nn.ModuleDict({"vit": vit}), "decoder": nn.Linear(1, 1)}))
    assert found == {f"encoder.vit.blocks.{block}.{name}": block + 1 for block in (0, 1) for name in ("weight", "bias")}


def test_the_blocks_of_a_resnet_are_those_of_timm() -> None:
    model = create_model("ips_resnet18", num_classes=2, width=32, num_heads=2, stages=2)
    share = shares(model, make_optimizer(model, TrainConfig(layer_decay=0.5)))
    assert len(share) == len(list(model.parameters()))
    assert share["encoder.net.conv1.weight"] == share["encoder.net.bn1.weight"] == 0.5**5
    blocks = [f"encoder.net.layer{stage}.{block}.conv2.weight" for stage in (1, 2) for block in (0, 1)]
    assert [share[name] for name in blocks] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert share["encoder.net.layer2.0.downsample.0.weight"] == 0.5**2
    assert {value for name, value in share.items() if not name.startswith("encoder.net.")} == {1}
    freeze(model.encoder, 1)
    share = shares(model, make_optimizer(model, TrainConfig(layer_decay=0.5)))
    assert share["encoder.net.layer2.1.conv1.weight"] == 0.5
    assert "encoder.net.layer2.0.conv1.weight" not in share


@pytest.mark.parametrize(("name", "depth"), [("ips_cnn", 3), ("ips_vit_tiny", 3)])
def test_other_encoders_of_patches(name: str, depth: int) -> None:
    model = create_model(name, num_classes=2, width=32, num_heads=2, depth=2, patch_size=16)
    share = shares(model, make_optimizer(model, TrainConfig(layer_decay=0.5)))
    assert {value for name, value in share.items() if name.startswith("encoder.net.blocks.0.")} == {
        0.5**depth if name == "ips_cnn" else 0.5**2
    }
    if name == "ips_vit_tiny":
        assert share["encoder.net.pos_embed"] == share["encoder.net.patch_embed.bias"] == 0.5**3
        assert share["encoder.net.norm.weight"] == 1


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_layers_are_those_that_timm_makes(timm: ModuleType, name: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = nn.Module()
    model.encoder = create_patch_encoder(f"timm:{name}", width=8)
    share = shares(model, make_optimizer(model, TrainConfig(layer_decay=0.5)))
    net = timm.create_model(name, num_classes=3)  # its head has the full rate, as our linear map has
    names = {id(one): name for name, one in net.named_parameters()}
    theirs = {
        names[id(one)]: group for group in param_groups_layer_decay(net, layer_decay=0.5) for one in group["params"]
    }
    assert {name: share.get(f"encoder.net.module.{name}", 1) for name in theirs} == {
        name: group["lr_scale"] for name, group in theirs.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"train\.betas=\[0\.9, 1\.0\] are outside 0 up to below 1: give two"),
        ({"layer_decay": 0.0}, r"train\.layer_decay=0\.0 is outside 0 to 1: give a factor such as 0\.75"),
    ],
)
def test_what_is_no_rate_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TrainConfig(), **changes)
