"""Figures of what was measured, for notebooks and reports; plotly is imported when a figure is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from explorer.errors import DistributionError, EngineError
from explorer.sensitivity import SensitivityPoint, SensitivityTable, ranking

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from explorer.inference import LayerTiming, MachinePeak

__all__ = ["roofline", "sensitivity"]

_TITLES = {
    "kl": "KL divergence from the dense outputs (nats)",
    "loss": "One-shot loss",
    "accuracy": "One-shot accuracy",
    "removed_energy": "Removed share of squared weights",
    "fisher": "Second-order estimate of the loss increase (nats)",
}
# Colours of Okabe and Ito (2008), told apart by colour-blind readers too; dashes tell apart the layers that share one.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_LOGARITHMIC = frozenset({"kl", "fisher"})
_FALLING = frozenset({"accuracy"})


def sensitivity(
    table: SensitivityTable,
    kind: str = "kl",
    *,
    refreshed: bool = False,
    view: Literal["curves", "heatmap", "bars"] = "curves",
    sparsity: float = 0.9,
) -> Figure:
    """Draw each layer's sensitivity, and beside it its latency if it was measured.

    Curves: raw points are markers, with the band in which other images would put them 95 times of 100, or their standard errors, where known; lines are the monotone curves that the solver reads, and a diamond on the latency marks
    the sparsity from which the sparse kernel is faster than the dense one. A layer has the same colour on both sides, and hides on both with a click on
    its name. Heat map: layers from top to bottom, sparsities from left to right. Bars: layers at one sparsity, the most sensitive on top; those at which
    pruning removed nothing are hatched, since their value says nothing.

    Parameters
    ----------
    table : SensitivityTable
    kind : {"kl", "loss", "accuracy", "removed_energy", "fisher"}
    refreshed : bool
        Draw what was measured with refreshed BatchNorm statistics.
    view : {"curves", "heatmap", "bars"}
    sparsity : float
        Of the bars, in [0, 1).

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    DistributionError
        If the kind is unknown or was not measured.
    """
    if kind not in _TITLES:
        raise DistributionError(
            f"kind must be one of {', '.join(_TITLES)}; got {kind!r}. Latency is always drawn beside it."
        )
    if not table.levels(kind, refreshed=refreshed):
        how = " with refreshed BatchNorm statistics" if refreshed else ""
        raise DistributionError(
            f"{kind!r}{how} has not been measured; measured are {', '.join(table.kinds) or 'none'}."
        )
    if view == "heatmap":
        return _heatmap(table, kind, refreshed=refreshed)
    if view == "bars":
        return _bars(table, kind, sparsity, refreshed=refreshed)
    if view != "curves":
        raise DistributionError(f"view must be curves, heatmap or bars; got {view!r}.")
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = [(kind, refreshed)]
    if any(table.has(layer, "latency_ms") for layer in table.layers):
        panels.append(("latency_ms", False))
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.12)
    for column, (what, fresh) in enumerate(panels, start=1):
        for number, layer in enumerate(table.layers):
            if not table.has(layer, what, refreshed=fresh):
                continue
            points = [
                table.point(layer, level, what, refreshed=fresh)
                for level in table.levels(what, layer, refreshed=fresh)
            ]
            raw = [point for point in points if point is not None]
            levels, curve = table.curve(layer, what, refreshed=fresh)
            if what in _LOGARITHMIC:
                curve = np.where(
                    curve > 0, curve, np.nan
                )  # a logarithm has no zero: the dense point is left out
                raw = [point for point in raw if point.value > 0]
            name = layer or "model"
            line = {
                "color": _COLOURS[number % len(_COLOURS)],
                "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)],
            }
            figure.add_trace(
                go.Scatter(
                    x=levels,
                    y=curve,
                    mode="lines",
                    line=line,
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    hovertemplate=f"{name}<br>sparsity %{{x:.1%}}: %{{y:.4g}}<extra></extra>",
                ),
                row=1,
                col=column,
            )
            # The band where it is known: divergences have long tails, and standard errors reach below zero.
            above = [_reach(point, point.high) for point in raw]
            below = [_reach(point, point.low) for point in raw]
            figure.add_trace(
                go.Scatter(
                    x=[point.sparsity for point in raw],
                    y=[point.value for point in raw],
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": above,
                        "arrayminus": below,
                        "visible": any(above) or any(below),
                        "thickness": 1,
                    },
                    mode="markers",
                    marker={"color": line["color"], "size": 5},
                    name=name,
                    legendgroup=name,
                    showlegend=False,
                    hoverinfo="skip",
                ),
                row=1,
                col=column,
            )
            even = table.break_even(layer) if what == "latency_ms" and levels[0] == 0.0 else None
            if even is not None:
                figure.add_trace(
                    go.Scatter(
                        x=[even],
                        y=[table.value(layer, even, what)],
                        mode="markers",
                        marker={"color": line["color"], "size": 11, "symbol": "diamond-open"},
                        name=name,
                        legendgroup=name,
                        showlegend=False,
                        hovertemplate=f"{name}<br>sparse is faster from %{{x:.0%}} on<extra></extra>",
                    ),
                    row=1,
                    col=column,
                )
        title = "Latency (ms)" if what == "latency_ms" else _TITLES[what]
        figure.update_xaxes(title_text="Sparsity", tickformat=".0%", row=1, col=column)
        figure.update_yaxes(
            title_text=title, type="log" if what in _LOGARITHMIC else "linear", row=1, col=column
        )
    figure.update_layout(
        template="plotly_white", legend_title_text="Layer", margin={"t": 30, "r": 10, "b": 50, "l": 60}
    )
    return figure


def _reach(point: SensitivityPoint, edge: float | None) -> float:
    return abs(edge - point.value) if edge is not None else point.std_error or 0.0


def _heatmap(table: SensitivityTable, kind: str, *, refreshed: bool) -> Figure:
    import plotly.graph_objects as go

    layers = [layer for layer in table.layers if table.has(layer, kind, refreshed=refreshed)]
    levels = np.array(table.levels(kind, refreshed=refreshed))
    values = np.array([table.values_at(layer, levels, kind, refreshed=refreshed) for layer in layers])
    colour, ticks = values, {}
    if kind in _LOGARITHMIC:
        # A logarithm has no zero: a millionth of the largest value is as good as none.
        floor = max(float(values.max()), 1e-12) / 1e6
        colour = np.log10(np.maximum(values, floor))
        powers = np.arange(np.ceil(colour.min()), np.floor(colour.max()) + 1)
        ticks = {"tickvals": powers, "ticktext": [f"{10.0**power:g}" for power in powers]}
    figure = go.Figure(
        go.Heatmap(
            x=[f"{level:.4g}" for level in 100 * levels],
            y=[layer or "model" for layer in layers],
            z=colour,
            customdata=values,
            colorscale="Cividis",  # the same to colour-blind readers
            reversescale=kind not in _FALLING,
            colorbar={"title": {"text": _TITLES[kind], "side": "right"}, **ticks},
            hovertemplate="%{y}<br>sparsity %{x} %: %{customdata:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="Sparsity (%)", type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(template="plotly_white", margin={"t": 30, "r": 10, "b": 50, "l": 60})
    return figure


def _bars(table: SensitivityTable, kind: str, sparsity: float, *, refreshed: bool) -> Figure:
    import plotly.graph_objects as go

    if not 0.0 <= sparsity < 1.0:
        raise DistributionError(
            f"sparsity is a fraction of zeros in [0, 1); got {sparsity!r}. Write 90 % as 0.9."
        )
    ranked = ranking(table, sparsity, kind, refreshed=refreshed)
    figure = go.Figure(
        go.Bar(
            x=[one.value for one in ranked],
            y=[one.layer or "model" for one in ranked],
            orientation="h",
            error_x={"type": "data", "array": [2 * (one.std_error or 0.0) for one in ranked], "thickness": 1},
            marker={
                "color": [_COLOURS[0] if one.is_known else "#BBBBBB" for one in ranked],
                "pattern": {"shape": ["" if one.is_known else "/" for one in ranked]},
            },
            customdata=[
                f"place {one.lowest + 1} to {one.highest + 1} of {len(ranked)}"
                if one.is_known
                else "was that sparse already: nothing is known"
                for one in ranked
            ],
            hovertemplate="%{y}: %{x:.4g}<br>%{customdata}<extra></extra>",
        )
    )
    title = f"Lost: {_TITLES[kind].lower()}" if kind in _FALLING else _TITLES[kind]
    figure.update_xaxes(title_text=f"{title}, at {sparsity:.4g} sparsity")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(template="plotly_white", margin={"t": 30, "r": 10, "b": 50, "l": 60})
    return figure


def roofline(profile: Sequence[LayerTiming], peak: MachinePeak | None = None) -> Figure:
    """Draw where each layer stands between what the memory and what the arithmetic of this machine allow.

    Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model", doi:10.1145/1498765.1498785. To the right: useful
    operations for each byte that a layer touches (weights, input and output, once each). Upwards: useful operations in a second; zeros do
    not count. A layer near the sloping roof waits for memory, one near the level roof computes as fast as this machine can, and one well below both loses its time
    elsewhere. The sloping roof is that of main memory: a layer whose bytes come from a cache may lie above it. The area of a mark is the layer's share of the time of
    those that are drawn (the smallest are drawn larger, so that they can be seen).

    Parameters
    ----------
    profile : sequence of LayerTiming
        From `SparseModule.profile`. What has no multiply-adds, or ran through torch, is not drawn.
    peak : MachinePeak, optional
        This machine's best, with as many threads as the profile's network has; measured now when not given.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    EngineError
        If nothing in the profile can be drawn.
    """
    rows = [row for row in profile if row.gflops > 0 and row.n_bytes > 0 and row.peak_gflops > 0]
    if not rows:
        raise EngineError(
            "This profile holds no layer that ran in one of the engine's own kernels; there is nothing to draw."
        )
    import plotly.graph_objects as go

    from explorer.inference import machine_peak

    peak = machine_peak(rows[0].precision, rows[0].threads) if peak is None else peak
    threads = peak.threads
    level, slope = peak.gflops, peak.gigabytes_per_s
    intensity = np.array([row.gflops * row.ms * 1e6 / row.n_bytes for row in rows])
    speed = np.array([row.gflops for row in rows])
    ms = np.array([row.ms for row in rows])
    ridge = level / slope
    x = np.array([min(intensity.min(), ridge) / 2, ridge, max(intensity.max(), ridge) * 2])
    figure = go.Figure()
    roof = f"{level:.0f} GFLOP/s, {slope:.0f} GB/s ({threads} thread{'s' if threads > 1 else ''}, {peak.isa})"
    figure.add_trace(
        go.Scatter(
            x=x,
            y=np.minimum(level, x * slope),
            mode="lines",
            line={"color": "#000000"},
            name=roof,
            hoverinfo="skip",
        )
    )
    for number, kernel in enumerate(sorted({row.kernel for row in rows})):
        mine = np.array([row.kernel == kernel for row in rows])
        figure.add_trace(
            go.Scatter(
                x=intensity[mine],
                y=speed[mine],
                mode="markers",
                name=kernel,
                marker={
                    "color": _COLOURS[number % len(_COLOURS)],
                    "size": np.maximum(90 * np.sqrt(ms[mine] / ms.sum()), 5),
                    "opacity": 0.75,
                },
                customdata=[(r.name, r.ms, r.sparsity, r.share_of_peak) for r in rows if r.kernel == kernel],
                # Three digits, however small or large: layers take from microseconds to seconds.
                hovertemplate="%{customdata[0]}<br>%{customdata[1]:.3r} ms, sparsity %{customdata[2]:.1%}<br>"
                "%{y:.3r} GFLOP/s, %{customdata[3]:.1%} of peak<br>%{x:.3r} FLOP/byte<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="Useful operations per byte (FLOP/byte)", type="log")
    figure.update_yaxes(title_text="Useful GFLOP/s", type="log")
    figure.update_layout(
        template="plotly_white", legend_title_text="Kernel", margin={"t": 30, "r": 10, "b": 50, "l": 60}
    )
    return figure
