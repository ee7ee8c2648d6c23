"""Checkpoints of other layouts fill our encoder, or are refused by the names of the tensors that do not fit."""

import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from plain_vit import PlainVit, randomise
from safetensors.torch import save_file

import foveate as fv
from foveate.errors import FormatError
from foveate.nn.encoder import Encoder, EncoderConfig
from foveate.nn.weights import load_weights, read_state

SMALL = EncoderConfig(patch_size=4, in_chans=3, width=24, depth=2, num_heads=2, pos_grid=4)


def timm_state(config: EncoderConfig = SMALL) -> dict[str, torch.Tensor]:
    net = Encoder(config)
    randomise(net, seed=1)
    return {name: value for name, value in net.state_dict().items() if "geometry_embed" not in name}


@pytest.mark.parametrize("prefix", ["", "model.", "module.backbone."])
def test_timm_layout(tmp_path: Path, prefix: str) -> None:
    state = timm_state()
    extra = {"head.weight": torch.zeros(5, 24), "fc_norm.weight": torch.zeros(24)}
    path = tmp_path / "vit.safetensors"
    save_file({prefix + name: value for name, value in {**state, **extra}.items()}, path)
    net = Encoder(SMALL)
    load_weights(net, path)
    image = torch.randn(3, 16, 16)
    out = net(fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4)).hidden[-1]
    torch.testing.assert_close(out, PlainVit(state, SMALL)(image[None])[-1][0, 1:], rtol=1e-5, atol=1e-5)


def test_create_model_takes_weights(tmp_path: Path) -> None:
    save_file(timm_state(), tmp_path / "vit.safetensors")
    model = fv.create_model(
        "apf_vit_tiny", weights=tmp_path / "vit.safetensors", patch_size=4, width=24, depth=2, num_heads=2, pos_grid=4
    )
    assert torch.equal(model.encoder.pos_embed, timm_state()["pos_embed"])


def test_dinov2_layout(tmp_path: Path) -> None:
    config = EncoderConfig(patch_size=4, width=24, depth=2, num_heads=2, pos_grid=4, layer_scale=1.0)
    state = {**timm_state(config), "mask_token": torch.zeros(1, 24)}
    save_file(state, tmp_path / "dino.safetensors")
    net = Encoder(config)
    load_weights(net, tmp_path / "dino.safetensors")
    assert torch.equal(net.state_dict()["blocks.1.ls2.gamma"], state["blocks.1.ls2.gamma"])


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_transformers_layout(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    numbers = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    if kind == "vit":
        theirs = transformers.ViTModel(
            transformers.ViTConfig(**numbers, image_size=16, patch_size=4), add_pooling_layer=False
        )
        config, eps = SMALL, 1e-12
    else:
        theirs = transformers.Dinov2Model(
            transformers.Dinov2Config(**numbers, mlp_ratio=4, image_size=16, patch_size=4)
        )
        config, eps = EncoderConfig(patch_size=4, width=24, depth=2, num_heads=2, pos_grid=4, layer_scale=1.0), 1e-6
    randomise(theirs)
    theirs.eval()
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, tmp_path / "hf.safetensors")
    net = Encoder(config)
    load_weights(net, tmp_path / "hf.safetensors")
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    image = torch.randn(3, 16, 16)
    out = net(fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4)).hidden[-1]
    with torch.no_grad():
        torch.testing.assert_close(out, theirs(image[None]).last_hidden_state[0, 1:], rtol=1e-4, atol=1e-4)


