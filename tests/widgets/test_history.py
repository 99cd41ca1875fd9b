from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from explorer.widgets.history import History


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
