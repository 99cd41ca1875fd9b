"""The same network in every engine: torch in its dense ways, ONNX Runtime where it is installed, and this engine, dense and sparse.

Invariant: before and after a contestant is timed its output is compared with torch's, and all contestants of one sparsity alternate in one run, so that
they meet the same noise. One that cannot take part is named with its reason, and the others go on without it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from explorer.bench.foreign import FOREIGN, HALF_TOLERANCE, TIMEOUT_S, TOLERANCE, ForeignEngine, export
from explorer.bench.outputs import check_output
from explorer.bench.patience import Patience
from explorer.bench.surroundings import Probe, probe_ms, usable_cpus, version
from explorer.bench.usage import Metered
from explorer.errors import EngineError, EngineWarning
from explorer.inference import compile as compile_module
from explorer.inference.timing import Benchmark, EngineCall, compare_latency, dense_contestants, torch_threads
from explorer.masks import magnitude_mask, pair_mask
from explorer.models import LoadedModel, PrunableLayer

DENSE = "engine dense"
SPARSE = "engine sparse"
SPARSE_HALF = "engine sparse fp16"
SPARSE_PAIRS = "engine sparse pairs"
NOT_DENSE = frozenset({SPARSE, SPARSE_HALF, SPARSE_PAIRS})
"""Of this engine's contestants, those that a speed-up does not refer to."""

COMPILED = "torch compile"
ALL = "every engine"


_SLICE_S = 0.02
"""A contestant warms up for so long, and is then timed for as long. On two threads ONNX Runtime's look out for more work for some ten milliseconds after
their last: whoever came next shared a CPU with them, and took 6 ms instead of 2 for MobileNetV1."""


@dataclass(frozen=True, slots=True)
class EngineTiming:
    """What one engine needs for the network at one sparsity.

    Attributes
    ----------
    contestant : str
        "torch eager", "torch channels_last", "torch jit", "torch compile", "onnxruntime", "engine dense", "engine sparse", "engine
        sparse fp16", "engine sparse pairs" (as sparse, by weights of its own: zeros in pairs of output channels), or one of `explorer.bench.foreign.FOREIGN`.
    sparsity : float
        Fraction of zeros in each pruned layer, in [0, 1).
    benchmark : Benchmark
        Median, spread, threads and batch.
    speedup : float
        Time of the fastest dense contestant in the same run / time of this one.
    accepted, difference : float, optional
        The largest difference from torch's output that was accepted and that was found, see `explorer.bench.outputs.check_output`. None where a file does not
        tell, as those from before they were kept.
    cpus : float, optional
        How many CPUs its process kept busy while it was timed, on average: CPU time / time. Threads that wait for work in a loop count, too.
    """

    contestant: str
    sparsity: float
    benchmark: Benchmark
    speedup: float
    accepted: float | None = None
    difference: float | None = None
    cpus: float | None = None


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a contestant was not timed.

    Attributes
    ----------
    contestant : str
        "every engine" when none could be.
    reason : str
    failed : bool
        It should have worked; false when it merely cannot run in this environment.
    """

    contestant: str
    reason: str
    failed: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The engines on one network at one sparsity.

    Attributes
    ----------
    timings : tuple of EngineTiming
    absences : tuple of Absence
    versions : dict of str to str
        Of what was timed, by the name of the package, or of the contestant when it lives in another Python.
    probe : Probe
        How quiet it was.
    usable_cpus : int
        Logical CPUs that this process might use.
    """

    timings: tuple[EngineTiming, ...]
    absences: tuple[Absence, ...]
    versions: dict[str, str]
    probe: Probe
    usable_cpus: int


def accepted_difference(contestant: str) -> float:
    """Return the largest difference from torch's output that is accepted of a contestant, see `explorer.bench.outputs.check_output`."""
    if contestant in FOREIGN:
        return FOREIGN[contestant].tolerance
    return HALF_TOLERANCE if contestant == SPARSE_HALF else TOLERANCE


