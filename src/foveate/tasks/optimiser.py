"""The optimiser and its learning rate: both follow from the settings and the place in the run alone."""

import math
import re
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from foveate.tasks.config import TrainConfig

_SPARED = {"pos_embed", "cls_token", "reg_token", "codes", "mask_token"}  # names of what weight decay leaves alone
_BLOCK = re.compile(r"encoder\.(?:\w+\.)?blocks\.(\d+)\.")
_STEM = tuple(f"encoder.{name}" for name in ("patch_embed", "pos_embed", "cls_token", "reg_token", "geometry_embed"))


@runtime_checkable
class Place(Protocol):
    """Where training stands, as far as the rate depends on it."""

    step: int
    seconds: float


@runtime_checkable
class Parted(Protocol):
    """An encoder that says what it is made of, from the input to the output, such as `PatchEncoder`."""

    def parts(self) -> list[nn.Module]:
        """Modules that parameters may be in."""
        ...


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW whose weight decay spares vectors (norms, biases), tokens, codes and embeddings of place.

    Args:
        model: Every parameter that requires a gradient is in it, once.
        config: Rate, betas and decays; a group's ``share`` of the rate is what ``layer_decay`` leaves of it.
    """
    layer = layers_of(model)
    depth = max(layer.values(), default=0) + 1
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _SPARED
            share = config.layer_decay ** (depth - layer.get(name, depth))
            groups.setdefault((share, spared), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[share, spared], "weight_decay": 0.0 if spared else config.weight_decay, "share": share}
            for share, spared in sorted(groups)
        ],
        lr=config.lr,
        betas=config.betas,
    )


def layers_of(model: nn.Module) -> dict[str, int]:
    """Place of every parameter of the encoder: 0 in front of the blocks, then the block's number from 1.

    What is in no block is left out, and so is what is no encoder's. An encoder of patches has its blocks in
    ``parts()``; a norm alone is none, but belongs to what is in front of it, as in timm's recipes.

    Args:
        model: with an ``encoder``.
    """
    named = list(model.named_parameters())
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, Parted):
        blocks = {name: int(found.group(1)) + 1 for name, _ in named if (found := _BLOCK.match(name))}
        return blocks | {name: 0 for name, _ in named if name.startswith(_STEM)}
    layer = {id(one): 0 for name, one in named if name.startswith("encoder.") and name.rsplit(".", 1)[-1] in _SPARED}
    last = -1
    for part in encoder.parts():
        last += any(one.ndim > 1 for one in part.parameters())
        layer |= {id(one): max(last, 0) for one in part.parameters()}
    return {name: layer[id(one)] for name, one in named if id(one) in layer}


def run_share(config: TrainConfig, position: Place, num_batches: int) -> float:
    """How much of the run is over after the next step, from 0 to 1, by the limit that comes first.

    Args:
        config: Limits.
        position: Where training stands before the step.
        num_batches: Batches of an epoch, each over all processes.
    """
    steps = math.ceil(num_batches / config.accumulate)
    limits = [config.epochs * steps if config.epochs else None, config.max_steps]
    shares = [(position.step + 1) / limit for limit in limits if limit]
    if config.minutes:
        shares.append(position.seconds / (60 * config.minutes))
    return min(max(shares, default=0.0), 1.0)


def learning_rate(config: TrainConfig, share: float) -> float:
    """The rate of a step: linear warm-up, then constant, or falling to zero by cosine or line.

    It depends on the position in the run alone, so there is no scheduler state that could be lost.

    Args:
        config: Peak rate, warm-up share and schedule.
        share: How much of the run is over, from `run_share`.
    """
    if share < config.warmup:
        return config.lr * share / config.warmup
    rest = (share - config.warmup) / (1 - config.warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * rest))
    return config.lr * (1 - rest) if config.schedule == "linear" else config.lr
