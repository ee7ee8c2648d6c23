"""Images of megapixel digits and published models with our weights: what the parts of the ips family share.

Legend: B images, N patches, P side of a patch.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _published_ips import PublishedSelection, projector, resnet18
from foveate.geometry.patch_source import GridPatches
from foveate.models import create_model
from foveate.models.recognition import RecognitionModel
from foveate.nn.heads import TaskSpec
from foveate.testing.digits import DigitBank, MegapixelDigits, digit_image, read_mnist, split_bank

PATCH = 50
CLASSES = 10
FOUR = ("majority", "max", "top", "multi")
NEEDLE = ("majority", "max", "multi")
Targets = Mapping[str, Tensor]


def tasks(names: Sequence[str] = FOUR) -> tuple[TaskSpec, ...]:
    """The tasks of our models."""
    return tuple(TaskSpec(name, "labels" if name == "multi" else "classes", CLASSES) for name in names)


def published_tasks(names: Sequence[str] = FOUR) -> dict[str, tuple[int, str]]:
    """The same as the published model wants them."""
    return {name: (CLASSES, "sigmoid" if name == "multi" else "softmax") for name in names}


def targets_of(labels: Sequence[Mapping[str, Any]], names: Sequence[str] = FOUR) -> dict[str, Tensor]:
    """Class numbers ``[B]``, and 0 or 1 per class ``[B, 10]`` for ``multi``."""
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "multi":
            found[name] = torch.zeros(len(labels), CLASSES)
            for row, one in enumerate(labels):
                found[name][row, list(one[name])] = 1
        else:
            found[name] = torch.tensor([one[name] for one in labels])
    return found


def banks() -> tuple[DigitBank | None, ...]:
    """MNIST's digits to train, to validate and to test with where FOVEATE_MNIST names their folder; else drawn ones."""
    folder = os.environ.get("FOVEATE_MNIST")
    if folder is None:
        return (None, None, None)
    images, labels = (sorted(Path(folder).glob(f"*{kind}-idx*"))[0] for kind in ("images", "labels"))
    return split_bank(read_mnist(images, labels))


def draw(first: int, count: int, side: int, bank: DigitBank | None) -> list[MegapixelDigits]:
    """Images with noise as dense as the paper's."""
    return [digit_image(seed, side, bank, scale_noise=True) for seed in range(first, first + count)]


def grids(images: Sequence[MegapixelDigits]) -> list[GridPatches]:
    """Bags that are read from the sparse images when asked for."""
    return [GridPatches(image.pixels, PATCH) for image in images]


def dense(images: Sequence[MegapixelDigits]) -> Tensor:
    """All patches of all images in memory, ``[B, N, 1, P, P]`` float32 in 0 to 1, as the published loop holds them."""
    rows = []
    for bag in grids(images):
        rows.append(bag.read(torch.arange(len(bag))).float() / 255)
    return torch.stack(rows)


def our_model(keep: int, chunk: int, **settings: Any) -> RecognitionModel:
    """The paper's network for megapixel digits, put together by us."""
    given = {"in_chans": 1, "stages": 2, "width": 128, "tasks": tasks(), "position": "sine", "rank": "mean"}
    model: RecognitionModel = create_model("ips_resnet18", **(given | {"keep": keep, "chunk": chunk} | settings))
    return model


def published_model(keep: int, chunk: int, num_patches: int, shuffle: bool = True) -> PublishedSelection:
    """The same as published."""
    return PublishedSelection(
        resnet18(1), 128, published_tasks(), keep=keep, chunk=chunk, num_patches=num_patches, shuffle=shuffle
    )


def feature_pair(features: int, width: int, keep: int, sharp: float) -> tuple[RecognitionModel, PublishedSelection]:
    """Two models of stored features with the same weights (the published start), ours and the published one.

    Args:
        sharp: what the queries are multiplied with.
    """
    ours: RecognitionModel = create_model(
        "ips_features", in_chans=features, width=width, norm="batch", keep=keep, rank="mean"
    )
    theirs = PublishedSelection(
        projector(features, width), width, {"label": (2, "softmax")}, keep=keep, chunk=keep, shuffle=False
    )
    attention = ours.aggregator.attention
    with torch.no_grad():
        theirs.encoder.load_state_dict(_as_theirs(ours))
        theirs.pool.query *= sharp
        attention.query.copy_(theirs.pool.query)
        attention.to_query.weight.copy_(theirs.pool.q.weight)
        attention.to_key.weight.copy_(theirs.pool.k.weight)
    return ours.eval(), theirs.eval()


def _as_theirs(ours: RecognitionModel) -> dict[str, Tensor]:
    """Weights of our projector by the names of theirs: both are sequences of four layers."""
    return {name.removeprefix("net.layers."): value for name, value in ours.encoder.state_dict().items()}
