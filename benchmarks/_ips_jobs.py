"""The jobs of the ips family, one process each, so that peak memory is that of the job alone.

``python _ips_jobs.py NAME '{"argument": value}'`` prints one line of JSON: what the job returns and ``rss``, the most
bytes that the process ever had in memory.

Legend: N patches of a bag, R rows of it, P side of a patch, F features.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _slide_jobs import Result, clock, peak_bytes
from foveate.geometry.patch_source import PatchSource
from foveate.io.bags import FeatureBag
from foveate.models import create_model
from foveate.models.recognition import RecognitionModel
from foveate.nn.heads import total_loss

_PATTERNS = 997


class DrawnPatches:
    """A bag of any size, of which nothing is held: patches of noise, none of them blank, made when asked for."""

    shape = None
    boxes = None

    def __init__(self, num_patches: int, side: int) -> None:
        self._len = num_patches
        self._noise = torch.randint(0, 256, (_PATTERNS, 3, side, side), dtype=torch.uint8)

    def __len__(self) -> int:
        return self._len

    def read(self, index: Tensor) -> Tensor:
        """Patches ``[R, 3, P, P]``, each unlike all others."""
        patches = self._noise[index % _PATTERNS]
        patches[:, 0, 0, 0] = (index // _PATTERNS % 256).byte()
        return patches


def training_step(model: RecognitionModel, bags: list[PatchSource], half: bool = False) -> None:
    """Choose, learn, step; the labels do not matter here."""
    optimiser = torch.optim.AdamW(model.parameters())
    chosen = model.train().choose(bags)
    targets = {task.name: torch.zeros(len(bags), dtype=torch.int64) for task in model.config.tasks}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(chosen)
    total_loss(model.config.tasks, logits, targets).mean().backward()
    optimiser.step()


def warm_up(model: RecognitionModel, bag: PatchSource) -> int:
    """Bytes of the program when all of it is loaded: behind a training step on few patches."""
    state = copy.deepcopy(model.state_dict())
    training_step(model, [FirstRows(bag, 8)])
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return peak_bytes()


def step_pixels(patches: int, keep: int, chunk: int, batch: int, side: int = 32, precision: str = "bf16") -> Result:
    """A training step on bags of pixels."""
    model = create_model("ips_resnet18", stages=2, width=128, keep=keep, chunk=chunk, precision=precision, rank="quota")
    bags: list[PatchSource] = [DrawnPatches(patches, side) for _ in range(batch)]
    result: Result = {"program": warm_up(model, bags[0])}
    with clock(result, "seconds"):
        training_step(model, bags)
    return result | {"logits": 4 * patches * batch * model.config.num_heads}


def step_features(path: str, keep: int, chunk: int, batch: int, rows: int = 0, half: bool = False) -> Result:
    """A training step on bags of stored features, of which the first ``rows`` count where given."""
    bag: PatchSource = FeatureBag(path)
    if rows:
        bag = FirstRows(bag, rows)
    settings: dict[str, Any] = {"keep": keep, "chunk": chunk, "rank": "mean", "precision": "bf16" if half else "folded"}
    model = create_model("ips_features", in_chans=_width(bag), norm="batch", **settings)
    result: Result = {"program": warm_up(model, bag)}
    with clock(result, "seconds"):
        training_step(model, [bag] * batch, half)
    return result | {"logits": 4 * len(bag) * batch * model.config.num_heads}


class FirstRows:
    """The first patches of a bag."""

    shape = None
    boxes = None

    def __init__(self, bag: PatchSource, rows: int) -> None:
        self._bag, self._len = bag, rows

    def __len__(self) -> int:
        return self._len

    def read(self, index: Tensor) -> Tensor:
        """As the bag gives them."""
        return self._bag.read(index)


def select_features(path: str, keep: int, chunk: int, precision: str = "folded", rank: str = "mean") -> Result:
    """A selection from stored features, which are read on the way."""
    bag = FeatureBag(path)
    settings: dict[str, Any] = {"keep": keep, "chunk": chunk, "precision": precision, "rank": rank}
    model = create_model("ips_features", in_chans=_width(bag), norm="batch", **settings).eval()
    result: Result = {"program": peak_bytes()}
    with clock(result, "seconds"):
        chosen = model.select(bag)
    return result | {"kept": chosen.index.tolist()}


def published_features(path: str, keep: int, chunk: int) -> Result:
    """The same by the published rule: the features are in memory, in float32, before it starts."""
    from _published_ips import PublishedSelection, projector

    bag = FeatureBag(path)
    tasks = {"label": (2, "softmax")}
    width = _width(bag)
    model = PublishedSelection(projector(width, 512), 512, tasks, keep=keep, chunk=chunk).eval()
    result: Result = {"program": peak_bytes()}
    with clock(result, "read"):
        features = torch.empty(1, len(bag), width)
        for rows in torch.arange(len(bag)).split(4096):
            features[0, rows] = bag.read(rows).float()
    with clock(result, "seconds"):
        model.select(features)
    return result


def _width(bag: PatchSource) -> int:
    return int(bag.read(torch.tensor([0])).shape[1])


def attend_all(patches: int, side: int = 16) -> Result:
    """A training step of attention over all patches with gradient, from pixels that are in memory."""
    return _small_step(patches, patches, side)


def attend_kept(patches: int, keep: int, side: int = 16) -> Result:
    """The same model, patches chosen first."""
    return _small_step(patches, keep, side)


def _small_step(patches: int, keep: int, side: int) -> Result:
    """One bag through the small CNN."""
    model = create_model("ips_cnn", keep=keep, rank="mean")
    bag = DrawnPatches(patches, side)
    result: Result = {"program": warm_up(model, bag)}
    with clock(result, "seconds"):
        training_step(model, [bag])
    return result


def write_features(path: str, patches: int, width: int) -> Result:
    """A bag of drawn features, written in parts."""
    from foveate.io.bags import write_bag

    start = torch.arange(patches)[:, None, None].expand(-1, 1, 2) * 256
    generator = torch.Generator().manual_seed(0)

    def parts() -> Any:
        for rows in torch.arange(patches).split(25_000):
            yield torch.randn(len(rows), width, generator=generator)

    write_bag(Path(path), parts(), torch.cat([start, start + 256], 1))
    return {}


JOBS = {
    job.__name__: job
    for job in (
        step_pixels,
        step_features,
        select_features,
        published_features,
        attend_all,
        attend_kept,
        write_features,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    answer = JOBS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"rss": peak_bytes()} | answer))
