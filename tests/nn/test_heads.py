"""Heads and their losses, each kind in its stable form."""

import pytest
import torch
from torch import Tensor, nn

from foveate.errors import ConfigError, ShapeError
from foveate.nn.heads import Heads, TaskSpec, total_loss

CLASSES, LABELS = TaskSpec("c", "classes", 3), TaskSpec("l", "labels", 2)
ORDINAL, NUMBER = TaskSpec("o", "ordinal", 4), TaskSpec("r", "regression", 1)


def test_losses_are_the_fused_ones_and_finite_for_any_logit() -> None:
    """Released code takes the logarithm of a softmax plus epsilon."""
    logits = torch.tensor([[500.0, -500.0, 0.0], [0.1, 0.2, 0.3]])
    loss = CLASSES.loss(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([1, 2]), reduction="none"))
    assert loss[0] == 1000.0
    torch.testing.assert_close(
        LABELS.loss(torch.tensor([[400.0, -400.0]]), torch.tensor([[0, 1]])), torch.tensor([400.0])
    )


def test_unknown_labels_cost_nothing() -> None:
    for task, target in (
        (CLASSES, torch.tensor([-1, 1])),
        (ORDINAL, torch.tensor([-1, 1])),
        (LABELS, torch.tensor([[float("nan"), 1.0], [1.0, 0.0]])),
        (NUMBER, torch.tensor([[float("nan")], [3.0]])),
    ):
        logits = torch.zeros(2, task.num_logits, requires_grad=True)
        loss = task.loss(logits, target)
        assert task.known(target).tolist() == [False, True]
        assert loss[0] == 0 < loss[1]
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()
        assert not gradient[0].any()


def test_weights_count_classes_and_positives() -> None:
    logits = torch.zeros(2, 3)
    weighted = CLASSES.loss(logits, torch.tensor([0, 1]), torch.tensor([2.0, 1.0, 1.0]))
    assert weighted[0] == 2 * weighted[1]
    twice = LABELS.loss(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([2.0, 2.0]))
    assert twice == 2 * LABELS.loss(torch.zeros(1, 2), torch.ones(1, 2))


def test_ordinal_classes_are_steps() -> None:
    sure = torch.tensor([[9.0, 9.0, -9.0]])
    assert ORDINAL.loss(sure, torch.tensor([2])) < 0.01 < ORDINAL.loss(sure, torch.tensor([3]))
    assert ORDINAL.predict(sure).argmax(1).item() == 2
    share = ORDINAL.predict(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    assert share.shape == (50, 4)
    assert (share >= 0).all()
    torch.testing.assert_close(share.sum(1), torch.ones(50))


def test_predictions_of_the_other_kinds() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    torch.testing.assert_close(CLASSES.predict(logits), logits.softmax(1))
    torch.testing.assert_close(LABELS.predict(logits[:, :2]), logits[:, :2].sigmoid())
    assert torch.equal(NUMBER.predict(logits[:, :1]), logits[:, :1])


def test_each_task_reads_its_own_query_and_the_loss_is_their_mean() -> None:
    heads = Heads(8, (CLASSES, ORDINAL))
    x = torch.randn(5, 2, 8)
    said = heads(x)
    assert {name: tuple(logits.shape) for name, logits in said.items()} == {"c": (5, 3), "o": (5, 3)}
    torch.testing.assert_close(said["o"], heads["task_o"](x[:, 1]))
    targets = {"c": torch.tensor([0, 1, 2, -1, 0]), "o": torch.tensor([0, 1, 2, 3, -1])}
    loss = total_loss((CLASSES, ORDINAL), said, targets)
    expected = (CLASSES.loss(said["c"], targets["c"]) + ORDINAL.loss(said["o"], targets["o"])) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        (
            CLASSES,
            torch.tensor([0, 3]),
            "task c: class 3 of 3; classes count from 0, raise num_outputs or mend the label",
        ),
        (LABELS, torch.tensor([0, 1]), r"task l: target \(2,\) for labels must be \(2, 2\)"),
        (ORDINAL, torch.zeros(2, 4), r"task o: target \(2, 4\) for ordinal must be \(2,\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(task: TaskSpec, target: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        task.loss(torch.zeros(2, task.num_logits), target)


def test_tasks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task name 'a\.b' may hold letters, digits, _ and - alone; rename it"):
        TaskSpec("a.b")
    with pytest.raises(
        ConfigError, match="task a: kind='sum' is none of classes, labels, ordinal, regression; choose one"
    ):
        TaskSpec("a", "sum")
    with pytest.raises(ConfigError, match="task a: num_outputs=1 is below 2 for kind classes; raise it"):
        TaskSpec("a", "classes", 1)
