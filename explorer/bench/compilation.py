"""How long the engine takes to compile a network: with an empty cache, with a full one, and when weights change.

Each round has two fresh processes, one after the other, with a cache folder of their own: the first finds it empty, the second finds what the first has left. A
network is compiled once in each, as a user's script does, and then again, when all that Python imports is there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from explorer.errors import EngineError

__all__ = ["Compilation", "Limits", "limits_of", "measure_compilation"]

_UPDATES = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that compiling is meant to take at most, as medians; None where nothing is laid down.

    Attributes
    ----------
    cold_s, cached_s, update_s : float, optional
        Of the figures of `Compilation` with these names.
    """

    cold_s: float | None = None
    cached_s: float | None = None
    update_s: float | None = None


def limits_of(name: str, sparsity: float) -> Limits:
    """Return what this project allows itself for a network at a sparsity; a busy or slow machine exceeds it without being at fault."""
    if name == "resnet50" and sparsity == 0.9:
        return Limits(cold_s=1.0, cached_s=0.5, update_s=0.25)
    if name == "bert":
        return Limits(cold_s=2.0)
    return Limits()


@dataclass(frozen=True, slots=True)
class Compilation:
    """Seconds of each round.

    Attributes
    ----------
    first_capture_s, capture_s : tuple of float
        torch.export, the first time in a process and again.
    cold_s, cached_s : tuple of float
        All that follows it, with an empty cache and with a full one.
    update_s : tuple of float
        `SparseModule.update_weights`, the median of some calls.
    noise : float
        By how much the slowest turn of a fixed computation was slower than the fastest.
    limits : Limits
        Of this network.
    """

    first_capture_s: tuple[float, ...]
    capture_s: tuple[float, ...]
    cold_s: tuple[float, ...]
    cached_s: tuple[float, ...]
    update_s: tuple[float, ...]
    noise: float
    limits: Limits = Limits()

    def __str__(self) -> str:
        return (
            f"capture {_range(self.first_capture_s)} the first time in a process, {_range(self.capture_s)} again; after it "
            f"{_range(self.cold_s, self.limits.cold_s)} with an empty cache, {_range(self.cached_s, self.limits.cached_s)} with a full one; "
            f"new weights {_range(self.update_s, self.limits.update_s)}"
        )


def measure_compilation(
    name: str, sparsity: float, *, threads: int = 1, batch_size: int = 1, rounds: int = 5
) -> Compilation:
    """Compile a network of the benchmark in fresh processes.

    Parameters
    ----------
    name : str
        As for `explorer.bench.networks.load_network`.
    sparsity : float
        Of the layers that the benchmark prunes.
    threads, batch_size : int
    rounds : int

    Raises
    ------
    EngineError
        When a process ends before it has told its times; with what it said last.
    """
    from explorer.bench.surroundings import probe_ms

    probes = [*probe_ms(1)]
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="explorer-cache-") as folder:
            empty, full = (_in_a_process(name, sparsity, threads, batch_size, folder) for _ in range(2))
        found.append((empty, full))
        probes += probe_ms(1)
    return Compilation(
        tuple(one["first_capture_s"] for pair in found for one in pair),
        tuple(one["capture_s"] for pair in found for one in pair),
        tuple(empty["compile_s"] for empty, _ in found),
        tuple(full["compile_s"] for _, full in found),
        tuple(full["update_s"] for _, full in found),
        max(probes) / min(probes) - 1,
        limits_of(name, sparsity),
    )


def _range(seconds: Sequence[float], limit_s: float | None = None) -> str:
    """The median, the extremes, and the limit of the median."""
    median = statistics.median(seconds)
    limit = ""
    if limit_s is not None:
        limit = f", ABOVE the limit of {limit_s:g} s" if median > limit_s else f", limit {limit_s:g} s"
    return f"{median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}{limit})"


def _in_a_process(name: str, sparsity: float, threads: int, batch_size: int, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, name, str(sparsity), str(threads), str(batch_size)]
    done = subprocess.run(  # noqa: S603  # arguments of ours
        command, env={**os.environ, "EXPLORER_CACHE": folder}, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EngineError(f"{name} could not be compiled in a process of its own: {said[-1]}")
    times: dict[str, float] = json.loads(lines[-1])
    return times


def _compile(name: str, sparsity: float, threads: int, batch_size: int) -> dict[str, float]:
    """What `measure_compilation` runs in each process."""
    import torch

    from explorer.bench.engines import calibrate, pruned_copy
    from explorer.bench.networks import example_batch, load_network
    from explorer.inference import compile as compile_module

    torch.set_num_threads(threads)
    model, network = load_network(name)
    x = example_batch(model, batch_size)
    module = pruned_copy(model, sparsity, network.pruned(model.layers))
    calibrate(module, x)
    first = compile_module(module, x, threads=threads).compile_times
    engine = compile_module(module, x, threads=threads)
    updates = []
    for _ in range(_UPDATES):
        start = time.perf_counter()
        engine.update_weights(module)
        updates.append(time.perf_counter() - start)
    return {
        "first_capture_s": first.capture_s,
        "capture_s": engine.compile_times.capture_s,
        "compile_s": first.rest_s,
        "update_s": statistics.median(updates),
    }


def _main(name: str, sparsity: str, threads: str, batch_size: str) -> None:
    sys.stdout.write(json.dumps(_compile(name, float(sparsity), int(threads), int(batch_size))) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
