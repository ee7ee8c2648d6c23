import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_labels import tiny_labels, write_cross, write_crosses

from foveate.cli import main
from foveate.errors import ConfigError, FormatError
from foveate.io.bags import write_bag
from foveate.tasks.bags import held, open_bag
from foveate.tasks.config import load_as, load_config, save_config
from foveate.tasks.items import Item
from foveate.tasks.loop import Interrupted, Loop
from foveate.tasks.recognise import load_recognition
from foveate.tasks.recognition import build_model, build_task, fit
from foveate.tasks.recognition_settings import RecognitionConfig, SelectConfig
from foveate.tasks.run import read_metrics


@pytest.fixture(scope="module")
def crosses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crosses(tmp_path_factory.mktemp("crosses"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints/last/model.safetensors")


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_fit_writes_a_complete_run(crosses: Path, tmp_path: Path) -> None:
    result = fit(tiny_labels(crosses, tmp_path / "run"))
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "checkpoints/last/trainer.pt"):
        assert (tmp_path / "run" / name).is_file(), name
    for name in ("model.safetensors", "config.json", "fit.yaml"):
        assert (tmp_path / "run/checkpoints/best" / name).is_file(), name
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    train, val = ([line for line in lines if line["kind"] == kind] for kind in ("train", "val"))
    assert [line["tokens_per_step"] for line in train] == [4 * 8, 4 * 3]  # keep falls from 8 towards 2
    assert {"score", "val_loss", "label_auroc", "label_balanced_accuracy", "label_f1"} <= val[-1].keys()
    assert "ended by epochs after 2 epochs, 4 steps" in str(result)
    saved = load_as(RecognitionConfig, tmp_path / "run/config.yaml")
    assert saved.data.tasks["label"].names == ("cross", "none")  # what the table decided is written down
    with pytest.raises(ConfigError, match="is about recognition, not segmentation: give another file"):
        load_config(tmp_path / "run/config.yaml")


def test_it_learns(tmp_path: Path) -> None:
    root = write_crosses(tmp_path / "data", 24)
    still = {"width": 32, "num_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
    config = tiny_labels(
        root,
        tmp_path / "run",
        select={"rank": "mean"},
        model={"overrides": still},
        train={"epochs": 16, "eval_every": 8},
    )
    result = fit(config)
    assert result.loop.position.best == 1.0
    losses = [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.2 * losses[0]


def test_loading_changes_nothing(crosses: Path, tmp_path: Path) -> None:
    for loading, workers in (("sequential", 0), ("eager", 1), ("lazy", 2)):
        config = tiny_labels(crosses, tmp_path / loading, train={"num_workers": workers, "augment": 0.5})
        fit(replace(config, data=replace(config.data, loading=loading)))
    assert same(tmp_path / "sequential", tmp_path / "eager")
    assert same(tmp_path / "sequential", tmp_path / "lazy")


def test_resume_is_bit_exact(crosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"epochs": 4}
    fit(tiny_labels(crosses, tmp_path / "straight", train=train))
    with monkeypatch.context() as patch:
        step, calls = Loop._step, iter(range(100))

        def stopping(self: Loop, micro: Any) -> Any:
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, micro)

        patch.setattr(Loop, "_step", stopping)
        with pytest.raises(Interrupted, match="stopped after step 3"):
            fit(tiny_labels(crosses, tmp_path / "halted", train=train))
    with pytest.raises(ConfigError, match=r"select.keep=3 but the run in .* has 2"):
        fit(tiny_labels(crosses, tmp_path / "halted", train=train, select={"keep": 3}), resume=True)
    fit(tiny_labels(crosses, tmp_path / "halted", train=train), resume=True)
    assert same(tmp_path / "straight", tmp_path / "halted")


def test_a_warm_start_says_what_it_did_not_look_at(crosses: Path, tmp_path: Path) -> None:
    config = tiny_labels(crosses, tmp_path / "run", select={"keep": 1, "keep_start": 1, "chunk": 5, "warm_start": 3})
    task = build_task(config)
    assert task.warm is not None
    task.warm.contenders = 2.0
    device = torch.device("cpu")
    for epoch in range(3):
        assert all(batch.chosen is not None for batch in task.batches(epoch, [[0, 1], [2]], device))
    assert [one.looked < 1 for one in task.coverage] == [False] * 3 + [True] * 6
    with torch.no_grad():
        values = task.validate(task.model.eval())
    assert 0.3 < values["looked"] < 1
    assert 0 < values["missed"] <= 1
    assert not task.coverage


def test_an_unreadable_image_is_skipped_and_reported(
    crosses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(crosses, root)
    config = tiny_labels(root, tmp_path / "run", train={"epochs": 1, "batch_size": 1})
    first = build_task(config).rows["train"][0].item.image
    first.write_bytes(first.read_bytes()[:100])
    result = fit(config)
    assert result.loop.position.step == 8  # a batch of nothing but it is a step without gradient
    assert str(result).endswith("fetch or export the file again)")
    assert f"; 1 images skipped (first: {first}: truncated or corrupt PNG" in str(result)
    assert capsys.readouterr().err.count("foveate: skipped") == 1
    shutil.rmtree(root / "images")
    with pytest.raises(FormatError, match=r"none of the 8 train images can be read \(first: .*cannot be read"):
        fit(config, overwrite=True)


def features(root: Path, num_images: int = 8, width: int = 6) -> Path:
    (root / "bags").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(num_images):
        values = torch.randn(index % 5 + 1, width, generator=generator)
        write_bag(root / f"bags/s{index}.safetensors", values, half=False)
    lines = [f"s{index},{index % 2}" for index in range(num_images)]
    (root / "labels.csv").write_text("\n".join(["id,label", *lines]) + "\n")
    return root


FEATURES = {"model": {"name": "ips_features", "overrides": {"width": 16, "num_heads": 2}}}


def feature_run(root: Path, out: Path, **changes: Any) -> RecognitionConfig:
    config = tiny_labels(root, out, **FEATURES, train={"epochs": 1, "batch_size": 2}, **changes)
    return replace(config, data=replace(config.data, features="bags"))


def test_bags_of_features_of_any_size_down_to_one_patch(tmp_path: Path) -> None:
    task = build_task(feature_run(features(tmp_path / "data"), tmp_path / "run"))
    assert task.network.config.in_chans == 6
    result = fit(feature_run(tmp_path / "data", tmp_path / "run"))
    assert result.loop.reason == "epochs"
    assert not result.skipped


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3, 5), "holds features of width 5, the model takes 6; embed it the same way"),
        (torch.full((3, 6), torch.nan), "patch 0 holds NaN or infinite values; make the file again"),
        (torch.zeros(0, 6), "is a bag of 0 patches (nothing can be said of it); embed it again, or leave it out"),
    ],
    ids=["width", "nan", "empty"],
)
def test_bad_bags_are_skipped(tmp_path: Path, values: torch.Tensor, message: str) -> None:
    root = features(tmp_path / "data")
    config = feature_run(root, tmp_path / "run")
    bad = build_task(config).rows["train"][1].item.image
    bad.unlink()
    write_bag(bad, values.nan_to_num(0.0), half=False)
    if values.isnan().any():  # the writer refuses them
        bad.write_bytes(bad.read_bytes()[:-72] + b"\x00\x00\xc0\x7f" * 18)
    result = fit(config)
    assert len(result.skipped) == 1
    assert message in result.skipped[0]
    assert str(bad) in result.skipped[0]


