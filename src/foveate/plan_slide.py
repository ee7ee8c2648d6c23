"""What a slide will cost before a pixel is read: bytes, operations and time from the header to the mask.

The model is rehearsed as in `foveate.plan`. What is read, and how many borders are painted, depends on pixels that
nobody has seen yet, so these parts are estimates for a slide of which half is tissue with even detail.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch.nn import functional

from foveate.budget import Settings, format_bytes, resident_bytes, settings_within
from foveate.errors import BudgetError, ShapeError
from foveate.geometry.lazy_tree import plan_stages
from foveate.geometry.pyramid import grid_dims
from foveate.geometry.source import Box, Source, level_window
from foveate.geometry.tree import cell_sizes
from foveate.plan import DTYPES, Plan, plan

if TYPE_CHECKING:
    from foveate.models import ModelConfig

TISSUE = 0.5
"""Share of a slide that is assumed to have detail."""
PAINTED = 30e6
"""Pixels per second that are painted, encoded and traced where there is tissue; measured on one core."""
STORED = 400e6
"""Pixels per second of the rest, which is of one class."""

_DENSE = 8  # leaves per cell that is read at a finer level
_PRICED = 2**22  # pixels whose splits are priced at once
_TILE = 512  # of the mask
_BUFFERS = 2**22  # of the libraries
_SLACK = 5  # one in so many bytes of activations is lost between blocks of the allocator and in attention's own buffers


class BlankSlide:
    """A slide of which only the shape is known: the usual levels 1, 4, 16, 64 of RGB bytes in tiles of 512, all 0.

    Args:
        shape: (H, W) of level 0.

    Raises:
        ShapeError: not two sides of at least one pixel.
    """

    channels = 3
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, shape: Sequence[int]) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise ShapeError(f"shape {tuple(shape)} of a slide; give its height and width in pixels")
        self.shape = tuple(shape)
        steps = [step for step in (1, 4, 16, 64) if step < max(shape)] or [1]
        self.levels = tuple(tuple(-(-side // step) for side in shape) for step in steps)
        self.downsamples = tuple((float(step), float(step)) for step in steps)

    def tile_shape(self, level: int = 0) -> tuple[int, ...]:
        """Storage tile of a level."""
        return tuple(min(_TILE, side) for side in self.levels[level])

    def read(self, box: Box, level: int = 0) -> Shaped[np.ndarray, "C *B"]:
        """Nothing."""
        start, stop = level_window(box, self.downsamples[level])
        return np.zeros((3, *(high - low for low, high in zip(start, stop, strict=True))), np.uint8)


@dataclass(frozen=True)
class Rates:
    """What this machine does per second, from a moment's measurement.

    Args:
        product: floating point operations of matrix products.
        attention: floating point operations of attention.
        decoded: pixels of JPEG.
    """

    product: float
    attention: float
    decoded: float

    @classmethod
    def measure(cls, dtype: str = "float32") -> "Rates":
        """Times a matrix product, an attention and a tile of JPEG; about half a second."""
        import imagecodecs

        a = torch.rand(768, 768, dtype=DTYPES[dtype])
        query = torch.rand(1, 6, 1024, 64, dtype=DTYPES[dtype])
        ramp = np.add.outer(np.arange(_TILE), np.arange(_TILE))
        tile = np.stack([ramp * 7 % 251, ramp % 13 * 19, ramp // 5 % 200], -1).astype(np.uint8)
        encoded = imagecodecs.jpeg8_encode(tile, 80)
        return cls(
            product=2 * 768**3 / _least(lambda: a @ a),
            attention=4 * 1024**2 * 384 / _least(lambda: functional.scaled_dot_product_attention(query, query, query)),
            decoded=_TILE**2 / _least(lambda: imagecodecs.jpeg8_decode(encoded)),
        )

    def __str__(self) -> str:
        return (
            f"{self.product / 1e9:,.0f} GFLOP/s in products, {self.attention / 1e9:,.0f} in attention, "
            f"{self.decoded / 1e6:,.0f} Mpx/s of JPEG"
        )


def _least(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)


@dataclass(frozen=True)
class Step:
    """One part of the way from slide to mask.

    Args:
        name: of the part.
        flops: operations of matrix products.
        held: bytes by what they are for, all that are alive when the part needs most.
        seconds: estimate.
    """

    name: str
    flops: int
    held: dict[str, int]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes alive when the part needs most."""
        return sum(self.held.values())


