"""The volumes of the quality benchmark, held in memory: train, val (for choosing settings) and test (scored once)."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foveate.testing import marked_volume, organ_volume
from foveate.testing.organs import ORGANS

SIDE = 48


@dataclass(frozen=True)
class Volume:
    """One volume, of mean 0 and deviation 1, its labels, and its voxels' sizes in mm."""

    name: str
    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class VolumeSet:
    """A set by its three parts."""

    name: str
    num_classes: int
    train: tuple[Volume, ...]
    val: tuple[Volume, ...]
    test: tuple[Volume, ...]


def normalised(name: str, image: NDArray[np.generic], labels: NDArray[np.uint8], spacing: tuple[float, ...]) -> Volume:
    """A volume whose values are clipped to its own 1st and 99th percentile and brought to mean 0, deviation 1."""
    values = image.astype(np.float32)
    values = np.clip(values, *np.percentile(values, (1, 99)).astype(np.float32))
    values = (values - values.mean()) / max(float(values.std()), 1e-6)
    return Volume(name, values[None], labels, spacing)


@cache
def organs(train: int = 96, other: int = 16) -> VolumeSet:
    """Ten organs, 48^3: seeds 0.. for training, 1000.. for val, 2000.. for test."""
    parts = [
        tuple(drawn(organ_volume, seed) for seed in range(start, start + number))
        for start, number in ((0, train), (1000, other), (2000, other))
    ]
    return VolumeSet("organs", len(ORGANS) + 1, *parts)


@cache
def marked(train: int = 256, other: int = 32) -> VolumeSet:
    """Equal balls of the class that a mark in a corner names, 48^3; seeds as in `organs`."""
    parts = [
        tuple(drawn(marked_volume, seed) for seed in range(start, start + number))
        for start, number in ((0, train), (1000, other), (2000, other))
    ]
    return VolumeSet("marked", 3, *parts)


def drawn(draw: object, seed: int) -> Volume:
    image, labels = draw(seed, SIDE)  # type: ignore[operator]
    return normalised(f"{seed:04d}", image[0], labels, (1.0, 1.0, 1.0))


@cache
def hippocampus(folder: Path) -> VolumeSet:
    """MSD hippocampus: its val is the test here; val is every eighth volume of its train."""
    import nibabel

    def read(name: str) -> Volume:
        image = nibabel.load(folder / "images" / f"{name}.nii.gz")
        labels = np.asarray(nibabel.load(folder / "labels" / f"{name}.nii.gz").dataobj).astype(np.uint8)
        sizes = tuple(float(size) for size in image.header.get_zooms()[:3])
        return normalised(name, np.asarray(image.dataobj, dtype=np.float32), labels, sizes)

    with (folder / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    fit = sorted(row["id"] for row in rows if row["split"] == "train")
    test = sorted(row["id"] for row in rows if row["split"] == "val")
    train = tuple(read(name) for index, name in enumerate(fit) if index % 8)
    return VolumeSet("hippocampus", 3, train, tuple(read(name) for name in fit[::8]), tuple(map(read, test)))


def varied(
    volume: Volume, generator: np.random.Generator, most: int = 3
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Image and labels shifted by up to ``most`` voxels, edges repeated, with another contrast."""
    shift = generator.integers(-most, most + 1, 3)
    scale, offset = 1 + 0.1 * generator.standard_normal(), 0.1 * generator.standard_normal()
    index = [np.clip(np.arange(side) - by, 0, side - 1) for side, by in zip(volume.labels.shape, shift, strict=True)]
    at = np.ix_(*index)
    return (volume.image[0][at] * np.float32(scale) + np.float32(offset))[None], volume.labels[at]