def test_old_transformers_names(tmp_path: Path) -> None:
    """Checkpoints on disk still carry the names of earlier versions."""
    state = timm_state()
    old = {
        "vit.embeddings.cls_token": state.pop("cls_token"),
        "vit.embeddings.position_embeddings": state.pop("pos_embed"),
        "vit.layernorm.weight": state.pop("norm.weight"),
        "vit.layernorm.bias": state.pop("norm.bias"),
        "pooler.dense.weight": torch.zeros(24, 24),
    }
    for end in ("weight", "bias"):
        old[f"vit.embeddings.patch_embeddings.projection.{end}"] = state.pop(f"patch_embed.proj.{end}")
        for index in range(2):
            ours, theirs = f"blocks.{index}", f"vit.encoder.layer.{index}"
            parts = state.pop(f"{ours}.attn.qkv.{end}").chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                old[f"{theirs}.attention.attention.{name}.{end}"] = part.contiguous()
            for a, b in {
                "attn.proj": "attention.output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
                "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
            }.items():  # fmt: skip
                old[f"{theirs}.{b}.{end}"] = state.pop(f"{ours}.{a}.{end}")
    assert not state
    save_file(old, tmp_path / "old.safetensors")
    net = Encoder(SMALL)
    load_weights(net, tmp_path / "old.safetensors")
    for name, value in timm_state().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_other_grid_patch_and_channels(tmp_path: Path) -> None:
    save_file(timm_state(), tmp_path / "vit.safetensors")
    config = EncoderConfig(patch_size=8, in_chans=1, width=24, depth=2, num_heads=2, pos_grid=8)
    net = Encoder(config)
    load_weights(net, tmp_path / "vit.safetensors")
    weight = timm_state()["patch_embed.proj.weight"]
    torch.testing.assert_close(net.patch_embed.proj.weight.sum((1, 2, 3)), weight.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    assert net.pos_embed.shape == (1, 65, 24)


@pytest.mark.parametrize("side", [3, 5, 6])
def test_any_patch_size_keeps_the_response_to_a_constant(tmp_path: Path, side: int) -> None:
    save_file(timm_state(), tmp_path / "vit.safetensors")
    net = Encoder(EncoderConfig(patch_size=side, width=24, depth=2, num_heads=2, pos_grid=4))
    load_weights(net, tmp_path / "vit.safetensors")
    expected = timm_state()["patch_embed.proj.weight"].sum((2, 3))
    torch.testing.assert_close(net.patch_embed.proj.weight.sum((2, 3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embed_prefix", [True, False])
def test_registers_behind_a_table_for_the_class_token_alone(tmp_path: Path, embed_prefix: bool) -> None:
    """DINOv2 with registers adds positions before it inserts registers; both of our ways to say so are exact."""
    theirs = EncoderConfig(patch_size=4, width=24, depth=2, num_heads=2, pos_grid=4, num_registers=3)
    state = timm_state(theirs)
    first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 4:]
    whole = {**state, "pos_embed": torch.cat([first, torch.zeros(1, 3, 24), rest], 1)}
    save_file({**state, "pos_embed": torch.cat([first, rest], 1)}, tmp_path / "dino.safetensors")
    net = Encoder(replace(theirs, embed_prefix=embed_prefix))
    load_weights(net, tmp_path / "dino.safetensors")
    image = torch.randn(3, 16, 16)
    out = net(fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4)).hidden[-1]
    torch.testing.assert_close(out, PlainVit(whole, theirs)(image[None])[-1][0, 4:], rtol=1e-5, atol=1e-5)


def test_a_table_that_is_no_grid_is_refused(tmp_path: Path) -> None:
    save_file({**timm_state(), "pos_embed": torch.zeros(1, 15, 24)}, tmp_path / "vit.safetensors")
    with pytest.raises(FormatError, match="pos_embed has 15 entries, which are no 2-D grid behind 1 prefix tokens"):
        load_weights(Encoder(SMALL), tmp_path / "vit.safetensors")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"reg_tokens": 2}, {"num_registers": 2}),
        ({"reg_tokens": 2, "no_embed_class": True}, {"num_registers": 2, "embed_prefix": False}),
        ({"init_values": 0.5}, {"layer_scale": 1.0}),
        ({"class_token": False, "global_pool": "avg"}, {"class_token": False}),
    ],
    ids=str,
)
def test_timm_itself(timm: ModuleType, tmp_path: Path, theirs: dict[str, object], ours: dict[str, object]) -> None:
    """Neutrality against the original: its saved weights give its own tokens."""
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, fc_norm=False, **theirs
    )
    randomise(vit)
    save_file(vit.eval().state_dict(), tmp_path / "timm.safetensors")
    net = Encoder(replace(SMALL, **ours))  # type: ignore[arg-type]
    load_weights(net, tmp_path / "timm.safetensors")
    image = torch.randn(3, 16, 16)
    with torch.no_grad():
        out = net.eval()(fv.patchify(image, fv.uniform_leaves((16, 16), 4), 4))
        expected = vit.forward_features(image[None])[0]
    torch.testing.assert_close(torch.cat([out.prefix[0], out.hidden[-1]]), expected, rtol=1e-5, atol=1e-5)


def test_misfits_are_named(tmp_path: Path) -> None:
    state = timm_state()
    del state["blocks.1.mlp.fc1.bias"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"it lacks blocks\.1\.mlp\.fc1\.bias"):
        load_weights(Encoder(SMALL), tmp_path / "a.safetensors")
    save_file({**timm_state(), "blocks.2.norm1.bias": torch.zeros(24)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"unknown blocks\.2\.norm1\.bias"):
        load_weights(Encoder(SMALL), tmp_path / "b.safetensors")
    save_file({**timm_state(), "norm.bias": torch.zeros(25)}, tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match=r"another size norm\.bias \(25,\) for \(24,\)"):
        load_weights(Encoder(SMALL), tmp_path / "c.safetensors")


def test_pickles_are_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "canary",))  # type: ignore[return-value]

    torch.save({"x": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(FormatError, match="no readable checkpoint"):
        load_weights(Encoder(SMALL), tmp_path / "trap.pt")
    assert not (tmp_path / "canary").exists()
    torch.save({"state_dict": timm_state()}, tmp_path / "good.pth")
    load_weights(Encoder(SMALL), tmp_path / "good.pth")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_and_missing_bytes_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    """Nothing but FormatError, and no warning, comes out of a damaged checkpoint."""
    state, path = {"a.weight": torch.randn(3, 4), "b": torch.randn(5)}, tmp_path / "x.pt"
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for turn in range(150):
        data = bytearray(whole)
        if turn % 5 == 0:
            data = data[: draw.randrange(len(data))]
        else:
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            read_state(path)
        except FormatError:
            refused += 1
    assert refused > 30


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="no readable checkpoint"):
        load_weights(Encoder(SMALL), tmp_path / "x.safetensors")
