"""The folder of unfinished outputs: one process at a time, and what it leaves."""

import subprocess
import sys
from pathlib import Path

import torch

from foveate.geometry.leaves import uniform_leaves
from foveate.tasks.part import Part

OPEN = """
import sys
from pathlib import Path
from foveate.errors import FormatError
from foveate.tasks.part import Part
try:
    print(Part.open(Path("out"), "a", Path("a.tif"), {}, resume=True).resumed)
except FormatError as error:
    print(error)
"""


def _elsewhere(folder: Path) -> str:
    """What another process is told that opens the same folder."""
    done = subprocess.run([sys.executable, "-c", OPEN], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"a slide")
    part = Part.open(tmp_path / "out", "a", tmp_path / "a.tif", {}, resume=False)
    part.keep(torch.zeros(4, 2, 2, 2), uniform_leaves((8, 8), 4), [])
    told = (
        "out/.a.part: another process is predicting this image into the same folder; wait for it, or give another --out"
    )
    assert _elsewhere(tmp_path) == told
    assert part.kept() is not None
    del part  # as the end of a process does
    assert _elsewhere(tmp_path) == "True"


def test_what_does_not_fit_is_cleared_and_nothing_stays_in_the_end(tmp_path: Path) -> None:
    source = tmp_path / "a.tif"
    source.write_bytes(b"a slide")
    part = Part.open(tmp_path, "a", source, {}, resume=False)
    part.keep(torch.zeros(4, 2, 2, 2), uniform_leaves((8, 8), 4), [])
    part.spool(tmp_path / "a.tif").mkdir()
    part = Part.open(tmp_path, "a", source, {"mpp": 1}, resume=True)
    assert not part.resumed
    assert not part.has_values
    assert not part.spool(tmp_path / "a.tif").exists()
    part.remove()
    assert list(tmp_path.iterdir()) == [source]
