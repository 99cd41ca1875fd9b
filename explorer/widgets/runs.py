"""What the page knows of one pruning run: its events, gathered into a value that can be drawn.

A `RunRecord` never changes. The worker makes a new one after each event and posts it; a page that comes late, or comes back, sees
the whole run in the latest one. Long runs are thinned, so that a record stays a few kilobytes.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from explorer.memory import resident_bytes
from explorer.widgets.mask_picture import MaskPicture, limits_for, picture_of
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

RunStatus = Literal["running", "paused", "stopping", "done", "stopped", "failed"]

MAX_STEPS = 240
"""Most training steps that are kept for drawing; a chart is not much wider in pixels."""

MAX_UPDATES = 96
"""Most mask updates whose sparsities by layer and stored sizes are kept: 77 kB for 200 layers."""

MAX_MOMENTS = 24
"""Most moments of which the masks are kept as pictures."""

MASK_BUDGET = 16 << 20
"""Bytes for the pictures of all layers at all moments of a run. All layers are kept, and coarser where there are many, because which one a
reader wants to see is known only afterwards: 54 layers get 80 by 160 cells, up to 21 layers the full 128 by 256."""


@dataclass(frozen=True, slots=True)
class MaskMoment:
    """The masks of all layers after `step` steps."""

    step: int
    pictures: Mapping[str, MaskPicture]


class Thinned(Generic[T]):
    """A sequence that never holds more than `limit` of the values that were added: evenly spaced ones from the first on, and always the last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stride = 1
        self._added = 0
        self._kept: list[tuple[int, T]] = []

    def add(self, value: T) -> tuple[T, ...]:
        """Add a value and return those that are kept."""
        # The last one was kept only for being the last.
        kept = [entry for entry in self._kept if entry[0] % self._stride == 0]
        kept.append((self._added, value))
        if len(kept) > self._limit:
            self._stride *= 2
            kept = [entry for entry in kept[:-1] if entry[0] % self._stride == 0] + kept[-1:]
        self._added += 1
        self._kept = kept
        return tuple(value for _, value in kept)


MAX_RUNS = 8
"""Most runs of a session that are kept: each holds its pruned network, and more shapes and colours are not told apart in one chart."""

ORIGINS = {
    "uniform": phrase("run.origin.uniform"),
    "solved": phrase("run.origin.solved"),
    "mine": phrase("run.origin.mine"),
}
"""What a reader is told of where a distribution came from."""

