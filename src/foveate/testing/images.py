"""Seeded synthetic images with exact masks, for the demo, the tests and the benchmarks.

Sparse bright structures of very different sizes (cells, lesions, vessels) lie on quiet and noisy ground, among
distractors that are as bright: blobs out of focus, cells of another stain, dust. Only numpy's PCG64 and operations that
IEEE 754 rounds exactly are used, so that a seed means the same image on every machine.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from foveate.errors import BudgetError, ShapeError

GROUND = (58.0, 44.0, 62.0)
STAIN = (214.0, 148.0, 176.0)
VESSEL = (206.0, 122.0, 128.0)
OTHER_STAIN = (150.0, 170.0, 206.0)
_MIN_SIDE = 16

Windows = tuple[slice, ...]
Array = NDArray[np.float32]


def synthetic_image(
    size: int | Sequence[int],
    seed: int,
    *,
    num_dims: int = 2,
    coverage: float = 0.03,
    noise: float = 5.0,
    num_classes: int = 2,
) -> tuple[UInt8[np.ndarray, "3 *S"], UInt8[np.ndarray, "*S"]]:
    """Draw one tissue-like image and its exact mask.

    A threshold alone does not solve it: distractors and uneven light are as bright as the structures.

    Args:
        size: side in pixels (at least 16), or the spatial shape.
        seed: any integer >= 0; equal seeds give equal images on every machine.
        num_dims: 2 or 3, when ``size`` is one number.
        coverage: fraction of the pixels that structures cover, in (0, 0.5]; met to within the last structure.
        noise: half-width of the sensor noise, in grey values of 255.
        num_classes: 2 (background, structure) or 3 (background, cell or lesion, vessel).

    Returns:
        The image, and the labels 0 .. ``num_classes - 1``.

    Raises:
        ShapeError: a side below 16, or not two or three of them.
        BudgetError: a coverage or a class count outside its range.

    Cost: about 0.2 s for 1024 x 1024.
    """
    shape = (int(size),) * num_dims if isinstance(size, int) else tuple(int(side) for side in size)
    if len(shape) not in (2, 3) or min(shape) < _MIN_SIDE:
        raise ShapeError(
            f"size {shape}: two or three sides of at least {_MIN_SIDE} pixels are possible; use a larger size"
        )
    if not 0 < coverage <= 0.5:
        raise BudgetError(f"coverage={coverage} must lie in (0, 0.5]; 0.03 is sparse")
    if num_classes not in (2, 3):
        raise BudgetError(f"num_classes={num_classes} must be 2, or 3 to tell vessels from cells")
    rng = np.random.Generator(np.random.PCG64(seed))
    image = _ground(rng, shape)
    labels = np.zeros(shape, np.uint8)
    _distractors(rng, image)
    wanted = coverage * labels.size
    _vessels(rng, image, labels, 0.3 * wanted, num_classes - 1)
    side = min(shape)
    _cells(rng, image, labels, 0.7 * wanted, (max(side / 60, 5.0), max(side / 15, 6.0)))
    _cells(rng, image, labels, wanted, (4.5, max(side / 70, 5.5)))
    return _expose(rng, image, noise), labels


def write_dataset(folder: str | Path, num_images: int, size: int, seed: int, *, num_classes: int = 2) -> Path:
    """Write ``images/000.png``, ... and ``masks/000.png``, ... and return the folder; image i has seed ``seed + i``.

    The masks hold the class values 0, 1, ... themselves.
    """
    from foveate.io.write import write_mask, write_png

    root = Path(folder)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        image, labels = synthetic_image(size, seed + index, num_classes=num_classes)
        write_png(root / "images" / f"{index:03d}.png", image, overwrite=True)
        write_mask(root / "masks" / f"{index:03d}.png", labels, overwrite=True)
    return root


def _lerp_field(rng: np.random.Generator, shape: Sequence[int], cells: float) -> Array:
    """A smooth random field in [0, 1]: values on a grid, ``cells`` along the longest side, joined by straight lines."""
    step = max(max(shape) / cells, 1.0)
    coarse = tuple(int(side / step) + 2 for side in shape)
    field: Array = rng.integers(0, 256, coarse).astype(np.float32) / np.float32(255)
    for axis, side in enumerate(shape):
        place = np.arange(side, dtype=np.float32) / np.float32(step)
        low = place.astype(np.int64)
        weight = (place - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        below = np.take(field, low, axis)
        field = below + (np.take(field, low + 1, axis) - below) * weight
    return field


def _ground(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Uneven light on a dark ground, with regions of fine speckle between quiet ones."""
    light = 26 * _lerp_field(rng, shape, 3.0) + 14 * _lerp_field(rng, shape, 11.0) + 8 * _lerp_field(rng, shape, 40.0)
    region = np.clip(6 * _lerp_field(rng, shape, 4.0) - 3.6, 0, 1)
    speckle = rng.integers(-26, 27, shape, dtype=np.int8).astype(np.float32)
    light += region * speckle
    return np.stack([np.float32(base) + light * np.float32(0.7 + base / 200) for base in GROUND])


