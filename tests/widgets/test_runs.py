from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explorer.memory import resident_bytes
from explorer.widgets.runs import (
    MAX_MOMENTS,
    MAX_STEPS,
    MAX_UPDATES,
    RunRecord,
    RunRecorder,
    Thinned,
    renewed,
)
from tests.widgets.fake_study import EvalEvent, FakeStudy, LatencyEvent, MaskEvent, StepEvent


def recorder() -> RunRecorder:
    return RunRecorder(RunRecord(1, {"a": 0.9}, 0.9, 6))


def step(i: int, total: int, phase: str = "prune") -> StepEvent:
    return StepEvent(i, total, phase, 0.5, 0.1, 0.9 * i / total, 1.0)


def test_a_whole_run_is_gathered_into_one_record() -> None:
    study = FakeStudy()
    recorded = recorder()
    for event in study.prune(study.uniform(0.9), epochs=2):
        recorded.add(event)
    record = recorded.record
    assert record.status == "done"
    assert record.step == record.total_steps == 40
    assert record.dense_accuracy == 0.931
    assert record.evaluations[0] == (0, 0.931)
    assert record.speedup is not None and record.speedup > 2
    assert [name for name, _, _ in record.phases] == ["stabilise", "prune", "fine-tune"]


def test_long_runs_are_thinned_but_keep_their_last_step() -> None:
    recorded = recorder()
    for i in range(1, 10_001):
        recorded.add(step(i, 10_000))
    steps = recorded.record.steps
    assert len(steps) <= 2 * MAX_STEPS
    assert steps[-1][0] == 10_000
    assert recorded.record.step == 10_000


def test_records_do_not_change_when_the_run_goes_on() -> None:
    recorded = recorder()
    early = recorded.add(step(1, 10))
    recorded.add(step(2, 10))
    assert early.step == 1
    assert len(early.steps) == 1


def test_speedup_is_dense_time_over_the_latest_time() -> None:
    recorded = recorder()
    recorded.add(EvalEvent(0, 0.9, 0.1, 0.0))
    recorded.add(LatencyEvent(0, 2.0, 0.1, 2.0, 1.0))
    record: Any = recorded.add(LatencyEvent(10, 0.5, 0.1, 2.0, 4.0))
    assert record.speedup == 4.0
    assert record.latency == (0.5, 0.1)


@pytest.mark.parametrize("limit", [2, 3, 24])
@pytest.mark.parametrize("n", [1, 2, 24, 25, 100, 1001])
def test_thinning_keeps_the_first_the_last_and_even_steps_between(limit: int, n: int) -> None:
    thinned: Thinned[int] = Thinned(limit)
    for value in range(n):
        kept = thinned.add(value)
        assert len(kept) <= limit
        assert (kept[0], kept[-1]) == (0, value)
        gaps = np.diff(kept[:-1])
        assert (gaps == gaps[0]).all() if len(gaps) else True
    assert n > limit or kept == tuple(range(n))
    if n > 2 * limit:
        assert len(kept) > limit / 2, "and not fewer than need be"


def test_a_record_knows_each_layers_sparsity_the_stored_size_and_the_masks() -> None:
    study = FakeStudy()
    distribution = study.uniform(0.9)
    recorded = RunRecorder(RunRecord(1, distribution, 0.9, 2), stored_bytes=study.stored_bytes)
    told = []
    for event in study.prune(distribution, epochs=2):
        recorded.add(event)
        if isinstance(event, MaskEvent):
            told.append(event)
    record = recorded.record
    assert [step for step, _ in record.layers] == [step for step, _ in record.stored]
    assert record.layers[0] == (0, (0.0,) * 10)
    for event in told:
        [sparsities] = [values for step, values in record.layers if step == event.step]
        zeros = [event.zeros[name] / event.masks[name].size for name in distribution]
        assert sparsities == pytest.approx(zeros)
        assert (event.step, study.stored_bytes(event.zeros)) in record.stored
    last = record.moments[-1]
    assert last.step == 40
    for name, picture in last.pictures.items():
        assert picture.n_weights - picture.n_alive == told[-1].zeros[name]


def test_a_long_run_of_many_updates_keeps_bounded_histories() -> None:
    recorded = RunRecorder(
        RunRecord(1, {"a": 0.9, "left out": 0.0}, 0.9, 6), stored_bytes=lambda zeros: zeros["a"]
    )
    for i in range(1000):
        mask = np.arange(1000).reshape(20, 50) >= i
        recorded.add(MaskEvent(i, {"a": i}, {"a": mask}))
    record = recorded.record
    assert len(record.layers) <= MAX_UPDATES
    assert len(record.stored) <= MAX_UPDATES
    assert MAX_MOMENTS / 2 < len(record.moments) <= MAX_MOMENTS
    for step, sparsities in record.layers:
        assert sparsities == pytest.approx((step / 1000, 0.0))
    assert all(step == size for step, size in record.stored)
    assert record.moments[-1].step == 999


def test_a_record_tells_time_and_memory() -> None:
    now = iter([100.0, 100.5, 103.0])
    recorded = RunRecorder(RunRecord(1, {"a": 0.9}, 0.9, 6), clock=lambda: next(now))
    assert recorded.add(step(1, 10)).seconds == 0.5
    record = recorded.add(step(2, 10))
    assert record.seconds == 3.0
    if resident_bytes() is None:
        pytest.skip("this system does not tell")
    assert record.memory is not None
    # numpy alone is more than that.
    assert record.memory[0] > 20e6


def test_memory_that_is_held_is_counted() -> None:
    before = resident_bytes()
    if before is None or not before[1]:
        pytest.skip("this system tells only the most there ever was")
    held = np.ones(100_000_000 // 8)
    after = resident_bytes()
    assert after is not None
    assert 50e6 < after[0] - before[0] < 150e6
    assert held.sum() == len(held)


def test_earlier_runs_lose_their_pictures_and_nothing_else() -> None:
    study = FakeStudy()
    runs: tuple[RunRecord, ...] = ()
    for number in (1, 2):
        recorded = RunRecorder(RunRecord(number, study.uniform(0.9), 0.9, 1))
        for event in study.prune(study.uniform(0.9), epochs=1):
            runs = renewed(runs, recorded.add(event))
    first, second = runs
    assert (first.number, second.number) == (1, 2)
    assert first.moments == ()
    assert len(second.moments) > 2
    assert first.layers == second.layers
    assert first.result is not None
