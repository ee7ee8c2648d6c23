"""TIFF: every bit depth, chunky and planar, palettes, stacks of pages, OME, ImageJ; damage is found, not filled in."""

import logging
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FoveateError
from foveate.io.colour import flatten_alpha, rgb_of_cmyk
from foveate.io.guard import DECODER_ERRORS, Want, bad_file, check_axes, check_size, undecodable

Array = NDArray[Any]

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _MASK, _CMYK, _YCBCR = 0, 1, 2, 3, 4, 5, 6
_SPATIAL = {"Z": "D", "Q": "D", "I": "D", "Y": "H", "X": "W"}
_PREMULTIPLIED, _ALPHA = 1, 2
_CHANNEL = {"C": "C", "S": "C"}
_SLIDES = {"svs", "ndpi", "scn", "bif", "philips", "avs", "qpi", "ventana"}
_MAX_PAGES = 65536
_MAX_TAGS = 4096
_SUB_PAGES, _TILE_WIDTH, _TILE_LENGTH, _HAMAMATSU = 330, 322, 323, 65420
_LARGEST_TILE = 2**26  # pixels of one tile of any page, which some decoders allocate unseen
_TAG_SIZE = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0])  # bytes by type of tag
MAX_TILE = 2**24  # samples of one storage block that need no larger image around them

# tifffile reports through logging; what matters to us is checked below, the rest belongs to whoever configures logging.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read_tiff(path: Path, *, axes: str | None, max_pixels: int, want: Want) -> tuple[Array, str, int]:
    """Returns the pixels of a TIFF, its axes in letters of ``CDHW``, and its orientation tag (1-8).

    Args:
        path: The file.
        axes: The caller's word on what the axes are, against the file's.
        max_pixels: Limit of ``check_size``, applied to the header before anything is allocated.
        want: See ``foveate.io.guard.Want``.
    """
    import tifffile

    try:
        check_chain(path)
        with tifffile.TiffFile(path, _multifile=False) as file:
            series = _single_series(path, file)
            kept, names = _axes(path, series, axes)
            _check_header(path, series, kept, names, max_pixels)
            _check_blocks(path, series, path.stat().st_size)
            pixels = np.asarray(series.asarray(maxworkers=1)).reshape(kept)
            pixels, names = shown(path, pixels, names, series.keyframe, want)
            orientation = int(file.pages.first.tags.valueof(274, default=1))
    except FoveateError:
        raise
    except DECODER_ERRORS as error:
        raise undecodable(path, "tiff", error) from None
    if not pixels.dtype.isnative:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    return pixels, names, orientation if 1 <= orientation <= 8 and "D" not in names else 1


def check_pages(path: Path) -> None:
    """As ``check_chain``, for callers that do not yet expect damage.

    Raises:
        FormatError: the chain is cut off, runs in a circle, or has too many pages or absurd tiles.
    """
    try:
        check_chain(path)
    except FoveateError:
        raise
    except DECODER_ERRORS as error:
        raise undecodable(path, "tiff", error) from None


