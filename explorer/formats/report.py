"""A report of a study, and of a run if there was one: one HTML file that opens anywhere, without a kernel, a script or a network.

Every figure stands with its unit, its spread and how it was measured; what was not measured is said to be missing, never left at zero.
Charts are drawn here, as SVG, and each has its numbers in a table, so that the page can be read aloud, searched, copied and printed.
"""

from __future__ import annotations

import datetime as dt
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from explorer.atomic import write_atomically
from explorer.distribution import Prediction, SparsityDistribution
from explorer.formats.machine import machine as this_machine
from explorer.formats.markup import Child, Markup, element, joined
from explorer.formats.recipe import Recipe
from explorer.formats.report_charts import Axis, Frame, Line, bar, chart
from explorer.formats.result import FinalLatency, Measured
from explorer.masks import n_zeros
from explorer.models import PrunableLayer
from explorer.pruning.result import RunResult
from explorer.sensitivity import SensitivityPoint, SensitivityTable

_ROOT = "model"
"""What a layer is called that is the whole network, whose name is empty."""

_KIND_WORDS = {
    "kl": ("divergence from the dense outputs", "nats"),
    "loss": ("increase of the loss", "nats"),
    "accuracy": ("accuracy", "%"),
}
_FLOOR = 1e-4
"""Harm in nats below which a curve lies on the axis: single images make that much noise."""

_NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """What a report tells.

    Parameters
    ----------
    model, data : str
        What they are called; `data` is empty when there are none.
    layers : sequence of PrunableLayer
        In forward order.
    threads, batch_size : int
        What latency is measured with.
    dense_bytes : int
        Size of the dense weights.
    table : SensitivityTable, optional
        What was measured of each layer.
    dense : mapping of str to Measured
        Every dense way to run the network that was timed, by name.
    distribution : SparsityDistribution, optional
        How sparse each layer shall be.
    prediction : Prediction, optional
        What the tables say of it.
    recipe : Recipe, optional
        What repeats the run, or begins it.
    result : RunResult, optional
        A run; its distribution is then `distribution`.
    latency : FinalLatency, optional
        The result and the dense contestants, timed in turn.
    pruned_bytes : int, optional
        Size of the result's weights with zeros left out.
    provenance : str, optional
        Where losses come from that were not measured here.
    """

    model: str
    data: str
    layers: Sequence[PrunableLayer]
    threads: int
    batch_size: int
    dense_bytes: int
    table: SensitivityTable | None = None
    dense: Mapping[str, Measured]
    distribution: SparsityDistribution | None = None
    prediction: Prediction | None = None
    recipe: Recipe | None = None
    result: RunResult | None = None
    latency: FinalLatency | None = None
    pruned_bytes: int | None = None
    provenance: str | None = None

    @property
    def contestants(self) -> Mapping[str, Measured]:
        """The dense contestants: those timed in turn with the result when there is one."""
        return self.latency.dense if self.latency is not None else self.dense

    @property
    def baseline(self) -> str | None:
        """Name of the fastest dense contestant, which speed-ups refer to."""
        timed = self.contestants
        return min(timed, key=lambda name: timed[name].latency_ms) if timed else None

    @property
    def harm_kind(self) -> str | None:
        """The kind of curve that tells how much a layer minds, None when no such was measured."""
        kinds = self.table.kinds if self.table is not None else ()
        return next((kind for kind in _KIND_WORDS if kind in kinds), None)


def write_report(
    content: ReportContent, path: str | os.PathLike[str], *, now: dt.datetime | None = None
) -> None:
    """Write the report to `path`.

    Raises
    ------
    FormatError
        If the file cannot be written.
    """
    write_atomically(path, report_html(content, now=now).encode())


