"""The table of layers: what each one costs, and so what can be won there."""

from __future__ import annotations

from typing import Any

from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.metrics import count
from explorer.widgets.texts import phrase


class LayerTable(StateView):
    """One row a layer."""

    _esm = assets.module("layer_table", "link")
    _css = assets.style("layer_table")
    watches = ("layers", "selected", "study", "dense")
    gestures = {"select": lambda state, said: state.select(str(said["layer"]))}

    def make_view(self) -> dict[str, Any]:
        """Return the rows."""
        state = self.state
        widest = max((layer.share or 0.0 for layer in state.layers), default=0.0) or 1.0
        return {
            "rows": [
                {
                    "name": layer.name,
                    "label": layer.name or ROOT_LABEL,
                    "shape": " × ".join(map(str, layer.weight_shape)),
                    "n_params": layer.n_params,
                    "macs": layer.macs,
                    "dense_ms": layer.dense_ms,
                    "share": layer.share,
                    "max_share": widest,
                }
                for layer in state.layers
            ],
            "selected": state.selected,
            "note": self._note(),
        }

    def _note(self) -> str:
        state = self.state
        if state.study is None:
            return ""
        weights = count(sum(layer.n_params for layer in state.layers))
        macs = count(sum(layer.macs for layer in state.layers))
        return phrase("layers.note", count=len(state.layers), weights=weights, macs=macs)
