"""The search against brute force, where layers hurt one another in a way that no single-layer score tells."""

from __future__ import annotations

import importlib.util
import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from explorer.distribution import SearchStep, SparsityDistribution, Target, predict, search, solve
from explorer.distribution.problem import LEVEL_GRID
from explorer.errors import DistributionError, InfeasibleTarget
from explorer.sensitivity import SensitivityTable

_spec = importlib.util.spec_from_file_location("distribution_tables", Path(__file__).parent / "tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)
LAYERS = tables.LAYERS
TABLE: SensitivityTable = tables.a_table(baseline_latency_ms=6.5)
FREE = ("a", "b", "c", "d")
TARGET = Target(speedup=3.0)

# "a" suffers alone, "c" and "d" suffer together; the table's curves say nothing of either.
_ALONE = np.array([4.0, 0.1, 0.3, 0.3])


def harm(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map sparsities ``(..., 4)`` of the free layers to what the pretended network loses."""
    cuts = -np.log1p(-levels) / math.log(100)
    alone = (_ALONE * cuts**2).sum(-1)
    return np.asarray(alone + 3.0 * cuts[..., 2] * cuts[..., 3])


class Network:
    """Answers for a pretended network, and counts."""

    def __init__(self) -> None:
        self.asked: list[SparsityDistribution] = []

    def __call__(self, distribution: SparsityDistribution) -> float:
        self.asked.append(distribution)
        return float(harm(np.array([distribution[name] for name in FREE])))


def run(measure, **options) -> list[SearchStep]:
    return list(search(LAYERS, TABLE, options.pop("target", TARGET), measure, margin=0.0, **options))


def best_by_brute_force(budget_ms: float) -> float:
    """The least harm of all choices on a coarser grid, which the search's own grid contains."""
    grid = np.asarray((*LEVEL_GRID[::2], LEVEL_GRID[-1]))
    ms = np.asarray([TABLE.values_at(name, grid, "latency_ms") for name in FREE])
    picks = np.asarray(list(itertools.product(range(grid.size), repeat=4)))
    rest = predict(LAYERS, TABLE, SparsityDistribution({layer.name: 0.0 for layer in LAYERS})).latency_ms
    assert rest is not None
    extra = rest - ms[:, 0].sum()
    times = extra + sum(ms[i, picks[:, i]] for i in range(4))
    return float(harm(grid[picks[times <= budget_ms]]).min())


def test_it_finds_what_single_layer_scores_cannot_see() -> None:
    steps = run(Network(), n_total=250)
    optimum = best_by_brute_force(6.5 / 3.0)
    assert steps[0].first_loss > 1.1 * optimum, "there is something to gain"
    assert steps[-1].loss < steps[0].first_loss
    assert steps[-1].loss < 1.03 * optimum


def test_it_begins_at_the_solved_one_never_gets_worse_and_keeps_the_budget() -> None:
    network = Network()
    steps = run(network, n_total=120)
    assert network.asked[0] == solve(LAYERS, TABLE, TARGET, margin=0.0)
    assert [step.n_measured for step in steps] == list(range(1, len(steps) + 1))
    assert len(set(network.asked)) == len(network.asked) == len(steps), "nothing is measured twice"
    losses = [Network()(one) for one in network.asked]
    assert [step.loss for step in steps] == list(np.minimum.accumulate(losses))
    assert all(
        step.is_better == (losses[i] < min(losses[:i], default=np.inf)) for i, step in enumerate(steps)
    )
    for step in steps:
        assert harm(np.array([step.distribution[name] for name in FREE])) == step.loss
        got = predict(LAYERS, TABLE, step.distribution)
        assert got.latency_ms <= 6.5 / 3.0 * (1 + 1e-9)


def test_locks_bounds_and_groups_are_kept() -> None:
    options = {"locked": {"b": 0.5}, "bounds": {"a": (0.2, 0.6)}, "groups": [("c", "d")]}
    for step in run(Network(), n_total=40, target=Target(speedup=1.5), **options):
        found = step.distribution
        assert found["b"] == 0.5
        assert found.locked == {"b"}
        assert 0.2 <= found["a"] <= 0.6
        assert found["c"] == found["d"]
        assert ("c", "d") in found.groups


def test_a_seed_makes_it_repeatable() -> None:
    first, again, other = (run(Network(), n_total=30, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_it_ends_where_there_is_nothing_else_to_measure() -> None:
    steps = run(Network(), locked=dict.fromkeys(FREE, 0.9), target=Target(sparsity=0.5))
    assert len(steps) == 1
    few = run(Network(), locked=dict.fromkeys(FREE[:3], 0.9), target=Target(sparsity=0.5), n_total=250)
    assert 1 <= len(few) <= len(LEVEL_GRID)


def test_stop_ends_it_before_the_next_measurement() -> None:
    stop = threading.Event()
    network = Network()
    seen = []
    for step in search(LAYERS, TABLE, TARGET, network, stop=stop):
        seen.append(step)
        if len(seen) == 3:
            stop.set()
    assert len(network.asked) == 3
    assert run(lambda _: None) == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": Target(max_loss=1.0)}, DistributionError, "keeps a budget"),
        ({"target": Target(speedup=1000.0)}, InfeasibleTarget, "out of reach"),
        ({"n_total": 0}, DistributionError, "n_total=0"),
        ({"score": "other"}, DistributionError, "Unknown score"),
        ({"locked": {"x": 0.5}}, DistributionError, "x"),
    ],
)
def test_a_wrong_question_is_refused_before_anything_is_measured(options, error, words: str) -> None:
    network = Network()
    with pytest.raises(error, match=words):
        search(LAYERS, TABLE, options.pop("target", TARGET), network, **options)
    assert network.asked == []


def test_a_loss_that_is_no_number_is_said() -> None:
    with pytest.raises(DistributionError, match="measured loss is nan"):
        run(lambda _: math.nan)
