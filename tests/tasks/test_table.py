import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.errors import ConfigError, FormatError
from foveate.tasks.config import config_from_dict
from foveate.tasks.recognition_settings import _UNUSED, LabelSpec, RecognitionConfig, SelectConfig, TableConfig
from foveate.tasks.settings import TrainConfig
from foveate.tasks.table import read_table
from foveate.tasks.targets import class_weights, encode, resolve_tasks, task_specs


def table(folder: Path, text: str, **data: Any) -> TableConfig:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    tasks = {name: LabelSpec(**spec) for name, spec in data.pop("tasks", {"label": {}}).items()}
    return TableConfig(root=str(folder), tasks=tasks, **data)


FOUR = (
    "path,id,label,marks,grade,age,group,split,mpp\n"
    "a.svs,,2,x;y,low,40,p1,train,0.25\n"
    "s/b.ome.tif,B,10,-,high,60,p2,train,\n"
    "c.svs,C,2,y,low,,p3,val,\n"
    "d.svs,D,9,,high,50,p4,test,\n"
)
TASKS = {
    "label": {},
    "marks": {"kind": "labels", "class_weights": "balanced"},
    "grade": {"kind": "ordinal", "values": ["low", "middle", "high"]},
    "years": {"kind": "regression", "column": "age"},
}


def test_rows_hold_what_the_table_says(tmp_path: Path) -> None:
    rows = read_table(table(tmp_path, FOUR, tasks=TASKS, missing="ignore"))
    assert [row.item.name for row in rows] == ["a", "B", "C", "D"]
    assert rows[1].item.image == tmp_path / "s/b.ome.tif"
    assert [row.item.group for row in rows] == ["p1", "p2", "p3", "p4"]
    assert [row.item.split for row in rows] == ["train", "train", "val", "test"]
    assert rows[0].item.mpp == 0.25
    assert rows[0].labels == {"label": "2", "marks": "x;y", "grade": "low", "years": "40"}
    bags = read_table(table(tmp_path, FOUR, tasks=TASKS, missing="ignore", features="bags"))
    assert bags[1].item.image == tmp_path / "bags/B.safetensors"


def test_labels_become_numbers(tmp_path: Path) -> None:
    data = table(tmp_path, FOUR, tasks=TASKS, missing="ignore")
    rows = read_table(data)
    data = resolve_tasks(data, rows, rows[:2])
    assert data.tasks["label"].names == ("2", "9", "10")  # by size, over all rows
    assert data.tasks["years"].scale == [50.0, 10.0]
    assert [spec.num_outputs for spec in task_specs(data.tasks)] == [3, 2, 3, 1]
    targets = encode(rows, data.tasks)
    assert targets["label"].tolist() == [0, 2, 0, 1]
    assert targets["marks"].nan_to_num(-1).tolist() == [[1, 1], [0, 0], [0, 1], [-1, -1]]
    assert targets["grade"].tolist() == [0, 2, 0, 2]
    assert targets["years"].flatten().nan_to_num(9).tolist() == [-1, 1, 9, 0]
    again = config_from_dict({"data": {"tasks": {n: vars(s) for n, s in data.tasks.items()}}}, RecognitionConfig).data
    assert again.tasks == data.tasks


def test_missing_labels_may_be_ignored(tmp_path: Path) -> None:
    data = table(tmp_path, "path,label\na,1\nb,\nc,0\n", missing="ignore")
    rows = read_table(data)
    assert encode(rows, resolve_tasks(data, rows, rows).tasks)["label"].tolist() == [1, -1, 0]


