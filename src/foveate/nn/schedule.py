"""How many patches stay in which epoch, and by what: many at first, so that attention finds what it looks for."""

from dataclasses import dataclass

from foveate.errors import ConfigError
from foveate.geometry.image import Real


@dataclass(frozen=True)
class KeepSchedule:
    """``keep`` falls from ``start`` to ``stop`` by the same factor in each epoch, then stays.

    The memory of a training step is set by the start.

    Args:
        start: patches that stay at first.
        stop: patches that stay in the end, at most ``start``.
        epochs: when ``stop`` is reached.
        by_detail: share of them that are chosen for their detail at first, below 1; it falls to nothing evenly.

    Raises:
        ConfigError: numbers that do not fit each other.
    """

    start: int
    stop: int
    epochs: Real
    by_detail: Real = 0.0

    def __post_init__(self) -> None:
        if not self.start >= self.stop >= 1 or self.epochs < 0:
            raise ConfigError(
                f"keep from {self.start} to {self.stop} within {self.epochs} epochs: start must be at least stop, "
                "stop at least 1, and epochs not negative"
            )
        if not 0 <= self.by_detail < 1:
            raise ConfigError(f"by_detail={self.by_detail} is outside 0 to below 1: leave some patches to attention")

    def at(self, epoch: Real) -> int:
        """How many stay at an epoch; parts of epochs count."""
        if epoch >= self.epochs:
            return self.stop
        share = float(max(0, epoch) / self.epochs)
        return round(self.start * float((self.stop / self.start) ** share))

    def by_detail_at(self, epoch: Real) -> int:
        """How many of those that stay are chosen for their detail at an epoch; parts of epochs count."""
        if epoch >= self.epochs:
            return 0
        keep = self.at(epoch)
        return min(keep - 1, round(float(keep * self.by_detail * (1 - max(0, epoch) / self.epochs))))
