"""Draw the schedule of a pruning run, then start, watch, pause and stop it."""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.runs import STATUSES
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from explorer.widgets.run_options import RunOptions
    from explorer.widgets.runs import RunRecord


class RunMonitor(StateView):
    """Accuracy or loss, sparsity of all or of each layer, latency or size of the latest run, live, and the schedule of the next one."""

    _esm = assets.module("run_monitor", "chart", "link")
    _css = assets.style("run_monitor")
    watches = (
        "study",
        "layers",
        "distribution",
        "selected",
        "prediction",
        "dense",
        "run",
        "job",
        "options",
        "measured",
    )
    gestures = {
        "options": lambda state, said: state.set_options(said["options"]),
        "start": lambda state, said: state.start_run(settings=said.get("options")),
        "pause": lambda state, _: state.pause(),
        "resume": lambda state, _: state.resume(),
        "stop": lambda state, _: state.stop(),
        "select": lambda state, said: state.select(str(said["layer"])),
    }

    trace = t.Bytes().tag(sync=True)
    """Training steps as little-endian float32, four a step: step, sparsity, loss, learning rate."""

    layer_trace = t.Bytes().tag(sync=True)
    """Mask updates as little-endian float32: step, then the sparsity of each layer."""

    def refresh(self) -> None:
        """Make view and traces anew from the state."""
        super().refresh()
        run = self.state.run
        self.trace = _floats(run.steps if run is not None else ())
        self.layer_trace = _floats(self._layer_rows(run)) if run is not None else b""

    def _layer_rows(self, run: RunRecord) -> list[tuple[float, ...]]:
        """Return step and sparsities of each mask update, in the order of the layers on the page."""
        rows = []
        for step, values in run.layers:
            known = dict(zip(run.distribution, values, strict=True))
            rows.append((float(step), *(known.get(layer.name, 0.0) for layer in self.state.layers)))
        return rows

    def make_view(self) -> dict[str, Any]:
        """Return everything but the traces."""
        state = self.state
        defaults = self._defaults()
        total = sum(layer.n_params for layer in state.layers)
        asked = (
            sum(layer.n_params * state.distribution[layer.name] for layer in state.layers) / max(1, total)
            if state.distribution is not None
            else None
        )
        names = [layer.name for layer in state.layers]
        return {
            "title": self._title(),
            "hint": self._hint(),
            "startable": state.study is not None and not state.job.busy and not state.provenance,
            "shapeable": state.study is not None and not state.provenance,
            "why": self._why(),
            "paused": state.job.paused,
            "options": dataclasses.asdict(state.options),
            "defaults": defaults,
            "layers": names,
            "labels": [name or ROOT_LABEL for name in names],
            "selected": state.selected,
            "plan": {
                "final": asked,
                "finals": [state.distribution.get(name, 0.0) for name in names]
                if state.distribution is not None
                else [],
            },
            "dense_accuracy": self._dense_accuracy(),
            "dense_ms": state.dense.latency_ms if state.dense is not None else None,
            "predicted_ms": state.prediction.latency_ms if state.prediction is not None else None,
            "run": self._run(defaults),
        }

    def _defaults(self) -> dict[str, Any]:
        """Return what settings that are left empty will be; nothing before there is a model, because that would load torch."""
        if self.state.study is None:
            return {}
        from explorer.pruning import RunSettings

        settings = RunSettings()
        return {"learning_rate": settings.learning_rate, "update_every": settings.update_every}

    def _why(self) -> str:
        state = self.state
        if state.provenance:
            return phrase("monitor.replay")
        if state.job.busy:
            return phrase("common.going_on", job=state.job.text)
        return phrase("monitor.start_tip")

    def _run(self, defaults: dict[str, Any]) -> dict[str, Any] | None:
        run = self.state.run
        if run is None:
            return None
        options: RunOptions = run.options or self.state.options
        return {
            "active": run.active,
            "status": run.status,
            "epochs": run.epochs,
            "step": run.step,
            "total_steps": run.total_steps,
            "asked": run.asked,
            "finals": [run.distribution.get(layer.name, 0.0) for layer in self.state.layers],
            "stabilise": options.stabilise,
            "ramp": options.ramp,
            "peak": options.learning_rate or defaults.get("learning_rate"),
            "evaluations": [list(pair) for pair in run.evaluations],
            "latencies": [[step, ms] for step, ms, _ in run.latencies],
            "stored": [list(pair) for pair in run.stored],
            "dense_accuracy": run.evaluations[0][1]
            if run.evaluations and run.evaluations[0][0] == 0
            else None,
            "dense_ms": run.dense_ms,
            "predicted_ms": run.predicted_ms,
        }

    def _dense_accuracy(self) -> float | None:
        """Return the accuracy that the measurement found without any pruning."""
        state = self.state
        curve = state.curves.of("accuracy", state.layers[0].name) if state.layers else ()
        return curve[0][1] if curve and curve[0][0] == 0 else None

    def _title(self) -> str:
        run = self.state.run
        if run is None:
            return phrase("monitor.title.none")
        if not run.active:
            return phrase("monitor.title.ended", number=run.number, status=STATUSES[run.status])
        return (
            phrase("monitor.title.running", number=run.number, step=run.step, total=run.total_steps)
            if run.total_steps
            else phrase("monitor.title.preparing", number=run.number)
        )

    def _hint(self) -> str:
        run = self.state.run
        if self.state.provenance:
            return f"{self._why()}."
        if run is not None and run.loss is not None:
            return told(run)
        return phrase("monitor.hint")


def told(run: RunRecord) -> str:
    """Return loss, learning rate, times and memory of a run in one line."""
    if not run.active:
        parts = [phrase("monitor.told.took", time=_minutes(run.seconds))]
    else:
        parts = [phrase("monitor.told.loss", loss=f"{run.loss:.3f}")]
        if run.learning_rate is not None:
            parts.append(phrase("monitor.told.rate", rate=f"{run.learning_rate:.3g}"))
        parts.append(phrase("monitor.told.gone", time=_minutes(run.seconds)))
        if run.seconds_left is not None:
            parts.append(phrase("monitor.told.left", time=_minutes(run.seconds_left)))
    if run.memory is not None:
        size, is_present = run.memory
        shown = f"{size / 1e6:,.0f}"
        parts.append(
            phrase("monitor.told.memory", size=shown)
            if is_present
            else phrase("monitor.told.memory_at_most", size=shown)
        )
    return f"{' · '.join(parts)}."


def _minutes(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


def _floats(rows: Any) -> bytes:
    """Return rows of numbers as little-endian float32, one after the other."""
    numbers = [number for row in rows for number in row]
    return struct.pack(f"<{len(numbers)}f", *numbers)
