"""What a model will cost, before anything runs: tokens, FLOPs and bytes of every stage.

The plan is a rehearsal: the model's own code runs once on torch's meta device, where tensors have shapes but no memory.
A ledger counts the operations of every matrix product and the bytes that are alive at any time, so that the plan cannot
drift from the code. Attention is rehearsed as the fused kernel that runs in earnest, never as an L x L matrix.

**Differs** from formulas such as ``24 L E^2 + 4 L^2 E`` per block, which know neither decoder nor memory; the formula
is kept as :func:`encoder_flops` and equals the rehearsal.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from foveate.budget import Settings, format_bytes, settings_within
from foveate.errors import BudgetError, ConfigError
from foveate.ledger import Ledger, RealIndices, Stage, fused_attention

if TYPE_CHECKING:
    from foveate.models import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """Cost of one batch.

    Args:
        model: name or description of the model.
        num_leaves: tokens per image, prefix tokens not counted.
        batch_size: images at once.
        training: forward, backward and optimiser instead of forward alone.
        dtype: of weights and activations.
        stages: in order of their first use.
        parameter_bytes: of the weights.
        optimiser_bytes: of AdamW's two moments; 0 without training.
        input_bytes: of the patches.
        activation_bytes: most bytes alive at once of everything the run makes, gradients included.
        image_bytes: of the image that is cut, held to the end; 0 where no image was planned.
        cut_bytes: of its normalised copy and its value pyramid, gone before the model runs.
    """

    model: str
    num_leaves: int
    batch_size: int
    training: bool
    dtype: str
    stages: tuple[Stage, ...]
    parameter_bytes: int
    optimiser_bytes: int
    input_bytes: int
    activation_bytes: int
    image_bytes: int = 0
    cut_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch."""
        return self.num_leaves * self.batch_size

    @property
    def flops(self) -> int:
        """Operations of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Most bytes that weights, optimiser, image, patches and activations need together."""
        held = self.parameter_bytes + self.optimiser_bytes + self.image_bytes
        return held + max(self.cut_bytes, self.input_bytes + self.activation_bytes)

    def to_text(self) -> str:
        """The plan as a table."""
        kind = "one training step" if self.training else "inference"
        head = f"{self.model}: {kind}, {self.batch_size} x {self.num_leaves:,} leaves, {self.dtype}"
        lines = [head, f"  {'stage':<12}{'GFLOP':>12}{'share':>8}{'live bytes':>20}"]
        for stage in self.stages:
            share = stage.flops / max(self.flops, 1)
            lines.append(
                f"  {stage.name:<12}{stage.flops / 1e9:>12,.2f}{share:>8.0%}{format_bytes(stage.peak_bytes):>20}"
            )
        lines.append(f"  {'total':<12}{self.flops / 1e9:>12,.2f}")
        parts = {"weights": self.parameter_bytes, "optimiser": self.optimiser_bytes, "image": self.image_bytes}
        if self.cut_bytes > self.input_bytes + self.activation_bytes:
            parts["cutting it"] = self.cut_bytes
        else:
            parts |= {"patches": self.input_bytes, "activations": self.activation_bytes}
        text = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        return "\n".join([*lines, f"  peak memory {format_bytes(self.peak_bytes)} = {text}"])


