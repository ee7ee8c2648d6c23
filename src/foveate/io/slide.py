"""Slides of vendors whose tiles overlap or lie in many files, by OpenSlide: MRXS, NDPI, VMS, SCN, BIF, CZI, DICOM."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.io.guard import bad_file, one_line, undecodable
from foveate.io.raster import About
from foveate.io.spacing import Real, choose
from foveate.io.tile_cache import TileCache, check_unchanged, forget, handle, stamp_of
from foveate.io.tiled import Facts, TiledRaster

Array = NDArray[Any]

_TILE = 512
_TILES = range(64, 2049)  # storage tiles outside it are read in tiles of 512, which OpenSlide puts together


class SlideRaster(TiledRaster):
    """A slide as OpenSlide shows it: RGB of 8 bits, on white where nothing was scanned.

    Args:
        path: The file.
        mpp, spacing: As in ``open_raster``.
        broken, cache: As in ``TiledRaster``.
        reason: Why this reader.

    Raises:
        FormatError: OpenSlide does not open it.
    """

    def __init__(
        self,
        path: Path,
        *,
        mpp: Real | None = None,
        spacing: tuple[float, ...] | None = None,
        broken: str = "raise",
        cache: TileCache | None = None,
        reason: str = "",
    ) -> None:
        self.path = path
        stamp = stamp_of(path)
        slide = self._open(stamp)
        said = slide.properties
        claims = []
        if "openslide.mpp-x" in said and "openslide.mpp-y" in said:
            claims = [("vendor", float(said["openslide.mpp-y"]), float(said["openslide.mpp-x"]))]
        size = choose(claims, mpp=mpp, spacing=spacing)
        levels = tuple((int(high), int(wide)) for wide, high in slide.level_dimensions)
        if min(map(min, levels)) < 1:
            raise bad_file(path, f"declares levels of {levels} pixels; every side must be at least 1")
        tiles = tuple(_tile(said, number) for number in range(len(levels)))
        about = About(f"OpenSlide ({said.get('openslide.vendor')})", reason, size.origin, size.notes)
        facts = Facts(levels, tiles, 3, np.dtype(np.uint8), 255.0, size.spacing, about, stamp)
        super().__init__(path, facts, broken=broken, cache=cache)

    def _open(self, stamp: tuple[int, int]) -> Any:
        import openslide

        def opener() -> Any:
            check_unchanged(self.path, stamp)
            try:
                return openslide.OpenSlide(self.path)
            except (openslide.OpenSlideError, OSError) as error:
                raise undecodable(self.path, "slide", error) from None

        return handle((str(self.path), stamp, "openslide"), opener)

    def _variant(self) -> str:
        return "openslide"

    def _decode(self, level: int, row: int, column: int) -> Array | None:
        import openslide

        slide = self._open(self._facts.stamp)
        (high, wide), (height, width) = self.tile_shape(level), self.levels[level]
        top, left = row * high, column * wide
        step = slide.level_downsamples[level]  # OpenSlide's own, which may differ from ours behind the point
        try:
            picture = slide.read_region(
                (round(left * step), round(top * step)), level, (min(wide, width - left), min(high, height - top))
            )
        except openslide.OpenSlideError as error:
            forget((str(self.path), self._facts.stamp, "openslide"))  # after an error it refuses everything
            raise OSError(one_line(error)) from None
        pixels = np.asarray(picture)
        alpha = pixels[..., 3:]
        if not alpha.any():
            return None
        if int(alpha.min()) == 255:
            return np.ascontiguousarray(pixels[..., :3])
        seen = pixels[..., :3].astype(np.uint32) * alpha + np.uint32(255) * (np.uint32(255) - alpha)
        return np.asarray((seen + np.uint32(127)) // np.uint32(255), np.uint8)


def _tile(said: Any, level: int) -> tuple[int, int]:
    sides = [int(said.get(f"openslide.level[{level}].tile-{side}", 0)) for side in ("height", "width")]
    return (sides[0], sides[1]) if all(side in _TILES for side in sides) else (_TILE, _TILE)
