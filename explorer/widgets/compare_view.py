"""Runs and distributions side by side: accuracy against latency, a table, and any two of them layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anywidget
import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.contestants import of_results, of_session
from explorer.widgets.metrics import is_noisy
from explorer.widgets.runs import ORIGINS
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from explorer.widgets.contestants import Contestant
    from explorer.widgets.state import ExplorerState

_ESM = assets.module("compare_view", "chart")
_CSS = assets.style("compare_view")


class Comparison(anywidget.AnyWidget):
    """What the page draws, and what a reader has chosen in it; where the figures come from is up to the subclass."""

    contestants = t.List(t.Dict()).tag(sync=True)
    """The dense network and the runs, see `Contestant`."""
    a = t.Unicode().tag(sync=True)
    """Key of the first of the two that are compared layer by layer; empty for what is most telling."""
    b = t.Unicode().tag(sync=True)
    """Key of the second."""
    chosen = t.Unicode().tag(sync=True)
    """Key of the run that stands out in the chart; empty for none."""
    order = t.Unicode("number").tag(sync=True)
    """Column by which the runs are sorted, with a minus in front when the largest comes first."""

    def _renew(self, contestants: Sequence[Contestant]) -> None:
        """Send the figures, but only when they differ: they are much larger than the rest, and a bar that is dragged changes none."""
        pages = [contestant.to_page() for contestant in contestants]
        if pages != self.contestants:
            self.contestants = pages
        known = {page["key"] for page in pages}
        if self.chosen and self.chosen not in known:
            self.chosen = ""


class CompareView(StateView, Comparison):
    """The runs of a session with the distributions on the page."""

    _esm = _ESM
    _css = _CSS
    watches = (
        "study", "layers", "runs", "dense", "curves", "measured", "job", "distribution", "origin", "ghost",
        "prediction", "provenance", "snapshots",
    )  # fmt: skip
    gestures = {
        "use": lambda state, said: state.use_run(int(said["run"])),
        "pack": lambda state, said: state.pack(int(said["run"])),
    }

    _kept: tuple[dict[str, Any], ...] = ()
    _kept_of: Any = None
    _figures_of: Any = None

    def refresh(self) -> None:
        """Make view and figures anew from the state."""
        super().refresh()
        # A bar that is dragged changes none of this.
        state = self.state
        of = state.runs, state.dense, state.curves, state.layers
        if self._figures_of is None or any(a is not b for a, b in zip(of, self._figures_of, strict=True)):
            self._figures_of = of
            self._renew(of_session(state))

    def make_view(self) -> dict[str, Any]:
        """Return everything but the figures of the runs."""
        state = self.state
        layers = {layer.name: layer.name or ROOT_LABEL for layer in state.layers}
        here = uniform = None
        if state.distribution is not None:
            origin = ORIGINS.get(state.origin)
            name = phrase("compare.here_from", origin=origin) if origin else phrase("compare.here")
            here = _on_page(state, "here", name, state.distribution, state.prediction)
        # One that is the same as the distribution on the page would only be said twice.
        if state.ghost is not None and (here is None or dict(state.ghost) != here["sparsities"]):
            told = state.study.predict(state.ghost) if state.measured else None
            uniform = _on_page(state, "uniform", phrase("compare.uniform"), state.ghost, told)
        return {
            "layers": [list(pair) for pair in layers.items()],
            "planned": [planned for planned in (here, uniform, *self._snapshots()) if planned is not None],
            "hint": _hint(state),
            "actions": True,
            "busy": state.job.busy,
            "packing": state.job.kind == "pack",
        }

    def _snapshots(self) -> tuple[dict[str, Any], ...]:
        """Return the distributions that are kept by name; predicted anew with the curves only, not while a bar is dragged."""
        state = self.state
        if (state.snapshots, state.curves, state.measured) != self._kept_of:
            self._kept_of = state.snapshots, state.curves, state.measured
            self._kept = tuple(
                _on_page(
                    state,
                    f"kept-{snapshot.name}",
                    phrase("compare.kept", name=snapshot.name),
                    snapshot.distribution,
                    state.study.predict(snapshot.distribution) if state.measured else None,
                )
                for snapshot in state.snapshots
            )
        return self._kept


class ResultsView(Comparison):
    """Results that stand in files or variables, without a study.

    Parameters
    ----------
    sources : RunResult or path, or a sequence of them
        Results, or folders that `Study.save` has written.

    Raises
    ------
    FormatError
        See `of_results`.
    """

    _esm = _ESM
    _css = _CSS

    view = t.Dict().tag(sync=True)
    """Plain values that the page draws."""

    def __init__(self, sources: Any) -> None:
        found = of_results(sources)
        super().__init__()
        self.view = {
            "layers": [[name, name or ROOT_LABEL] for name in found[0].sparsities],
            "planned": [],
            "hint": _hint_of_results(found[1:]),
            "actions": False,
            "busy": False,
            "packing": False,
        }
        self._renew(found)


def _on_page(
    state: ExplorerState, key: str, name: str, distribution: Mapping[str, float], told: Any
) -> dict[str, Any]:
    """Return a distribution that was not trained: its latency is predicted, its accuracy nobody knows yet."""
    total = sum(layer.n_params for layer in state.layers)
    asked = sum(layer.n_params * distribution[layer.name] for layer in state.layers) / max(1, total)
    return {
        "key": key,
        "name": name,
        "status": "planned",
        "asked": asked,
        "latency_ms": getattr(told, "latency_ms", None),
        "speedup": getattr(told, "speedup", None),
        "size_bytes": getattr(told, "size_bytes", None),
        "sparsities": dict(distribution),
    }


def _hint_of_results(runs: Sequence[Contestant]) -> str:
    """Say how the figures of files are to be read, and what keeps them from being compared."""
    parts = [phrase("compare.hint.speedup")]
    untimed = [run.name for run in runs if run.latency_ms is None]
    if untimed:
        parts.append(phrase("compare.hint.untimed", runs="; ".join(untimed)))
    places = {run.timed_on for run in runs if run.timed_on}
    if len(places) > 1:
        parts.append(phrase("compare.hint.places", count=len(places), places="; ".join(sorted(places))))
    noisy = [run.name for run in runs if run.latency_ms and is_noisy(run.latency_ms, run.spread_ms or 0.0)]
    if noisy:
        parts.append(phrase("compare.hint.noisy", runs="; ".join(noisy)))
    return " ".join(parts)


def _hint(state: ExplorerState) -> str:
    """Say what the comparison waits for, or how its figures are to be read."""
    if state.runs:
        noisy = [
            run.name for run in state.runs if run.final is not None and is_noisy(*(run.latency or (1, 0)))
        ]
        told = [phrase("compare.hint.runs"), phrase("compare.hint.speedup")]
        if noisy:
            told.append(phrase("compare.hint.noisy", runs="; ".join(noisy)))
        return " ".join(told)
    if state.provenance:
        return phrase("compare.hint.replay")
    if not state.measured:
        return phrase("compare.hint.not_measured")
    return phrase("compare.hint.no_run")
