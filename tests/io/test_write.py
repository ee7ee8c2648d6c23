"""What is written is whole or absent, exact when read back, and never silently replaces anything."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_files import texture

from foveate.errors import FormatError, ShapeError
from foveate.io.image import read_image
from foveate.io.masks import read_mask
from foveate.io.write import (
    append_jsonl,
    atomic_write,
    read_jsonl,
    write_image,
    write_json,
    write_jsonl,
    write_mask,
    write_png,
    write_probability,
)


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


class Fail:
    """Stands for a library that stops in the middle of writing."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *args: object, **options: object) -> None:
        raise self.error


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "bool"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 17)])
def test_masks_come_back_exactly(tmp_path: Path, suffix: str, dtype: str, shape: tuple[int, ...]) -> None:
    labels = (texture(*shape) // 30).astype(dtype)
    path = tmp_path / f"mask{suffix}"
    write_mask(path, labels)
    found = read_mask(path, {str(value): value for value in range(1, 9)}, shape=shape)
    np.testing.assert_array_equal(found, labels)


def test_large_labels_need_sixteen_bits(tmp_path: Path) -> None:
    labels = np.array([[0, 300], [65535, 7]])
    for name in ("a.png", "a.tif"):
        write_mask(tmp_path / name, labels)
        found = read_image(tmp_path / name)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found[0], labels)


def test_every_label_of_a_byte_and_its_colour(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_mask(tmp_path / "a.png", labels)
    colours = read_image(tmp_path / "a.png")
    assert colours[:, 0, 0].tolist() == [0, 0, 0]
    assert colours[:, 15, 15].tolist() == [255, 255, 255]
    assert len({tuple(colours[:, 0, column]) for column in range(16)}) == 16
    found = read_mask(tmp_path / "a.png", {"low": "<255", "ignore": 255})
    np.testing.assert_array_equal(found == 255, labels == 255)


def test_volume_of_labels(tmp_path: Path) -> None:
    labels = texture(5, 9, 11) // 100
    write_mask(tmp_path / "a.tif", labels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0], labels)
    with pytest.raises(FormatError, match=r"a PNG cannot hold a volume \(5, 9, 11\); name the file .tif"):
        write_mask(tmp_path / "a.png", labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 2)), "dtype float64; give"),
        (np.zeros(4, int), r"shape \(4,\)"),
        (np.zeros((0, 4), int), r"shape \(0, 4\)"),
        (np.array([[-1, 3]]), "labels from -1 to 3; a mask holds 0 to 65535"),
        (np.array([[0, 65536]]), "labels from 0 to 65536"),
    ],
)
def test_what_is_no_mask(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        write_mask(tmp_path / "a.png", labels)


def test_lossy_or_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"suffix '.jpg', but labels must be stored exactly; name it .png or .tif"):
        write_mask(tmp_path / "a.jpg", np.zeros((2, 2), int))
    with pytest.raises(FormatError, match="a png cannot hold float32"):
        write_image(tmp_path / "a.png", texture(1, 4, 4, dtype="float32"))
    with pytest.raises(FormatError, match="a jpg cannot hold uint16"):
        write_image(tmp_path / "a.jpg", texture(1, 4, 4, dtype="uint16"))
    with pytest.raises(FormatError, match=r"suffix '.png', but floats need TIFF"):
        write_probability(tmp_path / "a.png", texture(4, 4, dtype="float32"))
    with pytest.raises(FormatError, match=r"suffix '.tif', but this writes PNG"):
        write_png(tmp_path / "a.tif", texture(4, 4))
    assert only(tmp_path)


@pytest.mark.parametrize("shape", [(9, 11), (2, 9, 11), (3, 4, 9, 11)])
def test_probabilities(tmp_path: Path, shape: tuple[int, ...]) -> None:
    chances = texture(*shape, dtype="float32")
    write_probability(tmp_path / "a.tif", chances, half=False)
    found = read_image(tmp_path / "a.tif")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.squeeze(0) if len(shape) == 2 else found, chances)
    write_probability(tmp_path / "a.tif", chances, overwrite=True)
    found = read_image(tmp_path / "a.tif")
    assert found.dtype == np.float16
    assert np.abs(found.astype(np.float32).reshape(shape) - chances).max() < 5e-4


def test_what_is_no_probability(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="probability from -2 to 3; apply softmax or sigmoid first"):
        write_probability(tmp_path / "a.tif", np.array([[-2.0, 3.0]]))
    with pytest.raises(ShapeError, match="probability from nan to nan"):
        write_probability(tmp_path / "a.tif", np.array([[np.nan, 0.5]]))
    with pytest.raises(ShapeError, match="dtype uint8"):
        write_probability(tmp_path / "a.tif", texture(4, 4))


