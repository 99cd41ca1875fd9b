"""Start, watch, pause and stop a pruning run."""

from __future__ import annotations

import struct
from typing import Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import StateView


class RunMonitor(StateView):
    """Accuracy, sparsity and latency of the latest run, live."""

    _esm = assets.module("run_monitor", "chart")
    _css = assets.style("run_monitor")
    watches = ("study", "layers", "distribution", "prediction", "dense", "run", "job", "options", "measured")
    gestures = {
        "options": lambda state, said: state.set_options(said["options"]),
        "start": lambda state, _: state.start_run(),
        "pause": lambda state, _: state.pause(),
        "resume": lambda state, _: state.resume(),
        "stop": lambda state, _: state.stop(),
    }

    trace = t.Bytes().tag(sync=True)
    """Training steps as little-endian float32 triples: step, sparsity, loss."""

    def refresh(self) -> None:
        """Make view and trace anew from the state."""
        super().refresh()
        steps = self.state.run.steps if self.state.run is not None else ()
        self.trace = struct.pack(f"<{3 * len(steps)}f", *(number for step in steps for number in step))

    def make_view(self) -> dict[str, Any]:
        """Return everything but the trace."""
        state = self.state
        options = state.options
        total = sum(layer.n_params for layer in state.layers)
        asked = (
            sum(layer.n_params * state.distribution[layer.name] for layer in state.layers) / max(1, total)
            if state.distribution is not None
            else None
        )
        return {
            "title": self._title(),
            "hint": self._hint(),
            "startable": state.study is not None and not state.job.busy and not state.provenance,
            "why": self._why(),
            "paused": state.job.paused,
            "options": {"epochs": options.epochs},
            "plan": {"stabilise": options.stabilise, "ramp": options.ramp, "final": asked},
            "dense_accuracy": self._dense_accuracy(),
            "dense_ms": state.dense.latency_ms if state.dense is not None else None,
            "predicted_ms": state.prediction.latency_ms if state.prediction is not None else None,
            "run": self._run(),
        }

    def _why(self) -> str:
        state = self.state
        if state.provenance:
            return "This network cannot be trained here: its weights and its data are not bundled, only what others measured of it"
        if state.job.busy:
            return f"{state.job.text} is going on"
        return "Train the model while its weights are removed step by step"

    def _run(self) -> dict[str, Any] | None:
        run = self.state.run
        if run is None:
            return None
        return {
            "active": run.active,
            "status": run.status,
            "epochs": run.epochs,
            "total_steps": run.total_steps,
            "asked": run.asked,
            "evaluations": [list(pair) for pair in run.evaluations],
            "latencies": [[step, ms] for step, ms, _ in run.latencies],
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
            return "gradual magnitude pruning"
        if not run.active:
            return f"run {run.number}, {run.status}"
        return (
            f"run {run.number}, step {run.step} of {run.total_steps}"
            if run.total_steps
            else f"run {run.number}, preparing"
        )

    def _hint(self) -> str:
        run = self.state.run
        if self.state.provenance:
            return f"{self._why()}."
        if run is not None and run.active and run.loss is not None:
            rate = f", learning rate {run.learning_rate:.3g}" if run.learning_rate is not None else ""
            return f"Training loss {run.loss:.3f}{rate}."
        return "The smallest weights of each layer are set to zero step by step, along the dashed line, while training repairs the rest."
