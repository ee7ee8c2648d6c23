"""Process CPU time of things that are to be compared, each in turn, so that a change of load meets all of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call, all threads of the process, garbage collected before."""
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turn(sides: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of every side in every turn, one call each; call every side once before to warm it up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, call in sides.items():
            taken[name].append(cpu_seconds(call))
    return taken


def speed_up(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Best of ``slow`` over best of ``fast``, with the least and the greatest ratio of one turn."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return min(slow) / min(fast), (min(ratios), max(ratios))
