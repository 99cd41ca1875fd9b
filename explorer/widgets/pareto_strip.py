"""The Pareto strip: the least harm at each speed, where the page stands, and a balance between the two."""

from __future__ import annotations

from typing import Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import StateView
from explorer.widgets.state import harm_of
from explorer.widgets.texts import phrase


class ParetoStrip(StateView):
    """A curve to look at and to click, and a slider that walks along it."""

    _esm = assets.module("pareto_strip", "chart", "link")
    _css = assets.style("pareto_strip", themed=False)
    watches = ("frontier", "prediction", "curves", "measured", "job")
    gestures = {"adopt": lambda state, said: state.adopt_worthwhile(int(said["index"]))}

    points = t.List(t.List(t.Float())).tag(sync=True)
    """``[speed-up, harm]`` of the frontier, by rising speed-up."""

    def refresh(self) -> None:
        """Make view and points anew from the state."""
        super().refresh()
        points = [[float(f"{one.speedup:.4g}"), float(f"{one.harm:.4g}")] for one in self.state.frontier]
        if points != self.points:
            self.points = points

    def make_view(self) -> dict[str, Any]:
        """Return everything but the points."""
        state = self.state
        kind = state.curves.harm_kind
        told = state.prediction
        return {
            # Where there is a frontier, predictions tell of everything that it was made of.
            "here": [told.speedup, harm_of(state.study, told, kind)] if told and state.frontier else None,
            "harm": phrase("balance.harm.kl") if kind == "kl" else phrase("balance.harm.loss"),
            "busy": state.job.busy,
            "measured": state.measured,
        }
