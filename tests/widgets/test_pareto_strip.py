"""The frontier on the page: worked out after measuring, anew for other locks, adopted by number."""

from __future__ import annotations

import numpy as np
import pytest

from explorer.widgets.pareto_strip import ParetoStrip
from explorer.widgets.state import ExplorerState
from tests.widgets.fake_study import FakeStudy


def test_it_is_worked_out_when_there_are_curves(state: ExplorerState) -> None:
    strip = ParetoStrip(state)
    assert strip.points == []
    assert strip.view == {"here": None, "harm": "KL to the dense outputs", "busy": False, "measured": False}
    state.measure()
    speeds, harms = np.array(strip.points).T
    assert len(speeds) == 25
    assert (np.diff(speeds) >= 0).all()
    assert (np.diff(harms) >= 0).all()
    assert strip.view["measured"]
    assert strip.view["here"] == [state.prediction.speedup, state.prediction.kl]
    state.edit({"fc": 0.97}, final=True)
    assert strip.view["here"] == [state.prediction.speedup, state.prediction.kl]


def test_a_point_is_adopted_and_can_be_undone(state: ExplorerState, study: FakeStudy) -> None:
    strip = ParetoStrip(state)
    state.measure()
    before = state.distribution
    strip._on_message(strip, {"do": "adopt", "index": 20}, [])
    assert state.distribution == state.frontier[20].distribution != before
    assert state.origin == "solved"
    assert state.target == pytest.approx(strip.points[20][0], abs=0.01)
    assert study.predict(state.ghost).latency_ms == pytest.approx(state.prediction.latency_ms, rel=0.1)
    assert state.prediction.speedup == pytest.approx(strip.points[20][0], rel=1e-3)
    state.undo()
    assert state.distribution == before


@pytest.mark.parametrize("index", [-1, 25, "x", None])
def test_a_number_that_there_is_not_is_refused(state: ExplorerState, index: object) -> None:
    strip = ParetoStrip(state)
    state.measure()
    before = state.distribution
    strip._on_message(strip, {"do": "adopt", "index": index}, [])
    assert state.error
    assert state.distribution == before


def test_locks_make_another_frontier(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    state.edit({"block1.conv1": 0.25}, final=True)
    n = sum(call[0] == "pareto" for call in study.calls)
    state.toggle_lock(["block1.conv1"])
    drawn = [call for call in study.calls if call[0] == "pareto"]
    assert len(drawn) == n + 1
    assert drawn[-1][1] == {"block1.conv1": 0.25}
    assert {one.distribution["block1.conv1"] for one in state.frontier} == {0.25}
    state.edit({"fc": 0.5}, final=True)
    assert sum(call[0] == "pareto" for call in study.calls) == n + 1, "the same locks, the same frontier"


def test_another_study_begins_without_one(state: ExplorerState) -> None:
    state.measure()
    state.adopt(FakeStudy())
    assert state.frontier == ()


def test_a_network_with_published_losses_has_one_too(state: ExplorerState, study: FakeStudy) -> None:
    study.data = None
    state.measure()
    assert len(state.frontier) == 25
    assert state.trust is None