def report_html(
    content: ReportContent,
    *,
    now: dt.datetime | None = None,
    machine: Mapping[str, str | int] | None = None,
) -> str:
    """Return the report as one HTML page.

    Parameters
    ----------
    content : ReportContent
    now : datetime, optional
        Its date; the present by default.
    machine : mapping, optional
        As `explorer.formats.machine.machine` gives it, which is the default.
    """
    now = now if now is not None else dt.datetime.now().astimezone()
    title = f"Sparsity report: {content.model}"
    head = element(
        "head",
        # A void element has no end.
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta name="generator" content="sparsity-explorer {_version()}">'),
        element("title", title),
        element("style", Markup(_style())),
    )
    main = element(
        "main",
        element("h1", title),
        element("p", _lead(content), class_="lead"),
        _facts(content, now, machine if machine is not None else this_machine()),
        _key_figures(content),
        _distribution(content),
        _run(content),
        _sensitivity(content),
        _method(content),
        _repeat(content),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', main), lang='en')}\n"


def _version() -> str:
    import explorer

    return explorer.__version__


@cache
def _style() -> str:
    return files("explorer.formats").joinpath("report.css").read_text(encoding="utf-8")


# The head


def _lead(content: ReportContent) -> str:
    if content.result is not None:
        ended = "a pruning run that was stopped early" if content.result.stopped else "a pruning run"
        return f"What {ended} made of this network, beside the dense one, and how each figure was measured."
    if content.distribution is not None:
        return "How much each layer minds being pruned, a sparsity for each, and what to expect of it. No network has been trained for this report."
    return "How much each layer of this network minds being pruned, one layer at a time."


def _facts(content: ReportContent, now: dt.datetime, machine: Mapping[str, str | int]) -> Markup:
    table = content.table
    images = table.metadata.get("n_images") if table is not None else None
    isa = content.latency.pruned.isa if content.latency is not None else None
    data = content.data or "none"
    facts: list[tuple[str, str]] = [
        ("Model", content.model),
        ("Data", f"{data}; curves from {images:,} validation images" if images else data),
        (
            "Prunable",
            f"{len(content.layers)} layers, {sum(layer.n_params for layer in content.layers):,} weights",
        ),
        (
            "Latency measured with",
            f"{content.threads} thread{'s' if content.threads > 1 else ''}, batch {content.batch_size}",
        ),
        (
            "Machine",
            f"{machine.get('cpu', 'unknown')}, {machine.get('cores', '?')} cores, {machine.get('system', '')}"
            + (f", {isa}" if isa else ""),
        ),
        (
            "Versions",
            (
                f"sparsity-explorer {machine.get('sparsity_explorer', _version())}, torch {machine.get('torch', '?')}, "
                f"numpy {machine.get('numpy', '?')}, Python {machine.get('python', '?')}"
            ),
        ),
        ("Written", f"{now:%Y-%m-%d %H:%M} {now:%Z}".rstrip()),
    ]
    if content.provenance:
        facts.append(("Where losses come from", content.provenance))
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts)
    )


# Key figures


def _key_figures(content: ReportContent) -> Markup:
    rows = [row for row in _rows(content) if any(row[1:4])]
    if not rows:
        return joined(
            element("h2", "Key figures"),
            element(
                "p",
                "There is no distribution yet, so there is nothing to expect or to compare.",
                class_="note",
            ),
        )
    columns = ["", "Dense", "Predicted, before training", "Measured, after the run", "How"]
    used = [i for i in range(5) if i in (0, 4) or any(row[i] for row in rows)]
    return joined(
        element("h2", "Key figures"),
        _tiles(content),
        element(
            "div",
            element(
                "table",
                element("caption", "Before and after"),
                element("thead", element("tr", *(_column(columns[i], number=0 < i < 4) for i in used))),
                element(
                    "tbody",
                    *(
                        element(
                            "tr",
                            element("th", row[0], scope="row"),
                            *(
                                element("td", row[i] or "–", class_="num" if i < 4 else "note")
                                for i in used[1:]
                            ),
                        )
                        for row in rows
                    ),
                ),
            ),
            **_scroll("Before and after"),
        ),
    )


