"""How many patches stay in which epoch: many at first, so that attention finds what it looks for."""

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

    Raises:
        ConfigError: numbers that do not fit each other.
    """

    start: int
    stop: int
    epochs: Real

    def __post_init__(self) -> None:
        if not self.start >= self.stop >= 1 or self.epochs < 0:
            raise ConfigError(
                f"keep from {self.start} to {self.stop} within {self.epochs} epochs: start must be at least stop, "
                "stop at least 1, and epochs not negative"
            )

    def at(self, epoch: Real) -> int:
        """How many stay at an epoch; parts of epochs count."""
        if epoch >= self.epochs:
            return self.stop
        share = float(max(0, epoch) / self.epochs)
        return round(self.start * float((self.stop / self.start) ** share))
