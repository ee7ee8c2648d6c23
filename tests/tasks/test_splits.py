from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import ConfigError
from foveate.tasks.items import SPLITS, Item
from foveate.tasks.recognition_settings import TableConfig, TableSplit
from foveate.tasks.splits import split_rows
from foveate.tasks.table import Row


def make(labels: list[str], groups: list[str] | None = None, splits: list[str | None] | None = None) -> list[Row]:
    names = groups or [f"g{number}" for number in range(len(labels))]
    marks = splits or [None] * len(labels)
    return [
        Row(Item(f"i{number}", Path(f"i{number}"), None, group, split), {"label": label}, number + 1)
        for number, (label, group, split) in enumerate(zip(labels, names, marks, strict=True))
    ]


def settings(**split: Any) -> TableConfig:
    return TableConfig(split=TableSplit(**split))


def counts(rows: tuple[Row, ...]) -> Counter[str]:
    return Counter(row.labels["label"] for row in rows)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=40), st.integers(0, 3))
def test_groups_stay_together_and_order_does_not_matter(drawn: list[tuple[str, int]], seed: int) -> None:
    rows = make([label for label, _ in drawn], [f"p{group}" for _, group in drawn])
    parts = split_rows(rows, settings(seed=seed))
    assert sorted(row.number for split in SPLITS for row in parts[split]) == [row.number for row in rows]
    groups = [{row.item.group for row in parts[split]} for split in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups))
    turned = split_rows(rows[::-1], settings(seed=seed))
    assert {split: {row.number for row in parts[split]} for split in SPLITS} == {
        split: {row.number for row in turned[split]} for split in SPLITS
    }


def test_every_class_gets_its_share() -> None:
    rows = make(["sick"] * 20 + ["well"] * 80)
    parts = split_rows(rows, settings(train=0.6, val=0.2, test=0.2))
    assert counts(parts["train"]) == {"sick": 12, "well": 48}
    assert counts(parts["val"]) == {"sick": 4, "well": 16}
    other = split_rows(rows, settings(train=0.6, val=0.2, test=0.2, seed=1))
    assert {row.number for row in other["test"]} != {row.number for row in parts["test"]}


def test_small_sets_keep_one_for_each_side() -> None:
    parts = split_rows(make(list("abab")), settings(train=0.9, val=0.05, test=0.05))
    assert [len(parts[split]) for split in SPLITS] == [2, 1, 1]
    assert [len(split_rows(make(["a"]), settings())[split]) for split in SPLITS] == [1, 0, 0]


def test_folds_cover_everything_once_and_evenly() -> None:
    rows = make(["sick"] * 10 + ["well"] * 25)
    folds = [split_rows(rows, settings(folds=5, fold=fold)) for fold in range(5)]
    assert sorted(row.number for parts in folds for row in parts["test"]) == [row.number for row in rows]
    assert all(counts(parts["test"]) == {"sick": 2, "well": 5} for parts in folds)
    assert all(parts["test"] == folds[at - 1]["val"] for at, parts in enumerate(folds))


def test_the_tables_split_wins() -> None:
    rows = make(list("abababab"), splits=["test", "test", *[None] * 6])
    folds = [split_rows(rows, settings(folds=3, fold=fold)) for fold in range(3)]
    assert all([row.number for row in parts["test"]] == [1, 2] for parts in folds)
    assert sorted(row.number for parts in folds for row in parts["val"]) == [3, 4, 5, 6, 7, 8]


def test_what_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match=r"group 'p' is in the splits 'train' and 'test' \(row 2\): put every group"):
        split_rows(make(["a", "b"], ["p", "p"], ["train", "test"]), settings())
    with pytest.raises(ConfigError, match=r"data.split.folds=5 for 3 groups: give at most as many folds as groups"):
        split_rows(make(list("abc")), settings(folds=5))
    with pytest.raises(ConfigError, match="0 of 2 rows are for training"):
        split_rows(make(list("ab"), splits=["val", "test"]), settings())
