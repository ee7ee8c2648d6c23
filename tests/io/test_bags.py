"""Bags of features: what is written is read, a row costs a row, and what does not belong in a bag is refused."""

import os
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from foveate.errors import FormatError, MissingExtraError, ShapeError
from foveate.geometry.patch_source import PatchSource
from foveate.io.bags import FeatureBag, write_bag
from foveate.io.bags_h5 import export_h5, import_h5
from foveate.io.tile_cache import DiskFile, forget


def boxes_of(num, side=16):
    start = torch.arange(num)[:, None] * torch.tensor([side, side // 2])
    return torch.stack([start, start + side], dim=1)


def features(num=40, width=7):
    return torch.randn(num, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    about = {"image": Path("a.svs"), "mpp": 0.5}
    return write_bag(tmp_path / "a.safetensors", features(), boxes_of(40), (656, 400), {**about, "image": "a.svs"})


@pytest.mark.parametrize("half", [True, False])
def test_what_is_written_is_read(tmp_path: Path, half: bool) -> None:
    path = write_bag(tmp_path / "a", features(), boxes_of(40), (656, 400), {"image": "a.svs", "mpp": 0.5}, half=half)
    found = FeatureBag(path, width=7)
    assert isinstance(found, PatchSource)
    assert (len(found), found.width, found.shape) == (40, 7, (656, 400))
    assert found.provenance == {"image": "a.svs", "mpp": 0.5}
    assert torch.equal(found.boxes, boxes_of(40))
    wanted = features().half() if half else features()
    for index in (torch.arange(40), torch.tensor([39, 0, 0, 5]), torch.arange(3, 9), torch.arange(0)):
        assert torch.equal(found.read(index), wanted[index])
    assert torch.equal(pickle.loads(pickle.dumps(found)).read(torch.arange(40)), wanted)
    assert np.array_equal(load_file(path)["features"], wanted.numpy())  # by any other reader


@pytest.mark.parametrize("num", [0, 1])
def test_a_bag_may_hold_one_patch_or_none(tmp_path: Path, num: int) -> None:
    found = FeatureBag(write_bag(tmp_path / "a", features(num), boxes_of(num), (16, 16)), width=7)
    assert found.read(torch.arange(num)).shape == (num, 7)
    assert found.boxes.shape == (num, 2, 2)
    assert FeatureBag(write_bag(tmp_path / "b", features(num))).boxes is None


def test_parts_are_written_as_they_come(tmp_path: Path, bag: Path) -> None:
    path = write_bag(
        tmp_path / "b", iter(features().split(9)), boxes_of(40), (656, 400), {"image": "a.svs", "mpp": 0.5}
    )
    assert path.read_bytes() == bag.read_bytes()
    empty = FeatureBag(write_bag(tmp_path / "c", iter(()), boxes_of(0), (16, 16)))
    assert (len(empty), empty.width) == (0, 0)


def test_a_row_costs_a_row(bag: Path, monkeypatch) -> None:
    found, read = FeatureBag(bag), []
    plain = DiskFile.read_into
    monkeypatch.setattr(
        DiskFile, "read_into", lambda self, place, out: read.append(len(out)) or plain(self, place, out)
    )
    assert torch.equal(found.read(torch.tensor([3, 4, 5, 39, 0])), features().half()[[3, 4, 5, 39, 0]])
    assert read == [3 * 14, 14, 14]


def test_a_bag_that_loses_rows_while_it_is_open_says_so(bag: Path) -> None:
    found = FeatureBag(bag)
    found.read(torch.tensor([39]))
    os.truncate(bag, bag.stat().st_size - 16)
    with pytest.raises(FormatError, match=r"a.safetensors: damaged foveate features \(it ends before its last row\)"):
        found.read(torch.tensor([39]))


def test_a_bag_that_was_written_anew_is_opened_anew(bag: Path) -> None:
    found = FeatureBag(bag)
    write_bag(bag, features(50), overwrite=True)
    forget((str(bag), found._file._stamp))
    with pytest.raises(FormatError, match=r"a.safetensors: has changed since it was opened; open it again"):
        found.read(torch.tensor([3]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": iter([features(4)])}, ShapeError, "parts of features without boxes do not say how many rows"),
        (
            {"features": iter([features()]), "boxes": boxes_of(39)},
            ShapeError,
            "more than 39 rows of features for 39 boxes; give each patch one row",
        ),
        (
            {"features": iter([features()]), "boxes": boxes_of(41)},
            ShapeError,
            "40 rows of features for 41 boxes; give each patch one row",
        ),
        ({"boxes": boxes_of(40), "shape": (9, 9)}, ShapeError, r"box 0 is \[\[0, 0\], \[16, 16\]\]; give 0 <= start"),
        (
            {"features": iter([features(4), features(4, 3)]), "boxes": boxes_of(8)},
            ShapeError,
            r"features of \(4, 3\) in a bag of width 7; give \[R, 7\]",
        ),
        (
            {"features": features().masked_fill(torch.eye(40, 7) > 0, float("nan"))},
            FormatError,
            r"7 features are NaN or infinite as float16, first of patch 0; check the encoder and its input$",
        ),
        (
            {"features": features() * 1e5},
            FormatError,
            r"as float16, first of patch 0; check the encoder and its input, or store float32 \(half=False\)",
        ),
    ],
)
def test_what_is_no_bag_is_never_written(tmp_path: Path, change, error, message) -> None:
    with pytest.raises(error, match=message):
        write_bag(tmp_path / "a", **{"features": features(), **change})
    assert not list(tmp_path.iterdir())


def damage(path: Path, kind: str) -> None:
    tensors = load_file(path)
    about = {"kind": "foveate features", "shape": "[656, 400]", "provenance": "{}"}
    if kind == "short":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "other":
        save_file({"weight": np.zeros(3, np.float32)}, path)
    elif kind == "whole numbers":
        save_file(tensors | {"features": np.zeros((40, 7), np.int32)}, path, about)
    elif kind == "boxes":
        save_file(tensors | {"boxes": tensors["boxes"][:3]}, path, about)
    elif kind == "provenance":
        save_file(tensors, path, about | {"provenance": "[1]"})
    elif kind == "outside":
        save_file(tensors, path, about | {"shape": "[6, 4]"})
    elif kind == "missing":
        path.unlink()
    else:
        save_file({"features": tensors["features"]}, path, {"kind": "foveate sparse image"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"damaged foveate features .(features|boxes) of \(.*\) is cut short.; write it with foveate embed"),
        ("other", "is a safetensors file of kind None, not a foveate features; write it with foveate embed, or import"),
        ("sparse", "is a safetensors file of kind 'foveate sparse image', not"),
        ("whole numbers", r"features is int32 \(40, 7\)"),
        ("boxes", "3 boxes for 40 patches"),
        ("provenance", "damaged foveate features"),
        ("outside", r"box 0 is \[\[0, 0\], \[16, 16\]\]; give 0 <= start < stop inside the image of \(6, 4\)"),
        ("missing", "cannot be read .No such file or directory.; check the path"),
    ],
)
def test_a_damaged_bag_is_refused(bag: Path, kind: str, message: str) -> None:
    damage(bag, kind)
    with pytest.raises(FormatError, match=message):
        _ = FeatureBag(bag).boxes


def test_features_of_another_width_are_refused(bag: Path) -> None:
    with pytest.raises(FormatError, match="holds features of width 7, the model takes 512; embed it the same way"):
        FeatureBag(bag, width=512)


def test_a_bag_is_not_replaced_unasked(bag: Path) -> None:
    with pytest.raises(FormatError, match="exists already"):
        write_bag(bag, features())
    write_bag(bag, features(3), overwrite=True)
    assert len(FeatureBag(bag)) == 3


def write_h5(path: Path, values=None, corner=None, of_features=None, **attributes) -> Path:
    """As both write it: attributes of the places and, by TRIDENT alone, of the features; none of the file."""
    with h5py.File(path, "w") as file:
        if values is not None:
            file["features"] = values
            file["features"].attrs.update(of_features or {})
        if corner is not None:
            file["coords"] = corner
            file["coords"].attrs.update(attributes)
    return path


CORNER = np.array([[10, 20], [300, 40]])  # (x, y)
BOXES = [[[20, 10], [532, 522]], [[40, 300], [552, 812]]]
TRIDENT = {  # what it writes with every feature file
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "slide",
    "savetodir": "a/b",
    "level0_width": 2000,
    "level0_height": 1000,
}
CLAM = {  # what it writes with the patches, and not with the features
    "patch_size": 256,
    "patch_level": 1,
    "downsample": (2.0, 2.0),
    "downsampled_level_dim": np.array([1000, 500]),
    "level_dim": (1000, 500),
    "name": "slide",
    "save_path": "a/b",
}


def test_a_bag_of_trident_is_read(tmp_path: Path) -> None:
    about = {"name": "slide", "savetodir": "a/b", "encoder": "uni_v1"}
    corner = CORNER.astype(np.int64)
    path = write_h5(tmp_path / "a.h5", features(2).numpy().astype("f2"), corner, about, **TRIDENT)
    found = FeatureBag(import_h5(path, tmp_path / "a.safetensors"))
    assert torch.equal(found.read(torch.arange(2)), features(2).half())
    assert found.boxes.tolist() == BOXES
    assert found.shape == (1000, 2000)
    assert (found.provenance["source"], found.provenance["encoder"]) == ("slide", "uni_v1")
    assert found.provenance["h5"]["level0_magnification"] == 40


def test_patches_over_the_border_end_with_the_image(tmp_path: Path) -> None:
    """The grids of both begin inside the image and may end outside."""
    path = write_h5(tmp_path / "a.h5", features(2).numpy(), CORNER, **TRIDENT | {"level0_width": 700})
    found = FeatureBag(import_h5(path, tmp_path / "a.safetensors"))
    assert found.shape == (1000, 700)
    assert found.boxes.tolist() == [BOXES[0], [[40, 300], [552, 700]]]
    write_h5(tmp_path / "a.h5", features(2).numpy(), CORNER, **TRIDENT | {"level0_width": 300})
    with pytest.raises(
        FormatError, match=r"patch 1 begins at y, x = \[40, 300\], outside the image of 1000 x 300 pixels"
    ):
        import_h5(path, tmp_path / "b")


def test_a_bag_of_clam_is_read_with_its_patches(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", features(2).numpy(), CORNER.astype("i4"))
    with pytest.raises(
        FormatError, match=r"a.h5: does not say how large a patch is at level 0; pass patches \(CLAM's pa"
    ):
        import_h5(path, tmp_path / "a.safetensors")
    patches = write_h5(tmp_path / "patches.h5", corner=CORNER, **CLAM)
    found = FeatureBag(import_h5(path, tmp_path / "a.safetensors", patches=patches))
    assert (found.boxes.tolist(), found.shape, found.provenance["source"]) == (BOXES, (1000, 2000), "slide")
    plain = FeatureBag(import_h5(path, tmp_path / "b.safetensors", patch_size=512))
    assert (plain.boxes.tolist(), plain.shape, plain.provenance["source"]) == (BOXES, None, "a")


@pytest.mark.parametrize(
    "attributes",
    [
        {"patch_size": 512, "patch_level": 0},
        {"patch_size": 256, "patch_level": 0, "custom_downsample": 2},  # of the tools before TRIDENT
        {"patch_size": 512, "patch_level": 0, "downsample": (1.0, 1.0), "level_dim": (2000, 1000)},
    ],
)
def test_the_side_of_a_patch_follows_from_its_level(tmp_path: Path, attributes) -> None:
    path = write_h5(tmp_path / "a.h5", features(2).numpy()[None], CORNER[None].astype("f8"), **attributes)
    found = FeatureBag(import_h5(path, tmp_path / "a.safetensors", half=False))
    assert torch.equal(found.read(torch.arange(2)), features(2))
    assert found.boxes.tolist() == BOXES
    assert found.shape == ((1000, 2000) if "level_dim" in attributes else None)


def test_a_bag_goes_out_and_comes_back(tmp_path: Path, bag: Path) -> None:
    path = export_h5(bag, tmp_path / "a.h5")
    with h5py.File(path) as file:
        assert file["coords"][3].tolist() == [24, 48]
        assert (file["features"].dtype, file["coords"].attrs["patch_size_level0"]) == (np.float32, 16)
    back = FeatureBag(import_h5(path, tmp_path / "b"))
    assert torch.equal(back.read(torch.arange(40)), features().half())
    assert torch.equal(back.boxes, boxes_of(40))
    assert back.shape == (656, 400)
    write_bag(tmp_path / "plain", features())
    with pytest.raises(
        FormatError, match="holds no boxes of a plane, which the h5 of CLAM needs; embed it from a slide"
    ):
        export_h5(tmp_path / "plain", tmp_path / "c.h5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": np.zeros((2, 3), "f4")}, "a.h5: holds no 'coords'; give a feature file of CLAM or TRIDENT, which"),
        ({"corner": CORNER}, "a.h5: holds no 'features'; give a feature file"),
        ({"values": np.zeros((3, 3), "f4"), "corner": CORNER}, r"holds features float32 \(3, 3\) and coords \(2, 2\)"),
        (
            {"values": np.zeros((2, 3), "f4"), "corner": CORNER},
            "does not say how large a patch is at level 0; pass patch",
        ),
        ({"values": np.zeros(0, "f4"), "corner": CORNER[:0]}, "a.h5: is a bag of 0 patches, of which nothing can be"),
        (
            {"values": np.zeros(768, "f4"), "corner": CORNER},
            r"holds features float32 \(768,\) and coords \(2, 2\); give",
        ),
        (
            {"values": np.full((2, 3), np.nan, "f4"), "corner": CORNER, "patch_size_level0": 9},
            "6 features are NaN or infinite as float16, first of patch 0",
        ),
    ],
)
def test_bags_of_others_that_lack_something_are_refused(tmp_path: Path, arguments, message) -> None:
    with pytest.raises(FormatError, match=message):
        import_h5(write_h5(tmp_path / "a.h5", **arguments), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_h5_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"a.h5: truncated or corrupt H5 \(.*\); fetch or export the file again"):
        import_h5(tmp_path / "a.h5", tmp_path / "out")
    with pytest.raises(FormatError, match=r"b.h5: cannot be read .no such file.; check the path"):
        import_h5(tmp_path / "b.h5", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        MissingExtraError, match=r"the h5 files of CLAM and TRIDENT need h5py; pip install 'foveate\[h5\]'"
    ):
        import_h5(tmp_path / "a.h5", tmp_path / "out")
