"""Scans on a Ray cluster: an executor whose workers are Ray's, on this machine or on many.

Ray runs a task again when its worker dies, up to `retries` times; what fails even then is measured by the process that asked for it. Every node needs this package
and whatever the network is made of. Ray is installed with the extra `cluster`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from typing import Any

from explorer.errors import RunError
from explorer.sensitivity.material import Material
from explorer.sensitivity.tasks import Handle

__all__ = ["RayExecutor"]


@dataclass(frozen=True, slots=True)
class _Shared:
    """In Ray's object store. Within a tuple, lest Ray fetches it for every task."""

    token: str
    references: tuple[Any, ...]

    def fetch(self) -> Material:
        import ray

        material: Material = ray.get(self.references[0])
        return material


def _called(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call; a function of our own, because Ray takes no built-in ones."""
    return fn(*args, **kwargs)


class RayExecutor(Executor):
    """For `executor` of `explorer.sensitivity.measure_loss`.

    Parameters
    ----------
    address : str, optional
        Of the cluster's head, "auto" for the one that this machine belongs to. By default the one that is connected already, or else a new one on
        this machine alone, which ends with `shutdown`.
    threads : int
        Threads, and cores asked for, of each task.
    retries : int
        How often a task whose worker died is run again.

    Raises
    ------
    RunError
        If Ray is not installed, or the cluster cannot be reached.

    Examples
    --------
    >>> with RayExecutor() as cluster:  # doctest: +SKIP
    ...     points = list(measure_loss(net, data, executor=cluster))
    """

    def __init__(self, address: str | None = None, *, threads: int = 1, retries: int = 3) -> None:
        try:
            import ray
        except ImportError as error:
            raise RunError(
                "A scan on a cluster needs Ray, which is not installed: pip install 'sparsity-explorer[cluster]'."
            ) from error
        self._ray: Any = ray  # it is not typed
        self._is_mine = not ray.is_initialized()
        if self._is_mine:
            try:
                ray.init(address=address or "local", include_dashboard=False, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RunError(
                    f"No Ray cluster could be reached at {address or 'this machine'}: {error}. Start one with `ray start --head`, or leave the address out."
                ) from error
        self._threads, self._retries = threads, retries
        self._max_workers = max(1, int(self._ray.cluster_resources().get("CPU", 1) // threads))

    def share(self, token: str, material: Material) -> Handle:
        """Put what a scan measures with into the object store, once for all tasks."""
        return _Shared(token, (self._ray.put(material),))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` on the cluster."""
        options = {"num_cpus": self._threads, "max_retries": self._retries}
        reference = self._ray.remote(_called).options(**options).remote(fn, args, kwargs)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        reference.future().add_done_callback(lambda done: self._hand_on(done, future))
        return future

    def _hand_on(self, done: Future[Any], future: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            future.set_exception(error.cause)  # what the task itself raised
        else:
            future.set_exception(BrokenExecutor(f"{type(error).__name__}: {error}"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - what every executor has
        """End the cluster if this executor started it; one that was there stays."""
        if self._is_mine and self._ray.is_initialized():
            self._ray.shutdown()
