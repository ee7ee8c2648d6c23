import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_task import ToyTask, toy_config

from foveate.tasks.loop import Loop
from foveate.testing import write_dataset


def worker(rank: int, port: int, folder: str, num_items: int, accumulate: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    task = ToyTask(dtype=torch.float64, num_items=num_items)
    config = toy_config(epochs=3, batch_size=2, accumulate=accumulate, clip=0.5)
    loop = Loop(task, config, Path(folder))
    assert (loop.rank, loop.world) == (rank, 2)
    result = loop.run()
    torch.save({"weights": task.model.state_dict(), "step": result.position.step}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("num_items", "accumulate"),
    [(8, 1), pytest.param(9, 1, id="a process without a share"), pytest.param(11, 2, id="accumulated")],
)
def test_two_processes_give_the_weights_of_one(tmp_path: Path, num_items: int, accumulate: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(tmp_path), num_items, accumulate)
    torch.multiprocessing.spawn(worker, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    two = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]

    task = ToyTask(dtype=torch.float64, num_items=num_items)
    (tmp_path / "one").mkdir()
    config = toy_config(epochs=3, batch_size=4, accumulate=accumulate, clip=0.5)
    one = Loop(task, config, tmp_path / "one").run()
    assert two[0]["step"] == two[1]["step"] == one.position.step
    for name, value in task.model.state_dict().items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])
        assert torch.allclose(two[0]["weights"][name], value, atol=1e-12, rtol=0), name


def test_accelerate_launch_gives_the_weights_of_one_process(tmp_path: Path) -> None:
    """The command that people type: two processes, half the images each, on a machine without an accelerator."""
    write_dataset(tmp_path / "data", 6, 64, 0)
    overrides = {"depth": 1, "width": 48, "num_heads": 3, "decoder_width": 8}
    settings = {
        "data": {"root": str(tmp_path / "data"), "classes": {"s": 1}, "split": {"train": 0.7, "val": 0.3, "test": 0.0}},
        "tree": {"max_leaves": 16, "min_size": 16},
        "model": {"name": "apf_vit_tiny", "overrides": overrides},
        "train": {"epochs": 2, "batch_size": 2, "augment": 0.0, "precision": "fp32"},
    }
    (tmp_path / "fit.yaml").write_text(json.dumps(settings))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    fit = ["fit", str(tmp_path / "fit.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for command in (
        [*launcher, "-m", "foveate", *fit, "--train.batch_size=1", "--out", str(tmp_path / "two")],
        [sys.executable, "-m", "foveate", *fit, "--out", str(tmp_path / "one")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ended by epochs") == 1
    one, two = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
