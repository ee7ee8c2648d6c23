"""A network for tests that counts the rows it sees."""

from torch import Tensor, nn


class Counting(nn.Module):
    """``net``, and how many rows it has ``seen``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x: Tensor) -> Tensor:
        """What ``net`` says of the rows."""
        self.seen += len(x)
        out: Tensor = self.net(x)
        return out
