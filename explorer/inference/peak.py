"""Measures what cores of this machine can do at best, as many as a network uses; a profile is shown against it."""

from __future__ import annotations

import ctypes
import threading
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
    """The best of a few short runs, of all threads together.

    Two threads need not do twice as much as one: their CPUs may share a core, or the way to memory.

    Attributes
    ----------
    gflops : float
        Fused multiply-adds in registers, two operations each, in 1e9 per second.
    gigabytes_per_s : float
        Reading a buffer of 64 MiB once, each thread its part, in 1e9 bytes per second.
    isa : str
    threads : int
    """

    gflops: float
    gigabytes_per_s: float
    isa: str
    threads: int = 1


def machine_peak(precision: str = "fp32", threads: int = 1) -> MachinePeak:
    """Measure once per process (a tenth of a second), for the instruction set that the engine uses, in "fp32" or "fp16" arithmetic.

    Parameters
    ----------
    precision : {"fp32", "fp16"}
    threads : int
        How many work at the same time.

    Raises
    ------
    EngineError
        When this CPU has no arithmetic of that precision.
    """
    isa = current_isa() if precision == "fp32" else half_isa(current_isa())
    if isa is None:
        raise EngineError(f"This CPU has no {precision} arithmetic, and thus no peak of it.")
    return peak_of(isa, threads)


@cache
def peak_of(isa: Isa, threads: int = 1) -> MachinePeak:
    """Measure for code of this kind."""
    memory = Memory()
    buffer = memory.zeros(_READ_BYTES // isa.element_bytes, isa.dtype)
    buffer[:] = 1e-3
    rounds = _READ_BYTES // (isa.width * peak.READ_VECTORS * threads)
    part = rounds * isa.width * peak.READ_VECTORS
    operations = 2 * isa.lanes * peak.sums(isa) * _FMA_ROUNDS
    fma = _fastest(isa, "fma", [address(buffer)] * threads, _FMA_ROUNDS)
    read = _fastest(isa, "read", [address(buffer) + i * part for i in range(threads)], rounds)
    return MachinePeak(threads * operations / fma / 1e9, threads * part / read / 1e9, isa.name, threads)


def _fastest(isa: Isa, kind: str, places: list[int], rounds: int) -> float:
    """Seconds of the fastest of a few runs on as many threads as there are places in memory, which begin together."""
    code = machine_code(isa, peak.PeakKernel(kind))
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(code)
    together, seconds = threading.Barrier(len(places)), [[0.0] * _TURNS for _ in places]

    def work(me: int) -> None:
        for turn in range(_TURNS):
            together.wait()
            start = time.perf_counter()
            run(places[me], rounds)
            seconds[me][turn] = time.perf_counter() - start

    helpers = [threading.Thread(target=work, args=(me,)) for me in range(1, len(places))]
    for helper in helpers:
        helper.start()
    work(0)
    for helper in helpers:
        helper.join()
    # Of threads that begin a little apart, the mean: each has done as much.
    return min(sum(turn) / len(places) for turn in zip(*seconds, strict=True))
