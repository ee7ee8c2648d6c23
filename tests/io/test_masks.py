"""Every way in which people keep masks, and what is refused with which words."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from make_files import npy_bytes, pil_bytes, png_bytes, texture, tiff_bytes
from PIL import Image

from foveate.errors import ConfigError, FormatError
from foveate.io.masks import ClassTable, read_mask

LESIONS = {"MA": "#ffffff", "HE": "#ff0000", "OD": "#FFFF00"}


@pytest.fixture
def save(tmp_path: Path):
    def write(data: bytes, name: str = "mask.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def png(array: np.ndarray) -> bytes:
    return pil_bytes(Image.fromarray(array), "PNG")


@pytest.mark.parametrize(
    ("classes", "names", "expected"),
    [
        ({"tumour": 1, "stroma": 2, "fat": [3, 7]}, ("background", "tumour", "stroma", "fat"), [0, 1, 2, 3, 3]),
        ({"background": 0, "any": ">0"}, ("background", "any"), [0, 1, 1, 1, 1]),
        ({"any": ">=2"}, ("background", "any"), [0, 0, 1, 1, 1]),
        ({"any": "!=3"}, ("background", "any"), [1, 1, 1, 0, 1]),
        ({"low": "< 2", "high": "<= 3"}, ("background", "low", "high"), [1, 1, 2, 2, 0]),
        ({"one": "1", "ignore": [2, 3], "rest": ">3"}, ("background", "one", "rest"), [0, 1, 255, 255, 2]),
        ({"one": 1, "background": [0, 2, 3, 7]}, ("background", "one"), [0, 1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_values(save, classes, names, expected, dtype: str) -> None:
    table = ClassTable(classes)
    assert table.names == names
    assert table.num_classes == len(names)
    values = np.array([[0, 1, 2, 3, 7]], dtype)
    for data in (npy_bytes(values), tiff_bytes(values)):
        labels = read_mask(save(data), table)
        assert labels.dtype == np.uint8
        assert labels.tolist() == [expected]


def test_instances_of_sixteen_bits(save) -> None:
    values = np.zeros((9, 11), np.uint16)
    values[2:4], values[6] = 300, 65535
    np.testing.assert_array_equal(read_mask(save(png(values)), {"nuclei": ">0"}), values > 0)


def test_jpeg_by_threshold(save) -> None:
    truth = np.zeros((48, 64), np.uint8)
    truth[8:24, 16:40] = 255
    for image in (truth, np.stack([truth] * 3, -1)):
        data = pil_bytes(Image.fromarray(image), "JPEG", quality=60)
        assert (read_mask(save(data), {"vessel": ">=128"}) != truth // 255).mean() < 0.01


def test_colours_go_to_the_nearest_within_a_distance(save) -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [250, 8, 3], [255, 255, 0], [255, 0, 255]]], np.uint8)
    path = save(png(colours))
    with pytest.raises(
        FormatError, match=r"values of no class: #ff00ff \(1 pixels\); classes are .*raise max_distance"
    ):
        read_mask(path, LESIONS)
    assert read_mask(path, ClassTable(LESIONS, unknown="ignore")).tolist() == [[0, 1, 2, 3, 255]]
    assert read_mask(path, ClassTable(LESIONS, unknown="background")).tolist() == [[0, 1, 2, 3, 0]]
    assert read_mask(path, ClassTable(LESIONS, max_distance=None)).tolist() == [[0, 1, 2, 3, 1]]
    with pytest.raises(FormatError, match=r"#fa0803 \(1 pixels\)"):
        read_mask(path, ClassTable(LESIONS, max_distance=0))


def test_colours_in_jpeg_palette_and_grey_files(save) -> None:
    truth = np.zeros((32, 48), np.uint8)
    truth[:16, :24], truth[16:, 24:] = 1, 2
    palette = Image.fromarray(truth, "P")
    palette.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0])
    np.testing.assert_array_equal(read_mask(save(pil_bytes(palette, "PNG")), LESIONS), truth)
    jpeg = pil_bytes(palette.convert("RGB"), "JPEG", quality=95, subsampling=0)
    assert (read_mask(save(jpeg), LESIONS) != truth).mean() < 0.01
    np.testing.assert_array_equal(read_mask(save(png((truth == 1) * np.uint8(255))), LESIONS), truth == 1)


def test_palette_gives_its_indices_to_a_table_of_values(save) -> None:
    truth = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(truth, "P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    for kind in ("PNG", "BMP", "GIF", "TIFF"):
        np.testing.assert_array_equal(read_mask(save(pil_bytes(image, kind)), {"a": 1, "b": 2}), truth)


def test_alpha_is_ignored(save) -> None:
    rgba = np.array([[[0, 0, 0, 0], [255, 0, 0, 90]]], np.uint8)
    assert read_mask(save(png(rgba)), LESIONS).tolist() == [[0, 2]]
    grey = np.array([[[0, 0, 0, 0], [1, 1, 1, 90]]], np.uint8)
    assert read_mask(save(png(grey)), {"a": 1}).tolist() == [[0, 1]]


@pytest.mark.parametrize("rule", [1, 255, ">0", ">=128", [1, 2]])
def test_one_bit_is_one_and_255(save, rule) -> None:
    bits = texture(9, 11) > 128
    white = tiff_bytes(bits, photometric="miniswhite")  # what tifffile does with booleans
    for data in (
        pil_bytes(Image.fromarray(bits), "PNG"),
        npy_bytes(bits),
        tiff_bytes(bits, photometric="minisblack"),
        white,
    ):
        np.testing.assert_array_equal(read_mask(save(data), {"a": rule}), bits)


@pytest.mark.parametrize("depth", [2, 4])
def test_few_bits_are_labels(save, depth: int) -> None:
    values = np.arange(8) % 4
    row = b"\0" + int("".join(f"{value:0{depth}b}" for value in values), 2).to_bytes(depth, "big")
    found = read_mask(save(png_bytes(8, 1, depth, 0, row)), {"a": 1, "b": 2, "c": 3})
    np.testing.assert_array_equal(found[0], values)


def test_turned_like_its_image(save) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (texture(9, 11) > 128).astype(np.uint8)
    path = save(pil_bytes(Image.fromarray(values), "PNG", exif=exif))
    np.testing.assert_array_equal(read_mask(path, {"a": 1}, shape=(11, 9)), np.rot90(values, -1))


def test_volume(save) -> None:
    values = texture(5, 9, 11) // 100
    found = read_mask(save(tiff_bytes(values, photometric="minisblack")), {"a": 1, "b": 2}, shape=(5, 9, 11))
    np.testing.assert_array_equal(found, values)


def test_another_size_is_refused(save) -> None:
    path = save(png(np.zeros((9, 11), np.uint8)))
    with pytest.raises(
        FormatError, match=r"mask's size differs from its image's, 9 x 11 against 9 x 12; pair or resize"
    ):
        read_mask(path, {"a": 1}, shape=(9, 12))
    with pytest.raises(FormatError, match="before its EXIF rotation"):
        read_mask(path, {"a": 1}, shape=(11, 9))


def test_unknown_values_are_counted(save) -> None:
    values = np.zeros((9, 11), np.uint8)
    values[0] = range(10, 21)
    values[1, :3], values[2, :2] = 15, 12
    with pytest.raises(FormatError) as caught:
        read_mask(save(png(values)), {"a": 1})
    message = str(caught.value)
    assert "15 (4 pixels), 12 (3 pixels), 10 (1 pixels), 11 (1 pixels), 13 (1 pixels) and 6 more" in message
    assert message.endswith("classes are {'a': 1}: name these values, or set unknown to ignore or background")
    assert (read_mask(save(png(values)), ClassTable({"a": 1}, unknown="ignore"))[0] == 255).all()
    assert not read_mask(save(png(values)), ClassTable({"a": 1}, unknown="background")).any()


def test_masks_that_the_table_does_not_fit(save) -> None:
    path = save(png(texture(9, 11, 3)))
    with pytest.raises(FormatError, match=r"is coloured, but the classes are values .*declare colours"):
        read_mask(path, {"a": ">0"})
    with pytest.raises(FormatError, match="holds 1 channels of uint16, but the classes are colours"):
        read_mask(save(png(texture(9, 11, dtype="uint16"))), LESIONS)
    with pytest.raises(FormatError, match="is a mask of 5 channels"):
        read_mask(save(npy_bytes(texture(5, 9, 11))), {"a": 1}, axes="CHW")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "0 classes beside background"),
        ({"background": 0}, "0 classes beside background"),
        ({"a": "red"}, "class 'a' has the rule 'red'; give a value, a list"),
        ({"a": None}, "class 'a' has the rule None"),
        ({"a": True}, "class 'a' has the rule True"),
        ({"a": 1, "b": "#ff0000"}, "mix values and colours"),
        ({"a": 1, "b": [2, 1.0]}, "declared twice"),
        ({"a": "#FF0000", "b": "#ff0000"}, "declared twice"),
        ({f"c{i}": i + 1 for i in range(300)}, "300 classes beside background"),
    ],
)
def test_tables_that_make_no_sense(classes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassTable(classes)


def test_policies_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="unknown='skip' is no policy; give 'error', 'ignore' or 'background'"):
        ClassTable({"a": 1}, unknown="skip")
    with pytest.raises(ConfigError, match=r"max_distance=-1 is below 0"):
        ClassTable(LESIONS, max_distance=-1)


def test_memory_does_not_grow_with_the_classes(save) -> None:
    height, width = 1500, 2000
    colours = np.random.default_rng(0).integers(0, 256, (60, 3))
    classes = {f"c{i}": "#{:02x}{:02x}{:02x}".format(*colour) for i, colour in enumerate(colours)}
    blocks = np.repeat(np.repeat(np.arange(60).reshape(6, 10), height // 6, 0), width // 10, 1)
    path = save(png(colours[blocks].astype(np.uint8)))
    table = ClassTable(classes)
    tracemalloc.start()
    labels = read_mask(path, table)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(labels, blocks + 1)
    assert peak < height * width * 8 + 2**26, "a few copies and the table of colours, not one array per class"
