"""Megapixel digits: five digits somewhere in a large black image, among noise; what is asked is what they are.

The digits are MNIST's where its files are given, and drawn otherwise. Nothing but the pixels that are not black is ever
held, so that an image of any side costs what is in it.

Legend: M digits to draw from, S side of a digit, G digits in an image.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray

from foveate.errors import BudgetError, ConfigError
from foveate.geometry.rings import Polygons
from foveate.io.geojson import write_geojson
from foveate.io.guard import bad_file
from foveate.io.sparse_image import SparseRaster, write_sparse
from foveate.io.write import atomic_write, write_jsonl, write_png
from foveate.testing.glyphs import NUM_DIGITS, draw_digits, draw_strokes

SIDE = 28
NUM_HIDDEN, NUM_MAJORITY = 5, 3
SPLITS = ("train", "val", "test")
_MOST_TRIES = 200  # at a free place for one more picture


@dataclass(frozen=True, eq=False)
class DigitBank:
    """Pictures of digits to draw from.

    Args:
        images: bright on black.
        labels: 0 to 9.
    """

    images: UInt8[np.ndarray, "M S S"]
    labels: UInt8[np.ndarray, " M"]

    def part(self, start: int, stop: int) -> "DigitBank":
        """The digits from ``start`` to before ``stop``, so that splits share none."""
        return DigitBank(self.images[start:stop], self.labels[start:stop])


@dataclass(frozen=True, eq=False)
class MegapixelDigits:
    """One image with its exact truth.

    Args:
        pixels: the image, a source; `foveate.geometry.patch_source.GridPatches` cuts it.
        digits: class of each hidden digit, from top to bottom.
        boxes: where each lies, (start, stop) in pixels.
    """

    pixels: SparseRaster
    digits: Int64[np.ndarray, " G"]
    boxes: Int64[np.ndarray, "G 2 2"]

    @property
    def labels(self) -> dict[str, Any]:
        """The four tasks: ``majority`` and ``max`` class, that of the ``top`` digit, ``multi`` every class there is."""
        return {**bag_labels(self.digits), "top": int(self.digits[0])}


def bag_labels(digits: Int64[np.ndarray, " G"]) -> dict[str, Any]:
    """What is asked of a bag of digits whatever their places: ``majority``, ``max``, and ``multi`` in rising order."""
    majority = int(np.bincount(digits).argmax())
    return {"majority": majority, "max": int(digits.max()), "multi": tuple(np.unique(digits).tolist())}


def hidden_digits(rng: np.random.Generator) -> Int64[np.ndarray, " G"]:
    """Five classes in random order: three of one, two of others."""
    majority = int(rng.integers(NUM_DIGITS))
    others = (majority + rng.integers(1, NUM_DIGITS, NUM_HIDDEN - NUM_MAJORITY)) % NUM_DIGITS
    return rng.permutation(np.concatenate([np.full(NUM_MAJORITY, majority), others])).astype(np.int64)


def digit_image(
    seed: int, side: int = 1500, digits: DigitBank | None = None, noise: int = 50, *, scale_noise: bool = False
) -> MegapixelDigits:
    """Hide five digits, three of them of one class, in a black square among line noise.

    Args:
        seed: any integer >= 0; equal seeds give equal images.
        side: of the image in pixels, such as 1,500 to 12,000.
        digits: where the digits are from; drawn where there are none.
        noise: patterns of random lines, of the size of a digit.
        scale_noise: True takes ``noise`` for an image of 1,500 pixels a side and as many per area for any other.

    Returns:
        The image, sparse, and where its digits are. No two pictures in it overlap.

    Raises:
        BudgetError: the image is too small for what it shall hold, or ``digits`` lacks a class.

    Cost: 10 ms with 50 patterns, whatever the side.
    Source: the megapixel MNIST of Katharopoulos and Fleuret, ICML 2019, in the setting of Bergner et al., ICLR 2023.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    if scale_noise:
        noise = round(noise * (side / 1500) ** 2)
    classes = hidden_digits(rng)
    pictures = np.concatenate([_pictures(rng, classes, digits), draw_strokes(rng, noise, SIDE, 3)])
    corner = _free_places(rng, len(pictures), side)
    top = np.argsort(corner[:NUM_HIDDEN] @ np.array([side, 1]))
    boxes = corner[:NUM_HIDDEN][top][:, None] + np.array([[[0], [SIDE]]])
    which, y, x = np.nonzero(pictures)
    index = (corner[which, 0] + y) * side + corner[which, 1] + x
    order = np.argsort(index)
    pixels = SparseRaster((side, side), index[order], pictures[which, y, x][order])
    return MegapixelDigits(pixels, classes[top], np.broadcast_to(boxes, (NUM_HIDDEN, 2, 2)).copy())


def _pictures(rng: np.random.Generator, classes: NDArray[np.int64], bank: DigitBank | None) -> NDArray[np.uint8]:
    if bank is None:
        return draw_digits(rng, classes, SIDE)
    chosen = []
    for digit in classes:
        alike = np.flatnonzero(bank.labels == digit)
        if not len(alike):
            raise BudgetError(f"no digit {digit} among the {len(bank.labels)} given; give every class from 0 to 9")
        chosen.append(int(alike[rng.integers(len(alike))]))
    return bank.images[chosen]


