"""ResNet for patches, with torchvision's parameter names, cut behind as many stages as wanted.

Legend: R patches, C channels, P side, F features.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Basic(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, in_chans: int, chans: int, stride: int, norm: Norm, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 3, stride, 1, bias=False)
        self.bn1 = norm(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, 1, 1, bias=False)
        self.bn2 = norm(chans)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, and add what came in."""
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return functional.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; the stride is in the middle one."""

    expansion = 4

    def __init__(self, in_chans: int, chans: int, stride: int, norm: Norm, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 1, bias=False)
        self.bn1 = norm(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, stride, 1, bias=False)
        self.bn2 = norm(chans)
        self.conv3 = nn.Conv2d(chans, 4 * chans, 1, bias=False)
        self.bn3 = norm(4 * chans)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, and add what came in."""
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = functional.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return functional.relu(out, inplace=True)


class ResNet(nn.Module):
    """Features of patches of any side, averaged over the patch.

    Args:
        depth: 18, 34 or 50.
        in_chans: C.
        stages: residual stages that stay, 1 to 4; the paper keeps 2 for small patches of digits, else 4.
        norm: makes the norm behind each convolution.

    Source: He et al., CVPR 2016; torchvision's variant and names, so that its weights load.
    """

    def __init__(self, depth: int, in_chans: int, stages: int, norm: Norm) -> None:
        super().__init__()
        block = Bottleneck if depth >= 50 else Basic
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        width = 64
        for stage, count in enumerate(DEPTHS[depth][:stages]):
            blocks: list[nn.Module] = []
            for place in range(count):
                chans, stride = 64 << stage, 2 if stage and not place else 1
                out = chans * block.expansion
                shortcut = None
                if stride > 1 or width != out:
                    shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), norm(out))
                blocks.append(block(width, chans, stride, norm, shortcut))
                width = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.width, self.stages = width, stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "R C P P"]) -> Float[Tensor, "R F"]:
        """Features of every patch."""
        x = functional.max_pool2d(self.bn1(self.conv1(x)), 3, 2, 1)
        x = functional.relu(x, inplace=True)  # as before the maximum, of a quarter of the numbers
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return torch.mean(x, dim=(2, 3))

    def parts(self) -> list[nn.Module]:
        """From the input to the output: convolution, norm, blocks."""
        layers = [list(self.get_submodule(f"layer{stage + 1}").children()) for stage in range(self.stages)]
        return [self.conv1, self.bn1, *(block for layer in layers for block in layer)]
