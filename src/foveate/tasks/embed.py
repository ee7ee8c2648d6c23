"""Bags of features from a table of slides: every patch that shows tissue goes through an encoder once, for good.

Legend: N patches, F features.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float16, Float32, Int64
from torch import Tensor, nn

from foveate import __version__
from foveate.errors import ConfigError, FormatError, FoveateError
from foveate.geometry.image import Real
from foveate.geometry.patch_source import PatchSource, block_order
from foveate.io.bags import SUFFIX, FeatureBag, write_bag
from foveate.io.guard import bad_file
from foveate.io.raster import Raster, broken_of
from foveate.io.spacing import check_mpp
from foveate.io.write import refuse_existing, unwritable
from foveate.models.recognition import RecognitionModel
from foveate.nn.patch_encoder import create_patch_encoder, load_patch_weights
from foveate.nn.stream import encoded
from foveate.tasks.bags import open_bag
from foveate.tasks.config import load_as
from foveate.tasks.items import Item
from foveate.tasks.recognition_settings import RecognitionConfig, TableConfig
from foveate.tasks.run import find_model
from foveate.tasks.skipped import to_stderr
from foveate.tasks.source import open_native
from foveate.tasks.table import read_table
from foveate.tasks.trained import SETTINGS

_SETTINGS = ("patch_size", "stride", "mpp", "tissue", "normalise", "mean", "std", "channels", "broken")
_AHEAD = 2  # threads that decode while patches are encoded


def embed(
    table: str | Path,
    out: str | Path,
    *,
    encoder: str | Path | nn.Module = "resnet18",
    weights: str | Path | None = None,
    mpp: Real | None = None,
    patch_size: int | None = None,
    stride: int | None = None,
    tissue: Real = 0.05,
    batch: int = 256,
    shard: str = "1/1",
    broken: str = "raise",
    half: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    warn: Callable[[str], Any] | None = None,
) -> list[Path]:
    """Write one bag of features for every slide of a table; one that cannot be read is reported and the rest goes on.

    Args:
        table: CSV with the column ``path`` (relative to the table) and, as needed, ``id`` and ``mpp``.
        out: folder for the bags ``<id>.safetensors``, made where needed. Boxes are in level-0 pixels of the slide.
        encoder: a run folder or saved recognition model, whose encoder and pixel values are taken; or a name as in
            `create_patch_encoder`; or any module from ``[R, 3, P, P]`` float32 in 0 to 1 to ``[R, F]``, such as
            ``ForeignNet`` (foveate.nn.patch_encoder) around a model of transformers.
        weights: checkpoint for an encoder that is given by name; without it the weights are random, and the same in
            every call.
        mpp: um per pixel that patches are cut at; None: as the run was trained, else as each slide was scanned.
        patch_size: side of a patch in such pixels; None: as the run was trained, else 224.
        stride: pixels from one patch to the next, at most ``patch_size``, which it is by default.
        tissue: least share of a patch that must be tissue, 0 to 1; others are never decoded. 0 takes all patches.
        batch: patches that are read at a time.
        shard: ``"i/n"``: only every n-th row of the table, from the i-th on, so that n machines share one table.
        broken: what a tile that cannot be decoded does: ``"raise"`` (its slide is left out) or ``"fill"``.
        half: store float16, else float32.
        resume: leave bags alone that are there already, made with the same settings.
        overwrite: replace them.
        warn: called with one line per slide that failed; None writes it to standard error.

    Returns:
        The bags written now.

    Raises:
        FormatError: at least one slide failed; all others are written. Or the table or the weights are unreadable.
        ConfigError: two rows have one id, a setting is out of range, or a bag exists.

    Cost: memory of ``3 * batch`` patches and of the features of one slide.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; give one of them")
    if mpp is not None:
        check_mpp(mpp)
    if batch < 1:
        raise ConfigError(f"batch={batch} is below 1; give the number of patches that are read at a time")
    start, step = _shard(shard)
    given = {"mpp": None if mpp is None else float(mpp), "patch_size": patch_size, "stride": stride}
    tell = warn or to_stderr
    net, data = _encoder(encoder, weights, tell, {name: value for name, value in given.items() if value is not None})
    data = replace(data, root=str(Path(table).parent), table=Path(table).name, tissue=float(tissue), broken=broken)
    rows = read_table(data, labelled=False)[start::step]
    name = type(encoder).__name__ if isinstance(encoder, nn.Module) else str(encoder)
    job = _Job(net, name, digest(net), data, Path(out), batch, half, resume, overwrite)
    for row in rows:
        place = Path(row.item.name)
        if place.is_absolute() or ".." in place.parts or "\0" in row.item.name:
            raise ConfigError(
                f"{table} row {row.number} has the id {row.item.name!r}, which leaves --out; give a plain one"
            )
    goals = [job.goal(row.item) for row in rows]
    try:
        for folder in {Path(out), *(goal.parent for goal in goals)}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(Path(out), error) from None
    for goal in goals:
        refuse_existing(goal, resume or overwrite)
    return _run(job, [row.item for row in rows], tell)


