from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.errors import RunError
from explorer.pruning.schedule import CubicSchedule

fractions = st.floats(0.0, 0.999)


@st.composite
def schedules(draw: st.DrawFn) -> CubicSchedule:
    begin = draw(st.integers(0, 1000))
    return CubicSchedule(
        initial=draw(fractions),
        final=draw(fractions),
        begin_step=begin,
        end_step=begin + draw(st.integers(0, 1000)),
        update_every=draw(st.integers(1, 100)),
    )


def test_half_way_the_cubic_schedule_has_done_seven_eighths() -> None:
    schedule = CubicSchedule(initial=0.2, final=1.0 - 0.2, begin_step=10, end_step=30, update_every=5)
    assert schedule.sparsity_at(20) == pytest.approx(0.2 + 0.6 * 7 / 8, abs=1e-15)


@given(schedules(), st.floats(0.0, 1.0))
def test_sparsity_equals_the_published_formula(schedule: CubicSchedule, share: float) -> None:
    # Zhu and Gupta 2017, equation 1, with n dt = end_step - begin_step, in exact arithmetic.
    step = schedule.begin_step + round(share * (schedule.end_step - schedule.begin_step))
    if schedule.end_step == schedule.begin_step:
        return
    progress = Fraction(step - schedule.begin_step, schedule.end_step - schedule.begin_step)
    initial, final = Fraction(schedule.initial), Fraction(schedule.final)
    expected = final + (initial - final) * (1 - progress) ** 3
    assert schedule.sparsity_at(step) == pytest.approx(float(expected), abs=1e-12)


@given(schedules())
def test_both_ends_are_exact(schedule: CubicSchedule) -> None:
    if schedule.end_step > schedule.begin_step:
        assert schedule.sparsity_at(schedule.begin_step) == schedule.initial
    assert schedule.sparsity_at(schedule.end_step) == schedule.final
    assert schedule.sparsity_at(schedule.end_step + 1000) == schedule.final


@given(schedules(), st.integers(0, 2000), st.integers(0, 2000))
def test_sparsity_moves_towards_the_end_only(schedule: CubicSchedule, first: int, second: int) -> None:
    earlier, later = schedule.sparsity_at(min(first, second)), schedule.sparsity_at(max(first, second))
    if schedule.initial <= schedule.final:
        assert earlier <= later + 1e-15
    else:
        assert earlier >= later - 1e-15
    low, high = sorted((schedule.initial, schedule.final))
    assert low - 1e-15 <= earlier <= high + 1e-15


@given(schedules())
def test_updates_come_at_the_asked_distance_and_at_both_ends(schedule: CubicSchedule) -> None:
    updates = [step for step in range(schedule.end_step + 200) if schedule.is_update(step)]
    assert updates[0] == schedule.begin_step
    assert updates[-1] == schedule.end_step
    gaps = [later - earlier for earlier, later in itertools.pairwise(updates)]
    assert all(gap == schedule.update_every for gap in gaps[:-1])
    assert all(gap <= schedule.update_every for gap in gaps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initial": -0.1}, "initial sparsity -0.1"),
        ({"final": 1.0}, "final sparsity 1.0"),
        ({"final": float("nan")}, "final sparsity nan"),
        ({"begin_step": 20, "end_step": 10}, "runs backwards"),
        ({"begin_step": -1}, "runs backwards"),
        ({"update_every": 0}, "update_every is 0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_value(change: dict[str, float], words: str) -> None:
    fine: dict[str, float] = {
        "initial": 0.0,
        "final": 0.9,
        "begin_step": 0,
        "end_step": 10,
        "update_every": 2,
    }
    with pytest.raises(RunError, match=words):
        CubicSchedule(**(fine | change))  # type: ignore[arg-type]
