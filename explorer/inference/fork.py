"""What a forked child needs: locks that it does not find held for ever, and threads that it can start again.

A fork copies the memory of a process, but of its threads only the one that forked: a lock that another thread held at that moment would stay locked in
the child, and what it was writing would stay half written. So a fork waits until no other thread is inside the engine, and lets none in
meanwhile: milliseconds, since an inference is short. It never waits for a lock while it holds others, so that it cannot be part of a deadlock.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

_PATIENCE_S = 10.0
"""How long a fork waits for others to leave. A thread that compiles a large network may take longer: the child then gets new locks."""

_LOOK_S = 0.0005
"""How often it looks."""


class Revivable(Protocol):
    """Something that loses its threads in a forked child."""

    def revive(self) -> None:
        """Forget the threads of the parent. Called in the child, before anything else runs there."""


# Entered by its key, which is one step to the interpreter (see `EngineLock.inside`); a condition's own way in is Python.
_key = threading.RLock()
_door = threading.Condition(_key)
_is_closed = False
_locks: weakref.WeakValueDictionary[int, EngineLock] = weakref.WeakValueDictionary()
_held: list[EngineLock] = []  # by the thread that forks
_revivable: weakref.WeakValueDictionary[int, Revivable] = weakref.WeakValueDictionary()


class EngineLock:
    """A reentrant lock that no forked child finds held by a thread that does not exist there, for ``with lock.inside():``.

    On the way of every inference, and when its code has left the caches: it does as little as it can.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _locks[id(self)] = self

    def inside(self) -> AbstractContextManager[Any]:
        """What to hold, once no fork is on its way.

        It is the lock itself: entering and leaving it is one step to the interpreter. Between two statements of an ``__enter__`` or ``__exit__`` in Python Ctrl-C could
        leave it held for ever.
        """
        if _is_closed:
            _wait_outside()
        return self.lock


def _wait_outside() -> None:
    """Until no fork is on its way; who is inside already may go on."""
    with _key:
        while _is_closed and not any(_is_mine(lock) for lock in list(_locks.values())):
            _door.wait()


def _is_mine(lock: EngineLock) -> bool:
    owned: bool = lock.lock._is_owned()  # type: ignore[attr-defined]  # noqa: SLF001  # as threading.Condition asks
    return owned


def revive_in_child(thing: Revivable) -> None:
    """Have ``thing.revive()`` called in every forked child, as long as `thing` lives."""
    _revivable[id(thing)] = thing


def _before() -> None:
    global _is_closed  # noqa: PLW0603  # the one door of this process
    with _key:
        while _is_closed:  # another thread is about to fork
            _door.wait()
        _is_closed = True
    give_up = time.monotonic() + _PATIENCE_S
    # All at once or none: who is inside may still take another lock, and must not wait for this thread.
    while not _hold_all() and time.monotonic() < give_up:
        _release()
        time.sleep(_LOOK_S)


def _hold_all() -> bool:
    """Take every lock, as far as others leave them; whether there are all."""
    locks = list(_locks.values())
    _held[:] = [lock for lock in locks if lock.lock.acquire(blocking=False)]
    return len(_held) == len(locks)


def _release() -> None:
    while _held:
        _held.pop().lock.release()


def _after() -> None:
    global _is_closed  # noqa: PLW0603
    _release()
    with _key:
        _is_closed = False
        _door.notify_all()


def _after_in_child() -> None:
    global _key, _door  # noqa: PLW0603
    _key = threading.RLock()
    _door = threading.Condition(_key)  # whoever waited there is gone
    for lock in list(_locks.values()):
        if lock not in _held:
            lock.lock = threading.RLock()  # who held it too long is gone
    for reference in _revivable.valuerefs():
        thing: Any = reference()
        if thing is not None:
            thing.revive()
    _after()


if hasattr(os, "register_at_fork"):  # Windows knows no fork
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
