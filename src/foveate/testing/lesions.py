"""Slides with few, tiny lesions, or with none: is one there, and of which kind, where the truth is exact.

A lesion is 10 to 40 pixels across in a slide of thousands, so that a slide shrunk to fit shows nothing of it. Dark
smudges of the same size and colour lie on every slide and mean nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray

from foveate.errors import BudgetError, ConfigError
from foveate.geometry.source import Box
from foveate.io.pyramid import write_pyramid
from foveate.io.write import atomic_write, write_jsonl
from foveate.testing.digits import SPLITS, write_marks
from foveate.testing.slides import GLASS, RATIO, TISSUE, SyntheticSlide

KINDS = ("none", "cluster", "ring")
_SIZES = (10, 40)  # pixels across
_MOST = 4  # lesions on a slide
_SMUDGES = 12
_TRIES = 100
_DARK, _PALE = np.array((46, 38, 104), np.float32), np.array((236, 226, 238), np.float32)


@dataclass(frozen=True, eq=False)
class _Stamp:
    """A small picture with its opacity, laid on the slide at ``corner``."""

    corner: Int64[np.ndarray, "2"]
    colour: NDArray[np.float32]
    opacity: NDArray[np.float32]

    def lay(self, picture: NDArray[np.uint8], box: Box) -> None:
        """Change what lies under it of a picture ``[h, w, 3]`` of a box."""
        low = np.maximum(self.corner, box[0])
        high = np.minimum(self.corner + len(self.opacity), box[1])
        if not bool((low < high).all()):
            return
        ours = tuple(map(slice, (low - self.corner).tolist(), (high - self.corner).tolist()))
        area = tuple(map(slice, (low - box[0]).tolist(), (high - box[0]).tolist()))
        part = picture[area].astype(np.float32)
        mixed = part + self.opacity[ours][..., None] * (self.colour[ours] - part)
        picture[area] = (mixed + np.float32(0.5)).astype(np.uint8)


class LesionSlide(SyntheticSlide):
    """A slide as a function of the place, with lesions of one kind or without.

    Args:
        side: of the slide in pixels, at least 256.
        seed: equal seeds give equal slides.
        kind: ``"none"``, ``"cluster"`` (mottled all over) or ``"ring"`` (pale inside).
        tissue: share of the pixels that are tissue, in [0.05, 0.8].

    Raises:
        BudgetError: a side or a share out of range, or no room for a lesion on the tissue.
        ConfigError: another kind.

    Cost: 2 s, and 40 ns a pixel where it is looked at.
    """

    def __init__(self, side: int, seed: int, kind: str, tissue: float = 0.43) -> None:
        if side < 256 or not 0.05 <= tissue <= 0.8:
            raise BudgetError(f"side={side}, tissue={tissue}; the side is at least 256, the tissue from 0.05 to 0.8")
        if kind not in KINDS:
            raise ConfigError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        super().__init__(side, seed, tissue)
        rng = np.random.Generator(np.random.PCG64((seed, 2)))
        count = 0 if kind == "none" else int(rng.integers(1, _MOST + 1))
        names = [kind] * count + ["smudge"] * _SMUDGES
        size = rng.integers(_SIZES[0], _SIZES[1] + 1, len(names))
        corner = self._places(rng, size)
        self._stamps = [_draw(rng, *one) for one in zip(names, corner, size.tolist(), strict=True)]
        self.kind = kind
        self.boxes = np.stack([corner[:count], corner[:count] + size[:count, None]], axis=1)
        """Where each lesion lies, int64 ``[G, 2, 2]``, (start, stop) in pixels."""

    def labels(self, box: Box) -> UInt8[np.ndarray, "h w"] | int:
        """Glass or tissue of every pixel of a box, or the one of all."""
        found = super().labels(box)
        return min(found, TISSUE) if isinstance(found, int) else np.minimum(found, np.uint8(TISSUE))

    def pixels(self, box: Box) -> UInt8[np.ndarray, "3 h w"]:
        """The picture of a box, a view of ``[h, w, 3]``."""
        picture = np.moveaxis(super().pixels(box), 0, -1)
        for stamp in self._stamps:
            stamp.lay(picture, box)
        return np.moveaxis(picture, -1, 0)

    def _places(self, rng: np.random.Generator, size: NDArray[np.int64]) -> NDArray[np.int64]:
        """First pixels of squares on the tissue that do not touch."""
        corner = np.zeros((len(size), 2), np.int64)
        placed = 0
        for _ in range(_TRIES * len(size)):
            if placed == len(size):
                break
            corner[placed] = rng.integers(0, self.side - size[placed], 2)
            low, high = corner[placed], corner[placed] + size[placed]
            apart = (high < corner[:placed]) | (low > corner[:placed] + size[:placed, None])
            if not bool(apart.any(axis=1).all()):
                continue
            found = self.labels(((int(low[0]), int(low[1])), (int(high[0]), int(high[1]))))
            placed += not np.any(np.equal(found, GLASS))
        if placed < len(size):
            raise BudgetError(f"side={self.side} has no room for {len(size)} lesions and smudges on tissue; raise it")
        return corner


def _draw(rng: np.random.Generator, name: str, corner: NDArray[np.int64], size: int) -> _Stamp:
    """A lesion or a smudge that fills a square of ``size`` pixels."""
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1
    far = np.sqrt(np.square(line)[:, None] + np.square(line))
    soft = np.float32(2.5 / size)
    opacity = np.clip((1 - far) / soft, 0, 1)
    colour = np.broadcast_to(_DARK, (size, size, 3)).copy()
    if name == "smudge":
        opacity = np.float32(0.8) * np.clip((1 - far) / np.float32(0.6), 0, 1)
    elif name == "ring":
        colour += np.clip((np.float32(0.6) - far) / soft, 0, 1)[..., None] * (_PALE - _DARK)
    else:
        spots = rng.random((-(-size // 3), -(-size // 3)), np.float32).repeat(3, 0).repeat(3, 1)[:size, :size]
        colour += (spots > 0.6)[..., None] * np.float32(0.7) * (_PALE - _DARK)
    return _Stamp(corner, colour, opacity)


def write_lesions(
    folder: str | Path, counts: tuple[int, int, int], side: int = 4096, *, seed: int = 0, tile: int = 256
) -> Path:
    """Write a data set: pyramids in ``slides/``, ``labels.csv`` (path, label, marks, split), ``truth.jsonl`` (boxes).

    Where there are lesions, ``marks`` names the GeoJSON of their places, in ``marks/``.

    Args:
        folder: made where it does not exist.
        counts: slides to train, to validate and to test; the kinds take turns.
        side: of the slides in pixels.
        seed: of the set; every slide has a seed of its own.
        tile: side of a stored tile in pixels.

    Returns:
        The CSV.

    Raises:
        BudgetError: a side below 256.
        FormatError: a file exists or cannot be written.

    Cost: 3 s for a slide of 4,096 pixels a side.
    """
    root = Path(folder)
    (root / "slides").mkdir(parents=True, exist_ok=True)
    rows, truth = ["path,label,marks,split"], []
    for part, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
        for number in range(count):
            slide = LesionSlide(side, (seed * 3 + part) * 10**7 + number, KINDS[number % len(KINDS)])
            name = f"slides/{split}-{number:04d}.tif"
            write_pyramid(
                root / name, slide.pixels, shape=(side, side), dtype=np.uint8, channels=3, tile=tile, ratio=RATIO,
                spacing=(0.0005, 0.0005), kind="tiff", compression="jpeg", quality=90, reduce="mean",
            )  # fmt: skip
            marks = write_marks(root, f"{split}-{number:04d}", slide.boxes, slide.kind) if len(slide.boxes) else ""
            rows.append(f"{name},{slide.kind},{marks},{split}")
            truth.append({"path": name, "label": slide.kind, "boxes": slide.boxes})
    write_jsonl(root / "truth.jsonl", truth)
    with atomic_write(root / "labels.csv") as file:
        file.write(("\n".join(rows) + "\n").encode())
    return root / "labels.csv"
