"""The smallest real run: 64 x 64 images with a bright disc, a model of width 32 and depth 1."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from foveate.tasks.config import FitConfig, config_from_dict

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def write_disc(folder: Path, name: str, seed: int, shape: tuple[int, int] = (64, 64), *, radius: int = 14) -> None:
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: shape[0], : shape[1]]
    centre = rng.integers(shape[0] // 4, 3 * shape[0] // 4), rng.integers(shape[1] // 4, 3 * shape[1] // 4)
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    image = rng.integers(20, 50, (*shape, 3)) + 150 * disc[..., None]
    cv2.imwrite(str(folder / "images" / f"{name}.png"), image.astype(np.uint8))
    cv2.imwrite(str(folder / "masks" / f"{name}.png"), 255 * disc.astype(np.uint8))


def write_discs(folder: Path, num_images: int = 8) -> Path:
    for index in range(num_images):
        write_disc(folder, f"{index:02d}", index)
    return folder


def tiny_config(root: Path, out: Path, **changes: Any) -> FitConfig:
    values: dict[str, Any] = {
        "data": {"root": str(root), "classes": {"disc": ">=128"}, "split": {"train": 0.5, "val": 0.25, "test": 0.25}},
        "tree": {"max_leaves": 40, "min_size": 4},
        "model": {
            "name": "apf_vit_tiny",
            "overrides": {"width": 32, "depth": 1, "num_heads": 2, "decoder_width": 8, "patch_size": 8},
        },
        "train": {"epochs": 2, "batch_size": 2, "lr": 3e-3, "augment": 0.5},
        "out": str(out),
    }
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return config_from_dict(values)
