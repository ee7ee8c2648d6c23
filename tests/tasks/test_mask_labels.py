"""Masks of every kind give the same labels in the frame of their image, at every level and in every box."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from foveate.errors import FormatError
from foveate.io.masks import ClassTable
from foveate.io.raster import ArrayRaster
from foveate.tasks.items import Item
from foveate.tasks.labels import IGNORE, Labels, open_labels, whole_labels
from foveate.tasks.settings import DataConfig
from foveate.tasks.source import glance

DATA = DataConfig(classes={"stroma": 1, "tumour": 2})


def item(mask: Path) -> Item:
    return Item("a", mask.with_name("a.png"), mask, "a")


def blocks(shape: tuple[int, ...] = (40, 56)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[8:24, 16:40] = 1
    mask[12:16, 20:28] = 2
    return mask


def blank(shape: tuple[int, ...] = (40, 56)) -> ArrayRaster:
    return ArrayRaster(np.zeros((3, *shape), np.uint8))


def test_values_become_classes_in_any_box_and_level() -> None:
    mask = blocks()
    source = ArrayRaster(mask[None] * 10, coarser=[mask[None, ::4, ::4] * 10])
    labels = Labels(source, mask.shape, ClassTable({"stroma": 10, "tumour": 20}), Path("mask"))
    assert (labels.shape, labels.channels, labels.dtype) == ((40, 56), 1, np.uint8)
    assert labels.levels == ((40, 56), (10, 14))
    assert labels.downsamples == ((1.0, 1.0), (4.0, 4.0))
    assert labels.tile_shape(1) == (10, 14)
    np.testing.assert_array_equal(labels.read(((0, 0), mask.shape))[0], mask)
    np.testing.assert_array_equal(labels.read(((9, 11), (21, 50)))[0], mask[9:21, 11:50])
    np.testing.assert_array_equal(labels.read(((8, 16), (24, 40)), 1)[0], mask[8:24:4, 16:40:4])


def test_a_value_of_no_class_names_the_file() -> None:
    labels = Labels(ArrayRaster(blocks()[None]), (40, 56), ClassTable({"stroma": 1}), Path("where/mask.tif"))
    assert labels.read(((0, 0), (8, 8))).max() == 0
    with pytest.raises(FormatError, match=r"where/mask\.tif: holds values of no class: 2"):
        labels.read(((0, 0), (40, 56)))


@pytest.mark.parametrize("step", [2, 4])
def test_a_mask_may_be_a_whole_fraction_of_its_image(step: int) -> None:
    full = (41, 58)
    small = blocks((-(-full[0] // step), -(-full[1] // step)))
    labels = Labels(ArrayRaster(small[None]), full, None, Path("mask"))
    wanted = small.repeat(step, 0).repeat(step, 1)[: full[0], : full[1]]
    np.testing.assert_array_equal(labels.read(((0, 0), full))[0], wanted)
    np.testing.assert_array_equal(labels.read(((7, 9), (30, 41)))[0], wanted[7:30, 9:41])
    assert labels.downsamples[1] == (step, step)
    np.testing.assert_array_equal(labels.read(((0, 0), full), 1)[0], small)


def test_a_working_frame_coarser_than_the_mask_takes_the_centre() -> None:
    mask = blocks((80, 112))
    coarse = ArrayRaster(mask[None], coarser=[mask[None, ::2, ::2], mask[None, ::8, ::8]])
    labels = Labels(coarse, (40, 56), None, Path("mask"))
    assert labels.downsamples == ((1.0, 1.0), (4.0, 4.0))
    np.testing.assert_array_equal(labels.read(((0, 0), (40, 56)))[0], mask[::2, ::2])
    odd = Labels(ArrayRaster(mask[None]), (53, 75), None, Path("mask"))
    rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in ((53, 80), (75, 112)))
    np.testing.assert_array_equal(odd.read(((0, 0), (53, 75)))[0], mask[rows][:, columns])


def test_what_the_image_could_not_decode_is_not_learned() -> None:
    image = blank()
    labels = Labels(ArrayRaster(blocks()[None]), (40, 56), None, Path("mask"), image)
    assert (labels.read(((0, 0), (40, 56))) < IGNORE).all()
    image.broken = [((10, 20), (20, 30))]  # type: ignore[attr-defined]
    seen = labels.read(((5, 5), (40, 56)))[0]
    assert (seen[5:15, 15:25] == IGNORE).all()
    assert np.count_nonzero(seen == IGNORE) == 100


def test_files_of_every_kind_agree(tmp_path: Path) -> None:
    mask = blocks()
    tifffile.imwrite(tmp_path / "plain.tif", mask)
    np.save(tmp_path / "mask.npy", mask)
    pyramid = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(pyramid) as file:
        file.write(mask, tile=(16, 16), subifds=1)
        file.write(mask[::2, ::2], tile=(16, 16), subfiletype=1)
    annotations = tmp_path / "mask.geojson"
    annotations.write_text(json.dumps(polygons()))
    for path in (tmp_path / "plain.tif", tmp_path / "mask.npy", pyramid, annotations):
        labels = open_labels(item(path), DATA, mask.shape, blank())
        np.testing.assert_array_equal(labels.read(((0, 0), mask.shape))[0], mask)
        np.testing.assert_array_equal(whole_labels(item(path), DATA, blank(), blank()), mask)


@pytest.mark.parametrize("kind", ["palette", "zarr"])
def test_labels_are_read_as_stored_and_never_blended(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.io.raster.READ_WHOLE", 1000)  # by tile
    mask = np.random.default_rng(0).choice(np.array([0, 10, 200], np.uint8), (80, 112))
    path = tmp_path / "mask"
    if kind == "zarr":
        zarr.create_array(path, data=mask, chunks=(16, 16), dimension_names=["y", "x"])
    else:
        colours = np.arange(768).reshape(3, 256).astype(np.uint16) * 80
        tifffile.imwrite(path, mask, photometric="palette", colormap=colours, tile=(16, 16))
    data = replace(DATA, classes={"stroma": 10, "tumour": 200})  # a mean of them would be an error
    truth = np.searchsorted([0, 10, 200], mask)
    labels = open_labels(item(path), data, mask.shape, blank(mask.shape))
    np.testing.assert_array_equal(labels.read(((0, 0), mask.shape))[0], truth)
    seen = open_labels(item(path), data, mask.shape, blank((37, 51))).read(((0, 0), (37, 51)))[0]
    rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in ((37, 80), (51, 112)))
    np.testing.assert_array_equal(seen, truth[rows][:, columns])
    assert set(glance(labels, 300, nearest=True).ravel().tolist()) == {0, 1, 2}


def polygons() -> dict[str, Any]:
    def feature(name: str, top: int, left: int, bottom: int, right: int) -> dict[str, Any]:
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name}},
        }

    return {
        "type": "FeatureCollection",
        "features": [feature("stroma", 8, 16, 24, 40), feature("Tumour", 12, 20, 16, 28)],
    }


def test_annotations_go_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(polygons()))
    data = replace(DATA, classes={"cancer": "Tumour"}, unknown="ignore")
    labels = whole_labels(item(path), data, blank(), blank())
    assert np.bincount(labels.ravel())[[1, IGNORE]].tolist() == [32, 16 * 24 - 32]
    with pytest.raises(FormatError, match="stroma"):
        whole_labels(item(path), replace(data, unknown="error"), blank(), blank())


def test_another_size_is_an_error_with_both(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "mask.tif", blocks((40, 50)))
    with pytest.raises(
        FormatError, match=r"mask's size differs from its image's, 40 x 50 against 40 x 56; give a mask"
    ):
        open_labels(item(tmp_path / "mask.tif"), DATA, (40, 56), blank())
    with pytest.raises(FormatError, match=r"mask's size differs from its image's, 40 x 50 against 40 x 56; pair"):
        whole_labels(item(tmp_path / "mask.tif"), DATA, blank(), blank())
