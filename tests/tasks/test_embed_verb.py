"""From a table of slides to bags: what is skipped, what is resumed, where the boxes lie."""

from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.cli import main
from foveate.errors import ConfigError, FormatError
from foveate.geometry.patch_source import TensorPatches
from foveate.io.bags import FeatureBag
from foveate.io.write import write_png
from foveate.models import create_model
from foveate.tasks import embed as module
from foveate.tasks.embed import embed, to_native
from sources import TiledRaster


def picture(seed=0, shape=(100, 130)):
    image = np.full((3, *shape), 240, np.uint8)
    image[:, 20:60, 30:90] = np.random.default_rng(seed).integers(60, 200, (3, 40, 60), dtype=np.uint8) // [
        [[1]],
        [[3]],
        [[1]],
    ]
    return image


class Means(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for number in range(3):
        write_png(tmp_path / f"{number}.png", picture(number))
    (tmp_path / "slides.csv").write_text("path,id,mpp\n0.png,a,0.5\n1.png,b,0.5\n2.png,c,\n")
    return tmp_path / "slides.csv"


def made(table: Path, **options):
    told = []
    given = {"encoder": "cnn", "patch_size": 32, "tissue": 0, "warn": told.append, **options}
    return embed(table, table.parent / "bags", **given), told


def test_every_slide_gets_a_bag(table: Path) -> None:
    written, told = made(table)
    assert [path.name for path in written] == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert told == ["foveate: cnn has random weights, the same in every call; give --weights FILE for trained ones"]
    bag = FeatureBag(written[0])
    assert (len(bag), bag.width, bag.shape) == (4 * 5, 128, (100, 130))
    assert bag.boxes[-1].tolist() == [[96, 128], [100, 130]]
    said = bag.provenance
    assert (said["source"], said["image"], said["mpp"]) == ("a", "0.png", [0.5, 0.5])
    assert (said["encoder"], said["settings"]["patch_size"], len(said["settings"]["weights"])) == ("cnn", 32, 16)


def test_features_are_those_of_the_encoder_in_the_order_of_the_grid(table: Path) -> None:
    whole, _ = made(table, half=False, batch=1000)
    features = FeatureBag(whole[1]).read(torch.arange(20))
    pixels = torch.from_numpy(np.pad(picture(1), [(0, 0), (0, 28), (0, 30)], mode="edge")).float() / 255
    patches = pixels.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
    with torch.no_grad():
        net, _ = module._encoder("cnn", None, lambda line: None, {"patch_size": 32})
        assert torch.allclose(features, net(patches), atol=1e-5)
    small, _ = made(table, half=False, batch=3, overwrite=True)
    assert torch.equal(FeatureBag(small[1]).read(torch.arange(20)), features)


def test_background_is_never_decoded(table: Path, monkeypatch) -> None:
    image = picture()
    raster = TiledRaster(image, coarser=[np.ascontiguousarray(image[:, ::4, ::4])], tile=32)
    monkeypatch.setattr(module, "open_native", lambda item, data: raster)
    monkeypatch.setattr("foveate.tasks.source.GLANCE", 2000)
    monkeypatch.setattr("foveate.tasks.source.glance.__defaults__", (2000,))
    written, _ = made(table, tissue=0.05, shard="1/3")
    boxes = FeatureBag(written[0]).boxes
    assert 0 < len(boxes) < 20
    read = {box for level, box in raster.reads if level == 0}
    assert all(start[0] < 64 and start[1] < 96 for start, _ in read)


def test_boxes_are_those_of_the_slide_whatever_it_was_cut_at(table: Path) -> None:
    written, _ = made(table, mpp=1.0, shard="1/3")
    bag = FeatureBag(written[0])
    assert bag.shape == (100, 130)
    assert bag.boxes[0].tolist() == [[0, 0], [64, 64]]
    assert bag.boxes.max(0).values[1].tolist() == [100, 130]
    assert len(bag) == 2 * 3


def test_boxes_of_a_view_cover_the_slide() -> None:
    boxes = torch.tensor([[[0, 0], [4, 5]], [[4, 5], [7, 9]]])
    view = TensorPatches(torch.zeros(2, 1), boxes, (7, 9))
    native = TiledRaster(np.zeros((1, 20, 31), np.uint8))
    assert to_native(view, native).tolist() == [[[0, 0], [12, 18]], [[11, 17], [20, 31]]]


def test_a_slide_that_cannot_be_read_is_skipped_and_reported(table: Path) -> None:
    (table.parent / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    told = []
    with pytest.raises(
        FormatError, match=r"^1 of 3 slides have no bag \(first: .*1.png: .*\); mend or leave out these"
    ):
        made(table, warn=told.append)
    assert len(told) == 2
    assert told[1].startswith(f"foveate: skipped {table.parent / '1.png'}: ")
    assert sorted(path.name for path in (table.parent / "bags").iterdir()) == ["a.safetensors", "c.safetensors"]


def test_a_slide_of_no_known_pixel_size_is_skipped_where_one_is_asked_for(table: Path) -> None:
    message = (
        r"2.png: does not say the size of its pixels, but --mpp 1 is asked for; give it in a column mpp of slides.csv"
    )
    with pytest.raises(FormatError, match=message):
        made(table, mpp=1)
    assert len(list((table.parent / "bags").iterdir())) == 2


def test_a_slide_of_no_patch_has_no_bag(table: Path) -> None:
    with pytest.raises(
        FormatError,
        match=r"3 of 3 slides have no bag .*0.png: is a bag of 0 patches .no patch has a share of tissue of 1",
    ):
        made(table, tissue=1.0)


def test_a_slide_of_one_patch_is_a_bag_of_one(table: Path) -> None:
    write_png(table.parent / "0.png", picture()[:, :30, :20], overwrite=True)
    written, _ = made(table, shard="1/3")
    assert FeatureBag(written[0]).boxes.tolist() == [[[0, 0], [30, 20]]]


def test_resuming_leaves_complete_bags_alone(table: Path) -> None:
    first, _ = made(table, shard="2/3")
    assert [path.name for path in first] == ["b.safetensors"]
    with pytest.raises(FormatError, match=r"b.safetensors: exists already"):
        made(table)
    stamp = first[0].stat().st_mtime_ns
    rest, _ = made(table, resume=True)
    assert [path.name for path in rest] == ["a.safetensors", "c.safetensors"]
    assert first[0].stat().st_mtime_ns == stamp
    rest[0].write_bytes(rest[0].read_bytes()[:50])
    again, _ = made(table, resume=True)
    assert again == rest[:1]
    with pytest.raises(
        FormatError, match=r"a.safetensors: was made with other settings \(patch_size\); give another --out"
    ):
        made(table, resume=True, patch_size=64)
    assert len(made(table, overwrite=True, patch_size=64)[0]) == 3


def test_shards_share_the_table(table: Path) -> None:
    names = [[path.name for path in made(table, shard=f"{part}/2")[0]] for part in (1, 2)]
    assert names == [["a.safetensors", "c.safetensors"], ["b.safetensors"]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shard": "0/2"}, ConfigError, "shard='0/2' is no part; give i/n with i from 1 to n, such as 1/4"),
        ({"shard": "half"}, ConfigError, "shard='half' is no part"),
        ({"batch": 0}, ConfigError, "batch=0 is below 1; give the number of patches that are read at a time"),
        ({"resume": True, "overwrite": True}, ConfigError, "--resume and --overwrite contradict each other"),
        ({"encoder": "resnet"}, ConfigError, "encoder='resnet' is none of cnn, vit, resnet18"),
        ({"patch_size": 0}, ConfigError, "patch_size=0 is below 1"),
        ({"mpp": -1}, ConfigError, "mpp"),
    ],
)
def test_settings_that_cannot_be_are_refused(table: Path, options, error, message) -> None:
    with pytest.raises(error, match=message):
        made(table, **options)
    assert not (table.parent / "bags").exists()


def test_an_id_names_one_slide(table: Path) -> None:
    table.write_text("path,id\n0.png,a\n1.png,a\n")
    with pytest.raises(ConfigError, match=r"slides.csv rows 1 and 2 are both a: name every image once"):
        made(table)


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "b/../../a"])
def test_an_id_stays_below_the_folder(table: Path, name: str) -> None:
    table.write_text(f"path,id\n0.png,{name}\n")
    with pytest.raises(
        ConfigError, match=rf"slides.csv row 1 has the id '{name}', which leaves --out; give a plain one"
    ):
        made(table)
    assert not (table.parent / "bags").exists()


