"""Damaged, lying and dangerous files: refused in words, before they cost anything."""

import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_files import containers, flipped, npy_bytes, pil_bytes, png_bytes, texture, tiff_bytes, tiff_header
from PIL import Image

from foveate.errors import FormatError, FoveateError
from foveate.io.image import read_image
from foveate.io.masks import read_mask

FILES = containers()
CHECKED = ("png-grey", "png-palette", "png-rgb16", "tiff-deflate")  # formats whose pixels carry check sums
MOST = 2**22


@pytest.fixture
def save(tmp_path: Path):
    def write(data: bytes, name: str = "file.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def refused(path: Path, **options) -> str:
    with pytest.raises(FormatError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable(), "one line, no control characters"
    return message


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", FILES)
def test_truncation_is_never_silent(save, kind: str, share: float) -> None:
    assert read_image(save(FILES[kind])).size
    message = refused(save(FILES[kind][: int(len(FILES[kind]) * share)], f"{kind}.bin"))
    assert any(word in message for word in ("truncated", "no image")), message


def attempt(read, path: Path):
    """The array, or None where the file was refused in one line."""
    try:
        return read(path)
    except FoveateError as error:
        return None if str(error).isprintable() else pytest.fail(f"not one line: {error}")


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bytes_are_refused_or_read_never_a_crash(save, kind: str) -> None:
    healthy, silent = read_image(save(FILES[kind])), 0
    for data in flipped(FILES[kind], 40, seed=7):
        found = attempt(lambda path: read_image(path, max_pixels=MOST), save(data))
        if found is not None and (found.dtype, found.shape) == (healthy.dtype, healthy.shape):
            silent += bool((found != healthy).any())
    if kind in CHECKED:
        assert silent == 0, "a check sum must notice"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_many_flipped_bytes(save, kind: str) -> None:
    for data in flipped(FILES[kind], 1100, seed=11):
        path = save(data)
        attempt(lambda path: read_image(path, max_pixels=MOST), path)
        attempt(lambda path: read_mask(path, {"a": ">0"}, max_pixels=MOST), path)


def lying_bmp() -> bytes:
    data = pil_bytes(Image.fromarray(texture(8, 8)), "BMP")
    return data[:18] + struct.pack("<ii", 10**6, 10**6) + data[26:]


def lying_jpeg() -> bytes:
    data = pil_bytes(Image.fromarray(texture(8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65000, 65000) + data[at + 4 :]


def lying_gif() -> bytes:
    data = pil_bytes(Image.fromarray(texture(8, 8)), "GIF")
    return data.replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 65000, 65000))


def lying_npy() -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)})
    return buffer.getvalue() + bytes(100)


BOMBS = {
    "png": png_bytes(10**6, 10**6, 8, 0, b""),
    "png-rgb16": png_bytes(10**6, 10**6, 16, 2, b""),
    "png-largest": png_bytes(2**31 - 1, 2**31 - 1, 8, 6, b""),
    "tiff": tiff_header(10**6, 10**6),
    "tiff-2^31": tiff_header(2**31, 2**31),
    "bigtiff": tiff_header(2**40, 2**40, big=True),
    "bmp": lying_bmp(),
    "jpeg": lying_jpeg(),
    "gif": lying_gif(),
    "npy": lying_npy(),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_by_their_header(save, kind: str) -> None:
    message = refused(save(BOMBS[kind]))
    assert "above the limit of 268435456 pixels; if you trust the file, pass --max-pixels " in message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for kind, data in BOMBS.items():
        (tmp_path / f"{kind}.bin").write_bytes(data)
    code = (
        "import re, pathlib, tifffile, imagecodecs\nfrom foveate.io.image import read_image\n"
        "from foveate.errors import FormatError\n"
        "status = pathlib.Path('/proc/self/status')\n"  # of this program alone; getrusage remembers its parent's peak
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status.read_text())[1])\nbase = peak()\n"
        "for path in sorted(pathlib.Path().iterdir()):\n"
        "    try: read_image(path)\n"
        "    except FormatError: pass\n"
        "    else: raise SystemExit(path)\n"
        "print((peak() - base) // 1024)\n"
    )
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert int(done.stdout) < 100, "MB above the start"


def test_limit_can_be_raised_and_lowered(save) -> None:
    path = save(npy_bytes(texture(30, 30)))
    assert "declares 30 x 30 pixels of 1 channel, above the limit of 899 pixels" in refused(path, max_pixels=899)
    assert "pass --max-pixels 900 (max_pixels=900)" in refused(path, max_pixels=899)
    assert read_image(path, max_pixels=900).shape == (1, 30, 30)
    many = save(npy_bytes(texture(10, 20, 20)))
    assert "20 x 20 pixels of 10 channels, above the limit of 400 pixels" in refused(many, axes="CHW", max_pixels=400)
    assert read_image(many, axes="CHW", max_pixels=1000).shape == (10, 20, 20)
    assert "above the limit" in refused(many, axes="DHW", max_pixels=3999)


