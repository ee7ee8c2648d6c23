"""Who trains, who validates and who is the test: by whole groups, every class alike, always the same."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from foveate.errors import ConfigError
from foveate.tasks.items import SPLITS
from foveate.tasks.recognition_settings import TableConfig, TableSplit
from foveate.tasks.table import Row


def split_rows(rows: Sequence[Row], data: TableConfig) -> dict[str, tuple[Row, ...]]:
    """Share the rows out by whole groups (patients).

    The table's split column wins; a group it leaves open joins the group's other rows. The other groups are laid in a
    line, class by class and within a class by a seeded hash of their names, and dealt along the line, so that every
    class is on every side in its share as far as whole groups allow; the order of rows never matters.

    Args:
        rows: of the table.
        data: the shares or folds, the seed, and the task whose classes are shared out.

    Returns:
        ``train``, ``val`` and ``test``, each in the order of ``rows``; no group is in two of them.

    Raises:
        ConfigError: a group is in two splits by the table, there are fewer groups than folds, or nothing is left for
            training.
    """
    chosen: dict[str, str] = {}
    for row in rows:
        group, split = row.item.group, row.item.split
        if split is not None and chosen.setdefault(group, split) != split:
            raise ConfigError(
                f"group {group!r} is in the splits {chosen[group]!r} and {split!r} (row {row.number}): put every group "
                "into one split"
            )
    line = _line([row for row in rows if row.item.group not in chosen], data)
    fixed_test = "test" in chosen.values()
    chosen |= _deal(line, data.split) if data.split.folds is None else _fold(line, data.split, fixed_test)
    result = {split: tuple(row for row in rows if chosen[row.item.group] == split) for split in SPLITS}
    if not result["train"]:
        raise ConfigError(f"0 of {len(rows)} rows are for training: name some 'train' in the split column")
    return result


def _line(rows: Sequence[Row], data: TableConfig) -> list[str]:
    """Groups by their most frequent class, then by hash."""
    by = data.split.stratify
    if by is None:
        by = next((name for name, spec in data.tasks.items() if spec.kind != "regression"), None)
    classes: dict[str, Counter[str]] = {}
    for row in rows:
        classes.setdefault(row.item.group, Counter())[row.labels.get(by, "") if by else ""] += 1

    def place(group: str) -> tuple[str, bytes]:
        common = max(sorted(classes[group]), key=lambda label: classes[group][label])
        return common, hashlib.sha256(f"{data.split.seed}/{group}".encode()).digest()

    return sorted(classes, key=place)


def _deal(line: Sequence[str], split: TableSplit) -> dict[str, str]:
    """Give the next group of the line to whoever lacks most of the share."""
    shares = {name: getattr(split, name) for name in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    chosen: dict[str, str] = {}
    for number, group in enumerate(line, 1):
        chosen[group] = max(SPLITS, key=lambda name: round(shares[name] * number - counts[name], 9))
        counts[chosen[group]] += 1
    for name in ("val", "test"):  # at least one each, while training keeps one
        if shares[name] > 0 and counts[name] == 0 and counts["train"] > 1:
            moved = next(group for group in reversed(line) if chosen[group] == "train")
            chosen[moved] = name
            counts[name], counts["train"] = 1, counts["train"] - 1
    return chosen


def _fold(line: Sequence[str], split: TableSplit, fixed_test: bool) -> dict[str, str]:
    """Deal the line into folds: one is test (or validates, where test is fixed), the next one validates."""
    folds = split.folds or 1
    if line and len(line) < folds:
        raise ConfigError(f"data.split.folds={folds} for {len(line)} groups: give at most as many folds as groups")
    roles = {split.fold: "val"} if fixed_test else {(split.fold + 1) % folds: "val", split.fold: "test"}
    return {group: roles.get(number % folds, "train") for number, group in enumerate(line)}
