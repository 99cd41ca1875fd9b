"""What the page measures while nobody asks for anything: whether the prediction can be trusted, and more levels where curves bend."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from explorer.widgets.equalizer import Equalizer
from explorer.widgets.metrics import Metrics
from explorer.widgets.run_monitor import RunMonitor
from explorer.widgets.sensitivity_view import SensitivityView
from explorer.widgets.state import ExplorerState
from tests.widgets.fake_study import FakeStudy


def badge(state: ExplorerState) -> dict[str, str] | None:
    tiles = {tile["key"]: tile for tile in Metrics(state).view["tiles"]}
    return tiles["accuracy"].get("badge")


def until(true: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def slow() -> Iterator[ExplorerState]:
    """A page whose background work takes as long as the test wants."""
    study = FakeStudy()
    gate = threading.Event()
    real = study.trust

    def held(distribution: Any, *, n_images: int, stop: threading.Event) -> Any:
        while not gate.is_set() and not stop.is_set():
            time.sleep(0.002)
        return real(distribution, n_images=n_images, stop=stop)

    study.trust = held
    with ThreadPoolExecutor(1) as executor:
        state = ExplorerState(study, executor=executor, interval=0.0)
        state.gate = gate  # for the test
        state.measure()
        until(lambda: state.background == "checking the prediction")
        yield state
        gate.set()


def test_after_solving_the_prediction_is_checked_and_the_curves_refined(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.measure(200)
    kinds = [call[0] for call in study.calls]
    assert kinds[0] == "solve"
    assert set(kinds[1:]) == {"pareto", "trust", "refine"}
    refined, in_view = [call for call in study.calls if call[0] == "refine"]
    assert refined[1:3] == (state.distribution, None)
    assert in_view[1:3] == (None, {state.selected})
    assert all(call[2] == 200 for call in study.calls if call[0] == "trust")
    assert state.trust.measured == pytest.approx(1.3 * state.trust.predicted)
    assert len(state.curves.of("kl", "fc")) == len(study.levels) + 2
    assert state.background == ""


def test_a_chosen_layer_gets_more_levels_once(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    n = len(study.calls)
    for name in ("block2.conv1", "fc", "block2.conv1"):
        state.select(name)
    refined = [call[2] for call in study.calls[n:] if call[0] == "refine"]
    assert refined == [{"block2.conv1"}, {"fc"}]
    assert 0.85 in dict(state.curves.of("kl", "fc"))


def test_the_badge_says_what_came_out(state: ExplorerState, study: FakeStudy) -> None:
    assert badge(state) is None
    state.measure()
    found = badge(state)
    assert (found["text"], found["tone"]) == ("checked: agrees", "good")
    assert f"{state.trust.measured:.2g} ± 0.01" in found["help"]
    study.together = 5.0
    state.edit({"fc": 0.31}, final=True)
    assert (badge(state)["text"], badge(state)["tone"]) == ("checked: worse together", "warn")


def test_a_bar_that_is_still_moving_has_no_badge(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    n = len(study.calls)
    state.edit({"fc": 0.4}, final=False)
    assert state.trust is None
    assert len(study.calls) == n
    state.edit({}, final=True)
    assert state.trust is not None
    assert [call[0] for call in study.calls[n:]] == ["trust"]


def test_for_one_shot_pruning_a_search_offers_what_it_finds(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    solved = state.distribution
    assert Equalizer(state).view["search"] == {
        "able": True,
        "ready": True,
        "on": False,
        "text": "",
        "better": False,
    }
    assert not [call for call in study.calls if call[0] == "search"]
    state.choose_one_shot(True)
    [search] = [call for call in study.calls if call[0] == "search"]
    assert search[1] == solved
    assert search[2] == pytest.approx(state.prediction.latency_ms)
    assert search[3] == {"locked": {}, "groups": ()}
    offer = Equalizer(state).view["search"]
    assert offer["better"]
    assert "4 networks tried, the best diverges 10% less" in offer["text"]
    assert any("Measured 4 distributions" in line for line in state.log)

    better = state.search.distribution
    state.take_better()
    assert state.distribution == better != solved
    assert state.origin == "solved"
    assert Equalizer(state).view["search"]["better"] is False
    assert [call[0] for call in study.calls].count("search") == 1, "it is not searched again"
    assert study.calls[-1][0] in ("trust", "refine")
    assert state.trust is not None
    state.undo()
    assert state.distribution == solved


def test_there_is_nothing_to_take_before_the_search_has_found_it(state: ExplorerState) -> None:
    assert Equalizer(state).view["search"]["ready"] is False
    state.take_better()
    assert "has not found a better" in state.error
    state.choose_one_shot(True)
    state.measure()
    assert state.search is not None
    state.edit({"fc": 0.4}, final=True)
    assert state.search is None, "it was of another distribution"
    view = Equalizer(state).view["search"]
    assert view["text"] == "The search begins at what is solved: choose a target."
    assert not view["better"]


def test_a_search_ends_when_it_is_no_longer_wanted(study: FakeStudy) -> None:
    study.pause_s = 0.02
    with ThreadPoolExecutor(1) as executor:
        state = ExplorerState(study, executor=executor, interval=0.0)
        state.choose_one_shot(True)
        state.measure()
        until(lambda: state.search is not None)
        assert state.background == "looking for a better distribution"
        state.choose_one_shot(False)
        until(lambda: not state._idle_jobs.running)
        assert state.search is None
        assert state.background == ""
        assert [call[0] for call in study.calls].count("search") == 1
        state.choose_one_shot(True)
        until(lambda: state.search is not None and state.search.n_measured == 4)
        assert [call[0] for call in study.calls].count("search") == 2


def test_a_search_gives_way_to_what_is_asked_for(study: FakeStudy) -> None:
    gate = threading.Event()
    real = study.search

    def held(**options: Any) -> Iterator[Any]:
        for number, step in enumerate(real(**options)):
            if number == 1:
                gate.wait(10)
            yield step

    study.search = held
    with ThreadPoolExecutor(1) as executor:
        state = ExplorerState(study, executor=executor, interval=0.0)
        state.choose_one_shot(True)
        state.measure()
        until(lambda: state.search is not None)
        first = state.distribution
        assert Equalizer(state).view["search"] == {
            "able": True,
            "ready": True,
            "on": True,
            "text": "Looking for less harm in the same time: 1 of 4 networks tried, none clearly better than this one.",
            "better": False,
        }
        state.edit({"fc": 0.4}, final=True)
        assert state.search is None
        gate.set()
        until(lambda: state.trust is not None)
        until(lambda: not state._idle_jobs.running)
        assert state.search is None
        assert state.distribution != first


def test_undo_asks_again(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    solved = state.distribution
    state.edit({"fc": 0.4}, final=True)
    state.undo()
    assert state.distribution == solved
    assert study.calls[-1][:2] == ("trust", solved)
    assert state.trust is not None


def test_what_is_asked_for_goes_first(slow: ExplorerState) -> None:
    assert badge(slow) == {"tone": "", "text": "checking …", "help": ""}
    slow.solve(2.0)
    assert slow.job.kind == "solve"
    until(lambda: not slow.job.busy)
    assert slow.target == 2.0
    assert slow.error == ""
    slow.gate.set()
    until(lambda: slow.trust is not None)


def test_a_changed_distribution_is_checked_in_place_of_the_old_one(slow: ExplorerState) -> None:
    slow.edit({"fc": 0.2}, final=True)
    slow.edit({"fc": 0.3}, final=True)
    slow.gate.set()
    until(lambda: slow.trust is not None)
    checked = [call[1] for call in slow.study.calls if call[0] == "trust"]
    assert checked[-1] == slow.distribution
    assert checked[-1]["fc"] == 0.3


def test_another_study_does_not_get_the_old_ones_badge(slow: ExplorerState) -> None:
    slow.adopt(FakeStudy())
    slow.gate.set()
    until(lambda: not slow._idle_jobs.running and slow.background == "")
    assert slow.trust is None


def test_a_failure_in_the_background_interrupts_nobody(
    state: ExplorerState, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(study, "trust", broken)
    state.measure()
    assert state.error == ""
    assert state.background == ""
    assert any("no memory" in line for line in state.log)
    assert sum("failed: no memory" in line for line in state.log) == 1, "and is not tried for ever"


def test_a_replay_shows_where_its_losses_come_from_and_cannot_be_pruned(study: FakeStudy) -> None:
    study.data = None
    study.provenance = "Losses of ResNet-50: somebody. Latencies: this machine."
    state = ExplorerState(study)
    assert SensitivityView(state).view["provenance"] == study.provenance
    monitor = RunMonitor(state).view
    assert not monitor["startable"]
    assert "cannot be trained here" in monitor["why"]
    assert "cannot be trained here" in monitor["hint"]