def test_tiff_that_runs_in_a_circle_or_has_no_end(save) -> None:
    assert "the pages run in a circle" in refused(save(tiff_header(8, 1, next_page=16)))
    page = tiff_header(8, 1)[16:]
    ends = [16 + (index + 1) * len(page) for index in range(70000)]
    chain = b"".join(page[:-4] + struct.pack("<I", end) for end in ends)
    assert "more than 65536 pages" in refused(save(tiff_header(8, 1)[:16] + chain))


def test_files_that_are_no_image(save, tmp_path: Path) -> None:
    assert "is empty (0 bytes)" in refused(save(b"", "empty.png"))
    assert "is no image that we read (it begins with b'hello" in refused(save(b"hello, I am text", "text.png"))
    assert "is no image" in refused(save(b"PK\3\4 an archive", "archive.npy"))
    assert "cannot be read (No such file or directory); check the path" in refused(tmp_path / "missing.png")
    assert "cannot be read (Is a directory)" in refused(tmp_path)
    with pytest.raises(FormatError, match=r"a\?b: cannot be read \(embedded null byte\)"):
        read_image(tmp_path / "a\0b")
    with pytest.raises(FormatError, match=r"a\?\[31mb: cannot be read"):
        read_image(tmp_path / "a\x1b[31mb")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused_with_the_number_of_frames(save, kind: str) -> None:
    frames = [Image.fromarray(texture(9, 9, seed=seed)) for seed in range(4)]
    message = refused(save(pil_bytes(frames[0], kind, save_all=True, append_images=frames[1:])))
    assert message.endswith("is animated (4 frames); save the frame that you mean as PNG")
    assert read_image(save(pil_bytes(frames[0].convert("L"), kind))).shape[1:] == (9, 9)


def test_tiff_of_different_images_or_times(save) -> None:
    buffer = BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(texture(9, 9))
        writer.write(texture(19, 9))
    assert "holds 2 different images (9x9, 19x9); save each as its own file" in refused(save(buffer.getvalue()))
    film = tiff_bytes(texture(3, 9, 9), ome=True, photometric="minisblack", metadata={"axes": "TYX"})
    assert "holds 3 time points (axes TYX); save one image or volume per file" in refused(save(film))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_that_are_not_finite_are_counted(save, dtype: str) -> None:
    array = texture(9, 11, dtype=dtype)
    array[0, :3] = [np.nan, np.inf, -np.inf]
    for data in (npy_bytes(array), tiff_bytes(array, compression="zlib")):
        message = refused(save(data))
        assert message.endswith("holds 3 values that are NaN or infinite; replace them before reading")
        with pytest.raises(FormatError, match="holds 3 values that are NaN"):
            read_mask(save(data), {"a": ">0"})


def test_arrays_that_are_no_pixels(save) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("unpickled",))

    trap = npy_bytes(np.array([[Trap()]], dtype=object), allow_pickle=True)
    assert "holds object values; save integers or floats" in refused(save(trap))
    assert "holds complex128 values" in refused(save(npy_bytes(np.ones((3, 3), complex))))
    assert "holds <U1 values" in refused(save(npy_bytes(np.full((3, 3), "a"))))
    for shape in ((5,), (1, 1, 2, 3, 4), ()):
        assert "save 2 to 4 axes" in refused(save(npy_bytes(np.zeros(shape, np.uint8))))
    assert "every side must be at least 1" in refused(save(npy_bytes(np.zeros((0, 5), np.uint8))))


def test_block_that_lies_about_its_tile(save) -> None:
    data = bytearray(tiff_bytes(texture(20, 20), tile=(16, 16), compression="zlib", metadata=None))
    at = data.index(struct.pack("<HHI", 322, 4, 1)) if struct.pack("<HHI", 322, 4, 1) in data else -1
    at = at if at >= 0 else data.index(struct.pack("<HHI", 322, 3, 1))
    for offset in (0, 12):
        data[at + offset : at + offset + 12] = struct.pack("<HHII", 322 + offset // 12, 4, 1, 2**20)
    message = refused(save(bytes(data)))
    assert "declares tiles of" in message or "truncated or corrupt" in message


def test_constant_and_smallest_images_are_read(save) -> None:
    for shape in ((1, 1), (1, 37), (41, 1), (64, 64)):
        constant = np.full(shape, 7, np.uint8)
        for data in (npy_bytes(constant), tiff_bytes(constant), pil_bytes(Image.fromarray(constant), "PNG")):
            np.testing.assert_array_equal(read_image(save(data)), constant[None])
