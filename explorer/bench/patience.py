"""On a machine that is shared with others: a time counts when a probe says that nothing else ran before and after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from explorer.bench.surroundings import BUSY, Probe, product

__all__ = ["Patience"]

_SLICES = 3
_SLICE_S, _WARM_S = 0.002, 0.020
_PAUSE_S = 0.05


class Patience:
    """Takes measurements in quiet moments, as long as patience lasts; after that, whenever they come.

    A moment is quiet when a fixed product of two matrices takes at most `BUSY` longer than at its fastest.

    Parameters
    ----------
    seconds : float
        How long may be lost with waiting, and with measurements that are made again.
    threads : int
        That compute the product at the same time, each for itself.
    fastest_ms : float
        What it took at its fastest elsewhere on this machine, with as many threads.
    probe : callable, optional
        The milliseconds of the product now.
    clock, sleep : callable
        As in `time`.
    """

    def __init__(
        self,
        seconds: float,
        threads: int = 1,
        fastest_ms: float = float("inf"),
        probe: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._left_s, self._fastest_ms = seconds, fastest_ms
        self._probe, self._clock, self._sleep = probe or _short_probe(threads), clock, sleep
        self._before: list[float] = []
        self._after: list[float] = []

    def take(self, measure: Callable[[], float]) -> float:
        """What `measure` returns when it was quiet before and after it."""
        while True:
            before = self._wait()
            began = self._clock()
            value = measure()
            after = self._look()
            if self._left_s <= 0 or (self._is_quiet(before) and self._is_quiet(after)):
                self._before.append(before)
                self._after.append(after)
                return value
            self._left_s -= self._clock() - began

    @property
    def kept(self) -> Probe:
        """What the product took before and after each time that counted."""
        return Probe(tuple(self._before), tuple(self._after))

    def _wait(self) -> float:
        """What the product takes once it is quiet, or patience is over."""
        now = self._look()
        while self._left_s > 0 and not self._is_quiet(now):
            began = self._clock()
            self._sleep(_PAUSE_S)
            now = self._look()
            self._left_s -= self._clock() - began
        return now

    def _look(self) -> float:
        now = self._probe()
        self._fastest_ms = min(self._fastest_ms, now)
        return now

    def _is_quiet(self, probe_ms: float) -> bool:
        return probe_ms <= self._fastest_ms * (1 + BUSY)


def _short_probe(threads: int) -> Callable[[], float]:
    slice_ms = product(threads)

    def now() -> float:
        # A core that slept is slow at first; engines, too, are timed after 20 ms.
        slice_ms(_WARM_S)
        return statistics.median(slice_ms(_SLICE_S) for _ in range(_SLICES))

    return now
