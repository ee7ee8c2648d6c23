"""What scores may be taught instead of the labels: a token's own loss, or where a small head is torn.

Legend: T tokens of a pack, R of them at a prune point, K classes (background first), P samples per side, B images.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.io.write import atomic_write
from foveate.nn.pruner import Scores
from foveate.tasks.pruning import image_of

NAME = "teacher"
"""Under which a model carries its teacher while it is trained."""


class Teacher(nn.Module):
    """A linear head at every prune point that guesses a token's class shares; where it is torn, it pays to keep.

    It reads detached tokens, so it changes nothing but the scores, and it is left out of what is saved for inference.

    Args:
        width: D of the tokens.
        num_classes: K.
        num_stages: prune points.

    Source: after Cropr (CVPR 2025, arXiv 2412.00965): auxiliary heads on detached tokens teach what to keep and are
    dropped after training. **Differs**: linear heads, and their entropy as the target of the same score network, where
    Cropr scores by the attention of the head's queries.
    """

    def __init__(self, width: int, num_classes: int, num_stages: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, num_classes)) for _ in range(num_stages)
        )

    def forward(
        self, scores: Sequence[Scores], share_TK: Float[Tensor, "T K"], known_T: Tensor, lengths: Sequence[int]
    ) -> tuple[list[Float[Tensor, " T"]], Float[Tensor, ""]]:
        """What every token is worth by each stage's head, and the loss that teaches the heads.

        Args:
            scores: of every prune point, with the tokens that reached it.
            share_TK: share of each class in every token.
            known_T: whether a token has labels.
            lengths: tokens of each image.

        Returns:
            Worth per stage, from 0 to 1, -1 where a token did not come so far or has no labels; and cross entropy, a
            mean over an image's tokens, summed over images, meaned over stages.
        """
        image_T, worths = image_of(lengths, share_TK.device), []
        total = share_TK.new_zeros(())
        for head, stage in zip(self.heads, scores, strict=True):
            assert stage.x is not None
            log_RK = head(stage.x.float()).log_softmax(1)
            known_R = known_T.index_select(0, stage.rows).float()
            image_R = image_T.index_select(0, stage.rows)
            loss_R = -(log_RK * share_TK.index_select(0, stage.rows)).sum(1) * known_R
            number_B = share_TK.new_zeros(len(lengths)).index_add(0, image_R, known_R)
            total = (
                total + (share_TK.new_zeros(len(lengths)).index_add(0, image_R, loss_R) / number_B.clamp(min=1)).sum()
            )
            torn_R = -(log_RK.detach().exp() * log_RK.detach()).sum(1) / math.log(max(log_RK.shape[1], 2))
            worth_R = torch.where(known_R > 0, torn_R.clamp(0, 1), -1.0)
            worths.append(share_TK.new_full((len(share_TK),), -1.0).index_copy(0, stage.rows, worth_R))
        return worths, total / max(len(scores), 1)


def loss_worth(
    logits: Float[Tensor, "T K *P"],
    soft: Float[Tensor, "T K *P"],
    weight: Float[Tensor, "T *P"],
    lengths: Sequence[int],
) -> Float[Tensor, " T"]:
    """1 for a token that adds more to the cross entropy than the mean token of its image, 0 for others, -1 unlabelled.

    Args:
        logits: what the model says; only its value is used.
        soft: share of each class in every sample.
        weight: labelled pixels under each sample.
        lengths: tokens of each image.
    """
    log_TKS = logits.detach().float().flatten(2).log_softmax(1)
    loss_T = -((log_TKS * soft.flatten(2)).sum(1) * weight.flatten(1)).sum(1)
    known_T, image_T = weight.flatten(1).sum(1) > 0, image_of(lengths, loss_T.device)
    sum_B, number_B = (
        loss_T.new_zeros(len(lengths)).index_add(0, image_T, part) for part in (loss_T * known_T, known_T.float())
    )
    mean_T = (sum_B / number_B.clamp(min=1)).index_select(0, image_T)
    return torch.where(known_T, (loss_T > mean_T).float(), -1.0)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Take the teacher out of a model for as long as it is saved or loaded."""
    teacher = model._modules.pop(NAME, None)
    try:
        yield
    finally:
        if teacher is not None:
            model.add_module(NAME, teacher)


def save_teacher(model: nn.Module, folder: Path) -> None:
    """Write the teacher of a model beside it, where it has one, so that training can go on."""
    from safetensors.torch import save

    teacher = getattr(model, NAME, None)
    if teacher is not None:
        with atomic_write(folder / f"{NAME}.safetensors") as file:
            file.write(save({name: value.detach().cpu() for name, value in teacher.state_dict().items()}))


def load_teacher(model: nn.Module, folder: Path) -> None:
    """Read what `save_teacher` wrote."""
    from safetensors.torch import load_file

    teacher = getattr(model, NAME, None)
    if teacher is not None:
        teacher.load_state_dict(load_file(folder / f"{NAME}.safetensors"))
