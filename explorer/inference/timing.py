"""Honest times: contestants alternate in one run, medians come with their spread, and the threads, batch and instruction set are named."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from explorer.errors import EngineError

_SLICE_S = 0.004
"""A contestant runs this long before the next one does: long enough to warm its caches, short enough that all meet the same noise."""
_IDLE_S = 0.012
"""Longer than the ticks in which systems count the CPU time of a running thread (4 or 10 ms)."""


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """What one step of a network costs, measured inside the network.

    Attributes
    ----------
    name : str
        Dotted name of the layer, or of the module (or operator) that the step belongs to.
    kind : str
        "conv", "linear", "add", "max_pool", ..., or the torch operator.
    ms : float
        Median, in milliseconds, for the whole batch.
    kernel : str
        Of a layer "dense" (its zeros are multiplied too), "sparse", "sparse pairs" (two output channels with one pattern) or "code" (each nonzero is an instruction). After a comma,
        how it reaches its operands: "shift" (copied once for each offset within a vector), "compact" (copied without the gaps between rows), "channels" (output channels side by side in a
        vector, in place of pixels), "winograd", "depthwise"; nothing: where they lie. Of other steps "pool", "copy", "add", ...; "torch" for torch's own operator, "python" for the rest of a call.
    sparsity : float
        Zeros / elements of its weight; 0 when it has none.
    macs : int
        Multiply-adds of the layer's definition, zeros among its weights included, for the whole batch: elements of the output (of a transposed convolution: of
        the input) x weights of each. As is usual, those with the zeros around an image count too. 0 for all but convolutions and linear layers, and where
        torch runs something else, such as an LSTM.
    prunable : bool
        Whether it is a convolution or linear layer, whose weight can be pruned.
    n_bytes : int
        Bytes that the step touches, each counted once: its packed weights and tables, the values that it reads and those that it writes, for the whole batch, without the gaps
        between them. They may well be in a cache. 0 when unknown (torch).
    peak_gflops : float
        What this machine can do at best with as many threads as the network was compiled for, see `explorer.inference.machine_peak`. 0 when unknown.
    precision : str
        What the network computes in.
    threads : int
        That the network was compiled for.
    """

    name: str
    kind: str
    ms: float
    kernel: str
    sparsity: float
    macs: int
    prunable: bool
    n_bytes: int = 0
    peak_gflops: float = 0.0
    precision: str = "fp32"
    threads: int = 1

    @property
    def gflops(self) -> float:
        """Useful operations in 1e9 per second: two for each of `macs` whose weight is not zero; nothing for lanes of a vector that hold no pixel.

        Winograd's filtering needs fewer operations than that, so that its figure may be above what the machine can do.
        """
        return 2 * self.macs * (1 - self.sparsity) / self.ms / 1e6 if self.ms > 0 else 0.0

    @property
    def share_of_peak(self) -> float:
        """`gflops` / `peak_gflops`; 0 when the peak is unknown."""
        return self.gflops / self.peak_gflops if self.peak_gflops > 0 else 0.0


@dataclass(frozen=True, slots=True)
class CompileTimes:
    """What it took to compile a network.

    Attributes
    ----------
    capture_s : float
        torch.export, in seconds.
    rest_s : float
        All that follows: lowering, machine code, packing, and choosing kernels by measurement.
    """

    capture_s: float
    rest_s: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Latency of one contestant.

    Attributes
    ----------
    latency_ms : float
        Median over `repeats` runs, in milliseconds per batch.
    spread_ms : float
        Half the distance between the quartiles.
    min_ms : float
        The fastest run.
    repeats, threads, batch_size : int
    isa : str
        Instruction set of the engine's kernels, or "torch".
    precision : str
        "fp32" or "fp16", of this engine; others name theirs.
    """

    latency_ms: float
    spread_ms: float
    min_ms: float
    repeats: int
    threads: int
    batch_size: int
    isa: str
    precision: str = "fp32"

    @property
    def is_noisy(self) -> bool:
        """Whether the spread is more than a tenth of the median: something else was running, and the figures should not be trusted."""
        return self.spread_ms > NOISY * self.latency_ms


NOISY = 0.1


def check_repeats(repeats: int) -> None:
    """Refuse to take the median of no runs."""
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise EngineError(
            f"repeats={repeats!r} was passed; a median needs at least one run: give a whole number of at least 1."
        )


