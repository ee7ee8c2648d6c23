"""Which files belong together, what may be read at all, and that splits never share a group."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import ConfigError, FormatError
from foveate.tasks.config import DataConfig, SplitConfig
from foveate.tasks.items import Item, find_items, group_of, split_items


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k in range(6):
        touch(tmp_path, f"images/p{k // 2}_{k}.jpg", f"masks/p{k // 2}_{k}.png")
    touch(tmp_path, "images/.hidden.jpg")
    return tmp_path


def test_masks_by_stem(root: Path) -> None:
    items = find_items(DataConfig(root=str(root)))
    assert [item.name for item in items] == [f"images/p{k // 2}_{k}" for k in range(6)]
    assert all(item.mask is not None and item.mask.stem == item.image.stem for item in items)


def test_masks_by_rule_and_none(root: Path) -> None:
    touch(root, *(f"lab/p{k // 2}_{k}_seg.png" for k in range(6)))
    items = find_items(DataConfig(root=str(root), masks="lab/{stem}_seg.png"))
    assert items[0].mask == root / "lab/p0_0_seg.png"
    assert find_items(DataConfig(root=str(root), masks=None))[0].mask is None


def test_stem_is_taken_literally(tmp_path: Path) -> None:
    touch(tmp_path, "images/a[1].png", "masks/a[1].png", "masks/a1.png")
    assert find_items(DataConfig(root=str(tmp_path)))[0].mask == tmp_path / "masks/a[1].png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "nowhere"}, "is not a folder"),
        ({"images": "none/*"}, "matches no file below"),
        ({"images": "../*"}, "leaves data.root"),
        ({"masks": "/etc/{stem}"}, "leaves data.root"),
        ({"masks": "nowhere/{stem}.png"}, "has no mask by data.masks"),
        ({"masks": "masks/*.png"}, "has 6 masks by data.masks"),
    ],
)
def test_rules_that_do_not_work(root: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_items(replace(DataConfig(root=str(root)), **change))


def test_manifests(root: Path) -> None:
    rows = [
        {"image": f"images/p{k // 2}_{k}.jpg", "mask": f"masks/p{k // 2}_{k}.png", "group": f"g{k // 2}"}
        for k in range(6)
    ]
    (root / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    csv = "image,mask,group\n" + "\n".join(",".join(row.values()) for row in rows)
    (root / "m.csv").write_text(csv)
    found = [find_items(DataConfig(root=str(root), manifest=name)) for name in ("m.jsonl", "m.csv")]
    assert found[0] == found[1]
    assert [item.group for item in found[0]] == ["g0", "g0", "g1", "g1", "g2", "g2"]


def test_manifest_with_stems_and_splits(root: Path) -> None:
    names = ["train", "train", "val", "val", "test", "test"]
    (root / "m.csv").write_text("id,split\n" + "\n".join(f"p{k // 2}_{k},{names[k]}" for k in range(6)))
    data = DataConfig(root=str(root), manifest="m.csv")
    splits = split_items(find_items(data), data)
    assert {name: len(items) for name, items in splits.items()} == {"train": 2, "val": 2, "test": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../secret.png"}, "steps out with"),
        ({"image": "/etc/hostname"}, "is outside"),
        ({"image": "images/link.jpg"}, "is outside"),
        ({"image": "images/a\0b.jpg"}, "NUL character"),
        ({"image": "images/none.jpg"}, "is not a file below"),
        ({"image": ""}, "has no image"),
        ({"image": "images/p0_0.jpg", "split": "dev"}, "write train, val or test"),
        ({"picture": "images/p0_0.jpg"}, "neither 'image' nor 'id'"),
        ([1], "does not fit its columns"),
    ],
)
def test_manifest_stays_below_the_root(
    root: Path, row: object, message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.jpg"
    outside.write_bytes(b"")
    (root / "images/link.jpg").symlink_to(outside)
    (root / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(FormatError, match=message):
        find_items(DataConfig(root=str(root), manifest="m.jsonl"))


def test_absolute_path_below_the_root_is_allowed(root: Path) -> None:
    (root / "m.jsonl").write_text(json.dumps({"image": str(root / "images/p0_0.jpg")}))
    assert find_items(DataConfig(root=str(root), manifest="m.jsonl"))[0].image == root / "images/p0_0.jpg"


@pytest.mark.parametrize("content", ["", "{", "image\n"])
def test_manifest_without_rows(root: Path, content: str) -> None:
    (root / "m.jsonl").write_text(content)
    with pytest.raises(FormatError):
        find_items(DataConfig(root=str(root), manifest="m.jsonl"))


def test_images_named_twice(root: Path) -> None:
    (root / "m.csv").write_text("image\nimages/p0_0.jpg\nimages/p0_0.jpg\n")
    with pytest.raises(ConfigError, match="is named twice"):
        find_items(DataConfig(root=str(root), manifest="m.csv"))


def test_groups(root: Path) -> None:
    split = SplitConfig(by="group", group_regex=r"^(p\d)_")
    assert group_of("p1_3", split) == "p1"
    with pytest.raises(ConfigError, match="finds nothing in 'other'"):
        group_of("other", split)


def make_items(groups: list[str]) -> list[Item]:
    return [Item(f"{group}-{k}", Path(f"{k}.png"), None, group) for k, group in enumerate(groups)]


@given(
    groups=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40),
    shares=st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.5, 0.0), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0), (0.1, 0.1, 0.8)]),
    seed=st.integers(0, 5),
)
def test_val_is_not_test(groups: list[str], shares: tuple[float, float, float], seed: int) -> None:
    data = DataConfig(split=SplitConfig(train=shares[0], val=shares[1], test=shares[2], seed=seed))
    splits = split_items(make_items(groups), data)
    sides = [{item.group for item in splits[name]} for name in ("train", "val", "test")]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(len(items) for items in splits.values()) == len(groups)
    assert splits["train"]
    for share, side in zip(shares[1:], sides[1:], strict=True):
        assert share > 0 or not side
        assert share == 0 or len(set(groups)) < 3 or side


def test_split_is_deterministic_and_ignores_the_order_of_files() -> None:
    items = make_items(list("abcdefghijklmnop"))
    data = DataConfig()
    one = split_items(items, data)
    two = split_items(items[::-1], data)
    assert {name: set(found) for name, found in one.items()} == {name: set(found) for name, found in two.items()}
    other = split_items(items, DataConfig(split=SplitConfig(seed=1)))
    assert other["train"] != one["train"]


def test_a_group_in_two_splits_is_refused() -> None:
    items = [Item("a", Path("a"), None, "g", "train"), Item("b", Path("b"), None, "g", "val")]
    with pytest.raises(ConfigError, match="group 'g' is in the splits 'train' and 'val'"):
        split_items(items, DataConfig())


def test_no_training_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 of 1 images are for training"):
        split_items([Item("a", Path("a"), None, "g", "val")], DataConfig())


def test_endings_of_two_parts_are_one(tmp_path: Path) -> None:
    touch(
        tmp_path, "images/a.nii.gz", "images/b.ome.tif", "images/c.d.png", "masks/a.png", "masks/b.png", "masks/c.d.png"
    )
    items = find_items(DataConfig(root=str(tmp_path), masks="masks/{stem}.png"))
    assert [(item.name, item.group) for item in items] == [("images/a", "a"), ("images/b", "b"), ("images/c.d", "c.d")]


def test_folders_that_are_images(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr/zarr.json").touch()
    for name in ("1.2.7", "1.2.8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "slice").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/text.txt").touch()
    (tmp_path / "empty").mkdir()
    items = find_items(DataConfig(root=str(tmp_path), images="*", masks=None))
    assert [item.name for item in items] == ["1.2.7", "1.2.8", "a"]


def test_the_manifest_says_how_large_pixels_are(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.tif").touch()
    path = tmp_path / "all.csv"
    path.write_text("image,mpp,spacing\na.tif,0.25,\nb.tif,,2.5 0.7 0.7\nc.tif,,\n")
    data = DataConfig(root=str(tmp_path), manifest="all.csv", masks=None)
    assert [(item.mpp, item.spacing) for item in find_items(data)] == [
        (0.25, None),
        (None, (2.5, 0.7, 0.7)),
        (None, None),
    ]
    (tmp_path / "all.jsonl").write_text('{"image": "a.tif", "mpp": 0.5, "spacing": [1, 1]}\n')
    (item,) = find_items(replace(data, manifest="all.jsonl"))
    assert (item.mpp, item.spacing) == (0.5, (1.0, 1.0))
    path.write_text("image,mpp\na.tif,fine\n")
    with pytest.raises(FormatError, match=r"row 1 has mpp='fine': write sizes above 0"):
        find_items(data)
    path.write_text("image,mpp\na.tif,0.2 0.3\n")
    with pytest.raises(FormatError, match=r"row 1 has mpp='0\.2 0\.3': write one size in um, such as 0\.25"):
        find_items(data)
