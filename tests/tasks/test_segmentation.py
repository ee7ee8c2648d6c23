import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config, write_disc, write_discs

from foveate.errors import ConfigError, FormatError, FoveateError
from foveate.tasks.data import SegmentationData, collate
from foveate.tasks.loop import Interrupted, Loop
from foveate.tasks.losses import leaf_loss
from foveate.tasks.metrics import PixelMetrics
from foveate.tasks.predict import prepare, segment
from foveate.tasks.run import read_metrics
from foveate.tasks.segmentation import build_task, fit


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("discs"))


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / which / "model.safetensors")


def test_fit_writes_a_complete_run(discs: Path, tmp_path: Path) -> None:
    result = fit(tiny_config(discs, tmp_path / "run"))
    folder = tmp_path / "run"
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "checkpoints/last/trainer.pt"):
        assert (folder / name).is_file(), name
    for name in ("model.safetensors", "config.json", "fit.yaml"):
        assert (folder / "checkpoints/best" / name).is_file(), name
    lines = read_metrics(folder / "metrics.jsonl")
    val = [line for line in lines if line["kind"] == "val"]
    assert len(val) == 2
    assert all(0 <= line["dice"] <= 1 and 0.5 < line["ceiling"] <= 1 and line["tokens"] <= 40 for line in val)
    assert "ended by epochs after 2 epochs, 4 steps" in str(result)


def test_it_learns(discs: Path, tmp_path: Path) -> None:
    result = fit(tiny_config(discs, tmp_path / "run", train={"epochs": 40, "lr": 1e-2, "eval_every": 20}))
    assert result.loop.position.best > 0.7


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_is_bit_exact(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    train = {"epochs": 4, "num_workers": num_workers, "augment": 1.0 if num_workers == 0 else 0.5}
    fit(tiny_config(discs, tmp_path / "straight", train=train))
    with monkeypatch.context() as patch:
        step = Loop._step
        calls = iter(range(100))

        def stopping(self: Loop, micro: Any) -> Any:
            if next(calls) == 4:  # the first step of the third epoch
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, micro)

        patch.setattr(Loop, "_step", stopping)
        with pytest.raises(Interrupted, match="stopped after step 5"):
            fit(tiny_config(discs, tmp_path / "halted", train=train))
    fit(tiny_config(discs, tmp_path / "halted", train=train), resume=True)
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "halted")
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_run_folder_is_guarded(discs: Path, tmp_path: Path) -> None:
    config = tiny_config(discs, tmp_path / "run", train={"epochs": 1})
    fit(config)
    with pytest.raises(ConfigError, match="holds a run already; add --resume to continue it or --overwrite"):
        fit(config)
    other = tiny_config(discs, tmp_path / "run", train={"epochs": 1, "lr": 1e-5})
    with pytest.raises(
        ConfigError, match=r"train\.lr=1e-05 but the run in .* has 0\.003; a run is resumed with its own"
    ):
        fit(other, resume=True)
    with pytest.raises(ConfigError, match="contradict"):
        fit(config, resume=True, overwrite=True)
    fit(other, overwrite=True)
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 2
    fit(tiny_config(discs, tmp_path / "run", train={"epochs": 2, "lr": 1e-5}), resume=True)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["epoch"] == 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not a run"):
        fit(tiny_config(discs, tmp_path / "thesis"), overwrite=True)


def test_train_and_eval_share_one_path(discs: Path, tmp_path: Path) -> None:
    """What the model is shown in training, unvaried, is to the last bit what it is shown in prediction."""
    config = tiny_config(discs, tmp_path / "run")
    task = build_task(config)
    assert task.val is not None
    for index in range(len(task.val)):
        sample = task.val[index]
        image, _ = task.val.load(index)
        patches = prepare(image, config, task.val.patch_size)
        assert torch.equal(sample.patches.pixels, patches.pixels)
        assert torch.equal(sample.patches.leaves[0].start, patches.leaves[0].start)
    # and validation images are never varied, whatever epoch it is
    task.val.set_epoch(7)
    assert torch.equal(task.val[0].patches.pixels, prepare(task.val.load(0)[0], config, task.val.patch_size).pixels)


def test_loss_terms_and_their_weights_are_those_of_leaf_loss(discs: Path, tmp_path: Path) -> None:
    config = tiny_config(discs, tmp_path / "run", train={"class_weights": [1.0, 3.0], "dice_weight": 0.5})
    task = build_task(config)
    batch = next(task.batches(0, [[0, 1, 2]], torch.device("cpu")))
    sums, divisors = task.loss(task.model, batch), task.weights(batch)
    whole = sum(float(sums[key].detach()) / divisors[key] for key in sums)
    parts = leaf_loss(
        task.model(batch.patches),
        batch.soft,
        batch.weight,
        lengths=batch.patches.lengths,
        class_weights=[1.0, 3.0],
        dice_weight=0.5,
    )
    assert whole == pytest.approx(float(parts.total().detach()), rel=1e-5)


