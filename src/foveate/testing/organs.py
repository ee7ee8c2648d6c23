"""Seeded volumes with many organs, and some whose labels hang on a mark far away, both with exact labels.

Organs differ in size, shape, texture and contrast; some pairs look alike and differ in place alone, so that a model has
to know where it is and what lies around. As in `foveate.testing.images`, only numpy's PCG64 and operations that
IEEE 754 rounds exactly are used, so that a seed means the same volume on every machine.

Legend: N = 3 axes (z, y, x), places in units of half a side: -1 .. 1.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from foveate.errors import BudgetError, ShapeError
from foveate.geometry.image import Real
from foveate.testing.images import _lerp_field as lerp_field

Array = NDArray[np.float32]
Triple = tuple[float, float, float]
Volume = tuple[UInt8[np.ndarray, "1 *S"], UInt8[np.ndarray, "*S"]]
_MIN_SIDE = 32


@dataclass(frozen=True)
class Organ:
    """What one organ looks like, and where it lies.

    Args:
        name: of the class.
        centre: place.
        radii: half axes.
        grey: mean value, of 255.
        texture: half-width of its own pattern, in grey values.
        grain: cells of the pattern along a side.
        bend: how far y shifts with the square of z, so that an ellipsoid becomes a sausage.
        core: grey value of what lies inside half the radii; None: the organ is solid.
    """

    name: str
    centre: Triple
    radii: Triple
    grey: Real
    texture: Real = 6.0
    grain: Real = 10.0
    bend: float = 0.0
    core: Real | None = None


ORGANS = (
    Organ("spine", (0.0, 0.52, 0.0), (1.4, 0.15, 0.15), 196, texture=22, grain=9),
    Organ("aorta", (0.0, 0.24, 0.08), (1.4, 0.09, 0.09), 166, texture=2),
    Organ("liver", (0.28, -0.08, -0.4), (0.36, 0.36, 0.28), 128, texture=8),
    Organ("spleen", (0.34, 0.12, 0.52), (0.24, 0.2, 0.15), 128, texture=8),
    Organ("right kidney", (-0.24, 0.3, -0.42), (0.25, 0.15, 0.14), 160, core=122),
    Organ("left kidney", (-0.18, 0.3, 0.44), (0.25, 0.15, 0.14), 160, core=122),
    Organ("stomach", (0.2, -0.26, 0.26), (0.2, 0.17, 0.26), 140, texture=10, core=72),
    Organ("pancreas", (-0.06, 0.0, 0.08), (0.1, 0.1, 0.34), 116, texture=14, grain=22, bend=-1.2),
    Organ("gall bladder", (-0.14, -0.36, -0.32), (0.13, 0.1, 0.1), 74, texture=2),
    Organ("bladder", (-0.66, -0.16, 0.0), (0.18, 0.2, 0.22), 74, texture=2),
)
"""The organs of `organ_volume`; the i-th has label i + 1, and a later one lies over an earlier one."""

FAT, MUSCLE, BOWEL = 52.0, 100.0, (72.0, 140.0)
MARK = (235.0, 10.0)


def organ_volume(seed: int, side: int = 64, *, noise: Real = 14.0, bias: Real = 0.3) -> Volume:
    """Draw a trunk with ten organs, and its exact labels.

    Liver and spleen, the two kidneys, and gall bladder and bladder are pairs of equal looks; loops of bowel look like
    stomach and belong to no class.

    Args:
        seed: any integer >= 0; equal seeds give equal volumes on every machine.
        side: voxels along each axis, at least 32.
        noise: half-width of the sensor noise, of triangular shape, in grey values of 255.
        bias: how far uneven light goes to either side of 1, in [0, 1).

    Returns:
        The volume with one channel, and the labels: 0, and i + 1 for the i-th of `ORGANS`.

    Raises:
        ShapeError: a side below 32.
        BudgetError: a noise or a bias outside its range.

    Cost: about 0.15 s for 64^3.
    """
    _check(side, noise, bias)
    rng = np.random.Generator(np.random.PCG64(seed))
    shape = (side,) * 3
    places = _posed(rng, side)
    volume: Array = np.full(shape, 8, np.float32)
    labels = np.zeros(shape, np.uint8)
    trunk = _radius(places, (0.0, 0.05, 0.0), (1.6, 0.72, 0.82), 0.0)
    pattern = lerp_field(rng, shape, 14.0) - np.float32(0.5)
    _fill(volume, trunk < 1, FAT + 16 * pattern)
    _fill(volume, trunk < np.float32(0.86), MUSCLE + 20 * pattern)
    for _ in range(5):
        _bowel(rng, volume, places)
    for label, organ in enumerate(ORGANS, 1):
        labels[_draw(rng, volume, organ, places, trunk < np.float32(0.95))] = label
    return _expose(rng, volume, noise, bias), labels


def marked_volume(seed: int, side: int = 48, *, num_balls: int = 4, noise: Real = 14.0, bias: Real = 0.1) -> Volume:
    """Draw equal balls whose class a mark in a far corner names.

    The mark is a cube of a sixth of the side at the origin. Where it is bright, every ball has label 1, where it is
    dark, label 2; nothing at or around a ball tells its class.

    Args:
        seed: any integer >= 0; equal seeds give equal volumes on every machine.
        side: voxels along each axis, at least 32.
        num_balls: 1 to 8, each in an octant of its own.
        noise: half-width of the sensor noise, of triangular shape, in grey values of 255.
        bias: how far uneven light goes to either side of 1, in [0, 1).

    Returns:
        The volume with one channel, and the labels 0, 1 and 2.

    Raises:
        ShapeError: a side below 32.
        BudgetError: another number of balls, or a noise or a bias outside its range.

    Cost: about 0.02 s for 48^3.
    """
    _check(side, noise, bias)
    if not 1 <= num_balls <= 8:
        raise BudgetError(f"num_balls={num_balls} must be 1 to 8, one in each octant; 4 are usual")
    rng = np.random.Generator(np.random.PCG64(seed))
    shape, label = (side,) * 3, int(rng.integers(1, 3))
    places = _grid(side)
    volume: Array = 60 + 20 * lerp_field(rng, shape, 6.0)
    labels = np.zeros(shape, np.uint8)
    for octant in rng.permutation(8)[:num_balls].tolist():
        middle = 0.92 * (np.array(np.unravel_index(octant, (2, 2, 2))) - 0.5) + 0.06
        distance = _radius(places, _triple(middle + rng.integers(-100, 101, 3) / 1000.0), (0.2, 0.2, 0.2), 0.0)
        _fill(volume, distance < 1, np.float32(150) + 20 * lerp_field(rng, shape, 12.0))
        labels[distance < 1] = label
    mark = (slice(0, side // 6),) * 3
    volume[mark] = MARK[label - 1]
    return _expose(rng, volume, noise, bias), labels


def _check(side: int, noise: Real, bias: Real) -> None:
    if side < _MIN_SIDE:
        raise ShapeError(f"side={side}: organs need at least {_MIN_SIDE} voxels along each axis; use a larger side")
    if not 0 <= noise <= 100 or not 0 <= bias < 1:
        raise BudgetError(
            f"noise={noise}, bias={bias}: noise must lie in [0, 100] and bias in [0, 1); 14 and 0.3 are usual"
        )


def _grid(side: int) -> list[Array]:
    """Place of every voxel, one broadcastable array for each axis."""
    line = (2 * np.arange(side, dtype=np.float32) + 1) / np.float32(side) - 1
    return [line.reshape([-1 if axis == own else 1 for axis in range(3)]) for own in range(3)]


def _posed(rng: np.random.Generator, side: int) -> list[Array]:
    """Places after a shift, a scale per axis and a lean of the whole body, all drawn."""
    z, y, x = _grid(side)
    scale = 1 + rng.integers(-100, 101, 3) / np.float32(1000)
    shift = rng.integers(-100, 101, 3) / np.float32(1250)
    lean = rng.integers(-100, 101, 2) / np.float32(900)
    moved = (z, y + lean[0] * z, x + lean[1] * z)
    return [((place + by) * grow).astype(np.float32) for place, by, grow in zip(moved, shift, scale, strict=True)]


def _radius(places: list[Array], centre: Triple, radii: Triple, bend: float) -> Array:
    """Distance of every voxel from the centre, in half axes."""
    z, y, x = (place - np.float32(at) for place, at in zip(places, centre, strict=True))
    offsets = [z, y - np.float32(bend) * x * x if bend else y, x]
    offsets = [offset / np.float32(radius) for offset, radius in zip(offsets, radii, strict=True)]
    squared = offsets[0] * offsets[0] + offsets[1] * offsets[1] + offsets[2] * offsets[2]
    distance: Array = np.sqrt(squared)
    return distance


def _fill(volume: Array, where: NDArray[np.bool_], value: Array | Real) -> None:
    np.copyto(volume, value if isinstance(value, np.ndarray) else np.float32(value), where=where)


def _jitter(rng: np.random.Generator, organ: Organ) -> tuple[Triple, Triple]:
    """The organ's centre and radii in one body."""
    centre = np.array(organ.centre) + rng.integers(-100, 101, 3) / 2500.0
    radii = np.array(organ.radii) * (1 + rng.integers(-100, 101, 3) / 600.0)
    return _triple(centre), _triple(radii)


