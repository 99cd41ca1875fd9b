"""Both sensitivity curves, growing while they are measured.

Drawn by our own module and not by a plotly FigureWidget, although one would be allowed: it weighs 5 MB a page against a few
kilobytes, answers each update with several frames, and gives up when a slow machine needs more than two seconds to start it.
"""

from __future__ import annotations

from typing import Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.state import DEFAULT_IMAGES


class SensitivityView(StateView):
    """Loss and latency of each layer over its sparsity."""

    _esm = assets.module("sensitivity_view", "chart", "rows", "link")
    _css = assets.style("sensitivity_view")
    watches = (
        "study",
        "curves",
        "selected",
        "job",
        "measured",
        "distribution",
        "provenance",
    )
    gestures = {
        "measure": lambda state, said: state.measure(int(said.get("images", DEFAULT_IMAGES))),
        "select": lambda state, said: state.select(str(said["layer"])),
    }

    curves = t.Dict().tag(sync=True)
    """Per kind and layer, `[sparsities, values]`."""
    harm: t.List[Any] = t.List().tag(sync=True)
    """Per layer `[sparsities, nats]`: what lines are coloured by."""
    bands = t.Dict().tag(sync=True)
    """Per kind and layer, `[sparsities, lowest, highest]`: what other images would give, 95 times of 100."""

    def refresh(self) -> None:
        """Make the view and the curves anew from the state."""
        super().refresh()
        names = [layer.name for layer in self.state.layers]
        self.curves = self.state.curves.to_page(names)
        self.harm = self.state.curves.harm_to_page(names)
        self.bands = self.state.curves.bands_to_page(names)

    def make_view(self) -> dict[str, Any]:
        """Return everything but the curves."""
        state = self.state
        return {
            "layers": [layer.name for layer in state.layers],
            "labels": [layer.name or ROOT_LABEL for layer in state.layers],
            "selected": state.selected,
            "sparsities": [state.distribution[layer.name] for layer in state.layers]
            if state.distribution is not None
            else [],
            "ready": state.study is not None,
            "busy": state.job.busy,
            "measured": state.measured,
            "evens": [state.curves.break_even(layer.name) for layer in state.layers],
            "provenance": state.provenance,
        }