@pytest.mark.parametrize("shape", [(3, 9, 11), (1, 9, 11), (5, 9, 11), (3, 4, 9, 11), (1, 1, 1), (2, 1, 9)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_images_come_back_exactly(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    image = texture(*shape, dtype=dtype)
    names = ["a.tif"]
    if len(shape) == 3 and shape[0] in (1, 3) and dtype.startswith("uint"):
        names.append("a.png")
    for name in names:
        write_image(tmp_path / name, image)
        found = read_image(tmp_path / name)
        assert found.dtype == image.dtype
        np.testing.assert_array_equal(found, image)


def test_jpeg_for_pictures(tmp_path: Path) -> None:
    image = texture(3, 32, 48)
    write_image(tmp_path / "a.jpg", image)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - image).mean() < 10
    with pytest.raises(ShapeError, match="a JPEG holds at most 65535 pixels a side"):
        write_image(tmp_path / "b.jpg", np.zeros((1, 1, 70000), np.uint8))
    assert only(tmp_path, "a.jpg")


def test_nothing_is_replaced_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, texture(4, 4))
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"exists already; choose another name, or allow it with --overwrite"):
        write_png(path, texture(5, 5))
    with pytest.raises(FormatError, match="exists already"):
        write_mask(path, texture(5, 5))
    assert path.read_bytes() == before
    write_png(path, texture(5, 5), overwrite=True)
    assert read_image(path).shape == (1, 5, 5)
    with pytest.raises(FormatError, match="is a folder; give the name of a file"):
        write_json(tmp_path, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), MemoryError(), SystemExit(1)])
def test_any_end_of_the_block_but_a_good_one_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def stop_half_way() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the new")
            file.flush()
            raise error

    with pytest.raises(type(error)):
        stop_half_way()
    assert path.read_bytes() == b"old"
    assert only(tmp_path, "a.bin")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert Path(file.name).parent == tmp_path
    assert path.read_bytes() == b"new"
    assert only(tmp_path, "a.bin")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EFBIG, "raise the file size limit"),
    ],
)
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str, where: str) -> None:
    path = tmp_path / "a.png"
    write_mask(path, np.zeros((2, 2), int))
    before = path.read_bytes()
    monkeypatch.setattr(where, Fail(OSError(number, os.strerror(number))))
    with pytest.raises(FormatError, match=rf"a.png: cannot be written \({os.strerror(number)}\); {remedy}"):
        write_mask(path, np.ones((2, 2), int), overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert only(tmp_path, "a.png")


def test_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    code = (
        f"{limit}\nimport numpy as np\nfrom foveate.errors import FormatError\nfrom foveate.io import write\n"
        "noise = np.random.default_rng(0).random((1, 64, 64)).astype('float32')\n"
        "for call in (lambda: write.write_image('a.tif', noise),\n"
        "             lambda: write.write_json('a.json', list(range(9999))),\n"
        "             lambda: write.append_jsonl('log.jsonl', {'a': 'x' * 3000})):\n"
        "    try: call()\n"
        "    except FormatError as error: assert 'File too large' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    (tmp_path / "a.json").write_text("{}")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)
    assert only(tmp_path, "a.json", "log.jsonl")
    assert (tmp_path / "a.json").read_text() == "{}"
    append_jsonl(tmp_path / "log.jsonl", {"b": 1})
    assert read_jsonl(tmp_path / "log.jsonl") == [{"b": 1}]


def test_errors_of_the_block_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    assert only(tmp_path)


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match=r"No such file or directory\); create the folder first"):
        write_png(tmp_path / "no" / "a.png", texture(4, 4))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FormatError, match=r"Not a directory\); create the folder first"):
        write_png(tmp_path / "file" / "a.png", texture(4, 4))
    with pytest.raises(FormatError, match="cannot be written"):
        write_json(tmp_path / "a\0b", 1)
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):  # the superuser may write everywhere
        monkeypatch.setattr(Path, "open", Fail(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(FormatError, match=r"Permission denied\); write to another folder"):
        write_png(tmp_path / "a.png", texture(4, 4))
    with pytest.raises(FormatError, match=r"Permission denied\); write to another folder"):
        append_jsonl(tmp_path / "a.jsonl", {})
    monkeypatch.undo()
    tmp_path.chmod(0o700)
    assert only(tmp_path, "file")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").stat().st_mode == plain.stat().st_mode


def test_longest_names(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_json_holds_only_what_json_has(tmp_path: Path) -> None:
    value = {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": [float("inf"), (1, None)], 5: tmp_path}
    write_json(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == {"a": 0.5, "b": [0, 1], "c": None, "d": [None, [1, None]], "5": str(tmp_path)}


def test_lines_survive_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    append_jsonl(path, {"step": 3, "loss": float("nan")})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3, "loss": None}]
    write_jsonl(path, [{"a": 1}, {"a": 2}])
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    with pytest.raises(FormatError, match="cannot be read"):
        read_jsonl(tmp_path / "no.jsonl")
