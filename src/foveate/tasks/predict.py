"""From an image to its mask: the one path that validation, evaluation and prediction share.

Legend: T tokens, L leaves, K classes (background first), P samples per side, C channels, S image sides.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from foveate.errors import ConfigError, FormatError, FoveateError
from foveate.geometry.leaves import Leaves
from foveate.geometry.paint import unpatchify
from foveate.geometry.patches import Patches, patchify
from foveate.tasks.config import FitConfig, load_config
from foveate.tasks.cut import cut
from foveate.tasks.data import SegmentationData
from foveate.tasks.items import Item, find_items
from foveate.tasks.metrics import tiles
from foveate.tasks.resize import limited_shape, shrink_image
from foveate.tasks.run import find_model

SETTINGS = "fit.yaml"  # the run's settings, stored with the model so that nothing has to be repeated
_MODE = "smooth"
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy"}

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Segmented:
    """What became of one image."""

    labels: UInt8[Tensor, "*S"]  # class per pixel, at the image's own size
    leaves: Leaves  # in the frame of the shrunk image where `max_side` applies
    seconds: float  # shrink, cut, patches, model and painting


def prepare(image: Float[Tensor, "C *S"], config: FitConfig, patch_size: int) -> Patches:
    """Shrink a normalised image where the settings say so, cut it, and take its patches.

    Args:
        image: Normalised, at full resolution.
        config: Settings of the run.
        patch_size: Samples per side of a token.
    """
    shape = limited_shape(tuple(image.shape[1:]), config.data.max_side)
    small = torch.from_numpy(shrink_image(image.numpy(), shape))
    leaves = cut(small, config.tree, patch_size, config.data.spacing)
    return patchify(small, leaves, patch_size)


def segment(model: nn.Module, image: Float[Tensor, "C *S"], config: FitConfig, *, probability: Any = None) -> Segmented:
    """Segment one normalised image at full resolution.

    Painting goes tile by tile, so that classes x pixels are never in memory; a pixel costs one byte.

    Args:
        model: Maps `Patches` to logits ``[T, K, *P]``; used as it is, on its own device.
        image: Normalised as in training (see `SegmentationData.load`), at full resolution.
        config: Settings of the run.
        probability: Array ``[K, *S]`` that receives the probabilities, such as a memory map; None for none.

    Cost: one pass over the pixels and the model over the tokens.
    """
    start = time.perf_counter()
    config_of = getattr(model, "config", None)
    assert config_of is not None
    patches = prepare(image, config, config_of.patch_size)
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(patches.to(device)).float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise FoveateError("the model's output holds NaN or Inf; train it again at a lower train.lr")
        labels = paint(logits, patches.leaves[0], tuple(image.shape[1:]), probability)
    return Segmented(labels, patches.leaves[0], time.perf_counter() - start)


def paint(
    values: Float[Tensor, "L K *P"], leaves: Leaves, shape: Sequence[int], probability: Any = None
) -> UInt8[Tensor, "*S"]:
    """The class with the largest value at every pixel of the full-size image, tile by tile.

    Args:
        values: Logits, or shares per class, of one image's leaves.
        leaves: Leaves of the image that was cut.
        shape: Spatial shape of the image before it was shrunk.
        probability: Array ``[K, *S]`` that receives the softmax of the values.
    """
    labels = torch.zeros(tuple(shape), dtype=torch.uint8)
    for box in tiles(shape):
        area = tuple(slice(first, last) for first, last in zip(*box, strict=True))
        tile = _paint_tile(values, leaves, tuple(shape), box)
        labels[area] = tile.argmax(0).to(torch.uint8)
        if probability is not None:
            probability[(slice(None), *area)] = tile.softmax(0).numpy()
    return labels


def _paint_tile(values: Tensor, leaves: Leaves, shape: tuple[int, ...], box: Box) -> Tensor:
    if tuple(leaves.shape) == shape:
        return unpatchify(values, leaves, mode=_MODE, box=box)
    # linear interpolation about pixel centres, as torch's `interpolate` does it, but of this tile alone
    low, high, share, start, stop = [], [], [], [], []
    for small, full, first, last in zip(leaves.shape, shape, *box, strict=True):
        at = ((torch.arange(first, last) + 0.5) * (small / full) - 0.5).clamp(0, small - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=small - 1)
        start.append(int(below[0]))
        stop.append(int(above[-1]) + 1)
        low.append(below - start[-1])
        high.append(above - start[-1])
        share.append(at - below)
    tile = unpatchify(values, leaves, mode=_MODE, box=(tuple(start), tuple(stop)))
    for axis, (below, above, part) in enumerate(zip(low, high, share, strict=True), start=1):
        view = [1] * tile.ndim
        view[axis] = -1
        weight = part.view(view).to(tile.dtype)
        tile = tile.index_select(axis, below) * (1 - weight) + tile.index_select(axis, above) * weight
    return tile


def load_model(path: str | Path) -> tuple[Any, FitConfig]:
    """Read a trained model and the settings it was trained with.

    Args:
        path: Run folder (its best model is taken), or a checkpoint's folder.

    Returns:
        The model in evaluation mode, on the accelerator where there is one, and the settings.

    Raises:
        FormatError: There is no complete model, or it was saved without its run's settings.
    """
    from foveate.models import SegmentationModel

    folder = find_model(path)
    if not (folder / SETTINGS).is_file():
        raise FormatError(f"{folder}: has no {SETTINGS}, which says how images are prepared; give a run of foveate fit")
    config = load_config(folder / SETTINGS)
    model = SegmentationModel.from_pretrained(folder)
    model.eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), config


def predict(
    model: str | Path,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    probability: bool = False,
    overlay: bool = False,
    overwrite: bool = False,
    max_pixels: int | None = None,
    format: str = "png",  # noqa: A002 - the word people type
    warn: Callable[[str], Any] | None = None,
) -> list[Path]:
    """Write a mask for every image; one that cannot be read is reported and the rest goes on.

    Args:
        model: Run folder or checkpoint.
        inputs: Image files, folders, globs, or CSV/JSONL manifests; also several of them.
        out: Folder for the masks, made where needed: ``<name>.png`` and on request ``<name>_probability.tif``.
        probability: Also write the probability of every class, float16 ``[K, *S]``.
        overlay: Also write ``<name>_overlay.png``: the image (the middle plane of a volume), its mask and its leaves.
        overwrite: Replace masks that are there already.
        max_pixels: Refuse larger images; None: as in training.
        format: ``png`` or ``tif``; volumes are always ``tif``.
        warn: Called with one line per failed image; None writes it to standard error.

    Returns:
        The files written.

    Raises:
        FormatError: At least one image failed; all others are written. Or there is no model.
        ConfigError: There is no input, two inputs have one name, or a mask exists already.
    """
    if format not in ("png", "tif"):
        raise ConfigError(f"format={format!r} is neither 'png' nor 'tif'; choose one")
    files = find_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    targets = _targets(files, Path(out), format, overwrite)
    network, config = load_model(model)
    limit = config.data.max_pixels if max_pixels is None else max_pixels
    config = replace(config, data=replace(config.data, max_pixels=limit, masks=None, cache=0))
    Path(out).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    failed: list[str] = []
    for file, target in zip(files, targets, strict=True):
        try:
            found = _predict_one(
                network, config, file, target, probability=probability, overlay=overlay, overwrite=overwrite
            )
            written += found
        except (FoveateError, OSError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            line = line if str(file) in line else f"{file}: {line}"
            failed.append(line)
            (warn or _to_stderr)(f"foveate: skipped {line}")
    if failed:
        raise FormatError(
            f"{len(failed)} of {len(files)} images have no mask (first: {failed[0]}); mend or leave out these files; "
            f"{len(files) - len(failed)} masks are in {out}"
        )
    return written


def _predict_one(
    model: nn.Module,
    config: FitConfig,
    file: Path,
    target: Path,
    *,
    probability: bool,
    overlay: bool,
    overwrite: bool,
) -> list[Path]:
    from foveate.io.write import write_mask

    item = Item(file.stem, file, None, file.stem)
    image, _ = SegmentationData([item], config, 1, train=False).load(0)
    target = target.with_suffix(".tif") if image.ndim == 4 else target
    with ExitStack() as stack:
        chances, finish = None, None
        if probability:
            shape = (config.data.num_classes, *image.shape[1:])
            chances, finish = stack.enter_context(_Probability(target, shape))
        result = segment(model, image, config, probability=chances)
        labels = result.labels.numpy()
        write_mask(target, labels, overwrite=overwrite)
        written = [target] if finish is None else [target, finish()]
    if overlay:
        from foveate.tasks import figures

        plane = labels if labels.ndim == 2 else labels[len(labels) // 2]
        picture = figures.label_overlay(figures.to_rgb(image.numpy()), plane)
        written.append(target.with_name(f"{target.stem}_overlay.png"))
        figures.save_picture(written[-1], figures.outlined(picture, result.leaves))
    return written


class _Probability:
    """A TIFF on disk that probabilities are painted into tile by tile, and that gets its name when it is complete."""

    def __init__(self, target: Path, shape: tuple[int, ...]) -> None:
        self._aside = target.with_name(f".{target.stem}.aside.tif")
        self._path = target.with_name(f"{target.stem}_probability.tif")
        self._shape = shape

    def __enter__(self) -> tuple[Any, Callable[[], Path]]:
        import tifffile

        # not compressed: only then can any tile be written at any time, and classes x pixels stay out of memory
        self._map = tifffile.memmap(
            self._aside,
            shape=self._shape,
            dtype=np.float16,
            photometric="minisblack",
            metadata={"axes": "CZYX" if len(self._shape) == 4 else "CYX"},
            bigtiff=2 * math.prod(self._shape) > 2**31,
        )
        return self._map, self._finish

    def _finish(self) -> Path:
        self._map.flush()
        self._aside.replace(self._path)
        return self._path

    def __exit__(self, *error: object) -> None:
        del self._map
        self._aside.unlink(missing_ok=True)


def find_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Expand files, folders, globs and manifests into image files, in the order given.

    Args:
        inputs: Paths; a folder stands for the images in it, a CSV/JSONL manifest for its image column.

    Raises:
        ConfigError: One of them names nothing.
    """
    files: list[Path] = []
    for given in inputs:
        found = sorted(_expand(Path(given)))
        if not found:
            raise ConfigError(f"{given}: names no image; give an image file, a folder of images, a glob or a manifest")
        files += found
    return list(dict.fromkeys(files))


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.iterdir() if file.suffix.lower() in _IMAGES and file.name[0] != ".")
    elif path.suffix.lower() in {".csv", ".jsonl"} and path.is_file():
        from foveate.tasks.config import DataConfig

        data = DataConfig(root=str(path.parent), manifest=path.name, masks=None)
        yield from (item.image for item in find_items(data))
    elif path.exists():
        yield path
    elif any(sign in path.name for sign in "*?["):
        yield from (file for file in path.parent.glob(path.name) if file.is_file())


def _targets(files: Sequence[Path], out: Path, ending: str, overwrite: bool) -> list[Path]:
    targets = [out / f"{file.stem}.{ending}" for file in files]
    seen: dict[Path, Path] = {}
    for file, target in zip(files, targets, strict=True):
        if target in seen:
            raise ConfigError(f"{seen[target]} and {file} would both be written to {target}; predict them separately")
        if target.resolve() == file.resolve():
            raise ConfigError(f"{file} would be overwritten by its own mask; give another --out")
        if target.exists() and not overwrite:
            raise ConfigError(f"{target} exists; add --overwrite to replace it, or give another --out")
        seen[target] = file
    return targets


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
