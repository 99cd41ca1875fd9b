"""The rows of a profile: no more than what a call takes, and together all of it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import explorer
from explorer.inference import native, threads
from explorer.inference.execution import Execution
from explorer.inference.kernels.driver import DriverKernel
from explorer.inference.module import SparseModule
from explorer.inference.profiling import layer_timings
from explorer.models import architectures
from tests.inference.test_networks import pruned


class Interrupted(nn.Module):
    """Native layers, an operator that torch runs, and native layers again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sin(torch.relu(self.a(x))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (lambda: architectures.resnet18(10), (1, 3, 64, 64)),
    "MobileNetV1": (lambda: architectures.mobilenet_v1(10), (1, 3, 96, 96)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(128, 4, 512, batch_first=True),
        (1, 64, 128),
    ),
    "interrupted": (Interrupted, (1, 16, 48, 48)),
}


@pytest.fixture(scope="module", params=[(name, n) for name in NETWORKS for n in (1, 2)], ids=str)
def compiled(request: pytest.FixtureRequest) -> tuple[SparseModule, torch.Tensor]:
    if native.current_isa().name == "torch":
        pytest.skip("no machine code on this machine")
    name, n_threads = request.param
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, x = pruned(build(), 0.8).eval(), torch.randn(shape)
    engine = explorer.compile(network, x, threads=n_threads)
    assert len(engine.fallbacks) == (name == "interrupted")
    return engine, x


def one_run(engine: SparseModule, x: torch.Tensor) -> tuple[float, float, float]:
    """Milliseconds of all rows but "call", of the native ones among them, and of the run in which they were timed."""
    took: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            took[name] = (time.perf_counter() - start) * 1e3
            return result

        return measured

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        # Where torch has a part, its operators are timed in a run beside the call.
        patch.setattr(Execution, "run", timed("run", Execution.run))
        rows = layer_timings(engine._network, timed("call", partial(engine, x)), (x,), len(x), repeats=1)
    parts = [row for row in rows if row.kind != "call"]
    assert len(parts) == len(rows) - 1
    whole = took["run" if engine.fallbacks else "call"]
    if not engine.fallbacks:
        assert sum(row.ms for row in rows) >= whole  # of which nothing is missing
    native_ms = sum(row.ms for row in parts if row.kernel not in ("torch", "copy"))
    return sum(row.ms for row in parts), native_ms, whole


def test_the_steps_of_a_run_take_no_longer_than_the_run(compiled: tuple[SparseModule, torch.Tensor]) -> None:
    engine, x = compiled
    native_share = 0.0
    for _ in range(10):
        parts, of_native, whole = one_run(engine, x)
        assert parts <= 1.02 * whole  # two clocks, one of which is calibrated by the other
        native_share = max(native_share, of_native / whole)
    # Other work may come between two steps. In the best of the runs it did not.
    assert native_share > (0.05 if engine.fallbacks else 0.5)


def test_the_rows_of_a_profile_add_up_to_the_call(compiled: tuple[SparseModule, torch.Tensor]) -> None:
    engine, x = compiled
    # Both are medians of the same program at different moments: the nearest of a few pairs. (Of many, where two threads of torch wait for each other beside other work.)
    apart = []
    for _ in range(40):
        whole = engine.benchmark(x, repeats=8, warn=False).latency_ms
        apart.append(abs(sum(row.ms for row in engine.profile(x, repeats=8)) / whole - 1))
        if apart[-1] < 0.05:
            break
    assert min(apart) < 0.05, apart


def test_other_work_between_two_looks_at_clocks_is_not_taken_for_the_pace_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    isa = native.current_isa()
    if isa.name == "torch":
        pytest.skip("no machine code on this machine")
    looks = 0

    def look() -> int:
        nonlocal looks
        now = time.perf_counter_ns()
        looks += 1
        if looks == 1:
            time.sleep(0.005)
        return now

    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter_ns=look))
    found = threads.cycles_per_ms.__wrapped__(isa)
    clock = ctypes.CFUNCTYPE(ctypes.c_int64)(native.machine_code(isa, DriverKernel("clock")))
    start, ticks = time.perf_counter_ns(), clock()
    time.sleep(0.3)
    wanted = (clock() - ticks) / ((time.perf_counter_ns() - start) / 1e6)
    assert found == pytest.approx(wanted, rel=0.02)
