"""From a target to a sparsity for each layer, over measured tables.

Invariants: the target is met by what the tables predict, or `InfeasibleTarget` names the nearest one that can be; locked layers keep their
sparsity; asking for more speed never predicts less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explorer.distribution.distribution import SparsityDistribution, dense_ends, uniform
from explorer.distribution.knapsack import Frontier
from explorer.distribution.scores import DEFAULT_SCORE, score_table
from explorer.errors import DistributionError, InfeasibleTarget
from explorer.masks import n_zeros
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["DEFAULT_MARGIN", "LEVEL_GRID", "Target", "feasible_range", "solve", "uniform_for_target"]

_Floats = NDArray[np.float64]

# Finer where a step removes a larger share of what is left.
LEVEL_GRID: tuple[float, ...] = tuple(
    float(s)
    for s in np.unique(np.round(np.concatenate([np.linspace(0.0, 0.9, 37), np.linspace(0.9, 0.99, 19)]), 6))
)
# Sums of layer times miss the time of the whole network by a per cent or two. Solving for a target that is faster by this share makes
# it likely that the measured latency meets what was asked.
DEFAULT_MARGIN = 0.03


@dataclass(frozen=True, slots=True)
class Target:
    """What a distribution shall reach; exactly one of the three.

    Attributes
    ----------
    speedup : float or None
        Baseline latency over latency, positive; the baseline is the table's `baseline_latency_ms`.
    latency_ms : float or None
        Latency of the whole network in milliseconds, positive.
    sparsity : float or None
        Share of zeros among the weights of all prunable layers, in [0, 1).

    Raises
    ------
    DistributionError
        If none or several are given, or one is out of range.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        given = {
            name: value
            for name, value in (
                ("speedup", self.speedup),
                ("latency_ms", self.latency_ms),
                ("sparsity", self.sparsity),
            )
            if value is not None
        }
        if len(given) != 1:
            raise DistributionError(
                f"A target is exactly one of speedup=, latency_ms= and sparsity=; got {given or 'none of them'}."
            )
        ((name, value),) = given.items()
        if name == "sparsity" and not 0.0 <= value < 1.0:
            raise DistributionError(
                f"Target sparsity is a fraction of zeros in [0, 1); got {value!r}. Write 90 % as 0.9."
            )
        if name != "sparsity" and not 0.0 < value < float("inf"):
            raise DistributionError(f"Target {name} must be positive and finite; got {value!r}.")

    def budget_ms(self, table: SensitivityTable) -> float:
        """Return the latency that this target allows the whole network.

        Raises
        ------
        DistributionError
            If it is a target sparsity, or the table knows no baseline latency.
        """
        if self.latency_ms is not None:
            return self.latency_ms
        if self.speedup is None:
            raise DistributionError("A target sparsity allows no particular latency.")
        baseline = table.baseline_latency_ms
        if baseline is None:
            raise DistributionError(
                "A speed-up needs measured latencies; run the latency measurement first, or set a sparsity."
            )
        return baseline / self.speedup


@dataclass(frozen=True, slots=True)
class _Problem:
    """The layers that may still be chosen, their grid of levels, and the sparsities of the others."""

    free: tuple[PrunableLayer, ...]
    held: dict[str, float]
    levels: _Floats


def _pose(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    kinds: Sequence[str],
    locked: Mapping[str, float] | None,
    max_sparsity: float,
    *,
    dense_first_last: bool,
) -> _Problem:
    if not layers:
        raise DistributionError("There are no layers to distribute sparsity over.")
    if not 0.0 <= max_sparsity < 1.0:
        raise DistributionError(
            f"max_sparsity is a fraction of zeros in [0, 1); got {max_sparsity!r}. Write 99 % as 0.99."
        )
    ends = dense_ends(layers) if dense_first_last else frozenset()
    held = dict.fromkeys((layer.name for layer in layers if layer.name in ends), 0.0)
    # A distribution checks names and values of what was locked.
    everything = SparsityDistribution({layer.name: 0.0 for layer in layers})
    checked = everything.replace(dict(locked or {}))
    held.update({name: checked[name] for name in locked or {}})
    free = tuple(layer for layer in layers if layer.name not in held)
    # No level is offered that lies beyond what was measured: curves end there.
    highest = max_sparsity
    for layer in free:
        for kind in kinds:
            highest = min(highest, float(table.curve(layer.name, kind)[0][-1]))
    grid = [level for level in LEVEL_GRID if level < highest] + [highest]
    return _Problem(free, held, np.asarray(grid))


