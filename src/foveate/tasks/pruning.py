"""What pruning is taught and how it is judged: which tokens the labels make worth keeping.

Legend: T tokens of a pack, K classes (background first), P samples per side, B images.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError
from foveate.nn.pruner import Pruning, Scores
from foveate.tasks.settings import PredictConfig, TrainConfig

INSIDE = 0.5
"""Worth of a token that lies inside one class other than background: between that of an edge and of background."""


def prunes(model: nn.Module) -> bool:
    """Whether a model sends tokens away."""
    return bool(getattr(getattr(model, "config", None), "prune_after", ()))


def recorded_pruning(model: nn.Module, predict: PredictConfig) -> Pruning | None:
    """How to prune where masks are made, with room for what the prune points think; None of a model without any.

    Args:
        model: as in `prunes`.
        predict: its ``keep_ratio`` stands for that of the model.

    Raises:
        ConfigError: a ratio is given and the model does not prune.
    """
    if prunes(model):
        return Pruning(keep_ratio=predict.keep_ratio, scores=[])
    if predict.keep_ratio is not None:
        raise ConfigError(f"predict.keep_ratio={predict.keep_ratio} of a model that prunes no tokens; leave it out")
    return None


def draw_pruning(train: TrainConfig, epoch: int, names: Sequence[str]) -> Pruning:
    """How to prune a batch in training: the same for the same seed, epoch and images, whatever came before.

    Args:
        train: range of the keep ratio, scale of the noise, seed and length of the run.
        epoch: of the batch; noise falls linearly to 0 at the last one, where the run's length is given in epochs.
        names: images of the batch.
    """
    seed = np.random.SeedSequence([train.seed, epoch, zlib.crc32("\n".join(names).encode())])
    ratio, noise = None, None
    if train.keep_ratio is not None:
        low, high = train.keep_ratio
        ratio = float(low * (high / low) ** np.random.default_rng(seed).random())
    if train.prune_noise > 0:
        noise = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
    fall = 1.0 if train.epochs is None else max(0.0, 1 - epoch / max(train.epochs - 1, 1))
    return Pruning(keep_ratio=ratio, noise=noise, noise_scale=train.prune_noise * fall, scores=[])


def class_shares(soft: Float[Tensor, "T K *P"], weight: Float[Tensor, "T *P"]) -> Float[Tensor, "T K"]:
    """Share of each class in every token; 0 where nothing is labelled.

    Args:
        soft: share of each class in every sample.
        weight: labelled pixels under each sample.
    """
    area_T = weight.flatten(1).sum(1)
    return (soft.flatten(2) * weight.flatten(1)[:, None]).sum(2) / area_T.clamp(min=1e-12)[:, None]


def token_worth(soft: Float[Tensor, "T K *P"], weight: Float[Tensor, "T *P"]) -> Float[Tensor, " T"]:
    """What the labels say a token is worth: 1 with a label edge in it, 1/2 inside a class, 0 in background.

    Args:
        soft: share of each class in every sample.
        weight: labelled pixels under each sample; a token without any is worth -1, which means unknown.
    """
    share_TK = class_shares(soft, weight)
    edge_T = share_TK.max(1).values < 1 - 1e-6
    worth_T = torch.where(edge_T, 1.0, INSIDE * (share_TK[:, 0] < 0.5).float())
    return torch.where(weight.flatten(1).sum(1) > 0, worth_T, -1.0)


def image_of(lengths: Sequence[int], device: torch.device) -> Int64[Tensor, " T"]:
    """The image that each token of a pack belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def score_loss(scores: Sequence[Scores], worth: Float[Tensor, " T"], lengths: Sequence[int]) -> Float[Tensor, ""]:
    """Binary cross entropy of the scores against what the tokens are worth, summed over images, meaned over stages.

    What is worth something and what is not count half each in every image, however few tokens there are of one. Without
    such a loss a score network hardly learns: through the choice alone its gradient is orders below that of the blocks.

    Args:
        scores: of every prune point.
        worth: of every token of the pack, from 0 to 1; -1 where unknown. See `token_worth`.
        lengths: tokens of each image.

    Source: "patch contains foreground" as a target after HRViT (MICCAI 2025), on SCD, arXiv 2303.06522.
    **Differs** from SCD, which trains its scores through the choice alone.
    """
    image_T = image_of(lengths, worth.device)
    total = worth.new_zeros(())
    for stage in scores:
        target, image = worth.index_select(0, stage.rows), image_T.index_select(0, stage.rows)
        known, score = (target >= 0).float(), stage.score.float()
        for member, sign in ((target * known, 1.0), ((1 - target) * known, -1.0)):
            number_B = worth.new_zeros(len(lengths)).index_add(0, image, member)
            sum_B = worth.new_zeros(len(lengths)).index_add(0, image, member * functional.softplus(-sign * score))
            total = total + 0.5 * (sum_B / number_B.clamp(min=1e-6)).sum()
    return total / max(len(scores), 1)


def selection_recall(scores: Sequence[Scores], worth: Float[Tensor, " T"]) -> dict[str, float]:
    """Share of the tokens with a label edge, and of all tokens with a class, that are kept to the end.

    Args:
        scores: what every prune point of a forward pass thought, in order.
        worth: of every token of the pack, see `token_worth`; on the CPU.

    Returns:
        ``boundary_recall`` and ``foreground_recall``; NaN where there are no such tokens. ``boundary_recall_ceiling``:
        what the best choice of as many tokens would reach.
    """
    kept = scores[-1].rows.index_select(0, scores[-1].kept).cpu()
    kept = kept[kept < len(worth)]  # a model may repeat a tiny pack behind itself
    chosen = torch.zeros_like(worth, dtype=torch.bool).index_fill(0, kept, True)
    edge, some = worth == 1.0, worth > 0.0
    return {
        "boundary_recall": float(chosen[edge].float().mean()),
        "foreground_recall": float(chosen[some].float().mean()),
        "boundary_recall_ceiling": min(1.0, len(kept) / int(edge.sum())) if bool(edge.any()) else float("nan"),
    }