def test_a_model_embeds_as_it_was_trained(table: Path) -> None:
    model = create_model("ips_cnn", patch_size=16, width=24)
    model.save_pretrained(table.parent / "model")
    written, told = made(table, encoder=str(table.parent / "model"), patch_size=None)
    bag = FeatureBag(written[0])
    assert (bag.width, len(bag), told) == (24, 7 * 9, [])
    assert bag.provenance["settings"]["weights"] == module.digest(model.encoder)
    with pytest.raises(ConfigError, match=r"--weights with the run .*model, which has its own; give the name of an"):
        made(table, encoder=str(table.parent / "model"), weights="w.safetensors")


def test_any_module_embeds(table: Path) -> None:
    written, told = made(table, encoder=Means(), shard="1/3", half=False)
    bag = FeatureBag(written[0])
    assert (bag.width, bag.provenance["encoder"], told) == (3, "Means", [])
    part = picture()[:, :32, :32] / 255
    assert bag.read(torch.tensor([0]))[0].tolist() == pytest.approx(part.mean((1, 2)).tolist(), abs=1e-5)


def test_a_model_of_features_embeds_nothing(table: Path) -> None:
    create_model("ips_features", in_chans=8).save_pretrained(table.parent / "model")
    with pytest.raises(ConfigError, match="model was trained on features, not on pixels; give a run on patches"):
        made(table, encoder=str(table.parent / "model"))


def test_the_verb(table: Path, capsys) -> None:
    out = table.parent / "bags"
    words = ["embed", str(table), "--out", str(out), "--encoder", "cnn", "--patch-size", "64", "--float32"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out / f"{name}.safetensors") for name in "abc"]
    assert FeatureBag(out / "a.safetensors").read(torch.tensor([0])).dtype == torch.float32
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
