from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_run import tiny_config, write_disc, write_discs

from foveate.errors import ConfigError, FormatError
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.paint import unpatchify
from foveate.tasks.data import SegmentationData
from foveate.tasks.inputs import find_inputs
from foveate.tasks.items import Item
from foveate.tasks.metrics import tiles
from foveate.tasks.outputs import name_of, refuse_kinds
from foveate.tasks.painting import Painting
from foveate.tasks.predict import load_model, predict, segment
from foveate.tasks.segmentation import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    write_discs(root / "data")
    fit(tiny_config(root / "data", root / "run", train={"epochs": 1}))
    return root / "run"


def test_masks_have_their_images_size_and_are_those_of_segment(run: Path, tmp_path: Path) -> None:
    write_disc(tmp_path, "odd", 3, (51, 77))
    source = tmp_path / "images" / "odd.png"
    written = predict(run, source, tmp_path / "out")
    assert written == [tmp_path / "out/odd.png"]
    mask = np.asarray(Image.open(written[0]))
    assert mask.shape == (51, 77)
    model, config = load_model(run)
    image, _ = SegmentationData([Item("odd", source, None, "odd")], config, 8, train=False).load(0)
    assert (mask == segment(model, image, config).labels.numpy()).all()


def test_probability_agrees_with_the_mask(run: Path, tmp_path: Path) -> None:
    write_disc(tmp_path, "a", 3, (60, 40))
    mask_path, chance_path = predict(run, tmp_path / "images", tmp_path / "out", probability=True, format="tif")
    mask, chance = tifffile.imread(mask_path), tifffile.imread(chance_path)
    assert chance.shape == (2, 60, 40)
    assert np.allclose(chance.sum(0, dtype=np.float32), 1, atol=2e-3)
    clear = abs(chance[0].astype(np.float32) - 0.5) > 1e-3
    assert (chance.argmax(0) == mask)[clear].all()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.tif", "a_probability.tif"]


def test_overlay_is_written_beside_the_mask(run: Path, tmp_path: Path) -> None:
    write_disc(tmp_path, "a", 3, (60, 40))
    mask, overlay = predict(run, tmp_path / "images", tmp_path / "out", overlay=True)
    assert (mask.name, overlay.name) == ("a.png", "a_overlay.png")
    with Image.open(overlay) as picture:
        assert picture.mode == "RGB"
        assert picture.width * 60 == pytest.approx(picture.height * 40, rel=0.02)


