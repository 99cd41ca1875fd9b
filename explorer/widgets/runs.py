"""What the page knows of one pruning run: its events, gathered into a value that can be drawn.

A `RunRecord` never changes. The worker makes a new one after each event and posts it; a page that comes late, or comes back, sees
the whole run in the latest one. Long runs are thinned, so that a record stays a few kilobytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

RunStatus = Literal["running", "paused", "stopping", "done", "stopped", "failed"]

MAX_STEPS = 240
"""Most training steps that are kept for drawing; a chart is not much wider in pixels."""

MAX_RUNS = 8
"""Most runs of a session that are kept: each holds its pruned network, and more shapes and colours are not told apart in one chart."""

ORIGINS = {"uniform": "uniform", "solved": "solved", "mine": "by hand"}
"""What a reader is told of where a distribution came from."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as far as it has come.

    Parameters
    ----------
    number : int
        Counts the runs of a session from 1.
    distribution : object
        The sparsity per layer that was asked for.
    asked : float
        Its sparsity over all prunable weights, a fraction.
    epochs : float
    steps : tuple of (step, sparsity, loss)
        Thinned training steps.
    evaluations : tuple of (step, accuracy)
        Accuracy on the validation images, fractions; step 0 is the dense network.
    latencies : tuple of (step, latency_ms, spread_ms)
    result : object
        The `RunResult` at the end.
    final : object
        The `FinalLatency` at the end: the result and all dense contestants, timed in turn.
    sizes : (int, int) or None
        Bytes of the weights before, and after with zeros left out.
    origin : str
        Where the distribution came from: "uniform", "solved" or "mine"; empty when nobody knows.
    """

    number: int
    distribution: Any
    asked: float
    epochs: float
    status: RunStatus = "running"
    step: int = 0
    total_steps: int = 0
    phase: str = ""
    loss: float | None = None
    learning_rate: float | None = None
    sparsity: float = 0.0
    seconds_left: float | None = None
    steps: tuple[tuple[int, float, float], ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()
    latencies: tuple[tuple[int, float, float], ...] = ()
    dense_ms: float | None = None
    phases: tuple[tuple[str, int, int], ...] = ()
    predicted_ms: float | None = None
    result: Any = None
    final: Any = None
    sizes: tuple[int, int] | None = None
    origin: str = ""

    @property
    def name(self) -> str:
        """What a reader calls the run, as in "run 2, solved"."""
        origin = ORIGINS.get(self.origin)
        return f"run {self.number}, {origin}" if origin else f"run {self.number}"

    @property
    def active(self) -> bool:
        """Whether the run is still going on."""
        return self.status in ("running", "paused", "stopping")

    @property
    def accuracy(self) -> float | None:
        """Latest accuracy: that of the result when there is one, a fraction."""
        if self.result is not None:
            return float(self.result.accuracy)
        return self.evaluations[-1][1] if self.evaluations else None

    @property
    def dense_accuracy(self) -> float | None:
        """Accuracy before the run, on the same images as `accuracy`."""
        if self.result is not None:
            return float(self.result.dense_accuracy)
        return self.evaluations[0][1] if self.evaluations and self.evaluations[0][0] == 0 else None

    @property
    def latency(self) -> tuple[float, float] | None:
        """Latest measured latency and its spread, in milliseconds."""
        if self.final is not None:
            return self.final.pruned.latency_ms, self.final.pruned.spread_ms
        return self.latencies[-1][1:] if self.latencies else None

    @property
    def speedup(self) -> float | None:
        """Dense time over the latest measured time."""
        latency, dense = self.latency, self.dense
        return dense[1] / latency[0] if latency and dense else None

    @property
    def dense(self) -> tuple[str, float] | None:
        """Name and latency in milliseconds of the dense network that `speedup` refers to; the name is empty during the run."""
        if self.final is not None:
            return self.final.baseline, self.final.dense[self.final.baseline].latency_ms
        return ("", self.dense_ms) if self.dense_ms else None


class RunRecorder:
    """Turns the events of a run into records. Used by the worker only."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._every = 1

    def add(self, event: Any) -> RunRecord:
        """Take one event in and return the new record."""
        old = self.record
        kind = type(event).__name__
        # By name, so that importing the widgets does not import torch; the names are part of the contract between the rooms.
        if kind == "StepEvent":
            self._every = max(1, event.total_steps // MAX_STEPS)
            keep = event.step % self._every == 0 or event.step == event.total_steps
            steps = (*old.steps, (event.step, event.sparsity, event.loss)) if keep else old.steps
            self.record = dataclasses.replace(
                old,
                step=event.step,
                total_steps=event.total_steps,
                phase=event.phase,
                loss=event.loss,
                learning_rate=event.learning_rate,
                sparsity=event.sparsity,
                seconds_left=event.seconds_left,
                steps=steps,
                phases=_extend(old.phases, event.phase, event.step),
            )
        elif kind == "EvalEvent":
            self.record = dataclasses.replace(
                old, evaluations=(*old.evaluations, (event.step, event.accuracy))
            )
        elif kind == "LatencyEvent":
            measured = (event.step, event.latency_ms, event.spread_ms)
            self.record = dataclasses.replace(
                old, latencies=(*old.latencies, measured), dense_ms=event.dense_ms
            )
        elif kind == "DoneEvent":
            status: RunStatus = "stopped" if event.result.stopped else "done"
            self.record = dataclasses.replace(old, status=status, result=event.result, seconds_left=0.0)
        return self.record


def _extend(
    phases: tuple[tuple[str, int, int], ...], phase: str, step: int
) -> tuple[tuple[str, int, int], ...]:
    """Return `phases` (name, first step, last step) with `step` added to the last, or a new phase begun."""
    if phases and phases[-1][0] == phase:
        return (*phases[:-1], (phase, phases[-1][1], step))
    return (*phases, (phase, step, step))


def renewed(runs: tuple[RunRecord, ...], run: RunRecord) -> tuple[RunRecord, ...]:
    """Return `runs` with `run` in its place, or behind them when it is new; not bounded."""
    if any(kept.number == run.number for kept in runs):
        return tuple(run if kept.number == run.number else kept for kept in runs)
    return (*runs, run)
