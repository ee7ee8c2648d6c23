"""Where the voxels of a volume lie in space, and how its axes are brought into one order and back.

Affines map voxel indices in the order (x, y, z) to mm in RAS+, as NIfTI does; arrays are in the order (z, y, x).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped
from numpy.typing import NDArray

Affine = Float64[np.ndarray, "4 4"]

_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
_SMALLEST, _LARGEST = 1e-6, 1e6  # mm a voxel can measure: 1 nm to 1 km
_FLAT = 1e-3  # volume of the unit cell below which the three axes count as dependent


@dataclass(frozen=True)
class Grid:
    """The grid of voxels as a file stores it.

    Attributes:
        shape: ``(D, H, W)`` as stored.
        affine: Voxel indices (x, y, z) to mm, RAS+.
        spacing: Size of a voxel in mm, in array order (z, y, x), or None where nobody said it.
        reader: What read the file, in words.
        header: The NIfTI header whose geometry labels inherit; empty if the file is none.
        notes: What a reader had to decide, in words.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    spacing: tuple[float, ...] | None
    reader: str
    header: bytes = b""
    notes: tuple[str, ...] = ()


def usable(affine: NDArray[Any]) -> bool:
    """True if the affine is finite, its voxels have a possible size, and its axes are independent."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return False
    with np.errstate(over="ignore"):
        size = np.linalg.norm(affine[:3, :3], axis=0)
    possible = bool(((size > _SMALLEST) & (size < _LARGEST)).all())
    return possible and abs(float(np.linalg.det(affine[:3, :3] / size))) > _FLAT


def column_spacing(affine: Affine) -> tuple[float, float, float]:
    """Size of a voxel in mm, in array order (z, y, x): the lengths of the affine's columns."""
    x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0).round(9))
    return z, y, x


def tilt(affine: Affine) -> list[str]:
    """Says in words how far the axes of voxels are from the axes of space; nothing where they are parallel."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    notes = []
    angle = float(np.degrees(np.arccos(min(1.0, np.abs(cosines).max(axis=0).min()))))
    if angle > 0.1:
        notes.append(
            f"oblique: axes turned by up to {angle:.1f} degrees; spacing is the length of the affine's columns"
        )
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-3:
        notes.append("sheared: the axes are not at right angles")
    return notes


def orientation(affine: Affine) -> str:
    """Where the axes (x, y, z) of voxels point, such as ``"RAS"``."""
    from nibabel.orientations import io_orientation

    return "".join(_CODES[int(axis)][int(sign > 0)] for axis, sign in io_orientation(affine))


@dataclass(frozen=True)
class Turn:
    """The flips and the change of order that bring a grid closest to RAS+, and back; always whole voxels.

    Attributes:
        order: For each axis (x, y, z) of the result, the axis it comes from.
        flipped: For each axis (x, y, z) as stored, whether it is reversed.
    """

    order: tuple[int, ...] = (0, 1, 2)
    flipped: tuple[bool, ...] = (False, False, False)

    def there(self, array: Shaped[np.ndarray, "*C D H W"]) -> Shaped[np.ndarray, "*C X Y Z"]:
        """Turns an array in array order, with or without channels; a view."""
        ahead = array.ndim - 3
        turned = np.flip(array, tuple(ahead + 2 - axis for axis in range(3) if self.flipped[axis]))
        return turned.transpose(*range(ahead), *(ahead + 2 - axis for axis in reversed(self.order)))

    def back(self, array: Shaped[np.ndarray, "*C X Y Z"]) -> Shaped[np.ndarray, "*C D H W"]:
        """Undoes ``there``; a view."""
        ahead = array.ndim - 3
        places = [self.order.index(axis) for axis in range(3)]
        turned = array.transpose(*range(ahead), *(ahead + 2 - axis for axis in reversed(places)))
        return np.flip(turned, tuple(ahead + 2 - axis for axis in range(3) if self.flipped[axis]))

    def affine(self, affine: Affine, shape: tuple[int, int, int]) -> Affine:
        """The affine of the turned array; ``shape`` is ``(D, H, W)`` as stored."""
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for place, axis in enumerate(self.order):
            step[axis, place] = -1 if self.flipped[axis] else 1
            step[axis, 3] = shape[2 - axis] - 1 if self.flipped[axis] else 0
        return np.asarray(affine @ step)


def turn_to_ras(affine: Affine) -> Turn:
    """The turn that brings the axes (x, y, z) closest to right, anterior, superior."""
    from nibabel.orientations import io_orientation

    found = io_orientation(affine)
    order = [int(axis) for axis in np.argsort(found[:, 0])]
    return Turn(tuple(order), tuple(bool(sign < 0) for sign in found[:, 1]))
