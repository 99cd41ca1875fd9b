"""Undo, redo and named snapshots for values that never change, such as sparsity distributions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from explorer.errors import DistributionError

__all__ = ["History"]

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
        self._snapshots: dict[str, T] = {}

    def record(self, value: T) -> None:
        """Put `value` after the current place; what had been undone is forgotten. A repeated value is not recorded twice."""
        if self._place >= 0 and self._values[self._place] == value:
            return
        self._values = [*self._values[: self._place + 1], value][-self._limit :]
        self._place = len(self._values) - 1

    def clear(self) -> None:
        """Forget everything, snapshots too."""
        self._values = []
        self._place = -1
        self._snapshots = {}

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

    @property
    def snapshots(self) -> Mapping[str, T]:
        """Values that were kept by name, the oldest first (read only)."""
        return MappingProxyType(self._snapshots)

    def snapshot(self, name: str) -> None:
        """Keep the present value under `name`, in place of what was kept so.

        Raises
        ------
        DistributionError
            If nothing was recorded yet.
        """
        if self._place < 0:
            raise DistributionError("There is nothing to keep yet: the history is empty.")
        self._snapshots.pop(name, None)
        self._snapshots[name] = self._values[self._place]

    def restore(self, name: str) -> T:
        """Return the value that was kept under `name`, and record it as a step.

        Raises
        ------
        DistributionError
            If there is no such snapshot.
        """
        value = self._snapshots[self._known(name)]
        self.record(value)
        return value

    def forget(self, name: str) -> None:
        """Drop a snapshot.

        Raises
        ------
        DistributionError
            If there is no such snapshot.
        """
        del self._snapshots[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self._snapshots:
            raise DistributionError(
                f"There is no snapshot {name!r}; there are {', '.join(self._snapshots) or 'none'}."
            )
        return name
