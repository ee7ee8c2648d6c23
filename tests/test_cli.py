"""The command line: one line and exit code 2 for every mistake, and no heavy import before it is needed."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

import foveate
from foveate.cli import VERBS, main
from foveate.io.pyramid import write_pyramid
from foveate.testing import synthetic_image, write_dataset


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail as a user error; return its one line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("foveate: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(synthetic_image(96, 0)[0].transpose(1, 2, 0)).save(path)
    return path


def test_help_lists_the_verbs_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from foveate.cli import main; assert main(['--help']) == 0;"
        "print(sorted({'torch', 'numpy', 'jsonargparse', 'monai', 'matplotlib', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: foveate {verb}")


def test_version_and_module_run() -> None:
    done = subprocess.run([sys.executable, "-m", "foveate", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"foveate {foveate.__version__}\n"


def test_no_words_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: foveate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["pedict"], "unknown verb 'pedict', did you mean predict?"),
        (["--vresion"], "unknown flag '--vresion'"),
        (["predict", "--ot", "x"], "unknown flag '--ot', did you mean --out?"),
        (["plan", "64x64", "--max-leves=3"], "unknown flag '--max-leves', did you mean --max-leaves?"),
        (["plan", "64x64", "--max-leaves=many"], "'many' is not a whole number"),
        (["plan", "64y64"], "'64y64' is neither a file nor a shape"),
        (["plan", "0x64"], "'0x64' is neither a file nor a shape"),
        (["plan", "64x64", "--tree.max_leaves=3"], "unknown flag '--tree.max_leaves'"),
        (["predict", "run", "a.png", "--out", "x", "--format", "ome.tiff"], "did you mean 'ome.tif'?"),
        (["predict", "run", "a.png", "--out", "x", "--mpp", "half"], "'half' is not a number"),
        (["predict", "run", "a.png", "--out", "x", "--broken", "ignore"], "invalid choice: 'ignore'"),
        (["plan"], "plan takes one thing"),
        (["inspect"], "inspect takes one thing"),
        (["predict", "run", "image.png"], "required: --out"),
        (["demo", "--minutes", "0"], "--minutes=0.0 must be above 0"),
        (["demo", "--minutes", "nan"], "--minutes=nan must be above 0"),
        (["bench", "treees"], "unknown benchmark family 'treees'"),
        (["fit", "a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
        (["fit", "a.yaml", "--train.lr"], "--train.lr has no value"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in fails(capsys, *words)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "missing.yaml"),
        ("tree:\n  max_leafs: 12\n", "did you mean tree.max_leaves?"),
        ("tree:\n  max_leaves: 0\n", "tree.max_leaves=0"),
        ("train: 3\n", "train=3"),
        ("tree: [\n", "is not YAML"),
        ("", "images"),
    ],
)
def test_bad_config(
    content: str | None, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("missing.yaml" if content is None else "config.yaml")
    if content is not None:
        path.write_text(content)
    assert text in fails(capsys, "fit", path)


def test_unknown_override_names_the_closest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("out: x\n")
    assert "did you mean train.lr?" in fails(capsys, "fit", tmp_path / "config.yaml", "--train.lrr=1")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(foveate.FoveateError, match=r"missing\.yaml"):
        main(["fit", "--debug", str(tmp_path / "missing.yaml")])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:60])


def _text(path: Path) -> None:
    path.write_text("this is no image")


def _folder(path: Path) -> None:
    path.mkdir()


def _bomb(path: Path) -> None:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _animated(path: Path) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (10, 200)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("make", [_empty, _truncated, _text, _folder, _bomb, _animated, None])
def test_bad_image_files(
    make: Callable[[Path], None] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("bad.gif" if make is _animated else "bad.png")
    if make is not None:
        make(path)
    assert "bad." in fails(capsys, "inspect", path)


def test_nan_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.zeros((16, 16), np.float32)
    image[3, 4] = np.nan
    np.save(tmp_path / "bad.npy", image)
    assert "bad.npy" in fails(capsys, "inspect", tmp_path / "bad.npy")


def test_max_pixels_refuses(png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "image.png" in fails(capsys, "inspect", png, "--max-pixels", 100)


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--max-leaves=0", "max_leaves"), ("--max-leaves=-3", "max_leaves"), ("--min-size=0", "0"), ("--detail=x", "x")],
)
def test_impossible_trees(flag: str, text: str, png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in fails(capsys, "inspect", png, flag)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (40, 40)])
def test_inspect_takes_tiny_and_constant_images(
    shape: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full(shape, 9, np.uint8)).save(tmp_path / "flat.png")
    assert main(["inspect", str(tmp_path / "flat.png")]) == 0
    out = capsys.readouterr().out
    assert f"{shape[0]} x {shape[1]} uint8" in out
    assert "nothing to gain" in out


def test_inspect_describes_and_draws(png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(png), "--max-leaves", "40", "--out", str(tmp_path / "x" / "leaves.png")]) == 0
    out = capsys.readouterr().out
    assert "3 x 96 x 96 uint8" in out
    assert "uniform grid" in out
    with Image.open(tmp_path / "x" / "leaves.png") as picture:
        assert picture.size == (512, 512)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    image = synthetic_image(1024, 0)[0]
    return write_pyramid(
        tmp_path / "slide.tif",
        lambda box: image[:, slice(box[0][0], box[1][0]), slice(box[0][1], box[1][1])],
        shape=(1024, 1024),
        dtype=np.uint8,
        channels=3,
        tile=128,
        ratio=4,
        spacing=(0.0005, 0.0005),
        kind="tiff",
        reduce="mean",
    )


def test_inspect_says_what_a_slide_is_and_reads_little_of_it(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(slide), "--max-leaves", "40", "--out", str(tmp_path / "leaves.png")]) == 0
    out = capsys.readouterr().out
    assert "reader: tifffile" in out
    assert "level 1: 256 x 256 pixels, downsample 4, tiles of 128 x 128" in out
    assert "mpp: 0.5 um per pixel" in out
    assert "of the image" in out
    assert "decoded of level 2: 100.00 % of its pixels in 1 tile" in out
    assert float(out.split("decoded of level 0: ")[1].split(" %")[0]) < 50
    with Image.open(tmp_path / "leaves.png") as picture:
        assert picture.size == (1024, 1024)
    assert main(["inspect", str(slide), "--mpp", "0.25"]) == 0
    assert "mpp: 0.25 um per pixel (given as an argument)" in capsys.readouterr().out


def test_inspect_goes_on_without_a_broken_tile_as_its_message_says(
    slide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tifffile.TiffFile(slide) as tiff:
        start, count = tiff.pages[-1].dataoffsets[0], tiff.pages[-1].databytecounts[0]
    data = bytearray(slide.read_bytes())
    data[start : start + count] = bytes(count)
    slide.write_bytes(data)
    assert main(["inspect", str(slide)]) == 2
    assert "tile at row 0, column 0 of level 2 is broken" in capsys.readouterr().err
    assert main(["inspect", str(slide), "--broken", "fill"]) == 0
    out = capsys.readouterr().out
    assert "broken tiles: " not in out
    assert "broken tiles of coarser levels, made from finer ones: 1, first at ((0, 0), (1024, 1024))" in out


def test_inspect_says_where_a_volume_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 8, 5), np.uint8), affine), tmp_path / "a.nii.gz")
    assert main(["inspect", str(tmp_path / "a.nii.gz"), "--min-size", "2", "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "spacing: 2 x 1 x 1 mm (z, y, x)" in out
    assert "orientation: LAS (x, y, z)" in out
    assert "affine: -1 0 0 0 | 0 1 0 0 | 0 0 2 0 (x, y, z to mm)" in out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width * 8 == pytest.approx(picture.height * 6, rel=0.02)


def test_plan_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "256x256", "--model", "apf_vit_tiny", "--max-leaves", "64"]) == 0
    out = capsys.readouterr().out
    assert "64 leaves" in out
    assert "GFLOP" in out
    assert "uniform grid" in out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "apf_vit_tiiny"], "apf_vit_tiny"),
        (["--max-leaves", "0"], "max_leaves=0"),
        (["--dtype", "int8"], "int8"),
        (["--batch-size", "0"], "batch_size=0"),
    ],
)
def test_plan_mistakes(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in fails(capsys, "plan", "64x64", *flags)


def test_predict_with_no_model(png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "predict", tmp_path / "no_run", png, "--out", tmp_path / "masks")
    assert "no_run" in line
    assert not (tmp_path / "masks").exists() or not any((tmp_path / "masks").iterdir())


def test_evaluate_with_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no_run" in fails(capsys, "evaluate", tmp_path / "no_run")


def test_full_disk_is_one_line(png: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "leaves.png")

    monkeypatch.setattr("foveate.tasks.figures.save_picture", full)
    assert main(["inspect", str(png), "--out", "leaves.png"]) == 2
    assert capsys.readouterr().err == "foveate: error: No space left on device: leaves.png\n"


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, png: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foveate.io.raster.open_raster", stop)
    assert main(["inspect", str(png)]) == 130
    err = capsys.readouterr().err
    assert err.startswith("foveate: interrupted")
    assert err.count("\n") == 1


def test_bench_needs_the_source(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.__file__", "/nowhere/src/foveate/__init__.py")
    monkeypatch.chdir("/")
    assert "clone the repository" in fails(capsys, "bench", "trees")


CONFIG = """
data: {root: ROOT, images: images/*.png, masks: "masks/{stem}.png", split: {train: 0.5, val: 0.25, test: 0.25}}
tree: {max_leaves: 20, min_size: 16}
model: {overrides: {depth: 1, width: 48, num_heads: 3, decoder_width: 8}}
train: {epochs: 1, batch_size: 2, augment: 0.5}
out: OUT
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, its settings, and a run of one epoch."""
    root = tmp_path_factory.mktemp("job")
    write_dataset(root / "data", 4, 64, seed=0)
    text = CONFIG.replace("ROOT", str(root / "data")).replace("OUT", str(root / "run"))
    (root / "config.yaml").write_text(text)
    assert main(["fit", str(root / "config.yaml"), "--train.lr=1e-4"]) == 0
    return root / "run"


@pytest.mark.filterwarnings("ignore")
def test_fit_keeps_the_resolved_settings(run: Path) -> None:
    assert "lr: 0.0001" in (run / "config.yaml").read_text()


@pytest.mark.filterwarnings("ignore")
def test_fit_refuses_to_forget_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--overwrite" in fails(capsys, "fit", run.parent / "config.yaml")


@pytest.mark.filterwarnings("ignore")
def test_predict_writes_masks_of_the_images_size(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run.parent / "data" / "images" / "000.png"
    words = ["predict", str(run), str(image), "--out", str(tmp_path / "masks"), "--probability"]
    assert main(words) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["000.png", "000_probability.tif"]
    with Image.open(paths[0]) as mask:
        assert mask.size == (64, 64)
    assert "--overwrite" in fails(capsys, *words)
    assert main([*words, "--overwrite", "--max-leaves", "8"]) == 0
    assert "max_leaves=0 is below 1" in fails(capsys, *words, "--overwrite", "--max-leaves", "0")


@pytest.mark.filterwarnings("ignore")
def test_predict_goes_on_after_a_bad_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    good = run.parent / "data" / "images" / "001.png"
    assert main(["predict", str(run), str(tmp_path / "bad.png"), str(good), "--out", str(tmp_path / "masks")]) == 2
    err = capsys.readouterr().err
    assert "bad.png" in err
    assert "Traceback" not in err
    assert (tmp_path / "masks" / "001.png").is_file()


@pytest.mark.filterwarnings("ignore")
def test_evaluate_prints_the_table_and_writes_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert "ceiling" in out
    page = run / "evaluation" / "test.html"
    assert f"report: {page}" in out
    text = page.read_text()
    assert text.count("data:image/png") >= 2
    assert "max_leaves: 20" in text
    assert "split=" in fails(capsys, "evaluate", run, "--split", "tests")


@pytest.mark.filterwarnings("ignore")
def test_inspect_and_plan_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(run.parent / "config.yaml")
    classes = "--data.classes={ball: '>=1'}"  # a space is no reason to take it for an IMAGE
    assert main(["inspect", "--data", config, classes, "--data.images=images/*"]) == 0
    assert "  ball\n" in capsys.readouterr().out
    assert main(["plan", "--data", config]) == 0
    assert "ceiling" in capsys.readouterr().out
    assert main(["plan", "--data", config, "--limit", "1"]) == 0
    assert "\n1 of " in capsys.readouterr().out
    assert "--limit=-1 is negative; give a number of images" in fails(capsys, "plan", "--data", config, "--limit=-1")
    assert "--limit=3 is for --data, and 64x64 is one image" in fails(capsys, "plan", "64x64", "--limit", "3")
    _truncated(run.parent / "data" / "images" / "003.png")
    assert main(["inspect", "--data", config]) == 2
    assert "003" in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -u -m foveate --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "foveate" in done.stdout
    assert done.stderr == ""
