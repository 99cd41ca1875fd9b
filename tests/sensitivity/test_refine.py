"""Refinement against the curves that it is to find."""

from __future__ import annotations

import numpy as np
import pytest

from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityPoint, SensitivityTable, refinement

LEVELS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


def bent(sparsity: float) -> float:
    """Flat, then steep from 0.93 on."""
    return 4.0 * max(0.0, sparsity - 0.93) / 0.07


def flat(sparsity: float) -> float:
    return 0.01 * sparsity


CURVES = {"bent": bent, "flat": flat}


def table_of(levels: tuple[float, ...] = LEVELS, error: float | None = None, **more: tuple[float, ...]):
    points = [
        SensitivityPoint(name, level, "kl", curve(level) ** 2, std_error=error)
        for name, curve in CURVES.items()
        for level in (*levels, *more.get(name, ()))
    ]
    return SensitivityTable.from_points(points)


def test_levels_go_where_the_curve_bends() -> None:
    cells = refinement(table_of(), 6)
    assert {layer for layer, _ in cells} == {"bent"}
    assert all(0.9 < level < 0.99 for _, level in cells)
    assert len(set(cells)) == 6


def test_a_refined_table_is_nearer_the_truth_than_one_with_evenly_placed_levels() -> None:
    def worst(table: SensitivityTable) -> float:
        at = np.linspace(0.5, 0.99, 400)
        return max(
            abs(table.value(name, s, "kl") ** 0.5 - curve(s)) for name, curve in CURVES.items() for s in at
        )

    cells = refinement(table_of(), 8)
    refined = table_of(**{name: tuple(s for layer, s in cells if layer == name) for name in CURVES})
    even = table_of(bent=(0.25, 0.65, 0.85, 0.925), flat=(0.25, 0.65, 0.85, 0.925))
    assert worst(refined) < 0.6 * worst(even)


def test_noise_is_not_looked_into() -> None:
    assert refinement(table_of(error=10.0), 8) == ()


def test_what_is_in_view_comes_first() -> None:
    assert {layer for layer, _ in refinement(table_of(), 5, layers=["flat"])} == {"flat"}
    assert all(0.3 <= level <= 0.7 for _, level in refinement(table_of(), 5, between=(0.3, 0.7)))


def test_what_the_solver_reads_counts_more() -> None:
    def share_near(near: dict[str, float] | None) -> float:
        cells = refinement(table_of((0.0, 0.5, 0.99)), 6, layers=["flat"], near=near)
        return sum(level < 0.5 for _, level in cells) / len(cells)

    assert share_near({"flat": 0.2}) > share_near(None)


def test_it_ends_when_levels_are_close() -> None:
    cells = refinement(table_of((0.0, 0.98, 0.99)), 10_000, layers=["bent"], between=(0.98, 0.99))
    levels = np.sort([0.98, 0.99, *(level for _, level in cells)])
    assert np.diff(levels).min() >= 0.003


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(DistributionError, match="no layer 'curved'"):
        refinement(table_of(), 3, layers=["curved"])
    with pytest.raises(DistributionError, match="'loss' has not been measured"):
        refinement(table_of(), 3, kind="loss")
