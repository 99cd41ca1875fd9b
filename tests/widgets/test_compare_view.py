"""Runs side by side: what is kept of a session, how evaluations and latencies are paired, what is read from files."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import explorer
from explorer.errors import FormatError
from explorer.widgets import ExplorerState
from explorer.widgets.compare_view import CompareView, ResultsView
from explorer.widgets.contestants import of_results, of_run, trajectory
from explorer.widgets.result_panel import ResultPanel
from explorer.widgets.runs import MAX_RUNS, RunRecord
from tests.widgets.fake_study import FakeStudy


def press(widget: CompareView, do: str, **said: Any) -> None:
    widget._on_message(widget, {"do": do, **said}, [])


@pytest.fixture
def two_runs(state: ExplorerState) -> ExplorerState:
    """A session with a solved run and a uniform one."""
    state.measure()
    state.set_options({"epochs": "1"})
    state.solve(3)
    state.start_run()
    state.make_uniform()
    state.start_run()
    assert state.error == ""
    return state


def test_every_run_of_a_session_is_kept_and_told_apart_by_name(two_runs: ExplorerState) -> None:
    assert [run.name for run in two_runs.runs] == ["run 1, solved", "run 2, uniform"]
    assert two_runs.runs[-1] is two_runs.run
    assert two_runs.runs[0].distribution != two_runs.runs[1].distribution
    assert all(run.result is not None and run.final is not None for run in two_runs.runs)


def test_a_run_that_goes_on_is_renewed_in_its_place(state: ExplorerState) -> None:
    seen: list[tuple[RunRecord, ...]] = []
    state.observe(lambda change: seen.append(change["new"]), names=["runs"])
    state.start_run()
    assert len(seen) > 10
    assert all(len(runs) == 1 for runs in seen)
    assert [runs[0].step for runs in seen] == sorted(runs[0].step for runs in seen)


def test_the_oldest_run_is_dropped_and_the_log_says_so(state: ExplorerState) -> None:
    record = RunRecord(1, state.distribution, 0.9, 1.0)
    for number in range(1, MAX_RUNS + 3):
        state.run = dataclasses.replace(record, number=number)
        state.run = dataclasses.replace(record, number=number, step=5)
    assert [run.number for run in state.runs] == list(range(3, MAX_RUNS + 3))
    told = [line for line in state.log if "is not kept any longer" in line]
    assert len(told) == 2 and "Run 2 is not kept any longer" in told[1]


def test_another_study_begins_without_runs(two_runs: ExplorerState) -> None:
    view = CompareView(two_runs)
    view.chosen = "run-2"
    two_runs.adopt(FakeStudy())
    assert two_runs.runs == ()
    assert [one["key"] for one in view.contestants] == ["dense"]
    assert view.chosen == ""


def test_an_evaluation_is_paired_with_the_latest_latency_before_it() -> None:
    run = RunRecord(
        1, {}, 0.9, epochs=2, total_steps=40, dense_ms=2.0,
        evaluations=((0, 0.93), (5, 0.92), (10, 0.9), (25, 0.88), (40, 0.91)),
        latencies=((10, 1.5, 0.1), (20, 1.0, 0.1), (40, 0.5, 0.1)),
    )  # fmt: skip
    # At step 0 the network is the dense one; at step 5 nothing was timed yet.
    assert trajectory(run) == ((0.0, 2.0, 0.93), (0.5, 1.5, 0.9), (1.25, 1.0, 0.88), (2.0, 0.5, 0.91))
    unknown = dataclasses.replace(run, dense_ms=None, evaluations=((0, 0.93), (10, float("nan"))))
    assert trajectory(unknown) == ()


def test_the_view_has_the_dense_network_and_the_figures_of_each_run(two_runs: ExplorerState) -> None:
    view = CompareView(two_runs)
    dense, solved, uniform = view.contestants
    study = two_runs.study
    assert dense["latency_ms"] == pytest.approx(study.dense_ms) and dense["spread_ms"] == 0.02
    assert dense["accuracy"] == 0.931 and dense["images"] == "2,000 test images"
    assert set(dense["sparsities"].values()) == {0.0}
    for record, one in zip(two_runs.runs, (solved, uniform), strict=True):
        told = study.predict(record.distribution)
        assert one["latency_ms"] == pytest.approx(told.latency_ms)
        assert one["speedup"] == pytest.approx(told.speedup)
        assert one["asked"] == pytest.approx(record.asked)
        assert one["sparsity"] == record.result.sparsity
        assert one["size_bytes"] == record.sizes[1]
        assert one["points"][0] == pytest.approx([0.0, study.dense_ms, 0.931])
        assert len(one["points"]) == len(record.evaluations)
        assert one["is_final"]
        achieved = record.result.achieved
        assert one["sparsities"] == {name: zeros / elements for name, (zeros, elements) in achieved.items()}
    json.dumps([view.contestants, view.view])


def test_distributions_that_were_not_trained_have_a_predicted_latency_only(state: ExplorerState) -> None:
    view = CompareView(state)
    assert "waits for the measurement" in view.view["hint"]
    [here] = view.view["planned"]
    assert here["latency_ms"] is None
    state.measure()
    assert "No run yet" in view.view["hint"]
    here, uniform = view.view["planned"]
    assert (here["key"], uniform["key"]) == ("here", "uniform")
    assert here["name"] == "on the page, solved"
    assert here["latency_ms"] == pytest.approx(state.prediction.latency_ms)
    assert uniform["latency_ms"] == pytest.approx(here["latency_ms"], rel=0.05)
    assert "accuracy" not in here
    # The same one is not said twice.
    state.make_uniform()
    assert [one["key"] for one in view.view["planned"]] == ["here"]


def test_times_of_a_busy_machine_are_not_passed_off_as_good_ones(two_runs: ExplorerState) -> None:
    view = CompareView(two_runs)
    assert "busy" not in view.view["hint"]
    run = two_runs.runs[-1]
    pruned = SimpleNamespace(latency_ms=0.3, spread_ms=0.1)
    final = SimpleNamespace(pruned=pruned, dense=run.final.dense, baseline=run.final.baseline)
    two_runs.run = dataclasses.replace(run, final=final)
    assert view.view["hint"].endswith("so their times mean little: run 2, uniform.")


def test_a_dragged_bar_does_not_send_the_runs_again(two_runs: ExplorerState) -> None:
    view = CompareView(two_runs)
    sent: list[str] = []
    view.observe(lambda change: sent.append(change["name"]), names=["view", "contestants"])
    two_runs.edit({"block1.conv1": 0.31}, final=False)
    assert "view" in sent and "contestants" not in sent


def test_the_distribution_of_a_run_comes_back_and_can_be_undone(two_runs: ExplorerState) -> None:
    before, solved = two_runs.distribution, two_runs.runs[0].distribution
    view = CompareView(two_runs)
    press(view, "use", run=1)
    assert two_runs.distribution == solved and two_runs.origin == "solved"
    two_runs.undo()
    assert two_runs.distribution == before
    press(view, "use", run=7)
    assert two_runs.error == "There is no run 7 on the page; the runs are 1, 2."


def test_any_run_can_be_downloaded_with_its_own_times(two_runs: ExplorerState) -> None:
    press(CompareView(two_runs), "pack", run=1)
    first = two_runs.runs[0]
    assert two_runs.package is not None and two_runs.package.filename.endswith("-run1.zip")
    saved, reported = two_runs.study.calls[-2:]
    assert saved == ("save", first.result, first.final)
    assert reported[:2] == ("report", first.result)
    assert reported[2]["latency"] is first.final
    two_runs.pack()
    assert two_runs.package.filename.endswith("-run2.zip")


def test_a_run_without_a_result_cannot_be_downloaded(state: ExplorerState) -> None:
    state.run = RunRecord(1, state.distribution, 0.9, 1.0, status="failed")
    state.pack(1)
    assert state.error == "Run 1 has no result yet; let it finish, or stop it."
    assert not of_run(state.run).is_final


def test_a_running_run_is_compared_while_it_goes_on() -> None:
    with ThreadPoolExecutor(1) as executor:
        state = ExplorerState(FakeStudy(pause_s=0.001), executor=executor, interval=0.0)
        view, seen, grown = CompareView(state), threading.Event(), []

        def watch(_: Any) -> None:
            one = view.contestants[-1]
            if one["number"] and one["status"] == "running":
                grown.append(len(one["points"]))
                seen.set()

        view.observe(watch, names=["contestants"])
        state.set_options({"epochs": "2"})
        state.start_run()
        assert seen.wait(10)
    assert grown == sorted(grown) and grown[-1] > 3
    assert view.contestants[-1]["status"] == "done"


def test_a_cell_shows_the_runs_of_a_study_with_what_came_out(two_runs: ExplorerState) -> None:
    widget = explorer.CompareView(two_runs)
    _, compare, result = widget.children[0].children
    assert isinstance(compare, CompareView) and isinstance(result, ResultPanel)
    assert compare.page == two_runs.page and widget.study is two_runs.study
    page = explorer.SensitivityExplorer(two_runs)
    parts = page.children[0].children
    assert parts.index(page.compare) == parts.index(page.result) + 1


# Results without a study


def document(accuracy: float = 0.92, latency_ms: float | None = 0.5, **layers: float) -> dict[str, Any]:
    layers = layers or {"conv": 0.8, "fc": 0.9}
    timed = latency_ms is not None
    return {
        "dense": {"accuracy": 0.93, "latency_ms": 2.0 if timed else None, "spread_ms": 0.1 if timed else None, "size_bytes": 4000},
        "pruned": {
            "accuracy": accuracy, "latency_ms": latency_ms, "spread_ms": 0.02 if timed else None,
            "speedup": 2.0 / latency_ms if latency_ms else None, "sparsity": 0.825, "size_bytes": 700,
        },
        "layers": {name: {"asked": value, "achieved": value, "zeros": 0, "n_params": 300 if name == "conv" else 100} for name, value in layers.items()},
        "accuracy_measured_on": {"part": "test", "samples": 2000},
        "predicted": {"latency_ms": 0.45},
        "stopped": False,
        "failure": None,
    }  # fmt: skip


def saved(folder: Path, told: Any) -> Path:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(told))
    return folder


def test_saved_results_are_compared_without_a_study(tmp_path: Path) -> None:
    folders = [
        saved(tmp_path / "solved", document()),
        saved(tmp_path / "uniform", document(0.9, 0.4, conv=0.85, fc=0.85)),
    ]
    widget = explorer.CompareView(folders)
    [view] = widget.children[0].children
    assert isinstance(view, ResultsView)
    assert widget.study is None
    dense, solved, uniform = view.contestants
    assert (dense["latency_ms"], dense["size_bytes"], dense["accuracy"]) == (2.0, 4000, 0.93)
    assert [solved["name"], uniform["name"]] == ["1, solved", "2, uniform"]
    assert uniform["speedup"] == pytest.approx(5.0)
    # (300 · 0.8 + 100 · 0.9) / 400
    assert solved["asked"] == pytest.approx(0.825)
    assert uniform["sparsities"] == {"conv": 0.85, "fc": 0.85}
    assert view.view["layers"] == [["conv", "conv"], ["fc", "fc"]]
    assert not view.view["actions"]


def test_a_result_that_was_not_timed_is_in_the_table_and_said_to_be_missing_in_the_chart(
    tmp_path: Path,
) -> None:
    result = SimpleNamespace(
        accuracy=0.91, dense_accuracy=0.93, sparsity=0.8, achieved={"conv": (240, 300), "fc": (80, 100)},
        asked={"conv": 0.8, "fc": 0.8}, measured_on="test", n_evaluated=100, stopped=True, failure=None,
        settings=SimpleNamespace(epochs=3.0),
    )  # fmt: skip
    view = ResultsView([result, saved(tmp_path / "a", document())])
    dense, one, two = view.contestants
    assert one["status"] == "stopped" and one["epochs"] == 3.0 and one["asked"] == pytest.approx(0.8)
    assert one["latency_ms"] is None and not one["is_final"] and two["is_final"]
    # The dense network is the one that was timed.
    assert dense["latency_ms"] == 2.0
    assert "Not timed, so not in the chart: result 1." in view.view["hint"]
    assert [one.name for one in of_results(result)] == ["dense", "result 1"]


def test_times_of_two_machines_are_not_set_against_each_other_unsaid(tmp_path: Path) -> None:
    told = [document(), document()]
    for one, cpu in zip(told, ("Fast", "Slow"), strict=True):
        one["machine"] = {"cpu": cpu, "threads": 2, "batch_size": 1}
    folders = [saved(tmp_path / str(i), one) for i, one in enumerate(told)]
    assert (
        ResultsView(folders)
        .view["hint"]
        .endswith(
            "Timed in 2 ways, so compare speed-ups rather than milliseconds: Fast, threads 2, batch 1; Slow, threads 2, batch 1."
        )
    )
    assert "ways" not in ResultsView(folders[:1]).view["hint"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory. Give a folder that Study.save has written"),
        ("{", "is not JSON"),
        ("[]", "is not a result of Study.save"),
        ('{"pruned": {}}', "is not a result of Study.save"),
    ],
)
def test_a_folder_that_holds_no_result_is_refused_in_words(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(FormatError, match=words):
        explorer.CompareView(tmp_path)


def test_what_cannot_be_compared_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nothing to compare"):
        explorer.CompareView([])
    with pytest.raises(FormatError, match=r"int is no result; give a RunResult"):
        explorer.CompareView([3])
    first = saved(tmp_path / "a", document())
    with pytest.raises(FormatError, match="2, b and 1, a have different layers"):
        explorer.CompareView([first, saved(tmp_path / "b", document(stem=0.5))])
    other = document()
    other["dense"]["size_bytes"] = 5000
    with pytest.raises(FormatError, match="differ in size"):
        explorer.CompareView([first, saved(tmp_path / "c", other)])


def test_kept_distributions_can_be_compared_with_whatever_else_there_is(state: ExplorerState) -> None:
    view = CompareView(state)
    state.measure()
    state.keep("small")
    kept = dict(state.distribution)
    asked = len(state.study.calls)
    state.edit({"fc": 0.5}, final=False)
    [one] = [planned for planned in view.view["planned"] if planned["key"] == "kept-small"]
    assert one["name"] == "kept: small"
    assert one["sparsities"] == kept
    assert one["latency_ms"] == state.study.predict(kept).latency_ms
    assert asked == len(state.study.calls)
    # Worked out with the curves, and not at each step of a drag.
    before = view._kept
    state.edit({"fc": 0.6}, final=False)
    assert view._kept is before
    state.forget_snapshot("small")
    assert [planned["key"] for planned in view.view["planned"]] == ["here", "uniform"]
