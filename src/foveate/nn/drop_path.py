"""Stochastic depth: in training, a block's branch is left out for a random share of the images."""

import torch
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.nn.attention import Packing


class DropPath(nn.Module):
    """Leave a branch out for whole images, and scale it up for the others, so that its mean stays; nothing in eval.

    Args:
        rate: share of the images, from 0 to below 1.

    Raises:
        ConfigError: ``rate`` is outside that.

    Source: Huang et al., ECCV 2016, arXiv 1603.09382. What is drawn comes from torch's generator of the device.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ConfigError(f"drop_path={rate} is outside 0 up to below 1; 0.1 is usual")
        self.rate = float(rate)

    def forward(self, x_AD: Tensor, packing: Packing) -> Tensor:
        """Drop or scale the branch, image by image.

        Args:
            x_AD: what the branch adds to the tokens of the pack.
            packing: tokens per image.
        """
        if not self.training or self.rate == 0:
            return x_AD
        drawn_B = torch.rand(len(packing.lengths), device=x_AD.device) >= self.rate
        lengths = torch.tensor(packing.lengths, device=x_AD.device)
        factor_A = (drawn_B / (1 - self.rate)).repeat_interleave(lengths, output_size=len(x_AD))
        return x_AD * factor_A[:, None].to(x_AD.dtype)
