import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_task import ToyTask, toy_config

from foveate.errors import FoveateError, MissingExtraError
from foveate.tasks.loop import Interrupted, Loop, Position, batch_plan, learning_rate, make_optimizer, run_share
from foveate.tasks.run import Metrics, installed_tracker, read_metrics


def weights(task: ToyTask) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in task.model.parameters()])


def train(task: ToyTask, folder: Path, *, resume: bool = False, **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    return Loop(task, toy_config(**changes), folder, resume=resume).run().reason


def test_epochs_end_and_checkpoints_exist(tmp_path: Path) -> None:
    assert train(ToyTask(), tmp_path) == "epochs"
    assert (tmp_path / "checkpoints/last/trainer.pt").is_file()
    assert (tmp_path / "checkpoints/best/model.safetensors").is_file()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "val"] == [4, 8, 12, 16]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6, 9])
def test_resume_is_bit_exact(tmp_path: Path, stop_at: int) -> None:
    straight = ToyTask()
    train(straight, tmp_path / "straight")

    halted = ToyTask()
    loaded = iter(range(1000))
    halted.on_batch = lambda index: os.kill(os.getpid(), signal.SIGINT) if next(loaded) == stop_at else None
    with pytest.raises(Interrupted, match=rf"stopped after step {stop_at}, saved; continue it with --resume"):
        train(halted, tmp_path / "halted")
    resumed = ToyTask()
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # all must come from the checkpoint
    assert train(resumed, tmp_path / "halted", resume=True) == "epochs"
    assert torch.equal(weights(straight), weights(resumed))
    assert halted.seen + resumed.seen == straight.seen


def test_resume_with_more_epochs_equals_one_run(tmp_path: Path) -> None:
    straight, first, second = ToyTask(), ToyTask(), ToyTask()
    train(straight, tmp_path / "a", schedule="constant", warmup=0.0)
    train(first, tmp_path / "b", schedule="constant", warmup=0.0, epochs=2)
    train(second, tmp_path / "b", schedule="constant", warmup=0.0, resume=True)
    assert torch.equal(weights(straight), weights(second))
    steps = [line["step"] for line in read_metrics(tmp_path / "b/metrics.jsonl") if line["kind"] == "val"]
    assert steps == [4, 8, 12, 16]


def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    task, before = ToyTask(), signal.getsignal(signal.SIGINT)

    def twice(index: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    task.on_batch = twice
    with pytest.raises(KeyboardInterrupt) as caught:
        train(task, tmp_path)
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    small, large = ToyTask(dtype=torch.float64, num_items=8), ToyTask(dtype=torch.float64, num_items=8)
    train(small, tmp_path / "a", accumulate=2)
    train(large, tmp_path / "b", batch_size=4)
    assert torch.allclose(weights(small), weights(large), atol=1e-12, rtol=0)


def test_nan_loss_names_the_step_and_the_images(tmp_path: Path) -> None:
    task = ToyTask()
    train(task, tmp_path, epochs=2)
    before = (tmp_path / "checkpoints/last/model.safetensors").read_bytes()
    broken = ToyTask()
    broken.poison = "item3"
    with pytest.raises(
        FoveateError, match=r"loss is nan at step \d+ \(images: .*item3.*\); it must be finite; .*is kept"
    ):
        train(broken, tmp_path, resume=True)
    assert (tmp_path / "checkpoints/last/model.safetensors").read_bytes() == before


def test_limits(tmp_path: Path) -> None:
    assert train(ToyTask(), tmp_path / "steps", max_steps=3) == "max_steps"
    assert [line["step"] for line in read_metrics(tmp_path / "steps/metrics.jsonl")][-1] == 3
    assert train(ToyTask(), tmp_path / "minutes", epochs=None, minutes=0.002) == "minutes"
    falling = ToyTask()
    falling.scores = iter(range(100, 0, -1))
    assert train(falling, tmp_path / "patience", epochs=50, patience=3) == "patience"
    lines = read_metrics(tmp_path / "patience/metrics.jsonl")
    assert max(line["epoch"] for line in lines) == 4


def test_best_is_kept_when_scores_fall(tmp_path: Path) -> None:
    task = ToyTask()
    task.scores = iter([1, 5, 2, 3])
    result = Loop(task, toy_config(), tmp_path).run()
    assert result.position.best == 5
    assert result.position.best_step == 8
    best = ToyTask()
    best.load(tmp_path / "checkpoints/best")
    assert not torch.equal(weights(best), weights(task))


def test_of_equal_scores_the_later_model_is_the_best_and_patience_counts_on(tmp_path: Path) -> None:
    task = ToyTask()
    task.scores = iter([1, 5, 5, 5, 5])
    result = Loop(task, toy_config(epochs=9, patience=2), tmp_path).run()
    assert result.reason == "patience"
    assert (result.position.best, result.position.best_step, result.position.step) == (5, 16, 16)
    best = ToyTask()
    best.load(tmp_path / "checkpoints/best")
    assert torch.equal(weights(best), weights(task))


def test_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    task = ToyTask()
    before = torch.get_rng_state()
    train(task, tmp_path, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_torn_metrics_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 5}\n{"kind": "tr')
    metrics = Metrics(path, keep=4)
    metrics.write("val", Position(step=5), {"dice": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5]


def test_plan_covers_every_item_once_in_an_order_of_its_own() -> None:
    plan = batch_plan(10, 4, seed=1, epoch=0)
    assert sorted(item for batch in plan for item in batch) == list(range(10))
    assert plan == batch_plan(10, 4, seed=1, epoch=0)
    assert plan != batch_plan(10, 4, seed=1, epoch=1)
    assert batch_plan(1, 4, seed=0, epoch=0) == [[0]]


def test_learning_rate_rises_and_falls() -> None:
    config = toy_config(epochs=10, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, run_share(config, Position(step=step), 10)) for step in range(100)]
    assert 0 < rates[0] < rates[5] < rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    timed = toy_config(epochs=None, minutes=2.0, lr=1.0, warmup=0.0)
    assert learning_rate(timed, run_share(timed, Position(seconds=60.0), 10)) == pytest.approx(0.5)
    line = toy_config(lr=1.0, warmup=0.0, schedule="linear")
    assert learning_rate(line, 0.25) == 0.75


def test_vectors_and_embeddings_are_not_decayed() -> None:
    task = ToyTask()
    decayed, spared = make_optimizer(task.model, toy_config()).param_groups
    assert [parameter.ndim for parameter in decayed["params"]] == [2, 2]
    assert [parameter.ndim for parameter in spared["params"]] == [1, 1]
    assert spared["weight_decay"] == 0.0


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"train\.tracker='wandb' needs a package.*pip install wandb"):
        installed_tracker("wandb")


def test_metrics_reach_the_tracker(tmp_path: Path) -> None:
    sent: list[tuple[dict[str, Any], int]] = []
    metrics = Metrics(tmp_path / "m.jsonl", also=lambda values, step: sent.append((values, step)))
    metrics.add({"ce": 0.5}, tokens=4)
    metrics.flush(Position(step=1), 0.1)
    metrics.write("val", Position(step=1), {"dice": 0.5, "note": "text"})
    assert sent == [
        ({"train/loss": 0.5, "train/ce": 0.5, "train/lr": 0.1, "train/tokens_per_step": 4.0}, 1),
        ({"val/dice": 0.5}, 1),
    ]
