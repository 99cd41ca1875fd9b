"""The page in which a study is seen and touched. Thin: it shows a `Study` and turns gestures into calls on it.

Nothing else imports this room. Importing it loads ipywidgets and anywidget, but not torch.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("anywidget") is None or importlib.util.find_spec("ipywidgets") is None:
    raise ImportError(
        "The widgets need ipywidgets and anywidget, which are not both installed. "
        "Install the extra: pip install 'sparsity-explorer[app]'."
    )

from explorer.widgets.sensitivity_explorer import SensitivityExplorer, open_app
from explorer.widgets.state import ExplorerState
from explorer.widgets.steps import CompareView, DistributionEditor, LayerTable, RunMonitor, SensitivityView

__all__ = [
    "CompareView",
    "DistributionEditor",
    "ExplorerState",
    "LayerTable",
    "RunMonitor",
    "SensitivityExplorer",
    "SensitivityView",
    "open_app",
]