def test_tissue_and_pixel_size(tmp_path: Path) -> None:
    write_cross(tmp_path / "a.png", 1, cross=True)
    item = Item("a", tmp_path / "a.png", None, "a")
    data = replace(tiny_labels(tmp_path, tmp_path / "run").data, tissue=0.1)
    bag = open_bag(item, data)
    assert len(bag) == 5
    assert torch.equal(held(bag).read(torch.tensor([0])), bag.read(torch.tensor([0])))
    assert bag.read(torch.tensor([0])).dtype == torch.uint8  # encoders scale bytes themselves
    grey = replace(data, channels=3, normalise="image", tissue=0.0)
    assert open_bag(item, grey).read(torch.tensor([3, 1])).shape == (2, 3, 16, 16)
    with pytest.raises(FormatError, match=r"a.png does not say the size of its pixels, but data.mpp=0.5"):
        open_bag(item, replace(data, mpp=0.5))
    coarse = open_bag(replace(item, mpp=0.25), replace(data, mpp=0.5, tissue=0.0))
    assert coarse.shape == (32, 32)
    assert len(coarse) == 4


def test_models_that_do_not_fit(crosses: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'ips_features' but the run is about pixels: give a model of pixels"):
        build_task(tiny_labels(crosses, tmp_path / "run", model={"name": "ips_features"}))
    with pytest.raises(ConfigError, match="'apf_vit_tiny' is no recognition model"):
        build_task(tiny_labels(crosses, tmp_path / "run", model={"name": "apf_vit_tiny", "overrides": {}}))
    with pytest.raises(ConfigError, match=r"model.overrides.keep is set by select.keep: change it there"):
        tiny_labels(crosses, tmp_path / "run", model={"overrides": {"keep": 3}})


def test_frozen_blocks_stay(crosses: Path, tmp_path: Path) -> None:
    config = tiny_labels(crosses, tmp_path / "run", train={"epochs": 1})
    config = replace(config, model=replace(config.model, train_blocks=1))
    before = {name: value.clone() for name, value in build_task(config).network.state_dict().items()}
    fit(config)
    changed = {name for name, value in weights(tmp_path / "run").items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("encoder.net.blocks.0.", "encoder.net.blocks.1.")) for name in changed)
    assert any(name.startswith("encoder.net.blocks.2.") for name in changed)


