"""The cells of a scan as tasks: done here one after another, or by an executor's workers, several at a time.

Any `concurrent.futures.Executor` will do: threads, processes, or a cluster (`explorer.sensitivity.cluster`). Each worker makes the scan's private copy once and keeps it
for the cells that follow. Network and images travel once: by a file that workers on this machine read, or by whatever the executor offers as `share`. Cells
are handed out in the order in which they are wanted and come back in that order, so that an interrupted scan is complete up to where it was.

A worker that is lost costs its cells' time and no more: a cluster runs them again elsewhere, and when a pool is broken for good, the rest is measured here.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import tempfile
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from explorer.errors import ModelError
from explorer.sensitivity.material import Material
from explorer.sensitivity.scan import Cell, Sample, Scan

__all__ = ["Done", "Task", "by_groups", "distributed", "inline", "worker_pool"]

_IN_FLIGHT_PER_WORKER = 2
_WORKERS_UNKNOWN = 8


@dataclass(frozen=True, slots=True)
class Task:
    """One cell to be measured."""

    layer: str
    level: float
    refreshed: bool


@dataclass(frozen=True, slots=True)
class Done:
    """A measured cell; when not `is_final`, from some of the images."""

    task: Task
    cell: Cell
    is_final: bool = True


class Handle(Protocol):
    """Where a worker finds what the scan measures with. The token tells one scan from the next."""

    @property
    def token(self) -> str: ...

    def fetch(self) -> Material:
        """Return the scan's own, or a copy; the worker copies the network anyway."""
        ...


@dataclass(frozen=True, slots=True)
class _Here:
    """In this process, for threads."""

    token: str
    material: Material

    def fetch(self) -> Material:
        return self.material


@dataclass(frozen=True, slots=True)
class _File:
    """A file that all workers can read."""

    token: str
    path: str

    def fetch(self) -> Material:
        material: Material = pickle.loads(Path(self.path).read_bytes())  # noqa: S301 - written by this scan's own process
        return material


def inline(scan: Scan, tasks: Iterable[Task], begun: Mapping[Task, Sample] | None = None) -> Iterator[Done]:
    """Measure cells here, in order; ends early when the scan's stop event is set.

    Parameters
    ----------
    scan : Scan
    tasks : iterable of Task
    begun : mapping of Task to Sample, optional
        What the first `Scan.n_first` batches gave already.
    """
    rest = range(scan.n_first, scan.n_batches)
    for task in tasks:
        if begun and task in begun:
            sample = scan.sample(task.layer, task.level, rest)
            cell = None if sample is None else scan.cell(begun[task] + sample)
        else:
            cell = scan.measure(task.layer, task.level, refreshed=task.refreshed)
        if cell is None:
            return
        yield Done(task, cell)


def by_groups(
    scan: Scan, tasks: Sequence[Task], begun: Mapping[Task, Sample] | None = None
) -> Iterator[Done]:
    """Measure cells here, of all layers at a level on one group of images after the other, where memory does not hold all that shortened passes need.

    Recording a group again for each level costs one pass of the whole network, and measuring all layers costs half a pass each.
    """
    size = scan.n_fitting
    begun = begun or {}
    for _, same_level in itertools.groupby(tasks, key=lambda task: task.level):
        wanted = list(same_level)
        samples = {task: begun[task] for task in wanted if task in begun}
        start = scan.n_first if len(samples) == len(wanted) else 0
        if not start:
            samples.clear()
        for first in range(start, scan.n_batches, size):
            group = range(first, min(first + size, scan.n_batches))
            scan.forget()
            if scan.record(group, again=True) is None:
                return
            for task in wanted:
                sample = scan.sample(task.layer, task.level, group)
                if sample is None:
                    return
                samples[task] = samples[task] + sample if task in samples else sample
                yield Done(task, scan.cell(samples[task]), is_final=False)
        for task in wanted:
            yield Done(task, scan.cell(samples[task]))


