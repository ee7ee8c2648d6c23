"""How large a pixel is: who says so, who is believed, and what is no size at all."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from foveate.errors import ConfigError

Real = float | int
SMALLEST_MPP, LARGEST_MPP = 0.01, 100.0
_LARGEST_TAG = 20.0  # um per pixel; what resolution tags say beyond it is meant for printers and screens
_UNIT_UM = {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0, "\u00c5": 1e-4}
_MICRON = {"", "um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer", "micrometre", "\\u00b5m"}

Claim = tuple[str, float, float]  # who says it, um per pixel along y, along x


@dataclass(frozen=True)
class PixelSize:
    """Size of a level-0 pixel: ``spacing`` in mm (y, x) or None, who said it, and what was not believed."""

    spacing: tuple[float, ...] | None
    origin: str
    notes: tuple[str, ...] = ()


def choose(claims: Iterable[Claim], *, mpp: Real | None = None, spacing: tuple[float, ...] | None = None) -> PixelSize:
    """Settles the size of a pixel: the argument goes before the file's claims, the first sound claim before the rest.

    Args:
        claims: What the file says, the most trusted first: vendor, OME, TIFF resolution.
        mpp: The caller's word, um per pixel along both axes.
        spacing: The caller's word, mm per pixel (y, x); give one of the two.

    Raises:
        ConfigError: both are given, or ``mpp`` is no size of a pixel.
    """
    if mpp is not None:
        if spacing is not None:
            raise ConfigError(f"mpp={mpp} and spacing={spacing} say the same thing; give one")
        check_mpp(mpp)
        return PixelSize((mpp / 1000, mpp / 1000), "given as an argument")
    if spacing is not None:
        return PixelSize(spacing, "given as an argument")
    notes: list[str] = []
    for who, down, across in claims:
        limit = _LARGEST_TAG if who == RESOLUTION else LARGEST_MPP
        if all(SMALLEST_MPP <= value <= limit for value in (down, across)) and max(down, across) < 10 * min(
            down, across
        ):
            return PixelSize((down / 1000, across / 1000), who, tuple(notes))
        notes.append(f"{who} says {down:.4g} x {across:.4g} um per pixel, which is not believed")
    return PixelSize(None, "nobody said it", tuple(notes))


def check_mpp(mpp: Real) -> None:
    """Refuses what cannot be the size of a pixel of a slide.

    Raises:
        ConfigError: not a number of um from 0.01 to 100.
    """
    if not SMALLEST_MPP <= mpp <= LARGEST_MPP:  # NaN fails too
        raise ConfigError(f"mpp={mpp}; give um per pixel, {SMALLEST_MPP} to {LARGEST_MPP:g}")


RESOLUTION = "TIFF resolution"


def aperio_claims(description: str) -> list[Claim]:
    """``MPP = 0.499`` in the description of an Aperio slide."""
    found = re.search(r"\bMPP\s*=\s*([^|\s]+)", description)
    return [("vendor (Aperio)", _number(found[1]), _number(found[1]))] if found else []


def ome_claims(xml: str, index: int) -> list[Claim]:
    """``PhysicalSizeX`` and ``Y`` of the image number ``index`` in OME-XML."""
    elements = re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", xml)
    if index >= len(elements):
        return []
    said = dict(re.findall(r"([\w:]+)\s*=\s*[\"']([^\"']*)[\"']", elements[index]))
    sizes = [
        _number(said[f"PhysicalSize{axis}"]) * _unit(said.get(f"PhysicalSize{axis}Unit", ""))
        for axis in "YX"
        if f"PhysicalSize{axis}" in said
    ]
    return [("OME", sizes[0], sizes[1])] if len(sizes) == 2 else []


def tag_claims(page: Any, imagej_unit: str = "") -> list[Claim]:
    """The resolution tags of a TIFF page; a unit of "none" says nothing, unless ImageJ names one elsewhere."""
    unit = page.tags.valueof(296, default=2)
    unit_um = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}.get(int(unit) if isinstance(unit, int) else 0, math.nan)
    if imagej_unit:
        unit_um = _unit(imagej_unit)
    sizes = []
    for tag in (283, 282):
        value = page.tags.valueof(tag)
        if not (isinstance(value, tuple) and len(value) == 2 and value[0] and value[1]):
            return []
        sizes.append(unit_um * value[1] / value[0])
    return [(RESOLUTION, sizes[0], sizes[1])] if all(map(math.isfinite, sizes)) else []


def mpp_of(spacing: tuple[float, ...] | None) -> float | None:
    """Um per pixel of a plane, the mean of both axes; None for volumes and where nobody said it."""
    return None if spacing is None or len(spacing) != 2 else 1000 * math.sqrt(spacing[0] * spacing[1])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _unit(name: str) -> float:
    """Um per unit; NaN for units that are none, such as pixel."""
    name = name.strip().lower() if name.strip() != "\u00c5" else name.strip()
    return 1.0 if name in _MICRON else _UNIT_UM.get(name, math.nan)