@dataclass(frozen=True)
class SlidePlan:
    """What a slide costs, part by part.

    Args:
        source: the slide.
        model: plan of the model's batch of one.
        steps: parts in their order.
        rates: what the seconds rest on.
        program_bytes: of Python and the libraries, what this process took when it planned.
        min_size: side of the smallest leaf in pixels.
        choice: a line on what was changed to stay within a budget.
    """

    source: Source
    model: Plan
    steps: tuple[Step, ...]
    rates: Rates
    program_bytes: int
    min_size: int
    choice: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once, program not counted."""
        return max(step.num_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        """Estimate of the whole time."""
        return sum(step.seconds for step in self.steps)

    @property
    def flops(self) -> int:
        """Operations of all parts."""
        return sum(step.flops for step in self.steps)

    def to_text(self) -> str:
        """The plan as a table, each part with what its bytes are for."""
        source, model = self.source, self.model
        shape = " x ".join(map(str, source.shape))
        steps = ", ".join(f"{down[0]:g}" for down in source.downsamples)
        origin = "assumed" if isinstance(source, BlankSlide) else "of the file"
        lines = [
            f"slide {shape}, {source.channels} channels of {source.dtype}, levels {steps} ({origin})",
            f"{model.model}: {model.num_leaves:,} leaves of at least {self.min_size} pixels, {model.dtype}",
            f"  {'stage':<8}{'GFLOP':>10}{'seconds':>9}{'bytes':>13}  of which",
        ]
        for step in self.steps:
            parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in step.held.items() if size)
            lines.append(
                f"  {step.name:<8}{step.flops / 1e9:>10,.1f}{step.seconds:>9.1f}{format_bytes(step.num_bytes):>13}  "
                f"{parts}"
            )
        most = max(self.steps, key=lambda step: step.num_bytes)
        total = format_bytes(self.program_bytes + self.peak_bytes)
        lines += [
            f"  {'total':<8}{self.flops / 1e9:>10,.1f}{self.seconds:>9.1f}{total:>13}  "
            f"program {format_bytes(self.program_bytes)} + stage {most.name}",
            f"  estimates: seconds from {self.rates}, measured now, {PAINTED / 1e6:g} Mpx/s painted;",
            f"  what is read and painted as if {TISSUE:.0%} of the slide were tissue with even detail",
        ]
        return "\n".join([*lines, *self.choice])


def plan_slide(
    model: "str | ModelConfig",
    slide: "Source | Sequence[int]",
    *,
    max_leaves: int,
    min_size: int | None = None,
    dtype: str = "float32",
    budget: int | None = None,
    rates: Rates | None = None,
) -> SlidePlan:
    """What predicting one slide takes, from its header alone.

    Args:
        model: a name from ``list_models()`` or a configuration.
        slide: an open image, of which no pixel is read, or a shape (H, W).
        max_leaves: most leaves.
        min_size: side of the smallest leaf in pixels; default the model's patch size.
        dtype: as in `plan`.
        budget: bytes that the process may take; leaves are halved until it is kept.
        rates: what the machine does per second; measured by default.

    Raises:
        BudgetError: a count below 1, or a budget that not even one leaf keeps.
        ConfigError: an unknown dtype or model.
        ShapeError: not a shape of two sides.

    Cost: as `plan`, and half a second for the rates.
    """
    from foveate.models import create_config

    config = create_config(model) if isinstance(model, str) else model
    least = config.patch_size if min_size is None else min_size
    if max_leaves < 1 or least < 1:
        raise BudgetError(f"max_leaves={max_leaves}, min_size={least}: both must be at least 1; give positive numbers")
    source = slide if isinstance(slide, Source) else BlankSlide(slide)
    speed = rates or Rates.measure(dtype)

    def cost(settings: Settings) -> SlidePlan:
        network = plan(config, settings.max_leaves, dtype=dtype)
        steps = _steps(source, config, network, settings.max_leaves, least, speed)
        name = model if isinstance(model, str) else network.model
        return SlidePlan(source, replace(network, model=name), steps, speed, resident_bytes(), least)

    asked = Settings(min(max_leaves, math.prod(-(-side // least) for side in source.shape)))
    settings, found = settings_within(budget, asked, cost)
    return replace(found, choice=tuple(settings.changes(asked, budget)))


def _steps(
    source: Source, config: "ModelConfig", network: Plan, leaves: int, min_size: int, rates: Rates
) -> tuple[Step, ...]:
    weights = {"buffers": _BUFFERS, "weights": network.parameter_bytes}
    read = _read(source, config, leaves, min_size)
    per_leaf = 4 * config.patch_size**config.num_dims
    patches = leaves * source.channels * per_leaf
    logits = leaves * config.num_classes * per_leaf
    attention = sum(stage.flops for stage in network.stages if stage.name == "attention")
    rows = source.shape[1] * _TILE
    pixels = math.prod(source.shape)
    cut = {"pixels": read.held, "values": read.values, "sums": read.sums, "patches": patches}
    return (
        Step("cut", 0, weights | cut, read.decoded / rates.decoded + read.held / 1e8),
        Step("patches", 0, weights | {"patches": 4 * patches}, 0.0),
        Step(
            "model",
            network.flops,
            weights
            | {"patches": network.input_bytes, "activations": network.activation_bytes}
            | {"allocator": network.activation_bytes // _SLACK},
            attention / rates.attention + (network.flops - attention) / rates.product,
        ),
        Step("logits", 0, weights | {"patches": patches, "logits": 3 * logits}, 0.0),
        Step(
            "write",
            0,
            weights | {"patches": patches, "logits": 2 * logits, "rows of tiles": rows},
            pixels * (TISSUE / PAINTED + (1 - TISSUE) / STORED),
        ),
    )


@dataclass(frozen=True)
class _Read:
    decoded: int  # pixels
    held: int  # bytes of pixels
    values: int  # bytes of what splits save
    sums: int  # bytes while splits are priced


def _read(source: Source, config: "ModelConfig", leaves: int, min_size: int) -> _Read:
    """What the tree reads if its leaves share the tissue evenly: levels that serve leaves of about that size."""
    samples = (config.patch_size,) * 2
    sizes = cell_sizes(source.shape, (min_size,) * 2)
    stages = plan_stages(source, sizes, samples)
    typical = math.sqrt(TISSUE * math.prod(source.shape) / leaves)
    decoded = held = 0
    low = stages[0].low
    for stage in stages:
        side = source.levels[stage.level]
        if stage is stages[0]:
            decoded, held = math.prod(side), math.prod(side)
            continue
        if typical > 2 * sizes[stage.high][0]:
            break
        unit = min(stage.high + 2, len(sizes) - 1)
        cell = sizes[unit][0] // stage.step[0]
        cells = min(math.prod(-(-n // cell) for n in side), max(1, leaves // _DENSE))
        tile = source.tile_shape(stage.level)
        decoded += min(int(TISSUE * math.prod(side)), cells * math.prod(tile))
        held += min(cells * cell**2, math.prod(side))
        low = stage.low
    values = 8 * sum(int(dims.prod()) for dims in grid_dims(source.shape, sizes)[low:])
    sample = source.channels * source.dtype.itemsize
    priced = min(_PRICED, math.prod(source.levels[stages[-1].level]))
    sums = priced * source.channels * (1 if source.dtype == np.uint8 else 2)
    return _Read(decoded, held * sample, 3 * values, sums)
