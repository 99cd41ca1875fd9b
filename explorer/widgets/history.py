"""Undo and redo for values that never change, such as sparsity distributions."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class History(Generic[T]):
    """A line of values with a place on it.

    Parameters
    ----------
    limit : int
        Most values that are kept; the oldest go first.

    Examples
    --------
    >>> history = History()
    >>> history.record("a")
    >>> history.record("b")
    >>> history.undo(), history.can_undo, history.redo()
    ('a', False, 'b')
    """

    def __init__(self, limit: int = 200) -> None:
        self._values: list[T] = []
        self._place = -1
        self._limit = limit

    def record(self, value: T) -> None:
        """Put `value` after the current place; what had been undone is forgotten. A repeated value is not recorded twice."""
        if self._place >= 0 and self._values[self._place] == value:
            return
        self._values = [*self._values[: self._place + 1], value][-self._limit :]
        self._place = len(self._values) - 1

    def clear(self) -> None:
        """Forget everything."""
        self._values = []
        self._place = -1

    @property
    def can_undo(self) -> bool:
        """Whether there is an earlier value."""
        return self._place > 0

    @property
    def can_redo(self) -> bool:
        """Whether there is a later value."""
        return self._place < len(self._values) - 1

    def undo(self) -> T | None:
        """Step back and return the value there; None when there is none."""
        if not self.can_undo:
            return None
        self._place -= 1
        return self._values[self._place]

    def redo(self) -> T | None:
        """Step forward and return the value there; None when there is none."""
        if not self.can_redo:
            return None
        self._place += 1
        return self._values[self._place]
