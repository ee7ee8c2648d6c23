"""Needles in a haystack: a bag of tiny patches, of which five show digits and the others nothing or lines.

What is asked of a bag can be told from its digits alone, and where they are is known, so that a selector's recall is
exact. The digits of one part of the data are drawn by other hands than those of another.

Legend: N patches, P side of a patch, G digits in a bag.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from foveate.errors import BudgetError, ConfigError
from foveate.geometry.image import Real
from foveate.geometry.patch_source import TensorPatches
from foveate.testing.digits import NUM_HIDDEN, SPLITS, bag_labels, hidden_digits
from foveate.testing.glyphs import NUM_DIGITS, draw_digits, draw_strokes

HANDS = 64  # glyphs of each digit in one part of the data


@dataclass(frozen=True, eq=False)
class NeedleBag:
    """One bag with its exact truth.

    Args:
        pixels: the patches, black but for lines.
        index: positions of the digits in the bag, rising.
        digits: class of each.
        blank: the patches that are black all over.
    """

    pixels: UInt8[np.ndarray, "N 1 P P"]
    index: Int64[np.ndarray, " G"]
    digits: Int64[np.ndarray, " G"]
    blank: Bool[np.ndarray, " N"]

    @property
    def labels(self) -> dict[str, Any]:
        """The three tasks: ``majority`` and ``max`` class, ``multi`` the classes there are."""
        return bag_labels(self.digits)

    @property
    def source(self) -> TensorPatches:
        """The patches, to be read by index."""
        return TensorPatches(torch.from_numpy(self.pixels), constant=torch.from_numpy(self.blank))

    def recall(self, kept: Int64[Tensor, " K"]) -> float:
        """Share of the digits that are among the patches at ``kept``."""
        return float(np.isin(self.index, kept.cpu().numpy()).mean())


def needle_bag(
    seed: int,
    num_patches: int = 1000,
    *,
    split: str = "train",
    patch_size: int = 8,
    blank: Real = 0.5,
    hands: int = HANDS,
    corners: int = 0,
) -> NeedleBag:
    """Hide five digits, three of them of one class, in a bag of blank patches and random lines.

    Args:
        seed: any integer >= 0; equal seeds and splits give equal bags.
        num_patches: N >= 5.
        split: ``"train"``, ``"val"`` or ``"test"``. No two of them share a glyph, nor a bag.
        patch_size: side of a patch in pixels, P.
        blank: share of the patches that are black, in [0, 1].
        hands: glyphs of each digit that a split knows.
        corners: of the lines. Straight ones have less ink than digits; with two corners they have as much, and some
            look like a 1 or a 4.

    Raises:
        BudgetError: fewer patches than digits, or a share or number out of range.
        ConfigError: another split.

    Cost: 1 ms for 1,000 patches of 8 x 8, once the glyphs are drawn (0.1 s per split).
    Source: Bergner et al., ICLR 2023, in the small: their tasks, without an image.
    """
    if num_patches < NUM_HIDDEN or not 0 <= blank <= 1 or corners < 0:
        raise BudgetError(
            f"num_patches={num_patches}, blank={blank}, corners={corners}; give 5 patches at least, a share in [0, 1] "
            "and 0 corners or more"
        )
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    part = SPLITS.index(split)
    rng = np.random.Generator(np.random.PCG64((seed, part)))
    digits = hidden_digits(rng)
    order = rng.permutation(num_patches)
    num_blank = min(round(blank * num_patches), num_patches - NUM_HIDDEN)
    pixels = np.zeros((num_patches, 1, patch_size, patch_size), np.uint8)
    lines = order[NUM_HIDDEN + num_blank :]
    pixels[lines, 0] = draw_strokes(rng, len(lines), patch_size, corners + 2)
    place = np.argsort(order[:NUM_HIDDEN])
    index, digits = order[:NUM_HIDDEN][place], digits[place]
    pixels[index, 0] = glyphs(part, patch_size, hands)[digits, rng.integers(0, hands, NUM_HIDDEN)]
    none = np.zeros(num_patches, bool)
    none[order[NUM_HIDDEN : NUM_HIDDEN + num_blank]] = True
    return NeedleBag(pixels, index, digits, none)


class NeedleBags(Sequence[NeedleBag]):
    """A data set of bags, each drawn when it is asked for.

    Args:
        count: number of bags, of which the first has the seed ``seed * count``, and so on.
        num_patches: of each.
        split: as in `needle_bag`, as is ``options``.
        seed: of the set; sets of equal counts and other seeds share no bag.
    """

    def __init__(
        self, count: int, num_patches: int = 1000, split: str = "train", seed: int = 0, **options: Any
    ) -> None:
        self._seeds = range(seed * count, (seed + 1) * count)
        self._num_patches, self._split, self._options = num_patches, split, options

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: Any) -> Any:
        """The bag at a position, or the bags of a slice as a list."""
        seeds = self._seeds[index]
        if isinstance(seeds, range):
            return [self._bag(seed) for seed in seeds]
        return self._bag(seeds)

    def _bag(self, seed: int) -> NeedleBag:
        return needle_bag(seed, self._num_patches, split=self._split, **self._options)


@lru_cache(maxsize=16)
def glyphs(part: int, patch_size: int, hands: int) -> UInt8[np.ndarray, "10 G P P"]:
    """The digits that one part of the data knows, by class and hand."""
    rng = np.random.Generator(np.random.PCG64((part, patch_size, hands)))
    drawn = draw_digits(rng, np.repeat(np.arange(NUM_DIGITS), hands), patch_size)
    return drawn.reshape(NUM_DIGITS, hands, patch_size, patch_size)
