"""Recognition models: bags in, logits of every task out, whatever the company; saved, read back, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
import laws
from foveate.errors import ConfigError, FormatError
from foveate.geometry.patch_source import TensorPatches
from foveate.models.recognition import Chosen, RecognitionConfig, RecognitionModel, build_recognition
from foveate.nn.heads import TaskSpec, total_loss
from foveate.nn.patch_encoder import freeze
from foveate.nn.warm_start import WarmStart

TASKS = (TaskSpec("majority", "classes", 10), TaskSpec("multi", "labels", 10), TaskSpec("grade", "ordinal", 4))


def model_of(**changes: Any) -> RecognitionModel:
    torch.manual_seed(0)
    return build_recognition(
        RecognitionConfig(**{"in_chans": 1, "width": 32, "keep": 8, "tasks": TASKS, "position": "sine", **changes})
    )


def bag(seed: int, num: int = 40, side: int = 8) -> TensorPatches:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(num, 1, side, side, generator=generator)
    pixels[: num // 3] = 0
    start = torch.randint(0, 56, (num, 2), generator=generator)
    return TensorPatches(pixels, torch.stack([start, start + side], 1), (64, 64))


BAGS = [bag(0), bag(1, 5), bag(2, 0), bag(3, 8), bag(4, 90)]


def listed(said: dict[str, Tensor]) -> list[list[Tensor]]:
    return [list(parts) for parts in zip(*said.values(), strict=True)]


@pytest.mark.parametrize("changes", [{}, {"attend": "all"}, {"rule": "buffered"}, {"precision": "folded"}])
def test_a_bag_has_the_same_answer_in_any_company(changes: dict[str, Any]) -> None:
    model = model_of(**changes).eval()
    with torch.no_grad():
        laws.batch_invariance(lambda bags: listed(model(bags)), BAGS)


def test_bytes_and_floats_may_stand_in_one_batch() -> None:
    model = model_of(position="none").eval()
    pixels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    bags = [TensorPatches(pixels), TensorPatches(pixels.float() / 255)]
    with torch.no_grad():
        laws.batch_invariance(lambda some: listed(model(some)), bags)
        for said in model(bags).values():
            assert torch.equal(said[0], said[1])


@pytest.mark.parametrize("chunk", [1, 13, 1000])
def test_logits_do_not_depend_on_the_chunk(chunk: int) -> None:
    with torch.no_grad():
        laws.same(model_of(chunk=chunk).eval()(BAGS), model_of().eval()(BAGS), "logits")


def test_a_prediction_from_all_patches_is_full_attention_at_any_keep() -> None:
    """Memory follows what is kept; the answer does not."""
    everything = model_of(keep=1000).eval()
    few = model_of(keep=3, attend="all").eval()
    few.load_state_dict(everything.state_dict())
    with torch.no_grad():
        laws.same(few(BAGS), everything(BAGS), "logits", 1e-5)


@pytest.mark.parametrize("attend", ["kept", "all"])
@pytest.mark.parametrize("encoder", ["cnn", "vit", "resnet18", "features"])
def test_a_step_trains_every_parameter(encoder: str, attend: str) -> None:
    model = model_of(
        encoder=encoder, in_chans=64 if encoder == "features" else 1, attend=attend, patch_size=8, depth=1, stages=1
    )
    bags = [TensorPatches(one.read(torch.arange(len(one))).flatten(1), one.boxes, (64, 64)) for one in BAGS]
    said = model(bags if encoder == "features" else BAGS)
    target = {
        "majority": torch.tensor([1, 2, 3, -1, 9]),
        "multi": torch.zeros(5, 10),
        "grade": torch.tensor([0, 1, 2, 3, 3]),
    }
    loss = total_loss(TASKS, said, target)
    assert loss.shape == (5,)
    loss.mean().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_chosen_patches_are_read_once_and_may_be_chosen_elsewhere() -> None:
    model = model_of().eval()
    chosen = model.choose(BAGS)
    assert isinstance(chosen, Chosen)
    assert chosen.lengths == (8, 5, 0, 8, 8)
    for one, source in zip(chosen.selections, BAGS, strict=True):
        assert one.num_patches == len(source)
    with torch.no_grad():
        laws.same(model(chosen), model(BAGS), "chosen before")


def test_nothing_but_empty_bags_says_what_the_queries_say() -> None:
    model = model_of()
    for mode in (True, False):
        said = model.train(mode)([bag(0, 0), bag(0, 0)])
        assert all(logits.isfinite().all() for logits in said.values())


def test_selection_leaves_frozen_batch_norms_frozen() -> None:
    """Released code calls train() behind every selection, so that frozen statistics move."""
    model = model_of(encoder="resnet18", stages=2, norm="batch").train()
    freeze(model.encoder, last_blocks=1)
    model.train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model(BAGS)
    moved = {name for name, value in model.encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("net.layer2.1") for name in moved)


def test_all_patches_and_batch_statistics_do_not_go_together() -> None:
    model = model_of(encoder="features", in_chans=64, norm="batch", attend="all", position="none")
    sources = [TensorPatches(torch.rand(20, 64))]
    with pytest.raises(ConfigError, match="attend='all' with an encoder that norms by batch statistics"):
        model(sources)
    assert model.eval()(sources)["multi"].shape == (1, 10)


def test_a_warm_start_selects_what_a_look_at_all_selects_while_nothing_moves() -> None:
    model, warm = model_of().eval(), WarmStart()
    names = [str(place) for place in range(len(BAGS))]
    for _ in range(3):
        chosen = model.choose(BAGS, warm=warm, names=names)
        laws.same(chosen.patches, model.choose(BAGS).patches, "warm")
    with pytest.raises(ConfigError, match="5 bags with 2 names: name each bag, as they are remembered by name"):
        model.choose(BAGS, warm=warm, names=names[:2])
    with pytest.raises(ConfigError, match="a warm start with attend='all': use attend='kept'"):
        model_of(attend="all").choose(BAGS, warm=warm, names=names)


@pytest.mark.parametrize("encoder", ["cnn", "features"])
def test_a_model_comes_back_from_its_folder(encoder: str, tmp_path: Path) -> None:
    model = model_of(encoder=encoder, in_chans=1 if encoder == "cnn" else 64, position="learned").eval()
    model.save_pretrained(tmp_path)
    again = RecognitionModel.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    laws.same(again.state_dict(), model.state_dict(), "weights")
    if encoder == "cnn":
        with torch.no_grad():
            laws.same(again(BAGS), model(BAGS), "logits")


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (
        ({"tasks": [{"name": "a", "kind": "guess"}]}, "describes no model .task a: kind='guess'"),
        ({"model": "segmentation"}, "describes 'segmentation', not a recognition model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **wrong}))
        with pytest.raises(FormatError, match=message):
            RecognitionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"position": "index"}, "position='index' is none of none, sine, learned; choose one"),
        ({"attend": "some"}, "attend='some' is none of kept, all; choose one"),
        ({"precision": "int4"}, "precision='int4' is none of fp32, folded, bf16, int8; choose one"),
        ({"attend": "all", "rule": "buffered"}, "attend='all' with rule='buffered': only 'exact' looks at all"),
        ({"width": 0}, "width=0 is below 1; give a positive whole number"),
        ({"tasks": ()}, "tasks .*: give at least one, each with a name of its own"),
        ({"tasks": (TaskSpec("a"), TaskSpec("a"))}, "give at least one, each with a name of its own"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(**wrong)


@pytest.mark.parametrize("name", fv.list_models("ips*"))
def test_models_have_names(name: str) -> None:
    small = {"ips_features": {"in_chans": 64}, "ips_vit_tiny": {"depth": 1, "patch_size": 8}}.get(name, {})
    model = fv.create_model(name, num_classes=3, **{"in_chans": 1, **small})
    assert isinstance(model, fv.RecognitionModel)
    patches = torch.rand(20, 64) if name == "ips_features" else torch.rand(20, 1, 8, 8)
    assert model.eval()([TensorPatches(patches)])["label"].shape == (1, 3)


def test_a_name_takes_tasks_as_mappings_and_refuses_strange_fields() -> None:
    model = fv.create_model("ips_cnn", tasks=[{"name": "age", "kind": "regression", "num_outputs": 1}])
    assert model.config.tasks == (TaskSpec("age", "regression", 1),)
    with pytest.raises(ConfigError, match="'kep' is no field of a recognition model; fields are attend, "):
        fv.create_model("ips_cnn", kep=3)
    with pytest.raises(ConfigError, match=r"ips_cnn: a value has the wrong type .*; see RecognitionConfig"):
        fv.create_model("ips_cnn", tasks=[{"nam": "age"}])
