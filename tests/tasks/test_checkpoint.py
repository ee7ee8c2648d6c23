import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.errors import FormatError
from foveate.tasks import checkpoint
from foveate.tasks.checkpoint import find_checkpoint, load_trainer, restore_rng, rng_state, save_checkpoint

VICTIM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from foveate.tasks.checkpoint import save_checkpoint
folder = Path(sys.argv[1])
count = 0
while True:
    value = torch.full((200_000,), float(count))
    write = lambda new: save_file({"value": value}, new / "model.safetensors")
    save_checkpoint(folder, write, {"value": value})
    count += 1
    if count == 2:
        print("ready", flush=True)
"""


def save(folder: Path, value: float) -> None:
    def write(new: Path) -> None:
        save_file({"value": torch.tensor([value])}, new / "model.safetensors")

    save_checkpoint(folder, write, {"value": torch.tensor([value])})


def read(folder: Path) -> float:
    assert find_checkpoint(folder) == folder
    model = load_file(folder / "model.safetensors")["value"][0].item()
    assert load_trainer(folder)["value"][0].item() == model
    return float(model)


def test_save_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "last"
    assert find_checkpoint(folder) is None
    save(folder, 1.0)
    save(folder, 2.0)
    assert read(folder) == 2.0
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


@pytest.mark.parametrize("step", ["rename", "rmtree"])
@pytest.mark.parametrize("call", [0, 1])
def test_a_kill_between_any_two_steps_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    folder = tmp_path / "last"
    save(folder, 1.0)
    calls = iter(range(100))

    class Killed(BaseException):
        pass

    def dying(*args: object, **options: object) -> None:
        if next(calls) >= call:  # nothing after the kill runs, no cleaning up either
            raise Killed
        return real(*args, **options)

    owner = Path if step == "rename" else checkpoint.shutil
    real = getattr(owner, step)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, dying)
        with contextlib.suppress(Killed):  # some saves come through before the kill
            save(folder, 2.0)
    assert read(folder) in (1.0, 2.0)
    save(folder, 3.0)
    assert read(folder) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_an_error_in_the_middle_of_the_write_keeps_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save(folder, 1.0)

    def broken(new: Path) -> None:
        (new / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, broken, {})
    assert read(folder) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_disk_full_keeps_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save(folder, 1.0)

    def full(new: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FormatError, match=r"not saved \(.*No space left on device\); .* is kept"):
        save_checkpoint(folder, full, {})
    assert read(folder) == 1.0


def test_disk_full_in_the_trainer_state_keeps_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save(folder, 1.0)
    script = (
        "import resource, sys, signal, torch; from pathlib import Path\n"
        "from foveate.tasks.checkpoint import save_checkpoint\n"
        "from foveate.errors import FormatError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save_checkpoint(Path(sys.argv[1]), lambda new: None, {'x': torch.zeros(1_000_000)})\n"
        "except FormatError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert "not saved" in done.stdout
    assert read(folder) == 1.0


def test_sigkill_at_any_time_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    chance = random.Random(0)
    for _ in range(3):
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(folder)], stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        assert read(folder) >= 1.0


def test_trainer_state_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, ("touch canary",))

    torch.save({"x": Trap()}, tmp_path / "trainer.pt")
    with pytest.raises(FormatError, match="not plain data"):
        load_trainer(tmp_path)
    (tmp_path / "trainer.pt").write_bytes(b"")
    with pytest.raises(FormatError, match="not a readable trainer state"):
        load_trainer(tmp_path)
    (tmp_path / "trainer.pt").unlink()
    with pytest.raises(FormatError, match="not a readable trainer state"):
        load_trainer(tmp_path)


def test_generators_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", lambda new: None, {"rng": rng_state()})
    drawn = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    restore_rng(load_trainer(tmp_path / "last")["rng"])
    again = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]
