"""Scores of a finished run in pixels at full resolution, with the ceiling of its trees beside every one of them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError, FormatError, MissingExtraError
from foveate.geometry.image import Real
from foveate.tasks.config import FitConfig, load_config
from foveate.tasks.data import SegmentationData
from foveate.tasks.items import SPLITS, find_items, split_items
from foveate.tasks.metrics import PixelMetrics, interval, mean_known
from foveate.tasks.precision import resolve_precision
from foveate.tasks.predict import Segmented, load_model
from foveate.tasks.pruning import recorded_pruning
from foveate.tasks.run import CONFIG, find_model
from foveate.tasks.scoring import score_item

_MEASURES = ("dice", "iou", "hd95")


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split."""

    run: Path
    split: str
    classes: tuple[str, ...]  # without background; the regions where there are any
    rows: tuple[Mapping[str, Any], ...]  # per image: name, dice/iou/hd95/ceiling per class, tokens, seconds
    summary: Mapping[str, Any]  # means with 95 % intervals, ceiling, tokens and seconds
    failed: tuple[str, ...] = ()  # one line per image that could not be read, and is in no mean

    @property
    def dice(self) -> float:
        """Mean Dice over images and classes."""
        return float(self.summary["dice"]["mean"]["mean"])

    @property
    def ceiling(self) -> float:
        """Mean Dice that the trees alone would allow."""
        return float(self.summary["ceiling"]["mean"]["mean"])

    @property
    def tokens(self) -> float:
        """Mean tokens per image."""
        return float(self.summary["tokens"]["mean"])

    @property
    def seconds(self) -> float:
        """Mean seconds per image, from the decoded image to its full-size mask."""
        return float(self.summary["seconds"]["mean"])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what is not a number is None."""
        values = {
            "run": str(self.run),
            "split": self.split,
            "classes": list(self.classes),
            "summary": self.summary,
            "images": list(self.rows),
            "failed": list(self.failed),
        }
        plain = _without_nan(values)
        assert isinstance(plain, dict)
        return plain

    def save(self, folder: Path) -> Path:
        """Write ``<split>.json`` and ``<split>.txt`` into a folder, and return the first."""
        from foveate.io.write import atomic_write

        folder.mkdir(parents=True, exist_ok=True)
        texts = {"json": json.dumps(self.to_dict(), indent=1) + "\n", "txt": str(self) + "\n"}
        for ending, text in texts.items():
            with atomic_write(folder / f"{self.split}.{ending}") as file:
                file.write(text.encode())
        return folder / f"{self.split}.json"

    def __str__(self) -> str:
        unit = self.summary["hd95_unit"]
        head = ["image", "class", "dice", "ceiling", "iou", f"hd95 {unit}", "tokens", "seconds"]
        lines = [head]
        for row in self.rows:
            for name in self.classes:
                values = [row["dice"][name], row["ceiling"][name], row["iou"][name]]
                cells = [*(_fixed(value, 3) for value in values), _fixed(row["hd95"][name], 1)]
                lines.append([row["name"], name, *cells, str(row["tokens"]), _fixed(row["seconds"], 2)])
        for name in (*self.classes, *(["mean"] if len(self.classes) > 1 else [])):
            cells = [_fixed(self.summary[key][name]["mean"], 3) for key in ("dice", "ceiling", "iou")]
            cells += [_fixed(self.summary["hd95"][name]["mean"], 1), f"{self.tokens:.0f}", _fixed(self.seconds, 2)]
            lines.append(["mean", name, *cells])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        skipped = [f"skipped {line}" for line in self.failed]
        return "\n".join([*rows, "", *skipped, self._sentence()])

    def _sentence(self) -> str:
        dice, tokens = self.summary["dice"]["mean"], self.summary["tokens"]
        spread = f" (95 % interval {dice['low']:.3f} to {dice['high']:.3f})" if dice["num"] > 1 else ""
        return (
            f"{self.run}, {len(self.rows)} {self.split} images: dice {_fixed(dice['mean'], 3)}{spread}, "
            f"ceiling {_fixed(self.ceiling, 3)}, tokens {tokens['mean']:.0f} ({tokens['min']} to {tokens['max']}), "
            f"{self.seconds:.2f} s per image in {self.summary['precision']}"
        )


def evaluate(
    run: str | Path,
    *,
    split: str = "test",
    data_root: str | None = None,
    keep_ratio: Real | None = None,
    precision: str | None = None,
    on_image: Callable[[str, Any, Any, Segmented], Any] | None = None,
) -> Evaluation:
    """Score the best model of a run on one split, and write ``evaluation/<split>.json`` and ``.txt`` beside it.

    Nothing is chosen here: the threshold is the largest class, the checkpoint is the one that validation chose.

    Args:
        run: Run folder.
        split: ``test``, ``val`` or ``train``.
        data_root: Where the data is, when it has moved since training.
        keep_ratio: Share of the tokens that go on at every prune point of a model that prunes; the files are then
            called ``<split>-keep<ratio>``. None: as in training.
        precision: ``fp32``, ``bf16`` or ``auto``, instead of ``predict.precision`` of the run; the scores say which it
            was.
        on_image: Called with the name, the normalised image, the labels and the result of each image that is held,
            for figures.

    Returns:
        The scores; ``str()`` of them is a table. An image that cannot be read is named in ``failed``.

    Raises:
        ConfigError: The split is unknown, empty, or has images without a mask; or ``keep_ratio`` is no share, or given
            for a model that does not prune.
        FormatError: There is no trained model, or not one image can be read.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is none of {', '.join(SPLITS)}; choose one")
    run = Path(run)
    find_model(run)
    model, config = load_model(run)
    # the data may have moved since the checkpoint was written, so the run's own file has the last word on the root
    root = data_root or (load_config(run / CONFIG).data.root if (run / CONFIG).is_file() else config.data.root)
    config = replace(config, data=replace(config.data, root=root, cache=0))
    if keep_ratio is not None:
        config = replace(config, predict=replace(config.predict, keep_ratio=float(keep_ratio)))
        recorded_pruning(model, config.predict)
    made = config.predict if precision is None else replace(config.predict, precision=precision)
    ran = resolve_precision(made.precision, next(model.parameters()).device)
    config = replace(config, predict=replace(made, precision=ran))
    items = split_items(find_items(config.data), config.data)[split]
    bare = [item.name for item in items if item.mask is None]
    if not items or bare:
        what = f"image {bare[0]} without a mask" if bare else "0 images"
        raise ConfigError(f"the {split} split has {what}; change data.split or data.masks, or choose another --split")
    data = SegmentationData(items, config, model.config.patch_size, train=False)
    metrics = PixelMetrics(config.data.class_names, config.data.spacing, groups=config.data.groups)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for index, item in enumerate(items):
        try:
            scored = score_item(model, data, index, metrics)
        except (FormatError, MissingExtraError, OSError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            failed.append(line if str(item.image) in line else f"{item.image}: {line}")
            continue
        assert scored.ceiling is not None
        seconds = round(scored.seconds, 4)
        rows.append({**scored.row, "ceiling": scored.ceiling["dice"], "tokens": scored.tokens, "seconds": seconds})
        if on_image is not None and scored.shown is not None:
            on_image(item.name, *scored.shown)
    if not rows:
        raise FormatError(f"none of the {len(items)} {split} images can be scored (first: {failed[0]}); mend the files")
    classes = tuple(config.data.groups)
    title = split if keep_ratio is None else f"{split}-keep{keep_ratio:g}"
    evaluation = Evaluation(run, title, classes, tuple(rows), _summary(metrics, rows, config), tuple(failed))
    evaluation.save(run / "evaluation")
    return evaluation


def _summary(metrics: PixelMetrics, rows: Sequence[Mapping[str, Any]], config: FitConfig) -> dict[str, Any]:
    classes = tuple(config.data.groups)
    ceiling = {name: interval([row["ceiling"][name] for row in rows], most=1.0) for name in classes}
    ceiling["mean"] = interval([mean_known(row["ceiling"]) for row in rows], most=1.0)
    tokens = [row["tokens"] for row in rows]
    return {
        **metrics.summarise(),
        "ceiling": ceiling,
        "tokens": {"mean": sum(tokens) / len(tokens), "min": min(tokens), "max": max(tokens)},
        "seconds": interval([row["seconds"] for row in rows]),
        "precision": config.predict.precision,
    }


def _fixed(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
