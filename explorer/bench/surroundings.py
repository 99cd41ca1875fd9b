"""Where a time was measured, and how quiet it was there: the machine, the versions, and a probe whose own time should never change."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

import explorer
from explorer.formats.machine import machine as machine_and_versions
from explorer.inference.native import host_isa

__all__ = ["BUSY", "Probe", "machine", "probe_ms", "product", "summary", "version"]

BUSY = 0.10
"""Turns of the probe that differ by more than this fraction say that something else was running."""

_PROBE_SIZE = (
    256  # three float32 matrices of it, 768 KiB, stay in the second cache: the multipliers are the limit
)
_PROBE_TURNS = 5
_PROBE_SLICES = 9
_PROBE_SLICE_S = 0.004

# LLVM's names; what it does not list, the CPU does not have.
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "amx-tile",
    "amx-int8",
    "amx-bf16",
    "amx-fp16",
)
_ARM_FEATURES = ("neon", "dotprod", "i8mm", "bf16", "fullfp16", "sve", "sve2")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a fixed matrix product took before and after the contestants of one combination, or, with patience, before and after each of their turns.

    Attributes
    ----------
    before_ms, after_ms : tuple of float
        Medians of short turns, in milliseconds for one product.
    """

    before_ms: tuple[float, ...]
    after_ms: tuple[float, ...]

    @property
    def fastest_ms(self) -> float:
        """The fastest turn."""
        return min(self.before_ms + self.after_ms)

    @property
    def slowest_ms(self) -> float:
        """The slowest turn: much slower than the fastest, something else ran, or the machine changed its speed. Of more than ten turns, one that a tenth exceed."""
        turns = sorted(self.before_ms + self.after_ms)
        return turns[len(turns) * 9 // 10]


def product(threads: int) -> Callable[[float], float]:
    """A fixed product of two matrices, computed on so many threads at once, by each for itself; threads that share one would have to be woken up for it.

    Parameters
    ----------
    threads : int

    Returns
    -------
    callable
        Given seconds, each thread computes the product again and again for about so long; returns the milliseconds of one, on the slowest.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_PROBE_SIZE, _PROBE_SIZE, generator=generator) for _ in range(2))
    meeting = Barrier(threads)
    torch_threads_here = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "probe", torch.set_num_threads, (1,))

    def alone(calls: int) -> float:
        out = torch.empty_like(a)
        with torch.inference_mode():
            torch.mm(a, b, out=out)
            meeting.wait()
            start = time.perf_counter()
            for _ in range(calls):
                torch.mm(a, b, out=out)
            return (time.perf_counter() - start) / calls * 1e3

    def slice_ms(seconds: float) -> float:
        return max(pool.map(alone, [max(1, round(seconds * 1e3 / once_ms))] * threads))

    once_ms = max(pool.map(alone, [20] * threads))
    torch.set_num_threads(torch_threads_here)  # what threads that are still to come are told
    return slice_ms


def probe_ms(threads: int) -> tuple[float, ...]:
    """Time one fixed product of two matrices in a few short turns.

    Parameters
    ----------
    threads : int
        Threads that compute it at the same time.

    Returns
    -------
    tuple of float
        The median of each turn, in milliseconds for one product.
    """
    slice_ms = product(threads)
    for _ in range(_PROBE_TURNS):  # a CPU that slept needs a moment for its clock
        slice_ms(_PROBE_SLICE_S)
    return tuple(
        statistics.median(slice_ms(_PROBE_SLICE_S) for _ in range(_PROBE_SLICES)) for _ in range(_PROBE_TURNS)
    )


def machine() -> dict[str, Any]:
    """Describe the processor, its caches, its instruction sets and the memory, ready for JSON; what the system does not tell is absent."""
    found: dict[str, Any] = {"cpu": machine_and_versions()["cpu"], "logical_cpus": os.cpu_count()}
    caches = _caches()
    if caches:
        found["caches"] = caches
    flags = set(host_isa().features.split(","))
    arm = platform.machine().lower() in ("arm64", "aarch64")
    found["instruction_sets"] = {name: f"+{name}" in flags for name in (_ARM_FEATURES if arm else _FEATURES)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    found["system"] = machine_and_versions()["system"]
    found["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "not set")
    return found


def usable_cpus() -> int:
    """How many logical CPUs this process may use."""
    return int(machine_and_versions()["cores"])


def summary() -> str:
    """Name the processor and the versions on one line."""
    known = machine_and_versions()
    return f"{known['cpu']}, torch {known['torch']}, Python {known['python']}"


def version(distribution: str) -> str:
    """Version of an installed distribution; for this package with the commit that it is run from, when that can be known."""
    if distribution != "sparsity-explorer":
        return importlib.metadata.version(distribution)
    described = _git("describe", "--always", "--dirty", "--exclude=*")
    # An environment inside somebody's own repository is no checkout of ours.
    if described is None or _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return explorer.__version__
    return f"{explorer.__version__} ({described})"


def _git(*arguments: str) -> str | None:
    """What git says of this package's folder; None when it is no checkout, or there is no git."""
    command = ["git", "-C", str(Path(explorer.__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # arguments of ours
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def _caches() -> dict[str, str]:
    """Sizes by level of the first CPU, as Linux tells them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{letter}"] = size
    return found
