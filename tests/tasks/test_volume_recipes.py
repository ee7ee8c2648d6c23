"""The recipes for BTCV and BraTS on generated volumes of the same layout: trained a step, predicted, read back."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from foveate.errors import ConfigError, FormatError
from foveate.io.channels import open_channels
from foveate.tasks.config import FitConfig, config_to_dict, load_config
from foveate.tasks.data import SegmentationData
from foveate.tasks.evaluate import evaluate
from foveate.tasks.files import siblings
from foveate.tasks.infer import working_frame
from foveate.tasks.items import find_items, split_items
from foveate.tasks.losses import leaf_loss
from foveate.tasks.metrics import PixelMetrics
from foveate.tasks.predict import predict
from foveate.tasks.segmentation import fit

EXAMPLES = Path(__file__).parents[2] / "examples"
OBLIQUE = np.array([[-0.9, 0.12, 0, 90], [0.1, 0.9, 0.2, -40], [0, -0.1, 3.0, 12], [0, 0, 0, 1]])
SEQUENCES = ("flair", "t1", "t1ce", "t2")
TINY = [
    "model.name=scd_vit_tiny_3d",
    *(f"model.overrides.{value}" for value in ("width=32", "depth=3", "num_heads=2", "decoder_width=4")),
    "model.overrides.prune_after=[0, 1]",
    *("train.epochs=1", "train.max_steps=1", "train.precision=fp32", "train.batch_size=1"),
]


def _save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


@pytest.fixture(scope="module")
def btcv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("btcv")
    cases = []
    for k in range(3):
        draw = np.random.default_rng(k)
        organs = np.zeros((30, 26, 11), np.uint8)
        for organ in range(1, 14):
            organs[2 * organ : 2 * organ + 2, 4:20, 2:8] = organ
        scan = (
            draw.normal(0, 30, organs.shape) + 60.0 * (organs > 0) - 900.0 * (draw.random(organs.shape) < 0.2)
        ).astype(np.int16)
        names = {"image": f"imagesTr/img000{k}.nii.gz", "label": f"labelsTr/label000{k}.nii.gz"}
        affine = OBLIQUE if k else np.diag([0.9, 0.9, 3.0, 1.0])
        for kind, array in (("image", scan), ("label", organs)):
            _save(root / names[kind], array, affine)
        cases.append(names)
    (root / "dataset_0.json").write_text(json.dumps({"name": "BTCV", "training": cases[:2], "validation": cases[2:]}))
    return root


@pytest.fixture(scope="module")
def brats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("brats")
    for k in range(3):
        draw, name = np.random.default_rng(k), f"BraTS2021_0000{k}"
        tumour = np.zeros((24, 22, 20), np.uint8)
        tumour[4:16, 5:15, 4:14], tumour[6:14, 7:13, 6:12], tumour[8:12, 9:11, 8:10] = 2, 4, 1
        brain = np.zeros(tumour.shape)
        brain[2:22, 2:20, 2:18] = 1
        for number, sequence in enumerate(SEQUENCES):
            scan = brain * (draw.normal(100, 10, tumour.shape) * (number + 1) + 50 * (tumour > number))
            _save(root / name / f"{name}_{sequence}.nii.gz", scan.astype(np.int16), np.diag([-1.0, -1, 1, 1]))
        _save(root / name / f"{name}_seg.nii.gz", tumour, np.diag([-1.0, -1, 1, 1]))
    return root


def _config(name: str, root: Path, out: Path, *more: str) -> FitConfig:
    return load_config(EXAMPLES / f"{name}.yaml", [f"data.root={root}", f"out={out}", *TINY, *more])


def test_btcv_trains_and_predicts_in_the_grid_of_its_files(btcv: Path, tmp_path: Path) -> None:
    config = _config("btcv", btcv, tmp_path / "run", "data.window=16", "predict.window=16")
    split = split_items(find_items(config.data), config.data)
    assert {key: [item.name for item in items] for key, items in split.items()} == {
        "train": ["imagesTr/img0000", "imagesTr/img0001"],
        "val": ["imagesTr/img0002"],
        "test": [],
    }
    data = SegmentationData(split["train"], config, 8, train=False)
    sample, seen = data[1], data.read(1, shrunk=True)
    assert seen.image.shape[1:] == (17, 16, 18), "11 x 3.007 mm / 2, 26 x 0.913 / 1.5, 30 x 0.906 / 1.5"
    assert seen.config.data.spacing == pytest.approx((2.0, 1.5, 1.5), rel=0.06)
    assert float(data.read(1).image.min()) == -1
    whole = data.read(1)
    assert torch.equal(working_frame(whole.image, whole.config)[0], seen.image), "training and prediction see the same"
    assert sample.patches.leaves[0].sizes == ((8, 8, 8),)
    fit(config)
    evaluation = evaluate(tmp_path / "run", split="val")
    assert evaluation.classes[0] == "spleen"
    assert len(evaluation.classes) == 13
    assert evaluation.summary["hd95_unit"] == "mm"
    scan = btcv / "imagesTr" / "img0002.nii.gz"
    (mask,) = predict(tmp_path / "run", scan, tmp_path / "out")
    given, made = nibabel.load(scan), nibabel.load(mask)
    assert made.shape == given.shape
    assert np.allclose(made.affine, given.affine, atol=1e-4)
    (whole,) = predict(tmp_path / "run", scan, tmp_path / "whole", window=0)
    assert nibabel.load(whole).shape == given.shape


def test_brats_reads_four_files_as_channels_and_scores_regions(brats: Path, tmp_path: Path) -> None:
    config = _config("brats", brats, tmp_path / "run", "data.window=16", "predict.window=null", "train.augment=false")
    items = find_items(config.data)
    assert [item.name for item in items] == [f"BraTS2021_0000{k}/BraTS2021_0000{k}" for k in range(3)]
    assert [path.name for path in items[0].more] == [f"BraTS2021_00000_{name}.nii.gz" for name in SEQUENCES[1:]]
    assert items[0].group == "BraTS2021_00000"
    image, labels = SegmentationData(items, config, 8, train=False).load(0)
    assert image.shape == (4, 20, 22, 24)
    assert labels is not None
    inside = image[0] != 0
    assert float(image[:, inside].mean()) == pytest.approx(0, abs=1e-4)
    assert float(image[:, inside].std()) == pytest.approx(1, abs=1e-3)
    assert not image[:, 0].any(), "background stays 0"
    fit(config)
    evaluation = evaluate(tmp_path / "run", split="val")
    assert evaluation.classes == ("whole", "core", "enhancing")
    row = evaluation.rows[0]
    assert set(row["dice"]) == set(row["hd95"]) == set(row["ceiling"]) == {"whole", "core", "enhancing"}
    case = brats / "BraTS2021_00001"
    (mask,) = predict(tmp_path / "run", case, tmp_path / "out")
    assert mask.name == "BraTS2021_00001.nii.gz"
    made = nibabel.load(mask)
    assert np.allclose(made.affine, np.diag([-1.0, -1, 1, 1]))
    assert set(np.unique(np.asarray(made.dataobj))) <= {0, 1, 2, 4}
    with pytest.raises(
        ConfigError, match=r"_t2\.nii\.gz is no file of the modality 'flair': give that one, or the folder"
    ):
        predict(tmp_path / "run", case / "BraTS2021_00001_t2.nii.gz", tmp_path / "other")


def test_the_files_of_nnunet_are_found_by_their_numbers(brats: Path, tmp_path: Path) -> None:
    for k in range(2):
        source = brats / f"BraTS2021_0000{k}" / f"BraTS2021_0000{k}"
        for number, sequence in enumerate((*SEQUENCES, "seg")):
            scan = nibabel.load(f"{source}_{sequence}.nii.gz")
            name = f"imagesTr/B_{k:03}_{number:04}.nii.gz" if number < 4 else f"labelsTr/B_{k:03}.nii.gz"
            _save(tmp_path / name, np.asarray(scan.dataobj), scan.affine)
    numbers = 'data.modalities=["0000", "0001", "0002", "0003"]'
    rules = ["data.images=imagesTr/*_{modality}.nii.gz", "data.masks=labelsTr/{stem}.nii.gz", numbers]
    items = find_items(_config("brats", tmp_path, tmp_path, *rules).data)
    assert [(item.name, item.mask and item.mask.name) for item in items] == [
        ("imagesTr/B_000", "B_000.nii.gz"),
        ("imagesTr/B_001", "B_001.nii.gz"),
    ]
    with pytest.raises(
        ConfigError, match=r"B_000\.nii\.gz is no file of the modality '0001', after which its name must end"
    ):
        siblings(tmp_path / "labelsTr/B_000.nii.gz", ["0001", "0002"])
    (tmp_path / "imagesTr/B_001_0002.nii.gz").unlink()
    with pytest.raises(
        ConfigError, match=r"B_001_0002\.nii\.gz is missing beside B_001_0000\.nii\.gz: every image needs"
    ):
        find_items(_config("brats", tmp_path, tmp_path, *rules).data)


def test_a_list_of_cases_may_name_the_files_of_an_image(brats: Path, tmp_path: Path) -> None:
    case = "BraTS2021_00000/BraTS2021_00000"
    cases = [{"image": [f"{case}_{name}.nii.gz" for name in SEQUENCES], "label": f"{case}_seg.nii.gz"}]
    (brats / "cases.json").write_text(
        json.dumps({"training": cases, "test": ["BraTS2021_00001/BraTS2021_00001_t1.nii.gz"]})
    )
    changes = ["data.manifest=cases.json", "data.modalities=null", "data.images=images/*", "data.masks=null"]
    first, second = find_items(_config("brats", brats, tmp_path, *changes).data)
    assert (len(first.more), first.split, first.mask and first.mask.name) == (3, None, "BraTS2021_00000_seg.nii.gz")
    assert (second.split, second.mask) == ("test", None)
    (brats / "cases.json").write_text("{}")
    with pytest.raises(FormatError, match=r"cases\.json has no list 'training', 'validation' or 'test'"):
        find_items(_config("brats", brats, tmp_path, *changes).data)


def test_files_of_one_image_must_share_a_grid(brats: Path, tmp_path: Path) -> None:
    first = brats / "BraTS2021_00000" / "BraTS2021_00000_flair.nii.gz"
    _save(tmp_path / "moved.nii.gz", np.zeros((24, 22, 20), np.int16), np.diag([-1.0, -1, 1.2, 1]))
    _save(tmp_path / "short.nii.gz", np.zeros((24, 22, 19), np.int16), np.diag([-1.0, -1, 1, 1]))
    with pytest.raises(FormatError, match=r"moved\.nii\.gz: lies elsewhere in space than .*flair\.nii\.gz; register"):
        open_channels([first, tmp_path / "moved.nii.gz"])
    with pytest.raises(
        FormatError, match=r"short\.nii\.gz: is 19 x 22 x 24 and .*flair\.nii\.gz is 20 x 22 x 24; bring"
    ):
        open_channels([first, tmp_path / "short.nii.gz"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ["a", "b"]}, r"data\.modalities=\['a', 'b'\] for data\.channels=4: name every channel once"),
        ({"modalities": None}, r"has a \{modality\} but data\.modalities is null"),
        ({"images": "*/*.nii.gz"}, r"data\.images='\*/\*\.nii\.gz' does not say where the modality stands"),
        (
            {"regions": {"whole": ["edemas"]}},
            r"data\.regions\.whole=\['edemas'\] must name some of the classes necrotic",
        ),
        ({"normalise": "limits"}, r"data\.normalise='limits' has data\.limits=None: give the lowest and the highest"),
        ({"limits": [0, 1]}, r"data\.limits needs normalise='limits' but it is 'zscore'"),
        ({"resample": [1, 1]}, r"data\.resample=\[1.0, 1.0\] must be 3 sizes in mm above 0"),
        ({"resample": [1, 1, 1], "max_side": 9}, r"data\.resample and data\.max_side both choose the resolution"),
        ({"classes": {"tumour": ">=1"}, "regions": {}}, r"predict\.values='file' needs classes that are numbers"),
    ],
)
def test_settings_of_volumes_are_checked_at_the_door(changes: dict[str, Any], message: str) -> None:
    from foveate.tasks.config import config_from_dict

    values = config_to_dict(load_config(EXAMPLES / "brats.yaml"))
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values | {"data": values["data"] | changes})


def test_a_region_counts_its_parts_as_one() -> None:
    truth, guess = np.array([[0, 1, 2, 3, 255]]), np.array([[0, 2, 2, 1, 3]])
    metrics = PixelMetrics(("background", "a", "b", "c"), groups={"all": (1, 2, 3), "ab": (1, 2), "c": (3,)})
    row = metrics.update("x", guess, truth)
    assert row["dice"] == {"all": 1.0, "ab": pytest.approx(4 / 5), "c": 0.0}
    assert row["missed"] == ["c"]
    assert metrics.summarise()["pooled_dice"]["ab"] == pytest.approx(4 / 5)


def test_dice_in_the_loss_is_of_the_regions() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 4, 2, 2, 2), torch.rand(5, 2, 2, 2)
    soft = torch.randn(5, 4, 2, 2, 2).softmax(1)
    regions = [(1, 2, 3), (1, 3)]
    loss = leaf_loss(logits, soft, weight, lengths=[5], groups=regions)
    wanted = 0.0
    for labels in regions:
        chance, share = (part[:, labels].sum(1) for part in (logits.softmax(1), soft))
        hit = float((chance * share * weight).sum())
        wanted += 1 - (2 * hit + 1) / (float((chance * weight).sum() + (share * weight).sum()) + 1)
    assert float(loss.dice_sum) == pytest.approx(wanted / 2, rel=1e-5)
    each = [(label,) for label in (1, 2, 3)]
    plain, same = (leaf_loss(logits, soft, weight, lengths=[5], groups=groups) for groups in (None, each))
    assert float(plain.dice_sum) == pytest.approx(float(same.dice_sum), rel=1e-6)


def test_volumes_thinner_than_a_patch_train_and_are_predicted(tmp_path: Path) -> None:
    for k in range(3):
        scan = np.random.default_rng(k).normal(0, 9, (9, 3, 2))
        _save(tmp_path / f"images/{k}.nii.gz", scan.astype(np.float32), np.diag([0.5, 2, 6, 1]))
        _save(tmp_path / f"labels/{k}.nii.gz", (scan > 0).astype(np.uint8), np.diag([0.5, 2, 6, 1]))
    rules = ["data.manifest=null", "data.images=images/*", "data.masks=labels/{stem}.nii.gz", "data.resample=null"]
    for window in ("null", "96"):
        out = tmp_path / window
        fit(_config("btcv", tmp_path, out, *rules, f"predict.window={window}", "tree.uniform=8"))
        (mask,) = predict(out, tmp_path / "images/0.nii.gz", out / "masks")
        assert nibabel.load(mask).shape == (9, 3, 2)
