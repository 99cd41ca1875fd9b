"""Targets are met by what the tables predict; the nearest feasible one is named when they cannot be."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.distribution import (
    DEFAULT_MARGIN,
    SCORES,
    Target,
    feasible_range,
    predict,
    solve,
    uniform,
    uniform_for_target,
)
from explorer.distribution.problem import LEVEL_GRID
from explorer.distribution.scores import score_table
from explorer.errors import DistributionError, InfeasibleTarget
from explorer.sensitivity import SensitivityTable

_spec = importlib.util.spec_from_file_location("distribution_tables", Path(__file__).parent / "tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)
LAYERS, a_table = tables.LAYERS, tables.a_table

TABLE = a_table(baseline_latency_ms=6.5)
DENSE = 0.3 + 6.2


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 4.5), st.sampled_from(sorted(SCORES)))
def test_the_predicted_speedup_meets_the_target_with_the_margin(speedup: float, score: str) -> None:
    dist = solve(LAYERS, TABLE, Target(speedup=speedup), score=score)
    got = predict(LAYERS, TABLE, dist)
    assert got.latency_ms * (1 + DEFAULT_MARGIN) <= 6.5 / speedup * (1 + 1e-9)
    assert dist["stem"] == dist["fc"] == 0.0


@pytest.mark.parametrize("score", sorted(SCORES))
def test_asking_for_more_speed_never_predicts_less(score: str) -> None:
    speeds = [
        predict(LAYERS, TABLE, solve(LAYERS, TABLE, Target(speedup=s), score=score)).speedup
        for s in np.linspace(1, 4.5, 60)
    ]
    assert (np.diff(speeds) >= -1e-12).all()


def test_the_answer_is_the_best_on_its_grid() -> None:
    # Few levels and four free layers: everything can be tried.
    low = SensitivityTable.from_points(
        [p for p in TABLE.points if p.sparsity <= 0.5], metadata=TABLE.metadata
    )
    budget = 0.93 * DENSE
    dist = solve(LAYERS, low, Target(latency_ms=budget), score="kl", margin=0.0)
    grid = np.asarray([s for s in LEVEL_GRID if s < 0.5] + [0.5])
    names = ["a", "b", "c", "d"]
    harm = score_table("kl", low, names, grid)
    ms = np.asarray([low.values_at(n, grid, "latency_ms") for n in names])
    rest = 0.3 + sum(tables.DENSE_MS[n] for n in ("stem", "fc"))
    best = min(
        sum(harm[i, k] for i, k in enumerate(pick))
        for pick in itertools.product(range(len(grid)), repeat=4)
        if sum(ms[i, k] for i, k in enumerate(pick)) + rest <= budget
    )
    got = sum(low.value(n, dist[n], "kl") for n in names)
    assert got == pytest.approx(best, abs=1e-9)


def test_solving_beats_uniform_at_equal_predicted_latency() -> None:
    for speedup in (1.5, 2.0, 3.0, 4.0):
        target = Target(speedup=speedup)
        solved, even = solve(LAYERS, TABLE, target, score="kl"), uniform_for_target(LAYERS, TABLE, target)
        assert predict(LAYERS, TABLE, even).latency_ms * (1 + DEFAULT_MARGIN) <= 6.5 / speedup
        assert predict(LAYERS, TABLE, solved).kl < predict(LAYERS, TABLE, even).kl


def test_locked_layers_keep_their_sparsity_and_their_lock() -> None:
    dist = solve(LAYERS, TABLE, Target(speedup=2), locked={"c": 0.2, "stem": 0.4})
    assert (dist["c"], dist["stem"], dist["fc"]) == (0.2, 0.4, 0.0)
    assert dist.locked == {"c", "stem"}
    free = solve(LAYERS, TABLE, Target(speedup=2))
    assert predict(LAYERS, TABLE, dist).kl > predict(LAYERS, TABLE, free).kl


def test_first_and_last_join_in_when_asked() -> None:
    dist = solve(LAYERS, TABLE, Target(speedup=6), dense_first_last=False)
    assert dist["stem"] > 0
    with pytest.raises(InfeasibleTarget):
        solve(LAYERS, TABLE, Target(speedup=6))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 0.97))
def test_a_target_sparsity_is_met_by_exact_count_and_hardly_exceeded(sparsity: float) -> None:
    dist = solve(LAYERS, TABLE, Target(sparsity=sparsity))
    assert sparsity - 1e-9 <= dist.sparsity(LAYERS) <= sparsity + 0.02


def test_a_target_sparsity_needs_no_latencies() -> None:
    dist = solve(LAYERS, a_table(latency=False), Target(sparsity=0.9))
    assert dist.sparsity(LAYERS) >= 0.9
    with pytest.raises(DistributionError, match="measure the sensitivity"):
        solve(LAYERS, a_table(latency=False), Target(speedup=2))


def test_the_feasible_range_is_what_solve_can_reach() -> None:
    low, high = feasible_range(LAYERS, TABLE)
    assert high == pytest.approx(DENSE)
    assert predict(LAYERS, TABLE, uniform(LAYERS, 0.99)).latency_ms == pytest.approx(low)
    solve(LAYERS, TABLE, Target(latency_ms=low * 1.0000001), margin=0.0)
    with pytest.raises(InfeasibleTarget):
        solve(LAYERS, TABLE, Target(latency_ms=low * 0.999), margin=0.0)
    assert feasible_range(LAYERS, TABLE, locked={"c": 0.0})[0] > low
    assert feasible_range(LAYERS, TABLE, max_sparsity=0.9)[0] > low


def test_an_infeasible_speedup_names_the_nearest_and_that_one_works() -> None:
    with pytest.raises(
        InfeasibleTarget, match=r"A speed-up of 9 is out of reach.* the nearest is ([\d.]+) \("
    ) as caught:
        solve(LAYERS, TABLE, Target(speedup=9))
    nearest = float(str(caught.value).split("the nearest is ")[1].split(" ")[0])
    assert predict(LAYERS, TABLE, solve(LAYERS, TABLE, Target(speedup=nearest))).speedup >= nearest
    with pytest.raises(InfeasibleTarget, match=r"A sparsity of 0\.9950 is out of reach.*Ask for that"):
        solve(LAYERS, TABLE, Target(sparsity=0.995))
    with pytest.raises(InfeasibleTarget, match="No uniform distribution"):
        uniform_for_target(LAYERS, TABLE, Target(speedup=9))


def test_the_baseline_is_that_of_the_metadata_or_else_the_engines_dense_run() -> None:
    assert Target(speedup=2).budget_ms(TABLE) == 3.25
    assert Target(speedup=2).budget_ms(a_table()) == pytest.approx(DENSE / 2)
    assert Target(speedup=2).budget_ms(TABLE.with_metadata(baseline_latency_ms=5.0)) == 2.5


def test_no_level_beyond_the_measured_is_offered() -> None:
    low = SensitivityTable.from_points(
        [p for p in TABLE.points if p.sparsity <= 0.9], metadata=TABLE.metadata
    )
    assert max(solve(LAYERS, low, Target(speedup=2.5)).values()) <= 0.9


@pytest.mark.parametrize(
    "arguments", [{}, {"speedup": 2, "sparsity": 0.5}, {"speedup": 0}, {"sparsity": 1}, {"latency_ms": -1}]
)
def test_a_target_is_exactly_one_number_in_range(arguments: dict) -> None:
    with pytest.raises(DistributionError):
        Target(**arguments)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(DistributionError, match="Unknown score 'best'; choose one of mix_kl_sqrt"):
        solve(LAYERS, TABLE, Target(speedup=2), score="best")
    with pytest.raises(DistributionError, match="No layer 'x'"):
        solve(LAYERS, TABLE, Target(speedup=2), locked={"x": 0.5})
    with pytest.raises(DistributionError, match="max_sparsity"):
        solve(LAYERS, TABLE, Target(speedup=2), max_sparsity=99)
    with pytest.raises(DistributionError, match="margin"):
        solve(LAYERS, TABLE, Target(speedup=2), margin=-0.1)


def test_the_default_score_is_half_scaled_root_and_half_quadratic_prior() -> None:
    levels = np.asarray([0.0, 0.5, 0.9])
    expected_kl = np.asarray([[tables.HARM[n] * s**4 for s in levels] for n in ("a", "b")])
    prior = (np.log(1.0 - levels) / np.log(0.1)) ** 2
    expected = 0.5 * np.sqrt(expected_kl) / np.sqrt(expected_kl.max()) + 0.5 * prior
    np.testing.assert_allclose(score_table("mix_kl_sqrt", TABLE, ["a", "b"], levels), expected)
    np.testing.assert_allclose(score_table("loss", TABLE, ["a", "b"], levels), expected_kl, atol=1e-12)
    np.testing.assert_allclose(score_table("removed_energy", TABLE, ["a"], levels), [levels**3], atol=1e-12)


def test_the_prior_is_that_of_spdy_on_levels_that_each_remove_the_same_fraction() -> None:
    n = 11
    levels = 1.0 - 0.01 ** (np.arange(n) / (n - 1))
    np.testing.assert_allclose(
        score_table("quadratic", TABLE, ["a"], levels), [(np.arange(n) / (n - 1)) ** 2], atol=1e-12
    )


def test_every_score_starts_at_zero_and_never_falls() -> None:
    grid = np.asarray(LEVEL_GRID)
    for name in SCORES:
        values = score_table(name, TABLE, ["a", "b", "c"], grid)
        assert (values[:, 0] == 0).all()
        assert (np.diff(values, axis=1) >= 0).all()