def plan(
    model: "str | ModelConfig",
    num_leaves: int,
    batch_size: int = 1,
    *,
    training: bool = False,
    dtype: str = "float32",
    cells: Sequence[int] | None = None,
) -> Plan:
    """Rehearse one batch of a model and return what it costs.

    Args:
        model: a name from ``list_models()`` or a configuration; its field ``checkpoint`` says whether training keeps
            only the inputs of the blocks.
        num_leaves: leaves of every image.
        batch_size: images at once.
        training: plan a training step (forward, loss, backward, AdamW) instead of inference.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of weights and activations; AdamW's moments are float32.
        cells: smallest leaves along each axis of the image, all of which ``unetr`` decoders paint, however few leaves
            there are; None: a square of them or, where that has another number, a row.

    Raises:
        BudgetError: ``num_leaves`` or ``batch_size`` below 1.
        ConfigError: an unknown dtype or model.

    Cost: the tables of neighbours of ``num_leaves`` leaves, and some milliseconds per block; no weights are made.
    """
    for name, value in (("num_leaves", num_leaves), ("batch_size", batch_size)):
        if value < 1:
            raise BudgetError(f"{name}={value} must be at least 1; one leaf and one image are the least there is")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}; use one of these")
    network, config = _build(model, DTYPES[dtype], training)
    patches = _patches(config, num_leaves, batch_size, DTYPES[dtype], cells)
    ledger = Ledger([*network.parameters(), *network.buffers(), patches.pixels])
    with torch.set_grad_enabled(training), RealIndices(), fused_attention(), ledger, _named_stages(network, ledger):
        logits = network(patches)
        if training:
            with ledger.stage("loss"):
                loss = -(functional.log_softmax(logits.float(), dim=1) * torch.empty_like(logits)).sum()
            with ledger.stage("backward", outermost=True):
                loss.backward()
    parameters = list(network.parameters())
    return Plan(
        model=_name(model, config),
        num_leaves=num_leaves,
        batch_size=batch_size,
        training=training,
        dtype=dtype,
        stages=ledger.stages(),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        optimiser_bytes=sum(p.numel() * 8 for p in parameters if p.requires_grad) if training else 0,
        input_bytes=patches.pixels.numel() * patches.pixels.element_size(),
        activation_bytes=ledger.peak,
    )


def encoder_flops(config: "ModelConfig", num_leaves: int) -> int:
    """Operations of embedding and blocks for one image, by formula: ``depth (24 L E^2 + 4 L^2 E) + 2 L C P^N E``.

    Args:
        config: of the model; other mlp ratios than 4 are respected.
        num_leaves: leaves of the image; prefix tokens are added.
    """
    length, width = num_leaves + int(config.class_token) + config.num_registers, config.width
    dense = 8 * length * width**2 + 4 * length * width * int(width * config.mlp_ratio)
    patch = config.in_chans * config.patch_size**config.num_dims
    blocks = config.depth * (dense + 4 * length**2 * width)
    return int(blocks + 2 * num_leaves * patch * width)


