"""CPU time is that of the turns, nothing else, on a clock that the tests make up."""

from __future__ import annotations

import pytest

from explorer.bench import usage
from explorer.inference import timing
from explorer.inference.timing import compare_latency
from tests.bench.synthetic import Clock


def test_a_contestant_of_this_process_is_timed_as_before_and_its_cpu_time_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(cpus=1.75)
    for module in (usage, timing):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(timing, "wait_until_idle", lambda: None)
    metered = usage.Metered(clock.work)
    assert metered.usage.cpus is None
    timed = compare_latency({"one": metered}, repeats=6, slice_s=0.005, warm_s=0.02)["one"]
    assert (timed.latency_ms, timed.repeats, timed.isa) == (pytest.approx(1.0), 6, "torch")
    assert metered.usage.cpus == pytest.approx(1.75)
    assert metered.usage._wall_s == pytest.approx(6 * 0.005)  # of six turns, without what comes before them


def test_the_instruction_set_and_precision_of_an_engine_stay_those_it_names() -> None:
    class Engine:
        isa, precision = "avx512", "fp16"

        def __call__(self) -> int:
            return 7

    metered = usage.Metered(Engine())
    assert (metered.isa, metered.precision, metered()) == ("avx512", "fp16", 7)


def test_usage_is_the_mean_over_time_and_not_over_turns() -> None:
    one = usage.Usage()
    one.add(1.0, 1.0)
    one.add(3.0, 6.0)
    assert one.cpus == pytest.approx(7 / 4)
