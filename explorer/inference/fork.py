"""What a forked child needs: locks that it does not find held for ever, and threads that it can start again.

A fork copies the memory of a process, but of its threads only the one that forked: a lock that another thread held at that moment would stay locked in
the child, and what it was writing would stay half written. So a fork waits until no other thread is inside the engine, and lets none in
meanwhile: milliseconds, since an inference is short. It takes none of the engine's locks itself, so that it cannot be part of a deadlock.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol

_PATIENCE_S = 10.0
"""How long a fork waits for others to leave. A thread that compiles a large network may take longer: the child then gets new locks."""


class Revivable(Protocol):
    """Something that loses its threads in a forked child."""

    def revive(self) -> None:
        """Forget the threads of the parent. Called in the child, before anything else runs there."""


class _Depth(threading.local):
    """How many of the engine's locks this thread holds."""

    n = 0


_depth = _Depth()
_guard = threading.RLock()
_door = threading.Condition(_guard)
_inside = 0
_is_closed = False
_locks: weakref.WeakValueDictionary[int, EngineLock] = weakref.WeakValueDictionary()
_revivable: weakref.WeakValueDictionary[int, Revivable] = weakref.WeakValueDictionary()


class EngineLock:
    """A reentrant lock that no forked child finds held by a thread that does not exist there. For ``with``."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks[id(self)] = self

    def __enter__(self) -> None:
        _enter()
        try:
            self._lock.acquire()
        except BaseException:
            _leave()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        _leave()

    def renew(self) -> None:
        """Forget who held it."""
        self._lock = threading.RLock()


def _enter() -> None:
    global _inside  # noqa: PLW0603  # the one count of this process
    if _depth.n == 0:
        with _guard:  # the lock of the door itself, without its Python: this is on the way of every inference
            while _is_closed:
                _door.wait()
            _inside += 1
    _depth.n += 1


def _leave() -> None:
    global _inside  # noqa: PLW0603
    _depth.n -= 1
    if _depth.n == 0:
        with _guard:
            _inside -= 1
            if _is_closed:
                _door.notify_all()


def revive_in_child(thing: Revivable) -> None:
    """Have ``thing.revive()`` called in every forked child, as long as `thing` lives."""
    _revivable[id(thing)] = thing


def _before() -> None:
    global _is_closed  # noqa: PLW0603
    _door.acquire()
    while _is_closed:  # another thread is about to fork
        _door.wait()
    _is_closed = True
    mine = 1 if _depth.n else 0
    _door.wait_for(lambda: _inside == mine, timeout=_PATIENCE_S)
    # The door's own lock stays with this thread until the fork is over: nobody is in the middle of passing.


def _after() -> None:
    global _is_closed  # noqa: PLW0603
    _is_closed = False
    _door.notify_all()
    _door.release()


def _after_in_child() -> None:
    global _inside  # noqa: PLW0603
    mine = 1 if _depth.n else 0
    if _inside != mine:
        _inside = mine
        for lock in list(_locks.values()):
            lock.renew()
    for reference in _revivable.valuerefs():
        thing: Any = reference()
        if thing is not None:
            thing.revive()
    _after()


if hasattr(os, "register_at_fork"):  # Windows knows no fork
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