def _expose(rng: np.random.Generator, image: Array, noise: float) -> UInt8[np.ndarray, "3 *S"]:
    """Multiply by uneven light, add sensor noise of triangular shape, and round to bytes."""
    shape = image.shape[1:]
    out = np.empty(image.shape, np.uint8)
    shade = np.float32(0.5) + np.float32(0.62) * _lerp_field(rng, shape, 2.0)
    for channel, plane in enumerate(image):
        grain = rng.integers(0, 256, (2, *shape), dtype=np.uint8).astype(np.int16)
        value = plane * shade + (grain[0] - grain[1]) * np.float32(noise / 255)
        out[channel] = np.clip(value + np.float32(0.5), 0, 255)
    return out


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A length between low and high with as many small as large ones, by halving an exact ratio at random."""
    value, ratio = low, high / low
    for _ in range(6):
        ratio = ratio**0.5
        if rng.integers(0, 2):
            value *= ratio
    return value


def _axes(rng: np.random.Generator, num_dims: int) -> Float[np.ndarray, "N N"]:
    """Random orthogonal unit vectors (Gram-Schmidt, without BLAS)."""
    axes: list[NDArray[np.float64]] = []
    while len(axes) < num_dims:
        vector = rng.integers(-1000, 1001, num_dims).astype(np.float64) + 0.5
        for axis in axes:
            vector = vector - axis * (vector * axis).sum()
        length = float((vector * vector).sum()) ** 0.5
        if length > 1:
            axes.append(vector / length)
    return np.stack(axes)


def _window(centre: Sequence[float], reach: float, shape: Sequence[int]) -> Windows:
    return tuple(
        slice(max(0, int(c - reach)), min(side, int(c + reach) + 2)) for c, side in zip(centre, shape, strict=True)
    )


def _offsets(centre: Sequence[float], window: Windows) -> list[Array]:
    """Distance of every pixel of the window from the centre, per axis, broadcastable."""
    offsets = []
    for axis, (c, part) in enumerate(zip(centre, window, strict=True)):
        line = np.arange(part.start, part.stop, dtype=np.float32) - np.float32(c)
        offsets.append(line.reshape([-1 if a == axis else 1 for a in range(len(window))]))
    return offsets


def _ellipsoid(rng: np.random.Generator, shape: tuple[int, ...], radius: float, wobble: float) -> tuple[Windows, Array]:
    """A random ellipse or ellipsoid as its window and the signed depth in pixels below its outline."""
    num_dims = len(shape)
    centre = [float(rng.integers(0, side)) for side in shape]
    radii = [radius * (0.6 + float(rng.integers(0, 256)) / 320) for _ in range(num_dims)]
    window = _window(centre, 1.5 * max(radii) + 4, shape)
    offsets = _offsets(centre, window)
    squared: Array = np.zeros([part.stop - part.start for part in window], np.float32)
    for axis, length in zip(_axes(rng, num_dims), radii, strict=True):
        along: Array = np.zeros_like(squared)
        for weight, offset in zip(axis, offsets, strict=True):
            along = along + offset * np.float32(weight / length)
        squared += along * along
    bump = 1 + wobble * (_lerp_field(rng, squared.shape, 5.0) - np.float32(0.5))
    return window, (bump - np.sqrt(squared)) * np.float32(min(radii))


def _blend(image: Array, window: Windows, alpha: Array, colour: Sequence[float], texture: Array | float) -> None:
    for plane, value in zip(image, colour, strict=True):
        part = plane[window]
        part += alpha * (np.float32(value) * texture - part)


def _cells(
    rng: np.random.Generator, image: Array, labels: NDArray[np.uint8], wanted: float, radii: tuple[float, float]
) -> None:
    """Cells or lesions with a texture, their radius between the two given, until enough is covered."""
    shape = labels.shape
    covered = int(np.count_nonzero(labels))
    for _ in range(4000):
        if covered >= wanted:
            break
        radius = _log_uniform(rng, *radii)
        if covered + 1.5 * radius ** len(shape) > 1.2 * wanted:
            radius = radii[0]
        window, depth = _ellipsoid(rng, shape, radius, 0.5 if radius > 12 else 0.15)
        inside = depth >= 0
        part = labels[window]
        covered += int(np.count_nonzero(inside & (part == 0)))
        part[inside] = 1
        texture = np.float32(0.74) + np.float32(0.42) * _lerp_field(rng, depth.shape, max(max(depth.shape) / 5, 2.0))
        _blend(image, window, np.clip(depth / np.float32(1.6) + np.float32(0.5), 0, 1), STAIN, texture)


def _vessels(rng: np.random.Generator, image: Array, labels: NDArray[np.uint8], wanted: float, value: int) -> None:
    """Winding tubes that taper from about 4 to 1.3 pixels in radius, until enough is covered."""
    shape = labels.shape
    num_dims = len(shape)
    step = max(max(shape) / 64, 4.0)
    depth: Array = np.full(shape, -8, np.float32)
    for _ in range(200):
        if np.count_nonzero(depth >= 0) >= wanted:
            break
        place = np.array([float(rng.integers(0, side)) for side in shape])
        heading = _axes(rng, num_dims)[0]
        width = _log_uniform(rng, 1.8, 4.2)
        for _ in range(int(rng.integers(12, 40))):
            turn = rng.integers(-100, 101, num_dims) / 220.0
            heading = heading + turn
            heading = heading / float((heading * heading).sum()) ** 0.5
            _stamp(depth, place, place + heading * step, width)
            place, width = place + heading * step, max(1.3, width * 0.97)
    labels[depth >= 0] = value
    window = tuple(slice(0, side) for side in shape)
    alpha = np.clip(depth / np.float32(1.4) + np.float32(0.5), 0, 1)
    _blend(image, window, alpha, VESSEL, np.float32(0.85) + np.float32(0.25) * _lerp_field(rng, shape, 50.0))


def _stamp(depth: Array, begin: NDArray[np.float64], end: NDArray[np.float64], width: float) -> None:
    """Raise ``depth`` to that of a straight tube between two points."""
    middle, along = (begin + end) / 2, end - begin
    length = float((along * along).sum()) ** 0.5
    window = _window(list(middle), length / 2 + width + 3, depth.shape)
    if any(part.stop <= part.start for part in window):
        return
    offsets = _offsets(list(begin), window)
    place: Array = np.zeros([part.stop - part.start for part in window], np.float32)
    for offset, component in zip(offsets, along, strict=True):
        place = place + offset * np.float32(component / length**2)
    place = np.clip(place, 0, 1)
    squared: Array = np.zeros_like(place)
    for offset, component in zip(offsets, along, strict=True):
        squared += (offset - place * np.float32(component)) ** 2
    part = depth[window]
    np.maximum(part, np.float32(width) - np.sqrt(squared), out=part)


def _distractors(rng: np.random.Generator, image: Array) -> None:
    """As bright as structures, but none: blobs out of focus, cells of another stain, dust."""
    shape = image.shape[1:]
    side = min(shape)
    for _ in range(6):
        window, depth = _ellipsoid(rng, shape, _log_uniform(rng, side / 24, side / 8), 0.3)
        reach = np.float32(max(float(depth.max()), 1.0))
        _blend(image, window, np.float32(0.9) * np.clip(1.6 * depth / reach, 0, 1), STAIN, 1.0)
    for _ in range(10):
        window, depth = _ellipsoid(rng, shape, _log_uniform(rng, 4.5, max(side / 20, 5.0)), 0.3)
        texture = np.float32(0.8) + np.float32(0.3) * _lerp_field(rng, depth.shape, 6.0)
        _blend(image, window, np.clip(depth / np.float32(1.6) + np.float32(0.5), 0, 1), OTHER_STAIN, texture)
    for _ in range(25):
        window, depth = _ellipsoid(rng, shape, 1.2, 0.0)
        _blend(image, window, np.clip(depth + np.float32(0.5), 0, 1), (230.0, 230.0, 225.0), 1.0)
