"""Settings that keep within an amount of memory."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from foveate.errors import BudgetError


@runtime_checkable
class Cost(Protocol):
    """A plan of anything."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once, program not counted."""
        ...


C = TypeVar("C", bound=Cost)


@dataclass(frozen=True)
class Settings:
    """What a budget may change.

    Args:
        max_leaves: most leaves of an image.
        batch_size: images at once.
        checkpoint: keep only the inputs of the blocks while training.
    """

    max_leaves: int
    batch_size: int = 1
    checkpoint: bool = False

    def cheaper(self, training: bool) -> "Settings | None":
        """The next settings that need less memory: what costs time first, what costs quality last."""
        if training and not self.checkpoint:
            return replace(self, checkpoint=True)
        if self.batch_size > 1:
            return replace(self, batch_size=self.batch_size // 2)
        return replace(self, max_leaves=self.max_leaves // 2) if self.max_leaves > 1 else None

    def changes(self, asked: "Settings", budget: int | None) -> list[str]:
        """A line on what was changed for a budget; none where nothing was."""
        now = [
            f"{name}={getattr(self, name)} instead of {getattr(asked, name)}"
            for name in ("max_leaves", "batch_size", "checkpoint")
            if getattr(self, name) != getattr(asked, name)
        ]
        return [f"  chosen to stay within {format_bytes(budget)}: {', '.join(now)}"] if budget and now else []


def settings_within(
    budget: int | None, asked: Settings, cost: Callable[[Settings], C], *, training: bool = False
) -> tuple[Settings, C]:
    """The first settings, from those asked for on, whose plan keeps a budget, and that plan.

    Args:
        budget: bytes of the whole process, program and libraries (what this process takes now) included; None: any.
        asked: where to begin.
        cost: plans settings.
        training: checkpointing may be turned on.

    Raises:
        BudgetError: not even the cheapest settings keep it.
    """
    program = resident_bytes()
    settings, found = asked, cost(asked)
    while budget is not None and program + found.peak_bytes > budget:
        less = settings.cheaper(training)
        if less is None:
            raise BudgetError(
                f"budget {format_bytes(budget)} is below the {format_bytes(program + found.peak_bytes)} that one leaf "
                f"needs (program {format_bytes(program)} + {format_bytes(found.peak_bytes)}); raise it, or take a "
                "smaller model or image"
            )
        settings, found = less, cost(less)
    return settings, found


def resident_bytes() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found.group(1)) if found else 0


def format_bytes(size: int) -> str:
    """Bytes with a unit of 1024: ``"1.5 GiB"``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
