"""One long piece of work at a time, off the main thread, that can be stopped.

The kernel's main thread answers the page; whatever takes longer than a blink runs here. The executor is the standard interface, so
that tests run the work inline and a cluster could take it. Invariant: at most one job runs, and its end is always reported.
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from explorer.widgets.publisher import Publisher

JobKind = Literal["idle", "load", "measure", "solve", "prune", "pack", "read"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What the worker is doing.

    `done` of `total` parts are finished (`total` 0: not known), and about `seconds_left` are missing (None: not known).
    """

    kind: JobKind = "idle"
    text: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    paused: bool = False
    stopping: bool = False

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self.kind != "idle"


IDLE = JobStatus()


class InlineExecutor(Executor):
    """Runs what is submitted at once, in the calling thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - a future carries whatever its work raised
            future.set_exception(error)
        return future


class JobRunner:
    """Runs one job at a time on an executor and reports its end through the publisher.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    publisher : Publisher
        Carries the end of the job to the main thread.
    slot : str
        Of the publisher; runners that share one need slots of their own.
    """

    def __init__(self, executor: Executor, publisher: Publisher, slot: str = "end") -> None:
        self._slot = slot
        self._executor = executor
        self._publisher = publisher
        self.stop_event = threading.Event()
        self.running = False

    def start(
        self,
        work: Callable[[threading.Event], T],
        finished: Callable[[T], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Run `work(stop_event)` on the executor, then `finished(result)` or `failed(error)` in the main thread.

        Raises
        ------
        RuntimeError
            If a job is running already; the caller is to ask first.
        """
        if self.running:
            raise RuntimeError("A job is running already.")
        self.running = True
        self.stop_event = stop = threading.Event()

        def end(report: Callable[[], None]) -> None:
            self.running = False
            report()

        def run() -> None:
            try:
                result = work(stop)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the page must hear of it
                caught = error
                self._publisher.post(self._slot, lambda: end(lambda: failed(caught)))
            else:
                self._publisher.post(self._slot, lambda: end(lambda: finished(result)))

        self._executor.submit(run)

    def stop(self) -> None:
        """Ask the running job to stop; it does so at its next check."""
        self.stop_event.set()
