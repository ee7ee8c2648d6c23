"""Detail: what an image has to say in every cell of a tree, and therefore where the leaves go.

A detail turns an image into a value per cell at every scale, in which no parent is below its children. That is all the
tree needs: it splits the largest value first. Values are finite, never negative, and 0 where nothing is gained.

Legend: C channels, S spatial axes, D H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from foveate.errors import ConfigError, FormatError, ShapeError
from foveate.geometry import kernels_detail as kernels
from foveate.geometry.edges import edge_map
from foveate.geometry.image import Image, Real, as_array, as_volume, check_finite, plain, smoothed
from foveate.geometry.pyramid import (
    Sizes,
    Triple,
    Values,
    additive,
    fold,
    gain_pyramid,
    grid_dims,
    map_pyramid,
    monotone_hull,
    rank_by_gain,
    residual_pyramid,
    sample_sizes,
    split_ratios,
    triple,
)


@runtime_checkable
class Detail(Protocol):
    """Anything that values the cells of an image."""

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """One float64 array per scale, finest first, of shape ``ceil(S / sizes[k])`` (with a leading 1 in 2-D).

        Args:
            image: ``[C, *S]``, checked, any number type.
            sizes: cell size per scale in pixels, finest first.
            patch_size: samples per token and axis.
        """
        ...


@dataclass(frozen=True)
class Residual:
    """The exact squared error that a cell leaves when it becomes one token of area means (default).

    It is 0 where a token loses nothing. Under a budget alone, cells are ranked by the error that splitting them saves
    per leaf it costs (`gain`), which comes within a few hundredths of a dB of the provable optimum.

    Args:
        smooth: sigma in pixels of a Gaussian over the image first; noise otherwise draws leaves everywhere.
        noise_floor: subtract the energy that noise of the image's own level would have in the cell.
    """

    smooth: Real = 0.0
    noise_floor: bool = False

    def __post_init__(self) -> None:
        _check_sigma(self.smooth)

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        image = smoothed(image, self.smooth)
        levels = residual_pyramid(as_volume(image), image.shape[1:], sizes, patch_size)
        return self._clean(image, levels, sizes, patch_size) if self.noise_floor else levels

    def gain(
        self, image: Image, sizes: Sizes, patch_size: tuple[int, ...], keep: dict[Triple, Image] | None = None
    ) -> list[Values]:
        """The same, as what a split saves per leaf that it costs; ``keep`` receives the sums of samples."""
        shape = image.shape[1:]
        if not self.noise_floor:
            return gain_pyramid(as_volume(smoothed(image, self.smooth)), shape, sizes, patch_size, keep)
        levels = self.pyramid(image, sizes, patch_size)
        saved = [levels[0]]
        for low, high, ratio in zip(levels, levels[1:], split_ratios(sizes), strict=False):
            change = high - fold(low, ratio)
            saved.append(np.where(change > 1e-9 * high, change, 0.0))
        return rank_by_gain(saved, shape, sizes)

    def _clean(self, image: Image, levels: list[Values], sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        power = sum(_noise_power(channel) for channel in image)
        area = additive(_cell_area(image.shape[1:], sizes), sizes)
        clean = []
        for values, pixels, extent in zip(levels, area, sample_sizes(sizes, patch_size), strict=True):
            freedom = pixels * (1.0 - 1.0 / float(np.prod(extent)))
            clean.append(np.maximum(values - power * (freedom + 3.0 * np.sqrt(2.0 * freedom)), 0.0))
        return monotone_hull(clean, sizes)


@dataclass(frozen=True)
class TotalVariation:
    """Sum of absolute differences between neighbouring pixels, all axes and channels; keeps thin structures."""

    smooth: Real = 0.0

    def __post_init__(self) -> None:
        _check_sigma(self.smooth)

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        finest = np.zeros(tuple(grid_dims(image.shape[1:], sizes)[0]))
        kernels.variation_sum(as_volume(smoothed(image, self.smooth)), finest, triple(sizes[0]))
        return additive(finest, sizes)


@dataclass(frozen=True)
class Edges:
    """Number of edge pixels: blur, Canny, count.

    Args:
        blur: side of the Gaussian kernel in pixels, odd; 1 for none.
        low: lower threshold on the gradient, grey levels of the image scaled to 0..255; None: 0.4 of the upper one.
        high: upper threshold; None: the ``quantile`` of the image's own gradients.
        quantile: share of pixels below the upper threshold, in (0, 1).

    Source: Zhang et al., SC24, arXiv 2404.09707; `paper_edges` has its constants.
    **Differs**: thresholds come from the image itself, because fixed ones see nothing in photographs of low contrast;
    volumes get one isotropic 3-D gradient with hysteresis, not slices.
    """

    blur: int = 3
    low: Real | None = None
    high: Real | None = None
    quantile: float = 0.97

    def __post_init__(self) -> None:
        if self.blur < 1 or self.blur % 2 == 0:
            raise ConfigError(f"blur={self.blur} must be an odd number of pixels >= 1; use 1 for no blur")
        if not 0.0 < self.quantile < 1.0:
            raise ConfigError(f"quantile={self.quantile} must lie in (0, 1); 0.97 is the default")
        if self.low is not None and self.high is not None and not 0 <= self.low <= self.high:
            raise ConfigError(f"low={self.low}, high={self.high} must satisfy 0 <= low <= high; swap them")

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        edges = edge_map(image, self.blur, self.low, self.high, self.quantile)
        return map_pyramid(as_volume(edges[None]), image.shape[1:], sizes)


def paper_edges(blur: int = 3, low: Real = 100, high: Real = 200) -> Edges:
    """`Edges` with fixed thresholds, by default the paper's.

    Args:
        blur: side of the Gaussian kernel in pixels, odd.
        low: lower Canny threshold, grey levels of 0..255.
        high: upper Canny threshold.

    Returns:
        The detail.
    """
    return Edges(blur=blur, low=low, high=high)


@dataclass(frozen=True)
class Variance:
    """Mean squared distance of a cell's pixels from their mean, raised to the largest of its children."""

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        shape = image.shape[1:]
        levels = residual_pyramid(as_volume(image), shape, sizes, (1,) * len(shape))
        area = additive(_cell_area(shape, sizes), sizes)
        means = [values / (pixels * image.shape[0]) for values, pixels in zip(levels, area, strict=True)]
        return monotone_hull(means, sizes)


