"""A pruned run that starts from a dense one: its weights are taken, what is new is fresh, the recovery is recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config, write_discs

from foveate.errors import FormatError
from foveate.tasks.config import FitConfig
from foveate.tasks.infer import load_model
from foveate.tasks.run import read_metrics
from foveate.tasks.segmentation import fit
from foveate.tasks.start import make_model

PRUNE = {"prune_after": [0], "keep_ratio": 0.5}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("discs")
    write_discs(root)
    fit(_config(root, root / "dense"))
    return root / "dense"


def _config(root: Path, out: Path, **changes: Any) -> FitConfig:
    overrides = {"depth": 2, **changes.pop("overrides", {})}
    model = {"overrides": {"width": 32, "num_heads": 2, "decoder_width": 8, "patch_size": 8, **overrides}}
    return tiny_config(root, out, model=model | changes, train={"epochs": 1, "eval_first": True})


def test_a_pruned_model_takes_what_the_dense_one_has(dense: Path, tmp_path: Path) -> None:
    config = _config(dense.parent, tmp_path, weights=str(dense), overrides=PRUNE)
    trained, _ = load_model(dense)
    model = make_model(config)
    theirs = trained.state_dict()
    assert set(theirs) < set(model.state_dict())
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items() if name in theirs)
    sparse = make_model(_config(dense.parent, tmp_path, weights=str(dense), overrides=PRUNE | {"decoder": "sparse"}))
    ours = sparse.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("encoder.blocks"))


def test_recovery_is_written_from_the_first_step_on(dense: Path, tmp_path: Path) -> None:
    fit(_config(dense.parent, tmp_path / "sparse", weights=str(dense), overrides=PRUNE))
    lines = [line for line in read_metrics(tmp_path / "sparse" / "metrics.jsonl") if line["kind"] == "val"]
    assert [(line["epoch"], line["step"] > 0) for line in lines] == [(0, False), (1, True)]
    assert all("boundary_recall" in line and "dice" in line for line in lines)
    fit(_config(dense.parent, tmp_path / "again", weights=str(tmp_path / "sparse"), overrides=PRUNE))


def test_weights_of_another_size_are_named(dense: Path, tmp_path: Path) -> None:
    wide = _config(dense.parent, tmp_path, weights=str(dense), overrides=PRUNE | {"width": 64})
    with pytest.raises(
        FormatError,
        match=r"dense.*: does not fit the model: encoder\.cls_token is \(1, 1, 32\) there and \(1, 1, 64\) here",
    ):
        make_model(wide)
    deep = _config(dense.parent, tmp_path, weights=str(dense), overrides=PRUNE | {"depth": 3})
    with pytest.raises(
        FormatError, match=r"encoder\.blocks\.2\.norm1\.weight is missing there and \(32,\) here.* and \d+ more"
    ):
        make_model(deep)
    with pytest.raises(FormatError, match="does not fit the model"):
        make_model(_config(dense.parent, tmp_path, weights=str(dense), overrides={"width": 64}))
