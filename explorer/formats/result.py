"""The figures of a run as JSON: what was asked, what came out, how it was measured and on what machine.

Accuracies are fractions, latencies medians in milliseconds with their interquartile half-range beside them, sizes bytes. A figure that
was not measured is null, never a number that looks like one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from explorer.atomic import write_atomically
from explorer.formats.machine import machine
from explorer.pruning.result import RunResult


class Measured(Protocol):
    """A latency as the engine reports it."""

    @property
    def latency_ms(self) -> float: ...

    @property
    def spread_ms(self) -> float: ...

    @property
    def min_ms(self) -> float: ...

    @property
    def repeats(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def isa(self) -> str: ...


@dataclass(frozen=True)
class FinalLatency:
    """The pruned network and every dense way to run it, timed in turn in one run.

    Parameters
    ----------
    pruned : Measured
        The pruned network on the sparse engine.
    dense : mapping of str to Measured
        The dense contestants by name.
    """

    pruned: Measured
    dense: Mapping[str, Measured]

    @property
    def baseline(self) -> str:
        """Name of the fastest dense contestant, which the speed-up refers to."""
        return min(self.dense, key=lambda name: self.dense[name].latency_ms)

    @property
    def speedup(self) -> float:
        """Latency of the fastest dense contestant over that of the pruned network."""
        return self.dense[self.baseline].latency_ms / self.pruned.latency_ms


def result_document(
    result: RunResult,
    *,
    latency: FinalLatency | None,
    dense_bytes: int,
    pruned_bytes: int,
    file_bytes: int,
    target: Mapping[str, float] | None = None,
    predicted: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the content of `result.json`.

    Parameters
    ----------
    result : RunResult
    latency : FinalLatency or None
        None when it was not measured; the latencies are null then.
    dense_bytes, pruned_bytes : int
        Size of the weights before, and after when zeros are left out.
    file_bytes : int
        Size of the weights' file beside the result, which keeps the zeros.
    target, predicted, seconds : mapping, optional
        What the distribution was solved for, what was predicted of it, and what each part of the work took.

    Returns
    -------
    dict
        Ready for JSON.
    """
    before = result.evaluations[0] if result.evaluations else None
    after = result.evaluations[-1] if result.evaluations else None
    return {
        "dense": {
            "accuracy": _number(result.dense_accuracy),
            **(_timing(latency.dense[latency.baseline]) if latency else _untimed()),
            "size_bytes": dense_bytes,
            "baseline": latency.baseline if latency else None,
            "contestants": {name: _timing(timed) for name, timed in latency.dense.items()} if latency else {},
        },
        "pruned": {
            "accuracy": _number(result.accuracy),
            **(_timing(latency.pruned) if latency else _untimed()),
            "speedup": latency.speedup if latency else None,
            "sparsity": result.sparsity,
            "nnz": sum(elements - zeros for zeros, elements in result.achieved.values()),
            "size_bytes": pruned_bytes,
            "file_bytes": file_bytes,
        },
        "layers": {
            name: {
                "asked": result.asked[name],
                "achieved": zeros / elements,
                "zeros": zeros,
                "n_params": elements,
            }
            for name, (zeros, elements) in result.achieved.items()
        },
        "accuracy_measured_on": {"part": result.measured_on, "samples": result.n_evaluated},
        "validation": {
            "dense_accuracy": _number(before.accuracy) if before else None,
            "accuracy": _number(after.accuracy) if after else None,
        },
        "during": {
            "evaluations": [
                {name: _number(value) for name, value in asdict(event).items()}
                for event in result.evaluations
            ],
            "latencies": [asdict(event) for event in result.latencies],
        },
        "target": dict(target) if target else None,
        "predicted": {name: _number(value) for name, value in predicted.items()} if predicted else None,
        "stopped": result.stopped,
        "failure": result.failure,
        "steps": {"made": result.step, "planned": result.total_steps},
        "seed": result.settings.seed,
        "training_threads": result.settings.threads,
        "seconds": {
            name: round(value, 3) for name, value in {"run": result.seconds, **(seconds or {})}.items()
        },
        "machine": machine()
        | (
            {
                "isa": latency.pruned.isa,
                "threads": latency.pruned.threads,
                "batch_size": latency.pruned.batch_size,
            }
            if latency
            else {}
        ),
    }


def write_result(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `document` to `path` as JSON.

    Raises
    ------
    FormatError
        If the file cannot be written.
    """
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def _timing(timed: Measured) -> dict[str, float | int]:
    return {
        "latency_ms": timed.latency_ms,
        "spread_ms": timed.spread_ms,
        "min_ms": timed.min_ms,
        "repeats": timed.repeats,
    }


def _untimed() -> dict[str, None]:
    return {"latency_ms": None, "spread_ms": None}


def _number(value: Any) -> Any:
    """Return `value`, or None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
