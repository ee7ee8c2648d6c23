"""Named models: built, run, saved, read back, and refused with the right word."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate as fv
import laws
from foveate.errors import ConfigError, FormatError
from foveate.geometry.patches import PaddedPatches
from foveate.models import create_config

TINY = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "pos_grid": 4, "decoder_width": 4}
NAMES = ["apf_vit_tiny", "apf_vit_tiny_linear", "apf_vit_tiny_3d", "apf_vit_tiny_3d_linear"]
PRUNING = ["scd_vit_tiny", "scd_vit_tiny_3d", "scd_unetr_small_3d_p8"]
POINTS = {"depth": 3, "prune_after": (0, 1), "keep_ratio": (0.5, 0.25), "out_blocks": None}


def tiny(name: str, **changes: object) -> fv.SegmentationModel:
    torch.manual_seed(0)
    points = POINTS if name in PRUNING else {}
    return fv.create_model(name, in_chans=2, num_classes=3, **{**TINY, **points, **changes})  # type: ignore[arg-type]


def patches_of(model: fv.SegmentationModel, seed: int = 0, side: int = 16, max_leaves: int = 22) -> fv.Patches:
    shape = (side,) * model.config.num_dims
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return fv.patchify(image, fv.adaptive_leaves(image, max_leaves=max_leaves, min_size=4), 4)


@pytest.mark.parametrize("name", NAMES + PRUNING)
def test_logits_are_packed_like_the_pixels(name: str) -> None:
    model = tiny(name)
    patches = patches_of(model)
    logits = model(patches)
    assert logits.shape == (len(patches.pixels), 3, *patches.pixels.shape[2:])
    logits.square().mean().backward()
    assert sum(float(parameter.grad.abs().sum()) for parameter in model.parameters() if parameter.grad is not None) > 0


# the laws of the design, over whole models; answers to the bit, gradients and other row counts with a tolerance


def three_images(model: fv.SegmentationModel) -> list[fv.Patches]:
    return [patches_of(model, 0), patches_of(model, 1, 32, 40), patches_of(model, 2, 8, 1)]


@pytest.mark.parametrize("changes", [{}, {"rope": True, "num_registers": 2, "layer_scale": 0.1}])
@pytest.mark.parametrize("name", NAMES + PRUNING)
def test_an_image_has_the_same_answer_in_any_company(name: str, changes: dict[str, object]) -> None:
    model = tiny(name, **changes).eval()

    def apply(batch: list[fv.Patches]) -> list[Tensor]:
        patches = fv.pack(batch)
        return list(model(patches).split(list(patches.lengths)))

    laws.batch_invariance(apply, three_images(model))


@pytest.mark.parametrize("name", NAMES + PRUNING)
def test_an_image_has_the_same_gradient_in_any_company(name: str) -> None:
    model = tiny(name).eval()

    def apply(batch: list[fv.Patches]) -> list[Tensor]:
        batch = [one.with_pixels(one.pixels.detach().clone().requires_grad_()) for one in batch]
        model(fv.pack(batch)).square().sum().backward()
        return [one.pixels.grad for one in batch if one.pixels.grad is not None]

    laws.batch_invariance(apply, three_images(model), tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES + PRUNING)
def test_padding_never_reaches_a_model(name: str) -> None:
    model = tiny(name).eval()
    padded = fv.pack(three_images(model)).pad()

    def apply(pixels_BL: Tensor, valid_BL: Tensor) -> Tensor:
        patches = PaddedPatches(pixels_BL, padded.leaves).pack()
        logits = model(patches).split(list(patches.lengths))
        return torch.nn.utils.rnn.pad_sequence(list(logits), batch_first=True)

    laws.padding_is_never_data(apply, padded.pixels, padded.valid, tolerance=1e-6)


@pytest.mark.parametrize("name", NAMES + PRUNING)
def test_the_place_in_the_sequence_carries_no_meaning(name: str) -> None:
    model = tiny(name, rope=True).eval()
    patches = patches_of(model, 1, 32, 40)
    torch.nn.init.normal_(model.encoder.geometry_embed.fc2.weight, std=0.2)  # a code that starts at zero

    def apply(place_L: Tensor) -> Tensor:
        logits: Tensor = model(patches.select([place_L]))
        return logits

    turn = torch.randperm(len(patches.pixels), generator=torch.Generator().manual_seed(0))
    laws.order_invariance(apply, torch.arange(len(turn)), turn, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES + PRUNING)
def test_a_model_is_deterministic(name: str) -> None:
    model = tiny(name).train()
    patches = patches_of(model)

    def run() -> list[Tensor]:
        model.zero_grad()
        logits = model(patches)
        logits.square().mean().backward()
        return [logits.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]

    laws.deterministic(run)


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny("apf_vit_tiny", out_blocks=(0, 1), rope=True)
    model.save_pretrained(tmp_path / "m")
    again = fv.SegmentationModel.from_pretrained(tmp_path / "m")
    patches = patches_of(model)
    assert again.config == model.config
    assert torch.equal(again(patches), model(patches))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    warm = fv.create_model("apf_vit_tiny", in_chans=2, num_classes=3, weights=tmp_path / "m", rope=True, **TINY)
    assert torch.equal(warm(patches), model(patches))


def test_segment_gives_logits_per_pixel_and_restores_the_mode() -> None:
    model = tiny("apf_vit_tiny").train()
    out = model.segment(torch.randn(2, 21, 37), max_leaves=16)
    assert out.shape == (3, 21, 37)
    assert model.training


def test_names() -> None:
    assert fv.list_models("apf_vit_tiny*") == [
        "apf_vit_tiny", "apf_vit_tiny_3d", "apf_vit_tiny_3d_linear", "apf_vit_tiny_3d_unetr", "apf_vit_tiny_linear",
        "apf_vit_tiny_unetr",
    ]  # fmt: skip
    assert sorted(name for kind in ("apf*", "scd*", "ips*") for name in fv.list_models(kind)) == fv.list_models()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("apf_vit_tinny", {}, "did you mean 'apf_vit_tiny'"),
        ("apf_vit_tiny", {"dept": 3}, "'dept' is no field of a model, did you mean 'depth'"),
        ("apf_vit_tiny", {"decoder": "cnn"}, "decoder='cnn' is none of token, linear, unetr"),
        ("apf_vit_tiny", {"num_classes": 0}, "num_classes=0, decoder_width=16: both must be at least 1"),
        ("apf_vit_tiny", {"depth": "x"}, "a value has the wrong type"),
    ],
)
def test_config_rejects_unknown_and_inconsistent(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_config(name, **overrides)


def test_damaged_folders(tmp_path: Path) -> None:
    model = tiny("apf_vit_tiny")
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        fv.SegmentationModel.from_pretrained(tmp_path / "nowhere")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "width": 32}))
    with pytest.raises(FormatError, match=r"does not fit the model: .* has shape"):
        fv.SegmentationModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "colour": 1}))
    with pytest.raises(FormatError, match="unknown fields colour"):
        fv.SegmentationModel.from_pretrained(tmp_path)
    for wrong, message in (
        ({"width": "x"}, r"describes no model \(.*; give a folder"),
        ({"depth": 0}, "depth=0 is below 1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(FormatError, match=message):
            fv.SegmentationModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="no readable safetensors"):
        fv.SegmentationModel.from_pretrained(tmp_path)