def _rows(content: ReportContent) -> list[tuple[str, str, str, str, str]]:
    """Return name, dense, predicted, measured and how, as texts that are empty where there is nothing."""
    result, told, latency = content.result, content.prediction, content.latency
    table = content.table
    on = (
        f"{result.n_evaluated:,} {result.measured_on} images; ± is the standard error"
        if result is not None
        else ""
    )
    dense_accuracy = table.baseline("accuracy") if table is not None else None
    measured_dense = (
        _accuracy(result.dense_accuracy, result.n_evaluated)
        if result is not None
        else _percent(dense_accuracy)
    )
    how = "; ".join(
        part
        for part in (
            on,
            "the prediction adds up single layers, without any training, on validation images"
            if told is not None and told.accuracy is not None
            else "",
        )
        if part
    )
    dense = content.contestants[content.baseline] if content.baseline is not None else None
    rows = [
        (
            "Accuracy",
            measured_dense,
            _percent(told.accuracy, told.accuracy_error) if told is not None else "",
            _accuracy(result.accuracy, result.n_evaluated) if result is not None else "",
            how or "validation images",
        )
    ]
    if told is not None and told.kl is not None:
        rows.append(
            (
                "Divergence from the dense outputs",
                "0 nats",
                f"{told.kl:.3g}{_spread(told.kl_error, '.2g')} nats",
                "",
                "Kullback–Leibler, curves of single layers added up; ± is the standard error over images",
            )
        )
    rows += [
        (
            "Latency",
            _timed(dense.latency_ms, dense.spread_ms) if dense is not None else "",
            _timed(told.latency_ms, told.latency_error_ms) if told is not None else "",
            _timed(latency.pruned.latency_ms, latency.pruned.spread_ms) if latency is not None else "",
            (
                f"median of a batch of {content.batch_size} on {content.threads} thread{'s' if content.threads > 1 else ''}; measured ± is half the "
                "interquartile range, predicted ± what the sum of layers missed"
            ),
        ),
        (
            "Speed-up",
            "1 ×" if dense is not None else "",
            f"{told.speedup:.2f}{_spread(told.speedup_error, '.2f')} ×"
            if told is not None and told.speedup is not None
            else "",
            f"{latency.speedup:.2f}{_spread(_ratio_spread(latency), '.2f')} ×" if latency is not None else "",
            f"dense time over pruned time; dense is the fastest of those tried, {content.baseline}"
            if content.baseline
            else "dense time over pruned time",
        ),
        (
            "Sparsity",
            "0 %",
            _percent(told.sparsity, digits=2) if told is not None else _asked(content),
            _percent(result.sparsity, digits=2) if result is not None else "",
            "zeros over all prunable weights, counted",
        ),
        (
            "Weights, zeros left out",
            f"{content.dense_bytes / 1e6:.3g} MB",
            f"{told.size_bytes / 1e6:.3g} MB" if told is not None else "",
            f"{content.pruned_bytes / 1e6:.3g} MB" if content.pruned_bytes is not None else "",
            "float32 values that stay and one bit a weight that says where, no entropy coding",
        ),
    ]
    return rows if told is not None or result is not None or content.distribution is not None else []


def _tiles(content: ReportContent) -> Markup:
    """Return the three or four figures that one looks for first."""
    result, told, latency = content.result, content.prediction, content.latency
    tiles: list[tuple[str, str, str]] = []
    if result is not None and math.isfinite(result.accuracy):
        tiles.append(
            (
                "Accuracy, measured",
                _percent(result.accuracy, digits=2),
                f"dense {_percent(result.dense_accuracy, digits=2)}, {_points_apart(result)}",
            )
        )
    if latency is not None:
        tiles.append(("Speed-up, measured", f"{latency.speedup:.2f} ×", f"against {latency.baseline}"))
        timed = latency.pruned
        tiles.append(("Latency, measured", f"{_ms(timed.latency_ms)} ms", f"± {_ms(timed.spread_ms)} ms"))
    elif told is not None and told.speedup is not None and told.latency_ms is not None:
        error = f"± {told.speedup_error:.2f}" if told.speedup_error is not None else "spread not known"
        tiles.append(("Speed-up, predicted", f"{told.speedup:.2f} ×", error))
        error = (
            f"± {_ms(told.latency_error_ms)} ms" if told.latency_error_ms is not None else "spread not known"
        )
        tiles.append(("Latency, predicted", f"{_ms(told.latency_ms)} ms", error))
    if result is not None:
        tiles.append(("Sparsity, achieved", _percent(result.sparsity, digits=2), f"asked {_asked(content)}"))
    elif content.distribution is not None:
        tiles.append(("Sparsity, asked", _asked(content), "zeros over all prunable weights"))
    return element(
        "div",
        *(
            element("div", element("span", name), element("b", value), element("span", more))
            for name, value, more in tiles
        ),
        class_="figures",
    )


def _points_apart(result: RunResult) -> str:
    return f"{100 * (result.accuracy - result.dense_accuracy):+.2f} points".replace("-", "−")


