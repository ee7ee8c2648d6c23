"""Weights of the released code, by name, give its logits; files that do not fit are refused by their tensors."""

from pathlib import Path

import pytest
import torch
from plain_scd import PlainScd
from plain_vit import randomise
from safetensors.torch import save_file
from torch import Tensor

import foveate as fv
from foveate.errors import BudgetError, ConfigError, FormatError
from foveate.models import create_config
from foveate.nn.pruner import Pruning
from foveate.nn.published import published_counts
from foveate.nn.released import load_released

SIZES = {"width": 36, "depth": 12, "num_heads": 3, "in_chans": 2, "num_classes": 3}
POINTS = (2, 5)
CASES = {  # name: side of the image, kind of the released decoder, changes, completion
    "scd_unetr_small_3d_p8": (32, "x8v2", {}, (36, 1, 3)),
    "scd_unetr_small_3d": (48, "unetr", {}, (24, 2, 2)),
    "scd_unetr_small": (64, "unetr", {}, (24, 1, 2)),
    "scd_unetr_small_p8": (32, "x8", {"decoder": "unetr"}, (36, 1, 3)),
}


def plain(name: str, points: tuple[int, ...] = POINTS) -> PlainScd:
    torch.manual_seed(0)
    side, kind, _, completion = CASES[name]
    config = create_config(name)
    sizes = {**SIZES, "num_dims": config.num_dims, "patch_size": config.patch_size}
    net = PlainScd(sizes, side, points, 0.5, kind, completion).eval()
    fixed = {
        key: value.clone()
        for key, value in net.state_dict().items()
        if key.endswith(("completion.pos_embed", "policy"))
    }
    randomise(net, seed=3)
    net.load_state_dict(fixed, strict=False)
    return net


