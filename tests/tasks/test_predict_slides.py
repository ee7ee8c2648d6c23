"""Prediction of slides: streamed, resumable, readable by others, at the slide's own resolution."""

import gzip
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from tiny_run import tiny_config

from foveate.errors import FormatError
from foveate.io.pyramid import write_pyramid
from foveate.models import create_model
from foveate.tasks import predict as module
from foveate.tasks.config import save_config
from foveate.tasks.painting import Painting
from foveate.tasks.predict import predict
from foveate.tasks.trained import SETTINGS
from foveate.testing import synthetic_image

SIDE = 1100  # the last tiles are cut
CLASSES = {"tissue": 1, "tumour": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _untrained(tmp_path_factory.mktemp("model"))


def _untrained(folder: Path, **data: Any) -> Path:
    """A model with random weights, whose guesses change from leaf to leaf."""
    config = tiny_config(
        folder, folder, data={"root": str(folder), "classes": CLASSES, **data}, tree={"max_leaves": 150, "min_size": 16}
    )
    torch.manual_seed(0)
    network = create_model(config.model.name, in_chans=3, num_classes=3, **config.model.overrides)
    with torch.no_grad():
        network.decoder.head.weight.mul_(50)
    network.save_pretrained(folder)
    save_config(config, folder / SETTINGS)
    return folder


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = synthetic_image(SIDE, 0)[0]
    return write_pyramid(
        tmp_path_factory.mktemp("slide") / "a.tif",
        lambda box: image[:, slice(box[0][0], box[1][0]), slice(box[0][1], box[1][1])],
        shape=(SIDE, SIDE),
        dtype=np.uint8,
        channels=3,
        tile=256,
        spacing=(0.0005, 0.0005),
        kind="tiff",
        compression="jpeg",
        reduce="mean",
    )


@pytest.fixture(scope="module")
def mask(model: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(model, slide, tmp_path_factory.mktemp("mask"))[0]


def test_a_slide_becomes_a_pyramid_and_polygons_that_others_read(model: Path, slide: Path, tmp_path: Path) -> None:
    import openslide

    from foveate.io.geojson import read_annotations

    written = predict(model, slide, tmp_path, format="ome.tif,geojson.gz,tif,geojson")
    assert [path.name for path in written] == ["a.ome.tif", "a.geojson.gz", "a.tif", "a.geojson"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    labels = tifffile.imread(written[0])
    assert labels.shape == (SIDE, SIDE)
    assert len(np.unique(labels)) > 1
    with tifffile.TiffFile(written[0]) as file:
        assert file.is_ome
        assert len(file.series[0].levels) > 1
        assert 'PhysicalSizeX="0.5"' in str(file.ome_metadata)
        assert "<Description>0 background, 1 tissue, 2 tumour</Description>" in str(file.ome_metadata)
    with openslide.OpenSlide(written[2]) as plain:
        assert plain.dimensions == (SIDE, SIDE)
        assert float(plain.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-3)
        assert (np.asarray(plain.read_region((0, 0), 0, (SIDE, SIDE)))[..., 0] == labels).all()
    features = json.loads(gzip.decompress(written[1].read_bytes()))["features"]
    assert {feature["properties"]["classification"]["name"] for feature in features} <= set(CLASSES)
    area = sum(feature["properties"]["measurements"]["Area px^2"] for feature in features)
    assert area == (labels > 0).sum()
    filled = read_annotations(written[1], CLASSES, (SIDE, SIDE))
    assert (filled.read(((0, 0), (SIDE, SIDE)))[0] == labels).all()
    assert json.loads(written[3].read_text())["features"] == features


def test_only_tiles_are_painted(model: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []
    paint = Painting.tile

    def spy(self: Painting, box: Any) -> Any:
        sides.extend(high - low for low, high in zip(*box, strict=True))
        return paint(self, box)

    monkeypatch.setattr(Painting, "tile", spy)
    predict(model, slide, tmp_path)
    assert max(sides) <= 512
    assert len(sides) == 2 * 9  # each tile once, for both outputs


class Killed(BaseException):
    """Ends a prediction as a kill would."""


def _stop_at(monkeypatch: pytest.MonkeyPatch, tile: int, *words: Path) -> None:
    """Run a prediction that ends at a tile."""
    paint, seen = Painting.tile, []

    def stopping(self: Painting, box: Any) -> Any:
        seen.append(box)
        if len(seen) == tile:
            raise Killed
        return paint(self, box)

    with monkeypatch.context() as patch:
        patch.setattr(Painting, "tile", stopping)
        with pytest.raises(Killed):
            predict(*words)


def test_resume_goes_on_after_the_last_complete_row(
    model: Path, slide: Path, mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_at(monkeypatch, 5, model, slide, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".a.part"]
    boxes: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "logits_of", None)  # the model is not run again
        paint = Painting.tile
        patch.setattr(Painting, "tile", lambda self, box: boxes.append(box) or paint(self, box))
        written = predict(model, slide, tmp_path, format="ome.tif", resume=True)
    assert [box[0] for box in boxes] == [(y, x) for y in (512, 1024) for x in (0, 512, 1024)]
    assert written[0].read_bytes() == mask.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.ome.tif"]


def test_a_killed_process_is_resumed_to_the_same_files(model: Path, slide: Path, mask: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from foveate.tasks.painting import Painting\n"
        "from foveate.tasks.predict import predict\n"
        "paint, seen = Painting.tile, []\n"
        "def dying(self, box):\n"
        "    seen.append(box)\n"
        "    if len(seen) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return paint(self, box)\n"
        "Painting.tile = dying\n"
        "predict(*sys.argv[1:])\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code, str(model), str(slide), str(tmp_path)]
    assert subprocess.run(words, env=environment, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".a.part"]
    written = predict(model, slide, tmp_path, resume=True)
    assert written[0].read_bytes() == mask.read_bytes()
    assert written[1].read_bytes() == mask.with_name("a.geojson.gz").read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert predict(model, slide, tmp_path, resume=True) == []


@pytest.mark.parametrize("change", ["settings", "budget", "source", "no --resume"])
def test_what_another_prediction_left_is_not_taken_up(
    change: str, model: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "a.tif"
    copy.write_bytes(slide.read_bytes())
    _stop_at(monkeypatch, 5, model, copy, tmp_path / "out")
    if change == "source":
        os.utime(copy, ns=(0, 0))
    runs: list[int] = []
    logits = module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda *args: runs.append(1) or logits(*args))
    options: dict[str, Any] = {"settings": {"mpp": 0.3}, "budget": {"max_leaves": 40}}.get(change, {})
    predict(model, copy, tmp_path / "out", format="ome.tif", resume=change != "no --resume", **options)
    assert runs == [1]


@pytest.mark.parametrize("more", [False, True])
def test_interrupted_while_files_get_their_names(
    more: bool, model: Path, slide: Path, mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def second_fails(self: Path, target: Path) -> Path:
        if Path(target) == tmp_path / "a.geojson.gz":
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", second_fails)
        with pytest.raises(Killed):
            predict(model, slide, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.part", "a.ome.tif"]
    written = predict(model, slide, tmp_path, resume=True, overlay=more)
    assert [path.name for path in written] == ["a.ome.tif", "a.geojson.gz", *(["a_overlay.png"] if more else [])]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert written[0].read_bytes() == mask.read_bytes()


def test_probabilities_of_a_slide_are_a_pyramid(model: Path, slide: Path, mask: Path, tmp_path: Path) -> None:
    written = predict(model, slide, tmp_path, probability=True)
    chance = tifffile.imread(written[2])
    assert chance.shape == (3, SIDE, SIDE)
    assert abs(chance.sum(0, dtype=int) - 255).max() <= 2
    assert (chance.argmax(0) == tifffile.imread(mask)).mean() > 0.98


@pytest.mark.parametrize("broken", ["fill", "skip"])
def test_broken_tiles_are_reported_and_skipped(broken: str, model: Path, slide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.tif"
    data = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as file:
        for page in file.pages:  # tiles of every level, so that one of them is certainly read
            at, length = page.dataoffsets[0], page.databytecounts[0]
            data[at : at + length] = b"\0" * length
    copy.write_bytes(data)
    lines: list[str] = []
    with pytest.raises(FormatError, match=r"1 of 1 images have no mask .*level"):
        predict(model, copy, tmp_path / "out", warn=lines.append)
    assert list((tmp_path / "out").iterdir()) == []
    lines.clear()
    written = predict(model, copy, tmp_path / "out", broken=broken, format="ome.tif", warn=lines.append)
    assert len(lines) == 2
    assert "broken tiles of coarser levels were made from finer ones, first [((0, 0), " in lines[0]
    assert "1 broken tiles were" in lines[1]
    unknown = tifffile.imread(written[0]) == 255
    assert unknown[:256, :256].all() == (broken == "skip")
    assert not unknown[256:].any(), "one bad tile of the top level is no bad slide"
    assert not unknown[:, 256:].any()


def test_a_budget_of_leaves_holds_for_this_prediction(
    model: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    alive: list[weakref.ref[Any]] = []
    cut, write = module.slide_patches, module.write_outputs

    def watched_cut(*args: Any) -> Any:
        patches = cut(*args)
        alive.append(weakref.ref(patches))
        return patches

    def watched_write(painting: Painting, *args: Any, **options: Any) -> None:
        seen.append((len(painting.leaves), alive[-1]() is None))
        write(painting, *args, **options)

    monkeypatch.setattr(module, "slide_patches", watched_cut)
    monkeypatch.setattr(module, "write_outputs", watched_write)
    predict(model, slide, tmp_path / "trained", format="tif")
    predict(model, slide, tmp_path / "given", format="tif", max_leaves=40)
    (most, freed), (fewer, freed_again) = seen
    assert 40 < most <= 150
    assert fewer <= 40
    assert freed is freed_again is True, "the pixels of the leaves are of no use while they are painted"


def test_masks_are_native_where_the_model_works_at_another_resolution(slide: Path, tmp_path: Path) -> None:
    coarse = _untrained(tmp_path, mpp=1.0)
    (written,) = predict(coarse, slide, tmp_path / "out", format="ome.tif")
    assert tifffile.imread(written).shape == (SIDE, SIDE)
    np.save(tmp_path / "bare.npy", np.zeros((64, 64), np.uint8))
    with pytest.raises(FormatError, match=r"does not say the size of its pixels"):
        predict(coarse, tmp_path / "bare.npy", tmp_path / "out")


def test_a_format_that_does_not_fit_names_those_that_do(model: Path, slide: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"format='png' does not fit a slide; choose among ome\.tif, tif, "):
        predict(model, slide, tmp_path, format="png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [FormatError("the disk is full"), KeyboardInterrupt()])
def test_what_was_interrupted_says_how_to_go_on(
    stop: BaseException, model: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*_: Any) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(Painting, "tile", stopping)
        with pytest.raises((FormatError, KeyboardInterrupt), match="go on with --resume"):
            predict(model, slide, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".a.part"]
    assert len(predict(model, slide, tmp_path, resume=True)) == 2


def test_resume_does_not_replace_what_it_did_not_begin(model: Path, slide: Path, tmp_path: Path) -> None:
    (tmp_path / "a.ome.tif").write_bytes(b"mine")
    with pytest.raises(FormatError, match=r"a\.ome\.tif exists; add --overwrite"):
        predict(model, slide, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ome.tif"]
    predict(model, slide, tmp_path, overwrite=True)
    assert (tmp_path / "a.ome.tif").stat().st_size > 100


def test_resume_adds_the_pictures_that_a_finished_slide_has_not(model: Path, slide: Path, tmp_path: Path) -> None:
    predict(model, slide, tmp_path, format="ome.tif")
    before = (tmp_path / "a.ome.tif").stat()
    (written,) = predict(model, slide, tmp_path, format="ome.tif", resume=True, overlay=True)
    assert written == tmp_path / "a_overlay.png"
    assert predict(model, slide, tmp_path, format="ome.tif", resume=True, overlay=True) == []
    after = (tmp_path / "a.ome.tif").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "the mask is left alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ome.tif", "a_overlay.png"]


def test_values_that_the_disk_lost_are_computed_again(
    model: Path, slide: Path, mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_at(monkeypatch, 5, model, slide, tmp_path)
    kept = tmp_path / ".a.part" / "values.safetensors"
    kept.write_bytes(kept.read_bytes()[:100])
    written = predict(model, slide, tmp_path, resume=True)
    assert written[0].read_bytes() == mask.read_bytes()


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
def test_a_truncated_slide_leaves_nothing_and_the_batch_goes_on(
    percent: int, model: Path, slide: Path, mask: Path, tmp_path: Path
) -> None:
    data = slide.read_bytes()
    short = tmp_path / "0.tif"
    short.write_bytes(data[: len(data) * percent // 100])
    lines: list[str] = []
    with pytest.raises(FormatError, match=r"1 of 2 images have no mask .* 1 masks are in "):
        predict(model, [short, slide], tmp_path / "out", warn=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"foveate: skipped {short}: truncated or corrupt TIFF")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.geojson.gz", "a.ome.tif"]
    assert (tmp_path / "out/a.ome.tif").read_bytes() == mask.read_bytes()
