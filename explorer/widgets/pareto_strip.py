"""The Pareto strip: the least harm at each speed, where the page stands, and a balance between the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import StateView

if TYPE_CHECKING:
    from explorer.widgets.state import ExplorerState


class ParetoStrip(StateView):
    """A curve to look at and to click, and a slider that walks along it."""

    _esm = assets.module("pareto_strip", "chart")
    _css = assets.style("pareto_strip")
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
        told, here = state.prediction, None
        if told is not None and state.frontier and told.speedup is not None:
            harm = told.kl if kind == "kl" else _increase(state)
            if harm is not None:
                here = [told.speedup, max(0.0, harm)]
        return {
            "here": here,
            "harm": "KL to the dense outputs" if kind == "kl" else "increase of the loss",
            "busy": state.job.busy,
            "measured": state.measured,
        }


def _increase(state: ExplorerState) -> float | None:
    if state.prediction.loss is None:
        return None
    return float(state.prediction.loss - state.study.table.baseline("loss"))
