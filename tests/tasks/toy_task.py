"""A task small enough to check the loop to the last bit: ragged rows, a linear map, a weighted squared error."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.tasks.config import TrainConfig

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@dataclass
class ToyBatch:
    x: Tensor
    y: Tensor
    names: tuple[str, ...]


class ToyTask:
    score = "score"

    def __init__(self, *, dtype: torch.dtype = torch.float32, num_items: int = 7) -> None:
        generator = torch.Generator().manual_seed(5)
        hidden = nn.Linear(4, 6, dtype=dtype)
        self.model: nn.Module = nn.Sequential(hidden, nn.GELU(), nn.Dropout(0.0), nn.Linear(6, 1, dtype=dtype))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.num_items = num_items
        self.dtype = dtype
        lengths = [1 + (5 * index) % 7 for index in range(num_items)]
        self.items = [torch.randn(length, 4, generator=generator, dtype=torch.float64).to(dtype) for length in lengths]
        self.on_batch: Callable[[int], None] = lambda index: None
        self.poison: str | None = None
        self.scores = iter(range(1000))
        self.seen: list[tuple[str, ...]] = []

    def batches(self, epoch: int, plan: Sequence[Sequence[int]], device: torch.device) -> Iterator[ToyBatch]:
        for index, batch in enumerate(plan):
            self.on_batch(index)
            x = torch.cat([self.items[item] for item in batch])
            # the augmentation of an item depends on the epoch and the item alone
            x = x + torch.cat(
                [torch.full((len(self.items[item]), 1), 0.01 * epoch, dtype=self.dtype) for item in batch]
            )
            yield ToyBatch(x, x.sum(1, keepdim=True).sin(), tuple(f"item{item}" for item in batch))

    def names(self, batch: ToyBatch) -> tuple[str, ...]:
        return batch.names

    def num_tokens(self, batch: ToyBatch) -> int:
        return len(batch.x)

    def weights(self, batch: ToyBatch) -> Mapping[str, float]:
        return {"error": float(len(batch.x)), "items": float(len(batch.names))}

    def loss(self, model: nn.Module, batch: ToyBatch) -> Mapping[str, Tensor]:
        self.seen.append(batch.names)
        y = model(batch.x)
        error = (y - batch.y).square().sum()
        if self.poison in batch.names:
            error = error * torch.nan
        return {"error": error, "items": 0.1 * y.abs().sum()}

    def validate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        return {"score": float(next(self.scores))}

    def save(self, folder: Path) -> None:
        save_file(
            {key: value.contiguous() for key, value in self.model.state_dict().items()}, folder / "model.safetensors"
        )

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))


def toy_config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 4,
        "batch_size": 2,
        "lr": 1e-2,
        "warmup": 0.1,
        "clip": None,
        "precision": "fp32",
    }
    return TrainConfig(**(values | changes))
