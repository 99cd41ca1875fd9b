"""The five numbers on top: how sparse, how fast, how much faster, how good, how small.

A number belongs to the distribution on the page. While a run to that distribution goes on, or when it is over, the numbers are
measured ones and the prediction stands below; otherwise they are predictions, and say so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from explorer.widgets import assets
from explorer.widgets.base import StateView
from explorer.widgets.runs import images_of
from explorer.widgets.texts import phrase

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
        "label": phrase("figures.sparsity.name"),
        "unit": "%",
        "help": phrase("figures.sparsity.help"),
    }
    if state.distribution is None:
        return _nothing(tile)
    n_params = sum(layer.n_params for layer in state.layers)
    asked = sum(layer.n_params * state.distribution[layer.name] for layer in state.layers) / max(1, n_params)
    if run is None:
        kept = count(n_params * (1 - asked))
        return tile | {
            "value": f"{100 * asked:.1f}",
            "note": phrase("figures.sparsity.asked"),
            "more": phrase("figures.sparsity.stay", kept=kept, total=count(n_params)),
        }
    achieved = run.result.sparsity if run.result is not None else run.sparsity
    return tile | {
        "value": f"{100 * achieved:.1f}",
        "note": phrase("figures.sparsity.achieved", asked=f"{100 * asked:.1f}"),
        "more": phrase("figures.sparsity.left", kept=count(n_params * (1 - achieved)), total=count(n_params)),
    }


def _latency(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "latency",
        "label": phrase("figures.latency.name"),
        "unit": "ms",
        "help": phrase("figures.latency.help"),
    }
    prediction = state.prediction
    predicted = (
        phrase("figures.latency.predicted_note", latency=_ms(prediction.latency_ms))
        if prediction is not None
        else ""
    )
    dense = (
        phrase("figures.latency.dense", latency=_ms(state.dense.latency_ms))
        if state.dense is not None
        else ""
    )
    measured = run.latency if run is not None else None
    if measured is not None:
        value, spread = measured
        if run is not None and run.dense is not None:
            dense = phrase("figures.latency.dense", latency=_ms(run.dense[1]))
        return tile | {
            "label": phrase("figures.latency.measured"),
            "value": _ms(value),
            "note": _joined(phrase("figures.latency.spread", spread=spread_of(_ms(value), spread)), dense),
            "more": _joined(
                predicted,
                phrase("figures.latency.noisy") if is_noisy(value, spread) else "",
            ),
        }
    if prediction is None:
        return _nothing(tile, phrase("figures.predicted_later"), dense)
    error = getattr(prediction, "latency_error_ms", None)
    latency = _ms(prediction.latency_ms)
    return tile | {
        "label": phrase("figures.latency.predicted"),
        "value": latency,
        "note": _joined(
            phrase("figures.latency.spread", spread=spread_of(latency, error)) if error else "", dense
        ),
        "more": phrase("figures.latency.from_layers"),
    }


def _speedup(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "speedup",
        "label": phrase("figures.speedup.name"),
        "unit": "×",
        "help": phrase("figures.speedup.help"),
    }
    against = phrase("figures.speedup.against", dense=state.dense.name) if state.dense is not None else ""
    highest = state.feasible[1]
    reach = phrase("figures.speedup.reach", highest=f"{highest:.1f}") if highest else ""
    if run is not None and run.speedup is not None:
        predicted = (
            phrase("figures.speedup.predicted_note", speedup=f"{state.prediction.speedup:.2f}")
            if state.prediction is not None
            else ""
        )
        if run.dense is not None and run.dense[0]:
            against = phrase("figures.speedup.against", dense=run.dense[0])
        return tile | {
            "label": phrase("figures.speedup.measured"),
            "value": f"{run.speedup:.2f}",
            "note": against,
            "more": predicted,
        }
    if state.prediction is None:
        return _nothing(tile, phrase("figures.predicted_later"), against)
    return tile | {
        "label": phrase("figures.speedup.predicted"),
        "value": f"{state.prediction.speedup:.2f}",
        "note": against,
        "more": reach,
    }


def _accuracy(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "accuracy",
        "label": phrase("figures.accuracy.name"),
        "unit": "%",
        "help": phrase("figures.accuracy.help"),
    }
    if run is not None and run.accuracy is not None and not math.isnan(run.accuracy):
        dense = (
            phrase("figures.accuracy.dense", accuracy=_percent(run.dense_accuracy))
            if run.dense_accuracy is not None
            else ""
        )
        if run.result is None:
            return tile | {
                "label": phrase("figures.accuracy.live"),
                "value": f"{100 * run.accuracy:.1f}",
                "note": dense,
                "more": phrase("figures.accuracy.on_validation"),
            }
        where = phrase(
            "figures.accuracy.on", images=images_of(run.result.n_evaluated, run.result.measured_on)
        )
        return tile | {
            "label": phrase("figures.accuracy.after_run"),
            "value": f"{100 * run.accuracy:.1f}",
            "note": dense,
            "more": where,
        }
    accuracy = getattr(state.prediction, "accuracy", None)
    if accuracy is None or math.isnan(accuracy):
        return _nothing(tile, phrase("figures.accuracy.later"))
    return tile | {
        "label": phrase("figures.accuracy.untrained"),
        "value": f"{100 * accuracy:.1f}",
        "note": phrase("figures.accuracy.estimated"),
        "more": phrase("figures.accuracy.run_recovers")
        if not state.provenance
        else phrase("figures.accuracy.training_recovers"),
        "tone": "quiet",
        "badge": _badge(state),
    }


_VERDICTS = {
    "agrees": ("good", phrase("figures.trust.agrees")),
    "worse": ("warn", phrase("figures.trust.worse")),
    "better": ("good", phrase("figures.trust.better")),
}


def _badge(state: ExplorerState) -> dict[str, str] | None:
    """Return what became of the prediction when all layers were pruned at once; None when that is not measured."""
    trust = state.trust
    if trust is None:
        return (
            {"tone": "", "text": phrase("figures.trust.checking"), "help": ""}
            if "prediction" in state.background
            else None
        )
    tone, text = _VERDICTS[trust.verdict]
    predicted, measured = _digits(trust.predicted), _digits(trust.measured)
    if trust.std_error:
        measured = phrase("figures.with_spread", value=measured, spread=_digits(trust.std_error))
    if trust.kind == "kl":
        explained = phrase("figures.trust.help_kl", predicted=predicted, measured=measured)
    else:
        explained = phrase("figures.trust.help_loss", predicted=predicted, measured=measured)
    return {"tone": tone, "text": text, "help": explained}


def _size(state: ExplorerState, run: RunRecord | None) -> dict[str, Any]:
    tile = {
        "key": "size",
        "label": phrase("figures.size.name"),
        "unit": "MB",
        "help": phrase("figures.size.help"),
    }
    if state.distribution is None:
        return _nothing(tile)
    dense = WEIGHT_BYTES * sum(layer.n_params for layer in state.layers)
    size = getattr(state.prediction, "size_bytes", None)
    if run is not None and run.sizes is not None:
        dense, size = run.sizes
    if size is None:
        return _nothing(
            tile, phrase("figures.predicted_later"), phrase("figures.size.dense", size=_megabytes(dense))
        )
    return tile | {
        "value": _megabytes(size),
        "note": phrase("figures.size.dense", size=_megabytes(dense)),
        "more": phrase("figures.size.smaller", times=f"{dense / size:.1f}"),
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


def spread_of(value: str, spread: float) -> str:
    """Return a spread with the decimals of the value that it belongs to, or with its first digit where those would be zeros.

    Examples
    --------
    >>> spread_of("0.109", 0.00091), spread_of("3.12", 0.0041), spread_of("29", 3.4)
    ('0.001', '0.004', '3')
    """
    text = f"{spread:.{len(value.partition('.')[2])}f}"
    return text if float(text) or not spread else f"{spread:.1g}"


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