def _asked(content: ReportContent) -> str:
    if content.distribution is None:
        return ""
    total = sum(layer.n_params for layer in content.layers)
    asked = sum(layer.n_params * content.distribution.get(layer.name, 0.0) for layer in content.layers)
    return _percent(asked / max(1, total), digits=2)


def _ratio_spread(latency: FinalLatency) -> float:
    """Return the spread of the speed-up, from those of its two times."""
    dense, pruned = latency.dense[latency.baseline], latency.pruned
    return latency.speedup * math.hypot(
        dense.spread_ms / dense.latency_ms, pruned.spread_ms / pruned.latency_ms
    )


# Distribution


def _distribution(content: ReportContent) -> Markup | None:
    distribution, result = content.distribution, content.result
    if distribution is None:
        return None
    total_asked, total_zeros, total = 0.0, 0, 0
    is_timed = any(layer.dense_ms is not None for layer in content.layers)
    rows: list[Markup] = []
    for layer in content.layers:
        asked = distribution.get(layer.name, 0.0)
        zeros, elements = n_zeros(layer.n_params, asked), layer.n_params
        if result is not None and layer.name in result.achieved:
            zeros, elements = result.achieved[layer.name]
        total_asked, total_zeros, total = (
            total_asked + asked * elements,
            total_zeros + zeros,
            total + elements,
        )
        achieved = zeros / max(1, elements)
        name = layer.name or _ROOT
        words = f"{name}: {_percent(achieved, digits=2)} of {elements:,} weights are zero, asked {_percent(asked, digits=2)}"
        rows.append(
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", bar(achieved, asked, words), class_="wide"),
                element("td", _percent(asked, digits=2), class_="num"),
                element("td", _percent(achieved, digits=2), class_="num") if result is not None else None,
                element("td", f"{zeros:,} of {elements:,}", class_="num"),
                element("td", _times(layer), class_="num") if is_timed else None,
                element("td", _held(distribution, layer.name)),
            )
        )
    rows.append(
        element(
            "tr",
            element("th", element("b", "all layers"), scope="row"),
            element("td", "", class_="wide"),
            element("td", _percent(total_asked / max(1, total), digits=2), class_="num"),
            element("td", _percent(total_zeros / max(1, total), digits=2), class_="num")
            if result is not None
            else None,
            element("td", f"{total_zeros:,} of {total:,}", class_="num"),
            element("td", "") if is_timed else None,
            element("td", ""),
        )
    )
    columns = ("Asked", "Achieved", "Zeros") if result is not None else ("Asked", "Zeros")
    recipe = content.recipe
    solved = (
        " It was solved for "
        + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in recipe.target.items())
        + "."
        if recipe is not None and recipe.target
        else ""
    )
    return joined(
        element("h2", "Distribution"),
        element(
            "p",
            f"How sparse each layer is: the bar is what was achieved, the tick what was asked.{solved}",
            class_="note",
        )
        if result is not None
        else element("p", f"How sparse each layer shall be.{solved}", class_="note"),
        element(
            "div",
            element(
                "table",
                element("caption", "Sparsity of each layer"),
                element(
                    "thead",
                    element(
                        "tr",
                        _column("Layer"),
                        _column("Zeros, share of the layer's weights"),
                        *(_column(name, number=True) for name in columns),
                        _column("Dense time", number=True) if is_timed else None,
                        _column("Held"),
                    ),
                ),
                element("tbody", *rows),
                class_="bars",
            ),
            **_scroll("Sparsity of each layer"),
        ),
    )


def _times(layer: PrunableLayer) -> str:
    if layer.dense_ms is None:
        return "–"
    share = f" ({layer.share:.0%})" if layer.share is not None else ""
    return f"{_ms(layer.dense_ms)} ms{share}"


def _held(distribution: SparsityDistribution, name: str) -> str:
    if name not in distribution:
        return ""
    words = ["locked"] if name in distribution.locked else []
    others = [other or _ROOT for other in distribution.group_of(name) if other != name]
    return "; ".join([*words, *([f"tied to {', '.join(others)}"] if others else [])])


# The run


