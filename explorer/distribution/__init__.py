"""How sparse each layer shall be: by hand, uniformly, or solved for a target over measured tables."""

from __future__ import annotations

from explorer.distribution.baselines import erk, global_magnitude, inverse_sensitivity, lamp
from explorer.distribution.distribution import Achieved, SparsityDistribution, check_same_layers, uniform
from explorer.distribution.knapsack import Frontier, solve_table
from explorer.distribution.pareto import ParetoFrontier, ParetoPoint, pareto
from explorer.distribution.prediction import Prediction, predict, stored_bytes
from explorer.distribution.prediction_tables import PredictionTables
from explorer.distribution.scores import DEFAULT_SCORE, SCORES
from explorer.distribution.search import SearchStep, search
from explorer.distribution.solver import (
    DEFAULT_MARGIN,
    baseline_for_target,
    feasible_range,
    solve,
    uniform_for_target,
)
from explorer.distribution.target import Target
from explorer.distribution.trust import Trust, trust

__all__ = [
    "DEFAULT_MARGIN",
    "DEFAULT_SCORE",
    "SCORES",
    "Achieved",
    "Frontier",
    "ParetoFrontier",
    "ParetoPoint",
    "Prediction",
    "PredictionTables",
    "SearchStep",
    "SparsityDistribution",
    "Target",
    "Trust",
    "baseline_for_target",
    "check_same_layers",
    "erk",
    "feasible_range",
    "global_magnitude",
    "inverse_sensitivity",
    "lamp",
    "pareto",
    "predict",
    "search",
    "solve",
    "solve_table",
    "stored_bytes",
    "trust",
    "uniform",
    "uniform_for_target",
]
