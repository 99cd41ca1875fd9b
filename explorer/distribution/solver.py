"""From a target to a sparsity for each layer, over measured tables.

Invariants: the target is met by what the tables predict, or `InfeasibleTarget` names the nearest one that can be; locked layers keep their
sparsity; asking for more speed never predicts less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from explorer.distribution.distribution import SparsityDistribution, uniform
from explorer.distribution.knapsack import Frontier
from explorer.distribution.problem import LEVEL_GRID, Costs, Problem, pose
from explorer.distribution.scores import DEFAULT_SCORE
from explorer.distribution.target import Target
from explorer.errors import DistributionError, InfeasibleTarget
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["DEFAULT_MARGIN", "baseline_for_target", "feasible_range", "solve", "uniform_for_target"]

# Sums of layer times miss the time of the whole network by a per cent or two. Solving for a target that is faster by this share makes
# it likely that the measured latency meets what was asked.
DEFAULT_MARGIN = 0.03
_BISECTIONS = 40


def solve(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    *,
    locked: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    groups: Iterable[Iterable[str]] = (),
    max_sparsity: float = 0.99,
    dense_first_last: bool = True,
    score: str = DEFAULT_SCORE,
    margin: float = DEFAULT_MARGIN,
    other_params: int = 0,
) -> SparsityDistribution:
    """Find the distribution of least score that meets a target; for `max_loss` the fastest that keeps it.

    Levels between measured ones are read from monotone curves, on a grid of 55 levels that gets finer towards the end.

    Parameters
    ----------
    layers : sequence of PrunableLayer
        All prunable layers, in execution order.
    table : SensitivityTable
        Latencies for a target in time or a `max_loss`; what `score` needs in any case.
    target : Target
    locked : mapping of str to float, optional
        Layers whose sparsity is given. They are locked in the result.
    bounds : mapping of str to (float, float), optional
        Least and greatest sparsity of a layer.
    groups : iterable of iterable of str
        Layers that get the same sparsity; they are groups of the result.
    max_sparsity : float
        Upper bound of each layer, in [0, 1).
    dense_first_last : bool
        Leave first and last layer dense, unless `locked` or `bounds` say otherwise.
    score : str
        Name of what is minimised, see `explorer.distribution.scores`.
    margin : float
        Prediction error to be safe from, as a share: predicted latency times (1 + margin) meets the target. Not used for counts and sizes, which are exact, nor for losses.
    other_params : int
        Values outside prunable weights, for a target `size_bytes`.

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
    problem, costs, budget = posed_for(
        layers,
        table,
        target,
        score,
        margin=margin,
        other_params=other_params,
        locked=locked,
        bounds=bounds,
        groups=groups,
        max_sparsity=max_sparsity,
        dense_first_last=dense_first_last,
    )
    if not problem.free:
        return problem.distribution(np.empty(0, dtype=np.int64))
    is_loss = target.name == "max_loss"
    wanted = problem.latencies(table).rows if is_loss else problem.scores(score, table)
    picks = Frontier(wanted, costs.rows).best(max(budget - costs.fixed, float(costs.rows.min(axis=1).sum())))
    return problem.distribution(picks)


def posed_for(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    score: str,
    *,
    margin: float,
    other_params: int,
    **options: Any,
) -> tuple[Problem, Costs, float]:
    """Return what may be chosen, what each choice costs, and the budget that a target leaves; the arguments are those of `solve`.

    Raises
    ------
    InfeasibleTarget, DistributionError
        As `solve`.
    """
    if not 0.0 <= margin < float("inf"):
        raise DistributionError(f"margin is a share of the predicted latency, 0 or more; got {margin!r}.")
    needs_time = target.is_time or target.name == "max_loss"
    kinds = (_harm_kind(table),) if target.name == "max_loss" else needed_kinds(score)
    problem = pose(layers, table, (*kinds, *(("latency_ms",) if needs_time else ())), **options)
    costs, budget = _posed(problem, table, target, margin, other_params)
    if costs.least > budget:
        raise InfeasibleTarget(_out_of_reach(target, table, problem, costs, margin))
    return problem, costs, budget


def _posed(
    problem: Problem, table: SensitivityTable, target: Target, margin: float, other_params: int
) -> tuple[Costs, float]:
    """Return what is to be kept within a budget, and the budget."""
    exact = 1.0 + 1e-12
    if target.is_time:
        return problem.latencies(table), target.budget_ms(table) / (1.0 + margin)
    if target.name == "max_loss":
        return problem.harm(table), target.value * exact
    if target.name == "size_bytes":
        return problem.sizes(other_params), target.value * exact
    total = sum(layer.n_params for layer in problem.layers)
    wanted = target.value if target.name == "params" else (1.0 - target.value) * total
    return problem.remaining(), wanted * exact


def _harm_kind(table: SensitivityTable) -> str:
    return "kl" if "kl" in table.kinds else "loss"


def needed_kinds(score: str) -> tuple[str, ...]:
    """Return the kind of points that a score reads."""
    for kind in ("kl", "loss", "removed_energy", "fisher"):
        if kind in score:
            return (kind,)
    return ()


