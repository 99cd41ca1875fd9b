"""Whether contestants keep to the threads that they were given: the CPU time of their process, beside the clock on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable

from explorer.inference.timing import warm_up

__all__ = ["TOO_MANY", "Metered", "Usage"]

TOO_MANY = 0.3
"""So many CPUs more than threads are worth a remark. Systems count the CPU time of other threads that still run up to their last tick alone, which in a turn of
20 ms may be a tenth of it; over all turns that comes to little."""


class Usage:
    """Seconds of a contestant's turns on the clock, and of CPU time, added up."""

    def __init__(self) -> None:
        self._wall_s = self._cpu_s = 0.0

    def add(self, wall_s: float, cpu_s: float) -> None:
        """Count one more turn."""
        self._wall_s += wall_s
        self._cpu_s += cpu_s

    @property
    def cpus(self) -> float | None:
        """How many CPUs were kept busy on average; None before the first turn."""
        return self._cpu_s / self._wall_s if self._wall_s > 0 else None


class Metered:
    """A contestant of this process, for `compare_latency`, that keeps account of the CPU time of its turns.

    Nothing else may run in this process meanwhile, such as the threads of the contestant before it: only turns with a warm-up, before which
    `compare_latency` waits for those, are counted.

    Parameters
    ----------
    call : callable
        One inference.

    Attributes
    ----------
    usage : Usage
    isa, precision : str
        Those of `call`.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.usage = Usage()
        self.isa = str(getattr(call, "isa", "torch"))
        self.precision = str(getattr(call, "precision", "fp32"))

    def __call__(self) -> object:
        return self.call()

    def seconds(self, calls: int, warm_s: float = 0.0) -> float:
        """Return what `calls` inferences after one another took, after a warm-up of at least one."""
        call = self.call
        warm_up(call, warm_s)
        used, start = time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        wall_s = time.perf_counter() - start
        if warm_s > 0:
            self.usage.add(wall_s, time.process_time() - used)
        return wall_s
