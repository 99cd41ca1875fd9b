"""The order in which levels are measured, and what levels may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.errors import DistributionError
from explorer.sensitivity import DEFAULT_LEVELS
from explorer.sensitivity.points import check_levels, level_order


@given(st.sets(st.floats(0.01, 0.999), min_size=1, max_size=20))
def test_order_is_a_permutation_that_starts_near_nine_tenths_and_then_spans_the_range(
    levels: set[float],
) -> None:
    ascending = tuple(sorted(levels))
    order = level_order(ascending)
    assert sorted(order) == list(ascending)
    assert abs(order[0] - 0.9) == min(abs(level - 0.9) for level in levels)
    assert {ascending[0], ascending[-1]} <= set(order[:3])


def test_default_levels_are_eight_and_dense_where_curves_bend() -> None:
    assert len(DEFAULT_LEVELS) == 8
    assert check_levels(reversed(DEFAULT_LEVELS)) == DEFAULT_LEVELS


def test_zero_and_repeated_levels_are_dropped() -> None:
    assert check_levels([0.5, 0, 0.9, 0.5]) == (0.5, 0.9)


@pytest.mark.parametrize("levels", [[1.0], [-0.1], [float("nan")], [0.5, 95]])
def test_levels_out_of_range_are_refused(levels: list[float]) -> None:
    with pytest.raises(DistributionError, match=r"\[0, 1\)"):
        check_levels(levels)
