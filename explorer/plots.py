"""Figures of what was measured, for notebooks and reports; plotly is imported when a figure is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityTable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["sensitivity"]

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
