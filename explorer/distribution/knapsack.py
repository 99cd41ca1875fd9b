"""Chooses one level for each layer so that the sum of losses is least and the sum of times stays within a budget.

This is the multiple-choice knapsack problem (Sinha and Zoltners 1979, "The multiple-choice knapsack problem", Operations Research 27:503);
posing layer sparsities so, and solving it by dynamic programming over discretised time, follows SPDY (Frantar and Alistarh 2022,
arXiv:2201.13096). Two programs share the work:

- Small problems are solved exactly, by keeping every partial choice that no other beats in both time and loss.
- Larger ones round times to a grid. The grid proposes candidates; which of them is taken is decided by true times.

Both build one fixed set of candidates that does not depend on the budget, and take from it the one of least loss whose true time fits. From
this follow two promises: the budget is never exceeded, and a smaller budget never gets a slower answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from explorer.errors import DistributionError, InfeasibleTarget

__all__ = ["N_BUCKETS", "Frontier", "solve_table"]

# Times are rounded to 1/N_BUCKETS of the span between the slowest and the fastest choice.
N_BUCKETS = 8192
# Problems with more choices than this go to the grid; up to here the exact program takes milliseconds.
_EXACT_CHOICES = 1_000_000
# Partial choices that the exact program may weigh at once before it gives way to the grid.
_EXACT_WIDTH = 65_536

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


class Frontier:
    """All best choices of one problem, ready for any budget.

    Parameters
    ----------
    loss, latency_ms : array_like
        ``(n_layers, n_levels)`` finite floats: cost of each level of each layer in the two currencies.

    Raises
    ------
    DistributionError
        If the arrays are not two finite matrices of the same shape.

    Notes
    -----
    On the grid, the answer is at least as good as the best choice for ``budget - n_layers * bucket_ms``, where ``bucket_ms`` is the
    span of total times over 8192; ``bucket_ms`` is 0 when the problem was solved exactly.
    """

    def __init__(self, loss: ArrayLike, latency_ms: ArrayLike) -> None:
        self._loss, self._time = _checked(loss), _checked(latency_ms)
        if self._loss.shape != self._time.shape:
            raise DistributionError(
                f"loss {self._loss.shape} and latency_ms {self._time.shape} must have the same shape (layers, levels)."
            )
        self._rows = np.arange(len(self._loss))
        fastest = self._time.min(axis=1, keepdims=True)
        # Among equally fast levels of a layer the one of least loss counts.
        self._fastest: _Ints = np.lexsort((self._loss, self._time), axis=1)[:, 0]
        self._extra = self._time - fastest
        self.bucket_ms = 0.0
        if not self._solve_exactly():
            self._solve_on_grid()

    @property
    def min_ms(self) -> float:
        """Time of the fastest choice."""
        return self._total_time(self._fastest)

    def _total_time(self, choice: _Ints) -> float:
        return float(self._time[self._rows, choice].sum())

    def best(self, budget_ms: float) -> _Ints:
        """Return the level of each layer, ``(n_layers,)`` int64, of least loss within the budget.

        Raises
        ------
        InfeasibleTarget
            If even the fastest choice takes longer.
        """
        if not budget_ms >= self.min_ms:  # also refuses NaN
            raise InfeasibleTarget(
                f"No choice of levels takes {budget_ms:.6g} ms or less; the fastest takes {self.min_ms:.6g} ms. "
                "Raise the budget to that, unlock layers, or allow higher sparsities."
            )
        found = self._best_exact(budget_ms) if self.bucket_ms == 0.0 else self._best_on_grid(budget_ms)
        return self._fastest.copy() if found is None else found

    # The exact program

    def _solve_exactly(self) -> bool:
        if len(self._rows) * np.log(self._loss.shape[1]) > np.log(_EXACT_CHOICES) + 1e-9:
            return False
        times, losses = np.zeros(1), np.zeros(1)
        steps: list[tuple[_Ints, _Ints]] = []
        for extra, loss in zip(self._extra, self._loss, strict=True):
            if times.size * extra.size > _EXACT_WIDTH:
                return False
            all_times = (times[:, None] + extra).reshape(-1)
            all_losses = (losses[:, None] + loss).reshape(-1)
            order = np.lexsort((all_losses, all_times))
            ordered = all_losses[order]
            least_before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
            kept = order[ordered < least_before]
            times, losses = all_times[kept], all_losses[kept]
            steps.append((kept // extra.size, kept % extra.size))
        choices = np.empty((times.size, len(steps)), dtype=np.int64)
        at = np.arange(times.size)
        for layer in range(len(steps) - 1, -1, -1):
            parent, level = steps[layer]
            choices[:, layer] = level[at]
            at = parent[at]
        self._choices = choices
        # Summed as `best`'s caller would, so that a budget equal to a choice's time admits it.
        self._choice_times = self._time[self._rows, choices].sum(axis=1)
        return True

    def _best_exact(self, budget_ms: float) -> _Ints | None:
        fitting = np.flatnonzero(self._choice_times <= budget_ms)
        # Loss falls strictly along the frontier: the last one that fits is the best.
        return None if fitting.size == 0 else self._choices[fitting[-1]].copy()

    # The grid

    def _solve_on_grid(self) -> None:
        span = float(self._extra.max(axis=1).sum())
        self.bucket_ms = span / N_BUCKETS
        # To the nearest, not up: errors of many layers then cancel. True times decide in the end.
        self._buckets: _Ints = np.rint(self._extra / self.bucket_ms).astype(np.int64)
        reach = self._buckets.max(axis=1)
        n = int(reach.sum()) + 1
        tables = np.empty((len(self._rows) + 1, n))
        tables[0] = 0.0
        scratch = np.empty(n)
        used = 1  # beyond the buckets that the layers so far can fill, a table is constant
        for layer in range(len(self._rows)):
            # table[b] = least loss of the layers so far within b buckets
            used += int(reach[layer])
            before, after = tables[layer, :used], tables[layer + 1]
            after.fill(np.inf)
            for shift, loss in _undominated(self._buckets[layer], self._loss[layer]):
                moved, target = scratch[: used - shift], after[shift:used]
                np.add(before[: used - shift], loss, out=moved)
                np.minimum(target, moved, out=target)
            after[used:] = after[used - 1]
        self._tables = tables
        # Candidates: one for each distinct value, at the first bucket that reaches it.
        last = tables[-1]
        self._first_buckets = np.flatnonzero(np.concatenate(([True], last[1:] < last[:-1])))

    def _best_on_grid(self, budget_ms: float) -> _Ints | None:
        slack = budget_ms - float(self._time.min(axis=1).sum())
        layers = len(self._rows)
        # A candidate whose rounded time lies further beyond the slack than rounding can explain is too slow for certain.
        highest = slack / self.bucket_ms + layers / 2 + 1
        end = int(np.searchsorted(self._first_buckets, highest, side="right"))
        while end > 0:
            begin = max(0, end - 16)
            choices = self._walk_back(self._first_buckets[begin:end])
            fits = self._time[self._rows, choices].sum(axis=1) <= budget_ms
            if fits.any():
                return choices[int(np.flatnonzero(fits)[-1])].copy()
            end = begin
        return None

    def _walk_back(self, buckets: _Ints) -> _Ints:
        """Return the choices, ``(len(buckets), n_layers)``, that reached the last table's values at these buckets."""
        at = buckets.copy()
        choices = np.empty((at.size, len(self._rows)), dtype=np.int64)
        for layer in range(len(self._rows) - 1, -1, -1):
            shift = self._buckets[layer]
            source = at[:, None] - shift
            value = np.where(
                source >= 0, self._tables[layer][np.maximum(source, 0)] + self._loss[layer], np.inf
            )
            least = value.min(axis=1, keepdims=True)
            # Among levels that reach the same loss, the one that truly takes least time.
            level = np.where(value == least, self._time[layer], np.inf).argmin(axis=1)
            choices[:, layer] = level
            at = at - shift[level]
        return choices


