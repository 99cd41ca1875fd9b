"""Sparsity Explorer: see what pruning does to a network, and make it smaller and faster on a CPU.

Names are loaded when they are first used, so that `import explorer` costs nothing and the engine can be used without the widgets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ExplorerError": "explorer.errors",
    "load_model": "explorer.models",
    "LoadedModel": "explorer.models",
    "PrunableLayer": "explorer.models",
    "prunable_layers": "explorer.models",
    "load_data": "explorer.data",
    "LoadedData": "explorer.data",
    "compile": "explorer.inference",
    "SparseModule": "explorer.inference",
    "SensitivityTable": "explorer.sensitivity",
    "SparsityDistribution": "explorer.distribution",
    "PruningRun": "explorer.pruning",
    "Recipe": "explorer.formats",
    "Study": "explorer.study",
    "SensitivityExplorer": "explorer.widgets",
    "LayerTable": "explorer.widgets",
    "SensitivityView": "explorer.widgets",
    "DistributionEditor": "explorer.widgets",
    "RunMonitor": "explorer.widgets",
    "CompareView": "explorer.widgets",
}

_ROOMS = ("inference", "masks", "plots", "sensitivity")
"""What the README names by its module, as `explorer.plots.roofline`."""

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from explorer.data import LoadedData, load_data
    from explorer.distribution import SparsityDistribution
    from explorer.errors import ExplorerError
    from explorer.formats import Recipe
    from explorer.inference import SparseModule, compile
    from explorer.models import LoadedModel, PrunableLayer, load_model, prunable_layers
    from explorer.pruning import PruningRun
    from explorer.sensitivity import SensitivityTable
    from explorer.study import Study
    from explorer.widgets import (
        CompareView,
        DistributionEditor,
        LayerTable,
        RunMonitor,
        SensitivityExplorer,
        SensitivityView,
    )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"explorer.{name}")
    raise AttributeError(f"module 'explorer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
