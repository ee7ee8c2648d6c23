"""Masks as people keep them - labels, instances, palettes, colours, grey JPEG - to labels, by a declared table."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy.typing import NDArray

from foveate.errors import ConfigError, FormatError
from foveate.io.guard import DEFAULT_MAX_PIXELS, bad_file, check_values, one_line
from foveate.io.image import load

Array = NDArray[Any]

IGNORE = 255
_UNKNOWN = 254  # inside this file only: matched by no rule
_UNSEEN = 253  # inside this file only: colour not yet looked up
_BAND = 2**20  # pixels looked up at a time, which bounds the temporary arrays
_GREY_SPREAD = 48  # largest difference between colour channels that JPEG makes of grey
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*(>=|<=|!=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")
_NUMBER = re.compile(r"\s*-?\d+(?:\.\d+)?\s*")
_COLOUR = re.compile(r"\s*#([0-9a-fA-F]{6})\s*")


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Which mask values mean which class, declared once and checked when it is made.

    ``background`` is label 0 whether or not it is named; the other names count from 1 in the order they are written.
    A name's rule is a value (``1``), a comparison (``">=128"``), a colour (``"#ff0000"``), or a list of them; the first
    rule that matches wins. Background that is not named takes value 0 and black, and, where any rule is a comparison,
    every value that no rule matches. A class named ``ignore`` becomes label 255, which is neither learned nor scored.

    Args:
        classes: Rule of each name; values and colours may not be mixed.
        unknown: What becomes of values that no class names: ``error``, ``ignore`` (label 255) or ``background``.
        max_distance: Colours only: a pixel belongs to the nearest declared colour, if the Euclidean distance in RGB
            (0..255 each) is at most this; ``None`` sets no limit. The default covers JPEG and interpolated borders.

    Raises:
        ConfigError: no class, an unreadable rule, colours mixed with values, or one value under two names.
    """

    classes: Mapping[str, Any]
    unknown: Literal["error", "ignore", "background"] | str = "error"
    max_distance: int | float | None = 64.0
    _values: tuple[tuple[int, str, int | float], ...] = field(init=False, repr=False)
    _colours: tuple[tuple[int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.unknown not in ("error", "ignore", "background"):
            raise ConfigError(f"unknown={self.unknown!r} is no policy; give 'error', 'ignore' or 'background'")
        if self.max_distance is not None and not self.max_distance >= 0:
            raise ConfigError(
                f"max_distance={self.max_distance!r} is below 0; give an RGB distance or null for no limit"
            )
        object.__setattr__(self, "classes", dict(self.classes))
        if not 2 <= self.num_classes <= _UNSEEN:
            raise ConfigError(f"{self.num_classes - 1} classes beside background; name 1 to {_UNSEEN - 1}")
        values: list[tuple[int, str, int | float]] = []
        colours: list[tuple[int, int]] = []
        for name, rule in self.classes.items():
            label = IGNORE if name == "ignore" else self.names.index(name)
            for one in rule if isinstance(rule, Sequence) and not isinstance(rule, str) else (rule,):
                _parse(name, one, label, values, colours)
        if values and colours:
            raise ConfigError(f"classes mix values and colours in {self._declared}; declare one or the other")
        _check_unique([(sign, value) for _, sign, value in values if sign == "=="], self._declared)
        _check_unique([code for _, code in colours], self._declared)
        if "background" not in self.classes:
            if colours and all(code != 0 for _, code in colours):
                colours.append((0, 0))
            elif any(sign != "==" for _, sign, _ in values):
                values.append((0, "rest", 0))
            elif values and all(value != 0 for _, _, value in values):
                values.append((0, "==", 0))
        object.__setattr__(self, "_values", tuple(values))
        object.__setattr__(self, "_colours", tuple(colours))

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by label, background first; ``ignore`` is no class."""
        return ("background", *(name for name in self.classes if name not in ("background", "ignore")))

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.names)

    @property
    def ignore(self) -> int:
        """Label of pixels that are neither learned nor scored."""
        return IGNORE

    @property
    def by_colour(self) -> bool:
        """Whether the rules are colours."""
        return bool(self._colours)

    @property
    def _declared(self) -> str:
        return one_line(dict(self.classes))[:200]

    def _of_values(self, values: Array) -> Array:
        """Labels of numbers, 254 where no rule matches."""
        labels = np.full(values.shape, _UNKNOWN, np.uint8)
        for label, sign, value in reversed(self._values):
            if sign == "rest":
                labels.fill(label)
            else:
                labels[values == value if sign == "==" else _COMPARE[sign](values, value)] = label
        return labels

    def _of_codes(self, codes: Array) -> Array:
        """Labels of 24-bit colours by the nearest declared one, 254 where none is near."""
        declared = np.array([code for _, code in self._colours])
        away = sum(((codes[:, None] >> at & 255) - (declared >> at & 255)) ** 2 for at in (16, 8, 0))
        nearest = np.asarray(away).argmin(1)
        labels = np.array([label for label, _ in self._colours], np.uint8)[nearest]
        if self.max_distance is not None:
            labels[np.asarray(away)[np.arange(len(codes)), nearest] > self.max_distance**2] = _UNKNOWN
        return np.asarray(labels)


def read_mask(
    path: str | Path,
    table: ClassTable | Mapping[str, Any],
    *,
    shape: tuple[int, ...] | None = None,
    axes: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> UInt8[Array, "*S"]:
    """Reads a mask as class labels, by the numbers stored in the file or, for a table of colours, by its colours.

    The same files are read as by ``read_image``, turned upright by the same rule. Palette masks give their indices to
    a table of values and their colours to a table of colours; alpha is ignored; 1-bit masks hold 1, or 255 where the
    rules need that; a grey mask stored as RGB counts as grey.

    Args:
        path: The mask.
        table: Which values mean which class; a plain mapping stands for ``ClassTable(mapping)``.
        shape: Spatial shape *S of the image, upright; a mask of another size is refused.
        axes: As in ``read_image``.
        max_pixels: As in ``read_image``.

    Returns:
        uint8 labels ``[*S]``: 0 background, 1.. the classes in order, 255 ignore.

    Raises:
        FormatError: as ``read_image``; another size than ``shape``; values of no class, unless declared otherwise.

    Cost:
        One pass in bands: the mask, its labels, and a 16 MB table for colours; never one array per class.
    """
    path = Path(path)
    table = table if isinstance(table, ClassTable) else ClassTable(table)
    pixels = load(path, axes=axes, max_pixels=max_pixels, want="colours" if table.by_colour else "values")
    check_values(path, pixels)
    if shape is not None and pixels.shape[1:] != tuple(shape):
        raise _other_size(path, pixels.shape[1:], tuple(shape))
    return label_pixels(pixels, table, path)


def label_pixels(pixels: Shaped[Array, "C *S"], table: ClassTable, path: str | Path) -> UInt8[Array, "*S"]:
    """Maps the stored pixels of a mask, or of a part of it, to class labels.

    Args:
        pixels: Numbers or RGB as stored, one channel or three.
        table: Which values mean which class.
        path: The mask, for the message.

    Returns:
        uint8 labels, as `read_mask`.

    Raises:
        FormatError: values of no class, unless declared otherwise; or pixels that the table is not made for.

    Cost:
        One pass in bands.
    """
    path = Path(path)
    codes = _colour_codes(path, pixels) if table.by_colour else _grey(path, pixels, table)
    labels = np.empty(pixels.shape[1:], np.uint8)
    lookup = _colour_lookup(table) if table.by_colour else _value_lookup(table, pixels.dtype)
    for band in _bands(labels.shape):
        labels[band] = lookup(codes(band))
    _settle_unknown(path, table, labels, codes)
    return labels


def _parse(
    name: str, rule: object, label: int, values: list[tuple[int, str, int | float]], colours: list[tuple[int, int]]
) -> None:
    if isinstance(rule, int | float) and not isinstance(rule, bool):
        values.append((label, "==", rule))
    elif isinstance(rule, str) and (match := _COLOUR.fullmatch(rule)):
        colours.append((label, int(match[1], 16)))
    elif isinstance(rule, str) and (match := _COMPARISON.fullmatch(rule)):
        values.append((label, match[1], float(match[2])))
    elif isinstance(rule, str) and _NUMBER.fullmatch(rule):
        values.append((label, "==", float(rule)))
    else:
        raise ConfigError(f"class {name!r} has the rule {rule!r}; give a value, a list, '>=128' or a colour '#ff0000'")


def _check_unique(keys: Sequence[object], declared: str) -> None:
    if len(set(keys)) != len(keys):
        raise ConfigError(f"one value or colour is declared twice in {declared}; name it once")


def _other_size(path: Path, found: tuple[int, ...], wanted: tuple[int, ...]) -> FormatError:
    sizes = " against ".join(" x ".join(map(str, size)) for size in (found, wanted))
    turned = "it looks like the mask of the image before its EXIF rotation" if found == wanted[::-1] else ""
    return bad_file(path, f"the mask's size differs from its image's, {sizes}; {turned or 'pair or resize them'}")


def _bands(shape: tuple[int, ...]) -> list[slice]:
    rows = max(1, _BAND * shape[0] // int(np.prod(shape)))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def _grey(path: Path, pixels: Array, table: ClassTable) -> Callable[[slice], Array]:
    """The stored numbers by band; channels that hold the same grey count once, real colours are refused."""
    if len(pixels) == 1:
        return lambda band: pixels[0, band]
    if len(pixels) != 3:
        raise bad_file(path, f"is a mask of {len(pixels)} channels; save one channel of labels, or RGB")
    spread = 0
    for band in _bands(pixels.shape[1:]):
        part = pixels[:, band]
        spread = max(spread, int((part.max(0).astype(np.float64) - part.min(0)).max()))
    if spread > _GREY_SPREAD:
        raise bad_file(path, f"is coloured, but the classes are values ({table._declared}); declare colours '#rrggbb'")
    return lambda band: pixels[1, band]


def _colour_codes(path: Path, pixels: Array) -> Callable[[slice], Array]:
    """Colours as 24-bit numbers by band; a grey mask has the colours of grey."""
    if pixels.dtype.kind == "b":
        pixels = pixels.view(np.uint8) * np.uint8(255)
    if pixels.dtype != np.uint8 or len(pixels) not in (1, 3):
        raise bad_file(
            path, f"holds {len(pixels)} channels of {pixels.dtype}, but the classes are colours; save 8-bit RGB"
        )

    def codes(band: slice) -> Array:
        red, green, blue = (pixels[min(channel, len(pixels) - 1), band].astype(np.int32) for channel in range(3))
        return red << 16 | green << 8 | blue

    return codes


def _colour_lookup(table: ClassTable) -> Callable[[Array], Array]:
    known = np.full(2**24, _UNSEEN, np.uint8)

    def lookup(codes: Array) -> Array:
        labels = known[codes]
        new = codes[labels == _UNSEEN]
        if new.size:
            distinct = np.unique(new)
            for start in range(0, len(distinct), 65536):
                known[distinct[start : start + 65536]] = table._of_codes(distinct[start : start + 65536])
            labels = known[codes]
        return np.asarray(labels)

    return lookup


def _value_lookup(table: ClassTable, dtype: np.dtype[Any]) -> Callable[[Array], Array]:
    """Labels through a table of all values where there are few, else by comparing."""
    if dtype.kind == "b":
        zero, one, full = table._of_values(np.array([0, 1, 255]))
        both = np.array([zero, full if one in (zero, _UNKNOWN) else one], np.uint8)
        return lambda values: both[values.view(np.uint8)]
    if dtype.kind == "u" and dtype.itemsize <= 2:
        every = table._of_values(np.arange(np.iinfo(dtype).max + 1))
        return lambda values: every[values]
    return table._of_values


def _settle_unknown(path: Path, table: ClassTable, labels: Array, codes: Callable[[slice], Array]) -> None:
    """Applies the declared policy to pixels that no rule matched, or says which values they hold."""
    counts: dict[Any, int] = {}
    for band in _bands(labels.shape):
        lost = labels[band] == _UNKNOWN
        if not lost.any():
            continue
        if table.unknown == "error":
            for value, count in zip(*np.unique(codes(band)[lost], return_counts=True), strict=True):
                counts[value] = counts.get(value, 0) + int(count)
        labels[band][lost] = IGNORE if table.unknown == "ignore" else 0
    if counts:
        worst = sorted(counts, key=lambda value: -counts[value])
        shown = ", ".join(f"{_show(value, table)} ({counts[value]} pixels)" for value in worst[:5])
        more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
        raise bad_file(
            path,
            f"holds values of no class: {shown}{more}; classes are {table._declared}: name these values, "
            "or set unknown to ignore or background" + (" or raise max_distance" if table.by_colour else ""),
        )


def _show(value: Any, table: ClassTable) -> str:
    return f"#{int(value):06x}" if table.by_colour else str(value.item())
