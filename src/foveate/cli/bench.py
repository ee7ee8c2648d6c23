"""``foveate bench FAMILY``: run a benchmark of the source checkout."""

import subprocess
import sys
from pathlib import Path

import foveate
from foveate.cli.parser import VerbParser, closest
from foveate.errors import ConfigError, MissingExtraError


def find_benchmarks() -> Path:
    """The ``benchmarks`` folder of this source checkout.

    Raises:
        MissingExtraError: foveate was installed without its source tree.
    """
    candidates = (Path(foveate.__file__).resolve().parents[2] / "benchmarks", Path.cwd() / "benchmarks")
    for folder in candidates:
        if (folder / "record.py").is_file():
            return folder
    raise MissingExtraError(
        f"no benchmarks folder at {candidates[0]}; benchmarks are part of the source checkout, "
        "so clone the repository and install it with pip install -e ."
    )


def run(words: list[str]) -> int:
    """Run ``benchmarks/<family>.py`` (or all of them) and hand on the first exit code that is not 0."""
    parser = VerbParser("bench", "Measure one family of claims and write its result file.")
    parser.add_argument("family", metavar="FAMILY", help="a script of the benchmarks folder, or all")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, proves nothing")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the result goes (default: benchmarks/results)")
    args = parser.parse(words)
    folder = find_benchmarks()
    families = sorted(path.stem for path in folder.glob("[!_]*.py") if path.stem != "record")
    if args.family != "all" and args.family not in families:
        hint = closest(args.family, families)
        there = ", ".join(families) or "none"
        raise ConfigError(f"unknown benchmark family {args.family!r}{hint}; there are: {there}")
    flags = ["--quick"] * args.quick + (["--out", str(args.out.resolve())] if args.out else [])
    worst = 0
    for family in families if args.family == "all" else [args.family]:
        command = [sys.executable, str(folder / f"{family}.py"), *flags]
        worst = worst or subprocess.run(command, check=False, cwd=folder.parent).returncode
    return worst
