"""The loss on leaves is the loss on pixels, and its parts add up whatever way a batch is shared out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from foveate.errors import ConfigError, ShapeError
from foveate.tasks.losses import LossParts, leaf_loss

LENGTHS = (5, 1, 7)


def batch(num_classes: int = 3, sides: tuple[int, ...] = (4, 4), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    logits = torch.randn(tokens, num_classes, *sides, generator=draw)
    soft = torch.rand(tokens, num_classes, *sides, generator=draw)
    weight = torch.randint(0, 9, (tokens, *sides), generator=draw).float()
    return logits, soft / soft.sum(1, keepdim=True), weight


def test_hard_labels_and_unit_weight_give_the_cross_entropy_of_pixels() -> None:
    logits, soft, _ = batch()
    labels = soft.argmax(1)
    hard = one_hot(labels, 3).movedim(-1, 1).float()
    parts = leaf_loss(logits, hard, torch.ones(13, 4, 4), lengths=LENGTHS, dice_weight=0.0)
    torch.testing.assert_close(parts.total(), cross_entropy(logits, labels))


def test_a_sample_counts_by_the_pixels_it_covers() -> None:
    """One sample of area n weighs exactly as n samples of area 1, in cross entropy and in Dice."""
    logits, soft, weight = batch(sides=(1, 1))
    big = leaf_loss(logits, soft, weight, lengths=LENGTHS)
    copies = weight.flatten().long()
    ends = [int(part.sum()) for part in copies.split(LENGTHS)]
    ones = torch.ones(int(copies.sum()), 1, 1)
    small = leaf_loss(
        logits.repeat_interleave(copies, 0), soft.repeat_interleave(copies, 0), ones, lengths=ends, dice_weight=1.0
    )
    torch.testing.assert_close(big.sums(), small.sums())


@pytest.mark.parametrize("sides", [(4, 4), (2, 2, 2)])
def test_parts_add_up_over_processes(sides: tuple[int, ...]) -> None:
    """Gradient of the whole batch in one process equals the sum of the gradients of its shares."""
    logits, soft, weight = batch(sides=sides)
    whole = logits.clone().requires_grad_()
    leaf_loss(whole, soft, weight, lengths=LENGTHS, class_weights=(1.0, 2.0, 3.0)).total().backward()
    shared = logits.clone().requires_grad_()
    cut = LENGTHS[0] + LENGTHS[1]
    parts: list[LossParts] = []
    for rows, lengths in ((slice(0, cut), LENGTHS[:2]), (slice(cut, None), LENGTHS[2:])):
        parts.append(leaf_loss(shared[rows], soft[rows], weight[rows], lengths=lengths, class_weights=(1.0, 2.0, 3.0)))
    sums = parts[0].sums() + parts[1].sums()
    for part in parts:
        part.total(sums[1], sums[3]).backward()
    torch.testing.assert_close(whole.grad, shared.grad)


def test_unlabelled_samples_and_images_change_nothing() -> None:
    logits, soft, weight = batch()
    weight[5] = 0  # the second image has one token and no label
    with_it = leaf_loss(logits, soft, weight, lengths=LENGTHS)
    rest = [0, 1, 2, 3, 4, *range(6, 13)]
    without = leaf_loss(logits[rest], soft[rest], weight[rest], lengths=(5, 7))
    torch.testing.assert_close(with_it.sums(), without.sums())


def test_nothing_labelled_at_all_is_zero_and_finite() -> None:
    logits, soft, weight = batch()
    logits.requires_grad_()
    loss = leaf_loss(logits, soft, weight * 0, lengths=LENGTHS).total()
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_perfect_prediction_costs_nothing_and_a_missed_class_costs_dice() -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, :2] = 1
    hard = one_hot(labels, 2).movedim(-1, 1).float()
    weight = torch.full((2, 4, 4), 16.0)
    good = leaf_loss(hard * 50, hard, weight, lengths=(2,))
    assert float(good.total()) < 1e-6
    missed = leaf_loss(torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 4, 4), hard, weight, lengths=(2,))
    assert float(missed.dice_sum) == pytest.approx(1, abs=0.02)


def test_half_precision_sums_in_full_precision() -> None:
    logits, soft, weight = batch()
    half = leaf_loss(logits.bfloat16(), soft, weight * 1e4, lengths=LENGTHS)
    assert half.ce_sum.dtype == torch.float32


def test_errors() -> None:
    logits, soft, weight = batch()
    with pytest.raises(ShapeError, match="lengths sum to 12 but there are 13 tokens"):
        leaf_loss(logits, soft, weight, lengths=(5, 7))
    with pytest.raises(ConfigError, match="2 class weights for 3 classes"):
        leaf_loss(logits, soft, weight, lengths=LENGTHS, class_weights=(1.0, 2.0))
