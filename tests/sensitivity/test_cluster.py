"""The same scan on a Ray cluster of two processes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from explorer.errors import ModelError, RunError
from explorer.sensitivity import RayExecutor, measure_loss
from tests.sensitivity.networks import Fragile, images, small, with_a_dead_layer

ray = pytest.importorskip("ray", reason="Ray has no package for this Python; install the extra cluster")
LEVELS = (0.5, 0.9)


def scan(net: nn.Module, **options: object) -> dict[tuple, float]:
    points = measure_loss(net, images(), levels=LEVELS, n_images=80, **options)
    return {(p.layer, p.sparsity, p.kind, p.refreshed): p.value for p in points}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayExecutor]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with RayExecutor() as executor:
        yield executor
    assert ray.is_initialized(), "a cluster that was there stays"
    ray.shutdown()


def test_the_cluster_gives_the_same_points(cluster: RayExecutor) -> None:
    found, expected = scan(small(), executor=cluster), scan(small())
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key], abs=1e-6) for key in expected)


def test_cells_run_in_two_other_processes(cluster: RayExecutor) -> None:
    def slow() -> int:
        import time

        time.sleep(0.2)
        return os.getpid()

    processes = {future.result() for future in [cluster.submit(slow) for _ in range(8)]}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert cluster.submit(torch.get_num_threads).result() == 1


def test_what_a_cell_refuses_comes_back_as_it_was_raised(cluster: RayExecutor) -> None:
    with pytest.raises(ModelError, match="'dead' have no influence"):
        scan(with_a_dead_layer(), executor=cluster)  # of a class that no other process can import


def test_a_lost_workers_cells_are_run_again(cluster: RayExecutor, tmp_path: Path) -> None:
    marker = tmp_path / "lost"
    found = scan(small(Fragile, str(marker)), executor=cluster)
    assert marker.exists(), "a worker was really lost"
    expected = scan(small())
    assert all(found[key] == pytest.approx(expected[key], abs=1e-6) for key in expected)


@pytest.mark.usefixtures("cluster")
def test_where_every_worker_is_lost_the_rest_is_measured_here() -> None:
    with (
        RayExecutor(retries=0) as hopeless,
        pytest.warns(RuntimeWarning, match="A worker of the scan was lost"),
    ):
        found = scan(small(Fragile), executor=hopeless)
    assert found.keys() == scan(small()).keys()


def test_without_ray_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"sparsity-explorer\[cluster\]"):
        RayExecutor()
