"""The five numbers on top: how sparse, how fast, how much faster, how good, how small.

A number belongs to the distribution on the page. While a run to that distribution goes on, or when it is over, the numbers are
measured ones and the prediction stands below; otherwise they are predictions, and say so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from explorer.widgets import assets
from explorer.widgets.base import StateView

if TYPE_CHECKING:
    from explorer.widgets.runs import RunRecord
    from explorer.widgets.state import ExplorerState

WEIGHT_BYTES = 4
"""Bytes of one float32 weight."""


class Metrics(StateView):
    """The key figures."""

    _esm = assets.module("metrics", "link")
    _css = assets.style("metrics")
    watches = (
        "study",
        "layers",
        "distribution",
        "prediction",
        "feasible",
        "dense",
        "run",
        "trust",
        "background",
    )

    def make_view(self) -> dict[str, Any]:
        """Return the five tiles."""
        return {"tiles": tiles(self.state)}


def tiles(state: ExplorerState) -> list[dict[str, Any]]:
    """Return label, value, unit, notes and tone of each of the five numbers, as texts."""
    run = state.run if state.run is not None and state.run.distribution == state.distribution else None
    live = "live" if run is not None and run.active else ""
    return [
        {"tone": live, **tile}
        for tile in (
            _sparsity(state, run),
            _latency(state, run),
            _speedup(state, run),
            _accuracy(state, run),
            _size(state, run),
        )
    ]


def is_noisy(latency_ms: float, spread_ms: float) -> bool:
    """Return whether the interquartile half-range is more than a twentieth of the median: the machine was not quiet."""
    return spread_ms > latency_ms / 20


def _sparsity(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "sparsity",
        "label": "Sparsity",
        "unit": "%",
        "help": "Share of the prunable weights that are zero, over all layers.",
    }
    if state.distribution is None:
        return _nothing(tile)
    n_params = sum(layer.n_params for layer in state.layers)
    asked = sum(layer.n_params * state.distribution[layer.name] for layer in state.layers) / max(1, n_params)
    if run is None:
        kept = count(n_params * (1 - asked))
        return tile | {
            "value": f"{100 * asked:.1f}",
            "note": "asked for",
            "more": f"{kept} of {count(n_params)} weights stay",
        }
    achieved = run.result.sparsity if run.result is not None else run.sparsity
    return tile | {
        "value": f"{100 * achieved:.1f}",
        "note": f"achieved; asked {100 * asked:.1f} %",
        "more": f"{count(n_params * (1 - achieved))} of {count(n_params)} weights left",
    }


def _latency(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "latency",
        "label": "Latency",
        "unit": "ms",
        "help": "Median time of one batch on the sparse engine, on this machine.",
    }
    prediction = state.prediction
    predicted = f"{_ms(prediction.latency_ms)} ms" if prediction is not None else ""
    dense = f"dense {_ms(state.dense.latency_ms)} ms" if state.dense is not None else ""
    measured = run.latency if run is not None else None
    if measured is not None:
        value, spread = measured
        if run is not None and run.dense is not None:
            dense = f"dense {_ms(run.dense[1])} ms"
        return tile | {
            "label": "Latency, measured",
            "value": _ms(value),
            "note": _joined(f"± {_digits(spread)} ms", dense),
            "more": _joined(
                f"predicted {predicted}" if predicted else "",
                "noisy: the machine is busy" if is_noisy(value, spread) else "",
            ),
        }
    if prediction is None:
        return _nothing(tile, "predicted once it is measured", dense)
    error = getattr(prediction, "latency_error_ms", None)
    return tile | {
        "label": "Latency, predicted",
        "value": _ms(prediction.latency_ms),
        "note": _joined(f"± {_digits(error)} ms" if error else "", dense),
        "more": "from the measured layers",
    }


def _speedup(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "speedup",
        "label": "Speed-up",
        "unit": "×",
        "help": "Time of the fastest dense run over time of the sparse run; same machine, threads and batch.",
    }
    against = f"against {state.dense.name}" if state.dense is not None else ""
    highest = state.feasible[1]
    reach = f"within reach: up to {highest:.1f} ×" if highest else ""
    if run is not None and run.speedup is not None:
        predicted = f"predicted {state.prediction.speedup:.2f} ×" if state.prediction is not None else ""
        if run.dense is not None and run.dense[0]:
            against = f"against {run.dense[0]}"
        return tile | {
            "label": "Speed-up, measured",
            "value": f"{run.speedup:.2f}",
            "note": against,
            "more": predicted,
        }
    if state.prediction is None:
        return _nothing(tile, "predicted once it is measured", against)
    return tile | {
        "label": "Speed-up, predicted",
        "value": f"{state.prediction.speedup:.2f}",
        "note": against,
        "more": reach,
    }


def _accuracy(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "accuracy",
        "label": "Accuracy",
        "unit": "%",
        "help": "Share of images that the network gets right.",
    }
    if run is not None and run.accuracy is not None and not math.isnan(run.accuracy):
        dense = f"dense {_percent(run.dense_accuracy)}" if run.dense_accuracy is not None else ""
        if run.result is None:
            return tile | {
                "label": "Accuracy, live",
                "value": f"{100 * run.accuracy:.1f}",
                "note": dense,
                "more": "on validation images",
            }
        where = f"on {run.result.n_evaluated:,} {run.result.measured_on} images"
        return tile | {
            "label": "Accuracy, after the run",
            "value": f"{100 * run.accuracy:.1f}",
            "note": dense,
            "more": where,
        }
    accuracy = getattr(state.prediction, "accuracy", None)
    if accuracy is None or math.isnan(accuracy):
        return _nothing(tile, "estimated once it is measured")
    return tile | {
        "label": "Accuracy, untrained",
        "value": f"{100 * accuracy:.1f}",
        "note": "estimated from single layers;",
        "more": "a run recovers most of it" if not state.provenance else "training recovers most of it",
        "tone": "quiet",
        "badge": _badge(state),
    }


_VERDICTS = {
    "agrees": ("good", "checked: agrees"),
    "worse": ("warn", "checked: worse together"),
    "better": ("good", "checked: better together"),
}


def _badge(state: ExplorerState) -> dict[str, str] | None:
    """Return what became of the prediction when all layers were pruned at once; None when that is not measured."""
    trust = state.trust
    if trust is None:
        return {"tone": "", "text": "checking …", "help": ""} if "prediction" in state.background else None
    tone, text = _VERDICTS[trust.verdict]
    what = "divergence" if trust.kind == "kl" else "increase of the loss"
    error = f" ± {_digits(trust.std_error)}" if trust.std_error else ""
    return {
        "tone": tone,
        "text": text,
        "help": f"Before any training the layers' curves add up to a {what} of {_digits(trust.predicted)}; with all layers pruned at once it is "
        f"{_digits(trust.measured)}{error} (nats). Within a factor of two counts as agreeing. Beyond it the curves still tell which layers mind most, but not what all of them together will cost.",
    }


def _size(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "size",
        "label": "File, zeros left out",
        "unit": "MB",
        "help": "Prunable weights stored sparse: the values that stay and where they are.",
    }
    if state.distribution is None:
        return _nothing(tile)
    dense = WEIGHT_BYTES * sum(layer.n_params for layer in state.layers)
    size = getattr(state.prediction, "size_bytes", None)
    if run is not None and run.sizes is not None:
        dense, size = run.sizes
    if size is None:
        return _nothing(tile, "predicted once it is measured", f"dense {_megabytes(dense)} MB")
    return tile | {
        "value": _megabytes(size),
        "note": f"dense {_megabytes(dense)} MB",
        "more": f"{dense / size:.1f} × smaller",
    }


def _nothing(tile: dict[str, Any], note: str = "", more: str = "") -> dict[str, Any]:
    return tile | {"value": "–", "unit": "", "note": note, "more": more}


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _ms(value: float) -> str:
    """Return milliseconds with three significant digits, and nothing below a tenth of a microsecond: more is noise."""
    if value < 0.1:
        return f"{value:.4f}"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _digits(value: float) -> str:
    return f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def count(value: float) -> str:
    """Return a count with three significant digits, such as "1.23 M"."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.3g}"
