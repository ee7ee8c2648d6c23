"""Seeded synthetic slides of any size with exact masks, made tile by tile.

A slide is a function of the place: smooth random fields say what lies where (glass, tissue, tumour), and periodic
textures say what it looks like. Any tile can therefore be made alone, and the mask is exact at every pixel. Only
numpy's PCG64 and operations that IEEE 754 rounds exactly are used.

Legend: h w sides of a tile; P period of a texture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

from foveate.errors import BudgetError
from foveate.geometry.image import Real
from foveate.geometry.source import Box
from foveate.io.pyramid import write_pyramid
from foveate.io.write import refuse_existing
from foveate.testing.texture import make_textures

GLASS, TISSUE, TUMOUR = 0, 1, 2
RATIO = 4  # from one level to the next
_TUMOUR = 0.15  # of the tissue
_SAMPLES = 1024  # along each axis, from which the thresholds are taken
_MARGIN = 0.1  # of the side, glass that no tissue reaches

Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Field:
    """Random values on a grid of ``step`` pixels, joined smoothly; values lie in [-reach, reach]."""

    grid: Array
    step: float
    reach: float

    def at(self, y: Int64[np.ndarray, "h"], x: Int64[np.ndarray, "w"]) -> Float32[np.ndarray, "h w"]:
        """Values at the centres of the pixels in rows ``y`` and columns ``x``."""
        (row, below), (column, right) = self._place(y), self._place(x)
        lines = self.grid[row] + (self.grid[row + 1] - self.grid[row]) * below[:, None]
        left = lines[:, column]
        value: Array = left + (lines[:, column + 1] - left) * right
        return value

    def _place(self, line: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
        place = (line + 0.5) / self.step
        cell = place.astype(np.int64)
        t = place - cell
        return cell, (t * t * (3 - 2 * t)).astype(np.float32)


def _field(rng: np.random.Generator, side: int, step: Real, reach: float) -> _Field:
    cells = int(side / step) + 2
    grid = rng.integers(-127, 128, (cells, cells)).astype(np.float32) * np.float32(reach / 127)
    return _Field(grid, float(step), reach)


class SyntheticSlide:
    """A slide as a function of the place.

    Args:
        side: of the slide, in pixels.
        seed: equal seeds give equal slides.
        tissue: share of the pixels that are tissue, tumour included.
    """

    def __init__(self, side: int, seed: int, tissue: float) -> None:
        rng = np.random.Generator(np.random.PCG64(seed))
        self.side = side
        self._coarse = [_field(rng, side, side / cells, reach) for cells, reach in ((3.3, 1.0), (9, 0.5), (31, 0.16))]
        self._fine = [_field(rng, side, step, reach) for step, reach in ((180, 0.012), (40, 0.004), (11, 0.0015))]
        self._lesion = [_field(rng, side, side / cells, reach) for cells, reach in ((7, 1.0), (23, 0.6), (90, 0.15))]
        self._stain = [_field(rng, side, step, reach) for step, reach in ((max(side / 5, 600), 14.0), (450, 8.0))]
        self._gland = [_field(rng, side, step, reach) for step, reach in ((2300, 1.0), (500, 0.7))]
        self._textures = make_textures(seed)
        self._limits = self._thresholds(tissue)

    def labels(self, box: Box) -> UInt8[np.ndarray, "h w"] | int:
        """The class of every pixel of a box, or the one class of all."""
        y, x = (np.arange(low, high) for low, high in zip(*box, strict=True))
        tissue, slack = self._depth(self._coarse, y, x), sum(field.reach for field in self._fine)
        low, high = float(tissue.min()), float(tissue.max())
        if high + slack <= self._limits[0]:
            return GLASS
        lesion = self._sum(self._lesion, y, x)
        quiet_tissue = low - slack > self._limits[0]
        if quiet_tissue and float(lesion.max()) + slack <= self._limits[1]:
            return TISSUE
        if quiet_tissue and float(lesion.min()) - slack > self._limits[1]:
            return TUMOUR
        fine = self._sum(self._fine, y, x)
        inside = tissue + fine > self._limits[0]
        labels: NDArray[np.uint8] = inside.astype(np.uint8)
        labels += inside & (lesion - fine > self._limits[1])
        return labels

    def pixels(self, box: Box) -> UInt8[np.ndarray, "3 h w"]:
        """The picture of a box, a view of ``[h, w, 3]``."""
        labels = self.labels(box)
        glass = self._textures.window("glass", box)
        if isinstance(labels, int) and labels == GLASS:
            return np.moveaxis(glass, -1, 0)
        y, x = (np.arange(low, high) for low, high in zip(*box, strict=True))
        picture = self._tissue(box, labels, y, x)
        if not isinstance(labels, int):
            outside = labels == GLASS
            picture[outside] = glass[outside]
        return np.moveaxis(picture, -1, 0)

    def _tissue(
        self, box: Box, labels: NDArray[np.uint8] | int, y: Int64[np.ndarray, "h"], x: Int64[np.ndarray, "w"]
    ) -> UInt8[np.ndarray, "h w 3"]:
        textures = self._textures
        if isinstance(labels, int) and labels == TUMOUR:
            base = textures.window("tumour", box)
        else:
            gland = self._sum(self._gland, y, x) > 0.25
            base = np.where(gland[..., None], textures.window("glands", box), textures.window("stroma", box))
            if not isinstance(labels, int):
                base = np.where((labels == TUMOUR)[..., None], textures.window("tumour", box), base)
        stain = np.rint(self._sum(self._stain, y, x)).astype(np.int16)[..., None]
        shaded: NDArray[np.uint8] = np.clip(base + stain * np.array([2, 4, 3], np.int16) // 4, 0, 255).astype(np.uint8)
        return shaded

    def _sum(
        self, fields: Sequence[_Field], y: Int64[np.ndarray, "h"], x: Int64[np.ndarray, "w"]
    ) -> Float32[np.ndarray, "h w"]:
        total = fields[0].at(y, x)
        for field in fields[1:]:
            total += field.at(y, x)
        return total

    def _depth(
        self, fields: Sequence[_Field], y: Int64[np.ndarray, "h"], x: Int64[np.ndarray, "w"]
    ) -> Float32[np.ndarray, "h w"]:
        """How much tissue there is, falling to nothing at the edge of the slide."""

        def fall(line: Int64[np.ndarray, "n"]) -> Array:
            edge = np.minimum(line + 0.5, self.side - line - 0.5) / (self.side * 2 * _MARGIN)
            lost: Array = np.square(1 - np.minimum(edge, 1)).astype(np.float32) * np.float32(3)
            return lost

        depth: Array = self._sum(fields, y, x) - fall(y)[:, None] - fall(x)
        return depth

    def _thresholds(self, tissue: float) -> tuple[float, float]:
        count = min(self.side, _SAMPLES)
        line = (np.arange(count) * 2 + 1) * self.side // (2 * count)
        fine = self._sum(self._fine, line, line)
        depth = self._depth(self._coarse, line, line) + fine
        limit = float(np.quantile(depth, 1 - tissue))
        lesion = (self._sum(self._lesion, line, line) - fine)[depth > limit]
        return limit, float(np.quantile(lesion, 1 - _TUMOUR))


def write_slide(
    path: str | Path,
    side: int,
    *,
    seed: int = 0,
    tissue: Real = 0.43,
    mpp: Real = 0.25,
    tile: int = 512,
    quality: int = 80,
    mask: str | Path | None = None,
    overwrite: bool = False,
    num_workers: int = 2,
) -> Path:
    """Writes a slide stained like H&E, with levels at 1, 4, 16, ..., and its exact mask.

    Glass is white and noisy; tissue covers ``tissue`` of it in a few pieces, as stroma and glands with nuclei, and
    holds islands of tumour (15 % of the tissue), denser and more purple.

    Args:
        path: ``.ome.tif`` for OME-TIFF; any other name gives a TIFF with the pages and the description of an Aperio
            file, which OpenSlide opens too. JPEG tiles with halved chroma.
        side: height and width in pixels.
        seed: any integer >= 0; equal seeds give equal slides.
        tissue: share of the pixels that are tissue, in [0.05, 0.8], met to 2 %.
        mpp: size of a pixel in micrometres, as the files say; it does not change the picture.
        tile: side of the stored tiles.
        quality: of JPEG, 1 to 100.
        mask: where to write the mask: 0 glass, 1 tissue, 2 tumour, with the same levels, each the most frequent
            class of the level before.
        overwrite: True replaces existing files.
        num_workers: threads.

    Returns:
        ``path``.

    Raises:
        BudgetError: a side below 256, or a share of tissue out of range.
        FormatError: a file exists, or cannot be written.

    Cost: 40 ns a pixel and core; memory of a row of tiles of level 1.
    """
    if side < 256 or not 0.05 <= tissue <= 0.8:
        raise BudgetError(f"side={side}, tissue={tissue}; the side is at least 256, the tissue from 0.05 to 0.8")
    path = Path(path)
    for goal in (path, mask):
        if goal is not None:
            refuse_existing(Path(goal), overwrite)
    slide = SyntheticSlide(side, seed, float(tissue))
    spacing = (mpp / 1000, mpp / 1000)
    ome = path.name.lower().endswith((".ome.tif", ".ome.tiff"))

    def labels(box: Box) -> UInt8[np.ndarray, "1 h w"] | int:
        found = slide.labels(box)
        return found if isinstance(found, int) else found[None]

    if mask is not None:
        write_pyramid(
            mask, labels, shape=(side, side), dtype=np.uint8, tile=tile, spacing=spacing, ratio=RATIO, kind="tiff",
            overwrite=overwrite, num_workers=num_workers,
        )  # fmt: skip
    return write_pyramid(
        path, slide.pixels, shape=(side, side), dtype=np.uint8, channels=3, tile=tile, spacing=spacing, ratio=RATIO,
        kind="ome" if ome else "tiff", compression="jpeg", quality=quality, reduce="mean", overwrite=overwrite,
        description=f"Aperio Image Library v11\r\n{side}x{side} synthetic|AppMag = {10 / mpp:g}|MPP = {mpp:g}",
        num_workers=num_workers,
    )  # fmt: skip
