"""The smallest real recognition run: noise of 64 x 64 pixels, in some of which a few patches of 16 have a cross."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from foveate.tasks.config import config_from_dict
from foveate.tasks.recognition_settings import RecognitionConfig

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def write_cross(path: Path, seed: int, *, cross: bool, side: int = 64) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (side, side)).astype(np.uint8)
    for cell in rng.permutation((side // 16) ** 2)[: 5 * cross]:
        y, x = 16 * (cell // (side // 16)) + 2, 16 * (cell % (side // 16)) + 2
        image[y + 5 : y + 7, x : x + 12] = image[y : y + 12, x + 5 : x + 7] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def write_crosses(folder: Path, num_images: int = 16) -> Path:
    lines = ["path,label,group"]
    for index in range(num_images):
        write_cross(folder / f"images/{index:02d}.png", index, cross=index % 2 == 1)
        lines.append(f"images/{index:02d}.png,{'cross' if index % 2 else 'none'},p{index}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def tiny_labels(root: Path, out: Path, **changes: Any) -> RecognitionConfig:
    values: dict[str, Any] = {
        "data": {
            "root": str(root),
            "channels": 1,
            "patch_size": 16,
            "split": {"train": 0.5, "val": 0.25, "test": 0.25},
        },
        "select": {"keep": 2, "keep_start": 8, "chunk": 5},
        "model": {"overrides": {"width": 16, "num_heads": 2, "dropout": 0.1}},
        "train": {"epochs": 2, "batch_size": 4, "lr": 3e-3, "augment": 0.5},
        "out": str(out),
    }
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    return config_from_dict(values, RecognitionConfig)
