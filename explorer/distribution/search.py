"""Searches for a distribution with the network itself as the judge: layers' weights in the score are learnt by sampling, solving, and measuring.

Scores of single layers cannot know how layers hurt one another. SPDY (Frantar and Alistarh, "SPDY: Accurate pruning with speedup guarantees" (2022), section 3.3) therefore learns
one coefficient for each layer: coefficients give an error table, dynamic programming gives the distribution of least error within the budget, and the loss of the network
that is pruned to it, nothing being trained, tells how good the coefficients were. Random coefficients come first, then a local search around the best.

Some things differ from the paper. The search begins at what `explorer.distribution.solve` gives, so that its answer is never worse by what it measures. And networks are
judged with BatchNorm statistics refreshed (by whoever passes `measure`), in place of reconstructed weights. The authors' code (github.com/IST-DASLab/spdy) gives up a neighbourhood
after 100 draws and ends with the last one; here it is 20 draws, and a number of measurements ends it.

It is for networks that will not be trained any more. Where pruned networks were trained, those that it found ended 0.4, 0.0 and 1.0 points below those that it began with, on
three networks (``docs/results/scores.txt``): what is least harmful before training is not what trains best.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.distribution.distribution import SparsityDistribution
from explorer.distribution.knapsack import Frontier
from explorer.distribution.problem import Costs, Problem
from explorer.distribution.scores import DEFAULT_SCORE
from explorer.distribution.solver import DEFAULT_MARGIN, posed_for
from explorer.distribution.target import Target
from explorer.errors import DistributionError
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["SearchStep", "search"]

# The authors' code begins with as many random draws, and draws a tenth of the coefficients anew at first.
_N_RANDOM = 100
_SHARE = 0.1
# After so many draws that were no better a neighbourhood is given up.
_PATIENCE = 20
# After so many draws in a row that led to known distributions nothing new is near.
_IN_VAIN = 200

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SearchStep:
    """Where a search stands.

    Attributes
    ----------
    distribution : SparsityDistribution
        The best so far.
    loss : float
        What was measured of it.
    first_loss : float
        What was measured of the distribution that the search began with.
    n_measured, n_total : int
        Distributions measured so far, and in all.
    is_better : bool
        This step found it.
    """

    distribution: SparsityDistribution
    loss: float
    first_loss: float
    n_measured: int
    n_total: int
    is_better: bool


def search(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    target: Target,
    measure: Callable[[SparsityDistribution], float | None],
    *,
    n_total: int = 250,
    begin: SparsityDistribution | None = None,
    score: str = DEFAULT_SCORE,
    margin: float = DEFAULT_MARGIN,
    other_params: int = 0,
    seed: int = 0,
    stop: threading.Event | None = None,
    **options: Any,
) -> Iterator[SearchStep]:
    """Learn how much each layer's score counts, and yield a step for each distribution that was measured.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    table : SensitivityTable
    target : Target
        Not a `max_loss`.
    measure : callable
        Gives the loss of the network pruned to a distribution, nothing being trained: finite, lower is better; None when it was stopped, which ends the search.
    n_total : int
        Distributions to measure. Coefficients that lead to a distribution that is known cost nothing.
    begin : SparsityDistribution, optional
        Is measured first, and is the answer as long as nothing is better; what `solve` gives comes next. Whether it keeps the budget is the caller's business.
    score : str
        Gives the distribution to begin with. Coefficients multiply the quadratic prior, as in the paper.
    margin, other_params
        As for `explorer.distribution.solve`.
    seed : int
    stop : threading.Event, optional
        When set, the search ends before the next measurement.
    **options
        `locked`, `bounds`, `groups`, `max_sparsity` and `dense_first_last`, as for `solve`.

    Yields
    ------
    SearchStep

    Raises
    ------
    InfeasibleTarget
        If the target cannot be met.
    DistributionError
        If the table lacks measurements, an argument is out of range, or `measure` gives no finite number.
    """
    if target.name == "max_loss":
        raise DistributionError(
            "A search keeps a budget of time, count or size; solve for a predicted loss instead."
        )
    if n_total < 1:
        raise DistributionError(f"A search measures at least one distribution; got n_total={n_total}.")
    problem, costs, budget = posed_for(
        layers, table, target, score, margin=margin, other_params=other_params, **options
    )
    # The checks above run when the generator is made: a mistake shows where it was made.
    judge = _Judge(problem, costs, budget, measure)
    scores, prior = problem.scores(score, table), problem.scores("quadratic", table)
    return _steps(judge, begin, scores, prior, n_total, seed, stop)


class _Judge:
    """Turns error tables into distributions, and knows what was measured of each."""

    def __init__(
        self,
        problem: Problem,
        costs: Costs,
        budget: float,
        measure: Callable[[SparsityDistribution], float | None],
    ) -> None:
        self._problem, self._times, self._measure = problem, costs.rows, measure
        self._within = max(budget - costs.fixed, float(costs.rows.min(axis=1).sum())) if problem.free else 0.0
        self._known: dict[SparsityDistribution, float] = {}
        self.is_new = False

    @property
    def n_measured(self) -> int:
        return len(self._known)

    def __call__(self, errors: _Floats) -> tuple[SparsityDistribution, float] | None:
        """Return the distribution of least error, and its loss; None when the measurement was stopped."""
        free = len(self._problem.free)
        picks = Frontier(errors, self._times).best(self._within) if free else np.empty(0, dtype=np.int64)
        return self.judge(self._problem.distribution(picks))

    def judge(self, distribution: SparsityDistribution) -> tuple[SparsityDistribution, float] | None:
        """Return a distribution with its loss; None when the measurement was stopped."""
        key = SparsityDistribution(distribution)
        self.is_new = key not in self._known
        if self.is_new:
            loss = self._measure(distribution)
            if loss is None:
                return None
            if not math.isfinite(loss):
                raise DistributionError(
                    f"The measured loss is {loss}; a search needs finite ones, so that the better can be told from the worse."
                )
            self._known[key] = loss
        return distribution, self._known[key]


@dataclass(frozen=True, slots=True)
class _Coefficients:
    """One for each free group, on a base of errors; at most `largest`."""

    base: _Floats
    largest: float
    values: _Floats

    def errors(self) -> _Floats:
        return self.base * self.values[:, None]

    def drawn_anew(self, which: NDArray[np.int64], generator: np.random.Generator) -> _Coefficients:
        values = self.values.copy()
        values[which] = self.largest * generator.random(which.size)
        return replace(self, values=values)


def _steps(
    judge: _Judge,
    begin: SparsityDistribution | None,
    scores: _Floats,
    prior: _Floats,
    n_total: int,
    seed: int,
    stop: threading.Event | None,
) -> Iterator[SearchStep]:
    generator = np.random.default_rng(seed)
    n_groups = len(scores)
    # Coefficients of the score lie around 1, as it is meant; those of the prior in [0, 1], as in the paper.
    best = _Coefficients(scores, 2.0, np.ones(n_groups))
    found = judge(best.errors()) if begin is None else judge.judge(begin)
    if found is None:
        return
    first_loss = found[1]
    chosen, least = found
    yield SearchStep(chosen, least, first_loss, 1, n_total, True)
    if begin is not None and n_total > 1 and not (stop is not None and stop.is_set()):
        found = judge(best.errors())
        if found is None:
            return
        is_better = found[1] < least
        if is_better:
            chosen, least = found
        if judge.is_new:
            yield SearchStep(chosen, least, first_loss, judge.n_measured, n_total, is_better)
    everyone = np.arange(n_groups)
    n_random = min(_N_RANDOM, n_total // 2)
    size, fruitless, in_vain = max(1, math.ceil(_SHARE * n_groups)), 0, 0
    while (
        n_groups
        and judge.n_measured < n_total
        and in_vain < _IN_VAIN
        and not (stop is not None and stop.is_set())
    ):
        is_random = judge.n_measured <= n_random and in_vain == 0
        if is_random:
            tried = _Coefficients(prior, 1.0, np.zeros(n_groups)).drawn_anew(everyone, generator)
        else:
            # Where all neighbours are known, those further away.
            reach = size if in_vain < _PATIENCE else int(generator.integers(1, n_groups + 1))
            tried = best.drawn_anew(
                generator.choice(n_groups, min(reach, n_groups), replace=False), generator
            )
        found = judge(tried.errors())
        if found is None:
            return
        in_vain = 0 if judge.is_new else in_vain + 1
        is_better = found[1] < least
        if is_better:
            best, (chosen, least), fruitless = tried, found, 0
        elif not is_random:
            fruitless += 1
            if fruitless >= _PATIENCE:
                size, fruitless = max(1, size - 1), 0
        if judge.is_new:
            yield SearchStep(chosen, least, first_loss, judge.n_measured, n_total, is_better)