def distributed(
    material: Material,
    scan: Scan,
    tasks: Iterable[Task],
    executor: Executor,
    stop: threading.Event | None = None,
    memory_limit: int | None = None,
) -> Iterator[Done]:
    """Have an executor's workers measure cells, and yield them in the order of `tasks`.

    Parameters
    ----------
    material : Material
        Must be picklable unless the workers are threads.
    scan : Scan
        Prepared and recorded; measures what a broken pool leaves over.
    tasks : iterable of Task
    executor : concurrent.futures.Executor
        Not shut down.
    memory_limit : int, optional
        Of each worker, see `Scan`.
    stop : threading.Event, optional
        When set, no more tasks are begun, and what is under way is left to end.

    Raises
    ------
    ModelError
        If the network cannot be sent to the workers.
    """
    waiting = iter(tasks)
    pending: deque[tuple[Task, Future[Cell]]] = deque()
    with _shipped(material, executor) as handle:
        try:
            most = _IN_FLIGHT_PER_WORKER * _n_workers(executor)
            while True:
                for task in itertools.islice(waiting, most - len(pending)):
                    pending.append((task, _submitted(executor, handle, task, memory_limit)))
                if not pending or (stop is not None and stop.is_set()):
                    return
                task, future = pending[0]
                try:
                    cell = future.result()
                except BrokenExecutor as error:
                    warnings.warn(
                        f"A worker of the scan was lost, and its pool with it ({error}); the remaining cells are measured in this process.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                    left = [task for task, _ in pending]
                    pending.clear()
                    yield from inline(scan, itertools.chain(left, waiting))
                    return
                pending.popleft()
                yield Done(task, cell)
        finally:
            for _, future in pending:
                future.cancel()
            # The file must outlive those that could not be cancelled.
            for _, future in pending:
                with suppress(BaseException):
                    future.result()


def _submitted(executor: Executor, handle: Handle, task: Task, memory_limit: int | None) -> Future[Cell]:
    try:
        return executor.submit(_measured, handle, task, memory_limit)
    except BrokenExecutor as error:
        broken: Future[Cell] = Future()
        broken.set_exception(error)
        return broken


def _n_workers(executor: Executor) -> int:
    """How many tasks an executor runs at a time; all of the standard library's know, under this name."""
    known = getattr(executor, "_max_workers", None)
    return known if isinstance(known, int) and known > 0 else _WORKERS_UNKNOWN


@contextmanager
def _shipped(material: Material, executor: Executor) -> Iterator[Handle]:
    """Make the material reachable for the workers while tasks run."""
    token = uuid.uuid4().hex
    if isinstance(executor, ThreadPoolExecutor):
        yield _Here(token, material)
        return
    share = getattr(executor, "share", None)
    if share is not None:
        with _explained(material):
            shared: Handle = share(token, material)
        yield shared
        return
    number, path = tempfile.mkstemp(prefix="sparsity-explorer-", suffix=".scan")
    try:
        with os.fdopen(number, "wb") as file, _explained(material):
            pickle.dump(material, file)
        yield _File(token, path)
    finally:
        with suppress(OSError):
            Path(path).unlink()


@contextmanager
def _explained(material: Material) -> Iterator[None]:
    """Say what to do about a network that cannot be sent."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"This {type(material.module).__name__} cannot be sent to other processes ({error}). Define it in a module that workers can import, "
            "not in a notebook cell or a function; or scan with threads, or without an executor."
        ) from error


# A worker keeps the scan of its last task: cells of one scan come one after another, and a private copy may be large. Threads of a pool need a copy each.
_kept = threading.local()


def _measured(handle: Handle, task: Task, memory_limit: int | None) -> Cell:
    """Measure one cell; what a worker runs."""
    if getattr(_kept, "token", None) != handle.token:
        _kept.token, _kept.scan = None, None  # the old one goes before the new one comes
        scan = Scan(handle.fetch(), memory_limit=memory_limit)
        scan.prepare()
        scan.record(scan.batches(refreshed=False))
        _kept.token, _kept.scan = handle.token, scan
    cell: Cell | None = _kept.scan.measure(task.layer, task.level, refreshed=task.refreshed)
    assert cell is not None, "a worker's scan has no stop event"
    return cell


def worker_pool(n_workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that share the cores: for `executor` of `explorer.sensitivity.measure_loss`.

    Parameters
    ----------
    n_workers : int
        Each computes with its share of the threads that this process has.

    Raises
    ------
    ValueError
        If there is no worker.
    """
    if n_workers < 1:
        raise ValueError(f"A pool needs at least one worker; got {n_workers}.")
    # Not forked: a fork of a process whose threads compute may wait for them for ever.
    return ProcessPoolExecutor(
        n_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, torch.get_num_threads() // n_workers),),
    )
