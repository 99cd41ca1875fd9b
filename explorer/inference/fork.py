"""What a forked child needs: locks that it does not find held for ever, and threads that it can start again.

A fork copies the memory of a process, but of its threads only the one that forked. A lock that another thread held at that moment would stay locked in
the child; so the process takes all locks of the engine before it forks (it waits for inferences that are on, milliseconds) and gives them back
afterwards, on both sides.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol


class Revivable(Protocol):
    """Something that loses its threads in a forked child."""

    def revive(self) -> None:
        """Forget the threads of the parent. Called in the child, before anything else runs there."""


_forking = threading.RLock()
_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_revivable: weakref.WeakValueDictionary[int, Revivable] = weakref.WeakValueDictionary()
_held: list[Any] = []


def lock() -> Any:
    """A new reentrant lock that no forked child finds held by a thread that does not exist there."""
    new = threading.RLock()
    _locks[id(new)] = new
    return new


def revive_in_child(thing: Revivable) -> None:
    """Have ``thing.revive()`` called in every forked child, as long as `thing` lives."""
    _revivable[id(thing)] = thing


def _before() -> None:
    _forking.acquire()
    # `valuerefs` copies at once: another thread may make a lock meanwhile.
    for reference in _locks.valuerefs():
        held = reference()
        if held is not None:
            held.acquire()
            _held.append(held)


def _after() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


def _after_in_child() -> None:
    for reference in _revivable.valuerefs():
        thing = reference()
        if thing is not None:
            thing.revive()
    _after()


if hasattr(os, "register_at_fork"):  # Windows knows no fork
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
