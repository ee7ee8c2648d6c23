"""The look at a data set finds what is planted in it, and the plan says where a tree gains and where it cannot."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from foveate.tasks.check import check_data, plan_data
from foveate.tasks.config import DataConfig, FitConfig, SplitConfig, TrainConfig, TreeConfig, config_from_dict


def save(root: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    for folder, array in (("images", image), ("masks", mask)):
        (root / folder).mkdir(exist_ok=True)
        cv2.imwrite(str(root / f"{folder}/{name}.png"), array)


def noisy(seed: int, shape: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def disc(shape: tuple[int, int] = (32, 48), value: int = 1) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    cv2.circle(mask, (20, 15), 5, value, -1)
    return mask


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    for k in range(4):
        save(tmp_path, f"good{k}", noisy(k), disc())
    return tmp_path


def data(root: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(root=str(root), classes={"cell": 1}), **changes)


def kinds(root: Path, **changes: object) -> set[str]:
    return {finding.kind for finding in check_data(data(root, **changes)).findings}


def test_a_sound_set_has_no_findings(sound: Path) -> None:
    report = check_data(data(sound))
    assert report.findings == ()
    assert report.num_errors == 0
    assert sum(row.num_images for row in report.splits) == 4
    share = float((disc() == 1).mean())
    assert report.splits[0].shares == pytest.approx((1 - share, share))
    assert report.sizes == ((32, 48), (32, 48))
    text = report.to_text()
    assert "0 errors, 0 notes" in text
    assert "32 x 48" in text


def test_planted_faults_are_found(sound: Path) -> None:
    save(sound, "size", noisy(10), disc((30, 48)))
    save(sound, "value", noisy(11), disc(value=9))
    save(sound, "flat", np.full((32, 48), 7, np.uint8), disc())
    save(sound, "empty", noisy(12), np.zeros((32, 48), np.uint8))
    save(sound, "broken", noisy(13), disc())
    (sound / "images/broken.png").write_bytes(b"not an image")
    found = {(finding.kind, finding.name.removeprefix("images/")) for finding in check_data(data(sound)).findings}
    assert {
        ("size mismatch", "size"),
        ("unreadable mask", "value"),
        ("constant image", "flat"),
        ("background only", "empty"),
        ("unreadable image", "broken"),
    } <= found
    report = check_data(data(sound))
    assert report.num_errors == 3
    assert [finding.is_error for finding in report.findings] == [True] * 3 + [False] * (len(report.findings) - 3)
    assert all("\n" not in finding.detail for finding in report.findings)


def test_unknown_value_is_named_or_ignored(sound: Path) -> None:
    save(sound, "value", noisy(11), disc(value=9))
    (finding,) = (f for f in check_data(data(sound)).findings if f.kind == "unreadable mask")
    assert "9" in finding.detail
    assert "ignored pixels" in kinds(sound, unknown="ignore")
    assert "unreadable mask" not in kinds(sound, unknown="background")


def test_duplicates_within_and_across_splits(sound: Path) -> None:
    for k in range(6):
        save(sound, f"copy{k}", noisy(0), disc())
    found = [f for f in check_data(data(sound)).findings if f.kind.startswith("duplicate")]
    assert len(found) == 6
    assert any(finding.kind == "duplicate across splits" and finding.is_error for finding in found)
    together = SplitConfig(by="group", group_regex="good[123]|good0|copy")
    grouped = check_data(data(sound, split=together, images="images/copy*"))
    assert {finding.kind for finding in grouped.findings if finding.kind.startswith("duplicate")} == {"duplicate"}


def test_empty_class_and_empty_split(sound: Path) -> None:
    report = check_data(data(sound, classes={"cell": 1, "never": 2}, split=SplitConfig(train=0.8, val=0.2, test=0.0)))
    found = {(finding.kind, finding.name) for finding in report.findings}
    assert found == {("empty class", "never"), ("empty split", "test")}


def test_images_without_masks(sound: Path) -> None:
    assert "no mask" in kinds(sound, masks=None)


def plan_settings(root: Path) -> FitConfig:
    return FitConfig(data=DataConfig(root=str(root), classes={"cell": 1}), tree=TreeConfig(min_size=4), out="unused")


def test_plan_finds_the_gain_on_a_sparse_set(tmp_path: Path) -> None:
    mask = disc((128, 128))
    save(tmp_path, "one", mask * 200, mask)
    plan = plan_data(plan_settings(tmp_path), patch_size=4)
    (image,) = plan.images
    assert all(
        one is not None and two is not None and one < two
        for one, two in zip(image.adaptive, image.uniform, strict=True)
    )
    assert list(image.adaptive) == sorted(leaves for leaves in image.adaptive if leaves is not None)
    assert "saves leaves at 0.9, 0.95, 0.99" in plan.verdict
    assert "one" in plan.to_text()


def test_plan_says_where_there_is_nothing_to_gain(tmp_path: Path) -> None:
    """Detail everywhere and a mask that has nothing to do with it."""
    draw = np.random.default_rng(0)
    mask = (cv2.GaussianBlur(draw.random((128, 128)), (0, 0), 3) > 0.5).astype(np.uint8)
    save(tmp_path, "one", noisy(1, (128, 128)), mask)
    plan = plan_data(plan_settings(tmp_path), patch_size=4)
    assert "nothing to gain" in plan.verdict


def test_plan_says_when_a_target_is_out_of_reach(tmp_path: Path) -> None:
    mask = (np.indices((64, 64)).sum(0) % 2).astype(np.uint8)
    save(tmp_path, "one", noisy(1, (64, 64)), mask)
    settings = plan_settings(tmp_path)
    plan = plan_data(replace(settings, tree=TreeConfig(min_size=16)), patch_size=2)
    assert plan.images[0].adaptive == (None, None, None)
    assert "lower tree.min_size" in plan.verdict
    assert "- / -" in plan.to_text()


def test_plan_skips_images_without_objects_and_takes_targets_in_any_order(tmp_path: Path) -> None:
    save(tmp_path, "empty", noisy(1), np.zeros((32, 48), np.uint8))
    save(tmp_path, "full", noisy(2), disc())
    seen: list[tuple[int, int]] = []
    plan = plan_data(
        plan_settings(tmp_path), (0.95, 0.5), patch_size=4, progress=lambda done, of: seen.append((done, of))
    )
    assert [image.name for image in plan.images] == ["images/full"]
    assert plan.images[0].uniform[0] >= plan.images[0].uniform[1]
    assert seen == [(1, 2), (2, 2)]


def test_plan_looks_at_a_seeded_sample_and_says_so(tmp_path: Path) -> None:
    for name in "abcdefg":
        save(tmp_path, name, noisy(ord(name)), disc())
    settings = plan_settings(tmp_path)
    some = plan_data(settings, (0.5,), patch_size=4, limit=3)
    names = [image.name for image in some.images]
    assert len(names) == 3
    assert names == sorted(names)
    assert some == plan_data(settings, (0.5,), patch_size=4, limit=3)
    assert "\n3 of 7 images, drawn by train.seed (--limit 0: all)\n" in some.to_text()
    others = [plan_data(replace(settings, train=TrainConfig(seed=k)), (0.5,), patch_size=4, limit=3) for k in (1, 2)]
    assert any([image.name for image in other.images] != names for other in others)
    every = plan_data(settings, (0.5,), patch_size=4, limit=None)
    assert len(every.images) == 7
    assert "drawn by" not in every.to_text()
    assert set(some.images) < set(every.images)


def test_slides_are_looked_at_from_afar(tmp_path: Path) -> None:
    from foveate.testing import write_slide

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for k in range(3):
        mask = tmp_path / f"masks/s{k}.tif"
        write_slide(tmp_path / f"images/s{k}.ome.tif", 512, seed=min(k, 1), mask=mask, tile=128, num_workers=1)
    settings = data(tmp_path, classes={"tissue": 1, "tumour": 2}, split=SplitConfig(train=0.7, val=0.3, test=0.0))
    report = check_data(settings)
    assert report.sizes == ((512, 512), (512, 512))
    assert {finding.kind.split()[0] for finding in report.findings} == {"duplicate", "empty"}
    assert 0.3 < 1 - report.splits[0].shares[0] < 0.6
    other = check_data(replace(settings, mpp=0.5))
    assert other.sizes == ((256, 256), (256, 256))
    cv2.imwrite(str(tmp_path / "images/plain.png"), noisy(3))
    cv2.imwrite(str(tmp_path / "masks/plain.png"), disc())
    (found,) = (f for f in check_data(replace(settings, mpp=0.5)).findings if f.kind == "no mpp")
    assert found.is_error
    assert "give it in a column mpp of the manifest" in found.detail
    cv2.imwrite(str(tmp_path / "masks/s1.tif"), disc((300, 512)))
    (found,) = (f for f in check_data(settings).findings if f.kind == "size mismatch")
    assert "300 x 512 against 512 x 512" in found.detail


def test_annotations_go_by_several_names_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    def feature(name: str, *ring: list[int]) -> dict[str, Any]:
        geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}

    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    features = [
        feature("Tumor", [0, 0], [10, 0], [10, 10], [0, 10]),
        feature("Tumor 2", [20, 0], [30, 10], [30, 0], [20, 10]),
        feature("Ink", [40, 0], [44, 0], [44, 4], [40, 4]),
    ]
    for k in range(2):
        cv2.imwrite(str(tmp_path / f"images/{k}.png"), noisy(k))
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (tmp_path / f"masks/{k}.geojson").write_text(text)
    split = {"train": 0.5, "val": 0.5, "test": 0.0}
    classes = {"tumour": ["Tumor", "Tumor 2"], "ignore": "Blur"}
    values = {"root": str(tmp_path), "classes": classes, "unknown": "ignore", "split": split}
    report = check_data(config_from_dict({"data": values}).data)
    assert report.num_errors == 0
    assert report.splits[0].shares[1] == pytest.approx(150 / (32 * 48 - 16))
    said = [finding.detail for finding in report.findings if finding.kind == "annotations"]
    assert said[:2] == [
        "features of classes without a name count as ignore: 'Ink' (1 features)",
        "1 rings cross themselves and are filled by the even-odd rule",
    ]
    assert len(said) == 4