def ours(name: str, **changes: object) -> fv.SegmentationModel:
    side, _, more, completion = CASES[name]
    settings = {"decoder_width": 4, "prune_after": POINTS, "keep_ratio": 0.5, "completion_size": completion, **SIZES}
    settings |= {"pos_grid": side // create_config(name).patch_size, **more, **changes}
    return fv.create_model(name, exact=True, **settings).eval()  # type: ignore[arg-type]


def images_of(name: str, number: int = 2) -> Tensor:
    config = create_config(name)
    return torch.randn(number, 2, *(CASES[name][0],) * config.num_dims, generator=torch.Generator().manual_seed(5))


def logits_of(model: fv.SegmentationModel, images: Tensor, pruning: Pruning | None = None) -> Tensor:
    """Through patches and back to pixels."""
    size = model.config.patch_size
    leaves = fv.uniform_leaves(images.shape[2:], size)
    patches = fv.pack([fv.patchify(image, leaves, size) for image in images])
    logits = model(patches, pruning).split(list(patches.lengths))
    return torch.stack([fv.unpatchify(one, leaves) for one in logits])


@pytest.mark.parametrize("name", CASES)
def test_released_weights_give_released_logits(name: str, tmp_path: Path) -> None:
    net, images = plain(name), images_of(name)
    save_file(net.state_dict(), tmp_path / "released.safetensors")
    model = ours(name, weights=tmp_path / "released.safetensors")
    with torch.no_grad():
        expected, found = net(images), logits_of(model, images)
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_logits_hang_on_every_part_of_the_weights() -> None:
    """What the comparison would overlook if a part did nothing."""
    net, images = plain("scd_unetr_small"), images_of("scd_unetr_small", 1)
    with torch.no_grad():
        expected = net(images)
        for key, value in net.named_parameters():
            if "policy" in key or ("score_predictor" in key and "out_mlp.4.weight" not in key):
                continue  # ones; and what moves scores, of which only the order matters
            before = value.clone()
            value.mul_(-1.5).add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
            assert not torch.allclose(net(images), expected, atol=1e-6), key
            value.copy_(before)


@pytest.mark.parametrize("name", ["scd_unetr_small_3d_p8", "scd_unetr_small"])
def test_the_released_dense_baseline(name: str) -> None:
    net, images = plain(name, ()), images_of(name)
    model = ours(name, prune_after=())
    load_released(model, net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, images), net(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("once", [True, False])
def test_the_same_noise_gives_the_same_gradient(once: bool) -> None:
    """In training as well; released gates that act again at later prune points change the scorers' gradient alone."""
    name = "scd_unetr_small"
    net, images = plain(name).train(), images_of(name, 1)
    model = ours(name).train()
    load_released(model, net.state_dict())
    net.noise, net.gates_once = torch.Generator().manual_seed(11), once
    pruning = Pruning(noise=torch.Generator().manual_seed(11))
    weight = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    theirs, found = net(images), logits_of(model, images, pruning)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
    (theirs * weight).sum().backward()
    (found * weight).sum().backward()
    pairs = {
        "blocks": (net.encoder.blocks[0].attn.qkv, model.encoder.blocks[0].attn.qkv),
        "assembler": (net.completion_net.pre_linear_list[0], model.assembler.maps[0]),
        "decoder": (net.decoder.decoder3.transp_conv.conv, model.decoder.ups[2].transp_conv.conv),
        "scorer": (net.encoder.score_predictor_list[0].in_mlp[1], model.encoder.pruners["2"].scorer.embed),
    }
    for what, (a, b) in pairs.items():
        apart = float((a.weight.grad - b.weight.grad).norm() / a.weight.grad.norm())
        assert (apart < 1e-3) == (once or what != "scorer"), (what, apart)


def test_checkpoints_of_its_trainer(tmp_path: Path) -> None:
    """A dictionary with other things, weights of a parallel run, and the convolutions that old MONAI never used."""
    name = "scd_unetr_small"
    net, images = plain(name), images_of(name, 1)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    state["module.decoder.encoder2.blocks.0.1.conv3.conv.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save({"epoch": 3, "arch": "vit_base", "state_dict": state}, tmp_path / "best_model.pth.tar")
    model = ours(name, weights=tmp_path / "best_model.pth.tar")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, images), net(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_grid": 3}, r"it has of another size encoder\.pos_embed \(1, 17, 36\) for \(1, 10, 36\); set patch_size"),
        ({"width": 48}, r"encoder\.cls_token \(1, 1, 36\) for \(1, 1, 48\), .* and \d+ more"),
        ({"depth": 13}, r"it lacks encoder\.blocks\.12\.norm1\.weight, .* and 9 more"),
        ({"prune_after": (2,)}, r"assembler\.codes \(3, 24\) for \(2, 24\)"),
        ({"depth": 11}, r"has the unknown encoder\.blocks\.11\.norm1\.weight"),
        ({"completion_size": (36, 1, 3)}, r"assembler\.codes \(3, 24\) for \(3, 36\)"),
        ({"decoder": "unetr_pooled"}, r"of another size decoder\.ups\.1\.transp_conv\.conv\.weight"),
    ],
)
def test_other_sizes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        load_released(ours("scd_unetr_small", **changes), plain("scd_unetr_small").state_dict(), "a.pth")


def test_other_code_of_place_is_refused() -> None:
    state = plain("scd_unetr_small").state_dict()
    state["completion_net.completion.pos_embed"] += 0.1
    with pytest.raises(FormatError, match=r"pos_embed \(1, 17, 24\) is not the code of place of a grid of 4\^2 cells"):
        load_released(ours("scd_unetr_small"), state)


def test_other_models_are_refused() -> None:
    state = plain("scd_unetr_small").state_dict()
    for changes in ({"decoder": "linear"}, {"completion": "cross"}):
        with pytest.raises(ConfigError, match="released weights fit neither another decoder than"):
            load_released(ours("scd_unetr_small", **changes), state)
    with pytest.raises(ConfigError, match=r"exact=True with scd_vit_tiny: only scd_unetr_\* models"):
        create_config("scd_vit_tiny", exact=True)
    with pytest.raises(ConfigError, match="needs at least one block"):
        ours("scd_unetr_small", completion_size=(24, 0, 2))
    with pytest.raises(ConfigError, match="keep_schedule='most' is none of exact, published"):
        create_config("scd_unetr_small", keep_schedule="most")


@pytest.mark.parametrize(
    ("length", "ratio", "counts"), [(1728, 0.1, (172, 17, 1)), (4096, 0.25, (1024, 256, 64)), (1000, 1.0, (1000,) * 3)]
)
def test_counts_fall_as_released(length: int, ratio: float, counts: tuple[int, ...]) -> None:
    assert published_counts(length, ratio, 3) == counts


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.1, "keep_ratio=0.1 leaves of 216 tokens 21, 2, 0 with keep_schedule='published'; keep more, or use"),
        ((0.5, 0.2, 0.1), r"with keep_schedule='published' must be one number in \(0, 1\]"),
        (0.0, "must be one number in"),
    ],
)
def test_no_token_left(ratio: float | tuple[float, ...], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        published_counts(216, ratio, 3)


def test_exact_models_are_saved_and_read(tmp_path: Path) -> None:
    model, images = ours("scd_unetr_small"), images_of("scd_unetr_small", 1)
    model.save_pretrained(tmp_path)
    again = fv.SegmentationModel.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(logits_of(again, images), logits_of(model, images))