def _latencies(problem: _Problem, table: SensitivityTable) -> tuple[_Floats, float]:
    """Return free layers' times ``(n_free, n_levels)`` and the time of all else."""
    model = table.latency_model
    if model is None:
        raise DistributionError(
            "The table holds no complete latency level; run the latency measurement first."
        )
    fixed, scale = model
    held = sum(table.value(name, sparsity, "latency_ms") for name, sparsity in problem.held.items())
    rows = [scale * table.values_at(layer.name, problem.levels, "latency_ms") for layer in problem.free]
    return np.asarray(rows).reshape(len(problem.free), problem.levels.size), fixed + scale * held


def solve(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    *,
    locked: Mapping[str, float] | None = None,
    max_sparsity: float = 0.99,
    dense_first_last: bool = True,
    score: str = DEFAULT_SCORE,
    margin: float = DEFAULT_MARGIN,
) -> SparsityDistribution:
    """Find the distribution of least score that meets a target.

    Levels between measured ones are read from monotone curves, on a grid of 55 levels that gets finer towards the end.

    Parameters
    ----------
    layers : sequence of PrunableLayer
        All prunable layers, in execution order.
    table : SensitivityTable
        Latencies for a target in time; what `score` needs in any case.
    target : Target
    locked : mapping of str to float, optional
        Layers whose sparsity is given. They are locked in the result.
    max_sparsity : float
        Upper bound of each layer, in [0, 1).
    dense_first_last : bool
        Leave first and last layer dense, unless `locked` says otherwise.
    score : str
        Name of what is minimised, see `explorer.distribution.scores`.
    margin : float
        Prediction error to be safe from, as a share: predicted latency times (1 + margin) meets the target. Not used for a
        target sparsity, which is exact.

    Returns
    -------
    SparsityDistribution

    Raises
    ------
    InfeasibleTarget
        If the target cannot be met; the message names the nearest that can.
    DistributionError
        If the table lacks measurements, or an argument is out of range.
    """
    needed = _needed_kinds(score) + (() if target.sparsity is not None else ("latency_ms",))
    if not 0.0 <= margin < float("inf"):
        raise DistributionError(f"margin is a share of the predicted latency, 0 or more; got {margin!r}.")
    problem = _pose(layers, table, needed, locked, max_sparsity, dense_first_last=dense_first_last)
    names = [layer.name for layer in problem.free]
    if target.sparsity is not None:
        costs, fixed = _remaining_weights(layers, problem)
        budget = (1.0 - target.sparsity) * sum(layer.n_params for layer in layers)
        least = fixed + float(costs.min(axis=1).sum()) if names else fixed
        if least > budget * (1 + 1e-12):
            total = sum(layer.n_params for layer in layers)
            raise InfeasibleTarget(
                f"A sparsity of {target.sparsity:.4f} is out of reach: with {_held_words(problem)} and at most {problem.levels[-1]:g} "
                f"elsewhere it is {1 - least / total:.4f}. Ask for that, unlock layers, or raise max_sparsity."
            )
        budget *= 1 + 1e-12
    else:
        costs, fixed = _latencies(problem, table)
        budget = target.budget_ms(table) / (1.0 + margin)
        least = fixed + (float(costs.min(axis=1).sum()) if names else 0.0)
        if least > budget:
            raise InfeasibleTarget(_too_slow(target, table, problem, least, margin))
    chosen: dict[str, float] = dict(problem.held)
    if names:
        losses = score_table(score, table, names, problem.levels)
        picks = Frontier(losses, costs).best(max(budget - fixed, float(costs.min(axis=1).sum())))
        chosen.update({name: float(problem.levels[pick]) for name, pick in zip(names, picks, strict=True)})
    ordered = {layer.name: chosen[layer.name] for layer in layers}
    return SparsityDistribution(ordered, locked=tuple(locked or ()))