def test_a_bad_file_is_reported_and_the_batch_goes_on(run: Path, tmp_path: Path) -> None:
    write_discs(tmp_path, 2)
    (tmp_path / "images" / "01a.png").write_bytes(b"")
    (tmp_path / "images" / "01b.png").write_bytes((tmp_path / "images" / "00.png").read_bytes()[:300])
    lines: list[str] = []
    with pytest.raises(FormatError, match=r"2 of 4 images have no mask \(first: .*01a\.png.*2 masks are in"):
        predict(run, tmp_path / "images", tmp_path / "out", warn=lines.append)
    assert len(lines) == 2
    assert all("\n" not in line and line.startswith("foveate: skipped ") for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00.png", "01.png"]


def test_nothing_is_overwritten_by_accident(run: Path, tmp_path: Path) -> None:
    write_discs(tmp_path, 1)
    predict(run, tmp_path / "images", tmp_path / "out")
    with pytest.raises(ConfigError, match="exists; add --overwrite"):
        predict(run, tmp_path / "images", tmp_path / "out")
    predict(run, tmp_path / "images", tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="overwritten by its own mask"):
        predict(run, tmp_path / "images", tmp_path / "images", format="png", overwrite=True)
    with pytest.raises(FormatError, match="overwritten by its own mask"):
        predict(run, tmp_path / "images", tmp_path / "images", overwrite=True)
    with pytest.raises(ConfigError, match="would both be written"):
        predict(run, [tmp_path / "images" / "00.png", tmp_path / "masks" / "00.png"], tmp_path / "new")
    with pytest.raises(FormatError, match="holds no trained model"):
        predict(tmp_path, tmp_path / "images", tmp_path / "new")


def test_inputs_are_files_folders_globs_and_manifests(tmp_path: Path) -> None:
    write_discs(tmp_path, 3)
    (tmp_path / "list.csv").write_text("image\nimages/02.png\nimages/00.png\n")
    names = [item.image.name for item in find_inputs([tmp_path / "images"])]
    assert names == ["00.png", "01.png", "02.png"]
    assert len(find_inputs([tmp_path / "images" / "0[12].png"])) == 2
    assert [item.image.name for item in find_inputs([tmp_path / "list.csv"])] == ["00.png", "02.png"]
    assert len(find_inputs([tmp_path / "images", tmp_path / "images" / "00.png"])) == 3
    assert [item.mpp for item in find_inputs([_manifest(tmp_path)])] == [0.5]
    store = tmp_path / "images" / "volume.zarr"
    store.mkdir()
    (store / "zarr.json").write_text("{}")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    assert [item.image.name for item in find_inputs([tmp_path / "images"])][-1] == "volume.zarr"
    assert [item.image for item in find_inputs([store])] == [store]
    with pytest.raises(ConfigError, match="names no image"):
        find_inputs([tmp_path / "nothing*"])


def _manifest(folder: Path) -> Path:
    (folder / "sizes.csv").write_text("image,mpp\nimages/01.png,0.5\n")
    return folder / "sizes.csv"


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.nii.gz", "a"), ("a.ome.tif", "a"), ("a.b.svs", "a.b"), ("1.2.840/", "1.2.840"), ("v.zarr/", "v")],
)
def test_outputs_are_named_after_their_input(name: str, stem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert name_of(path) == stem


@pytest.mark.parametrize("shape", [(150, 97), (40, 31, 22)])
def test_tiles_of_a_shrunk_image_join_to_torchs_interpolation(shape: tuple[int, ...]) -> None:
    small = tuple(side // 2 + 3 for side in shape)
    leaves = uniform_leaves(small, 8)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(leaves), 3, *[4] * len(shape), generator=generator)
    whole = unpatchify(values, leaves, mode="smooth")
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    expected = torch.nn.functional.interpolate(whole[None], size=shape, mode=mode)[0]
    painting = Painting(values, leaves, shape)
    chance, labels = np.zeros((3, *shape), np.float32), np.zeros(shape, np.uint8)
    for box in tiles(shape, 16):
        area = tuple(slice(*ends) for ends in zip(*box, strict=True))
        chance[(slice(None), *area)], labels[area] = painting.probability(box), painting.tile(box)
    assert np.allclose(chance, expected.softmax(0).numpy(), atol=1e-5)
    assert (labels == expected.argmax(0).numpy()).mean() > 0.999
    assert (labels == painting.labels.numpy()).all()


def test_max_side_is_undone(tmp_path: Path) -> None:
    data = write_discs(tmp_path / "data", 4)
    settings = {"root": str(data), "classes": {"disc": ">=128"}, "max_side": 32}
    fit(tiny_config(data, tmp_path / "run", data=settings, train={"epochs": 1}))
    (mask,) = predict(tmp_path / "run", data / "images" / "00.png", tmp_path / "out")
    assert np.asarray(Image.open(mask)).shape == (64, 64)


def test_what_cannot_work_is_refused_at_the_door(run: Path, tmp_path: Path) -> None:
    write_discs(tmp_path, 2)
    images, out = tmp_path / "images", tmp_path / "out"
    with pytest.raises(ConfigError, match=r"^mpp=1000\.0; give um per pixel, 0\.01 to 100$"):
        predict(run, images, out, mpp=1000.0)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"--out .*out is a file, and masks go into a folder; give another --out"):
        predict(run, images, out)
    with pytest.raises(FormatError, match=r"out.deeper: cannot be written"):
        predict(run, images, out / "deeper")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["00.ome.tif", "00.png"])
def test_no_folder_is_replaced_by_a_mask(name: str, run: Path, tmp_path: Path) -> None:
    write_discs(tmp_path, 1)
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "mine").touch()
    with pytest.raises(ConfigError, match=rf"{name} is a folder and is not replaced; move it, or give another --out"):
        predict(run, tmp_path / "images", tmp_path / "out", format=name[3:], overwrite=True)
    if name == "00.png":  # the format that nobody asked for
        with pytest.raises(FormatError, match="is a folder and is not replaced"):
            predict(run, tmp_path / "images", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / name / "mine").exists()


def test_only_zarr_is_replaced_by_zarr(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ConfigError, match=r"a\.zarr is no zarr folder and is not replaced"):
        refuse_kinds([tmp_path / "a.zarr"])
    (tmp_path / "a.zarr/zarr.json").touch()
    refuse_kinds([tmp_path / "a.zarr", tmp_path / "a.png"])


def test_budgets_that_make_no_sense_are_refused(run: Path, tmp_path: Path) -> None:
    write_discs(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"max_leaves=0 is below 1: give at least 1 leaf"):
        predict(run, tmp_path / "images", tmp_path / "out", max_leaves=0)
    fit(tiny_config(run.parent / "data", tmp_path / "grid", tree={"uniform": 16}, train={"epochs": 1}))
    with pytest.raises(
        ConfigError, match=r"max_leaves=9 for a model of uniform leaves \(tree\.uniform=16\); leave it out"
    ):
        predict(tmp_path / "grid", tmp_path / "images", tmp_path / "out", max_leaves=9)