def test_balanced_weights(tmp_path: Path) -> None:
    tasks = {"label": {"class_weights": "balanced"}, "marks": {"kind": "labels", "class_weights": "balanced"}}
    text = "path,label,marks\n" + "".join(f"{i},{int(i == 0)},{'x' if i < 2 else 'x;y'}\n" for i in range(8))
    data = table(tmp_path, text, tasks=tasks)
    rows = read_table(data)
    data = resolve_tasks(data, rows, rows)
    weights = class_weights(data.tasks, encode(rows, data.tasks))
    assert torch.allclose(weights["label"], torch.tensor([8 / 14, 4.0]))
    assert torch.allclose(weights["marks"], torch.tensor([0.0, 2 / 6]))
    plain = {"label": {"class_weights": [1.0, 3.0]}}
    data = resolve_tasks(table(tmp_path, text, tasks=plain), rows, rows)
    assert class_weights(data.tasks, encode(rows, data.tasks))["label"].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("text", "settings", "error", "message"),
    [
        ("path,label\na.svs,1\nb.svs,\n", {}, FormatError, r"row 2 \(b\) has no label in column 'label': write one"),
        ("path,tumour\na,1\n", {}, FormatError, r"has the columns path, tumour but no 'label': add it"),
        ("image,label\na,1\n", {}, FormatError, r"has the columns image, label but no 'path'"),
        ("path,label\n,1\n", {}, FormatError, r"row 1 has no path: name an image"),
        ("path,label\n", {}, FormatError, "has no rows: name at least one image"),
        ("path,label\n../a,1\n", {}, FormatError, r"steps out with '\.\.'"),
        ("path,label,mpp\na,1,big\n", {}, FormatError, r"row 1 has mpp='big': write sizes above 0"),
        (
            "path,id,label,split\na,X,1,train\nb,X,0,test\n",
            {},
            ConfigError,
            r"rows 1 and 2 are both X \(in the splits test and train\): name every image once",
        ),
        ("path,id,label\na,X,1\na,Y,0\n", {}, ConfigError, r"rows 1 and 2 are both .*a: name every image once"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_table(table(tmp_path, text, **settings))


@pytest.mark.parametrize(
    ("spec", "labels", "message"),
    [
        ({}, "aa", r"task 'label': the 2 training rows hold only 'a': a classifier needs at least two classes"),
        (
            {"values": ["a", "b"]},
            "ax",
            r"row 2 \(1\) has label='x', none of a, b: correct it, or name it in data.tasks",
        ),
        ({"kind": "regression"}, "1x", r"row 2 \(1\) has label='x': write a number"),
        ({"kind": "regression"}, "11", r"task 'label': its number is the same in all 2 training rows"),
    ],
)
def test_bad_labels(tmp_path: Path, spec: dict[str, Any], labels: str, message: str) -> None:
    text = "path,label\n" + "".join(f"{number},{label}\n" for number, label in enumerate(labels))
    data = table(tmp_path, text, tasks={"label": spec})
    rows = read_table(data)
    with pytest.raises((ConfigError, FormatError), match=message):
        resolve_tasks(data, rows, rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"tasks": {}}}, "data.tasks is empty"),
        ({"data": {"tasks": {"a": {"kind": "clases"}}}}, "data.tasks.a.kind='clases' is none of .* did you mean"),
        (
            {"data": {"tasks": {"a": {"kin": "x"}}}},
            "data.tasks.a.kin is not a setting: did you mean data.tasks.NAME.kind",
        ),
        ({"data": {"tasks": {"a": {"values": ["x", "x"]}}}}, r"data.tasks.a.values names \['x'\] twice"),
        ({"data": {"tasks": {"a": {"kind": "ordinal", "class_weights": "balanced"}}}}, "class_weights is set but kind"),
        ({"data": {"stride": 300}}, "data.stride=300 is outside 1 to patch_size=256"),
        ({"data": {"tissue": 2.0}}, "data.tissue=2.0 is outside 0 to 1"),
        ({"data": {"mpp": -1.0}}, "data.mpp=-1.0 is not a pixel size"),
        ({"data": {"split": {"folds": 2}}}, "data.split.folds=2 is below 3"),
        ({"data": {"split": {"folds": 4, "fold": 4}}}, "data.split.fold=4 of 4 folds: give 0 to 3"),
        ({"data": {"split": {"stratify": "b"}}}, "data.split.stratify='b' is no task"),
        ({"select": {"keep": 0}}, "select.keep=0 is below 1"),
        ({"select": {"warm_start": 3, "attend": "all"}}, "select.warm_start=3 needs rule=exact and attend=kept"),
        ({"select": {"keep_start": 3}}, "select.keep_start=3 is below keep=64"),
        ({"select": {"by_detail": 1.0}}, "select.by_detail=1.0 is outside 0 to below 1: give a share, such as 0.5"),
        (
            {"select": {"keep_start": 64, "by_detail": 0.5}, "train": {"epochs": None, "minutes": 1.0}},
            "select.by_detail needs train.epochs, over which it falls: give epochs, or by_detail=0",
        ),
        ({"select": {"rule": "buffered", "rank": "best"}}, "the published rule 'buffered' ranks by the mean"),
        ({"train": {"epochs": None, "minutes": 1.0}}, "select.keep_start needs train.epochs"),
        ({"train": {"dice_weight": 0.5}}, "train.dice_weight has no meaning in a recognition run"),
        ({"train": {"score_target": "loss"}}, "train.score_target has no meaning in a recognition run: leave it out"),
        ({"train": {"trim": 4}}, "train.trim has no meaning in a recognition run: leave it out"),
        ({"train": {"class_weights": [1.0]}}, "data.tasks.NAME.class_weights is meant"),
        ({"task": "detection"}, "task='detection' is none of recognition"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(settings, RecognitionConfig)


def test_keep_falls_by_equal_factors() -> None:
    select = SelectConfig(keep=10, keep_start=80, anneal=0.5)
    assert [select.schedule(12).at(epoch) for epoch in (0, 2, 4, 6, 11)] == [80, 40, 20, 10, 10]
    assert math.isclose(select.start, 80)


@pytest.mark.parametrize(
    ("settings", "share"),
    [({}, 0.5), ({"rule": "buffered"}, 0.0), ({"by_detail": 0.25}, 0.25), ({"by_detail": 0.0}, 0.0)],
)
def test_half_of_what_is_kept_at_first_is_chosen_for_its_detail(settings: dict[str, Any], share: float) -> None:
    assert SelectConfig(**settings).schedule(10).by_detail == share


def test_every_setting_of_training_is_used_or_refused() -> None:
    used = {
        "epochs",
        "max_steps",
        "minutes",
        "patience",
        "eval_every",
        "eval_first",
        "batch_size",
        "accumulate",
        "clip",
    }
    used |= {"lr", "weight_decay", "betas", "layer_decay", "warmup", "schedule", "precision"}  # loop and optimiser
    used |= {"seed", "augment", "num_workers", "tracker"}
    assert {one.name for one in fields(TrainConfig)} == used | set(_UNUSED)
    assert not used & set(_UNUSED)