STATUSES: dict[RunStatus, str] = {
    "running": phrase("run.status.running"),
    "paused": phrase("run.status.paused"),
    "stopping": phrase("run.status.stopping"),
    "done": phrase("run.status.done"),
    "stopped": phrase("run.status.stopped"),
    "failed": phrase("run.status.failed"),
}
"""What a reader is told of how a run stands."""


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
    steps : tuple of (step, sparsity, loss, learning_rate)
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
    options : object
        The `RunOptions` that it was started with.
    layers : tuple of (step, sparsities)
        Sparsity of each layer after mask updates, fractions in the order of `distribution`.
    stored : tuple of (step, bytes)
        Size of the network with zeros left out, after mask updates; step 0 is the network as it came.
    moments : tuple of MaskMoment
        Pictures of the masks, evenly spread over the mask updates.
    seconds : float
        Since the start, pauses included.
    memory : (int, bool) or None
        Bytes of the whole process, see `explorer.memory.resident_bytes`.
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
    steps: tuple[tuple[int, float, float, float], ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()
    latencies: tuple[tuple[int, float, float], ...] = ()
    dense_ms: float | None = None
    phases: tuple[tuple[str, int, int], ...] = ()
    predicted_ms: float | None = None
    result: Any = None
    final: Any = None
    sizes: tuple[int, int] | None = None
    options: Any = None
    layers: tuple[tuple[int, tuple[float, ...]], ...] = ()
    stored: tuple[tuple[int, int], ...] = ()
    moments: tuple[MaskMoment, ...] = ()
    seconds: float = 0.0
    memory: tuple[int, bool] | None = None
    origin: str = ""

    @property
    def name(self) -> str:
        """What a reader calls the run, as in "run 2, solved"."""
        origin = ORIGINS.get(self.origin)
        return phrase("run.named", number=self.number, origin=origin) if origin else self.short_name

    @property
    def short_name(self) -> str:
        """What a reader calls the run where there is little room, as in "run 2"."""
        return phrase("run.short", number=self.number)

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
    """Turns the events of a run into records. Used by the worker only.

    Parameters
    ----------
    record : RunRecord
        What is known before the first event.
    stored_bytes : callable, optional
        Size of the network when layers have so many zeros, see `Study.stored_bytes`; without it sizes are not recorded.
    groups : mapping of str to int
        Groups of grouped convolutions, by layer.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        record: RunRecord,
        *,
        stored_bytes: Callable[[Mapping[str, int]], int] | None = None,
        groups: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.record = record
        self._stored_bytes = stored_bytes
        self._groups = groups or {}
        self._clock = clock
        self._started = clock()
        self._every = 1
        self._layers: Thinned[tuple[int, tuple[float, ...]]] = Thinned(MAX_UPDATES)
        self._stored: Thinned[tuple[int, int]] = Thinned(MAX_UPDATES)
        self._moments: Thinned[MaskMoment] = Thinned(MAX_MOMENTS)

    def add(self, event: Any) -> RunRecord:
        """Take one event in and return the new record."""
        old = self.record
        kind = type(event).__name__
        # By name, so that importing the widgets does not import torch; the names are part of the contract between the rooms.
        if kind == "StepEvent":
            self._every = max(1, event.total_steps // MAX_STEPS)
            keep = event.step % self._every == 0 or event.step == event.total_steps
            steps = (
                (*old.steps, (event.step, event.sparsity, event.loss, event.learning_rate))
                if keep
                else old.steps
            )
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
                seconds=self._clock() - self._started,
                memory=resident_bytes() if keep else old.memory,
            )
        elif kind == "MaskEvent":
            self.record = self._with_masks(old, event)
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

    def _with_masks(self, old: RunRecord, event: Any) -> RunRecord:
        rows, columns = limits_for(len(event.masks), MAX_MOMENTS, MASK_BUDGET)
        pictures = {
            name: picture_of(mask, groups=self._groups.get(name, 1), max_rows=rows, max_columns=columns)
            for name, mask in event.masks.items()
        }
        # A layer that the distribution leaves out is not pruned.
        sparsities = tuple(
            1.0 - pictures[name].n_alive / pictures[name].n_weights if name in pictures else 0.0
            for name in old.distribution
        )
        stored = old.stored
        if self._stored_bytes is not None:
            stored = self._stored.add((event.step, self._stored_bytes(event.zeros)))
        return dataclasses.replace(
            old,
            layers=self._layers.add((event.step, sparsities)),
            stored=stored,
            moments=self._moments.add(MaskMoment(event.step, pictures)),
        )


def _extend(
    phases: tuple[tuple[str, int, int], ...], phase: str, step: int
) -> tuple[tuple[str, int, int], ...]:
    """Return `phases` (name, first step, last step) with `step` added to the last, or a new phase begun."""
    if phases and phases[-1][0] == phase:
        return (*phases[:-1], (phase, phases[-1][1], step))
    return (*phases, (phase, step, step))


def renewed(runs: tuple[RunRecord, ...], run: RunRecord) -> tuple[RunRecord, ...]:
    """Return `runs` with `run` in its place, or behind them when it is new; not bounded. Pictures of masks are those of the latest run only."""
    if any(kept.number == run.number for kept in runs):
        return tuple(run if kept.number == run.number else kept for kept in runs)
    return (*(dataclasses.replace(kept, moments=()) for kept in runs), run)


def images_of(number: int, part: str) -> str:
    """Return which images something was measured on, as in "10,000 test images".

    Parameters
    ----------
    number : int
    part : str
        Of the data: "test" or "validation"; a result in a file may name another.
    """
    shown = f"{number:,}"
    if part == "test":
        return phrase("common.images.test", count=number, images=shown)
    if part == "validation":
        return phrase("common.images.validation", count=number, images=shown)
    return phrase("common.images.other", count=number, images=shown, part=part)
