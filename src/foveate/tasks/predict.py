"""Masks of files: one job for every input, all of its outputs or none."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveate.errors import ConfigError, FormatError, FoveateError
from foveate.geometry.image import Real
from foveate.geometry.leaves import Leaves
from foveate.geometry.source import Box
from foveate.io.raster import Raster, broken_of, mended_of
from foveate.io.spacing import check_mpp
from foveate.io.write import unwritable
from foveate.nn.pruner import Pruning
from foveate.tasks.config import FitConfig, TreeConfig
from foveate.tasks.export import write_outputs
from foveate.tasks.infer import (
    Segmented,
    infer,
    left_of,
    load_model,
    logits_of,
    paint,
    patch_size_of,
    prepare,
    segment,
)
from foveate.tasks.inputs import find_inputs, with_modalities
from foveate.tasks.items import Item
from foveate.tasks.outputs import (
    HEATMAP,
    OVERLAY,
    PROBABILITY,
    SLIDE,
    check_targets,
    fitting,
    is_finished,
    kind_of,
    missing,
    name_of,
    parse_formats,
    refuse_existing,
    refuse_kinds,
    refuse_own,
    targets,
)
from foveate.tasks.painting import Painting
from foveate.tasks.part import Part, digest_of, part_folder
from foveate.tasks.precision import AUTO, resolve_precision
from foveate.tasks.pruning import recorded_pruning
from foveate.tasks.run import find_model
from foveate.tasks.settings import PredictConfig
from foveate.tasks.skipped import to_stderr
from foveate.tasks.source import is_large, open_item, open_native, slide_patches, spacing_of, whole_box
from foveate.tasks.values import normalise, value_range, with_channels

__all__ = ["Segmented", "load_model", "logits_of", "paint", "predict", "prepare", "segment"]


def predict(
    model: str | Path,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    format: str | None = None,  # noqa: A002 - the word people type
    probability: bool = False,
    overlay: bool = False,
    heatmap: bool = False,
    mpp: Real | None = None,
    broken: str | None = None,
    max_leaves: int | None = None,
    window: int | None = None,
    keep_ratio: Real | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_pixels: int | None = None,
    warn: Callable[[str], Any] | None = None,
) -> list[Path]:
    """Write a mask for every image, slide or volume; one that cannot be read is reported and the rest goes on.

    A slide is never held, and neither is its mask: leaves are painted tile by tile into files that grow in a hidden
    folder beside the outputs and get their names when all of them are complete.

    Args:
        model: Run folder or checkpoint.
        inputs: Files, folders, globs, or CSV/JSONL manifests; also several of them.
        out: Folder for the outputs ``<name>.<format>``, made where needed.
        format: Formats with commas between them: ``png``, ``tif`` (of a slide a plain pyramid), ``ome.tif``,
            ``geojson``, ``geojson.gz``, ``nii.gz``, ``zarr``. None: ``png`` for images, ``ome.tif,geojson.gz`` for
            slides, ``tif`` for planes in a TIFF or NPY, ``nii.gz`` for NIfTI and DICOM, ``zarr`` for volumes in zarr.
        probability: Also write the probability of every class, ``<name>_probability.tif``: float16 ``[K, *S]``, of a
            slide a pyramid of bytes in which 255 is 1.
        overlay: Also write ``<name>_overlay.png``: the image (the middle plane of a volume), its mask and its leaves.
        heatmap: Also write ``<name>_heatmap.png``: the probability of every class but the background over the image.
        mpp: Size of a pixel in um, instead of what the files or the manifest say.
        broken: What a tile that cannot be decoded does: ``raise``, ``fill``, or ``skip`` (255 in the mask). None: as
            in training.
        max_leaves: Leaves per image at most. None: as in training.
        window: Side of windows that slide over images that are held, instead of ``predict.window`` of the run; 0: the
            whole image at once.
        keep_ratio: Share of the tokens that go on at every prune point of a model that prunes. None: as in training.
        precision: ``fp32``, ``bf16``, or ``auto`` (bf16 where the device is made for it, which is then said). None: as
            in training's validation, ``predict.precision`` of the run.
        overwrite: Replace outputs that are there already.
        resume: Leave alone what is complete, by its name and whatever made it; add pictures and probabilities that were
            not asked for then; and go on with what was interrupted, if model, settings and image are the same.
        max_pixels: Refuse larger images where they are read whole; None: as in training.
        warn: Called with one line per failed image, and where ``auto`` came to bf16; None writes it to standard error.

    Returns:
        The files written now.

    Raises:
        FormatError: At least one image failed; all others are written. Or there is no model.
        ConfigError: There is no input, two inputs have one name, a mask exists or cannot be replaced, ``out`` is a
            file, ``mpp`` is no size of a pixel, or ``max_leaves`` is below 1 or given for a model of uniform leaves;
            or ``keep_ratio`` is outside 0 to 1 or given for a model that does not prune.

    Cost: of a slide, time for the pixels that the leaves need, for the model, and for the borders that are painted;
        memory for the logits of the leaves and a few rows of tiles.
    """
    formats = parse_formats(format)
    if mpp is not None:
        check_mpp(mpp)
    items = find_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    asked = {PROBABILITY: probability, OVERLAY: overlay, HEATMAP: heatmap}
    extras = tuple(ending for ending, wanted in asked.items() if wanted)
    folder = find_model(model)
    network, config = load_model(folder)
    items = with_modalities(items, config.data.modalities)
    check_targets([item.file for item in items], Path(out), formats, extras, replace=overwrite or resume)
    given = {"max_pixels": max_pixels, "broken": broken}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    data = replace(config.data, masks=None, cache=0, **changes)
    share = None if keep_ratio is None else float(keep_ratio)
    made = _changed(config.predict, window=window, keep_ratio=share, precision=precision)
    ran = resolve_precision(made.precision, next(network.parameters()).device)
    if made.precision == AUTO and ran == "bf16":
        (warn or to_stderr)("foveate: masks are made in bf16, for which this device is made; fp32: --precision fp32")
    made = replace(made, precision=ran)
    recorded_pruning(network, made)
    config = replace(config, data=data, tree=_with_budget(config.tree, max_leaves), predict=made)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(Path(out), error) from None
    job = _Job(network, config, digest_of(folder), Path(out), formats, extras, overwrite, resume, warn or to_stderr)
    written: list[Path] = []
    failed: list[str] = []
    for item in items:
        try:
            written += job.run(item if mpp is None else replace(item, mpp=float(mpp)))
        except (FoveateError, OSError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            failed.append(line if str(item.image) in line else f"{item.image}: {line}")
            job.warn(f"foveate: skipped {failed[-1]}")
    if failed:
        raise FormatError(
            f"{len(failed)} of {len(items)} images have no mask (first: {failed[0]}); mend or leave out these files; "
            f"{len(items) - len(failed)} masks are in {out}"
        )
    return written


@dataclass(frozen=True)
class _Job:
    """What all inputs of one call share."""

    model: nn.Module
    config: FitConfig
    model_key: str
    out: Path
    formats: tuple[str, ...]
    extras: tuple[str, ...]
    overwrite: bool
    resume: bool
    warn: Callable[[str], Any]

    def run(self, item: Item) -> list[Path]:
        """Write all outputs of one input, or none; return them."""
        name, file = name_of(item.file), item.image
        unfinished = part_folder(self.out, name).exists()
        if self.resume and not unfinished and is_finished(item.file, self.out, self.formats, self.extras):
            return []
        native = open_native(item, self.config.data)
        kind = kind_of(native)
        self._check(item, native)
        endings = fitting(self.formats, kind, str(file))
        goals = targets(item.file, self.out, endings, self.extras)
        refuse_own(file, goals.values())
        refuse_kinds(goals.values())
        more = [(path, path.stat().st_mtime_ns) for path in item.more]
        settings = asdict(self.config) | {
            "model": self.model_key,
            "mpp": item.mpp,
            "spacing": item.spacing,
            "more": more,
        }
        part = Part.open(self.out, name, file, settings, resume=self.resume)
        if self.resume and not part.resumed:
            goals = missing(goals, endings)
        try:
            if not (self.overwrite or part.resumed):
                refuse_existing(goals.values())
            if not part.is_complete(tuple(goals.values())):
                self._fill(item, native, part, goals, kind)
            part.place(tuple(goals.values()))
        except BaseException as error:
            if not part.has_values:
                part.remove()
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"{file} is half done; go on with --resume") from None
            elif isinstance(error, FoveateError):
                raise type(error)(f"{error}; then go on with --resume") from error
            raise
        return list(goals.values())

    def _check(self, item: Item, native: Raster) -> None:
        """Refuse an image that the model, or a size given for it, is not meant for."""
        have, wants = len(native.shape), getattr(getattr(self.model, "config", None), "num_dims", 2)
        if have != wants:
            raise ConfigError(
                f"{item.image} has {have} axes, the model was trained on {wants}; give a model for {have}"
            )
        if item.mpp is not None and have == 3:
            raise ConfigError(f"{item.image} is a volume, for which mpp={item.mpp:g} has no meaning; leave it out")

    def _fill(self, item: Item, native: Raster, part: Part, goals: dict[str, Path], kind: str) -> None:
        """Make every output in the part folder."""
        kept = part.kept()
        if kept is None:
            kept = self._values(item, native)
            if is_large(native):
                part.keep(*kept)
        logits, leaves, holes, left = kept
        skips = self.config.data.broken == "skip"
        if holes:
            done = "left unknown" if skips else "filled with background"
            self.warn(f"foveate: {item.image}: {len(holes)} broken tiles were {done}, first {holes[:3]}")
        painting = Painting(logits, leaves, native.shape, native.spacing, holes if skips else (), left)
        data, as_file = self.config.data, self.config.predict.values == "file"
        values = data.file_values if as_file else None
        write_outputs(painting, part, goals, native, data.class_names, pyramids=kind == SLIDE, values=values)

    def _values(self, item: Item, native: Raster) -> tuple[Tensor, Leaves, list[Box], Tensor | None]:
        """What the model says of every leaf, what could not be decoded, and where each token left the model."""
        pruning = recorded_pruning(self.model, self.config.predict)
        values, leaves = self._inferred(item, native, pruning)
        if mended := mended_of(native):
            what = f"{len(mended)} broken tiles of coarser levels were made from finer ones"
            self.warn(f"foveate: {item.image}: {what}, first {mended[:3]}")
        return values, leaves, broken_of(native), left_of(pruning, len(leaves))

    def _inferred(self, item: Item, native: Raster, pruning: Pruning | None) -> tuple[Tensor, Leaves]:
        """Cut one image as training does, whole or lazily, and ask the model."""
        data = self.config.data
        raster = open_item(item, data, native)
        if is_large(raster):
            patches = slide_patches(raster, self.config, patch_size_of(self.model))
            return logits_of(self.model, patches, pruning, self.config.predict.precision), patches.leaves[0]
        image = with_channels(raster.read(whole_box(raster.shape)), data.channels, str(item.image))
        data = replace(data, spacing=spacing_of(item, data, raster))
        normalised = normalise(image, value_range(image, data), data)
        return infer(self.model, normalised, replace(self.config, data=data), pruning)


def _with_budget(tree: TreeConfig, max_leaves: int | None) -> TreeConfig:
    if max_leaves is None:
        return tree
    if tree.uniform is not None:
        raise ConfigError(
            f"max_leaves={max_leaves} for a model of uniform leaves (tree.uniform={tree.uniform}); leave it out"
        )
    return replace(tree, max_leaves=max_leaves)


def _changed(predict: PredictConfig, **given: Any) -> PredictConfig:
    """The settings with what was given; a window of 0 is none."""
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(predict, **changes | ({"window": None} if given["window"] == 0 else {}))
