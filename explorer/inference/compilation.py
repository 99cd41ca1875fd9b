"""From a module to a compiled network: check what is asked for, capture, and try how threads serve it best."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explorer.errors import EngineError, EngineWarning
from explorer.inference.ahead import code_ahead
from explorer.inference.capture import CAPTURING, capture
from explorer.inference.choices import choice_cache
from explorer.inference.execution import APART, SHARED
from explorer.inference.graph import Graph
from explorer.inference.keywords import Keywords
from explorer.inference.module import Mode, SparseModule
from explorer.inference.native import Isa, current_isa, half_isa, why_torch
from explorer.inference.timing import CompileTimes, compare_latency

Precision = Literal["fp32", "fp16"]

_WORTH_MORE_THREADS = 1.05
"""Twice the threads must be faster by this factor, or they are left to others."""
_REPEATS = 15
"""Runs of each of two networks, before it is said which is faster."""


def compile(
    module: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    threads: int | Literal["auto"] | None = None,
    sparse: Mode = "auto",
    precision: Precision = "fp32",
    example_kwargs: Mapping[str, Any] | None = None,
) -> SparseModule:
    """Compile a module for fast inference on this CPU, skipping the zeros in its weights.

    Parameters
    ----------
    module : nn.Module
        In float32 on the CPU; captured in eval mode. Later changes to its weights are taken over by `SparseModule.update_weights`.
    example_input : Tensor or tuple
        Forward arguments; a first dimension of N means batches of up to N. Tensors may stand in lists and dicts, and values that are no tensors beside
        them: the network is called with the same structure, and with the same such values.
    threads : int or "auto", optional
        Threads per inference; 1 when not given. "auto" times 1, 2, 4, ... as long as more are faster, and keeps the fastest: small networks gain nothing from
        a second thread. What runs through torch uses as many as `torch.set_num_threads` says; `benchmark` and `profile` set it to the same number meanwhile.
    sparse : {"auto", "dense", "sparse"}
        "auto" measures and picks a kernel per layer; the others force one kind (for comparisons).
    precision : {"fp32", "fp16"}
        "fp16": images and tokens, their weights and their sums are float16, on CPUs that compute with it (AVX512-FP16, or ARM's FP16); what is sensitive
        (layer norm, softmax, smooth activations, averages, and everything after the pooling) is still computed in float32, and inputs and outputs stay
        float32. Twice as many numbers fit a register and a cache. See `SparseModule.compare` for what it costs in accuracy; activations beyond 65504 become
        infinite.
    example_kwargs : mapping, optional
        Forward arguments by name, beside those of `example_input` (an empty tuple when there are none). The network may be called with names, too.

    Returns
    -------
    SparseModule

    Raises
    ------
    EngineError
        When torch.export cannot capture the module, it is not float32 on the CPU, a weight is too large for float16 that was asked for, forward
        takes an argument that was given by name only, or it changes a buffer that the next call reads: a compiled network keeps nothing from call to call.

    Warns
    -----
    EngineWarning
        When this machine has no llvmlite, or a CPU without AVX2 and NEON: the module then runs through torch (`isa` is "torch"). When float16 was asked for
        on a CPU that does not compute with it: the module then runs in float32.

    Notes
    -----
    Native operators: convolutions over images and lines (any kernel, stride, padding, dilation and groups), linear layers, batch norm, layer norm,
    attention without a mask whose heads are ranges of features, addition and multiplication (of equal shapes, with one value per channel, and with
    constants), ReLU, ReLU6, clamp, LeakyReLU, ELU, Hardswish, Hardsigmoid, SiLU, GELU, sigmoid, tanh, maximum, average and adaptive average pooling over
    images, nearest-neighbour upsampling by powers of two, concatenation and slices of channels, flattening, and permutations that make tokens of pixels, or
    pixels of tokens. Every other operator runs through torch, as does an activation between two of them: see
    `SparseModule.fallbacks`.

    The sizes of the example are part of what is captured. Where forward reads the size of the batch, so that a smaller one would get another answer than the
    module's, such batches are refused; the module is asked once for one, two and three samples to know that, and is taken to answer larger batches like three.

    A sparse kernel never looks at what a zero weight would multiply. Where that is infinite or NaN, torch's dense arithmetic gives NaN (0 * inf is NaN) and
    the engine may give the sum of the other products instead. With finite operands, and in dense kernels, there is no such difference; an
    infinity or a NaN that a nonzero weight multiplies comes out as in torch.

    Examples
    --------
    >>> import torch, explorer
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).eval()
    >>> x = torch.ones(1, 1, 8, 8)
    >>> fast = explorer.compile(net, x)
    >>> torch.allclose(fast(x), net(x), atol=1e-5)
    True
    """
    if not isinstance(module, nn.Module):
        raise EngineError(f"A {type(module).__name__} was passed as the module; give an nn.Module.")
    if isinstance(threads, bool) or (
        threads not in (None, "auto") and (not isinstance(threads, int) or threads < 1)
    ):
        raise EngineError(
            f"threads={threads!r} was passed; give a whole number of at least 1, 'auto', or None for one thread."
        )
    if sparse not in ("auto", "dense", "sparse"):
        raise EngineError(f"sparse={sparse!r} was passed; it can be 'auto', 'dense' or 'sparse'.")
    if precision not in ("fp32", "fp16"):
        raise EngineError(f"precision={precision!r} was passed; it can be 'fp32' or 'fp16'.")
    with CAPTURING.inside():
        tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise EngineError(
                f"{name} is {tensor.dtype} on {tensor.device}; the engine runs float32 on the CPU. "
                "Compile a copy: copy.deepcopy(module).float().cpu()."
            )
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    keywords = Keywords(module)
    if example_kwargs:
        arguments = keywords.positional(arguments, example_kwargs)
    keywords.compiled_with(arguments)
    reason = why_torch()
    if reason is not None:
        warnings.warn(
            f"The compiled network runs through torch, at torch's speed: {reason}. Results are the same; zeros save no time.",
            EngineWarning,
            stacklevel=2,
        )
    isa = current_isa()
    if precision == "fp16" and isa.name != "torch":
        half = half_isa(isa)
        if half is None:
            warnings.warn(
                "This CPU does not compute in float16 (AVX512-FP16, or ARM's FP16): the network runs in float32, which is exact, and slower than float16 "
                "would be on a CPU that does.",
                EngineWarning,
                stacklevel=2,
            )
        isa = half or isa
    start = time.perf_counter()
    with code_ahead(isa, sparse=sparse != "dense"):
        graph = capture(module, arguments)
        captured = time.perf_counter()
    inputs = arguments if graph.arguments is None else graph.arguments.tensors(arguments)
    compiled = (
        _fastest(graph, inputs, sparse, isa)
        if threads == "auto"
        else _divided(graph, inputs, threads or 1, sparse, isa)
    )
    compiled.keywords = keywords
    compiled.ask_for_few(module)
    with CAPTURING.inside():
        compiled.remember(module)
    compiled.compile_times = CompileTimes(captured - start, time.perf_counter() - captured)
    return compiled


def _fastest(graph: Graph, inputs: tuple[Any, ...], mode: Mode, isa: Isa) -> SparseModule:
    """The network with 1, 2, 4, ... threads, as long as that makes it faster."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    best, threads = SparseModule(graph, inputs, 1, mode, isa), 2
    while threads <= cores:
        wider = _divided(graph, inputs, threads, mode, isa)
        pair = {"best": partial(best, *inputs), "wider": partial(wider, *inputs)}
        times = compare_latency(pair, threads=threads, repeats=_REPEATS, seconds=0.2)
        if times["best"].latency_ms < _WORTH_MORE_THREADS * times["wider"].latency_ms:
            break
        best, threads = wider, 2 * threads
    return best


def _divided(graph: Graph, inputs: tuple[Any, ...], threads: int, mode: Mode, isa: Isa) -> SparseModule:
    """The network with the faster division of a batch: each thread has images of its own, or all work on one image after the other.

    Apart, threads never wait for each other's part of an image, and a thread reads what it wrote itself; together, the activations of one image are in
    the caches instead of those of several. Where the latter do not fit, only measuring tells; the answer is remembered.
    """
    module = SparseModule(graph, inputs, threads, mode, isa)
    question = module.division
    if question is None or choice_cache().get(question) in (SHARED, APART):
        return module
    together = SparseModule(graph, inputs, threads, mode, isa, at_once=1)
    together.division = question
    some = tuple(value[: 2 * threads] for value in inputs)
    pair = {APART: partial(module, *some), SHARED: partial(together, *some)}
    times = compare_latency(pair, threads=threads, repeats=_REPEATS, seconds=0.3)
    faster = min(times, key=lambda name: times[name].latency_ms)
    choice_cache().put({question: faster})
    return together if faster == SHARED else module
