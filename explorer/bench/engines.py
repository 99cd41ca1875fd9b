"""The same network in every engine: torch in its dense ways, ONNX Runtime where it is installed, and this engine, dense and sparse.

Invariant: before a contestant is timed its output is compared with torch's, and all contestants of one sparsity alternate in one run, so that
they meet the same noise.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from explorer.bench.foreign import FOREIGN, TOLERANCE, ForeignEngine, export
from explorer.errors import EngineError
from explorer.inference import compile as compile_module
from explorer.inference.timing import Benchmark, EngineCall, compare_latency, dense_contestants
from explorer.masks import magnitude_mask
from explorer.models import LoadedModel, PrunableLayer

SPARSE = "engine sparse"


@dataclass(frozen=True, slots=True)
class EngineTiming:
    """What one engine needs for the network at one sparsity.

    Attributes
    ----------
    contestant : str
        "torch eager", "torch channels_last", "torch jit", "onnxruntime", "engine dense", "engine sparse", or one of
        `explorer.bench.foreign.FOREIGN`.
    sparsity : float
        Fraction of zeros in each pruned layer, in [0, 1).
    benchmark : Benchmark
        Median, spread, threads and batch.
    speedup : float
        Time of the fastest dense contestant in the same run / time of this one.
    """

    contestant: str
    sparsity: float
    benchmark: Benchmark
    speedup: float


def pruned_copy(
    model: LoadedModel, sparsity: float, layers: Sequence[PrunableLayer] | None = None
) -> nn.Module:
    """Copy the network with some layers pruned by magnitude.

    Parameters
    ----------
    model : LoadedModel
    sparsity : float
        Fraction in [0, 1); 0 gives an unchanged copy.
    layers : sequence of PrunableLayer, optional
        Those to prune; all but the first and the last by default.

    Returns
    -------
    nn.Module
        In eval mode; the model itself is untouched.
    """
    module = copy.deepcopy(model.module).eval()
    parameters = dict(module.named_modules())
    for layer in model.layers[1:-1] if layers is None else layers:
        weight = parameters[layer.name].weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight.mul_(magnitude_mask(weight, sparsity))
    return module


def calibrate(module: nn.Module, example_input: Tensor) -> None:
    """Estimate the BatchNorm statistics on a batch of noise, in place.

    Random and then pruned weights shrink the activations from layer to layer, until the outputs are the last layer's bias whatever an engine
    does before it, and comparing them would prove nothing.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches that follow
        norm.train()
    noise = torch.randn(4, *example_input.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module(noise)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def time_engines(
    model: LoadedModel,
    example_input: Tensor,
    *,
    sparsities: Sequence[float] = (0.8, 0.9, 0.95),
    threads: int = 1,
    seconds: float = 5.0,
    foreign: Sequence[tuple[str, str]] = (),
    layers: Sequence[PrunableLayer] | None = None,
) -> Iterator[EngineTiming]:
    """Time the network in every engine at every sparsity.

    Parameters
    ----------
    model : LoadedModel
    example_input : Tensor, (batch, ...) float32
        What each call runs on.
    sparsities : sequence of float
        Fractions in [0, 1).
    threads : int
        Threads of every engine, at least 1.
    seconds : float
        About how long the timing at one sparsity takes.
    foreign : sequence of (str, str)
        Engines in environments of their own, as `explorer.bench.foreign.parse` gives them, which run the pruned network too. One that uses its
        zeros, or computes in less than float32, is not what a speed-up refers to.

    layers : sequence of PrunableLayer, optional
        Those to prune; all but the first and the last by default.

    Yields
    ------
    EngineTiming
        The engines of one sparsity after each other, once that sparsity is measured.

    Raises
    ------
    EngineError
        If an engine's output is not torch's.
    """
    for sparsity in sparsities:
        module = pruned_copy(model, sparsity, layers)
        calibrate(module, example_input)
        with contextlib.ExitStack() as processes:
            contestants = dict(dense_contestants(module, example_input, threads))
            named = {name for name, _ in foreign}
            if _has_onnxruntime() and "onnxruntime" not in named:
                contestants["onnxruntime"] = _onnxruntime(module, example_input, threads)
            if foreign:
                folder = Path(processes.enter_context(tempfile.TemporaryDirectory()))
                exported = export(module, example_input, folder)
                for name, python in foreign:
                    engine = ForeignEngine(name, python, exported, threads)
                    contestants[name] = processes.enter_context(engine)
            dense = contestants.keys() - {name for name in named if not FOREIGN[name].is_dense_float32}
            contestants[SPARSE] = EngineCall(
                compile_module(module, example_input, threads=threads), example_input
            )
            with torch.inference_mode():
                expected = module(example_input)
                for name, call in contestants.items():
                    _check_output(
                        name, call(), expected, FOREIGN[name].tolerance if name in named else TOLERANCE
                    )
            timed = compare_latency(
                contestants, threads=threads, batch_size=example_input.shape[0], seconds=seconds, repeats=100
            )
        best_dense_ms = min(timed[name].latency_ms for name in dense)
        for name, benchmark in timed.items():
            yield EngineTiming(name, sparsity, benchmark, best_dense_ms / benchmark.latency_ms)


def table(timings: Sequence[EngineTiming]) -> str:
    """Lay the timings out as text, one line each, the fastest dense contestant of each sparsity at speed-up 1."""
    lines = [
        f"{'sparsity':>8}  {'engine':<20} {'median ms':>10} {'± ms':>8} {'fastest ms':>10} {'speed-up':>9}"
    ]
    for one in timings:
        b = one.benchmark
        lines.append(
            f"{one.sparsity:>8.2f}  {one.contestant:<20} {b.latency_ms:>10.3f} {b.spread_ms:>8.3f} "
            f"{b.min_ms:>10.3f} {one.speedup:>8.2f}x"
        )
    return "\n".join(lines)


def machine() -> str:
    """Name the processor and the versions, without which a time means nothing."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return f"{processor}, torch {torch.__version__}, Python {platform.python_version()}"


def _check_output(name: str, output: Any, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = max(float(expected.abs().max()), 1e-12)
    difference = float((torch.as_tensor(output) - expected).abs().max()) / scale
    if not difference <= tolerance:
        raise EngineError(
            f"{name} gives another output than torch: relative difference {difference:.2g}, {tolerance:g} is accepted. "
            "Its time would mean nothing; please report this with the network."
        )


def _has_onnxruntime() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnxscript"))


def _onnxruntime(module: nn.Module, example_input: Tensor, threads: int) -> Callable[[], Tensor]:
    import onnxruntime

    # The exporter reports its progress on standard output and its doubts as warnings; the output is compared anyway.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (example_input,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: example_input.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