@dataclass(frozen=True)
class Entropy:
    """Entropy in bits of a cell's grey levels, raised to the largest of its children.

    Args:
        bins: number of equal bins over the image's own range, at least 2.
    """

    bins: int = 16

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ConfigError(f"bins={self.bins} must be at least 2; 16 is the default")

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        low, high = float(image.min()), float(image.max())
        counts = np.zeros((*grid_dims(image.shape[1:], sizes)[0], self.bins), np.int32)
        step = (high - low) / self.bins or 1.0
        kernels.histogram(as_volume(image), counts, triple(sizes[0]), low, step)
        folded = [counts.astype(np.float64)]
        for ratio in split_ratios(sizes):
            folded.append(fold(folded[-1], (*ratio, 1)))
        return monotone_hull([_entropy(level) for level in folded], sizes)


@dataclass(frozen=True, eq=False)
class AdditiveMap:
    """Your own map: a cell is worth the sum of its pixels.

    Args:
        values: ``[*S]`` like the image, or a function of the image ``[C, *S]`` that returns it; finite, not negative.
    """

    values: Image | Tensor | Callable[[Image], Image | Tensor]

    def pixels(self, image: Image) -> Image:
        """The checked map, ``[*S]``.

        Raises:
            ShapeError: it has not the shape of the image.
            FormatError: it has NaN, Inf or negative values.
        """
        values = self.values(image) if callable(self.values) else self.values
        found = as_array(values)
        if found.shape != image.shape[1:]:
            raise ShapeError(
                f"detail map has shape {found.shape}; give one value per pixel of the image {image.shape[1:]}"
            )
        found = plain(found)
        check_finite(found, "detail map")
        if found.dtype.kind == "f" and found.min() < 0:
            raise FormatError(f"detail map reaches {found.min():.4g}; values must be >= 0, clip it first")
        return found

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        return map_pyramid(as_volume(self.pixels(image)[None]), image.shape[1:], sizes)


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of details, each divided by its own total over the image first, so that weights compare.

    Args:
        terms: (detail, weight) pairs; weights are finite and not negative, and one is above 0.
    """

    terms: tuple[tuple[Any, Real], ...]

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.terms]
        if not weights or not all(np.isfinite(w) and w >= 0 for w in weights) or max(weights) == 0:
            raise ConfigError(f"weights={weights} of a mixture must be finite, >= 0, and one above 0")

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        mixed = [np.zeros(tuple(dims)) for dims in grid_dims(image.shape[1:], sizes)]
        for detail, weight in self.terms:
            levels = get_detail(detail).pyramid(image, sizes, patch_size)
            total = float(levels[-1].sum())
            if total > 0:
                mixed = [m + (weight / total) * level for m, level in zip(mixed, levels, strict=True)]
        return monotone_hull(mixed, sizes)


@dataclass(frozen=True)
class Smooth:
    """Any detail, measured after a Gaussian.

    Args:
        detail: a name, a detail or whatever `get_detail` takes.
        sigma: of the Gaussian, pixels, >= 0.
    """

    detail: Any
    sigma: Real

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)

    def pyramid(self, image: Image, sizes: Sizes, patch_size: tuple[int, ...]) -> list[Values]:
        """See `Detail.pyramid`."""
        return get_detail(self.detail).pyramid(smoothed(image, self.sigma), sizes, patch_size)


_NAMED: dict[str, Callable[[], Detail]] = {
    "residual": Residual,
    "tv": TotalVariation,
    "edges": Edges,
    "paper_edges": paper_edges,
    "variance": Variance,
    "entropy": Entropy,
}


def list_details() -> list[str]:
    """The names that ``detail=`` takes."""
    return list(_NAMED)


def get_detail(detail: object) -> Detail:
    """Return the detail that a name, a map, a function or a mixture stands for.

    Args:
        detail: a name of `list_details`; a `Detail`; a map ``[*S]``; a function from image to map; a mapping from any
            of these to a weight, or a sequence of (detail, weight) pairs.

    Returns:
        The detail.

    Raises:
        ConfigError: the name is unknown, or the object is none of these.
    """
    if isinstance(detail, str):
        if detail not in _NAMED:
            raise ConfigError(f"detail={detail!r} is unknown; choose one of {', '.join(_NAMED)}, or give your own map")
        return _NAMED[detail]()
    if isinstance(detail, type):
        raise ConfigError(f"detail={detail.__name__} is a class; give an instance, such as {detail.__name__}()")
    if isinstance(detail, Detail):
        return detail
    if isinstance(detail, Mapping):
        return Mixture(tuple(detail.items()))
    if isinstance(detail, np.ndarray | Tensor) or callable(detail):
        return AdditiveMap(detail)
    if isinstance(detail, Sequence) and all(isinstance(term, Sequence) and len(term) == 2 for term in detail):
        return Mixture(tuple((term[0], term[1]) for term in detail))
    raise ConfigError(f"detail of type {type(detail).__name__} is not a name, a map, a function or a mixture")


def _check_sigma(sigma: Real) -> None:
    if not 0 <= sigma < np.inf:
        raise ConfigError(f"smooth={sigma} must be a Gaussian sigma in pixels, finite and >= 0")


def _cell_area(shape: Sequence[int], sizes: Sizes) -> Values:
    sides = [
        np.minimum(cell, length - np.arange(count) * cell)
        for length, cell, count in zip(triple(shape), triple(sizes[0]), grid_dims(shape, sizes)[0], strict=True)
    ]
    area = sides[0][:, None, None] * sides[1][None, :, None] * sides[2][None, None, :]
    return np.asarray(area, np.float64)


def _noise_power(channel: Image) -> float:
    """Variance of the noise by the median absolute diagonal Haar detail, which edges hardly touch."""
    if min(channel.shape[-2:]) < 2:
        return 0.0
    rows, cols = (n - n % 2 for n in channel.shape[-2:])
    x = channel[..., :rows, :cols].astype(np.float32)
    diagonal = (x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2
    return float(np.median(np.abs(diagonal)) / 0.6745) ** 2


def _entropy(counts: Values) -> Values:
    total = counts.sum(-1, keepdims=True)
    share = counts / np.maximum(total, 1.0)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    bits: Values = np.maximum(-(share * logs).sum(-1), 0.0)
    return bits
