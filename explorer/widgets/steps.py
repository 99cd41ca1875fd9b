"""Each step of the page as a widget of its own, for a notebook cell.

Those of one study show, and change, the same state: a bar that is moved in one cell moves in all of them, and what a run does is seen wherever it is shown.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets

from explorer.errors import ExplorerError
from explorer.widgets import compare_view, layer_table, mask_view, run_monitor, sensitivity_view
from explorer.widgets.equalizer import Equalizer
from explorer.widgets.metrics import Metrics
from explorer.widgets.notice import Notice
from explorer.widgets.open_weights import OpenWeights
from explorer.widgets.pareto_strip import ParetoStrip
from explorer.widgets.publisher import kernel_scheduler
from explorer.widgets.result_panel import ResultPanel
from explorer.widgets.state import ExplorerState
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from explorer.widgets.base import StateView

_STATES: weakref.WeakValueDictionary[int, ExplorerState] = weakref.WeakValueDictionary()
"""By the identity of the study. A state holds its study, so an identity is not given to another one while it stands here."""


def state_of(source: Any) -> ExplorerState:
    """Return the state of a study: the same for all widgets of it, as long as there is one.

    Parameters
    ----------
    source : Study or ExplorerState

    Raises
    ------
    ExplorerError
        If it is neither.
    """
    if isinstance(source, ExplorerState):
        return source
    if not _is_study(source):
        raise ExplorerError(phrase("refusal.no_study", given=repr(source)))
    state = _STATES.get(id(source))
    if state is None or state.study is not source:
        state = _STATES[id(source)] = ExplorerState(source, scheduler=kernel_scheduler())
    return state


def _is_study(source: Any) -> bool:
    # By what it can do: importing the class would bring torch.
    return hasattr(source, "sensitivity_points")


class StatePage(ipywidgets.VBox):
    """Widgets of one state, laid out as a page or a part of it.

    Parameters
    ----------
    state : ExplorerState
    widgets : sequence of DOMWidget
    """

    def __init__(self, state: ExplorerState, widgets: Sequence[ipywidgets.DOMWidget]) -> None:
        self.state = state
        super().__init__([ipywidgets.Box(widgets).add_class("se-grid")])
        self.add_class("se-app")

    @property
    def study(self) -> Any:
        """The study that is shown."""
        return self.state.study

    @property
    def distribution(self) -> Any:
        """The distribution as it stands on the page."""
        return self.state.distribution


class Step(StatePage):
    """One step of the page, with the line that says what is going on and what went wrong.

    Parameters
    ----------
    study : Study or ExplorerState
    """

    parts: ClassVar[tuple[type[StateView], ...]] = ()

    def __init__(self, study: Any) -> None:
        state = state_of(study)
        super().__init__(state, [Notice(state), *(part(state) for part in self.parts)])


class LayerTable(Step):
    """The layers that can be pruned: shapes, weights, multiply-adds, dense milliseconds and share of the time; and other weights to open.

    Examples
    --------
    >>> explorer.LayerTable(study)  # doctest: +SKIP
    """

    parts = (layer_table.LayerTable, OpenWeights)


class SensitivityView(Step):
    """What pruning costs each layer, and gains it, as curves that grow while they are measured."""

    parts = (sensitivity_view.SensitivityView,)


class DistributionEditor(Step):
    """The equalizer with its key figures and the balance of harm and speed; `distribution` is what it shows.

    Examples
    --------
    >>> editor = explorer.DistributionEditor(study)  # doctest: +SKIP
    >>> run = study.prune(editor.distribution)  # doctest: +SKIP
    """

    parts = (Metrics, Equalizer, ParetoStrip)


class RunMonitor(Step):
    """Draw the schedule of gradual magnitude pruning, start, watch, pause and stop it, and see which weights it keeps.

    Parameters
    ----------
    source : Study or ExplorerState or PruningRun
        A run that `Study.prune` has made, and that has not begun, begins at once, in the background.
    """

    parts = (run_monitor.RunMonitor, mask_view.MaskView)

    def __init__(self, source: Any) -> None:
        run = source if hasattr(source, "total_steps") else None
        if run is not None and getattr(run, "study", None) is None:
            raise ExplorerError(phrase("refusal.foreign_run"))
        super().__init__(source if run is None else run.study)
        if run is not None:
            self.state.start_run(run)


class CompareView(Step):
    """Runs side by side: accuracy against latency, a table, and any two of them layer by layer.

    Parameters
    ----------
    source : Study or ExplorerState, or RunResult or path, or a sequence of results and paths
        A study shows its runs as they go on, with what has come out of the latest one; results, and folders that `Study.save` has
        written, are shown as they are, without a study.

    Raises
    ------
    FormatError
        If results cannot be read, or are not of one network.

    Examples
    --------
    >>> explorer.CompareView(study)  # doctest: +SKIP
    >>> explorer.CompareView(["runs/solved", "runs/uniform"])  # doctest: +SKIP
    """

    parts = (compare_view.CompareView, ResultPanel)

    def __init__(self, source: Any) -> None:
        if isinstance(source, ExplorerState) or _is_study(source):
            super().__init__(source)
            return
        # Results do not change, and have no study: its state stays empty.
        StatePage.__init__(self, ExplorerState(), [compare_view.ResultsView(source)])
