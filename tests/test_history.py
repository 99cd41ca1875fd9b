from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.errors import DistributionError
from explorer.history import History


def test_undo_and_redo_walk_along_the_values() -> None:
    history: History[int] = History()
    for value in (1, 2, 3):
        history.record(value)
    assert (history.undo(), history.undo(), history.undo()) == (2, 1, None)
    assert (history.redo(), history.redo(), history.redo()) == (2, 3, None)


def test_a_new_value_forgets_what_was_undone() -> None:
    history: History[int] = History()
    for value in (1, 2, 3):
        history.record(value)
    history.undo()
    history.record(4)
    assert not history.can_redo
    assert history.undo() == 2


@given(st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["undo", "redo"])), max_size=40))
def test_it_agrees_with_a_plain_list_and_an_index(actions: list[int | str]) -> None:
    history: History[int] = History()
    values: list[int] = []
    place = -1
    for action in actions:
        if action == "undo":
            place -= place > 0
            expected = values[place] if values and history.can_undo else None
            assert history.undo() == expected
        elif action == "redo":
            expected = values[place + 1] if place < len(values) - 1 else None
            place += place < len(values) - 1
            assert history.redo() == expected
        else:
            history.record(action)
            if place < 0 or values[place] != action:
                values = [*values[: place + 1], action]
                place = len(values) - 1


def test_old_values_are_dropped_beyond_the_limit() -> None:
    history: History[int] = History(limit=3)
    for value in range(10):
        history.record(value)
    assert [history.undo(), history.undo(), history.undo()] == [8, 7, None]


def test_snapshots_are_kept_by_name_beside_the_line() -> None:
    history: History[int] = History(limit=2)
    for value in (1, 2, 3):
        history.record(value)
        history.snapshot(f"number {value}")
    assert history.snapshots == {"number 1": 1, "number 2": 2, "number 3": 3}, "beyond the limit too"
    assert history.restore("number 1") == 1
    assert history.undo() == 3, "a restored value is a step like any other"
    history.forget("number 2")
    assert list(history.snapshots) == ["number 1", "number 3"]


def test_snapshots_that_are_not_there_are_named() -> None:
    history: History[int] = History()
    with pytest.raises(DistributionError, match="nothing to keep"):
        history.snapshot("first")
    history.record(1)
    history.snapshot("first")
    for call in (history.restore, history.forget):
        with pytest.raises(DistributionError, match="no snapshot 'second'; there are first"):
            call("second")