def _run(content: ReportContent) -> Markup | None:
    result = content.result
    if result is None:
        return None
    settings = result.settings
    per_step = settings.epochs / max(1, result.total_steps)
    made = f"{result.step:,} of {result.total_steps:,} steps in {result.seconds:,.0f} s"
    words = (
        f"{settings.method.upper()}, {settings.epochs:g} epochs planned, {made}; seed {settings.seed}. "
        f"Training alone for {settings.stabilise:.0%} of the run, weights removed during {settings.ramp:.0%}, fine-tuning for the rest."
    )
    if result.failure:
        words += f" It could not go on: {result.failure} The network is the last good one."
    elif result.stopped:
        words += " It was stopped early; the network is what it had reached."
    parts: list[Child] = [element("h2", "The run"), element("p", words, class_="note")]
    points = result.evaluations
    if not points:
        parts.append(element("p", "Nothing was evaluated during the run.", class_="note"))
        return joined(*parts)
    x = Axis(0.0, max(settings.epochs, points[-1].step * per_step))
    frame = Frame(350, 190, left=46, bottom=24)
    accuracies = [100 * event.accuracy for event in points]
    sparsities = [100 * event.sparsity for event in points]
    # A chart of accuracy that begins at zero shows nothing; its axis says where it begins.
    low, high = min(accuracies), max(accuracies)
    room = max(0.5, 0.12 * (high - low))

    def drawn(
        name: str,
        caption: str,
        y: Axis,
        line: Line,
        words: Callable[[float], str],
        tone: str,
        level: tuple[float, str] | None = None,
    ) -> Markup:
        return element(
            "figure",
            element("figcaption", element("b", name), caption),
            chart(
                f"{name} over epochs",
                x,
                y,
                [line],
                frame,
                x_words=lambda v: f"{v:g}",
                y_words=words,
                level=level,
            ),
            class_=f"run {tone}".strip(),
        )

    charts = [
        drawn(
            "Accuracy",
            ", % of validation images, over epochs; dashed: before the run",
            Axis(low - room, min(100.0, high + room)),
            Line([(event.step * per_step, value) for event, value in zip(points, accuracies, strict=True)]),
            lambda v: f"{v:g}",
            "blue",
            (accuracies[0], "dense") if points[0].step == 0 else None,
        ),
        drawn(
            "Sparsity",
            ", % of prunable weights that are zero, over epochs",
            Axis(0.0, 100.0),
            Line([(event.step * per_step, value) for event, value in zip(points, sparsities, strict=True)]),
            lambda v: f"{v:g}",
            "cool",
        ),
    ]
    times = {event.step: event for event in result.latencies}
    if times:
        dense_ms = max(event.dense_ms for event in times.values())
        last = list(times.values())[-1]
        charts.append(
            drawn(
                "Latency",
                ", ms, over epochs; bars: interquartile half-range; dashed: dense, timed in turn",
                Axis(
                    0.0,
                    1.08 * max(dense_ms, *(event.latency_ms + event.spread_ms for event in times.values())),
                ),
                Line(
                    [(event.step * per_step, event.latency_ms) for event in times.values()],
                    [
                        (event.latency_ms - event.spread_ms, event.latency_ms + event.spread_ms)
                        for event in times.values()
                    ],
                ),
                lambda v: f"{v:.3g}",
                "",
                (last.dense_ms, "dense"),
            )
        )
    rows = []
    for event in points:
        timed = times.get(event.step)
        rows.append(
            element(
                "tr",
                element("th", f"{event.step * per_step:.2f}", scope="row"),
                element("td", f"{event.step:,}", class_="num"),
                element("td", _percent(event.accuracy, digits=2), class_="num"),
                element("td", f"{event.loss:.4f} nats", class_="num"),
                element("td", _percent(event.sparsity, digits=2), class_="num"),
                element("td", _timed(timed.latency_ms, timed.spread_ms) if timed else "–", class_="num"),
                element("td", f"{timed.speedup:.2f} ×" if timed else "–", class_="num"),
            )
        )
    columns = ("Step", "Accuracy", "Loss", "Sparsity", "Latency", "Speed-up")
    samples = settings.n_validation or 1000
    parts += [
        element("div", *charts, class_="grid"),
        element(
            "div",
            element(
                "table",
                element(
                    "caption",
                    f"Measured during the run, on up to {samples:,} validation images; the figures above are of {result.n_evaluated:,} {result.measured_on} images",
                ),
                element(
                    "thead",
                    element("tr", _column("Epoch"), *(_column(name, number=True) for name in columns)),
                ),
                element("tbody", *rows),
            ),
            **_scroll("Measured during the run"),
        ),
    ]
    return joined(*parts)


