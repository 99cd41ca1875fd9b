"""What this machine can do at best."""

from __future__ import annotations

import pytest

from explorer.errors import EngineError
from explorer.inference import machine_peak, native
from tests.inference.test_partners import needs_code


@needs_code
def test_several_threads_do_more_than_one_and_at_most_as_many_times_as_much() -> None:
    # A busy machine only ever makes it less: the best of some tries.
    one = max(native_peak(1) for _ in range(3))
    two = max(native_peak(2) for _ in range(3))
    assert 0.5 * one < two < 2.3 * one
    assert machine_peak(threads=2).threads == 2
    assert machine_peak().threads == 1


def native_peak(threads: int) -> float:
    from explorer.inference import peak

    return peak.peak_of.__wrapped__(native.current_isa(), threads).gflops


@needs_code
def test_arithmetic_that_a_cpu_lacks_has_no_peak() -> None:
    if native.half_isa(native.current_isa()) is None:
        with pytest.raises(EngineError, match="fp16"):
            machine_peak("fp16")
    else:
        assert machine_peak("fp16").gflops > 1.2 * machine_peak().gflops
