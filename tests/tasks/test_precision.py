"""Which numbers a model computes with: asked for, or found out from the device."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config, write_discs
from toy_task import ToyTask, toy_config

from foveate.cli import main
from foveate.tasks import precision
from foveate.tasks.config import load_config
from foveate.tasks.evaluate import evaluate
from foveate.tasks.loop import Loop
from foveate.tasks.predict import predict
from foveate.tasks.segmentation import fit

CPU = torch.device("cpu")
FOUND = precision.is_made_for_bf16  # before the fixture of all tests takes its place


def made_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_made_for_bf16", lambda device: True)


def test_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.resolve_precision("auto", CPU) == "fp32"
    made_for_bf16(monkeypatch)
    assert precision.resolve_precision("auto", CPU) == "bf16"
    for asked in ("fp32", "bf16", "fp16"):
        assert precision.resolve_precision(asked, CPU) == asked


@pytest.mark.parametrize("amx", [False, True])
def test_a_processor_with_amx_is_made_for_it(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert FOUND(CPU) == (amx and torch.backends.mkldnn.is_available())
    assert not FOUND(torch.device("meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # of another architecture, or an older torch
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert FOUND(CPU) == (amx and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("ampere", [False, True])
def test_a_gpu_is_asked_for_hardware_not_emulation(monkeypatch: pytest.MonkeyPatch, ampere: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or ampere)
    assert FOUND(torch.device("cuda")) == ampere


def test_the_loop_says_what_auto_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert Loop(ToyTask(), toy_config(epochs=1, precision="auto"), tmp_path / "a").run().precision == "fp32"
    made_for_bf16(monkeypatch)
    loop = Loop(ToyTask(), toy_config(epochs=1, precision="auto"), tmp_path / "b")
    with loop._autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert loop.run().precision == "bf16"


def test_run_scores_and_masks_say_which_precision_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(write_discs(tmp_path / "data"), tmp_path / "run", train={"epochs": 1})
    assert config.train.precision == config.predict.precision == "auto"
    made_for_bf16(monkeypatch)
    assert "s of training in bf16" in str(fit(config))
    run = Path(config.out)
    saved = load_config(run / "config.yaml")
    assert (saved.train.precision, saved.predict.precision) == ("bf16", "auto")
    assert evaluate(run).summary["precision"] == "bf16"
    assert json.loads((run / "evaluation/test.json").read_text())["summary"]["precision"] == "bf16"
    image = next((Path(config.data.root) / "images").iterdir())
    lines: list[str] = []
    predict(run, image, tmp_path / "auto", warn=lines.append)
    assert lines == ["foveate: masks are made in bf16, for which this device is made; fp32: --precision fp32"]
    predict(run, image, tmp_path / "plain", precision="fp32", warn=lines.append)
    assert len(lines) == 1
    assert main(["evaluate", str(run), "--precision", "fp32"]) == 0
    assert "s per image in fp32" in capsys.readouterr().out
