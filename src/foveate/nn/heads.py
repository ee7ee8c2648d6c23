"""What a model says about a bag: several tasks, each with a head and a loss of its own kind.

Legend: B bags, Q tasks, D width, K numbers that a head gives.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError

KINDS = ("classes", "labels", "ordinal", "regression")


@dataclass(frozen=True)
class TaskSpec:
    """One thing to recognise.

    Args:
        name: letters, digits, ``_`` and ``-``.
        kind: ``classes`` (one of K), ``labels`` (any of K), ``ordinal`` (one of K in order) or ``regression``
            (K numbers).
        num_outputs: K; at least 2 for ``classes`` and ``ordinal``.

    Raises:
        ConfigError: a name, kind or number that is not possible.
    """

    name: str
    kind: str = "classes"
    num_outputs: int = 2

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ConfigError(f"task name {self.name!r} may hold letters, digits, _ and - alone; rename it")
        if self.kind not in KINDS:
            raise ConfigError(f"task {self.name}: kind={self.kind!r} is none of {', '.join(KINDS)}; choose one")
        least = 2 if self.kind in ("classes", "ordinal") else 1
        if self.num_outputs < least:
            raise ConfigError(
                f"task {self.name}: num_outputs={self.num_outputs} is below {least} for kind {self.kind}; raise it"
            )

    @property
    def num_logits(self) -> int:
        """Numbers that the head gives: K, or the K - 1 steps of an ordinal task."""
        return self.num_outputs - (self.kind == "ordinal")

    def known(self, target: Shaped[Tensor, "B *rest"]) -> Bool[Tensor, " B"]:
        """Which bags have a label; a class below 0 or NaN says that nobody knows."""
        if target.is_floating_point():
            return ~target.isnan().flatten(1).any(1) if target.ndim > 1 else ~target.isnan()
        return (target >= 0).flatten(1).all(1) if target.ndim > 1 else target >= 0

    def loss(
        self,
        logits: Float[Tensor, "B K"],
        target: Shaped[Tensor, "B *rest"],
        weight: Float[Tensor, " K"] | None = None,
    ) -> Float[Tensor, " B"]:
        """Loss of each bag, 0 where its label is not known.

        Cross-entropy, binary cross-entropy averaged over labels or steps, or squared error averaged over numbers; all
        in the fused forms that are stable for any logit.

        Args:
            logits: what the head gave.
            target: class ``[B]`` (classes, ordinal), 0 or 1 ``[B, K]`` (labels) or numbers ``[B, K]`` (regression).
            weight: of each class (``classes``) or of the positives of each label (``labels``).

        Raises:
            ShapeError: the target does not fit the kind, or names a class that does not exist.
        """
        logits, known = logits.float(), self.known(target)
        wide = self.kind in ("labels", "regression")
        if target.shape != ((len(logits), self.num_outputs) if wide else (len(logits),)):
            expected = (len(logits), self.num_outputs) if wide else (len(logits),)
            raise ShapeError(f"task {self.name}: target {tuple(target.shape)} for {self.kind} must be {expected}")
        if not wide and target.numel() and int(target.max()) >= self.num_outputs:
            raise ShapeError(
                f"task {self.name}: class {int(target.max())} of {self.num_outputs}; classes count from 0, "
                "raise num_outputs or mend the label"
            )
        target = torch.where(known.view(-1, *(1,) * (target.ndim - 1)), target, torch.zeros_like(target))
        if self.kind == "classes":
            loss = functional.cross_entropy(logits, target.long(), weight, reduction="none")
        elif self.kind == "regression":
            loss = (logits - target.to(logits)).square().mean(1)
        else:
            goal = target.to(logits)
            if self.kind == "ordinal":
                goal = (target[:, None] > torch.arange(self.num_logits, device=target.device)).to(logits)
            positive = weight if self.kind == "labels" else None
            loss = functional.binary_cross_entropy_with_logits(
                logits, goal, pos_weight=positive, reduction="none"
            ).mean(1)
        return loss * known

    def predict(self, logits: Float[Tensor, "B K"]) -> Float[Tensor, "B P"]:
        """Probabilities of the K classes or labels, or the K numbers themselves."""
        logits = logits.float()
        if self.kind == "classes":
            return logits.softmax(1)
        if self.kind == "regression":
            return logits
        share = logits.sigmoid()
        if self.kind == "labels":
            return share
        reached = share.cummin(1).values  # a step is reached no more surely than the one before
        edge = reached.new_ones(len(reached), 1)
        return torch.cat([edge, reached], 1) - torch.cat([reached, edge * 0], 1)


def check_tasks(tasks: Sequence[TaskSpec]) -> None:
    """Refuses tasks that cannot be told apart.

    Raises:
        ConfigError: no task, or two of one name.
    """
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"tasks {names}: give at least one, each with a name of its own")


class Heads(nn.ModuleDict):
    """One linear head per task, each on the vector of its own query.

    Args:
        width: D.
        tasks: in the order of the queries, names unlike each other.
    """

    def __init__(self, width: int, tasks: Sequence[TaskSpec]) -> None:
        check_tasks(tasks)
        super().__init__({f"task_{task.name}": nn.Linear(width, task.num_logits) for task in tasks})
        self.tasks = tuple(tasks)

    def forward(self, x_BQD: Float[Tensor, "B Q D"]) -> dict[str, Float[Tensor, "B K"]]:
        """Logits of every task."""
        return {task.name: self[f"task_{task.name}"](x_BQD[:, query]) for query, task in enumerate(self.tasks)}


def total_loss(
    tasks: Sequence[TaskSpec],
    logits: Mapping[str, Float[Tensor, "B K"]],
    targets: Mapping[str, Shaped[Tensor, "B *rest"]],
    weights: Mapping[str, Float[Tensor, " K"]] | None = None,
) -> Float[Tensor, " B"]:
    """Loss of each bag, averaged over the tasks as published."""
    weights = weights or {}
    losses = [task.loss(logits[task.name], targets[task.name], weights.get(task.name)) for task in tasks]
    return torch.stack(losses).mean(0)