def solve_table(loss: ArrayLike, latency_ms: ArrayLike, budget_ms: float) -> _Ints:
    """Choose a level for each layer: least total loss with total time within the budget.

    Exact for small problems; otherwise by dynamic programming over 8192 time buckets, and then at least as good as the best choice
    for a budget that is smaller by ``n_layers / 8192`` of the span between the slowest and the fastest choice. True times are compared
    with the budget, which is therefore never exceeded.

    Parameters
    ----------
    loss, latency_ms : array_like
        ``(n_layers, n_levels)`` finite floats.
    budget_ms : float
        Largest total time.

    Returns
    -------
    ndarray
        ``(n_layers,)`` int64, the level of each layer.

    Raises
    ------
    InfeasibleTarget
        If even the fastest choice takes longer; the message names its time.
    DistributionError
        If the arrays are not two finite matrices of the same shape.

    Examples
    --------
    >>> loss = [[0.0, 1.0, 4.0], [0.0, 3.0, 9.0]]
    >>> latency_ms = [[4.0, 2.0, 1.0], [4.0, 2.0, 1.0]]
    >>> solve_table(loss, latency_ms, budget_ms=6.0).tolist()
    [1, 0]
    """
    return Frontier(loss, latency_ms).best(budget_ms)


def _checked(matrix: ArrayLike) -> _Floats:
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise DistributionError(
            f"A cost table has shape (layers, levels), at least (1, 1); got {array.shape}."
        )
    if not np.isfinite(array).all():
        raise DistributionError(
            "A cost table holds NaN or infinity; measure the missing cells, or leave their levels out."
        )
    return array


def _undominated(cost: _Ints, loss: _Floats) -> list[tuple[int, float]]:
    """Return (cost, loss) of one layer's levels that no other beats or equals in both."""
    kept: list[tuple[int, float]] = []
    least = float("inf")
    for pair in sorted(zip(cost.tolist(), loss.tolist(), strict=True)):
        if pair[1] < least:
            least = pair[1]
            kept.append(pair)
    return kept
