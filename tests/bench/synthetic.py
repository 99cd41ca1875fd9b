"""Results whose every ratio is known, for the tests of what is written about them."""

from __future__ import annotations

from collections.abc import Mapping

from explorer.bench.engines import SPARSE, Absence, Comparison, EngineTiming
from explorer.bench.records import Combination, Record
from explorer.bench.surroundings import Probe
from explorer.inference.timing import Benchmark

QUIET = Probe((1.0, 1.02), (1.01, 1.0))
BUSY = Probe((1.0, 1.0), (1.0, 1.25))


def comparison(
    combination: Combination,
    medians: Mapping[str, float],
    *,
    absences: tuple[Absence, ...] = (),
    probe: Probe = QUIET,
    versions: Mapping[str, str] | None = None,
    usable_cpus: int = 8,
    differences: Mapping[str, tuple[float, float]] | None = None,
    cpus: Mapping[str, float] | None = None,
) -> Comparison:
    """The medians, in milliseconds, as a comparison in which only torch and ONNX Runtime are dense; of `differences`, the accepted one and what was found."""
    dense = min(
        (ms for name, ms in medians.items() if name.startswith(("torch", "onnxruntime"))), default=0.0
    )
    c = combination
    timings = tuple(
        EngineTiming(
            name,
            c.sparsity,
            Benchmark(
                ms,
                ms / 100,
                ms * 0.9,
                40,
                c.threads,
                c.batch_size,
                "avx512" if name == SPARSE else "foreign",
            ),
            dense / ms,
            *(differences or {}).get(name, (None, None)),
            (cpus or {}).get(name),
        )
        for name, ms in medians.items()
    )
    return Comparison(timings, absences, dict(versions or {"torch": "2.0"}), probe, usable_cpus)


def record(
    combination: Combination,
    given: Comparison,
    *,
    date: str = "2026-01-02 10:00:00 UTC",
    run: str = "2026-01-02 09:00:00 UTC",
) -> Record:
    """A record that was made by the command of its run."""
    return Record(combination, "all layers", date, run, f"sparsity-explorer bench engines # {run}", given)


class Clock:
    """Stands for `time`, in a process whose work takes 1 ms a call and keeps so many CPUs busy."""

    def __init__(self, cpus: float) -> None:
        self.cpus, self.calls = cpus, 0

    def work(self) -> None:
        """One call."""
        self.calls += 1

    def perf_counter(self) -> float:
        """Seconds."""
        return self.calls * 1e-3

    def process_time(self) -> float:
        """CPU seconds."""
        return self.calls * 1e-3 * self.cpus