def check_chain(path: Path) -> None:
    """Walks the pages, their tags and their sub-pages once, before a decoder does.

    A chain that is cut off would pass for a shorter stack or for plain pages. Chains that run in a circle and absurd
    numbers of pages are found too.

    Raises:
        FormatError: the chain is cut off, runs in a circle, or has too many pages.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order, big = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
        count, offset, word = ("Q", "Q", "u8") if big else ("H", "I", "u4")
        entry = np.dtype(
            [("tag", f"{order}u2"), ("kind", f"{order}u2")] + [(f, order + word) for f in ("count", "value")]
        )
        wide = big or (file_size > 2**32 and order == "<")  # a plain TIFF above 4 GiB can only be Hamamatsu's
        (first,) = struct.unpack_from(order + ("Q" if wide else "I"), head, 8 if big else 4)
        waiting = [(first, True)]
        seen: set[int] = set()
        while waiting:
            at, in_chain = waiting.pop()
            if not at:
                continue
            if at in seen or len(seen) == _MAX_PAGES:
                what = "the pages run in a circle" if at in seen else f"there are more than {_MAX_PAGES} pages"
                raise undecodable(path, "tiff", EOFError(what))
            seen.add(at)
            file.seek(at)
            (number,) = struct.unpack(order + count, file.read(struct.calcsize(count)))
            tags = np.frombuffer(file.read(min(number, _MAX_TAGS) * entry.itemsize), entry, min(number, _MAX_TAGS))
            wide = big or _HAMAMATSU in tags["tag"]
            (after,) = struct.unpack(order + ("Q" if wide else "I"), file.read(8 if wide else 4))
            sizes = tags["count"].astype(np.float64) * _TAG_SIZE[np.minimum(tags["kind"], len(_TAG_SIZE) - 1)]
            apart = sizes > struct.calcsize(offset)
            starts = tags["value"][apart].astype(np.float64) * (big or not wide)  # Hamamatsu's lack their upper half
            if (starts + sizes[apart] > file_size).any():
                raise undecodable(path, "tiff", EOFError("the description of a page lies past the end of the file"))
            _check_tile(path, tags, order)
            waiting.append((after if in_chain else 0, True))
            sub = tags[tags["tag"] == _SUB_PAGES][:1]
            for length, kind in zip(sub["count"].tolist(), sub["kind"].tolist(), strict=True):
                size = 8 if kind in (16, 18) else 4
                raw = sub["value"].tobytes()
                if length * size > struct.calcsize(offset):
                    file.seek(int(sub["value"][0]))
                    raw = file.read(min(length, _MAX_PAGES) * size)
                starts = np.frombuffer(raw, f"{order}u{size}")[:length].tolist()
                waiting += [(start, False) for start in starts]


def _check_tile(path: Path, tags: Array, order: str) -> None:
    """Refuses tiles that nobody could mean; the tags are those of one page, as stored."""
    sides = []
    for name in (_TILE_LENGTH, _TILE_WIDTH):
        tag = tags[tags["tag"] == name][:1]
        raw = tag["value"].tobytes()
        sides += [int(np.frombuffer(raw, order + ("u2" if kind == 3 else "u4"))[0]) for kind in tag["kind"]]
    if prod(sides) > _LARGEST_TILE:
        raise bad_file(path, f"declares tiles of {' x '.join(map(str, sides))} pixels; export the file again")


def _single_series(path: Path, file: Any) -> Any:
    """The one image or stack in the file; reduced copies and the label of a slide do not count, others are refused."""
    all_series = file.series
    if not all_series:
        raise bad_file(path, "holds no image; export the file again")
    first = all_series[0]
    others = [item for item in all_series[1:] if not (item.keyframe.is_reduced or item.keyframe.is_mask)]
    if others and first.kind not in _SLIDES:
        sizes = ", ".join("x".join(map(str, item.shape)) for item in (first, *others)[:4])
        raise bad_file(path, f"holds {1 + len(others)} different images ({sizes}); save each as its own file")
    return first


def _axes(path: Path, series: Any, said: str | None) -> tuple[tuple[int, ...], str]:
    """Shape without axes of length 1 that carry no meaning, and its axes as letters of CDHW."""
    if said is not None:
        kept = tuple(int(length) for length in series.shape)
        check_axes(path, kept, said)
        return kept, said
    shape: list[int] = []
    names = ""
    for length, axis in zip(series.shape, series.axes, strict=True):
        letter = _SPATIAL.get(axis) or _CHANNEL.get(axis)
        if letter in ("H", "W") or (letter is not None and length > 1):
            names += letter
            shape.append(int(length))
        elif length > 1:
            what = f"{length} time points" if axis == "T" else f"an axis {axis!r} of {length}"
            raise bad_file(path, f"holds {what} (axes {series.axes}); save one image or volume per file")
    if sorted(names.replace("D", "").replace("C", "")) != ["H", "W"] or len(set(names)) != len(names):
        raise bad_file(path, f"has axes {series.axes} of {series.shape}; save one each of C, Z, Y and X at most")
    return tuple(shape), names


def _check_header(path: Path, series: Any, shape: tuple[int, ...], axes: str, max_pixels: int) -> None:
    """Refuses what the header alone shows to be too large or to have a meaning that we do not know."""
    spatial = tuple(length for length, axis in zip(shape, axes, strict=True) if axis != "C")
    check_size(path, spatial, prod(shape) // max(prod(spatial), 1), max_pixels)
    page = series.keyframe
    if int(page.photometric) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _MASK, _CMYK, _YCBCR):
        raise bad_file(path, f"has colours of kind {page.photometric}; save it as grey or RGB")
    if prod(page.chunks) > max(MAX_TILE, 4 * prod(shape)):
        raise bad_file(path, f"declares tiles of {page.chunks}, larger than the image; export the file again")
    if series.dtype is None or series.dtype.kind not in "biuf":
        raise bad_file(path, f"holds {series.dtype} values; give integers or floats")


def _check_blocks(path: Path, series: Any, file_size: int) -> None:
    """Refuses storage blocks that are missing or reach past the end of the file, which would be filled with zeros."""
    page = series.keyframe
    if series.dataoffset is not None:
        blocks = [(series.dataoffset, series.nbytes if page.bitspersample >= 8 else 1)]
    else:
        blocks = []
        for one in series.pages:
            if one is None or min(len(one.dataoffsets), len(one.databytecounts)) < prod(page.chunked):
                raise undecodable(path, "tiff", EOFError("lacks a page or part of one"))
            blocks += zip(one.dataoffsets, one.databytecounts, strict=False)
    lost = sum(start + count > file_size for start, count in blocks)
    if lost:
        raise undecodable(path, "tiff", EOFError(f"{lost} of {len(blocks)} blocks lie past the end of the file"))
    if series.dataoffset is None and int(page.compression) == 1:
        needed = -(-page.shape[-1] * page.bitspersample // 8) if page.ndim < 3 else page.shape[-1]
        if any(0 < count < needed for _, count in blocks):
            raise undecodable(path, "tiff", EOFError("has blocks shorter than one row"))


def shown(path: Path, pixels: Array, axes: str, page: Any, want: Want) -> tuple[Array, str]:
    """Turns stored numbers into the brightness or colour that they stand for; channels, if any, come first."""
    photometric = int(page.photometric)
    if "C" in axes:
        pixels, axes = np.moveaxis(pixels, axes.index("C"), 0), "C" + axes.replace("C", "")
    if photometric == _WHITE_IS_ZERO and pixels.dtype.kind in "bu" and want == "shown":
        pixels = ~pixels if pixels.dtype.kind == "b" else np.iinfo(pixels.dtype).max - pixels
    if photometric == _PALETTE and "C" not in axes and want != "values":
        if page.colormap is None or int(pixels.max()) >= page.colormap.shape[1]:
            raise bad_file(path, "has palette indices without colours (corrupt TIFF); export the file again")
        return (page.colormap >> 8).astype(np.uint8)[:, pixels], "C" + axes
    if photometric == _CMYK:
        if "C" not in axes or pixels.dtype not in (np.uint8, np.uint16) or len(pixels) != 4:
            raise bad_file(path, f"holds CMYK as {pixels.dtype} {pixels.shape}; save it as RGB")
        return rgb_of_cmyk(pixels), axes
    extra = tuple(int(one) for one in page.extrasamples or ())
    if "C" in axes and len(pixels) in (2, 4) and len(extra) == 1 and extra[0] in (_PREMULTIPLIED, _ALPHA):
        pixels = flatten_alpha(pixels, premultiplied=extra[0] == _PREMULTIPLIED, composite=want == "shown")
    return pixels, axes
