"""When and where helper threads wake up."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import explorer
from explorer.inference import native, threads
from explorer.inference.kernels import driver
from explorer.inference.memory import address
from explorer.inference.module import SparseModule

LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system lets nobody choose CPUs")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()


@pytest.fixture
def sleeping(network: nn.Module) -> SparseModule:
    """A network whose one helper has gone to sleep."""
    engine = explorer.compile(network, torch.randn(1, 3, 16, 16), threads=2)
    asleep(engine)
    return engine


def asleep(engine: SparseModule) -> None:
    assert engine._network._runner is not None
    deadline = time.monotonic() + 30
    while not engine._network._runner._state.asleep[1]:
        assert time.monotonic() < deadline, "the helper never went to sleep"
        time.sleep(0.001)


@LINUX
def test_a_helper_wakes_on_a_cpu_that_the_caller_does_not_use(
    sleeping: SparseModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        pytest.skip("this process may use one CPU only")
    assert sleeping._network._runner is not None
    helper = sleeping._network._runner._helpers[0].native_id
    assert helper is not None
    for cpu in sorted(allowed)[:2]:
        monkeypatch.setattr(threads, "_current_cpu", lambda cpu=cpu: lambda: cpu)
        sleeping(torch.randn(1, 3, 16, 16))
        assert os.sched_getaffinity(helper) == allowed - {cpu}
        asleep(sleeping)


@LINUX
@pytest.mark.parametrize("trouble", ["one CPU", "no such thread", "no function"])
def test_a_network_runs_where_helpers_cannot_be_sent_elsewhere(
    network: nn.Module, sleeping: SparseModule, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def gone(_thread: int, _cpus: set[int]) -> None:
        raise ProcessLookupError

    if trouble == "one CPU":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
        monkeypatch.setattr(threads, "_current_cpu", lambda: lambda: 3)
    elif trouble == "no such thread":
        monkeypatch.setattr(os, "sched_setaffinity", gone)
    else:
        monkeypatch.setattr(threads, "_current_cpu", lambda: None)
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(sleeping(x), network(x), rtol=1e-5, atol=1e-5)


def test_a_helper_that_was_called_while_it_gave_up_looks_again() -> None:
    """Its caller found it awake, and did not ring."""
    state = SimpleNamespace(
        record=np.zeros(1, np.int64),
        scratch=[0, 0],
        bells=[threads._Bell(), threads._Bell()],
        asleep=[False, False],
        calls=0,
        stopped=False,
    )
    looks = []

    def look(*_: int) -> None:
        looks.append(state.asleep[1])
        if len(looks) == 1:
            state.calls += 1
        else:
            state.stopped = True
            state.bells[1].ring()

    state.help = look
    helper = threading.Thread(target=threads._helper, args=(state, 1), daemon=True)
    helper.start()
    helper.join(timeout=20)
    assert not helper.is_alive(), "it slept through the call"
    assert looks == [False, False]


def test_a_call_waits_for_no_helper_that_holds_no_job(network: nn.Module) -> None:
    x = torch.randn(4, 3, 16, 16)
    engine = explorer.compile(network, x, threads=2)
    runner = engine._network._runner
    assert runner is not None
    wanted = network(x)
    asleep(engine)
    held_up = runner._state.flags[8:9]
    held_up += 1  # as a helper would leave it that lost its CPU between two jobs
    torch.testing.assert_close(engine(x), wanted, rtol=1e-5, atol=1e-5)
    # Who changes what it may still read waits for it.
    fewer: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: fewer.append(engine(x[:2])))
    other.start()
    other.join(timeout=0.3)
    assert other.is_alive()
    held_up -= 1
    other.join(timeout=30)
    torch.testing.assert_close(fewer[0], wanted[:2], rtol=1e-5, atol=1e-5)


def test_a_helper_that_comes_late_takes_nothing_of_another_run(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 3, 16, 16)
    engine = explorer.compile(network, x, threads=2)
    runner, steps = engine._network._runner, engine._network.steps
    assert runner is not None
    assert steps is not None
    asleep(engine)
    monkeypatch.setattr(runner, "_wake", lambda: None)
    engine(x)
    state, n_steps = runner._state, len(steps.table)
    jobs = steps.table[:, driver.STEP.index("jobs")]

    def counters(name: str, count: int) -> np.ndarray:
        """One a cache line."""
        place = int(state.record[driver.STATE.index(name)])
        return np.ctypeslib.as_array((ctypes.c_int64 * (8 * count)).from_address(place))[::8]

    tickets, done, gate = counters("tickets", 2 * n_steps), counters("done", n_steps + 1), state.flags[:1]
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        native.machine_code(native.current_isa(), driver.DriverKernel("work"))
    )

    def help_with(run: int) -> None:
        work(address(state.record), state.scratch[1], 1, run)

    over = int(gate[0]) - 1  # the number of the run that is over
    assert over % 2 == 1
    assert (tickets >> driver.COUNT_BITS == over).all()
    before = tickets.copy(), done.copy()
    help_with(over)
    assert (tickets == before[0]).all()
    assert (done == before[1]).all()

    gate[0] = new = over + 2
    tickets[:] = new << driver.COUNT_BITS
    done[1:] = 0
    help_with(over)
    assert (tickets == new << driver.COUNT_BITS).all()
    assert (done[1:] == 0).all()
    help_with(new)
    assert (done[1:] == jobs).all()
    gate[0] += 1
    torch.testing.assert_close(engine(x), network(x), rtol=1e-5, atol=1e-5)
