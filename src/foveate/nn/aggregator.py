"""From the patches of a bag to one vector per task, and where the patches lie.

Legend: K patches of one bag, D width, Q queries, N spatial axes.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError
from foveate.nn.query_attention import QueryAttention, Tally

PLACES = ("none", "sine", "learned")
_OCTAVES = 8


class Aggregator(nn.Module):
    """Learned queries read a bag: attention, residual and norm, two linear maps, residual and norm.

    Args:
        attention: the module that also ranks the patches.
        hidden: width between the two linear maps; default four times D.
        dropout: behind the attention and inside the two maps, in training.

    Source: iterative patch selection (arXiv 2210.13007), the transformer block in post-norm form.
    """

    def __init__(self, attention: QueryAttention, hidden: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        width = attention.query.shape[1]
        hidden = 4 * width if hidden is None else hidden
        self.attention = attention
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Dropout(dropout))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_KD: Float[Tensor, "*B K D"], whole: Tally | None = None) -> Float[Tensor, "*B Q D"]:
        """One vector per query; a bag of nothing gives what the queries say by themselves.

        Args:
            x_KD: vectors of a bag, or of bags that hold equally many.
            whole: tally of the entire bag, see ``QueryAttention.pool``.
        """
        x_QD = self.norm1(self.attention.query + self.dropout(self.attention.pool(x_KD, whole)))
        out: Tensor = self.norm2(x_QD + self.mlp(x_QD))
        return out


class PlaceCode(nn.Module):
    """A code of where a patch lies in its image, for any grid and any size of image.

    Args:
        kind: ``sine`` (fixed) or ``learned`` (linear in the same waves, zero at first, kept in the state dict).
        width: D.
        num_dims: N.

    **Differs** from the released code, which numbers the patches of one fixed grid and forgets the code in its
    checkpoints: place is the centre of the box over the size of the image.
    """

    def __init__(self, kind: str, width: int, num_dims: int = 2) -> None:
        super().__init__()
        if kind not in PLACES[1:]:
            raise ConfigError(f"position={kind!r} is none of {', '.join(PLACES)}; choose one")
        self.width, self.num_dims = width, num_dims
        self.linear = nn.Linear(2 * _OCTAVES * num_dims, width) if kind == "learned" else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, centre_KN: Float[Tensor, "K N"]) -> Float[Tensor, "K D"]:
        """One code per patch.

        Args:
            centre_KN: centre of each patch relative to its image, 0 to 1.
        """
        if self.linear is not None:
            code: Tensor = self.linear(_waves(centre_KN, _OCTAVES).to(self.linear.weight))
            return code
        waves = _waves(centre_KN, self.width // (2 * self.num_dims))
        return functional.pad(waves, (0, self.width - waves.shape[1]))


def _waves(centre_KN: Tensor, per_axis: int) -> Tensor:
    """Sine and cosine of the centres at periods from twice the image to 1 / 64 of it."""
    octave = torch.linspace(0, _OCTAVES - 1, max(per_axis, 1), device=centre_KN.device)[:per_axis]
    phase_KF = (centre_KN[:, :, None] * math.pi * 2**octave).flatten(1)
    return torch.cat([phase_KF.sin(), phase_KF.cos()], 1)
