"""Labels as numbers that a model learns, and back: which classes there are, how numbers are scaled, what weighs what.

Legend: B rows, K classes or labels of a task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foveate.errors import ConfigError, FormatError
from foveate.nn.heads import TaskSpec
from foveate.tasks.recognition_settings import LabelSpec, TableConfig
from foveate.tasks.table import Row

SEPARATOR, NONE = ";", "-"


def resolve_tasks(data: TableConfig, rows: Sequence[Row], train: Sequence[Row]) -> TableConfig:
    """The settings with everything that the table decides written down: class names, and the scale of numbers.

    Args:
        data: the settings.
        rows: all rows, in which the classes are found.
        train: those for training, from which numbers get their scale.

    Raises:
        ConfigError: a task has fewer than two classes, or labels that never vary, in training.
        FormatError: a label that no class names, or that is no number.
    """
    tasks = {name: _resolved(name, spec, rows, train) for name, spec in data.tasks.items()}
    encode(rows, tasks)  # every label must be one that can be learned
    return replace(data, tasks=tasks)


def _resolved(name: str, spec: LabelSpec, rows: Sequence[Row], train: Sequence[Row]) -> LabelSpec:
    if spec.kind == "regression":
        value_B = encode(train, {name: replace(spec, scale=[0.0, 1.0])})[name].flatten()
        value_B = value_B[~value_B.isnan()].double()
        if not len(value_B) or float(value_B.std(correction=0)) == 0:
            raise ConfigError(f"task {name!r}: its number is the same in all {len(value_B)} training rows: give others")
        return spec if spec.scale else replace(spec, scale=[float(value_B.mean()), float(value_B.std(correction=0))])
    found = {value for row in rows for value in parts_of(row.labels[name], spec)}
    values: list[str | int] = [*sorted(found, key=_by_size)]
    resolved = replace(spec, values=spec.values or values)
    resolved.check(name)
    seen = {row.labels[name] for row in train if row.labels[name]}
    if len(seen) < 2:
        only = f"only {min(seen)!r}" if seen else "no label"
        raise ConfigError(
            f"task {name!r}: the {len(train)} training rows hold {only}: a classifier needs at least two classes; give "
            "rows of others, or change data.split"
        )
    return resolved


def parts_of(text: str, spec: LabelSpec) -> list[str]:
    """The classes that a cell of the table names; none where nobody knows, or where it says that there are none."""
    if spec.kind != "labels":
        return [text] if text else []
    return [part.strip() for part in text.split(SEPARATOR) if part.strip() not in ("", NONE)]


def _by_size(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def task_specs(tasks: Mapping[str, LabelSpec]) -> tuple[TaskSpec, ...]:
    """What the model's heads have to give for tasks that are resolved."""
    return tuple(TaskSpec(name, spec.kind, len(spec.names) or 1) for name, spec in tasks.items())


def encode(rows: Sequence[Row], tasks: Mapping[str, LabelSpec]) -> dict[str, Tensor]:
    """Labels as tensors over the rows.

    Args:
        rows: of the table.
        tasks: resolved, see `resolve_tasks`.

    Returns:
        By task the class ``[B]`` int64, -1 where it is not known; 0 or 1 ``[B, K]`` for labels and the scaled number
        ``[B, 1]``, NaN where they are not known.

    Raises:
        FormatError: a label that no class names, or that is no number.
    """
    result = {}
    for name, spec in tasks.items():
        encoded = [_encoded(row, name, spec) for row in rows]
        kind = torch.int64 if spec.kind in ("classes", "ordinal") else torch.float32
        width = () if kind == torch.int64 else (len(spec.names) or 1,)
        result[name] = torch.tensor(encoded, dtype=kind).view(len(rows), *width)
    return result


def _encoded(row: Row, name: str, spec: LabelSpec) -> int | list[float]:
    text, names = row.labels.get(name, ""), spec.names
    if spec.kind == "regression":
        mean, deviation = spec.scale or (0.0, 1.0)
        try:
            return [(float(text or "nan") - mean) / deviation]
        except ValueError:
            raise FormatError(f"row {row.number} ({row.item.name}) has {name}={text!r}: write a number") from None
    parts = parts_of(text, spec)
    unknown = [part for part in parts if part not in names]
    if unknown:
        raise FormatError(
            f"row {row.number} ({row.item.name}) has {name}={unknown[0]!r}, none of {', '.join(names)}: correct it, or "
            f"name it in data.tasks.{name}.values"
        )
    if spec.kind == "labels":
        return [float(label in parts) for label in names] if text else [float("nan")] * len(names)
    return names.index(parts[0]) if parts else -1


def class_weights(tasks: Mapping[str, LabelSpec], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight of every class in the loss, where the settings ask for any.

    ``balanced`` weighs a class by how much rarer it is than if all were alike, ``B / (K count)``, and the positives of
    a label by how many negatives there are for each; both at most 100.

    Args:
        tasks: resolved.
        targets: of the training rows, see `encode`.
    """
    weights = {}
    for name, spec in tasks.items():
        asked = spec.class_weights
        if isinstance(asked, str):
            target, num = targets[name], len(spec.names)
            if spec.kind == "labels":
                one = (target == 1).sum(0)
                ratio = (target == 0).sum(0) / one.clamp(min=1)
            else:
                count = torch.bincount(target[target >= 0], minlength=num)
                ratio = count.sum() / (num * count.clamp(min=1))
            weights[name] = ratio.clamp(max=100.0).float()
        elif asked is not None:
            weights[name] = torch.tensor(asked, dtype=torch.float32)
    return weights
