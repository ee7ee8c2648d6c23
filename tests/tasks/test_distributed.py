import os
import socket
from pathlib import Path

import pytest
import torch
from toy_task import ToyTask, toy_config

from foveate.tasks.loop import Loop


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
