"""Training runs of the ips family: our model and the published one learn the same bags with the same optimiser.

Legend: B bags, N patches.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import _ips_data as data
from _published_ips import PublishedSelection
from foveate.geometry.patch_source import PatchSource
from foveate.models.recognition import RecognitionModel
from foveate.nn.detail_prior import DetailPrior
from foveate.nn.heads import total_loss
from foveate.nn.schedule import KeepSchedule

LR, DECAY, BATCH, CLIP = 1e-3, 0.1, 16, 5.0


@dataclass(frozen=True, eq=False)
class Bags:
    """A data set in memory.

    Args:
        sources: the bags.
        targets: of every task, one row per bag.
        hidden: positions of what is looked for, where it is known.
        dense: the patches of some bags as the published loop takes them, ``[B, N, ...]`` float32; part of its loading,
            the time of which does not count.
    """

    sources: Sequence[PatchSource]
    targets: data.Targets
    hidden: Sequence[Any]
    dense: Callable[[Sequence[int]], Tensor]

    def labels(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Targets of some bags."""
        return {name: target[list(rows)] for name, target in self.targets.items()}


@dataclass(frozen=True)
class Budget:
    """When a run ends: after ``epochs``, or after ``seconds`` of CPU time in steps."""

    epochs: int = 0
    seconds: float = 0.0


class Ours:
    """Our model; ``keep`` follows a schedule whose unit is the whole run."""

    def __init__(self, model: RecognitionModel, schedule: KeepSchedule, half: bool = False) -> None:
        self.model, self.schedule, self.half = model, schedule, half
        self.prior = DetailPrior(schedule.start)
        if half:
            model.encoder.to(memory_format=torch.channels_last)

    def prepare(self, bags: Bags, rows: Sequence[int]) -> None:
        """Nothing: patches are read in the time that counts."""

    def loss(self, bags: Bags, rows: Sequence[int], progress: float) -> Tensor:
        """Choose, read, predict."""
        names, by_detail = list(map(str, rows)), self.schedule.by_detail_at(progress)
        sources = [bags.sources[row] for row in rows]
        chosen = self.model.choose(
            sources, self.schedule.at(progress), prior=self.prior, by_detail=by_detail, names=names
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.model(chosen)
        return total_loss(self.model.config.tasks, logits, bags.labels(rows)).mean()

    def say(self, bags: Bags, row: int) -> tuple[dict[str, Tensor], Tensor]:
        """Probabilities of one bag, and the kept patches."""
        chosen = self.model.choose([bags.sources[row]])
        logits = self.model(chosen)
        said = {task.name: task.predict(logits[task.name])[0] for task in self.model.config.tasks}
        return said, chosen.selections[0].index


class Published:
    """The published model and rule."""

    def __init__(self, model: PublishedSelection) -> None:
        self.model = model
        self.patches: Tensor | None = None

    def prepare(self, bags: Bags, rows: Sequence[int]) -> None:
        """Load a batch, outside the time that counts."""
        self.patches = bags.dense(rows)

    def loss(self, bags: Bags, rows: Sequence[int], progress: float) -> Tensor:
        """Choose, predict."""
        assert self.patches is not None
        index, chosen = self.model.select(self.patches)
        return self.model.loss(self.model.predict(chosen, index), bags.labels(rows))

    def say(self, bags: Bags, row: int) -> tuple[dict[str, Tensor], Tensor]:
        """Probabilities of one bag, and the kept patches; not shuffled, unlike the released code."""
        shuffle, self.model.shuffle = self.model.shuffle, False
        index, chosen = self.model.select(bags.dense([row]))
        self.model.shuffle = shuffle
        said = self.model.eval().predict(chosen, index)
        return {name: share[0] for name, share in said.items()}, index[0]


def train(side: Ours | Published, bags: Bags, test: Bags, budget: Budget, seed: int) -> dict[str, Any]:
    """Train to the end of the budget; returns scores on the test bags, the curve of its epochs and the CPU seconds."""
    optimiser = torch.optim.AdamW(side.model.parameters(), lr=LR, weight_decay=DECAY)
    rng = np.random.default_rng(seed)
    per_epoch = len(bags.sources) // BATCH
    seconds, step, curve = 0.0, 0, []
    while True:
        order = rng.permutation(len(bags.sources))
        losses = []
        for place in range(per_epoch):
            progress = step / (per_epoch * budget.epochs) if budget.epochs else seconds / budget.seconds
            if progress >= 1:
                break
            rows = order[BATCH * place : BATCH * (place + 1)].tolist()
            side.prepare(bags, rows)
            start = time.process_time()
            side.model.train()
            for group in optimiser.param_groups:
                group["lr"] = LR * rate(progress)
            loss = side.loss(bags, rows, progress)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(side.model.parameters(), CLIP)
            optimiser.step()
            seconds += time.process_time() - start
            losses.append(float(loss.detach()))
            step += 1
        done = step >= per_epoch * budget.epochs if budget.epochs else seconds >= budget.seconds
        if budget.epochs or done:
            scores = score(side, test, None if done else len(test.sources) // 4)
            curve.append({"loss": sum(losses) / max(1, len(losses)), **scores})
        if done:
            return {**curve[-1], "seconds": seconds, "steps": step, "curve": curve}


def rate(progress: float) -> float:
    """Share of the learning rate: up within a twelfth of the run, down as a cosine."""
    return min(1.0, 12 * progress + 0.01) * 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 1 / 12) * 12 / 11))


@torch.no_grad()
def score(side: Ours | Published, test: Bags, most: int | None = None) -> dict[str, float]:
    """Share of bags that are right in every task (``multi``: in all classes), and of what is hidden that was kept."""
    side.model.eval()
    rows = range(len(test.sources) if most is None else most)
    right: dict[str, list[float]] = {name: [] for name in test.targets}
    recall = []
    for row in rows:
        said, kept = side.say(test, row)
        for name, share in said.items():
            truth = test.targets[name][row]
            same = bool(((share > 0.5) == (truth > 0.5)).all()) if truth.ndim else int(share.argmax()) == int(truth)
            right[name].append(float(same))
        if test.hidden:
            recall.append(float(np.isin(test.hidden[row], kept.numpy()).mean()))
    found = {name: sum(values) / len(values) for name, values in right.items()}
    return found | ({"recall": sum(recall) / len(recall)} if recall else {})
