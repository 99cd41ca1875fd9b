"""What this machine can do at best."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.errors import EngineError
from explorer.inference import machine_peak, native
from explorer.inference.kernels import peak
from explorer.inference.memory import Memory, address
from tests.inference.test_kernels import SOME_ISA
from tests.inference.test_partners import needs_code


@needs_code
def test_several_threads_do_more_than_one_and_at_most_as_many_times_as_much() -> None:
    # A busy machine only ever makes it less: the best of some tries.
    one = max(native_peak(1) for _ in range(3))
    two = max(native_peak(2) for _ in range(3))
    assert 0.5 * one < two < 2.3 * one
    assert machine_peak(threads=2).threads == 2
    assert machine_peak().threads == 1


@needs_code
@pytest.mark.parametrize("kind", ["fma", "read"])
@given(isa=SOME_ISA, rounds=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_each_round_does_what_its_twin_does(kind: str, isa: str, rounds: int) -> None:
    cpu, memory = native.host_isa(isa), Memory()
    buffer = memory.zeros(max(rounds * peak.READ_VECTORS, 2) * cpu.lanes)
    buffer[:] = np.random.default_rng(rounds).integers(-8, 8, buffer.size) / 4  # sums are exact
    wanted = peak.reference(kind, buffer, rounds, cpu)
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(
        native.machine_code(cpu, peak.PeakKernel(kind))
    )
    run(address(buffer), rounds)
    np.testing.assert_array_equal(buffer[cpu.lanes : 2 * cpu.lanes], wanted)


def native_peak(threads: int) -> float:
    from explorer.inference.peak import peak_of

    return peak_of.__wrapped__(native.current_isa(), threads).gflops


@needs_code
def test_arithmetic_that_a_cpu_lacks_has_no_peak() -> None:
    if native.half_isa(native.current_isa()) is None:
        with pytest.raises(EngineError, match="fp16"):
            machine_peak("fp16")
    else:
        assert machine_peak("fp16").gflops > 1.2 * machine_peak().gflops