def _remaining_weights(layers: Sequence[PrunableLayer], problem: _Problem) -> tuple[_Floats, float]:
    """Return how many weights remain at each level of the free layers, and in the others together."""
    costs = np.asarray(
        [
            [layer.n_params - n_zeros(layer.n_params, level) for level in problem.levels.tolist()]
            for layer in problem.free
        ],
        dtype=np.float64,
    ).reshape(len(problem.free), problem.levels.size)
    held = sum(
        layer.n_params - n_zeros(layer.n_params, problem.held[layer.name])
        for layer in layers
        if layer.name in problem.held
    )
    return costs, float(held)


def _needed_kinds(score: str) -> tuple[str, ...]:
    for kind in ("kl", "loss", "removed_energy", "fisher"):
        if kind in score:
            return (kind,)
    return ()


def _held_words(problem: _Problem) -> str:
    return f"{len(problem.held)} layers held" if problem.held else "no layer held"


def _too_slow(target: Target, table: SensitivityTable, problem: _Problem, least: float, margin: float) -> str:
    safe = least * (1.0 + margin)
    nearest = f"{safe:.4g} ms"
    asked = (
        f"{target.latency_ms:.4g} ms"
        if target.latency_ms is not None
        else f"A speed-up of {target.speedup:.3g}"
    )
    baseline = table.baseline_latency_ms
    if target.speedup is not None and baseline is not None:
        nearest = f"{np.floor(baseline / safe * 1000) / 1000:g} ({safe:.4g} ms against {baseline:.4g} ms)"
    return (
        f"{asked} is out of reach: with {_held_words(problem)}, at most {problem.levels[-1]:g} elsewhere and a margin of {margin:g}, "
        f"the nearest is {nearest}. Ask for that, unlock layers, raise max_sparsity, or lower the margin."
    )


def feasible_range(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    *,
    locked: Mapping[str, float] | None = None,
    max_sparsity: float = 0.99,
    dense_first_last: bool = True,
) -> tuple[float, float]:
    """Return the least and the greatest predicted latency that `solve` can choose between, in milliseconds.

    No margin is taken off. The greatest is that of all free layers dense.

    Raises
    ------
    DistributionError
        If the table lacks latencies, or an argument is out of range.
    """
    problem = _pose(layers, table, ("latency_ms",), locked, max_sparsity, dense_first_last=dense_first_last)
    costs, fixed = _latencies(problem, table)
    return fixed + float(costs.min(axis=1).sum()), fixed + float(costs.max(axis=1).sum())


def uniform_for_target(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    *,
    dense_first_last: bool = True,
    margin: float = DEFAULT_MARGIN,
) -> SparsityDistribution:
    """Find the least sparse uniform distribution that meets a target: what a solved one is compared with.

    Raises
    ------
    InfeasibleTarget
        If no level of the grid up to what was measured meets it.
    DistributionError
        If the table lacks latencies.
    """
    kinds = () if target.sparsity is not None else ("latency_ms",)
    problem = _pose(layers, table, kinds, None, LEVEL_GRID[-1], dense_first_last=dense_first_last)
    if target.sparsity is not None:
        costs, fixed = _remaining_weights(layers, problem)
        budget = (1.0 - target.sparsity) * sum(layer.n_params for layer in layers) * (1 + 1e-12)
    else:
        costs, fixed = _latencies(problem, table)
        budget = target.budget_ms(table) / (1.0 + margin)
    totals = fixed + costs.sum(axis=0)
    fitting = np.flatnonzero(totals <= budget)
    if fitting.size == 0:
        raise InfeasibleTarget(
            f"No uniform distribution up to {problem.levels[-1]:g} meets {target}; the nearest costs {totals.min():.4g} of {budget:.4g}."
        )
    return uniform(layers, float(problem.levels[fitting[0]]), dense_first_last=dense_first_last)
