"""Scans by executors: the same numbers, and nothing lost when a worker or the user's patience is."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from torch import nn

from explorer.errors import ModelError
from explorer.sensitivity import measure_loss, worker_pool
from tests.sensitivity.networks import Fragile, images, small, with_a_dead_layer

LEVELS = (0.5, 0.9, 0.97)


def scan(net: nn.Module, **options: object) -> dict[tuple, float]:
    points = measure_loss(net, images(), levels=LEVELS, n_images=80, **options)
    return {(p.layer, p.sparsity, p.kind, p.refreshed): p.value for p in points}


def same(one: dict[tuple, float], other: dict[tuple, float]) -> bool:
    return one.keys() == other.keys() and all(one[key] == pytest.approx(other[key], abs=1e-6) for key in one)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with worker_pool(2) as pool:
        yield pool


def test_threads_give_the_same_points() -> None:
    with ThreadPoolExecutor(3) as pool:
        assert same(scan(small(), executor=pool), scan(small()))


def test_processes_give_the_same_points(processes: Executor) -> None:
    assert same(scan(small(), executor=processes), scan(small()))
    threads = {processes.submit(torch.get_num_threads).result() for _ in range(8)}
    assert threads == {max(1, torch.get_num_threads() // 2)}


def test_the_pool_serves_another_network_after_the_first(processes: Executor) -> None:
    changed = small()
    with torch.no_grad():
        changed.middle.weight.mul_(2)
    assert same(scan(changed, executor=processes), scan(changed))


def test_points_come_level_by_level_as_without(processes: Executor) -> None:
    def order(**options: object) -> list[tuple[str, float]]:
        points = measure_loss(small(), images(), levels=LEVELS, refresh_batchnorm=False, **options)
        return [(p.layer, p.sparsity) for p in points if p.kind == "kl"]

    assert order(executor=processes) == order()


def test_every_cell_is_a_task_and_several_are_under_way() -> None:
    class Counting(ThreadPoolExecutor):
        tasks = most = 0

        def submit(self, *args: object, **options: object) -> Future:
            self.tasks += 1
            self.most = max(self.most, self._work_queue.qsize() + 1)
            return super().submit(*args, **options)

    with Counting(2) as pool:
        scan(small(), executor=pool)
        assert pool.tasks == 3 * len(LEVELS) * 2, "layers, levels, with and without refreshed statistics"
        assert 2 <= pool.most <= 5, "enough to keep workers busy, few enough to stop soon"


def test_a_broken_pool_costs_time_and_nothing_else() -> None:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(2, mp_context=context) as pool,
        pytest.warns(RuntimeWarning, match="A worker of the scan was lost"),
    ):
        found = scan(small(Fragile), executor=pool)
    assert same(found, scan(small()))


def test_stop_is_obeyed_and_what_was_given_is_complete() -> None:
    stop = threading.Event()
    given = []
    with ThreadPoolExecutor(2) as pool:
        for point in measure_loss(small(), images(), levels=LEVELS, executor=pool, stop=stop):
            given.append(point)
            if point.sparsity > 0:
                stop.set()
                stopped = time.monotonic()
        assert time.monotonic() - stopped < 5
    assert {p.sparsity for p in given} == {0.0, 0.9}
    assert len({p.layer for p in given if p.sparsity > 0}) == 1


def test_what_a_worker_refuses_reaches_the_caller(processes: Executor) -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(ModelError, match="'dead' have no influence"):
        scan(with_a_dead_layer(), executor=pool)
    with pytest.raises(ModelError, match="cannot be sent to other processes"):
        scan(with_a_dead_layer(), executor=processes)


def test_a_worker_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least one"):
        worker_pool(0)
