from __future__ import annotations

from typing import Any

from explorer.widgets.runs import MAX_STEPS, RunRecord, RunRecorder
from tests.widgets.fake_study import EvalEvent, FakeStudy, LatencyEvent, StepEvent


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