def _out_of_reach(
    target: Target, table: SensitivityTable, problem: Problem, costs: Costs, margin: float
) -> str:
    where = f"with {problem.held_words} and at most {problem.highest:g} elsewhere"
    if target.is_time:
        safe = costs.least * (1.0 + margin)
        nearest = f"{safe:.4g} ms"
        asked = (
            f"{target.value:.4g} ms" if target.name == "latency_ms" else f"A speed-up of {target.value:.3g}"
        )
        baseline = table.baseline_latency_ms
        if target.name == "speedup" and baseline is not None:
            nearest = f"{np.floor(baseline / safe * 1000) / 1000:g} ({safe:.4g} ms against {baseline:.4g} ms)"
        return (
            f"{asked} is out of reach: {where} and a margin of {margin:g}, the nearest is {nearest}. "
            "Ask for that, unlock layers, raise max_sparsity, or lower the margin."
        )
    advice = "Ask for that, unlock layers, or raise max_sparsity."
    if target.name == "sparsity":
        total = sum(layer.n_params for layer in problem.layers)
        return f"A sparsity of {target.value:.4f} is out of reach: {where} it is {1 - costs.least / total:.4f}. {advice}"
    if target.name == "params":
        return f"{target.value:,.0f} weights are out of reach: {where} {costs.least:,.0f} remain. {advice}"
    if target.name == "size_bytes":
        return f"{target.value:,.0f} bytes are out of reach: {where} it takes {costs.least:,.0f}. {advice}"
    return (
        f"A predicted loss of {target.value:.4g} nats is out of reach: {problem.held_words} alone cost {costs.least:.4g}. "
        "Ask for that, unlock layers, or lower their bounds."
    )


def feasible_range(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    what: str = "latency_ms",
    *,
    other_params: int = 0,
    **options: Any,
) -> tuple[float, float]:
    """Return the least and the greatest of a quantity that `solve` can choose between.

    No margin is taken off. The greatest latency is that of all free layers dense.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    table : SensitivityTable
    what : {"latency_ms", "speedup", "sparsity", "params", "size_bytes", "max_loss"}
    other_params : int
        For sizes, as for `solve`.
    **options
        `locked`, `bounds`, `groups`, `max_sparsity`, `dense_first_last`, as for `solve`.

    Raises
    ------
    DistributionError
        If the table lacks what is asked for, or an argument is out of range.
    """
    known = ("latency_ms", "speedup", "sparsity", "params", "size_bytes", "max_loss")
    if what not in known:
        raise DistributionError(f"A range is of {', '.join(known)}; got {what!r}.")
    kinds: tuple[str, ...] = ()
    if what in ("latency_ms", "speedup"):
        kinds = ("latency_ms",)
    elif what == "max_loss":
        kinds = (_harm_kind(table),)
    problem = pose(layers, table, kinds, **options)
    if what in ("latency_ms", "speedup"):
        costs = problem.latencies(table)
    elif what == "max_loss":
        costs = problem.harm(table)
    else:
        costs = problem.sizes(other_params) if what == "size_bytes" else problem.remaining()
    if what == "speedup":
        baseline = table.baseline_latency_ms
        if baseline is None:
            raise DistributionError("A speed-up needs measured latencies; run the latency measurement first.")
        return baseline / costs.most, baseline / costs.least
    if what == "sparsity":
        total = sum(layer.n_params for layer in layers)
        return 1.0 - costs.most / total, 1.0 - costs.least / total
    return costs.least, costs.most


def baseline_for_target(
    baseline: Callable[[float], SparsityDistribution],
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    *,
    margin: float = DEFAULT_MARGIN,
    other_params: int = 0,
) -> SparsityDistribution:
    """Find the least sparse distribution of a family that meets a target: what a solved one is compared with.

    Parameters
    ----------
    baseline : callable
        From a total sparsity in [0, 1) to a distribution, such as ``lambda s: lamp(module, layers, s)``; more sparsity must not cost more.
    layers, table, target, margin, other_params
        As for `solve`. Not for `max_loss`.

    Raises
    ------
    InfeasibleTarget
        If no member of the family meets it.
    DistributionError
        If the table lacks latencies, or the target is a loss.
    """
    if target.name == "max_loss":
        raise DistributionError("A family is compared at equal time, count or size, not at equal loss.")

    def excess(found: SparsityDistribution) -> float:
        problem = pose(layers, table, (), locked=found, dense_first_last=False)
        costs, budget = _posed(problem, table, target, margin, other_params)
        return costs.least - budget

    low, high = 0.0, None
    for step in range(1, 65):
        sparsity = 1.0 - 0.9**step
        try:
            found = baseline(sparsity)
        except InfeasibleTarget:
            break
        if excess(found) <= 0.0:
            high = sparsity
            break
        low = sparsity
    if high is None:
        raise InfeasibleTarget(
            f"No distribution of this family meets {target.name}={target.value:g}; the sparsest that was tried has {low:.3f}."
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(baseline(middle)) <= 0.0 else (middle, high)
    return baseline(high)


def uniform_for_target(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    *,
    dense_first_last: bool = True,
    margin: float = DEFAULT_MARGIN,
    other_params: int = 0,
) -> SparsityDistribution:
    """Find the least sparse uniform distribution on the grid that meets a target.

    Raises
    ------
    InfeasibleTarget
        If no level of the grid up to what was measured meets it.
    DistributionError
        If the table lacks latencies, or the target is a loss.
    """
    if target.name == "max_loss":
        raise DistributionError(
            "A uniform distribution is compared at equal time, count or size, not at equal loss."
        )
    kinds = ("latency_ms",) if target.is_time else ()
    problem = pose(layers, table, kinds, max_sparsity=LEVEL_GRID[-1], dense_first_last=dense_first_last)
    costs, budget = _posed(problem, table, target, margin, other_params)
    totals = costs.fixed + costs.rows.sum(axis=0)
    fitting = np.flatnonzero(totals <= budget)
    if fitting.size == 0:
        raise InfeasibleTarget(
            f"No uniform distribution up to {problem.levels[-1]:g} meets {target.name}={target.value:g}; the nearest costs {totals.min():.4g} of {budget:.4g}."
        )
    return uniform(layers, float(problem.levels[fitting[0]]), dense_first_last=dense_first_last)