def summarise(
    times_ms: list[float], *, threads: int, batch_size: int, isa: str, precision: str = "fp32"
) -> Benchmark:
    """Median and spread of single runs, in milliseconds."""
    low, middle, high = statistics.quantiles(times_ms, n=4) if len(times_ms) > 1 else (times_ms[0],) * 3
    return Benchmark(
        middle, (high - low) / 2, min(times_ms), len(times_ms), threads, batch_size, isa, precision
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use this many threads inside the block."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def compare_latency(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 40,
    threads: int = 1,
    batch_size: int = 1,
    seconds: float = 2.0,
    slice_s: float = _SLICE_S,
    warm_s: float = 0.0,
    take: Callable[[Callable[[], float]], float] | None = None,
) -> dict[str, Benchmark]:
    """Time several callables in one run, slice by slice in turn; each time another one is the first.

    Parameters
    ----------
    contestants : mapping of name to callable
        Each call is one inference of `batch_size` samples. A contestant that lives in another process may have a method ``seconds(calls, warm_s)``
        that makes so many calls there, after such a warm-up, and returns their time; it is then used instead of a clock in this process.
    repeats : int
        Turns of each contestant.
    threads : int
        torch's threads while they run.
    batch_size : int
        Reported with the result.
    seconds : float
        About how long the whole comparison may take; slow contestants then get fewer turns (at least 5).
    slice_s : float
        What the calls of one turn take, about; at least one call.
    warm_s : float
        How long each contestant runs before its turn is timed; at least one call. Until then its caches are cold, and its helpers may sleep. When this is
        above 0, the next turn waits until the helpers of the last one have given up looking out for work, which can take them 40 ms.
    take : callable, optional
        Is given what measures one turn, and returns its value: for whoever knows when to measure, or to measure again. What it takes beside is not part of `seconds`.

    Returns
    -------
    dict of Benchmark
        One time per turn is the mean of the calls of that turn; the median is over turns.
    """
    with torch_threads(threads), torch.inference_mode():
        calls = {}
        for name, call in contestants.items():
            for _ in range(3):
                call()
            once = max(_seconds(call, 1), 1e-7)
            calls[name] = max(1, round(slice_s / once)), once
        one_turn = sum(n * once + max(once, warm_s) for n, once in calls.values())
        turns = max(5, min(repeats, int(seconds / one_turn)))
        times: dict[str, list[float]] = {name: [] for name in contestants}
        names = list(contestants)
        for turn in range(turns):
            # A machine that becomes slower during each turn, for instance, would favour whoever is always first.
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                n = calls[name][0]
                measure = partial(_one_turn, contestants[name], n, warm_s)
                times[name].append((measure() if take is None else take(measure)) / n * 1e3)
    return {
        name: summarise(
            t,
            threads=threads,
            batch_size=batch_size,
            isa=str(getattr(contestants[name], "isa", "torch")),
            precision=str(getattr(contestants[name], "precision", "fp32")),
        )
        for name, t in times.items()
    }


def _one_turn(call: Callable[[], object], calls: int, warm_s: float) -> float:
    seconds = _seconds(call, calls, warm_s)
    if warm_s > 0:
        wait_until_idle()
    return seconds


def wait_until_idle(limit_s: float = 0.5) -> None:
    """Sleep until the threads of this process, some of which spin for a while after their work, have used no CPU for a moment; at most so long."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(_IDLE_S)
        if time.process_time() - used < _IDLE_S / 5:
            return


def warm_up(call: Callable[[], object], warm_s: float) -> None:
    """Call once, and then as often as begins within `warm_s` seconds."""
    warm = time.perf_counter() + warm_s
    call()
    while time.perf_counter() < warm:
        call()


def _seconds(call: Callable[[], object], calls: int, warm_s: float = 0.0) -> float:
    """Time of so many calls after some that wake this contestant's threads and caches and are not counted: one, and as many as fit into `warm_s`."""
    own_clock = getattr(call, "seconds", None)
    if own_clock is not None:
        return float(own_clock(calls, warm_s))
    warm_up(call, warm_s)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def dense_contestants(
    module: nn.Module,
    example_input: torch.Tensor,
    threads: int = 1,
    *,
    left_out: Callable[[str, Exception], None] | None = None,
) -> dict[str, Callable[[], Any]]:
    """The dense ways to run `module` that a speed-up must be measured against.

    Parameters
    ----------
    module : nn.Module
    example_input : Tensor, (batch, ...)
        What each call runs on.
    threads : int
        Of this engine.
    left_out : callable, optional
        Is given the name of a contestant that torch cannot make of this module, and what it raised.

    Returns
    -------
    dict
        "torch eager", "torch channels_last" (4-D inputs), "torch jit" (traced, frozen and optimised for inference), and "engine dense"
        (this engine with dense kernels only). What torch cannot do with this module is left out.
    """
    from explorer.inference.compilation import compile as compile_module

    plain = copy.deepcopy(module).eval()
    contestants: dict[str, Callable[[], Any]] = {"torch eager": lambda: plain(example_input)}
    x, model = example_input, plain
    if example_input.dim() == 4:
        model = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = example_input.contiguous(memory_format=torch.channels_last)
        last, x_last = model, x
        contestants["torch channels_last"] = lambda: last(x_last)
    # Many modules cannot be traced, and each fails in its own way; eager remains as the contestant.
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x)))
            traced(x)
    except Exception as error:  # noqa: BLE001
        if left_out is not None:
            left_out("torch jit", error)
    else:
        contestants["torch jit"] = lambda: traced(x)
    engine = compile_module(module, example_input, threads=threads, sparse="dense")
    contestants["engine dense"] = EngineCall(engine, example_input)
    return contestants


class EngineCall:
    """A compiled module on a fixed input, as a contestant of `compare_latency`."""

    def __init__(self, engine: Any, example_input: torch.Tensor) -> None:
        self.engine, self.example_input = engine, example_input
        self.isa, self.precision = engine.isa, engine.precision

    def __call__(self) -> object:
        return self.engine(self.example_input)
