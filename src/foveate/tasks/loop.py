"""The one training loop, on accelerate, for every task: a task says what a step's sums are, the loop does the rest.

The loss of a step is a sum over terms, each ``sum over all that was seen / weight of all that was seen``, where "all"
spans the images of a batch, the accumulated batches and the processes. So neither how a batch is split over processes
nor how many tokens an image has changes the gradient. A mean per process would weight tokens by the company they keep.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.tasks.checkpoint import find_checkpoint, load_trainer, restore_rng, rng_state, save_checkpoint
from foveate.tasks.config import TrainConfig
from foveate.tasks.optimiser import learning_rate, make_optimizer, run_share
from foveate.tasks.precision import resolve_precision
from foveate.tasks.run import Metrics, Progress, Signals, installed_tracker

_LOG_EVERY = 10  # steps per line of the metrics
_SAVE_EVERY = 120.0  # seconds of training after which `last` is written even without an evaluation


class Interrupted(KeyboardInterrupt):
    """Training was stopped from outside; everything is saved, and the message says how to go on."""


@runtime_checkable
class Task(Protocol):
    """What a task gives to the loop."""

    model: nn.Module
    num_items: int  # training items per epoch
    score: str  # the key of `validate` that picks the best model; larger is better

    def batches(self, epoch: int, plan: Sequence[Sequence[int]], device: torch.device) -> Iterator[Any]:
        """Load the batches of ``plan``, lists of item indices, augmented by (seed, epoch, item) alone."""

    def names(self, batch: Any) -> tuple[str, ...]:
        """Names of the items in the batch, for messages."""

    def num_tokens(self, batch: Any) -> int:
        """Tokens of the batch, for the metrics."""

    def weights(self, batch: Any) -> Mapping[str, float]:
        """Weight of each loss term in the batch, known before the model runs."""

    def loss(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Sum of each loss term over the batch, under the keys of `weights`."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Score the model on the validation items."""

    def save(self, folder: Path) -> None:
        """Write the model, and what prediction needs, into an existing empty folder."""

    def load(self, folder: Path) -> None:
        """Read back the weights that `save` wrote."""


