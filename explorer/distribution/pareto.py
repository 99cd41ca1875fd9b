"""All worthwhile distributions at once: the less time, the more loss.

Computed once from the tables, and then asked as often as a slider moves. Invariant: along the frontier time falls and the score rises, so a balance between the two is
monotone in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from explorer.distribution.distribution import SparsityDistribution
from explorer.distribution.knapsack import Frontier
from explorer.distribution.problem import pose
from explorer.distribution.scores import DEFAULT_SCORE
from explorer.distribution.solver import needed_kinds
from explorer.errors import DistributionError
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["ParetoFrontier", "ParetoPoint", "pareto"]


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A distribution that no other beats in both.

    Attributes
    ----------
    latency_ms : float
        Predicted.
    score : float
        What was minimised.
    distribution : SparsityDistribution
    """

    latency_ms: float
    score: float
    distribution: SparsityDistribution


@dataclass(frozen=True, slots=True)
class ParetoFrontier:
    """Points by falling time and rising score."""

    points: tuple[ParetoPoint, ...]

    def at(self, balance: float) -> ParetoPoint:
        """Return the point at a balance: 0 is the least loss, 1 the least time.

        Steps are equal in the logarithm of time, so that each multiplies the speed by the same factor.

        Raises
        ------
        DistributionError
            If `balance` is outside [0, 1].
        """
        if not 0.0 <= balance <= 1.0:
            raise DistributionError(
                f"A balance lies between 0 (least loss) and 1 (least time); got {balance!r}."
            )
        logs = np.log([point.latency_ms for point in self.points])
        wanted = logs[0] + balance * (logs[-1] - logs[0])
        # The first that is as fast as wanted.
        at = int(np.searchsorted(-logs, -wanted - 1e-12))
        return self.points[min(at, len(self.points) - 1)]

    def within(self, latency_ms: float) -> ParetoPoint | None:
        """Return the point of least score that takes no longer; None when there is none."""
        return next((point for point in self.points if point.latency_ms <= latency_ms), None)


def pareto(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    *,
    n_points: int = 100,
    score: str = DEFAULT_SCORE,
    **options: Any,
) -> ParetoFrontier:
    """Solve for many times between the slowest and the fastest.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    table : SensitivityTable
        With latencies and what `score` needs.
    n_points : int
        Most points, at least 2.
    score : str
    **options
        `locked`, `bounds`, `groups`, `max_sparsity`, `dense_first_last`, as for `explorer.distribution.solve`.

    Raises
    ------
    DistributionError
        If the table lacks measurements, or an argument is out of range.
    """
    if n_points < 2:
        raise DistributionError(f"A frontier has at least two points; got n_points={n_points}.")
    problem = pose(layers, table, (*needed_kinds(score), "latency_ms"), **options)
    costs = problem.latencies(table)
    if not problem.free:
        only = problem.distribution(np.empty(0, dtype=np.int64))
        return ParetoFrontier((ParetoPoint(costs.fixed, 0.0, only),))
    scores = problem.scores(score, table)
    frontier = Frontier(scores, costs.rows)
    rows = np.arange(len(problem.free))
    found: dict[tuple[int, ...], ParetoPoint] = {}
    for budget in np.geomspace(costs.most, costs.least, n_points):
        picks = frontier.best(max(float(budget) - costs.fixed, frontier.min_ms))
        key = tuple(picks.tolist())
        if key not in found:
            found[key] = ParetoPoint(
                costs.fixed + float(costs.rows[rows, picks].sum()),
                float(scores[rows, picks].sum()),
                problem.distribution(picks),
            )
    # Of equal times the least score; what is slower without less loss is beaten.
    kept: list[ParetoPoint] = []
    for point in sorted(found.values(), key=lambda point: (point.latency_ms, point.score)):
        if not kept or point.score < kept[-1].score:
            kept.append(point)
    return ParetoFrontier(tuple(reversed(kept)))
