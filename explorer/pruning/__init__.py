"""Make a network as sparse as a distribution says, while it trains."""

from __future__ import annotations

from explorer.pruning.evaluation import Evaluation, evaluate
from explorer.pruning.events import DoneEvent, EvalEvent, LatencyEvent, MaskEvent, RunEvent, StepEvent
from explorer.pruning.methods import METHODS
from explorer.pruning.result import RunResult
from explorer.pruning.run import PruningRun
from explorer.pruning.schedule import CubicSchedule, learning_rate_at
from explorer.pruning.settings import RunSettings

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
