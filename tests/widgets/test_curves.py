from __future__ import annotations

import pytest

from explorer.widgets.curves import CurveBuilder, Curves
from tests.widgets.fake_study import Point


def curves_of(*points: Point) -> Curves:
    builder = CurveBuilder()
    for point in points:
        builder.add(point)
    return builder.curves()


def test_points_in_any_order_make_a_sorted_curve() -> None:
    curves = curves_of(*(Point("a", s, "kl", s * 2) for s in (0.9, 0.0, 0.5)))
    assert curves.of("kl", "a") == ((0.0, 0.0), (0.5, 1.0), (0.9, 1.8))


def test_values_with_refreshed_statistics_are_left_out_in_any_order() -> None:
    plain, refreshed = Point("a", 0.5, "kl", 3.0), Point("a", 0.5, "kl", 1.0, refreshed=True)
    assert curves_of(plain, refreshed).of("kl", "a") == ((0.5, 3.0),)
    assert curves_of(refreshed, plain).of("kl", "a") == ((0.5, 3.0),)


def test_values_that_are_no_numbers_and_unknown_kinds_are_left_out() -> None:
    curves = curves_of(Point("a", 0.5, "kl", float("nan")), Point("a", 0.5, "removed_energy", 1.0))
    assert curves.of("kl", "a") == ()
    assert curves.to_page(["a"]) == {}


def test_break_even_lies_where_the_line_crosses_the_dense_time() -> None:
    curves = curves_of(*(Point("a", s, "latency_ms", ms) for s, ms in ((0.0, 1.0), (0.5, 1.2), (0.9, 0.2))))
    # From (0.5, 1.2) to (0.9, 0.2) the line passes 1.0 a fifth of the way.
    assert curves.break_even("a", tolerance=0.0) == pytest.approx(0.58)


def test_break_even_is_where_the_sparse_kernel_begins_to_be_faster() -> None:
    points = ((s, min(1.0, 2.5 * (1 - s))) for s in (0.0, 0.5, 0.7, 0.8, 0.9))
    curves = curves_of(*(Point("a", s, "latency_ms", ms) for s, ms in points))
    assert curves.break_even("a", tolerance=0.0) == pytest.approx(0.6)


def test_break_even_looks_at_the_last_crossing_of_a_curve_that_is_not_monotone() -> None:
    points = ((0.0, 1.0), (0.5, 0.8), (0.7, 1.1), (0.9, 0.5))
    curves = curves_of(*(Point("a", s, "latency_ms", ms) for s, ms in points))
    assert curves.break_even("a", tolerance=0.0) == pytest.approx(0.7 + 0.2 * 0.1 / 0.6)


def test_a_layer_that_is_never_faster_has_no_break_even() -> None:
    curves = curves_of(*(Point("a", s, "latency_ms", ms) for s, ms in ((0.0, 1.0), (0.9, 1.0))))
    assert curves.break_even("a") is None
    assert Curves().break_even("a") is None


def test_the_page_gets_one_entry_a_layer_also_where_nothing_was_measured() -> None:
    page = curves_of(Point("a", 0.5, "kl", 0.123456789)).to_page(["a", "b"])
    assert page == {"kl": [[[0.5], [0.12346]], [[], []]]}