def _free_places(rng: np.random.Generator, count: int, side: int) -> NDArray[np.int64]:
    """First pixels of as many squares that do not overlap."""
    taken = np.zeros((count, 2), np.int64)
    for placed in range(count):
        for _ in range(_MOST_TRIES):
            corner = rng.integers(0, max(1, side - SIDE + 1), 2)
            if not bool((np.abs(taken[:placed] - corner) < SIDE).all(axis=1).any()):
                break
        else:
            corner = np.full(2, side)
        if side < SIDE or corner[0] == side:
            raise BudgetError(
                f"side={side} is too small for {count} pictures of {SIDE} pixels; raise it or lower noise"
            )
        taken[placed] = corner
    return taken


def read_idx(path: str | Path) -> UInt8[np.ndarray, "*S"]:
    """Reads an IDX file of bytes, plain or compressed with gzip, as MNIST is stored.

    Raises:
        FormatError: it cannot be read, or is no such file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise bad_file(path, f"cannot be read ({error}); fetch the file again") from None
    num_axes = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(data, ">u4", num_axes, 4).tolist()) if len(data) >= 4 + 4 * num_axes else ()
    if not num_axes or len(data) - 4 - 4 * num_axes != int(np.prod(shape)):
        raise bad_file(path, f"is no IDX file of bytes (it begins with {data[:4]!r}); give MNIST's own files")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def read_mnist(images: str | Path, labels: str | Path) -> DigitBank:
    """Reads the two IDX files of MNIST.

    Raises:
        FormatError: a file cannot be read, they hold no pictures of 28 x 28, or not one label each.
    """
    pictures, classes = read_idx(images), read_idx(labels)
    if pictures.ndim != 3 or pictures.shape[1:] != (SIDE, SIDE) or classes.shape != pictures.shape[:1]:
        raise bad_file(
            Path(images),
            f"holds {pictures.shape} for labels {classes.shape}; give pictures of 28 x 28 and a label each",
        )
    return DigitBank(pictures, classes)


def write_digits(
    folder: str | Path,
    counts: tuple[int, int, int],
    side: int = 1500,
    *,
    seed: int = 0,
    digits: Sequence[DigitBank] | None = None,
    noise: int = 50,
    scale_noise: bool = False,
    form: str = "sparse",
) -> Path:
    """Write a data set: ``images/``, ``marks/`` (where the digits lie, as GeoJSON), ``labels.csv`` (path, four labels,
    marks, split) and ``truth.jsonl`` (digits, boxes).

    Args:
        folder: made where it does not exist.
        counts: images to train, to validate and to test.
        side: as in `digit_image`, as are ``noise`` and ``scale_noise``.
        seed: of the set; every image has a seed of its own.
        digits: where the digits of each of the three parts are from, see `split_bank`; drawn where there are none.
        form: ``"sparse"`` or ``"png"``.

    Returns:
        The CSV.

    Raises:
        ConfigError: another form.
        FormatError: a file exists or cannot be written.
    """
    if form not in ("sparse", "png"):
        raise ConfigError(f"form={form!r} must be 'sparse' or 'png'")
    root = Path(folder)
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows, truth = ["path,majority,max,top,multi,marks,split"], []
    banks = digits or (None, None, None)
    for part, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
        for number in range(count):
            drawn = digit_image((seed * 3 + part) * 10**7 + number, side, banks[part], noise, scale_noise=scale_noise)
            name = f"images/{split}-{number:05d}.{'png' if form == 'png' else 'safetensors'}"
            if form == "png":
                write_png(root / name, drawn.pixels.read(((0, 0), (side, side))))
            else:
                write_sparse(root / name, drawn.pixels)
            found = drawn.labels
            multi = ";".join(map(str, found["multi"]))
            marks = write_marks(root, f"{split}-{number:05d}", drawn.boxes, "digit")
            rows.append(f"{name},{found['majority']},{found['max']},{found['top']},{multi},{marks},{split}")
            truth.append({"path": name, "digits": drawn.digits, "boxes": drawn.boxes})
    write_jsonl(root / "truth.jsonl", truth)
    with atomic_write(root / "labels.csv") as file:
        file.write(("\n".join(rows) + "\n").encode())
    return root / "labels.csv"


def write_marks(root: Path, name: str, boxes: Int64[np.ndarray, "G 2 2"], kind: str) -> str:
    """Write boxes as GeoJSON into ``marks/`` of a data set, as outlines that somebody drew.

    Args:
        root: folder of the set.
        name: of the image.
        boxes: (start, stop) in pixels.
        kind: class of all of them.

    Returns:
        The path below the root.

    Raises:
        FormatError: the file exists or cannot be written.
    """
    (root / "marks").mkdir(exist_ok=True)
    path = f"marks/{name}.geojson"
    outlines = [np.array([(y, x), (y, right), (bottom, right), (bottom, x)]) for (y, x), (bottom, right) in boxes]
    write_geojson(root / path, Polygons.of((1, [ring.astype(np.int32)]) for ring in outlines), ["background", kind])
    return path


def split_bank(digits: DigitBank, test: DigitBank | None = None) -> tuple[DigitBank, DigitBank, DigitBank]:
    """The digits to train on, to validate and to test with, 64, 16 and 20 % of them in order, none in two parts.

    With digits ``test`` of their own, those are tested with, and the others are shared 80 to 20.
    """
    total = len(digits.labels)
    last = total if test is not None else total * 4 // 5
    return digits.part(0, last * 4 // 5), digits.part(last * 4 // 5, last), test or digits.part(last, total)
