"""The solver against brute force, its promises on large problems, and its speed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from explorer.distribution import Frontier, knapsack, solve_table
from explorer.errors import DistributionError, InfeasibleTarget


def brute_force(loss: np.ndarray, latency: np.ndarray, budget: float) -> float | None:
    """Least loss within the budget, by trying everything; None when nothing fits."""
    best = None
    rows = np.arange(len(loss))
    for choice in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        if latency[rows, list(choice)].sum() <= budget:
            total = loss[rows, list(choice)].sum()
            best = total if best is None else min(best, total)
    return best


def total(matrix: np.ndarray, choice: np.ndarray) -> float:
    return float(matrix[np.arange(len(matrix)), choice].sum())


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4))
# Small whole numbers make ties and budgets that are met to the last digit common.
INTEGERS = st.integers(0, 6).map(float)
REALS = st.floats(0, 10, allow_subnormal=False)


@settings(max_examples=150, deadline=None)
@given(st.data(), SHAPES, st.sampled_from([INTEGERS, REALS]))
def test_small_problems_are_solved_as_well_as_by_brute_force(data, shape, elements) -> None:
    loss = data.draw(hnp.arrays(np.float64, shape, elements=elements))
    latency = data.draw(hnp.arrays(np.float64, shape, elements=elements))
    budget = data.draw(st.one_of(elements, st.floats(0, float(latency.max(axis=1).sum()) + 1)))
    expected = brute_force(loss, latency, budget)
    if expected is None:
        with pytest.raises(InfeasibleTarget):
            solve_table(loss, latency, budget)
        return
    choice = solve_table(loss, latency, budget)
    assert choice.shape == (shape[0],)
    assert choice.dtype == np.int64
    assert total(latency, choice) <= budget
    assert total(loss, choice) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 5))
def test_the_grid_keeps_its_bound_against_brute_force(seed: int, n_layers: int, n_levels: int) -> None:
    rng = np.random.default_rng(seed)
    loss, latency = rng.random((n_layers, n_levels)), rng.random((n_layers, n_levels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_EXACT_CHOICES", 1)
        frontier = Frontier(loss, latency)
    assert frontier.bucket_ms == pytest.approx((latency.max(1) - latency.min(1)).sum() / knapsack.N_BUCKETS)
    budget = float(rng.uniform(latency.min(1).sum(), latency.max(1).sum()))
    choice = frontier.best(budget)
    assert total(latency, choice) <= budget
    exact, reduced = (
        brute_force(loss, latency, budget),
        brute_force(loss, latency, budget - n_layers * frontier.bucket_ms),
    )
    assert exact is not None
    assert total(loss, choice) >= exact - 1e-12
    if reduced is not None:
        assert total(loss, choice) <= reduced + 1e-9


def large_problem(seed: int = 0, n_layers: int = 100, n_levels: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    levels = np.linspace(0, 0.99, n_levels)
    loss = rng.uniform(0.1, 3, (n_layers, 1)) * levels ** rng.uniform(1, 6, (n_layers, 1))
    latency = rng.uniform(0.1, 5, (n_layers, 1)) * np.minimum(1, 0.05 + (1 - levels) / 0.45)
    return loss, latency


@pytest.mark.parametrize("exact", [True, False])
def test_a_smaller_budget_never_gets_a_slower_answer_nor_a_smaller_loss(exact: bool) -> None:
    for seed in range(5):
        loss, latency = large_problem(seed, 4 if exact else 12, 9)
        frontier = Frontier(loss, latency)
        assert (frontier.bucket_ms == 0) == exact
        budgets = np.linspace(frontier.min_ms, latency.max(1).sum() * 1.01, 150)
        answers = [frontier.best(budget) for budget in budgets]
        times = np.array([total(latency, answer) for answer in answers])
        losses = np.array([total(loss, answer) for answer in answers])
        assert (times <= budgets).all()
        assert (np.diff(times) >= 0).all()
        assert (np.diff(losses) <= 1e-12).all()


def test_a_large_problem_is_nearly_optimal_by_lagrangian_bound() -> None:
    loss, latency = large_problem()
    budget = latency[:, 0].sum() / 3
    choice = solve_table(loss, latency, budget)
    # For any price, the relaxed optimum is a lower bound on the loss.
    bound = max(
        float((loss + price * latency).min(1).sum() - price * budget) for price in np.linspace(0, 5, 500)
    )
    assert total(latency, choice) <= budget
    assert bound <= total(loss, choice) <= bound * 1.005


def test_a_hundred_layers_of_fifty_levels_follow_a_slider() -> None:
    loss, latency = large_problem()
    budget = latency[:, 0].sum() / 3
    took = []
    for _ in range(5):
        start = time.process_time()
        solve_table(loss, latency, budget)
        took.append(time.process_time() - start)
    assert min(took) < 0.05


def test_a_problem_without_choice_and_a_budget_of_zero() -> None:
    assert solve_table([[3.0], [4.0]], [[1.0], [2.0]], 3.0).tolist() == [0, 0]
    assert solve_table([[3.0, 1.0]], [[0.0, 0.0]], 0.0).tolist() == [1]
    with pytest.raises(InfeasibleTarget):
        solve_table([[0.0, 1.0]], [[1.0, 0.5]], 0.0)


def test_a_budget_of_exactly_the_fastest_choice_is_feasible() -> None:
    loss, latency = large_problem(3)
    budget = float(latency.min(1).sum())
    assert total(latency, solve_table(loss, latency, budget)) == budget


def test_an_unlimited_budget_buys_the_least_loss() -> None:
    loss, latency = large_problem(4)
    assert total(loss, solve_table(loss, latency, float("inf"))) == pytest.approx(loss.min(1).sum())


def test_a_slower_level_that_harms_less_is_worth_its_time_only_while_it_fits() -> None:
    # Latency may rise with sparsity before it falls; the solver must not assume an order of levels.
    loss, latency = [[0.0, 1.0, 2.0]], [[10.0, 12.0, 5.0]]
    assert solve_table(loss, latency, 12.0).tolist() == [0]
    assert solve_table(loss, latency, 9.9).tolist() == [2]


def test_the_infeasible_are_told_the_nearest() -> None:
    with pytest.raises(InfeasibleTarget, match="the fastest takes 3 ms"):
        solve_table([[0, 1], [0, 1]], [[2, 1], [4, 2]], 2.5)
    with pytest.raises(InfeasibleTarget):
        solve_table([[0.0]], [[1.0]], float("nan"))


@pytest.mark.parametrize(
    ("loss", "latency"),
    [
        ([[1.0, 2.0]], [[1.0]]),
        ([1.0], [1.0]),
        ([[float("nan")]], [[1.0]]),
        ([[1.0]], [[float("inf")]]),
        ([[]], [[]]),
    ],
)
def test_tables_that_are_no_finite_matrices_are_refused(loss, latency) -> None:
    with pytest.raises(DistributionError):
        solve_table(loss, latency, 1.0)
