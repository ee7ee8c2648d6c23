"""What read_image returns for every meaning that stored numbers can have."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from make_files import npy_bytes, pil_bytes, png_bytes, png_chunk, texture, tiff_bytes
from PIL import Image, ImageOps

from foveate.errors import ConfigError, FormatError
from foveate.io.image import read_image


@pytest.fixture
def save(tmp_path: Path):
    def write(data: bytes, name: str = "file.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 17)])
def test_grey_and_colour_are_exact(save, kind: str, shape: tuple[int, int]) -> None:
    grey, rgb = texture(*shape), texture(*shape, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind not in ("WEBP", "GIF"):
        np.testing.assert_array_equal(read_image(save(pil_bytes(Image.fromarray(grey), kind))), grey[None])
    if kind != "GIF":
        found = read_image(save(pil_bytes(Image.fromarray(rgb), kind, **options)))
        np.testing.assert_array_equal(found, rgb.transpose(2, 0, 1))
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous


def test_jpeg_is_what_pillow_shows(save) -> None:
    data = pil_bytes(Image.fromarray(texture(21, 34, 3)), "JPEG")
    shown = np.asarray(Image.open(save(data)))
    np.testing.assert_array_equal(read_image(save(data)), shown.transpose(2, 0, 1))


def test_name_does_not_choose_the_reader(save) -> None:
    grey = texture(7, 8)
    path = save(pil_bytes(Image.fromarray(grey), "PNG"), "wrong.jpg")
    np.testing.assert_array_equal(read_image(str(path)), grey[None])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_and_npy_keep_every_dtype(save, dtype: str, order: str) -> None:
    array = texture(9, 11, dtype=dtype)
    stored = array.astype(array.dtype.newbyteorder(order))
    for data in (npy_bytes(stored), tiff_bytes(stored, byteorder=order, compression="zlib")):
        found = read_image(save(data))
        assert found.dtype == np.dtype(dtype)
        assert found.dtype.isnative
        np.testing.assert_array_equal(found[0], array)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_is_not_cut_to_eight(save, channels: int) -> None:
    array = texture(9, 11, channels, dtype="uint16")
    if channels in (2, 4):
        array[..., -1] = 65535
    found = read_image(save(bytes(imagecodecs.png_encode(array.squeeze(-1) if channels == 1 else array))))
    np.testing.assert_array_equal(found, array.transpose(2, 0, 1)[: 1 if channels < 3 else 3])


@pytest.mark.parametrize(("depth", "factor"), [(1, 255), (2, 85), (4, 17)])
def test_few_bits_are_spread_over_the_range_of_a_byte(save, depth: int, factor: int) -> None:
    values = np.arange(8) % 2**depth
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    found = read_image(save(png_bytes(8, 1, depth, 0, row)))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, 0], values * factor)


def test_boolean_and_white_is_zero_tiff(save) -> None:
    bits = texture(9, 11) > 128
    for data in (
        tiff_bytes(bits, photometric="minisblack"),
        npy_bytes(bits),
        tiff_bytes(~bits, photometric="miniswhite"),
    ):
        found = read_image(save(data))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[0], bits * 255)
    grey = texture(9, 11, dtype="uint16")
    np.testing.assert_array_equal(read_image(save(tiff_bytes(grey, photometric="miniswhite")))[0], 65535 - grey)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_palette_becomes_rgb(save, kind: str) -> None:
    picture = Image.fromarray(texture(9, 11, 3)).quantize(16)
    found = read_image(save(pil_bytes(picture, kind)))
    np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha(save, kind: str) -> None:
    rgba = texture(9, 11, 4)
    rgba[..., 3] = 255
    np.testing.assert_array_equal(
        read_image(save(pil_bytes(Image.fromarray(rgba), kind))), rgba[..., :3].transpose(2, 0, 1)
    )
    rgba[..., 1:3] = rgba[..., :1]  # grey stored as colours, as microscope exports do
    np.testing.assert_array_equal(read_image(save(pil_bytes(Image.fromarray(rgba), kind))), rgba[None, ..., 0])
    rgba[:4, :, 3], rgba[0] = 0, [10, 20, 30, 128]
    found = read_image(save(pil_bytes(Image.fromarray(rgba), kind)))
    assert (found[:, 1:4] == 255).all(), "transparent is white"
    np.testing.assert_array_equal(found[:, 0, 0], [132, 137, 142])
    la = texture(9, 11, 2)
    la[..., 1] = 255
    np.testing.assert_array_equal(read_image(save(pil_bytes(Image.fromarray(la, "LA"), "PNG"))), la[None, ..., 0])


def test_transparent_palette_entry_is_white(save) -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = read_image(save(pil_bytes(picture, "PNG", transparency=1)))
    assert found[:, 0, 1].tolist() == [255, 255, 255]
    assert found[:, 0, 0].tolist() == [255, 0, 0]


def test_premultiplied_alpha_of_a_tiff(save) -> None:
    rgba = np.array([[[10, 20, 30, 128], [7, 8, 9, 255]]], np.uint8)
    found = read_image(save(tiff_bytes(rgba, photometric="rgb", extrasamples=["assocalpha"])))
    assert found[:, 0].T.tolist() == [[137, 147, 157], [7, 8, 9]]


def test_fourth_channel_that_is_no_alpha_stays(save) -> None:
    array = texture(4, 9, 11)
    data = tiff_bytes(array, photometric="minisblack", planarconfig="separate", metadata={"axes": "CYX"})
    np.testing.assert_array_equal(read_image(save(data)), array)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(save, kind: str) -> None:
    inks = Image.fromarray(texture(16, 24, 3)).convert("CMYK")
    found = read_image(save(pil_bytes(inks, kind)))
    shown = np.asarray(inks.convert("RGB")).transpose(2, 0, 1)
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).max() <= (1 if kind == "TIFF" else 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_orientation_is_applied(save, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(pil_bytes(Image.fromarray(texture(16, 24, 3)), kind, exif=exif))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(path), upright)


def test_unreadable_exif_counts_as_none(save) -> None:
    grey = Image.fromarray(texture(8, 8))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"garbage"):
        assert read_image(save(pil_bytes(grey, "JPEG", exif=exif))).shape == (1, 8, 8)
    chunk = png_chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0")
    assert read_image(save(png_bytes(2, 1, 8, 0, b"\0ab", chunk))).shape == (1, 1, 2)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_colour_tiff_of_any_layout(save, planar: str, tile: tuple[int, int] | None, dtype: str) -> None:
    rgb = texture(3, 21, 34, dtype=dtype)
    stored = rgb.transpose(1, 2, 0) if planar == "contig" else rgb
    data = tiff_bytes(stored, photometric="rgb", planarconfig=planar, tile=tile, compression="zlib")
    np.testing.assert_array_equal(read_image(save(data)), rgb)


def test_jpeg_in_tiff_is_rgb(save) -> None:
    rgb = texture(64, 48, 3)
    found = read_image(save(tiff_bytes(rgb, photometric="rgb", tile=(16, 16), compression="jpeg")))
    assert np.abs(found.astype(int) - rgb.transpose(2, 0, 1)).mean() < 12


def test_stack_of_equal_pages_is_a_volume(save) -> None:
    volume = texture(5, 9, 11, dtype="uint16")
    data = tiff_bytes(volume, photometric="minisblack")
    np.testing.assert_array_equal(read_image(save(data)), volume[None])
    np.testing.assert_array_equal(read_image(save(data), axes="CHW"), volume)
    plain = tiff_bytes(volume, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(read_image(save(plain)), volume[None])
    colour = texture(5, 9, 11, 3)
    np.testing.assert_array_equal(read_image(save(tiff_bytes(colour, photometric="rgb"))), colour.transpose(3, 0, 1, 2))


@pytest.mark.parametrize("options", [{"ome": True}, {"imagej": True}, {}])
def test_named_axes_are_respected(save, options: dict[str, bool]) -> None:
    stored = texture(3, 2, 9, 11, dtype="uint16")  # Z, C
    data = tiff_bytes(stored, photometric="minisblack", metadata={"axes": "ZCYX"}, **options)
    np.testing.assert_array_equal(read_image(save(data)), stored.transpose(1, 0, 2, 3))


def test_reduced_pages_are_not_a_second_image(tmp_path: Path) -> None:
    path, image = tmp_path / "pyramid.tif", texture(64, 64)
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, subifds=1, metadata=None)
        writer.write(image[::2, ::2], subfiletype=1, metadata=None)
        writer.write(image[::4, ::4], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_image(path), image[None])


@pytest.mark.parametrize(
    ("shape", "axes", "order"),
    [
        ((9, 11), None, "HW"),
        ((3, 9, 11), None, "CHW"),
        ((9, 11, 3), None, "HWC"),
        ((3, 9, 3), None, "CHW"),
        ((7, 9, 11), None, "DHW"),
        ((2, 7, 9, 11), None, "CDHW"),
        ((7, 9, 11, 2), None, "DHWC"),
        ((3, 9, 11), "DHW", "DHW"),
        ((7, 9, 11), "CHW", "CHW"),
        ((7, 9, 11), "WHD", "WHD"),
        ((7, 9, 6, 11), "HWDC", "HWDC"),
    ],
)
def test_axes_of_npy(save, shape: tuple[int, ...], axes: str | None, order: str) -> None:
    array = texture(*shape)
    named, names = (array, order) if "C" in order else (array[None], "C" + order)
    expected = named.transpose([names.index(axis) for axis in "CDHW" if axis in names])
    np.testing.assert_array_equal(read_image(save(npy_bytes(array)), axes=axes), expected)
    fortran = npy_bytes(np.asfortranarray(array))
    np.testing.assert_array_equal(read_image(save(fortran), axes=axes), expected)


def test_axes_that_make_no_sense(save) -> None:
    path = save(npy_bytes(texture(7, 8, 9)))
    with pytest.raises(ConfigError, match=r"axes='HWX' must name H and W"):
        read_image(path, axes="HWX")
    with pytest.raises(FormatError, match=r"has 3 axes \(7, 8, 9\), but axes='HW' names 2"):
        read_image(path, axes="HW")
    with pytest.raises(FormatError, match="no end of it looks like channels; say axes="):
        read_image(save(npy_bytes(texture(5, 6, 7, 8))))


def test_memory_does_not_depend_on_the_process_limit_of_pillow(save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # its warning would be an error here
    assert read_image(save(pil_bytes(Image.fromarray(texture(40, 40)), "PNG"))).shape == (1, 40, 40)
    assert read_image(save(pil_bytes(Image.fromarray(texture(40, 40)), "JPEG"))).shape == (1, 40, 40)