def test_dice_is_pixel_space(discs: Path, tmp_path: Path) -> None:
    """The score counts pixels of the painted mask: a large leaf weighs what it covers, not one token."""
    config = tiny_config(discs, tmp_path / "run")
    task = build_task(config)
    scores = task.validate(task.model.eval())
    assert task.val is not None
    dice = []
    for index in range(len(task.val)):
        image, labels = task.val.load(index)
        assert labels is not None
        guess = segment(task.model, image, config).labels.numpy() == 1
        truth = labels.numpy() == 1
        assert guess.shape == truth.shape == (64, 64)
        dice.append(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
    assert scores["dice"] == pytest.approx(np.mean(dice))


def test_empty_masks_and_single_images_train(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for index in range(3):
        write_disc(root, f"{index}", index, radius=0)  # all background
    split = {"train": 0.34, "val": 0.33, "test": 0.33}
    data = {"root": str(root), "classes": {"disc": ">=128"}, "split": split}
    result = fit(tiny_config(root, tmp_path / "run", data=data))
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "train")
    assert result.loop.position.best >= 0  # nothing there: 1 when nothing is found, 0 when something is

    one = tmp_path / "one"
    write_disc(one, "only", 0)
    data = {"root": str(one), "classes": {"disc": ">=128"}, "split": {"train": 1.0, "val": 0.0, "test": 0.0}}
    result = fit(tiny_config(one, tmp_path / "single", data=data))
    assert result.loop.position.step == 2
    assert (tmp_path / "single/checkpoints/best/model.safetensors").is_file()


def test_one_very_long_image_does_not_change_its_neighbours(discs: Path, tmp_path: Path) -> None:
    config = tiny_config(discs, tmp_path / "run", tree={"max_leaves": 600, "min_size": 4})
    task = build_task(config)
    write_disc(tmp_path / "long", "long", 0, (192, 160))
    from foveate.tasks.items import Item

    item = Item("long", tmp_path / "long/images/long.png", tmp_path / "long/masks/long.png", "long")
    long = SegmentationData([item], config, task.train.patch_size, train=False)[0]
    short = SegmentationData(task.train.items[:1], config, task.train.patch_size, train=False)[0]
    assert len(long.soft) > 5 * len(short.soft) or len(long.soft) > 400
    with torch.no_grad():
        alone = task.model.eval()(short.patches)
        both = task.model(collate([long, short]).patches)
    assert torch.allclose(alone, both[len(long.soft) :], atol=1e-6)


def test_a_bad_training_file_is_one_line(discs: Path, tmp_path: Path) -> None:
    for num_workers in (0, 1):
        root = tmp_path / f"data{num_workers}"
        shutil.copytree(discs, root)
        for path in (root / "images").iterdir():
            path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(FormatError) as caught:
            fit(tiny_config(root, tmp_path / f"run{num_workers}", train={"num_workers": num_workers}))
        assert "\n" not in str(caught.value)
        assert "images" in str(caught.value)


def test_exploding_training_is_a_typed_error(discs: Path, tmp_path: Path) -> None:
    config = tiny_config(discs, tmp_path / "run", train={"lr": 1e30, "clip": None, "warmup": 0.0, "epochs": 20})
    with pytest.raises(FoveateError, match=r"at step|holds NaN"):
        fit(config)


@pytest.mark.parametrize("decoder", ["token", "linear"])
def test_the_first_guess_is_the_share_of_each_class(discs: Path, tmp_path: Path, decoder: str) -> None:
    config = tiny_config(discs, tmp_path / "run")
    overrides = config.model.overrides | {"decoder": decoder}
    task = build_task(replace(config, model=replace(config.model, overrides=overrides)))
    covered = np.mean([float((task.train.load(index)[1] == 1).float().mean()) for index in range(len(task.train))])
    bias = task.model.decoder.head.bias.detach().view(2, -1).softmax(0)[1]
    assert torch.allclose(bias, torch.full_like(bias, covered), atol=1e-3)


def test_a_missing_mask_is_found_before_training(discs: Path, tmp_path: Path) -> None:
    data = {"root": str(discs), "masks": None}
    with pytest.raises(ConfigError, match=r"train image .* has no mask"):
        fit(tiny_config(discs, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_ceiling_does_not_depend_on_the_model(discs: Path, tmp_path: Path) -> None:
    config = tiny_config(discs, tmp_path / "run", tree={"uniform": 8})
    task = build_task(config)
    first = task.validate(task.model)["ceiling"]
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1.0)
    task._ceilings.clear()
    assert task.validate(task.model)["ceiling"] == first > 0.9
    assert isinstance(PixelMetrics(config.data.class_names).summarise(), dict)


def test_import_has_no_side_effects() -> None:
    script = (
        "import os, random, numpy, torch\n"
        "state = lambda: (dict(os.environ), random.getstate(), numpy.random.get_state()[1].tolist(),"
        " torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype())\n"
        "before = state()\n"
        "import foveate.tasks.loop, foveate.tasks.run, foveate.tasks.checkpoint, foveate.tasks.segmentation\n"
        "import foveate.tasks.predict, foveate.tasks.evaluate, sys\n"
        "assert state() == before\n"
        "heavy = {'accelerate', 'monai', 'matplotlib', 'torchmetrics', 'transformers', 'timm', 'jsonargparse'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
