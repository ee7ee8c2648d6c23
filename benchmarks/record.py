"""Benchmark records: every figure the project states is a claim in a file that one script made.

A family writes ``<family>_<hardware>_<date>.json`` and the same as Markdown beside it.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("foveate", "torch", "numpy", "numba", "opencv-python-headless", "scipy", "monai", "tifffile", "imagecodecs")


def claim(
    name: str,
    value: float,
    unit: str,
    against: str,
    target: float | str,
    *,
    met: bool | None = None,
    spread: Sequence[float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    """One figure with what it was measured against and what it has to reach.

    ``met`` defaults to ``value >= target`` for a number; state it where less is better or the target is text.
    """
    if met is None:
        if isinstance(target, str):
            raise TypeError(f"target={target!r} is text: say met=True or met=False")
        met = value >= target
    return {
        "claim": name,
        "value": round(value, 4),
        "unit": unit,
        "against": against,
        "target": target,
        "met": bool(met),
        "spread": [round(v, 4) for v in spread] if spread is not None else None,
        "note": note,
    }


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a family's script: ``--quick`` and ``--out``; add what else it takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, proves nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the record goes")
    return parser


def write(family: str, protocol: str, claims: Sequence[dict[str, Any]], out: Path = RESULTS) -> Path:
    """Write the record of one run; returns the path of the JSON file."""
    machine = _machine()
    record = {
        "family": family,
        "machine": machine,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "protocol": " ".join(protocol.split()),
        "claims": list(claims),
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{family}_{machine['slug']}_{datetime.date.today():%Y-%m-%d}"
    path = out / f"{stem}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(render(record))
    return path


def render(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    head = [
        f"# {record['family']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; load {machine['load']}; {versions}; "
        f"commit {record['commit']}.",
        "",
        record["protocol"],
        "",
        "| claim | value | against | target | met | spread | note |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [_row(entry) for entry in record["claims"]]) + "\n"


def _row(entry: dict[str, Any]) -> str:
    spread = " to ".join(f"{v:g}" for v in entry["spread"]) if entry["spread"] else ""
    met = "yes" if entry["met"] else "**no**"
    value = f"{entry['value']:g} {entry['unit']}".strip()
    cells = (entry["claim"], value, entry["against"], entry["target"], met, spread, entry["note"])
    return f"| {' | '.join(map(str, cells))} |"


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found.group(1) if found else cpu
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu} {cores}core".lower()).strip("-")
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "cores": cores, "memory_gib": round(memory), "load": load, "slug": slug}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
