"""Make a network as sparse as a distribution says, while it trains.

Names are loaded when they are first used: settings, schedules and events need no torch, which takes seconds to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explorer.pruning.evaluation import Evaluation, evaluate
    from explorer.pruning.events import DoneEvent, EvalEvent, LatencyEvent, MaskEvent, RunEvent, StepEvent
    from explorer.pruning.methods import METHODS
    from explorer.pruning.result import RunResult
    from explorer.pruning.run import PruningRun
    from explorer.pruning.schedule import CubicSchedule, learning_rate_at
    from explorer.pruning.settings import RunSettings

_HOME = {
    "METHODS": "methods",
    "CubicSchedule": "schedule",
    "DoneEvent": "events",
    "EvalEvent": "events",
    "Evaluation": "evaluation",
    "LatencyEvent": "events",
    "MaskEvent": "events",
    "PruningRun": "run",
    "RunEvent": "events",
    "RunResult": "result",
    "RunSettings": "settings",
    "StepEvent": "events",
    "evaluate": "evaluation",
    "learning_rate_at": "schedule",
}

__all__ = [
    "METHODS",
    "CubicSchedule",
    "DoneEvent",
    "EvalEvent",
    "Evaluation",
    "LatencyEvent",
    "MaskEvent",
    "PruningRun",
    "RunEvent",
    "RunResult",
    "RunSettings",
    "StepEvent",
    "evaluate",
    "learning_rate_at",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'explorer.pruning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"explorer.pruning.{_HOME[name]}"), name)
    globals()[name] = value
    return value
