"""Small slides of every kind that we read, made when they are needed."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from make_files import Array, texture

APERIO = "Aperio Image Library v11.2.1\r\n46000x32914 ({tile}x{tile}) JPEG/RGB Q=90|AppMag = 20|MPP = {mpp}"


def halved(image: Array, step: int = 2) -> Array:
    """``[H, W, C]`` area means, sides rounded down as scanners do."""
    high, wide = image.shape[0] // step, image.shape[1] // step
    blocks = image[: high * step, : wide * step].reshape(high, step, wide, step, -1)
    return blocks.mean(axis=(1, 3)).round().astype(image.dtype).reshape(high, wide, *image.shape[2:])


def picture(height: int, width: int, channels: int = 3, dtype: str = "uint8", seed: int = 0) -> Array:
    """``[H, W, C]``, smooth enough for JPEG, different in each channel."""
    planes = [
        texture(height, width, dtype=dtype, seed=seed + channel)[:: 1 - 2 * (channel % 2)]
        for channel in range(channels)
    ]
    return np.ascontiguousarray(np.stack(planes, axis=-1))


def write_svs(
    path: Path, image: Array, *, steps: tuple[int, ...] = (), mpp: object = 0.499, **options: Any
) -> list[Array]:
    """An Aperio slide: level 0, a thumbnail, further levels, a label; returns its levels."""
    options = {"compression": "jpeg", "compressionargs": {"level": 90}, "photometric": "rgb", **options}
    text = APERIO.format(mpp=mpp, tile=64)
    levels = [image, *(halved(image, step) for step in steps)]
    with tifffile.TiffWriter(path) as file:
        file.write(image, tile=(64, 64), description=text, metadata=None, **options)
        file.write(halved(image, 3), description=text, metadata=None, **options)
        for level in levels[1:]:
            file.write(level, tile=(64, 64), description=text, metadata=None, **options)
        file.write(image[:40, :50], description="Aperio\nlabel 50x40", metadata=None, subfiletype=1, compression="lzw")
    return levels


def write_ome(
    path: Path, image: Array, *, steps: tuple[int, ...] = (2, 4), mpp: float = 0.25, **options: Any
) -> list[Array]:
    """An OME-TIFF ``[C, H, W]`` or ``[H, W, 3]`` with its levels as sub-pages; returns them."""
    colour = image.shape[-1] == 3
    flat = image if colour else np.moveaxis(image, 0, -1)
    levels = [flat, *(halved(flat, step) for step in steps)]
    levels = levels if colour else [np.moveaxis(level, -1, 0) for level in levels]
    options = {"tile": (64, 64), "photometric": "rgb" if colour else "minisblack", **options}
    said = {"axes": "YXS" if colour else "CYX", "PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm"}
    said |= {"PhysicalSizeY": mpp * 1000, "PhysicalSizeYUnit": "nm"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
        file.write(levels[0], subifds=len(steps), metadata=said, **options)
        for level in levels[1:]:
            file.write(level, subfiletype=1, **options)
    return levels


def write_plain(path: Path, image: Array, *, steps: tuple[int, ...] = (2, 4), **options: Any) -> list[Array]:
    """A plain pyramid: reduced pages after the first; returns its levels."""
    levels = [image, *(halved(image, step) for step in steps)]
    options = {"tile": (64, 64), "compression": "zlib", "metadata": None, **options}
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(level, subfiletype=int(number > 0), **options)
    return levels


def write_trestle(path: Path, image: Array) -> None:
    """A slide that OpenSlide knows as Trestle's."""
    text = "Background Color=FFFFFF;White Balance=100;Objective Power=10;JPEG Quality=90;OverlapsXY= 0 0"
    with tifffile.TiffWriter(path) as file:
        file.write(image, tile=(64, 64), software="MedScan 1.0", description=text, metadata=None, photometric="rgb")


def first(levels: Array) -> Array:
    """``[H, W, C]`` as ``[C, H, W]``."""
    return np.moveaxis(levels, -1, 0)
