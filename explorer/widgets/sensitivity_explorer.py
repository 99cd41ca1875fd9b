"""The page: all widgets of one study, laid out as five steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from explorer.widgets.choices import offered_choices
from explorer.widgets.compare_view import CompareView
from explorer.widgets.equalizer import Equalizer
from explorer.widgets.header import Header
from explorer.widgets.layer_table import LayerTable
from explorer.widgets.mask_view import MaskView
from explorer.widgets.metrics import Metrics
from explorer.widgets.notice import Notice
from explorer.widgets.open_weights import OpenWeights
from explorer.widgets.pareto_strip import ParetoStrip
from explorer.widgets.publisher import kernel_scheduler
from explorer.widgets.result_panel import ResultPanel
from explorer.widgets.run_monitor import RunMonitor
from explorer.widgets.sensitivity_view import SensitivityView
from explorer.widgets.state import ExplorerState
from explorer.widgets.steps import StatePage, state_of

if TYPE_CHECKING:
    from explorer.widgets.base import StateView


class SensitivityExplorer(StatePage):
    """Measure, shape, prune and watch one model, in a notebook cell or a Voila page.

    Parameters
    ----------
    model : Study or nn.Module or LoadedModel or ExplorerState
        What to explore: a study, or a model together with `data`.
    data : optional
        Whatever `explorer.Study` takes as data, when `model` is not a study.

    Examples
    --------
    >>> import explorer
    >>> study = explorer.Study(
    ...     explorer.load_model("demo:fashion-resnet"), explorer.load_data("demo:fashion")
    ... )  # doctest: +SKIP
    >>> explorer.SensitivityExplorer(study)  # doctest: +SKIP
    """

    def __init__(self, model: Any, data: Any = None) -> None:
        state = self.state = state_of(model if isinstance(model, ExplorerState) else _as_study(model, data))
        self.header = Header(state)
        self.notice = Notice(state)
        self.metrics = Metrics(state)
        self.weights = OpenWeights(state)
        self.layers = LayerTable(state)
        self.sensitivity = SensitivityView(state)
        self.equalizer = Equalizer(state)
        self.balance = ParetoStrip(state)
        self.monitor = RunMonitor(state)
        self.masks = MaskView(state)
        self.result = ResultPanel(state)
        self.compare = CompareView(state)
        self.metrics.add_class("se-sticky")
        self.layers.add_class("se-span-5")
        self.sensitivity.add_class("se-span-7")
        parts: list[StateView] = [
            self.header,
            self.notice,
            self.metrics,
            self.weights,
            self.layers,
            self.sensitivity,
            self.equalizer,
            self.balance,
            self.monitor,
            self.masks,
            self.result,
            self.compare,
        ]
        super().__init__(state, parts)

    @property
    def result_of_run(self) -> Any:
        """The `RunResult` of the latest run, or None."""
        return self.state.run.result if self.state.run is not None else None


def _as_study(model: Any, data: Any) -> Any:
    from explorer.study import Study

    return model if isinstance(model, Study) else Study(model, data)


def open_app() -> SensitivityExplorer:
    """Return the page of the Voila app: it stands at once, and loads the first study that is offered in the background."""
    state = ExplorerState(choices=offered_choices(), scheduler=kernel_scheduler())
    page = SensitivityExplorer(state)
    state.load(0)
    return page