def pruned_copy(
    model: LoadedModel,
    sparsity: float,
    layers: Sequence[PrunableLayer] | None = None,
    *,
    pairs: bool = False,
) -> nn.Module:
    """Copy the network with some layers pruned by magnitude.

    Parameters
    ----------
    model : LoadedModel
    sparsity : float
        Fraction in [0, 1); 0 gives an unchanged copy.
    layers : sequence of PrunableLayer, optional
        Those to prune; all but the first and the last by default.
    pairs : bool
        In pairs of output channels, where their number is even.

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
            mask = pair_mask if pairs and len(weight) % 2 == 0 else magnitude_mask
            weight.mul_(mask(weight, sparsity))
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
    sparsity: float,
    threads: int = 1,
    seconds: float = 5.0,
    foreign: Sequence[tuple[str, str]] = (),
    layers: Sequence[PrunableLayer] | None = None,
    torch_compile: bool = True,
    timeout_s: float = TIMEOUT_S,
    patience_s: float = 0.0,
    fastest_ms: float = float("inf"),
) -> Comparison:
    """Time the network in every engine at one sparsity.

    Parameters
    ----------
    model : LoadedModel
    example_input : Tensor, (batch, ...) float32
        What each call runs on.
    sparsity : float
        Fraction in [0, 1).
    threads : int
        Threads of every engine, at least 1.
    seconds : float
        About how long the timing takes.
    foreign : sequence of (str, str)
        Engines in environments of their own, as `explorer.bench.foreign.parse` gives them, which run the pruned network too. One that uses its
        zeros, or computes in less than float32, is not what a speed-up refers to.
    layers : sequence of PrunableLayer, optional
        Those to prune; all but the first and the last by default.
    torch_compile : bool
        Whether torch.compile takes part.
    timeout_s : float
        How long a foreign engine may be silent.
    patience_s : float
        How long may be lost with waiting for a quiet machine, see `explorer.bench.patience`.
    fastest_ms : float
        What the probe took at its fastest elsewhere on this machine, with as many threads.

    Returns
    -------
    Comparison
        An engine that cannot be loaded, gives another output than torch, ends or falls silent is among the absences.
    """
    module = pruned_copy(model, sparsity, layers)
    calibrate(module, example_input)
    named = [name for name, _ in foreign]
    absences: list[Absence] = []
    versions = {name: version(name) for name in ("sparsity-explorer", "torch", "llvmlite")}
    before_ms = probe_ms(threads)
    timed: dict[str, Benchmark] = {}
    cpus: dict[str, float | None] = {}
    differences: dict[str, float] = {}
    others: dict[str, nn.Module] = {}
    kept = None
    with contextlib.ExitStack() as processes:
        contestants: dict[str, Callable[[], Any]] = {}
        try:
            contestants |= dense_contestants(
                module,
                example_input,
                threads,
                left_out=lambda name, error: absences.append(Absence(name, _reason(error), failed=True)),
            )
            sparse = EngineCall(compile_module(module, example_input, threads=threads), example_input)
        except EngineError as error:
            absences.append(Absence(ALL, _reason(error), failed=True))
            contestants.clear()
        else:
            if torch_compile:
                _add_torch_compile(contestants, absences, module, example_input, threads)
            if "onnxruntime" not in named:
                _add_onnxruntime(contestants, absences, versions, module, example_input, threads)
            _add_foreign(
                contestants, absences, versions, module, example_input, threads, foreign, processes, timeout_s
            )
            contestants[SPARSE] = sparse
            _add_half(contestants, absences, module, example_input, threads)
            others = _add_pairs(contestants, absences, model, sparsity, layers, example_input, threads)
            differences = _keep_right(contestants, absences, module, example_input, others)
        after: dict[str, float] = {}
        if contestants:
            fastest_ms = min(fastest_ms, *before_ms)
            timed, cpus, kept = _timed(
                contestants, absences, threads, example_input.shape[0], seconds, patience_s, fastest_ms
            )
        # Engines whose threads look out for work after a call would disturb the probe: it comes before the last calls.
        probe = Probe(before_ms, probe_ms(threads)) if kept is None else kept
        if contestants:
            after = _keep_right(
                contestants, absences, module, example_input, others, when="after its turns: "
            )
    timed = {name: timed[name] for name in after}
    dense = timed.keys() - NOT_DENSE - {name for name in named if not FOREIGN[name].is_dense_float32}
    best_dense_ms = min((timed[name].latency_ms for name in dense), default=0.0)
    return Comparison(
        tuple(
            EngineTiming(
                name,
                sparsity,
                benchmark,
                best_dense_ms / benchmark.latency_ms,
                accepted_difference(name),
                max(differences[name], after[name]),
                cpus[name],
            )
            for name, benchmark in timed.items()
        ),
        tuple(absences),
        versions,
        probe,
        usable_cpus(),
    )


def _add_half(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    module: nn.Module,
    example_input: Tensor,
    threads: int,
) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineWarning)  # that this CPU cannot: said below
            half = compile_module(module, example_input, threads=threads, precision="fp16")
    except EngineError as error:
        absences.append(Absence(SPARSE_HALF, _reason(error), failed=True))
        return
    if half.precision == "fp16":
        contestants[SPARSE_HALF] = EngineCall(half, example_input)
    else:
        absences.append(Absence(SPARSE_HALF, "this CPU does not compute in float16", failed=False))


def _add_pairs(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    model: LoadedModel,
    sparsity: float,
    layers: Sequence[PrunableLayer] | None,
    example_input: Tensor,
    threads: int,
) -> dict[str, nn.Module]:
    """The network with as many zeros in pairs of output channels; which module its output is to be compared with."""
    if sparsity == 0.0:
        return {}
    module = pruned_copy(model, sparsity, layers, pairs=True)
    calibrate(module, example_input)
    try:
        compiled = compile_module(module, example_input, threads=threads)
    except EngineError as error:
        absences.append(Absence(SPARSE_PAIRS, _reason(error), failed=True))
        return {}
    contestants[SPARSE_PAIRS] = EngineCall(compiled, example_input)
    return {SPARSE_PAIRS: module}


def _add_torch_compile(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    module: nn.Module,
    example_input: Tensor,
    threads: int,
) -> None:
    # It needs a C++ compiler, and has limits of its own; neither is a mistake of this benchmark.
    try:
        contestants[COMPILED] = _torch_compile(module, example_input, threads)
    except Exception as error:  # noqa: BLE001
        absences.append(Absence(COMPILED, _reason(error), failed=False))


def _torch_compile(module: nn.Module, example_input: Tensor, threads: int) -> Callable[[], Tensor]:
    """Compile with inductor, weights as constants and images as channels_last: how torch itself is fastest at inference on a CPU."""
    network, x = copy.deepcopy(module), example_input
    if x.dim() == 4:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        x = x.contiguous(memory_format=torch.channels_last)
    # All networks of a class share code, and after a few of them torch would give up compiling without a word.
    torch.compiler.reset()
    with torch_threads(threads), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(network, fullgraph=True, dynamic=False, options={"freezing": True})
        compiled(x)
    return lambda: compiled(x)


def _add_onnxruntime(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    versions: dict[str, str],
    module: nn.Module,
    example_input: Tensor,
    threads: int,
) -> None:
    missing = [name for name in ("onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed; the extra `bench` has them"
        absences.append(Absence("onnxruntime", reason, failed=False))
        return
    try:
        contestants["onnxruntime"] = _onnxruntime(module, example_input, threads)
        versions["onnxruntime"] = version("onnxruntime")
    except Exception as error:  # noqa: BLE001  # whatever its exporter or it raises
        absences.append(Absence("onnxruntime", _reason(error), failed=True))


def _add_foreign(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    versions: dict[str, str],
    module: nn.Module,
    example_input: Tensor,
    threads: int,
    foreign: Sequence[tuple[str, str]],
    processes: contextlib.ExitStack,
    timeout_s: float,
) -> None:
    if not foreign:
        return
    folder = Path(processes.enter_context(tempfile.TemporaryDirectory()))
    try:
        exported = export(module, example_input, folder)
    except Exception as error:  # noqa: BLE001  # the exporter raises many kinds
        reason = f"the network cannot be exported: {_reason(error)}"
        absences += [Absence(name, reason, failed=True) for name, _ in foreign]
        return
    for name, python in foreign:
        try:
            engine = ForeignEngine(name, python, exported, threads, timeout_s)
        except EngineError as error:
            absences.append(Absence(name, _reason(error), failed=True))
        else:
            contestants[name] = processes.enter_context(engine)
            versions[name] = engine.version


def _keep_right(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    module: nn.Module,
    example_input: Tensor,
    others: Mapping[str, nn.Module],
    when: str = "",
) -> dict[str, float]:
    """Drop the contestants that do not give torch's output, sample by sample, and return how far the rest is from it; `others` have weights of their own."""
    differences = {}
    with torch.inference_mode():
        usual_output = module(example_input)
        for name, call in list(contestants.items()):
            expected = others[name](example_input) if name in others else usual_output
            try:
                differences[name] = check_output(
                    name,
                    call(),
                    expected,
                    accepted=accepted_difference(name),
                    n_samples=len(example_input),
                )
            except EngineError as error:
                absences.append(Absence(name, when + _reason(error), failed=True))
                del contestants[name]
    return differences


