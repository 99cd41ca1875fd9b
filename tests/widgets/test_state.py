from __future__ import annotations

import io
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from explorer.errors import DataError
from explorer.widgets.equalizer import Equalizer
from explorer.widgets.jobs import IDLE, InlineExecutor
from explorer.widgets.publisher import DirectScheduler
from explorer.widgets.run_options import RunOptions
from explorer.widgets.state import GRACE, PATIENCE, Choice, ExplorerState
from tests.widgets.fake_study import FakeStudy


def test_a_study_on_the_page_has_layers_and_a_uniform_distribution(state: ExplorerState) -> None:
    assert [layer.name for layer in state.layers][:2] == ["stem.conv", "block1.conv1"]
    assert set(state.distribution.values()) == {0.0, 0.9}
    assert state.prediction is None
    assert state.selected == "stem.conv"


def test_measuring_fills_the_curves_and_solves_for_the_target(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    assert state.error == ""
    assert state.measured
    assert len(state.curves.of("latency_ms", "fc")) == len(study.levels) + 1
    assert state.origin == "solved"
    assert state.prediction.speedup >= 3
    assert state.feasible[1] == pytest.approx(study.feasible_speedups()[1])
    assert state.dense is not None and state.dense.name == "engine, dense"


def test_a_target_beyond_the_model_is_lowered_for_the_first_picture(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.target = 50.0
    state.measure()
    assert state.error == ""
    assert study.calls[0] == ("solve", round(0.8 * study.feasible_speedups()[1], 1), {})


def test_a_network_that_gains_nothing_is_not_solved_but_said(
    state: ExplorerState, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "feasible_speedups", lambda: (0.9, 1.05))
    state.measure()
    assert state.error == ""
    assert not [call for call in study.calls if call[0] == "solve"]
    assert "next to nothing" in state.log[-1]


def test_the_ghost_is_the_uniform_distribution_of_the_same_latency(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.measure()
    assert study.predict(state.ghost).latency_ms == pytest.approx(state.prediction.latency_ms, rel=0.02)
    assert len({value for value in state.ghost.values() if value}) == 1


def test_a_stopped_measurement_keeps_its_points_and_solves_nothing(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.observe(lambda _: state.stop(), names=["curves"])
    state.measure()
    assert state.curves.of("kl", "stem.conv")
    assert not state.measured
    assert not study.calls
    assert not state.job.busy


def test_a_solved_speedup_respects_locked_layers(state: ExplorerState, study: FakeStudy) -> None:
    state.measure()
    state.type_sparsity(["fc"], "12.5")
    state.toggle_lock(["fc"])
    state.solve("2.5")
    assert state.error == ""
    assert [call for call in study.calls if call[0] == "solve"][-1] == ("solve", 2.5, {"fc": 0.125})
    assert state.distribution["fc"] == 0.125
    assert state.distribution.locked == {"fc"}


@pytest.mark.parametrize("typed", ["", "fast", "nan", "-2", "0.5", "1e999"])
def test_a_target_that_is_no_speedup_is_refused_with_the_range(state: ExplorerState, typed: str) -> None:
    state.measure()
    before = state.distribution
    state.solve(typed)
    assert "between 1.0 and 9.5" in state.error
    assert state.distribution is before


def test_a_target_out_of_reach_says_so_and_keeps_the_bars(state: ExplorerState) -> None:
    state.measure()
    before = state.distribution
    state.solve(50)
    assert "the highest is 9.46" in state.error
    assert state.distribution is before
    assert not state.job.busy


@pytest.mark.parametrize(
    ("kind", "typed", "asked"),
    [
        ("latency_ms", "0.5 ms", 0.5),
        ("sparsity", "80%", 0.8),
        ("size_bytes", "200", 200e3),
        ("max_loss", "0,4", 0.4),
    ],
)
def test_other_targets_are_solved_in_the_units_of_the_page(
    state: ExplorerState, study: FakeStudy, kind: str, typed: str, asked: float
) -> None:
    state.measure()
    state.choose_target(kind)
    told = study.predict(state.distribution)
    has = {"latency_ms": told.latency_ms, "sparsity": 100 * told.sparsity}
    has |= {"size_bytes": told.size_bytes / 1000, "max_loss": told.kl}
    assert state.target == pytest.approx(has[kind], abs=0.06), "it begins at what is on the page"
    limits = state.target_limits()
    assert limits is not None
    assert limits[0] < state.target < limits[1]
    before = state.distribution
    state.solve(typed)
    assert state.error == ""
    assert state.distribution != before
    [call] = [call for call in study.calls if call[0] == "solve" and call[1] == pytest.approx({kind: asked})]
    assert call[2] == {}


@pytest.mark.parametrize(
    ("kind", "typed", "said"),
    [
        ("sparsity", "120", "The sparsity asked for is 120 %; give a number between 0 % and 99 %"),
        ("latency_ms", "-1", "The latency asked for is -1 ms; give a number between"),
        ("size_bytes", "small", '"small" is not a number; give a size between'),
        ("max_loss", "nan", "give a harm between 0 nats and"),
        ("weight", "3", "There is no target 'weight'; there are speedup, latency_ms"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused_with_its_unit_and_range(
    state: ExplorerState, kind: str, typed: str, said: str
) -> None:
    state.measure()
    before = state.distribution
    state.choose_target(kind)
    if not state.error:
        state.solve(typed)
    assert said in state.error
    assert state.distribution is before


def test_while_the_dial_turns_the_tables_answer_within_the_call_and_undo_keeps_one_step(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.measure()
    first = state.distribution
    for number in (1.5, 2.0, 2.5):
        state.turn(number)
        assert state.error == ""
        assert state.prediction.speedup >= number
        assert study.calls[-1][:2] == ("turn", number)
    state.turn(500)
    assert state.error == "", "the end of the dial is a rounded number"
    assert state.prediction.speedup >= 2.5
    state.solve(2.5)
    assert [call for call in study.calls if call[0] == "solve"][-1][1] == 2.5
    state.undo()
    assert state.distribution == first


def test_bars_that_are_moved_while_a_target_is_solved_stay_where_they_were_put(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.measure()
    solve = study.solve

    def solve_while_a_bar_is_dragged(**options: Any) -> Any:
        state.edit({"fc": 0.35}, final=True)
        return solve(**options)

    study.solve = solve_while_a_bar_is_dragged  # type: ignore[method-assign]
    state.solve(2.5)
    assert state.distribution["fc"] == 0.35
    assert state.origin == "mine"
    assert "the bars have been moved since" in state.log[-1]
    assert not state.job.busy


def test_between_a_measurement_and_its_solution_the_page_is_not_told_that_nothing_goes_on(
    state: ExplorerState,
) -> None:
    jobs: list[tuple[str, bool]] = []
    state.observe(lambda change: jobs.append((change["new"].kind, state.measured)), names=["job"])
    state.measure()
    # The last thing that is seen is rest, after measuring and solving both; never rest before that.
    assert jobs[-1] == (IDLE.kind, True)
    assert [kind for kind, _ in jobs].count(IDLE.kind) == 1


def test_solving_before_measuring_says_what_to_do(state: ExplorerState) -> None:
    state.solve(3)
    assert "press Measure first" in state.error


@pytest.mark.parametrize(
    ("typed", "value"), [("50", 0.5), ("87,5", 0.875), (" 12 % ", 0.12), ("0", 0.0), ("99", 0.99)]
)
def test_a_typed_sparsity_is_in_per_cent(state: ExplorerState, typed: str, value: float) -> None:
    state.type_sparsity(["fc"], typed)
    assert state.error == ""
    assert state.distribution["fc"] == pytest.approx(value)


@pytest.mark.parametrize("typed", ["99.9", "-1", "many", "", "inf", "120"])
def test_a_wrong_sparsity_is_refused(state: ExplorerState, typed: str) -> None:
    state.type_sparsity(["fc"], typed)
    assert "between 0 and 99" in state.error
    assert state.distribution["fc"] == 0.0


def test_a_locked_layer_cannot_be_dragged(state: ExplorerState) -> None:
    state.toggle_lock(["fc"])
    state.edit({"fc": 0.5}, final=True)
    assert "unlock" in state.error
    assert state.distribution["fc"] == 0.0


def test_a_drag_is_one_step_of_undo(state: ExplorerState) -> None:
    for value in (0.1, 0.2, 0.3):
        state.edit({"fc": value}, final=False)
    state.edit({"fc": 0.3}, final=True)
    state.undo()
    assert state.distribution["fc"] == 0.0
    assert state.can_redo and not state.can_undo
    state.redo()
    assert state.distribution["fc"] == 0.3


def test_uniform_keeps_locked_layers(state: ExplorerState) -> None:
    state.edit({"block1.conv1": 0.2}, final=True)
    state.toggle_lock(["block1.conv1"])
    state.make_uniform()
    assert state.distribution["block1.conv1"] == 0.2
    assert state.distribution["block3.conv2"] == 0.9


def test_a_run_ends_with_a_result_timed_beside_the_dense_network(
    state: ExplorerState, study: FakeStudy
) -> None:
    state.measure()
    state.set_options({"epochs": "2", "seed": "7", "learning_rate": ""})
    state.start_run()
    assert state.error == ""
    assert state.run is not None and state.run.status == "done"
    assert state.run.distribution == state.distribution
    assert state.run.speedup == pytest.approx(study.dense_ms / study.predict(state.distribution).latency_ms)
    assert state.run.sizes == (4000, 4 * 100 + 125)
    options = study.calls[-1][2]
    assert options["epochs"] == 2 and options["seed"] == 7
    assert "learning_rate" not in options


def test_an_option_that_is_out_of_range_is_named(state: ExplorerState) -> None:
    for wrong in (
        {"epochs": "none"},
        {"epochs": "0"},
        {"seed": "1.5"},
        {"stabilise": "0.7", "ramp": "0.7"},
        {"speed": "1"},
    ):
        state.dismiss()
        state.set_options(wrong)
        assert next(iter(wrong)).split("_")[0] in state.error
        assert state.options == RunOptions()


def test_a_run_that_diverges_keeps_what_it_had_and_says_what_to_do() -> None:
    state = ExplorerState(FakeStudy(fail_at=15), executor=InlineExecutor())
    state.start_run()
    assert "lower the learning rate" in state.error
    assert state.run is not None and state.run.status == "failed"
    assert not state.job.busy


class Watched:
    """A state with a real worker, whose changes a test can wait for."""

    def __init__(self, study: FakeStudy, **options: Any) -> None:
        self.executor = ThreadPoolExecutor(1)
        self.state = ExplorerState(
            study, executor=self.executor, scheduler=DirectScheduler(), interval=0.0, **options
        )

    def until(self, condition: Any, *names: str) -> None:
        reached = threading.Event()
        look = lambda _: condition(self.state) and reached.set()  # noqa: E731
        self.state.observe(look, names=list(names))
        look(None)
        assert reached.wait(20)
        self.state.unobserve(look, names=list(names))


def test_a_run_can_be_paused_resumed_and_stopped_with_a_usable_result() -> None:
    watched = Watched(FakeStudy(pause_s=0.005, steps_per_epoch=1000))
    state = watched.state
    state.start_run()
    watched.until(lambda s: s.run and s.run.step > 3, "run")
    state.pause()
    assert state.run is not None and state.run.status == "paused"
    assert state.job.paused
    state.resume()
    step = state.run.step
    watched.until(lambda s: s.run.step > step + 3, "run")
    state.stop()
    watched.until(lambda s: not s.job.busy, "job")
    watched.until(lambda s: s.run.status == "stopped", "run")
    assert state.run.result is not None
    watched.executor.shutdown()


def test_a_pause_pressed_before_the_run_is_made_holds_it() -> None:
    study = FakeStudy(steps_per_epoch=1000)
    made = threading.Event()
    prune = study.prune

    def slowly(*given: Any, **options: Any) -> Any:
        assert made.wait(10)
        return prune(*given, **options)

    study.prune = slowly  # type: ignore[method-assign]
    watched = Watched(study)
    watched.state.start_run()
    watched.state.pause()
    made.set()
    watched.until(lambda s: s.run.evaluations, "run")
    assert watched.state.run is not None and watched.state.run.step == 0
    assert watched.state.run.status == "paused"
    watched.state.stop()
    watched.until(lambda s: not s.job.busy, "job")
    assert watched.state.run.status == "stopped"
    watched.executor.shutdown()


def test_a_second_job_is_refused_with_the_name_of_the_first() -> None:
    watched = Watched(FakeStudy(pause_s=0.002, steps_per_epoch=1000))
    watched.state.start_run()
    watched.state.measure()
    assert "Pruning, run 1 is still going on" in watched.state.error
    watched.state.stop()
    watched.until(lambda s: not s.job.busy, "job")
    watched.executor.shutdown()


@pytest.mark.parametrize(
    ("leaving", "wait", "stopped"),
    [(False, PATIENCE + 1, True), (True, GRACE + 1, True), (False, GRACE + 1, False)],
)
def test_a_job_that_no_page_watches_is_stopped(leaving: bool, wait: float, stopped: bool) -> None:
    now = [0.0]
    study = FakeStudy()
    state = ExplorerState(study, executor=InlineExecutor(), clock=lambda: now[0])
    state.beat()
    state.beat(leaving=leaving)
    now[0] = wait
    state.start_run()
    assert state.run is not None and state.run.status == ("stopped" if stopped else "done")


def test_a_script_without_a_page_is_never_stopped() -> None:
    now = [0.0]
    state = ExplorerState(FakeStudy(), executor=InlineExecutor(), clock=lambda: now[0])
    now[0] = 1e9
    state.start_run()
    assert state.run is not None and state.run.status == "done"


def test_the_result_is_packed_as_a_zip_of_weights_recipe_and_figures(state: ExplorerState) -> None:
    state.measure()
    state.start_run()
    state.pack()
    assert state.package is not None and state.package.filename == "fashion-resnet-run1.zip"
    with zipfile.ZipFile(io.BytesIO(state.package.content)) as archive:
        assert archive.namelist() == [
            "measurements.csv",
            "model.safetensors",
            "recipe.yaml",
            "report.html",
            "result.json",
        ]
        assert b"a run" in archive.read("report.html")
        assert archive.read("measurements.csv").startswith(b"layer,sparsity,kind,value")
        assert archive.testzip() is None
    state.taken()
    assert state.package.content == b""


def test_packing_without_a_result_says_what_to_do(state: ExplorerState) -> None:
    state.pack()
    assert "no result yet" in state.error


def test_a_result_that_is_too_large_for_the_page_stays_in_a_folder(
    state: ExplorerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explorer.widgets.state.MAX_DOWNLOAD", 10)
    state.start_run()
    state.pack()
    assert state.package is None
    assert "in the folder" in state.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 12 bytes"
        ),
    ],
)
def test_a_lack_of_memory_is_said_in_plain_words(state: ExplorerState, error: Exception) -> None:
    state.report(error)
    assert state.error.startswith("There was not enough memory for this. Measure on fewer images")
    assert "enforce" not in state.error
    assert any(type(error).__name__ in line for line in state.log)


def test_a_choice_that_cannot_be_loaded_leaves_the_page_alive() -> None:
    def refuse(_choice: Choice) -> Any:
        raise DataError("Fashion-MNIST was not found; install it or name its folder.")

    state = ExplorerState(choices=[Choice("a", "b", "c")], executor=InlineExecutor(), open_study=refuse)
    state.load(0)
    assert "install it" in state.error
    state.load(5)
    assert "no choice 5" in state.error
    assert state.study is None
    state.measure()
    assert "choose one first" in state.error


def test_an_unexpected_error_is_shown_without_its_traceback_which_the_log_has(
    state: ExplorerState, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "sensitivity_points", lambda **_: 1 / 0)
    state.measure()
    assert "ZeroDivisionError" in state.error
    assert "Traceback" not in state.error
    assert any("Traceback" in line for line in state.log)
    assert not state.job.busy


def test_the_log_is_bounded(state: ExplorerState) -> None:
    for i in range(1000):
        state.report(DataError(f"error {i}"))
    assert len(state.log) == 200
    assert "error 999" in state.log[-1]


def test_a_distribution_is_kept_by_name_taken_back_and_compared_with(state: ExplorerState) -> None:
    state.measure()
    first = state.distribution
    state.keep("  for   the phone ")
    assert [snapshot.name for snapshot in state.snapshots] == ["for the phone"]
    state.edit({"fc": 0.5}, final=True)
    state.keep()
    state.keep()
    told = f"by hand, {state.prediction.speedup:.2f} ×"
    assert [snapshot.name for snapshot in state.snapshots] == ["for the phone", told, f"{told} (2)"]
    state.compare_with("for the phone")
    view = Equalizer(state).view
    assert [layer["ghost"] for layer in view["layers"]] == [first[layer.name] for layer in state.layers]
    assert [one["here"] for one in view["snapshots"]] == [False, True, True]
    state.take_snapshot("for the phone")
    assert state.distribution == first
    state.undo()
    assert state.distribution["fc"] == 0.5
    state.forget_snapshot("for the phone")
    assert state.compared == ""
    assert len(state.snapshots) == 2
    for gesture in (state.take_snapshot, state.forget_snapshot, state.compare_with):
        gesture("for the phone")
        assert "for the phone" in state.error
        state.error = ""
    state.keep("x" * 41)
    assert "at most 40" in state.error
    for i in range(30):
        state.keep(f"number {i}")
    assert len(state.snapshots) == 24
    assert "forget one first" in state.error
    state.adopt(state.study)
    assert state.snapshots == ()


def test_several_layers_are_typed_locked_and_tied_together(state: ExplorerState) -> None:
    some = ["block3.conv1", "block3.conv2"]
    state.type_sparsity(some, "80 %")
    assert [state.distribution[name] for name in some] == [0.8, 0.8]
    assert state.distribution["block2.conv2"] == 0.9
    state.toggle_lock(some[:1])
    state.toggle_lock(some)
    assert state.distribution.locked == {*some}
    state.toggle_lock(some)
    assert state.distribution.locked == frozenset()
    state.edit({some[1]: 0.4}, final=True)
    state.toggle_tie(some)
    assert state.distribution.groups == (tuple(some),)
    assert [state.distribution[name] for name in some] == [0.8, 0.8]
    assert {layer["name"]: layer["group"] for layer in Equalizer(state).view["layers"]}[some[0]] == 0
    state.edit({some[0]: 0.7, some[1]: 0.7}, final=True)
    assert [state.distribution[name] for name in some] == [0.7, 0.7]
    state.undo()
    assert state.distribution.groups == (tuple(some),)
    state.toggle_tie(some)
    assert state.distribution.groups == ()
    for names in (["no such layer"], []):
        state.error = ""
        state.type_sparsity(names, "50")
        assert "There is no layer" in state.error
