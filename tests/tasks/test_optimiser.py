"""The optimiser of the recipes: layer-wise rates, no decay on norms, tokens, codes and places."""

import dataclasses

import pytest
from toy_task import toy_config

from foveate.errors import ConfigError
from foveate.models import create_model
from foveate.tasks.optimiser import layer_of, make_optimizer
from foveate.tasks.settings import TrainConfig

SMALL = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "prune_after": (0, 1), "keep_ratio": 0.5}


def test_rates_fall_from_block_to_block_and_what_is_new_has_the_full_one() -> None:
    model = create_model("scd_vit_tiny_3d", in_chans=1, num_classes=2, **SMALL)
    config = TrainConfig(layer_decay=0.5, betas=(0.9, 0.95), weight_decay=0.05)
    optimizer = make_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    share, decayed = {}, set()
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["weight_decay"] in (0.05, 0.0)
        for parameter in group["params"]:
            share[names[id(parameter)]] = group["share"]
            if group["weight_decay"]:
                decayed.add(names[id(parameter)])
    assert len(share) == len(names), "every parameter once"
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
    assert layer_of("decoder.head.weight", 9) == 9
    assert layer_of("encoder.vit.blocks.4.mlp.fc1.weight", 9) == 5


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
