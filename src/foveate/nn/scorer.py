"""Token importance: a small network that sees a token beside the mean of its image.

Legend: T tokens of a pack, D width, F features.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.errors import ConfigError
from foveate.nn.attention import Packing


class TokenScorer(nn.Module):
    """One score per token from half of its own features and half of its image's mean features.

    Args:
        width: D of the tokens.
        features: F; even. 64 costs 1/19 of the published scorer's operations.
        published: the four linear maps (D, D/2, D/4, 1) and the final log-sigmoid of the released code instead.

    Raises:
        ConfigError: ``features`` is odd or below 2, or ``width`` is no multiple of 4 where it has to be.

    Cost: 2 T D F FLOPs; published: 2.8 T D^2.
    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, score network of soft top-k token pruning (after DynamicViT).
    **Differs**: narrow, and without the log-sigmoid, which saturates at 0 so that confident tokens cannot be ranked.
    """

    def __init__(self, width: int, features: int = 64, *, published: bool = False) -> None:
        super().__init__()
        if published and (width % 4 or width < 4):
            raise ConfigError(f"width={width} of a published scorer must be a multiple of 4; use the default scorer")
        if not published and (features < 2 or features % 2):
            raise ConfigError(
                f"features={features} must be even and at least 2; one half sees the token, one its image"
            )
        hidden = width if published else features
        ends = [hidden, width // 2, width // 4, 1] if published else [hidden, 1]
        self.published = published
        self.norm = nn.LayerNorm(width, eps=1e-5 if published else 1e-6)
        self.embed = nn.Linear(width, hidden)
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(ends))
        for layer in (self.embed, *self.head):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x_TD: Float[Tensor, "T D"], packing: Packing) -> Float[Tensor, " T"]:
        """Score every token of a pack; an image's scores do not depend on its company.

        Args:
            x_TD: tokens, prefix tokens left out.
            packing: tokens per image.
        """
        own_TF, shared_TF = functional.gelu(self.embed(self.norm(x_TD))).chunk(2, dim=1)
        means = [part.mean(0, keepdim=True).expand(len(part), -1) for part in shared_TF.split(list(packing.lengths))]
        score = torch.cat([own_TF, torch.cat(means)], dim=1)
        device = "cpu" if score.is_meta else score.device.type  # a rehearsal without memory knows no autocast
        with torch.autocast(device, enabled=False):  # equal numbers of half precision have no order
            score = score.to(self.embed.weight.dtype)
            for index, layer in enumerate(self.head):
                score = layer(functional.gelu(score) if index or not self.published else score)
            return functional.logsigmoid(score[:, 0]) if self.published else score[:, 0]
