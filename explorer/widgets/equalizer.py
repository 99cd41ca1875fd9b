"""The equalizer: the distribution as one draggable bar a layer, with the target that solves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.errors import DistributionError
from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.state import SEARCHING, less_harm
from explorer.widgets.targets import KINDS
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from explorer.widgets.state import ExplorerState

LEAST_GAIN = 0.02
"""Share of the divergence from which a found distribution is offered."""

ORIGINS = {
    "uniform": phrase("equalizer.origin.uniform"),
    "solved": phrase("equalizer.origin.solved"),
    "mine": phrase("equalizer.origin.mine"),
    "loaded": phrase("equalizer.origin.loaded"),
}


def _by_layer(state: ExplorerState, values: Any) -> Mapping[str, float]:
    """Return what the page sent as sparsities by layer."""
    if not isinstance(values, list) or len(values) != len(state.layers):
        raise DistributionError(phrase("refusal.page_values", sent=repr(values), count=len(state.layers)))
    return {layer.name: float(value) for layer, value in zip(state.layers, values, strict=True)}


def _names(said: Mapping[str, Any]) -> list[str]:
    """Return the layers that the page names."""
    if not isinstance(said["layers"], list):
        raise DistributionError(phrase("refusal.page_layers", sent=repr(said["layers"])))
    return [str(name) for name in said["layers"]]


class Equalizer(StateView):
    """Draggable bars, undo, lock, uniform and solve; distributions that are kept by name."""

    _esm = assets.module("equalizer", "link", "predict", "arrange", "kept")
    _css = assets.style("equalizer")
    watches = (
        "study",
        "layers",
        "distribution",
        "ghost",
        "snapshots",
        "compared",
        "origin",
        "curves",
        "selected",
        "feasible",
        "target",
        "target_kind",
        "measured",
        "can_undo",
        "can_redo",
        "job",
        "search",
        "is_one_shot",
        "background",
    )
    gestures = {
        "select": lambda state, said: state.select(str(said["layer"])),
        "commit": lambda state, said: state.edit(_by_layer(state, said["values"]), final=True),
        "type": lambda state, said: state.type_sparsity(_names(said), str(said["text"])),
        "lock": lambda state, said: state.toggle_lock(_names(said)),
        "tie": lambda state, said: state.toggle_tie(_names(said)),
        "keep": lambda state, said: state.keep(str(said["name"])),
        "take": lambda state, said: state.take_snapshot(str(said["name"])),
        "forget": lambda state, said: state.forget_snapshot(str(said["name"])),
        "compare": lambda state, said: state.compare_with(str(said["name"])),
        "solve": lambda state, said: state.solve(said["target"]),
        "turn": lambda state, said: state.turn(said["target"]),
        "target": lambda state, said: state.choose_target(str(said["kind"])),
        "uniform": lambda state, _: state.make_uniform(),
        "undo": lambda state, _: state.undo(),
        "redo": lambda state, _: state.redo(),
        "better": lambda state, _: state.take_better(),
        "one_shot": lambda state, said: state.choose_one_shot(bool(said["chosen"])),
    }

    values = t.List(t.Float()).tag(sync=True)
    """Sparsity of each layer in [0, 0.99], in the order of the layers. Only the kernel writes it."""
    target_kinds = t.List([kind.to_page() for kind in KINDS.values()]).tag(sync=True)
    """What can be solved for; it does not change."""
    drag = t.Dict().tag(sync=True)
    """What the page shows while a bar is dragged: the values, and the number of the last edit that it had sent before. The page may hold
    such a message back until the kernel is idle, and so send it after the edit that ended the drag: it is then out of date."""
    edit = t.Int(0).tag(sync=True)
    """Number of the last edit of the page that was dealt with; set after `values`, so that the page knows what they answer."""
    curves = t.Dict().tag(sync=True)
    """Harm (see `Curves.harm_kind`) and latency per layer, for colours and words that follow the pointer without asking the kernel."""

    tables = t.Dict().tag(sync=True)
    """`PredictionTables` as the page needs them, to predict in the frame in which a bar moves; empty before a measurement."""

    _tables_of: Any = None

    def __init__(self, state: ExplorerState) -> None:
        super().__init__(state)
        self.observe(self._on_drag, names=["drag"])

    def refresh(self) -> None:
        """Make view, curves and values anew from the state."""
        state = self.state
        super().refresh()
        names = [layer.name for layer in state.layers]
        pages = state.curves.to_page(names)
        self.curves = {"harm": state.curves.harm_to_page(names), "latency_ms": pages.get("latency_ms", [])}
        # They change with the curves alone, not while a bar is dragged.
        if (state.measured, state.curves) != self._tables_of:
            self._tables_of = state.measured, state.curves
            told = getattr(state.study, "prediction_tables", None) if state.measured else None
            self.tables = told().to_page() if told is not None else {}
        if state.distribution is not None:
            self.values = [state.distribution[layer.name] for layer in state.layers]

    def make_view(self) -> dict[str, Any]:
        """Return everything but values and curves."""
        state = self.state
        locked = state.distribution.locked if state.distribution is not None else frozenset()
        groups = state.distribution.groups if state.distribution is not None else ()
        kept = {snapshot.name: snapshot.distribution for snapshot in state.snapshots}
        ghost = kept.get(state.compared, state.ghost if state.origin != "uniform" else None)
        return {
            "layers": [
                {
                    "name": layer.name,
                    "label": layer.name or ROOT_LABEL,
                    "share": layer.share,
                    "n_params": layer.n_params,
                    "locked": layer.name in locked,
                    "group": next((i for i, group in enumerate(groups) if layer.name in group), None),
                    "ghost": ghost[layer.name] if ghost is not None else None,
                    "even": state.curves.break_even(layer.name),
                }
                for layer in state.layers
            ],
            "harm": phrase("equalizer.harm.kl")
            if state.curves.harm_kind == "kl"
            else phrase("equalizer.harm.loss"),
            "selected": state.selected,
            "origin": ORIGINS.get(state.origin, ""),
            "limits": state.target_limits(),
            "target": state.target,
            "target_kind": state.target_kind,
            "solvable": state.measured and not state.job.busy,
            "why": self._why(),
            "snapshots": [
                {"name": name, "here": dict(distribution) == dict(state.distribution)}
                for name, distribution in kept.items()
            ],
            "compared": state.compared,
            "can_undo": state.can_undo,
            "can_redo": state.can_redo,
            "search": self._search(),
        }

    def _search(self) -> dict[str, Any]:
        """Return whether a search can be asked for and begin, what it says, and whether it has something to offer."""
        state, step = self.state, self.state.search
        view = {
            "able": getattr(state.study, "data", None) is not None,
            "ready": state.measured,
            "on": state.is_one_shot,
        }
        if not (view["able"] and state.measured and state.is_one_shot):
            return view | {"text": "", "better": False}
        if step is None:
            waiting = (
                phrase("equalizer.search.waits_for_check")
                if state.origin == "solved"
                else phrase("equalizer.search.waits_for_target")
            )
            return view | {"text": waiting, "better": False}
        if state.background == SEARCHING:
            tried = phrase("equalizer.search.looking", tried=step.n_measured, count=step.n_total)
        else:
            tried = phrase("equalizer.search.looked", count=step.n_measured)
        gain = less_harm(step)
        if step.distribution == state.distribution or gain < LEAST_GAIN:
            return view | {"text": phrase("equalizer.search.none_better", tried=tried), "better": False}
        return view | {
            "text": phrase("equalizer.search.better", tried=tried, gain=f"{gain:.0%}"),
            "better": not state.job.busy,
        }

    def _why(self) -> str:
        state = self.state
        if not state.measured:
            return phrase("equalizer.measure_first")
        return phrase("common.going_on", job=state.job.text) if state.job.busy else ""

    def _on_message(self, widget: object, content: Mapping[str, Any], buffers: object) -> None:
        super()._on_message(widget, content, buffers)
        if "edit" in content:
            self.edit = int(content["edit"])

    def _on_drag(self, change: Mapping[str, Any]) -> None:
        """Take values that the page wrote during a drag, unless it has let go since."""
        drag = change["new"]
        if not self.state.layers or drag.get("edit", 0) < self.edit:
            return
        try:
            self.state.edit(_by_layer(self.state, drag.get("values")), final=False)
        except DistributionError as error:
            self.state.report(error)
        # What was refused goes back to the page.
        self.refresh()
