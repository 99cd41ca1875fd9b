"""When and where helper threads wake up."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import explorer
from explorer.inference import threads
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
