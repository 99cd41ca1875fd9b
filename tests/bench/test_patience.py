"""Waiting for quiet moments, on a clock and a machine that the tests make up."""

from __future__ import annotations

from itertools import pairwise

import pytest

from explorer.bench.patience import Patience


class Machine:
    """Quiet and busy spells, in seconds from 0; the probe takes 10 ms and says 1.0 when it is quiet, a measurement takes 0.2 s and returns when it began."""

    def __init__(self, busy: list[tuple[float, float]]) -> None:
        self.busy, self.now, self.measured = busy, 0.0, 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def probe(self) -> float:
        self.now += 0.01
        return 1.5 if any(begin <= self.now < end for begin, end in self.busy) else 1.0

    def measure(self) -> float:
        self.measured += 1
        began = self.now
        self.now += 0.2
        return began

    def patience(self, seconds: float) -> Patience:
        return Patience(seconds, 1, 1.0, self.probe, self.clock, self.sleep)


def test_on_a_quiet_machine_nothing_is_measured_twice() -> None:
    machine = Machine([])
    patience = machine.patience(5)
    assert [patience.take(machine.measure) for _ in range(3)] == pytest.approx([0.01, 0.23, 0.45])
    assert patience.kept.before_ms == patience.kept.after_ms == (1.0, 1.0, 1.0)


def test_a_busy_spell_is_waited_for_and_what_it_touched_is_measured_again() -> None:
    machine = Machine([(0.0, 1.0), (1.15, 1.5)])
    patience = machine.patience(5)
    began = patience.take(machine.measure)
    assert began >= 1.5, "neither in the first spell, nor where the second one began meanwhile"
    assert machine.measured == 2
    assert patience.kept.slowest_ms == 1.0


def test_when_patience_is_over_each_time_counts_as_it_comes() -> None:
    machine = Machine([(0.5, float("inf"))])
    patience = machine.patience(2)
    began = [patience.take(machine.measure) for _ in range(5)]
    assert machine.measured == 6, "one that ended in the busy spell was given up"
    assert began[2] > 2
    assert [later - earlier for earlier, later in pairwise(began[2:])] == pytest.approx([0.22, 0.22])
    assert patience.kept.before_ms == (1.0, 1.0, 1.5, 1.5, 1.5)


def test_a_probe_that_has_been_faster_elsewhere_is_the_measure() -> None:
    machine = Machine([])
    patience = Patience(1, 1, 0.8, machine.probe, machine.clock, machine.sleep)
    assert patience.take(machine.measure) > 1, "1.0 is a quarter more than 0.8: busy all the time"
    assert patience.kept.slowest_ms == 1.0


@pytest.mark.parametrize("threads", [1, 2])
def test_without_other_means_a_real_product_is_timed(threads: int) -> None:
    patience = Patience(0.5, threads)
    assert patience.take(lambda: 3.0) == 3.0
    assert 0 < patience.kept.fastest_ms < 1000