# Sensitivity


def _sensitivity(content: ReportContent) -> Markup | None:
    table, kind = content.table, content.harm_kind
    if table is None or not len(table):
        return joined(
            element("h2", "Sensitivity"),
            element(
                "p",
                "Not measured: no layer has been pruned on its own to see what the network makes of it.",
                class_="note",
            ),
        )
    names = [layer.name for layer in content.layers]
    has_times = any(table.has(name, "latency_ms") for name in names)
    parts: list[Child] = [
        element("h2", "Sensitivity"),
        element("p", _sensitivity_words(content), class_="note"),
    ]
    parts.append(element("div", *(_layer_figure(content, name) for name in names), class_="grid"))
    if kind is not None:
        words, unit = _KIND_WORDS[kind]
        title = f"{words[0].upper()}{words[1:]} with one layer pruned, {unit}; ± is the standard error over images"
        parts += [element("h3", "Harm by layer and sparsity"), _level_table(content, kind, title)]
    if has_times:
        title = "Latency of the layer within the pruned network, ms; ± is the spread over repeats"
        parts += [element("h3", "Latency by layer and sparsity"), _level_table(content, "latency_ms", title)]
    return joined(*parts)


def _sensitivity_words(content: ReportContent) -> str:
    table, kind = content.table, content.harm_kind
    assert table is not None
    parts = ["One layer is pruned by magnitude at a time, all others stay dense, nothing is trained."]
    if kind is not None:
        words, unit = _KIND_WORDS[kind]
        scale = (
            "" if kind == "accuracy" else f", on one logarithmic scale for all layers, from {_FLOOR:g} {unit}"
        )
        parts.append(
            f"Left, the {words} in {unit}{scale}; bars: where 95 of 100 draws of other images lie, or two standard errors."
        )
    if any(table.has(layer.name, "latency_ms") for layer in content.layers):
        parts.append("Right, the layer's time in ms, from 0.")
    if content.distribution is not None:
        parts.append("The dotted line marks the layer's sparsity in this report.")
    return " ".join(parts)


def _harm(table: SensitivityTable, kind: str, value: float) -> float:
    """Return a value as the charts show it: accuracies in per cent, losses as what they rise above the dense one."""
    if kind == "accuracy":
        return 100 * value
    return value - (table.baseline("loss") or 0.0) if kind == "loss" else value


def _layer_figure(content: ReportContent, name: str) -> Markup:
    """Return the harm and the time of one layer, side by side."""
    table, kind = content.table, content.harm_kind
    assert table is not None
    label = name or _ROOT
    layer = next(one for one in content.layers if one.name == name)
    shape = "×".join(map(str, layer.weight_shape))
    charts = []
    if kind is not None and table.has(name, kind):
        charts.append(element("div", _harm_chart(content, kind, name, label)))
    if table.has(name, "latency_ms"):
        charts.append(element("div", _time_chart(content, name, label), class_="cool"))
    if not charts:
        return element("figure", element("figcaption", element("b", label), f", {shape}: {_NOT_MEASURED}"))
    return element(
        "figure",
        element("figcaption", element("b", label), f", {shape}"),
        element("div", *charts, class_="pair"),
    )


def _harm_chart(content: ReportContent, kind: str, name: str, label: str) -> Markup:
    table = content.table
    assert table is not None
    points = _points(table, name, kind)
    values = [_harm(table, kind, point.value) for point in points]
    spread = []
    for point, value in zip(points, values, strict=True):
        if point.low is not None and point.high is not None:
            spread.append((_harm(table, kind, point.low), _harm(table, kind, point.high)))
        else:
            error = 2 * (point.std_error or 0.0) * (100 if kind == "accuracy" else 1)
            spread.append((value - error, value + error))
    y = Axis(0.0, 100.0)
    if kind != "accuracy":
        highest = _harm(table, kind, float(np.nanmax(table.values(kind))))
        y = Axis(_FLOOR, 10.0 ** math.ceil(math.log10(max(highest, 10 * _FLOOR))), logarithmic=True)
    return chart(
        f"{label}: {_KIND_WORDS[kind][0]} by sparsity",
        Axis(0.0, 1.0),
        y,
        [Line([(point.sparsity, value) for point, value in zip(points, values, strict=True)], spread)],
        Frame(176, 116, left=36, right=16),
        x_words=_half_percents,
        y_words=_power if y.logarithmic else "{:g}".format,
        x_ticks=2,
        y_ticks=3,
        mark=_mark(content, name, label),
    )