def _timed(
    contestants: dict[str, Callable[[], Any]],
    absences: list[Absence],
    threads: int,
    batch_size: int,
    seconds: float,
    patience_s: float,
    fastest_ms: float,
) -> tuple[dict[str, Benchmark], dict[str, float | None], Probe | None]:
    """Time the contestants in turn; when a process ends or falls silent, begin again with the others. Also how many CPUs each kept busy, and with patience what the probe took around each turn."""
    while True:
        patience = Patience(patience_s, threads, fastest_ms) if patience_s > 0 else None
        metered = {
            name: call if isinstance(call, ForeignEngine) else Metered(call)
            for name, call in contestants.items()
        }
        try:
            timed = compare_latency(
                metered,
                threads=threads,
                batch_size=batch_size,
                seconds=seconds,
                repeats=100,
                slice_s=_SLICE_S,
                warm_s=_SLICE_S,
                take=patience.take if patience else None,
            )
        except EngineError:
            broken = {
                name: call.failure
                for name, call in contestants.items()
                if isinstance(call, ForeignEngine) and call.failure is not None
            }
            if not broken:
                raise
            for name, failure in broken.items():
                absences.append(Absence(name, failure, failed=True))
                del contestants[name]
        else:
            cpus = {name: call.usage.cpus for name, call in metered.items()}
            return timed, cpus, patience.kept if patience else None


def _reason(error: BaseException) -> str:
    """The first line of a message, since torch adds pages of advice."""
    text = str(error).strip()
    first = text.splitlines()[0].strip() if text else ""
    return first if isinstance(error, EngineError) else f"{type(error).__name__}: {first}"


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
