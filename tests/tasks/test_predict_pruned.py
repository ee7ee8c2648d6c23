"""Masks of one checkpoint at other shares of tokens than it was made for, and in half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config, write_discs

from foveate.cli import main
from foveate.errors import ConfigError
from foveate.geometry.patches import Patches
from foveate.nn.pruner import Pruning
from foveate.tasks import infer
from foveate.tasks.predict import load_model, predict
from foveate.tasks.pruning import recorded_pruning
from foveate.tasks.segmentation import fit
from foveate.tasks.settings import PredictConfig

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 2, "decoder_width": 8, "patch_size": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pruned")
    write_discs(root / "data", 4)
    model = {"name": "scd_vit_tiny", "overrides": SMALL | {"prune_after": [0], "keep_ratio": 0.5}}
    fit(tiny_config(root / "data", root / "run", model=model, train={"epochs": 1, "keep_ratio": [0.3, 1.0]}))
    return root / "run"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.dtype]]:
    """Share of the tokens that was kept in every forward pass, and the type of what came out."""
    seen: list[tuple[float, torch.dtype]] = []

    def wrapped(path: Any) -> Any:
        model, config = load_model(path)
        forward = model.forward

        def call(patches: Patches, pruning: Pruning) -> Any:
            logits = forward(patches, pruning)
            assert pruning.scores is not None
            seen.append((len(pruning.scores[-1].kept) / len(patches.pixels), logits.dtype))
            return logits

        model.forward = call
        return model, config

    monkeypatch.setattr("foveate.tasks.predict.load_model", wrapped)
    return seen


def test_one_checkpoint_serves_any_share(run: Path, tmp_path: Path, asked: list[tuple[float, torch.dtype]]) -> None:
    image = run.parent / "data" / "images" / "00.png"
    for number, ratio in enumerate((None, 0.8, 1)):
        predict(run, image, tmp_path / str(number), keep_ratio=ratio, overlay=True)
    assert [share for share, _ in asked] == pytest.approx([0.5, 0.8, 1.0], abs=0.02)


def test_half_precision(run: Path, tmp_path: Path, asked: list[tuple[float, torch.dtype]]) -> None:
    image = run.parent / "data" / "images" / "00.png"
    words = ["predict", str(run), str(image), "--out", str(tmp_path), "--precision", "bf16", "--keep-ratio", "0.6"]
    assert main(words) == 0
    assert asked == [(pytest.approx(0.6, abs=0.02), torch.bfloat16)]


def test_validation_uses_what_prediction_will(run: Path) -> None:
    model, config = load_model(run)
    pruning = recorded_pruning(model, PredictConfig(keep_ratio=1.0))
    assert pruning is not None
    assert pruning.keep_ratio == 1.0
    image = torch.randn(3, 64, 64)
    patches = infer.prepare(image, config, 8)
    half = infer.logits_of(model, patches, pruning, "bf16")
    torch.testing.assert_close(half, infer.logits_of(model, patches, pruning), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep-ratio", "0"], "predict.keep_ratio=0.0 is no share above 0 and up to 1: give one such as 0.5"),
        (["--keep-ratio", "1.5"], "predict.keep_ratio=1.5 is no share above 0 and up to 1"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
    ],
    ids=["zero", "more", "int8"],
)
def test_what_cannot_be_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    image = run.parent / "data" / "images" / "00.png"
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_model_that_does_not_prune_has_no_share(tmp_path: Path) -> None:
    write_discs(tmp_path / "data", 4)
    fit(tiny_config(tmp_path / "data", tmp_path / "run", train={"epochs": 1}))
    with pytest.raises(ConfigError, match=r"keep_ratio=0\.5 of a model that prunes no tokens; leave it out"):
        predict(tmp_path / "run", tmp_path / "data" / "images", tmp_path / "out", keep_ratio=0.5)
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_is_scored_at_any_share(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--split", "val", "--keep-ratio", "0.8"]) == 0
    assert (run / "evaluation" / "val-keep0.8.json").is_file()
    assert "val-keep0.8.html" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--split", "val", "--keep-ratio", "1.5"]) == 2
    assert "predict.keep_ratio=1.5 is no share above 0 and up to 1" in capsys.readouterr().err
