"""Carry news from the worker thread to the kernel's own loop, which alone may touch a widget.

Writing a widget from another thread loses values now and then: `set_state` swaps attributes on the instance while it holds
notifications. So the worker only posts here, and the loop delivers, at most every `interval` seconds, the latest news of each slot.
Invariant: the last thing posted to a slot is always delivered, and slots are delivered in the order of their latest posting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Scheduler(Protocol):
    """Runs a call later, in the thread that may write widgets."""

    def __call__(self, delay: float, call: Callable[[], None]) -> None:
        """Arrange that `call` runs after `delay` seconds; may be used from any thread."""
        ...


class LoopScheduler:
    """Runs calls on an asyncio loop, such as that of a Jupyter kernel."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __call__(self, delay: float, call: Callable[[], None]) -> None:
        if self._loop.is_closed():
            return
        if delay <= 0:
            # In the order in which they came.
            self._loop.call_soon_threadsafe(call)
            return
        # call_later itself is not safe from another thread, so it is made on the loop.
        self._loop.call_soon_threadsafe(lambda: self._loop.call_later(delay, call))


class DirectScheduler:
    """Runs calls at once in the calling thread: for tests, and for scripts without a loop."""

    def __call__(self, delay: float, call: Callable[[], None]) -> None:  # noqa: ARG002 - there is nothing to wait for
        call()


def kernel_scheduler() -> Scheduler:
    """Return a scheduler on the running loop, which in a kernel is the one that serves the page; without a loop, a direct one."""
    try:
        return LoopScheduler(asyncio.get_running_loop())
    except RuntimeError:
        return DirectScheduler()


class HomeThread:
    """Brings calls from other threads into the one in which this was made.

    JupyterLab since 4.4 has messages of the page handled in a thread of their own, a "subshell" of the kernel, when ipykernel is 7 or newer.

    Parameters
    ----------
    scheduler : Scheduler
        Runs calls in that thread.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._thread = threading.get_ident()

    def bring(self, call: Callable[[], None]) -> None:
        """Run `call` at once when this is the thread, else there, as soon as its loop is free; in order."""
        if threading.get_ident() == self._thread:
            call()
        else:
            self._scheduler(0.0, call)


class Publisher:
    """Latest-wins delivery of posted calls.

    Parameters
    ----------
    scheduler : Scheduler
        Where the calls are delivered.
    interval : float
        Shortest time between two deliveries, in seconds.
    """

    def __init__(self, scheduler: Scheduler, interval: float = 0.1) -> None:
        self._scheduler = scheduler
        self._interval = interval
        self._lock = threading.Lock()
        self._pending: dict[str, Callable[[], None]] = {}
        self._scheduled = False
        self._last = -interval

    def post(self, slot: str, call: Callable[[], None]) -> None:
        """Have `call` run in the main thread, unless something newer is posted to `slot` before that."""
        with self._lock:
            # Taken out first, because a dict keeps the place of a key that is only overwritten.
            self._pending.pop(slot, None)
            self._pending[slot] = call
            if self._scheduled:
                return
            self._scheduled = True
            delay = max(0.0, self._last + self._interval - time.monotonic())
        self._scheduler(delay, self._flush)

    def _flush(self) -> None:
        with self._lock:
            calls = list(self._pending.values())
            self._pending.clear()
            self._scheduled = False
            self._last = time.monotonic()
        failures = []
        for call in calls:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - a broken drawing must not swallow the end of a job
                failures.append(error)
        if failures:
            raise failures[0]