def _triple(values: NDArray[np.float64]) -> Triple:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _draw(
    rng: np.random.Generator, volume: Array, organ: Organ, places: list[Array], inside: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Draw one organ within the trunk; returns its voxels."""
    centre, radii = _jitter(rng, organ)
    radius = _radius(places, centre, radii, organ.bend)
    wobble = lerp_field(rng, volume.shape, 5.0) - np.float32(0.5)
    radius = radius + np.float32(0.3) * wobble
    own: NDArray[np.bool_] = (radius < 1) & inside
    pattern = np.float32(2 * organ.texture) * (lerp_field(rng, volume.shape, float(organ.grain)) - np.float32(0.5))
    tone = np.float32(organ.grey + rng.integers(-3, 4))
    _fill(volume, own, tone + pattern)
    if organ.core is not None:
        _fill(volume, own & (radius < np.float32(0.55)), np.float32(organ.core) + pattern)
    return own


def _bowel(rng: np.random.Generator, volume: Array, places: list[Array]) -> None:
    """A loop with a wall and contents like those of the stomach, in the lower half of the trunk."""
    centre = _triple(np.array((-0.5, -0.1, 0.0)) + rng.integers(-100, 101, 3) * np.array((0.004, 0.003, 0.004)))
    radii = _triple(0.11 + rng.integers(0, 101, 3) / 1000.0)
    radius = _radius(places, centre, radii, 0.0)
    _fill(volume, radius < 1, BOWEL[1])
    _fill(volume, radius < np.float32(0.55), BOWEL[0])


def _expose(rng: np.random.Generator, volume: Array, noise: Real, bias: Real) -> UInt8[np.ndarray, "1 *S"]:
    """Multiply by uneven light, add noise of triangular shape, and round to bytes."""
    light = 1 + np.float32(2 * bias) * (lerp_field(rng, volume.shape, 1.5) - np.float32(0.5))
    grain = rng.integers(0, 256, (2, *volume.shape), dtype=np.uint8).astype(np.int16)
    value = volume * light + (grain[0] - grain[1]) * np.float32(noise / 255)
    out: NDArray[np.uint8] = np.clip(value + np.float32(0.5), 0, 255).astype(np.uint8)
    return out[None]
