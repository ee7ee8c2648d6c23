"""A run that was killed goes on where it stopped, and writes the same bytes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.errors import FormatError
from foveate.io.pyramid import write_pyramid

PROGRAM = """
import os, signal, sys
import numpy as np
from foveate.io.pyramid import write_pyramid

reduce, channels, die = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
y, x = np.ogrid[:1037, :333]
image = np.stack([(x * y // 50 + c) % 7 for c in range(channels)]).astype(np.uint8)
image[:, 200:600, 100:] = 3
asked = 0

def tiles(box):
    global asked
    if asked == die:
        os.kill(os.getpid(), signal.SIGKILL)
    asked += 1
    return image[:, box[0][0]:box[1][0], box[0][1]:box[1][1]]

compression = "jpeg" if channels == 3 and reduce == "mean" else "zlib"
write_pyramid("out.tif", tiles, shape=(1037, 333), dtype=np.uint8, channels=channels, tile=64, reduce=reduce,
              spool="spool", compression=compression, overwrite=True, kind="tiff" if reduce == "mean" else "ome")
print(asked)
"""


def run(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(("reduce", "channels"), [("mode", 1), ("mean", 3), ("mode", 2)])
def test_killed_runs_go_on_after_the_last_row(tmp_path: Path, reduce: str, channels: int) -> None:
    assert run(tmp_path, reduce, channels, -1).stdout == "102\n"
    expected = (tmp_path / "out.tif").read_bytes()
    (tmp_path / "out.tif").unlink()
    for die in (3, 20, 9, 31):  # rows of six tiles
        assert run(tmp_path, reduce, channels, die).returncode == -9
        assert [path.name for path in tmp_path.iterdir()] == ["spool"]
    done = run(tmp_path, reduce, channels, -1)
    assert done.stdout == f"{102 - 6 * (3 + 1 + 5)}\n", done.stderr
    assert (tmp_path / "out.tif").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out.tif"]


def stopped(path: Path, spool: Path, rows: int, **options: Any) -> None:
    """Leaves a spool of some rows."""

    def tiles(box: Any) -> int:
        if box[0][0] >= 64 * rows:
            raise KeyboardInterrupt
        return 1

    given = {"shape": (400, 200), "dtype": np.uint8, "tile": 64, "key": "model 1"}
    with pytest.raises(KeyboardInterrupt):
        write_pyramid(path, tiles, spool=spool, **(given | options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shape": (400, 201)}, r"shape=\[400, 200\], not \[400, 201\]"),
        ({"dtype": np.uint16}, r"dtype='\|u1', not '<u2'"),
        ({"tile": 128}, "tile=64, not 128"),
        ({"key": "model 2"}, "key='model 1', not 'model 2'"),
        ({"reduce": "mean"}, "reduce='mode', not 'mean'"),
    ],
)
def test_spool_of_another_output_is_refused(tmp_path: Path, options: Any, reason: str) -> None:
    stopped(tmp_path / "a.tif", tmp_path / "spool", 2)
    given = {"shape": (400, 200), "dtype": np.uint8, "tile": 64, "key": "model 1"}
    with pytest.raises(FormatError, match=f"spool: keeps tiles of another output, {reason}; use the settings of that"):
        write_pyramid(tmp_path / "a.tif", lambda box: 1, spool=tmp_path / "spool", **(given | options))
    with pytest.raises(FormatError, match="keeps tiles of another output, output="):
        write_pyramid(tmp_path / "b.tif", lambda box: 1, spool=tmp_path / "spool", **given)
    write_pyramid(tmp_path / "a.tif", lambda box: 1, spool=tmp_path / "spool", **given)


@pytest.mark.parametrize("name", ["state.npz", "level-0.bin", "level-1.bin"])
@pytest.mark.parametrize("damage", ["short", "other"])
def test_damaged_spool_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    stopped(tmp_path / "a.tif", tmp_path / "spool", 2)
    victim = tmp_path / "spool" / name
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 2] + (b"" if damage == "short" else b"\0" * (len(data) - len(data) // 2)))
    with pytest.raises(FormatError, match="spool: keeps tiles of a run, but is damaged; remove it to begin again"):
        write_pyramid(
            tmp_path / "a.tif", lambda box: 1, spool=tmp_path / "spool", shape=(400, 200), dtype=np.uint8, tile=64,
            key="model 1",
        )  # fmt: skip


def test_foreign_files_in_the_spool_stay(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "notes.txt").write_text("mine")
    write_pyramid(tmp_path / "a.tif", lambda box: 1, spool=spool, shape=(400, 200), dtype=np.uint8, tile=64)
    assert [path.name for path in spool.iterdir()] == ["notes.txt"]