@dataclass
class Position:
    """Where training stands; with the weights, the optimizer and the generators it is all that a resume needs."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already used
    step: int = 0
    seconds: float = 0.0  # training only: no evaluation, no saving
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    evaluated: int = -1  # step of the last evaluation


@dataclass(frozen=True)
class LoopResult:
    """How training ended."""

    reason: str  # epochs, max_steps, minutes, patience or interrupted
    position: Position
    last_scores: dict[str, float] = field(default_factory=dict)
    precision: str = "fp32"  # what `auto` came to


class Loop:
    """Train a task until an epoch, step or minute limit, patience, or a signal.

    Args:
        task: What is trained.
        config: Limits, optimizer and precision.
        folder: Run folder; ``checkpoints`` and ``metrics.jsonl`` are kept in it.
        resume: Continue from ``checkpoints/last`` where there is one.
    """

    def __init__(self, task: Task, config: TrainConfig, folder: Path, *, resume: bool = False):
        from accelerate import Accelerator

        tracker = installed_tracker(config.tracker)
        self.accelerator = Accelerator(cpu=on_cpu(), mixed_precision="no", log_with=tracker, project_dir=folder)
        if tracker is not None:
            self.accelerator.init_trackers("foveate")
        precision = resolve_precision(config.precision, self.accelerator.device)
        self.task, self.config, self.folder = task, replace(config, precision=precision), folder
        self.position = Position()
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        last = find_checkpoint(folder / "checkpoints" / "last") if resume else None
        state = load_trainer(last) if last is not None else None
        if last is not None:
            task.load(last)
        self.model, self.optimizer = self.accelerator.prepare(task.model, make_optimizer(task.model, config))
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.position = Position(**state["position"])
        kind = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
        if state is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._rng = state["rng"] if state is not None else None
        self.metrics = Metrics(
            folder / "metrics.jsonl",
            self.position.step if resume else None,
            active=self.rank == 0,
            also=self.accelerator.log if tracker is not None else None,
        )
        self._since_save = 0.0
        self._scores: dict[str, float] = {}

    def run(self) -> LoopResult:
        """Train; on return `last` and, where anything was evaluated, `best` are on disk.

        Raises:
            Interrupted: A signal asked to stop; `last` is saved at a step boundary.
            FoveateError: The loss or the gradient is not finite, or a checkpoint cannot be written.
        """
        before = rng_state()
        try:
            with Signals() as signals, Progress(self.rank == 0) as progress:
                torch.manual_seed(self.config.seed * 1000 + self.rank)
                if self._rng is not None:
                    restore_rng(self._rng)
                reason = self._epochs(signals, progress)
                return self._finish(reason)
        finally:
            restore_rng(before)
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _finish(self, reason: str) -> LoopResult:
        if reason == "interrupted":
            self._save()
            raise Interrupted(f"stopped after step {self.position.step}, saved; continue it with --resume")
        if self.position.evaluated != self.position.step:
            self._evaluate()
        self._save()
        return LoopResult(reason, self.position, self._scores, self.config.precision)

    def _epochs(self, signals: "Signals", progress: "Progress") -> str:
        if self.config.eval_first and self.position.step == 0:
            self._evaluate()
        while (reason := self._limit()) is None:
            size = self.config.batch_size * self.world
            plan = batch_plan(self.task.num_items, size, self.config.seed, self.position.epoch)
            rest = plan[self.position.batch :]
            for micro in self._micro_batches(rest):
                if self._agree(signals.stop):
                    return "interrupted"
                self._timed_step(micro, len(plan), progress)
                if (reason := self._limit()) is not None:
                    break
                if self._since_save > _SAVE_EVERY:
                    self._save()
            if self.position.batch >= len(plan):
                self.position.epoch, self.position.batch = self.position.epoch + 1, 0
                if self.position.epoch % self.config.eval_every == 0:
                    self._evaluate()
                    self._save()
            if reason is not None:
                return reason
        return reason

    def _limit(self) -> str | None:
        config, position = self.config, self.position
        if config.patience and position.waited >= config.patience:
            return "patience"
        if config.max_steps and position.step >= config.max_steps:
            return "max_steps"
        if config.minutes and self._agree(position.seconds >= 60 * config.minutes):
            return "minutes"
        return "epochs" if config.epochs and position.epoch >= config.epochs else None

    def _micro_batches(self, rest: list[list[int]]) -> Iterator[list[tuple[Any, bool]]]:
        """Yield the accumulated batches of each step; a process without a share stands in with weight zero."""
        shares = [batch[self.rank :: self.world] for batch in rest]
        real = [bool(share) for share in shares]
        plan = [share or batch[:1] for share, batch in zip(shares, rest, strict=True)]
        loaded = self.task.batches(self.position.epoch, plan, self.accelerator.device)
        step: list[tuple[Any, bool]] = []
        start = time.perf_counter()
        for index, batch in enumerate(loaded):
            step.append((batch, real[index]))
            if len(step) == self.config.accumulate or index == len(plan) - 1:
                self._spend(time.perf_counter() - start)
                yield step
                step, start = [], time.perf_counter()

    def _timed_step(self, micro: list[tuple[Any, bool]], num_batches: int, progress: "Progress") -> None:
        start = time.perf_counter()
        rate = learning_rate(self.config, run_share(self.config, self.position, num_batches))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        terms = self._step(micro)
        self.position.step += 1
        self.position.batch += len(micro)
        self._spend(time.perf_counter() - start)
        self.metrics.add(terms, tokens=sum(self.task.num_tokens(batch) for batch, real in micro if real))
        if self.position.step % _LOG_EVERY == 0 or self.position.batch >= num_batches:
            self.metrics.flush(self.position, rate)
        text = f"epoch {self.position.epoch} step {self.position.step} loss {sum(terms.values()):.4f}"
        last = {name: self._scores[name] for name in (self.task.score, "needle_recall") if name in self._scores}
        text += "".join(f" {name.replace('_', ' ')} {value:.3f}" for name, value in last.items())
        progress.show(run_share(self.config, self.position, num_batches), text)

    def _step(self, micro: list[tuple[Any, bool]]) -> dict[str, float]:
        weights = self._global_weights(micro)
        total = dict.fromkeys(weights, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (batch, real) in enumerate(micro):
            last = index == len(micro) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self._autocast():
                    sums = self.task.loss(self.model, batch)
                # DDP averages the gradients over the processes, hence the factor `world`
                loss = sum((sums[key] * (real * self.world / weights[key]) for key in sums), start=torch.tensor(0.0))
                self._require_finite(loss, self.task.names(batch), "loss")
                self.scaler.scale(loss).backward()
            for key in sums:
                total[key] += float(sums[key].detach()) * real / weights[key]
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        if not self.scaler.is_enabled():  # the scaler itself skips a step that overflowed in half precision
            self._require_finite(norm, [name for batch, _ in micro for name in self.task.names(batch)], "gradient norm")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.world > 1:
            shared = torch.tensor(list(total.values()), dtype=torch.float64, device=self.accelerator.device)
            torch.distributed.all_reduce(shared)
            return dict(zip(total, shared.tolist(), strict=True))
        return total

    def _gradient_norm(self) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.config.clip or math.inf
        return torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit))

    def _global_weights(self, micro: list[tuple[Any, bool]]) -> dict[str, float]:
        local: dict[str, float] = {}
        for batch, real in micro:
            for key, value in self.task.weights(batch).items():
                local[key] = local.get(key, 0.0) + value * real
        keys = sorted(local)
        summed = torch.tensor([local[key] for key in keys], dtype=torch.float64, device=self.accelerator.device)
        if self.world > 1:
            torch.distributed.all_reduce(summed)
        # a term that nothing in the step speaks for (all pixels ignored) has sum zero: any divisor will do
        return {key: float(value) or 1.0 for key, value in zip(keys, summed.tolist(), strict=True)}

    def _require_finite(self, value: Tensor, names: Sequence[str], what: str) -> None:
        finite = bool(torch.isfinite(value.detach()).all())
        if self._agree(not finite):
            where = f" (images: {', '.join(names)})" if not finite else " (on another process)"
            raise FoveateError(
                f"{what} is {float(value.detach())} at step {self.position.step + 1}{where}; it must be finite; look "
                "at these images, or lower train.lr or train.clip; the last checkpoint is kept"
            )

    def _agree(self, flag: bool) -> bool:
        """True on every process as soon as it is true on one."""
        if self.world == 1:
            return flag
        shared = torch.tensor([float(flag)], device=self.accelerator.device)
        torch.distributed.all_reduce(shared)
        return bool(shared.item() > 0)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        kind = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.accelerator.device.type, dtype=kind)

    def _spend(self, seconds: float) -> None:
        self.position.seconds += seconds
        self._since_save += seconds

    def _evaluate(self) -> None:
        scores: list[dict[str, float]] = [{}]
        if self.rank == 0:
            with torch.no_grad(), self._autocast():
                self.task.model.eval()
                scores = [self.task.validate(self.task.model)]
                self.task.model.train()
        if self.world > 1:
            torch.distributed.broadcast_object_list(scores)
        self._scores = scores[0]
        self.position.evaluated = self.position.step
        score = self._scores.get(self.task.score, math.nan)
        self.metrics.write("val", self.position, self._scores)
        better = score > self.position.best or math.isnan(score)  # without validation images the latest is the best
        self.position.waited = 0 if better else self.position.waited + 1
        if better or score == self.position.best:  # of few images many scores are equal; the later one has learned more
            self.position = replace(self.position, best=score, best_step=self.position.step)
            if self.rank == 0:
                save_checkpoint(self.folder / "checkpoints" / "best", self.task.save)

    def _save(self) -> None:
        self._since_save = 0.0
        if self.rank == 0:
            state = {
                "position": asdict(self.position),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(),
            }
            save_checkpoint(self.folder / "checkpoints" / "last", self.task.save, state)
        self.accelerator.wait_for_everyone()


def on_cpu() -> bool:
    """True where training stays on the CPU: there is no accelerator, or ``ACCELERATE_USE_CPU`` says so.

    accelerate has to be told: of several processes without an accelerator it would make as many lonely ones.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes", "on"}
    return asked or not torch.accelerator.is_available()


def run_device() -> torch.device:
    """What training runs on."""
    found = None if on_cpu() else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def batch_plan(num_items: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Order an epoch: every item once, in an order drawn from (seed, epoch) alone, in batches over all processes."""
    order = np.random.default_rng([seed, epoch]).permutation(num_items).tolist()
    return [order[start : start + batch_size] for start in range(0, num_items, batch_size)]
