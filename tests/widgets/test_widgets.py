from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from explorer.widgets import ExplorerState, SensitivityExplorer, assets
from explorer.widgets.equalizer import Equalizer
from explorer.widgets.header import Header
from explorer.widgets.jobs import InlineExecutor, JobStatus
from explorer.widgets.metrics import spread_of, tiles
from explorer.widgets.notice import Notice
from explorer.widgets.publisher import kernel_scheduler
from explorer.widgets.result_panel import ResultPanel
from explorer.widgets.run_monitor import RunMonitor
from explorer.widgets.sensitivity_view import SensitivityView
from tests.widgets.fake_study import FakeStudy

STATIC = Path(assets.__file__).parent / "static"


def press(widget: Any, gesture: str, **content: Any) -> None:
    """Send what the page sends."""
    widget._handle_custom_msg({"do": gesture, **content}, [])


def drag(equalizer: Equalizer, values: list[float], edit: int | None = None) -> None:
    """Send what the page sends while a bar is dragged."""
    equalizer.set_state({"drag": {"values": values, "edit": equalizer.edit if edit is None else edit}})


def message(data: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the page as the kernel hands it to a widget."""
    return {"content": {"data": data}, "buffers": []}


def test_what_the_page_sends_is_taken_in_the_thread_of_the_state(study: FakeStudy) -> None:
    threads: list[int] = []

    async def main() -> tuple[int, ExplorerState, dict[str, float]]:
        state = ExplorerState(study, executor=InlineExecutor(), scheduler=kernel_scheduler())
        equalizer = Equalizer(state)
        state.observe(lambda _: threads.append(threading.get_ident()))
        before = dict(state.distribution)
        values = [0.5 for _ in before]

        def subshell() -> None:  # where JupyterLab has them handled
            dragged = {"values": [0.25 for _ in before], "edit": equalizer.edit}
            equalizer._handle_msg(
                message({"method": "update", "state": {"drag": dragged}, "buffer_paths": []})
            )
            equalizer._handle_msg(
                message({"method": "custom", "content": {"do": "commit", "values": values, "edit": 1}})
            )

        await asyncio.to_thread(subshell)
        await asyncio.sleep(0)
        return threading.get_ident(), state, before

    # In a thread of its own: the browser of other tests leaves a loop running in this one.
    with ThreadPoolExecutor(1) as executor:
        here, state, before = executor.submit(lambda: asyncio.run(main())).result()
    assert set(threads) == {here}
    assert dict(state.distribution) == dict.fromkeys(before, 0.5)


def tile(state: ExplorerState, key: str) -> dict[str, Any]:
    return next(entry for entry in tiles(state) if entry["key"] == key)


def test_dragging_in_the_page_moves_the_distribution_and_the_prediction(state: ExplorerState) -> None:
    equalizer = Equalizer(state)
    state.measure()
    before = state.prediction.latency_ms
    values = [*equalizer.values]
    values[1] = 0.0
    drag(equalizer, values)
    assert state.distribution["block1.conv1"] == 0.0
    assert state.prediction.latency_ms > before
    assert state.origin == "mine"


def test_a_refused_value_goes_back_to_the_page(state: ExplorerState) -> None:
    equalizer = Equalizer(state)
    for wrong in (2.0, -0.5):
        values = [*equalizer.values]
        values[0] = wrong
        drag(equalizer, values)
        assert "between 0 and 99" in state.error
        assert equalizer.values[0] == 0.0
    drag(equalizer, [0.5])
    assert "one sparsity for each of 10 layers" in state.error
    assert len(equalizer.values) == 10


def test_a_step_of_a_drag_that_arrives_after_its_end_changes_nothing(state: ExplorerState) -> None:
    # ipywidgets holds trait changes back until the kernel is idle, but sends messages at once.
    equalizer = Equalizer(state)
    start, end, late = ([*equalizer.values] for _ in range(3))
    start[1], end[1], late[1] = 0.30, 0.95, 0.94
    drag(equalizer, start, edit=0)
    press(equalizer, "commit", values=end, edit=1)
    drag(equalizer, late, edit=0)
    assert state.distribution["block1.conv1"] == 0.95
    assert (equalizer.values[1], equalizer.edit) == (0.95, 1)


def test_the_buttons_of_the_equalizer_act(state: ExplorerState) -> None:
    equalizer = Equalizer(state)
    state.measure()
    press(equalizer, "solve", target="2")
    assert state.target == 2
    solved = state.distribution
    press(equalizer, "uniform")
    assert state.origin == "uniform"
    press(equalizer, "undo")
    assert state.distribution == solved
    press(equalizer, "redo")
    press(equalizer, "type", layers=["fc"], text="40")
    assert equalizer.values[-1] == 0.4
    press(equalizer, "lock", layers=["fc"])
    assert equalizer.view["layers"][-1]["locked"]


def test_messages_that_make_no_sense_do_no_harm(state: ExplorerState) -> None:
    equalizer = Equalizer(state)
    before = state.distribution
    press(equalizer, "explode")
    press(equalizer, "commit", values="abc")
    press(equalizer, "commit", values=[None] * 10)
    press(equalizer, "lock", layers=["no such layer"])
    press(equalizer, "solve")
    assert state.distribution == before
    assert state.error


def test_the_figures_are_predictions_before_a_run_and_measurements_after(state: ExplorerState) -> None:
    assert tile(state, "latency")["value"] == "–"
    state.measure()
    latency = tile(state, "latency")
    assert latency["label"] == "Latency, predicted"
    assert latency["note"] == (
        f"± {spread_of(latency['value'], state.prediction.latency_error_ms)} ms; dense {state.dense.latency_ms:#.3g} ms"
    )
    assert tile(state, "speedup")["note"] == "against engine, dense"
    state.start_run()
    latency = tile(state, "latency")
    assert latency["label"] == "Latency, measured"
    assert latency["note"].startswith(f"± {spread_of(latency['value'], state.run.latency[1])} ms; dense ")
    assert latency["more"].startswith("predicted ")
    assert tile(state, "speedup")["value"] == f"{state.run.speedup:.2f}"
    assert tile(state, "accuracy")["value"] == f"{100 * state.run.result.accuracy:.1f}"


def test_after_a_run_a_moved_bar_shows_predictions_again(state: ExplorerState) -> None:
    state.measure()
    state.start_run()
    state.edit({"fc": 0.123}, final=True)
    assert tile(state, "latency")["label"] == "Latency, predicted"


def test_the_asked_sparsity_is_weighted_by_the_weights_of_a_layer(state: ExplorerState) -> None:
    total = sum(layer.n_params for layer in state.layers)
    pruned = sum(layer.n_params for layer in state.layers[1:-1])
    assert tile(state, "sparsity")["value"] == f"{90 * pruned / total:.1f}"


def test_steps_of_a_run_travel_as_float32_in_fours(state: ExplorerState) -> None:
    monitor = RunMonitor(state)
    state.start_run()
    numbers = struct.unpack(f"<{len(monitor.trace) // 4}f", monitor.trace)
    assert len(numbers) == 4 * len(state.run.steps)
    assert numbers[-4] == state.run.total_steps
    assert numbers[-4:] == pytest.approx(state.run.steps[-1])
    assert monitor.view["run"]["evaluations"][0] == [0, 0.931]


def test_the_sparsity_of_each_layer_travels_in_the_order_of_the_page(state: ExplorerState) -> None:
    monitor = RunMonitor(state)
    assert monitor.layer_trace == b""
    names = [layer.name for layer in state.layers]
    assert monitor.view["plan"]["finals"] == [state.distribution[name] for name in names]
    state.distribution = type(state.distribution)(dict(list(state.distribution.items())[::-1]))
    state.start_run()
    width = 1 + len(names)
    numbers = struct.unpack(f"<{len(monitor.layer_trace) // 4}f", monitor.layer_trace)
    assert len(numbers) == width * len(state.run.layers)
    assert numbers[:width] == (0.0,) * width
    assert numbers[-width] == state.run.total_steps
    achieved = [state.run.result.achieved[name] for name in names]
    assert numbers[1 - width :] == pytest.approx([zeros / elements for zeros, elements in achieved])
    assert monitor.view["run"]["finals"] == [state.distribution[name] for name in names]
    step, size = monitor.view["run"]["stored"][-1]
    assert (step, size) == (
        100,
        state.study.stored_bytes({name: state.run.result.achieved[name][0] for name in names}),
    )


def test_the_hint_tells_times_and_memory(state: ExplorerState) -> None:
    monitor = RunMonitor(state)
    hints = []
    state.observe(lambda _change: hints.append(monitor.view["hint"]), names=["run"])
    state.start_run()
    pattern = r"Training loss 0\.\d+ · learning rate [\d.e-]+ · \d+ s gone · about \d+ s left( · memory (at most )?[\d,]+ MB)?\."
    assert any(re.fullmatch(pattern, hint) for hint in hints), hints[:3]
    assert re.fullmatch(r"Took \d+ s( · memory (at most )?[\d,]+ MB)?\.", hints[-1])


def test_settings_that_are_refused_start_nothing(state: ExplorerState) -> None:
    monitor = RunMonitor(state)
    press(monitor, "start", options={"epochs": "2", "stabilise": "0.7", "ramp": "0.6"})
    assert state.run is None
    assert "add up to more than 1; lower one" in state.error
    press(monitor, "start", options={"epochs": "2", "stabilise": "0.2", "ramp": "0.3"})
    assert state.error == ""
    assert (state.run.epochs, state.options.stabilise, monitor.view["run"]["ramp"]) == (2, 0.2, 0.3)
    assert [name for name, _, _ in state.run.phases] == ["stabilise", "prune", "fine-tune"]
    # The settings of the next run leave the schedule of this one alone.
    press(monitor, "options", options={"epochs": "3", "stabilise": "0.1", "ramp": "0.5"})
    assert (monitor.view["run"]["stabilise"], monitor.view["options"]["stabilise"]) == (0.2, 0.1)


def test_start_asks_for_the_options_of_the_page(state: ExplorerState) -> None:
    monitor = RunMonitor(state)
    press(monitor, "options", options={"epochs": "1"})
    press(monitor, "start")
    assert state.run.epochs == 1


def test_every_view_is_plain_json_in_every_stage(state: ExplorerState) -> None:
    page = SensitivityExplorer(state)
    widgets = page.children[0].children

    def check() -> None:
        for widget in widgets:
            json.dumps(widget.view, allow_nan=False)

    check()
    state.measure()
    check()
    state.start_run()
    check()


def test_a_view_is_not_sent_again_when_nothing_changed(state: ExplorerState) -> None:
    view = SensitivityView(state)
    sent: list[object] = []
    view.observe(sent.append, names=["view", "curves"])
    view.refresh()
    assert sent == []


def test_the_result_panel_offers_a_download_only_after_a_run(state: ExplorerState) -> None:
    panel = ResultPanel(state)
    assert not panel.view["downloadable"]
    state.start_run()
    assert panel.view["downloadable"]
    assert panel.view["columns"] == ["", "Dense", "Pruned", "Change"]
    press(panel, "pack")
    assert panel.content.startswith(b"PK")
    press(panel, "taken")
    assert panel.content == b""


def test_the_steps_of_the_header_follow_the_work(state: ExplorerState) -> None:
    header = Header(state)
    assert header.view["steps"] == ["done", "now", "later", "later", "later"]
    state.measure()
    assert header.view["steps"][2] == "now"
    state.start_run()
    assert header.view["steps"] == ["done", "done", "done", "done", "now"]


def test_a_closed_widget_stops_watching(state: ExplorerState) -> None:
    view = SensitivityView(state)
    before = view.curves
    view.close()
    state.measure()
    assert view.curves == before


@pytest.mark.parametrize(
    "name",
    [
        "header",
        "notice",
        "metrics",
        "layer_table",
        "sensitivity_view",
        "equalizer",
        "run_monitor",
        "mask_view",
        "result_panel",
    ],
)
def test_scripts_take_text_as_text_and_nothing_from_elsewhere(name: str) -> None:
    from explorer.widgets import assets

    script, sheet = assets.module(name, "chart"), assets.style(name)
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "import ",
        "fetch(",
        "://cdn",
    ):
        assert forbidden not in script, forbidden
    assert "@import" not in sheet
    assert "url(" not in sheet
    # Colours live in the theme only.
    own = sheet.split("/* Text on a line")[-1]
    assert "#" not in "".join(
        line for line in own.splitlines() if "{" in line and not line.startswith(("#", "body"))
    )


def test_a_sign_of_life_is_answered_and_a_good_bye_is_not(
    state: ExplorerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = Header(state)
    answers: list[object] = []
    monkeypatch.setattr(header, "send", answers.append)
    press(header, "beat")
    press(header, "beat", leaving=True)
    press(header, "something else")
    assert answers == [{"do": "beat"}]


def test_a_run_that_was_told_to_stop_says_that_it_trains_no_more(state: ExplorerState) -> None:
    state.start_run()
    assert state.run is not None
    state.job = JobStatus("prune", "Pruning, run 1")
    state.run = dataclasses.replace(state.run, status="running", result=None)
    assert Notice(state).view["text"].startswith("Pruning, run 1")
    state.stop()
    assert Notice(state).view["text"] == "Run 1 trains no more; what it has reached is being evaluated."


def test_sources_travel_without_comments_and_line_by_line() -> None:
    for path in sorted(STATIC.iterdir()):
        source, lean = path.read_text(encoding="utf-8"), assets._lean(path.read_text(encoding="utf-8"))
        assert len(lean) < len(source)
        pairs = list(zip(source.splitlines(), lean.split("\n"), strict=True))
        in_comment = False
        for line, kept in pairs:
            # Whatever is code is whole: only indentation and lines that are a comment, or in one, go.
            in_comment = in_comment or line.strip().startswith("/*")
            assert kept == line.strip() or (kept == "" and (in_comment or line.strip().startswith("//")))
            in_comment = in_comment and "*/" not in line
        # Indentation may go because no text runs over several lines.
        assert path.suffix != ".js" or all(
            line.count("`") % 2 == 0 for line, kept in pairs if kept[:1] not in ("*", "/")
        )