def _time_chart(content: ReportContent, name: str, label: str) -> Markup:
    table = content.table
    assert table is not None
    points = _points(table, name, "latency_ms")
    spread = [
        (point.value - (point.std_error or 0.0), point.value + (point.std_error or 0.0)) for point in points
    ]
    return chart(
        f"{label}: latency in ms by sparsity",
        Axis(0.0, 1.0),
        Axis(0.0, 1.1 * max(high for _, high in spread) or 1.0),
        [Line([(point.sparsity, point.value) for point in points], spread)],
        Frame(176, 116, left=44, right=16),
        x_words=_half_percents,
        y_words="{:.3g}".format,
        x_ticks=2,
        y_ticks=3,
        mark=_mark(content, name, label),
    )


def _points(table: SensitivityTable, name: str, kind: str) -> list[SensitivityPoint]:
    found = [table.point(name, level, kind) for level in table.levels(kind, name)]
    return [point for point in found if point is not None]


def _mark(content: ReportContent, name: str, label: str) -> tuple[float, str] | None:
    sparsity = content.distribution.get(name) if content.distribution is not None else None
    return None if sparsity is None else (sparsity, f"{label} at {_percent(sparsity, digits=2)}")


def _half_percents(value: float) -> str:
    return f"{100 * value:g} %"


def _power(value: float) -> str:
    return f"{value:g}" if value >= 0.001 else f"1e{round(math.log10(value))}"


def _level_table(content: ReportContent, kind: str, title: str) -> Markup:
    """Return layers by levels, each cell with its spread and a colour for how much it is."""
    table = content.table
    assert table is not None
    layers = [layer.name for layer in content.layers if table.has(layer.name, kind)]
    # Levels that only a few layers were refined at would be columns of gaps; they are in the charts, and in the CSV.
    levels = [
        level
        for level in table.levels(kind)
        if 2 * sum(table.point(name, level, kind) is not None for name in layers) >= len(layers)
    ]
    rows = []
    for name in layers:
        cells = []
        first = table.point(name, 0.0, kind)
        for level in levels:
            point = table.point(name, level, kind)
            if point is None:
                cells.append(element("td", "–"))
                continue
            value = _harm(table, kind, point.value)
            if kind == "latency_ms":
                dense = first.value if first is not None else point.value
                text, tone = _ms(value), _shade("c", 1.0 - value / dense if dense > 0 else 0.0)
                error = f"± {_ms(point.std_error)}" if point.std_error is not None else None
            else:
                place = (
                    1 - value / 100
                    if kind == "accuracy"
                    else Axis(_FLOOR, 10.0, logarithmic=True).place(value)
                )
                factor = 100 if kind == "accuracy" else 1
                text, tone = (f"{value:.1f}" if kind == "accuracy" else _nats(value)), _shade("q", place)
                error = f"± {factor * point.std_error:.1g}" if point.std_error else None
            small = element("small", error) if error else None
            cells.append(element("td", text, small, class_=tone))
        rows.append(element("tr", element("th", name or _ROOT, scope="row"), *cells))
    left_out = len({p.sparsity for p in table.points if p.kind == kind and not p.refreshed} - set(levels))
    note = (
        f" {left_out} further levels, measured where single curves bend, are in the charts only."
        if left_out
        else ""
    )
    return element(
        "div",
        element(
            "table",
            element("caption", f"{title}.{note}"),
            element(
                "thead",
                element(
                    "tr", _column("Layer"), *(_column(f"{100 * level:g} %", number=True) for level in levels)
                ),
            ),
            element("tbody", *rows),
            class_="heat",
        ),
        **_scroll(title),
    )


def _shade(hue: str, place: float) -> str | None:
    """Return the class of a cell's colour, None for the lightest, which has none."""
    step = min(5, max(0, round(5 * place)))
    return f"{hue}{step}" if step else None


def _nats(value: float) -> str:
    if abs(value) < 0.00005:
        return "0"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


# How, and how again