@pytest.mark.parametrize(("name", "num_tasks"), [("megapixel-mnist", 4), ("slide-labels", 1), ("traffic-signs", 1)])
def test_examples_are_complete(name: str, num_tasks: int) -> None:
    config = load_as(RecognitionConfig, Path(__file__).parents[2] / f"examples/{name}.yaml")
    assert len(config.data.tasks) == num_tasks
    tasks = {key: replace(spec, values=["a", "b"]) for key, spec in config.data.tasks.items()}
    model = build_model(replace(config, data=replace(config.data, tasks=tasks)), [])
    assert model.config.keep == config.select.keep
    assert model.config.patch_size == config.data.patch_size


def test_plan_says_what_there_is(crosses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(tiny_labels(crosses, tmp_path / "run"), tmp_path / "run.yaml")
    assert main(["plan", "--data", str(tmp_path / "run.yaml"), "--data.loading=lazy"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "rows: 8 train, 4 val, 4 test, 16 groups",
        "task label: classes, 2 outputs; in training cross 4, none 4",
    ]
    assert said[2] == "patches: 16 to 16 an image (mean 16 of 16 images), 1 x 16 x 16"
    assert said[4].startswith("a step trains on at most 32 patches")
    assert main(["plan", "--data", str(tmp_path / "run.yaml"), "--limit", "3"]) == 0
    assert "(mean 16 of 3 images)" in capsys.readouterr().out
    assert said[4].endswith("and on 8 in the end")


def test_selection_looks_in_what_the_device_is_made_for(
    crosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kind_of_bf16(made: bool) -> None:
        monkeypatch.setattr("foveate.tasks.precision.is_made_for_bf16", lambda device: made)

    config = tiny_labels(crosses, tmp_path / "run", train={"epochs": 1, "precision": "fp32"})
    assert config.select.precision == "auto"
    assert build_task(config).network.config.precision == "folded"
    kind_of_bf16(True)
    fit(config)
    run, best = tmp_path / "run", tmp_path / "run/checkpoints/best"
    assert load_as(RecognitionConfig, run / "config.yaml").select.precision == "bf16"
    assert json.loads((best / "config.json").read_text())["precision"] == "bf16"
    assert load_recognition(run)[0].config.precision == "bf16"
    kind_of_bf16(False)  # another machine: what would be slow there is not taken over
    assert load_recognition(run)[0].config.precision == "folded"
    with pytest.raises(ConfigError, match=r"select.precision='folded' but the run in .* has 'bf16'; a run is resumed"):
        fit(config, resume=True)
    fit(replace(config, select=replace(config.select, precision="bf16")), overwrite=True)
    assert load_recognition(run)[0].config.precision == "bf16"  # asked for


def test_where_a_prediction_rests_on_all_patches_auto_only_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.tasks.precision.is_made_for_bf16", lambda device: True)
    device = torch.device("cpu")
    assert SelectConfig().precision_on(device) == "bf16"
    assert SelectConfig(attend="all").precision_on(device) == "folded"
    assert SelectConfig(attend="all", precision="bf16").precision_on(device) == "bf16"
    with pytest.raises(
        ConfigError, match=r"select.precision='fp23' is none of auto, fp32, folded, bf16, int8: did you"
    ):
        SelectConfig(precision="fp23")