def plan_image(
    model: "str | ModelConfig",
    shape: Sequence[int],
    *,
    max_leaves: int,
    min_size: int = 8,
    batch_size: int = 1,
    training: bool = False,
    checkpoint: bool = False,
    dtype: str = "float32",
    itemsize: int = 1,
    budget: int | None = None,
) -> str:
    """Plan a named model on an image that is held, beside the uniform grid of the smallest leaf size, as text.

    Args:
        model: a name from ``list_models()`` or a configuration.
        shape: spatial shape of the image.
        max_leaves: most leaves of an image.
        min_size: side of the smallest leaf in pixels.
        batch_size: images at once.
        training: plan a training step instead of inference.
        checkpoint: keep only the inputs of the blocks while training.
        dtype: as in `plan`.
        itemsize: bytes of a sample of the image as decoded.
        budget: bytes that the process may take; settings are changed as in `settings_within` until it is kept.

    Raises:
        BudgetError: a count below 1, or a budget that nothing keeps.
        ConfigError: an unknown dtype or model, or a model for another number of axes.
    """
    from foveate.models import create_config

    for name, value in (("max_leaves", max_leaves), ("min_size", min_size)):
        if value < 1:
            raise BudgetError(f"{name}={value} must be at least 1; give a positive whole number")
    config = create_config(model) if isinstance(model, str) else model
    if config.num_dims != len(shape):
        raise ConfigError(
            f"{_name(model, config)} is for {config.num_dims}-D images, but the shape {tuple(shape)} has {len(shape)} "
            f"axes; choose a model whose name {'ends in _3d' if len(shape) == 3 else 'does not end in _3d'}"
        )
    grid = [-(-side // min_size) for side in shape]
    cells = math.prod(grid)
    image, cut = math.prod(shape) * config.in_chans * itemsize, cut_bytes(shape, config.in_chans, min_size)

    def cost(settings: Settings) -> Plan:
        chosen = replace(config, checkpoint=settings.checkpoint)
        batch = plan(chosen, settings.max_leaves, settings.batch_size, training=training, dtype=dtype, cells=grid)
        stages = (Stage("input", 0, image + cut), *batch.stages)
        return replace(batch, model=_name(model, config), stages=stages, image_bytes=image, cut_bytes=cut)

    asked = Settings(min(max_leaves, cells), batch_size, checkpoint)
    settings, result = settings_within(budget, asked, cost, training=training)
    leaves = settings.max_leaves
    factor = encoder_flops(config, cells) / encoder_flops(config, leaves)
    return "\n".join(
        [
            f"image {' x '.join(map(str, shape))}, at most {leaves:,} leaves of at least {min_size} pixels",
            result.to_text(),
            f"  a uniform grid of {min_size} pixels has {cells:,} tokens: {cells / leaves:,.1f}x as many, "
            f"{factor:,.1f}x the encoder's FLOPs",
            *settings.changes(asked, budget),
        ]
    )


def cut_bytes(shape: Sequence[int], channels: int, min_size: int) -> int:
    """Bytes that cutting an image takes beside it: a float32 copy, two steps of sums, and a value per cell.

    Args:
        shape: spatial shape.
        channels: number of channels C.
        min_size: side of the smallest leaf in pixels.
    """
    children = 1 << len(shape)
    sums = 8 * channels * (1 + 1 / children) / children
    values = 8 * children / (children - 1) / math.prod([min_size] * len(shape))
    return math.ceil(math.prod(shape) * (4 * channels + sums + values))


def _name(model: "str | ModelConfig", config: "ModelConfig") -> str:
    return model if isinstance(model, str) else f"{config.width} wide, {config.depth} deep"


def _build(model: "str | ModelConfig", dtype: torch.dtype, training: bool) -> tuple[nn.Module, "ModelConfig"]:
    from foveate.models import build_model, create_config

    config = create_config(model) if isinstance(model, str) else model
    with torch.device("meta"):
        network = build_model(config)
    return network.to(dtype).train(training), config


def _patches(
    config: "ModelConfig", num_leaves: int, batch_size: int, dtype: torch.dtype, cells: Sequence[int] | None
) -> Any:
    """Patches without memory: a square block of leaves of the patch size for every image, or leaves that cover one."""
    from foveate.geometry.leaves import uniform_leaves
    from foveate.geometry.patches import Patches
    from foveate.geometry.tree import adaptive_leaves

    sides = (config.patch_size,) * config.num_dims
    wide = math.ceil(num_leaves ** (1 / config.num_dims) - 1e-9)
    square = (wide,) * config.num_dims
    if config.decoder.startswith("unetr"):  # as fine as the tree of an image full of noise, a pixel for a cell
        row = (*(1,) * (config.num_dims - 1), num_leaves)
        cells = cells or (square if math.prod(square) == num_leaves else row)
        noise = torch.rand(1, *cells, generator=torch.Generator().manual_seed(0))
        leaves = adaptive_leaves(noise, max_leaves=num_leaves, min_size=1)
    else:
        block = uniform_leaves([side * wide for side in sides], config.patch_size)
        leaves = block.select(torch.arange(num_leaves))
    pixels = torch.empty(len(leaves) * batch_size, config.in_chans, *sides, dtype=dtype, device="meta")
    return Patches(pixels, (leaves,) * batch_size)


_STAGE_OF = {"attn": "attention", "mlp": "mlp", "decoder": "decoder"}


@contextmanager
def _named_stages(network: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Name stages by the modules that run: attn, mlp, decoder and everything called embed."""
    handles = []
    for path, module in network.named_modules():
        last = path.rpartition(".")[2]
        name = "embedding" if last.endswith("embed") else _STAGE_OF.get(last)
        if name is not None:
            handles.append(module.register_forward_pre_hook(_Enter(ledger, name)))
            handles.append(module.register_forward_hook(_Leave(ledger), always_call=True))
    yield
    for handle in handles:
        handle.remove()


@dataclass(frozen=True)
class _Enter:
    ledger: Ledger
    name: str

    def __call__(self, *_: Any) -> None:
        self.ledger.enter(self.name)


@dataclass(frozen=True)
class _Leave:
    ledger: Ledger

    def __call__(self, *_: Any) -> None:
        self.ledger.leave()