def _run(job: "_Job", items: Sequence[Item], warn: Callable[[str], Any]) -> list[Path]:
    """All slides in turn."""
    written: list[Path] = []
    failed: list[str] = []
    for item in items:
        try:
            if not job.is_done(item):
                written.append(job.run(item, warn))
        except (FoveateError, OSError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            failed.append(line if str(item.image) in line else f"{item.image}: {line}")
            warn(f"foveate: skipped {failed[-1]}")
    if failed:
        raise FormatError(
            f"{len(failed)} of {len(items)} slides have no bag (first: {failed[0]}); mend or leave out these files; "
            f"{len(items) - len(failed)} bags are in {job.out}"
        )
    return written


@dataclass(frozen=True)
class _Job:
    """What all slides of one call share."""

    net: nn.Module
    encoder: str
    weights: str
    data: TableConfig
    out: Path
    batch: int
    half: bool
    resume: bool
    overwrite: bool

    def goal(self, item: Item) -> Path:
        """Where the bag of a slide goes."""
        return self.out / f"{item.name}{SUFFIX}"

    def settings(self, item: Item) -> dict[str, Any]:
        """What a bag depends on beside the slide."""
        return {
            "weights": self.weights,
            "half": self.half,
            **{name: getattr(self.data, name) for name in _SETTINGS},
            "given_mpp": item.mpp,
        }

    def is_done(self, item: Item) -> bool:
        """Whether a bag is there and to be left alone.

        Raises:
            FormatError: it was made with other settings.
        """
        goal = self.goal(item)
        if not (self.resume and goal.exists()):
            return False
        try:
            found = FeatureBag(goal).provenance.get("settings")
        except FormatError:
            return False
        ours = self.settings(item)
        theirs = found if isinstance(found, dict) else {}
        other = [name for name, value in ours.items() if _plain(value) != theirs.get(name)]
        if other:
            raise bad_file(
                goal,
                f"was made with other settings ({', '.join(other)}); give another --out, or replace it (--overwrite)",
            )
        return True

    def run(self, item: Item, warn: Callable[[str], Any]) -> Path:
        """Write the bag of one slide."""
        data = self.data
        native = open_native(item, data.pixels)
        if data.mpp is not None and native.spacing is None:
            raise bad_file(
                item.image,
                f"does not say the size of its pixels, but --mpp {data.mpp:g} is asked for; give it in a column mpp of "
                f"{data.table}, or leave --mpp out",
            )
        source = open_bag(item, data, native=native)
        features = self._features(source)
        if holes := broken_of(native):
            warn(f"foveate: {item.image}: {len(holes)} broken tiles were filled with background, first {holes[:3]}")
        boxes = to_native(source, native)
        spacing = native.spacing
        about = {
            "source": item.name,
            "image": item.image.name,
            "encoder": self.encoder,
            "settings": self.settings(item),
            "mpp": None if spacing is None else [1000 * size for size in spacing],
            "version": __version__,
        }
        # a bag that is there and resumed was damaged
        return write_bag(
            self.goal(item),
            features,
            boxes,
            native.shape,
            about,
            half=self.half,
            overwrite=self.overwrite or self.resume,
        )

    def _features(self, source: PatchSource) -> Float16[Tensor, "N F"] | Float32[Tensor, "N F"]:
        """The vectors of all patches, in the order of the grid."""
        device = next((value.device for value in self.net.parameters()), torch.device("cpu"))
        assert source.boxes is not None
        order = block_order(source.boxes, self.batch)
        features = torch.empty(0)
        with torch.inference_mode():
            for part in encoded(self.net, source, order, self.batch, device=device, workers=_AHEAD):
                if not len(features):
                    kind = torch.float16 if self.half else torch.float32
                    features = torch.empty(len(source), part.x.shape[1], dtype=kind)
                features[part.index] = part.x[part.row].to(features)
        return features


def to_native(source: PatchSource, native: Raster) -> Int64[Tensor, "N 2 2"]:
    """Boxes of a source that may be a view at another resolution, in level-0 pixels of the slide as stored."""
    assert source.boxes is not None
    assert source.shape is not None
    full = torch.tensor(native.shape)
    ratio = full.double() / torch.tensor(source.shape)
    start, stop = (source.boxes.double() * ratio).unbind(1)
    low, high = (start + 1e-6).floor().long(), torch.minimum((stop - 1e-6).ceil().long(), full)
    return torch.stack([torch.minimum(low, full - 1), high], dim=1)


def digest(net: nn.Module) -> str:
    """A digest of a network: of what it is made, and its weights."""
    found = hashlib.sha256(str(net).encode())
    for name, value in net.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _encoder(
    encoder: str | Path | nn.Module, weights: str | Path | None, warn: Callable[[str], Any], given: dict[str, Any]
) -> tuple[nn.Module, TableConfig]:
    """The encoder, ready to be used, and how its patches are made."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {"patch_size": 224, **given}
    if isinstance(encoder, nn.Module):
        return encoder.eval().to(device), TableConfig(**sizes)
    if Path(encoder).is_dir():
        if weights is not None:
            raise ConfigError(f"--weights with the run {encoder}, which has its own; give the name of an encoder")
        folder = find_model(encoder)
        model = RecognitionModel.from_pretrained(folder)
        if model.config.encoder == "features":
            raise ConfigError(f"{encoder} was trained on features, not on pixels; give a run on patches")
        own = folder / SETTINGS
        data = load_as(RecognitionConfig, own).data if own.is_file() else TableConfig(channels=model.config.in_chans)
        trained = {"patch_size": model.config.patch_size, "stride": None, "features": None}
        return model.encoder.eval().to(device), replace(data, **{**trained, **given})
    with torch.random.fork_rng(devices=[]):  # the caller's generator is not ours to move
        torch.manual_seed(0)
        net = create_patch_encoder(str(encoder), 3, patch_size=sizes["patch_size"])
    if weights is not None:
        load_patch_weights(net, weights)
    else:
        warn(f"foveate: {encoder} has random weights, the same in every call; give --weights FILE for trained ones")
    return net.eval().to(device), TableConfig(**sizes)


def _shard(text: str) -> tuple[int, int]:
    """First row and step of a part ``i/n``."""
    part, _, count = text.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise ConfigError(f"shard={text!r} is no part; give i/n with i from 1 to n, such as 1/4")
    return int(part) - 1, int(count)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