def _method(content: ReportContent) -> Markup:
    parts: list[Child] = [element("h2", "How it was measured")]
    if content.contestants:
        rows = [
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", _timed(timed.latency_ms, timed.spread_ms), class_="num"),
                element("td", f"{_ms(timed.min_ms)} ms", class_="num"),
                element("td", f"{timed.repeats:,}", class_="num"),
                element("td", "baseline of every speed-up" if name == content.baseline else ""),
            )
            for name, timed in content.contestants.items()
        ]
        if content.latency is not None:
            timed = content.latency.pruned
            rows.insert(
                0,
                element(
                    "tr",
                    element("th", "engine sparse", scope="row"),
                    element("td", _timed(timed.latency_ms, timed.spread_ms), class_="num"),
                    element("td", f"{_ms(timed.min_ms)} ms", class_="num"),
                    element("td", f"{timed.repeats:,}", class_="num"),
                    element("td", "the pruned network"),
                ),
            )
        caption = f"Latencies of a batch of {content.batch_size} on {content.threads} thread{'s' if content.threads > 1 else ''}, timed in turn in one run"
        parts.append(
            element(
                "div",
                element(
                    "table",
                    element("caption", caption),
                    element(
                        "thead",
                        element(
                            "tr",
                            _column("Network"),
                            *(
                                _column(name, number=True)
                                for name in ("Median ± half interquartile range", "Fastest", "Repeats")
                            ),
                            _column(""),
                        ),
                    ),
                    element("tbody", *rows),
                ),
                **_scroll(caption),
            )
        )
    else:
        parts.append(element("p", "No latency of the whole network was measured.", class_="note"))
    parts.append(
        element(
            "p",
            "Sparsity is zeros over weights. A speed-up is the median of the fastest dense network over the median of the sparse one, on the same machine, "
            "threads and batch. Predicted harm is that of pruning without training; training wins most of it back, so it ranks distributions and does not "
            "foretell the final accuracy.",
            class_="note",
        )
    )
    return joined(*parts)


def _repeat(content: ReportContent) -> Markup:
    parts: list[Child] = [element("h2", "Repeat it")]
    recipe = content.recipe
    if recipe is not None and content.data:
        parts += [
            element("p", "Keep the recipe below as recipe.yaml, then:", class_="note"),
            element("pre", "sparsity-explorer prune --recipe recipe.yaml --out run"),
            element("h3", "recipe.yaml"),
            element("pre", recipe.to_yaml(), class_="long", tabindex=0),
        ]
    elif content.distribution is not None:
        parts += [
            element(
                "p",
                "This study has no data to train on. The distribution can be loaded on the page, or with SparsityDistribution.from_yaml:",
                class_="note",
            ),
            element("pre", content.distribution.to_yaml(), class_="long", tabindex=0),
        ]
    else:
        table = content.table
        images = table.metadata.get("n_images") if table is not None else None
        words = ["sparsity-explorer", "sensitivity", "--model", content.model]
        words += ["--data", content.data] if content.data else []
        words += ["--images", str(images)] if images else []
        words += ["--threads", str(content.threads), "--batch-size", str(content.batch_size)]
        parts.append(element("pre", shlex.join(words)))
    return joined(*parts)


# Words


def _column(name: str, *, number: bool = False) -> Markup:
    return element("th", name, scope="col", class_="num" if number else None) if name else element("td", "")


def _scroll(name: str) -> dict[str, str | int]:
    """Return what makes a wide table's box reachable by keyboard, which is how it is scrolled there."""
    return {"class_": "scroll", "tabindex": 0, "role": "group", "aria_label": f"{name}, scrollable"}


def _ms(value: float) -> str:
    """Return milliseconds with three significant digits, and nothing below a tenth of a microsecond: more is noise."""
    if value < 0.1:
        return f"{value:.4f}"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _timed(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    digits = 4 if value < 0.1 else 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:.{digits}f}{_spread(spread, f'.{digits}f')} ms"


def _spread(value: float | None, form: str) -> str:
    return "" if value is None else f" ± {value:{form}}"


def _percent(value: float | None, error: float | None = None, *, digits: int = 1) -> str:
    if value is None or not math.isfinite(value):
        return ""
    spread = "" if error is None else f" ± {100 * error:.{digits}f}"
    return f"{100 * value:.{digits}f}{spread} %"


def _accuracy(value: float, n: int) -> str:
    """Return a share of `n` images in per cent, with its standard error."""
    if not math.isfinite(value):
        return ""
    return _percent(value, math.sqrt(value * (1 - value) / n) if n else None, digits=2)
