"""What is compared: the dense network and the runs, each as plain figures, whatever they were read from.

A figure that nobody measured is None, and is drawn as a dash: never as a number that looks like one. Accuracies and sparsities are
fractions, latencies milliseconds, sizes bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explorer.errors import FormatError
from explorer.widgets.runs import images_of
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from explorer.widgets.runs import RunRecord
    from explorer.widgets.state import ExplorerState

DENSE = "dense"
"""The key of the dense network; a run's is "run-" and its number."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """The dense network or one run.

    Parameters
    ----------
    key, name : str
        For the page, and for the reader.
    number : int
        Of the run, which chooses its shape and colour; 0 for the dense network.
    status : str
        As in `RunRecord`; "dense" for the dense network.
    accuracy, dense_accuracy : float or None
        Fractions of the same images, now and before the run.
    images : str
        What both were measured on.
    latency_ms, spread_ms, speedup : float or None
        Measured, with its interquartile half-range, and the dense network's time over it, measured in turn with it.
    predicted_ms : float or None
        Latency that was predicted before the run.
    asked, sparsity : float or None
        Over all prunable weights: what was asked for, and what there is.
    size_bytes : int or None
        Of the weights, with zeros left out.
    epochs : float or None
    points : tuple of (epoch, latency_ms, accuracy)
        Evaluations during the run, on validation images.
    is_final : bool
        Whether `accuracy` and `latency_ms` are those of a result.
    sparsities : mapping of str to float
        By layer: what there is when there is a result, else what was asked for.
    timed_on : str
        Processor, threads and batch behind the latency, where a file tells them.
    short : str
        The name where there is little room; empty for the name itself.
    """

    key: str
    name: str
    number: int
    status: str
    accuracy: float | None = None
    dense_accuracy: float | None = None
    images: str = ""
    latency_ms: float | None = None
    spread_ms: float | None = None
    speedup: float | None = None
    predicted_ms: float | None = None
    asked: float | None = None
    sparsity: float | None = None
    size_bytes: int | None = None
    epochs: float | None = None
    points: tuple[tuple[float, float, float], ...] = ()
    is_final: bool = False
    sparsities: Mapping[str, float] = field(default_factory=dict)
    timed_on: str = ""
    short: str = ""

    def to_page(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"points": [list(point) for point in self.points]}


def trajectory(run: RunRecord) -> tuple[tuple[float, float, float], ...]:
    """Pair each evaluation of a run with the latest latency measured at or before its step.

    Returns
    -------
    tuple of (epoch, latency_ms, accuracy)
        Evaluations before the first latency are left out, but for that of the network as it came, whose latency is the dense one.
    """
    per_epoch = run.total_steps / run.epochs if run.total_steps and run.epochs else math.inf
    points = []
    for step, accuracy in run.evaluations:
        earlier = [ms for measured_at, ms, _ in run.latencies if measured_at <= step]
        latency = earlier[-1] if earlier else run.dense_ms if step == 0 else None
        if latency is not None and math.isfinite(accuracy):
            points.append((step / per_epoch, latency, accuracy))
    return tuple(points)


def of_run(run: RunRecord) -> Contestant:
    """Return a run of a session as it stands."""
    result, latency = run.result, run.latency
    return Contestant(
        key=f"run-{run.number}",
        name=run.name,
        number=run.number,
        status=run.status,
        accuracy=_finite(run.accuracy),
        dense_accuracy=_finite(run.dense_accuracy),
        images=images_of(result.n_evaluated, result.measured_on)
        if result
        else phrase("compare.validation_images"),
        latency_ms=latency[0] if latency else None,
        spread_ms=latency[1] if latency else None,
        speedup=run.speedup,
        predicted_ms=run.predicted_ms,
        asked=run.asked,
        sparsity=result.sparsity if result is not None else None,
        size_bytes=run.sizes[1] if run.sizes else None,
        epochs=run.epochs,
        points=trajectory(run),
        is_final=run.final is not None,
        sparsities=_achieved(result) if result is not None else dict(run.distribution),
        short=run.short_name,
    )


def of_session(state: ExplorerState) -> tuple[Contestant, ...]:
    """Return the dense network, as far as it is known, and all runs of a session."""
    runs = tuple(of_run(run) for run in state.runs)
    accuracy, images = _dense_accuracy(state, runs)
    latest = next((run.dense for run in reversed(state.runs) if run.dense), None)
    latency = latest[1] if latest else state.dense.latency_ms if state.dense else None
    sizes = next((run.sizes for run in reversed(state.runs) if run.sizes), None)
    timed = {
        "latency_ms": latency,
        # The spread is that of the same timing, or none.
        "spread_ms": _dense_spread(state, latency),
        "size_bytes": sizes[0] if sizes else None,
    }
    return (_dense_of(accuracy, images, [layer.name for layer in state.layers], timed), *runs)


def of_results(sources: Any) -> tuple[Contestant, ...]:
    """Return the dense network and the runs behind some results.

    Parameters
    ----------
    sources : RunResult or path, or a sequence of them
        Results, or folders that `Study.save` has written.

    Raises
    ------
    FormatError
        If there is none, a folder has no readable `result.json`, or they are not of one network.
    """
    if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, Sequence):
        sources = [sources]
    if not sources:
        raise FormatError(phrase("refusal.compare.nothing"))
    pairs = [_read(source, i + 1) for i, source in enumerate(sources)]
    first = pairs[0][1]
    for dense, run in pairs[1:]:
        if set(run.sparsities) != set(first.sparsities):
            raise FormatError(phrase("refusal.compare.other_layers", one=run.name, other=first.name))
        if dense.size_bytes is not None and pairs[0][0].size_bytes not in (None, dense.size_bytes):
            raise FormatError(phrase("refusal.compare.other_sizes", one=run.name, other=first.name))
    return (next((dense for dense, _ in pairs if dense.is_final), pairs[0][0]), *(run for _, run in pairs))


def _read(source: Any, number: int) -> tuple[Contestant, Contestant]:
    if isinstance(source, (str, os.PathLike)):
        return _of_folder(Path(source), number)
    if hasattr(source, "achieved") and hasattr(source, "dense_accuracy"):
        return _of_result(source, number)
    raise FormatError(phrase("refusal.compare.no_result", sent=type(source).__name__))


def _of_result(result: Any, number: int) -> tuple[Contestant, Contestant]:
    """Return the dense network and the run of a `RunResult`, which knows no latency and no size."""
    images = images_of(result.n_evaluated, result.measured_on)
    settings = getattr(result, "settings", None)
    dense_accuracy = _finite(result.dense_accuracy)
    weights = {name: elements for name, (_, elements) in result.achieved.items()}
    run = Contestant(
        f"run-{number}",
        phrase("compare.result", number=number),
        number,
        _ended(result.stopped, getattr(result, "failure", None)),
        accuracy=_finite(result.accuracy),
        dense_accuracy=dense_accuracy,
        images=images,
        asked=_mean(dict(result.asked), weights),
        sparsity=result.sparsity,
        epochs=settings.epochs if settings is not None else None,
        sparsities=_achieved(result),
    )
    return _dense_of(dense_accuracy, images, run.sparsities), run


def _of_folder(folder: Path, number: int) -> tuple[Contestant, Contestant]:
    """Return the dense network and the run of a folder that `Study.save` has written."""
    path = folder / "result.json" if folder.suffix != ".json" else folder
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(
            phrase("refusal.compare.cannot_read", path=path, why=error.strerror or error)
        ) from error
    except ValueError as error:
        raise FormatError(phrase("refusal.compare.no_json", path=path, why=error)) from error
    try:
        pruned, dense, layers = told["pruned"], told["dense"], told["layers"]
        on = told["accuracy_measured_on"]
        images = images_of(on["samples"], str(on["part"]))
        sparsities = {name: float(layer["achieved"]) for name, layer in layers.items()}
        weights = {name: int(layer["n_params"]) for name, layer in layers.items()}
        predicted = told.get("predicted") or {}
        run = Contestant(
            f"run-{number}",
            f"{number}, {path.parent.name}" if path.parent.name else str(number),
            number,
            _ended(told["stopped"], told["failure"]),
            accuracy=pruned["accuracy"],
            dense_accuracy=dense["accuracy"],
            images=images,
            latency_ms=pruned["latency_ms"],
            spread_ms=pruned["spread_ms"],
            speedup=pruned["speedup"],
            predicted_ms=predicted.get("latency_ms"),
            asked=_mean({name: float(layer["asked"]) for name, layer in layers.items()}, weights),
            sparsity=pruned["sparsity"],
            size_bytes=pruned["size_bytes"],
            is_final=pruned["accuracy"] is not None and pruned["latency_ms"] is not None,
            sparsities=sparsities,
            timed_on=_timed_on(told.get("machine") or {}),
        )
        return _dense_of(dense["accuracy"], images, sparsities, dense), run
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            phrase("refusal.compare.no_result_file", path=path, kind=type(error).__name__, why=error)
        ) from error


def _dense_of(
    accuracy: float | None, images: str, layers: Iterable[str], timed: Mapping[str, Any] | None = None
) -> Contestant:
    timed = timed or {}
    latency = timed.get("latency_ms")
    return Contestant(
        DENSE,
        phrase("compare.dense"),
        0,
        "dense",
        accuracy=accuracy,
        dense_accuracy=accuracy,
        images=images,
        latency_ms=latency,
        spread_ms=timed.get("spread_ms"),
        speedup=1.0 if latency is not None else None,
        asked=0.0,
        sparsity=0.0,
        size_bytes=timed.get("size_bytes"),
        is_final=accuracy is not None and latency is not None,
        sparsities=dict.fromkeys(layers, 0.0),
    )


def _dense_accuracy(state: ExplorerState, runs: Sequence[Contestant]) -> tuple[float | None, str]:
    """Return the accuracy of the dense network on the images of the latest run that has one, or as the measurement found it."""
    ended = [run for run in runs if run.dense_accuracy is not None]
    with_result = [run for run in ended if run.sparsity is not None]
    if ended:
        chosen = (with_result or ended)[-1]
        return chosen.dense_accuracy, chosen.images
    curve = state.curves.of("accuracy", state.layers[0].name) if state.layers else ()
    if curve and curve[0][0] == 0:
        return float(curve[0][1]), phrase("compare.measurement_images")
    return None, ""


def _dense_spread(state: ExplorerState, latency: float | None) -> float | None:
    for run in reversed(state.runs):
        if run.final is not None and run.final.dense[run.final.baseline].latency_ms == latency:
            return float(run.final.dense[run.final.baseline].spread_ms)
    if state.dense is not None and state.dense.latency_ms == latency:
        return state.dense.spread_ms
    return None


def _timed_on(machine: Mapping[str, Any]) -> str:
    parts = []
    if machine.get("cpu") is not None:
        parts.append(str(machine["cpu"]))
    if machine.get("threads") is not None:
        parts.append(phrase("compare.timed_on.threads", threads=machine["threads"]))
    if machine.get("batch_size") is not None:
        parts.append(phrase("compare.timed_on.batch", batch=machine["batch_size"]))
    return ", ".join(parts)


def _ended(stopped: bool, failure: Any) -> str:
    return "failed" if failure else "stopped" if stopped else "done"


def _achieved(result: Any) -> dict[str, float]:
    return {name: zeros / max(1, elements) for name, (zeros, elements) in result.achieved.items()}


def _mean(sparsities: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """Return the sparsity over all weights, a fraction."""
    total = sum(weights[name] for name in sparsities)
    return sum(weights[name] * value for name, value in sparsities.items()) / max(1, total)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
