"""What a recognition run will cost and learn from, before it runs: rows, classes, patches, bytes."""

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import torch

from foveate.geometry.patch_source import PatchSource
from foveate.tasks.bags import open_bag
from foveate.tasks.items import SPLITS
from foveate.tasks.plan_data import LIMIT
from foveate.tasks.recognition import build_model
from foveate.tasks.recognition_settings import RecognitionConfig
from foveate.tasks.skipped import UNREADABLE, skipped_line
from foveate.tasks.splits import split_rows
from foveate.tasks.table import read_table
from foveate.tasks.targets import parts_of, resolve_tasks


def plan_table(config: RecognitionConfig, *, limit: int | None = LIMIT) -> str:
    """Lines that say how many rows, classes and patches there are, and what a step of training holds.

    Args:
        config: settings of the run.
        limit: images whose patches are counted, evenly over the table; ``None``: all.

    Raises:
        ConfigError: table, splits and model do not fit.
        FormatError: the table is bad.

    Cost: the headers of ``limit`` images, and with ``data.tissue`` a look at each at low resolution.
    """
    rows = read_table(config.data)
    split = split_rows(rows, config.data)
    config = replace(config, data=resolve_tasks(config.data, rows, split["train"]))
    counts = ", ".join(f"{len(split[kind])} {kind}" for kind in SPLITS)
    lines = [f"rows: {counts}, {len({row.item.group for row in rows})} groups"]
    for name, spec in config.data.tasks.items():
        there = Counter(part for row in split["train"] for part in parts_of(row.labels[name], spec))
        shown = ", ".join(f"{label} {count}" for label, count in sorted(there.items())[:12])
        lines.append(f"task {name}: {spec.kind}, {len(spec.names) or 1} outputs; in training {shown}")
    marked = sum(row.marks is not None for row in rows)
    if marked:
        lines.append(f"marks: {marked} of {len(rows)} rows say where the evidence lies, which gives needle_recall")
    sizes, first = [], None
    for place in np.unique(np.linspace(0, len(rows) - 1, limit or len(rows)).astype(int)):
        try:
            bag = open_bag(rows[place].item, config.data)
        except UNREADABLE as error:
            lines.append(f"unreadable: {skipped_line(rows[place].item, error)}")
            continue
        first = first or bag
        sizes.append(len(bag))
    if first is not None:
        lines += _bytes(config, first, sizes, build_model(config, split["train"]).config.num_heads)
    return "\n".join(lines)


def _bytes(config: RecognitionConfig, bag: PatchSource, sizes: list[int], num_heads: int) -> list[str]:
    select, data = config.select, config.data
    patch = bag.read(torch.tensor([0]))[0]
    each = patch.numel() * patch.element_size()
    most, batch = max(sizes), config.train.batch_size
    kept = batch * min(select.start, most)
    in_memory = {"eager": batch * most, "sequential": most, "lazy": select.chunk}[data.loading]
    queries = num_heads * len(data.tasks)
    side = " x ".join(map(str, patch.shape))
    return [
        f"patches: {min(sizes):,} to {most:,} an image (mean {np.mean(sizes):,.0f} of {len(sizes)} images), {side}",
        f"selection: {_mb(in_memory * each)} of patches ({data.loading}), {_mb(4 * queries * most)} of logits",
        f"a step trains on at most {kept:,} patches ({_mb(kept * 4 * prod(patch.shape))} as the encoder takes them), "
        f"and on {batch * min(select.keep, most):,} in the end",
    ]


def _mb(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"
