"""Measures what one core of this machine can do at best; a profile is shown against it."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import cache

from explorer.errors import EngineError
from explorer.inference.kernels import peak
from explorer.inference.memory import Memory, address
from explorer.inference.native import Isa, current_isa, half_isa, machine_code

_TURNS = 7
_FMA_ROUNDS = 100_000
_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class MachinePeak:
    """The best of a few short runs on one core.

    Attributes
    ----------
    gflops : float
        Fused multiply-adds in registers, two operations each, in 1e9 per second.
    gigabytes_per_s : float
        Reading a buffer of 64 MiB once, in 1e9 bytes per second.
    isa : str
    """

    gflops: float
    gigabytes_per_s: float
    isa: str


def machine_peak(precision: str = "fp32") -> MachinePeak:
    """Measure once per process (a tenth of a second), for the instruction set that the engine uses, in "fp32" or "fp16" arithmetic.

    Raises
    ------
    EngineError
        When this CPU has no arithmetic of that precision.
    """
    isa = current_isa() if precision == "fp32" else half_isa(current_isa())
    if isa is None:
        raise EngineError(f"This CPU has no {precision} arithmetic, and thus no peak of it.")
    return peak_of(isa)


@cache
def peak_of(isa: Isa) -> MachinePeak:
    """Measure for code of this kind."""
    memory = Memory()
    buffer = memory.zeros(_READ_BYTES // isa.element_bytes, isa.dtype)
    buffer[:] = 1e-3

    def fastest(kind: str, rounds: int) -> float:
        kernel = peak.PeakKernel(kind)
        code = machine_code(isa, kernel)
        run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(code)
        times = []
        for _ in range(_TURNS):
            start = time.perf_counter()
            run(address(buffer), rounds)
            times.append(time.perf_counter() - start)
        return min(times)

    operations = 2 * isa.lanes * peak.sums(isa) * _FMA_ROUNDS
    rounds = _READ_BYTES // (isa.width * peak.READ_VECTORS)
    return MachinePeak(
        operations / fastest("fma", _FMA_ROUNDS) / 1e9, _READ_BYTES / fastest("read", rounds) / 1e9, isa.name
    )
