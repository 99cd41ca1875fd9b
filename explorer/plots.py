"""Figures of what was measured, for notebooks and reports; plotly is imported when a figure is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from explorer.errors import DistributionError, EngineError
from explorer.sensitivity import SensitivityTable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from explorer.inference import LayerTiming, MachinePeak

__all__ = ["roofline", "sensitivity"]

_TITLES = {
    "kl": "KL divergence from the dense outputs (nats)",
    "loss": "One-shot loss",
    "accuracy": "One-shot accuracy",
    "removed_energy": "Removed share of squared weights",
}
# Colours of Okabe and Ito (2008), told apart by colour-blind readers too; dashes tell apart the layers that share one.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_LOGARITHMIC = frozenset({"kl"})


def sensitivity(table: SensitivityTable, kind: str = "kl", *, refreshed: bool = False) -> Figure:
    """Draw each layer's sensitivity, and beside it its latency if it was measured.

    Raw points are markers, with standard errors where known; lines are the monotone curves that the solver reads. A layer has
    the same colour on both sides, and hides on both with a click on its name.

    Parameters
    ----------
    table : SensitivityTable
    kind : {"kl", "loss", "accuracy", "removed_energy"}
    refreshed : bool
        Draw what was measured with refreshed BatchNorm statistics.

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
            errors = [point.std_error or 0.0 for point in raw]
            figure.add_trace(
                go.Scatter(
                    x=[point.sparsity for point in raw],
                    y=[point.value for point in raw],
                    error_y={"type": "data", "array": errors, "visible": any(errors), "thickness": 1},
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
        title = "Latency (ms)" if what == "latency_ms" else _TITLES[what]
        figure.update_xaxes(title_text="Sparsity", tickformat=".0%", row=1, col=column)
        figure.update_yaxes(
            title_text=title, type="log" if what in _LOGARITHMIC else "linear", row=1, col=column
        )
    figure.update_layout(
        template="plotly_white", legend_title_text="Layer", margin={"t": 30, "r": 10, "b": 50, "l": 60}
    )
    return figure


def roofline(profile: Sequence[LayerTiming], peak: MachinePeak | None = None) -> Figure:
    """Draw where each layer stands between what the memory and what the arithmetic of this machine allow.

    Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model", doi:10.1145/1498765.1498785. To the right: useful
    operations for each byte that a layer touches (weights, input and output, once each). Upwards: useful operations in a second; zeros do
    not count. A layer near the sloping roof waits for memory, one near the level roof computes as fast as this machine can, and one well below both loses its time
    elsewhere. The area of a mark is the layer's share of the time.

    Parameters
    ----------
    profile : sequence of LayerTiming
        From `SparseModule.profile`. What has no multiply-adds, or ran through torch, is not drawn.
    peak : MachinePeak, optional
        One core's best; measured now when not given. The level roof is that of as many cores as the profile's network used.

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

    peak = machine_peak(rows[0].precision) if peak is None else peak
    level = rows[0].peak_gflops
    threads = max(1, round(level / peak.gflops))
    slope = peak.gigabytes_per_s * threads
    intensity = np.array([row.gflops * row.ms * 1e6 / row.n_bytes for row in rows])
    speed = np.array([row.gflops for row in rows])
    ms = np.array([row.ms for row in rows])
    low, high = min(intensity.min(), level / slope) / 2, max(intensity.max(), level / slope) * 2
    x = np.geomspace(low, high, 64)
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
                    "size": np.clip(120 * np.sqrt(ms[mine] / ms.sum()), 5, 60),
                    "opacity": 0.75,
                },
                customdata=[(r.name, r.ms, r.sparsity, r.share_of_peak) for r in rows if r.kernel == kernel],
                hovertemplate="%{customdata[0]}<br>%{customdata[1]:.3f} ms, sparsity %{customdata[2]:.0%}<br>"
                "%{y:.0f} GFLOP/s, %{customdata[3]:.0%} of peak<br>%{x:.1f} FLOP/byte<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="Useful operations per byte (FLOP/byte)", type="log")
    figure.update_yaxes(title_text="Useful GFLOP/s", type="log")
    figure.update_layout(
        template="plotly_white", legend_title_text="Kernel", margin={"t": 30, "r": 10, "b": 50, "l": 60}
    )
    return figure
