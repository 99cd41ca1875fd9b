"""The compiled network: call it like the module it came from.

`compile` captures and lowers the module, plans it, and decides by measurement, layer by layer, which kernel runs: every candidate runs in the
whole network, all layers at once, and each layer keeps the one that was fastest *there* (times of a layer alone mislead: its data would be in
the cache).
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from explorer.errors import EngineError, EngineWarning
from explorer.inference import fork
from explorer.inference.ahead import code_ahead
from explorer.inference.capture import CAPTURING, are_close, capture, run_aside, tensor_attribute
from explorer.inference.choices import choice_cache
from explorer.inference.deviation import Deviation, Source, deviation
from explorer.inference.graph import Graph, Ref, with_values
from explorer.inference.larger_kernels import Larger, Weighed, larger_kernels
from explorer.inference.lower import lower, through_torch
from explorer.inference.native import Isa, current_isa, half_isa, why_torch
from explorer.inference.pairs import in_pairs
from explorer.inference.plan import Choice, ImportSegment, NativeSegment, Plan, TorchSegment, density_of
from explorer.inference.straight import StraightPath
from explorer.inference.timing import (
    Benchmark,
    CompileTimes,
    LayerTiming,
    check_repeats,
    compare_latency,
    summarise,
    torch_threads,
)

if TYPE_CHECKING:
    # What generates or runs machine code needs llvmlite: imported where it is used, so that a machine without it runs through torch.
    from explorer.inference.steps import Steps
    from explorer.inference.threads import Runner

Mode = Literal["auto", "dense", "sparse"]
Precision = Literal["fp32", "fp16"]

_CACHED_BYTES = 8 << 20
"""Activations of the images that go through the network together: what the outer caches of one core may be expected to hold."""

_CHOICE_PASSES, _CHOICE_REPEATS = 3, 5
"""How often the candidates take turns, and the runs of one turn."""
_CHOICE_PASSES_S = 0.12
"""Seconds after which two passes are enough."""
_ORDER_TURNS = 2
_CHOICE_S = 0.015
"""Seconds after which a turn has been long enough: a large network runs but once a turn, after a run that warms the caches."""


def compile(
    module: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    threads: int | Literal["auto"] | None = None,
    sparse: Mode = "auto",
    precision: Precision = "fp32",
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
        a second thread.
    sparse : {"auto", "dense", "sparse"}
        "auto" measures and picks a kernel per layer; the others force one kind (for comparisons).
    precision : {"fp32", "fp16"}
        "fp16": images and tokens, their weights and their sums are float16, on CPUs that compute with it (AVX512-FP16, or ARM's FP16); what is sensitive
        (layer norm, softmax, smooth activations, averages, and everything after the pooling) is still computed in float32, and inputs and outputs stay
        float32. Twice as many numbers fit a register and a cache. See `SparseModule.compare` for what it costs in accuracy; activations beyond 65504 become
        infinite.

    Returns
    -------
    SparseModule

    Raises
    ------
    EngineError
        When torch.export cannot capture the module, it is not float32 on the CPU, a weight is too large for float16 that was asked for, or forward
        changes a buffer that the next call reads: a compiled network keeps nothing from call to call.

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
    images, nearest-neighbour upsampling by powers of two, concatenation and slices of channels, and flattening. Every other operator runs through torch, as does an activation between two of them: see
    `SparseModule.fallbacks`.

    The sizes of the example are part of what is captured. Where forward reads the size of the batch, so that a smaller one would get another answer than the
    module's, smaller batches are refused; the module is asked once for one and for two samples to know that.

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
    with CAPTURING:
        tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise EngineError(
                f"{name} is {tensor.dtype} on {tensor.device}; the engine runs float32 on the CPU. "
                "Compile a copy: copy.deepcopy(module).float().cpu()."
            )
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
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
    compiled.ask_for_few(module)
    with CAPTURING:
        compiled.remember(module)
    compiled.compile_times = CompileTimes(captured - start, time.perf_counter() - captured)
    return compiled


_WORTH_MORE_THREADS = 1.05
"""Twice the threads must be faster by this factor, or they are left to others."""


def _fastest(graph: Graph, inputs: tuple[Any, ...], mode: Mode, isa: Isa) -> SparseModule:
    """The network with 1, 2, 4, ... threads, as long as that makes it faster."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    best, threads = SparseModule(graph, inputs, 1, mode, isa), 2
    while threads <= cores:
        wider = _divided(graph, inputs, threads, mode, isa)
        pair = {"best": partial(best, *inputs), "wider": partial(wider, *inputs)}
        times = compare_latency(pair, threads=threads, repeats=_CHOICE_PASSES * _CHOICE_REPEATS, seconds=0.2)
        if times["best"].latency_ms < _WORTH_MORE_THREADS * times["wider"].latency_ms:
            break
        best, threads = wider, 2 * threads
    return best


_SHARED, _APART = "image by image", "images apart"
_BANDS, _LAYERS = "band by band", "layer by layer"


def _divided(graph: Graph, inputs: tuple[Any, ...], threads: int, mode: Mode, isa: Isa) -> SparseModule:
    """The network with the faster division of a batch: each thread has images of its own, or all work on one image after the other.

    Apart, threads never wait for each other's part of an image, and a thread reads what it wrote itself; together, the activations of one image are in
    the caches instead of those of several. Where the latter do not fit, only measuring tells; the answer is remembered.
    """
    module = SparseModule(graph, inputs, threads, mode, isa)
    question = module.division
    if question is None or choice_cache().get(question) in (_SHARED, _APART):
        return module
    together = SparseModule(graph, inputs, threads, mode, isa, at_once=1)
    together.division = question
    some = tuple(value[: 2 * threads] for value in inputs)
    pair = {_APART: partial(module, *some), _SHARED: partial(together, *some)}
    times = compare_latency(pair, threads=threads, repeats=_CHOICE_PASSES * _CHOICE_REPEATS, seconds=0.3)
    faster = min(times, key=lambda name: times[name].latency_ms)
    choice_cache().put({question: faster})
    return together if faster == _SHARED else module


class SparseModule:
    """A compiled network. Made by `compile`.

    Threads may share it (calls take turns), a forked child may go on using it, and Ctrl-C leaves it usable. It cannot be pickled or copied: its code
    and buffers belong to one process.

    Attributes
    ----------
    threads : int
    isa : str
        "avx512", "avx2", "neon" or "generic"; "torch" where there is no machine code, see `compile`.
    precision : str
        "fp32" or "fp16": what it computes in.
    batch_size : int
        The largest batch it takes.
    fallbacks : tuple of str
        Operators that run through torch, with the module they belong to.
    choices : dict
        Layer name -> kernel chosen.
    compile_times : CompileTimes
        What `compile` took, zeros before it has ended.
    division : str or None
        Of a batch whose images do not fit the caches, one a thread: what the better way to divide it depends on, see `explorer.inference.choices`.
    """

    def __init__(
        self,
        graph: Graph,
        example: tuple[Any, ...],
        threads: int,
        mode: Mode,
        isa: Isa | None = None,
        *,
        at_once: int | None = None,
    ) -> None:
        # A graph may be compiled more than once: what this one forgets (see `_let_go`) is its own.
        self._captured = replace(graph, constants=dict(graph.constants))
        self.threads, self._mode = threads, mode
        self._isa = isa or current_isa()
        self.isa, self.precision = self._isa.name, self._isa.precision
        self._source: Source | None = None
        self._lock = fork.EngineLock()
        self._at_once: int | None = None
        self._graph = self._lowered()
        self._plan = Plan(self._graph, self._isa, threads, mode=mode)
        self.batch_size = self._plan.images
        self.division: str | None = None
        self.compile_times = CompileTimes(0.0, 0.0)
        self._at_once = at_once or self._images_at_once()
        self._in_head: frozenset[str] = frozenset()
        if self._at_once is not None:
            heads = self._plan.head_places
            self._in_head = frozenset(n for n in self._graph.shapes if self._plan.root(n) in heads)
            self._graph = self._lowered()
            self._plan = Plan(self._graph, self._isa, threads, self.batch_size, mode)
        self._choices: dict[int, Choice] = {}
        self._densities: dict[int, float] = {}
        self._cycles: NDArray[np.int64] = np.zeros(0, np.int64)
        # Images of a turn, and in all, for which the steps are set; (0, 0): not known.
        self._batch = (self._plan.images, self._plan.images)
        self._runner: Runner | None = None
        self._steps: Steps | None = None
        self._example = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in example)
        self._separable: bool | None = None
        # What the module answers for few images, until the first small batch comes; then the smallest batch that is answered as it would.
        self._few: list[tuple[tuple[Any, ...], Any]] = []
        self._least = 1
        self._straight: StraightPath | None = None
        self._choose()
        self._let_go()

    def _lowered(self) -> Graph:
        self._captured.derive()
        if self._isa.name == "torch":
            return through_torch(self._captured)
        graph = lower(self._captured)
        if self._at_once is not None:
            for name, shape in graph.shapes.items():
                follows = name not in graph.constants and shape[:1] == (self.batch_size,)
                if follows and name not in self._in_head:
                    graph.shapes[name] = (self._at_once, *shape[1:])
        return graph

    def _images_at_once(self) -> int | None:
        """How many images of a large batch go through the whole network before the next ones begin; None for all of them.

        Layer by layer, the activations of a large batch would travel to main memory and back between any two layers; those of a few images stay in
        the caches, and in the same few buffers.
        """
        graph, plan, images = self._graph, self._plan, self.batch_size
        returned = [output.name for output in graph.outputs if isinstance(output, Ref)]
        follows = all(graph.shapes.get(name, ())[:1] == (images,) for name in (*graph.inputs, *returned))
        if not plan.is_dynamic or not plan.native or not follows:
            return None
        fitting = int(_CACHED_BYTES * images // max(plan.memory.n_bytes, 1))
        # Whole rounds of the threads: each then has images of its own, even where the caches do not hold so many, unless sharing was found faster.
        if fitting < self.threads <= images and self.threads > 1:
            densities = {i: self._density(i) for i in plan.layers(graph)}
            self.division = f"division {self._mode} {plan.network(graph, densities)}"
            if choice_cache().get(self.division) == _SHARED:
                return 1
        fitting = max(fitting // self.threads, 1) * self.threads
        return fitting if fitting < images else None

    def _let_go(self) -> None:
        """Forget the parameters that are packed by now, and keep copies of those that torch's part reads.

        The module that they came from may go on training, or be dropped.
        """
        read = {output.name for output in self._graph.outputs if isinstance(output, Ref)}
        for segment in self._plan.segments:
            if isinstance(segment, TorchSegment):
                read.update(segment.operation.references())
            elif isinstance(segment, ImportSegment):
                read.add(segment.value)
        for graph in (self._captured, self._graph):
            constants = graph.constants
            follow = {*self._captured.parameter_names, *(o.output for o in self._captured.derived)}
            for name in [n for n in constants if n in follow]:
                if name in read:
                    constants[name] = constants[name].clone()
                else:
                    del constants[name]

    def __reduce__(self) -> Any:
        raise EngineError(
            "A SparseModule cannot be pickled or copied: its machine code and buffers belong to this process. Send the nn.Module instead and call "
            "explorer.compile where it is needed (in a DataLoader with the spawn method: in the worker, when the dataset is first asked)."
        )

    # ---- description

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Operators without a native kernel, as "module: operator"."""
        return tuple(
            f"{s.operation.name or 'model'}: {_operator(s.operation.target)}"
            for s in self._plan.segments
            if isinstance(s, TorchSegment)
        )

    @property
    def choices(self) -> dict[str, str]:
        """The kernel of each convolution and linear layer."""
        return {self._graph.operations[i].name: c.label for i, c in self._choices.items()}

    @property
    def n_bytes(self) -> int:
        """Bytes of packed weights and activation buffers: what a compiled network occupies besides its machine code and each thread's scratch."""
        return self._plan.memory.n_bytes + (self._steps.memory.n_bytes if self._steps else 0)

    def __repr__(self) -> str:
        return (
            f"SparseModule({len(self._plan.native)} native steps, {len(self.fallbacks)} through torch, "
            f"batch <= {self.batch_size}, {self.threads} thread(s), {self.isa}, {self.precision})"
        )

    # ---- running

    def __call__(self, *inputs: Any) -> Any:
        """Run the network.

        Parameters
        ----------
        inputs : Tensor, or whatever the example input had in their place
            As the module's forward takes them; batches may be smaller than the compiled one. They are never written to, also where the module would.

        Raises
        ------
        EngineError
            When a shape or dtype does not fit what was compiled.
        """
        straight = self._straight
        if straight is not None and len(inputs) == 1:
            x = inputs[0]
            if (
                x.__class__ is Tensor
                and (x.shape == straight.shape or straight.divides(x, self.batch_size))
                and (not self._few or len(x) == self.batch_size)
                and x.dtype is torch.float32
                and x.is_cpu
                and x.layout is torch.strided
                and not x.requires_grad
                and not x.is_neg()
            ):
                with self._lock:
                    return self._run_straight(straight, x)
        inputs = self._tensors(inputs)
        images = self._check(inputs)
        with self._lock, torch.no_grad():
            return self._run(inputs, images)

    def _tensors(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        known = self._captured.arguments
        return arguments if known is None else known.tensors(arguments)

    def _check(self, inputs: tuple[Tensor, ...]) -> int:
        names = self._graph.inputs
        if len(inputs) != len(names):
            raise EngineError(f"{len(inputs)} inputs were passed; this network takes {len(names)}.")
        images = self.batch_size
        for position, (name, value) in enumerate(zip(names, inputs, strict=True)):
            wanted = self._captured.shapes[name]
            if not isinstance(value, Tensor):
                raise EngineError(
                    f"Input {position} is a {type(value).__name__}; this network takes a tensor of shape {wanted}. Convert it with torch.as_tensor."
                )
            shape = tuple(value.shape)
            if (
                position == 0
                and 0 < len(shape) == len(wanted)
                and shape[1:] == wanted[1:]
                and 0 < shape[0] <= wanted[0]
            ):
                images = shape[0]
            elif shape != wanted and 0 in shape:
                raise EngineError(
                    f"Input {position} is empty: it has shape {shape}; this network was compiled for {wanted} (or a smaller batch of at least 1)."
                )
            elif shape != wanted and (shape[1:] != wanted[1:] or shape[:1] != (images,)):
                raise EngineError(
                    f"Input {position} has shape {shape}; this network was compiled for {wanted} (or a smaller batch). "
                    "Compile it again with an example input of the shape you need."
                )
            elif images != self.batch_size and wanted[:1] == (self.batch_size,) and shape[:1] != (images,):
                raise EngineError(
                    f"Input {position} has shape {shape}, but input 0 holds a batch of {images}. Pass batches of equal size."
                )
            if value.dtype != self._graph.dtypes[name]:
                raise EngineError(
                    f"Input {position} is {value.dtype}; this network was compiled for {self._graph.dtypes[name]}."
                )
            if not value.is_cpu or value.layout is not torch.strided:
                raise EngineError(
                    f"Input {position} is a {value.layout} tensor on {value.device}; this network takes torch.strided tensors on cpu. "
                    "Convert it with .to_dense() or .cpu()."
                )
        if images < self.batch_size and self._few:
            with self._lock:
                self._compare_few()
        if images < min(self._least, self.batch_size):
            raise EngineError(
                f"A batch of {images} was passed to a network that was compiled for {self.batch_size}, and that does something else with a batch of "
                "another size (its forward may use x.shape[0], or reshape by a fixed number). Compile it again with an example input of that size."
            )
        return images

    # ---- smaller batches

    def ask_for_few(self, module: nn.Module) -> None:
        """Have `module` answer for one image and for two, to be compared with when a small batch comes.

        torch.export writes the sizes of the example into the graph: a forward that reads them would go on with those of a full batch.
        """
        self._few = []
        for images in range(1, min(3, self.batch_size)):
            some = tuple(value[:images] if self._has_batch(value) else value for value in self._varied())
            arguments = self._captured.arguments
            try:
                answer = run_aside(module, some if arguments is None else arguments.rebuilt(some))
            except Exception:  # noqa: BLE001 - whatever it cannot do with few images
                answer = None
            self._few.append((some, answer))

    def _compare_few(self) -> None:
        """Learn the smallest batch that is answered as the module answers it, unless that is known."""
        if self._few:
            self._least = self._smallest_alike(self._few)
            self._few = []
            if self._least > 1:
                self._straight = None

    def _smallest_alike(self, few: list[tuple[tuple[Any, ...], Any]]) -> int:
        tolerance = 0.01 if self.precision == "fp32" else 0.1
        for images, (some, answer) in enumerate(few, 1):
            try:
                with torch.no_grad():
                    found = self._run(some, images)
            except EngineError:
                return 1  # one sample depends on the others, which is said when such a batch is passed
            except RuntimeError:
                continue
            if answer is not None and are_close(found, answer, tolerance):
                return images
        return self.batch_size

    def _has_batch(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch_size

    def _varied(self) -> tuple[Any, ...]:
        """The example; noise in the place of a tensor that is the same everywhere, which would hide what depends on what."""
        noise = torch.Generator().manual_seed(0)

        def varied(value: Any) -> Any:
            if not self._has_batch(value) or not value.is_floating_point() or not _is_uniform(value):
                return value
            return torch.randn(value.shape, generator=noise, dtype=value.dtype)

        return tuple(varied(value) for value in self._example)

    def _run_straight(self, straight: StraightPath, x: Tensor) -> Tensor:
        at_once = straight.shape[0]
        self._set_batch(at_once, len(x) if straight.has_head else at_once)
        ready, self._batch = self._batch, (0, 0)  # an interrupt may leave addresses moved on
        result = straight.run(x)
        self._batch = ready
        return result

    def _set_batch(self, images: int, total: int) -> None:
        """Give the steps the jobs of turns of so many images, and the head those of all."""
        if self._batch != (images, total):
            # An interrupt between the two must not leave the table of one batch under the number of another.
            self._batch = (0, 0)
            if self._steps is not None:
                self._steps.set_batch(images, total)
            self._batch = images, total

    def _run(self, inputs: tuple[Tensor, ...], images: int, times: list[float] | None = None) -> Any:
        """Run the network; with `times`, append the seconds of each segment, and keep the cycles of each step for `_ticks`."""
        if self._at_once is None or images <= self._at_once:
            return self._graph.unflatten(self._run_together(inputs, images, times))
        if self._plan.head_places:
            return self._graph.unflatten(self._run_in_turns(inputs, images, times))
        parts, seconds, cycles = [], [], []
        for first in range(0, images, self._at_once):
            some = tuple(value[first : first + self._at_once] for value in inputs)
            mine: list[float] | None = None if times is None else []
            parts.append(self._run_together(some, len(some[0]), mine))
            if mine is not None:
                seconds.append(mine)
                cycles.append(self._ticks())
        if times is not None:
            times += np.sum(seconds, axis=0).tolist()
            self._cycles = np.sum(cycles, axis=0)
        joined = [
            torch.cat(values)
            if isinstance(values[0], Tensor) and not self._is_constant(output)
            else values[0]
            for output, values in zip(self._graph.outputs, zip(*parts, strict=True), strict=True)
        ]
        return self._graph.unflatten(joined)

    def _run_together(
        self, inputs: tuple[Tensor, ...], images: int, times: list[float] | None = None
    ) -> list[Any]:
        """The outputs of at most as many images as the plan has room for."""
        plan = self._plan
        if (images, images) != self._batch or (images != plan.images and not plan.is_dynamic):
            inputs = self._adapt(inputs, images)
        values = self._run_segments(inputs, len(plan.native), times)
        return [self._output(o, values, images) for o in self._graph.outputs]

    def _run_in_turns(
        self, inputs: tuple[Tensor, ...], images: int, times: list[float] | None = None
    ) -> list[Any]:
        """The outputs of more images: turn by turn up to the head, then the head for all."""
        plan, steps, runner = self._plan, self._steps, self._runner
        assert steps is not None
        assert runner is not None
        seconds, cycles = [], []
        for turn, first in enumerate(range(0, images, plan.images)):
            some = tuple(value[first : first + plan.images] for value in inputs)
            self._set_batch(len(some[0]), images)
            self._batch = (0, 0)
            for move in steps.moves:
                move.to(turn)
            mine: list[float] | None = None if times is None else []
            self._run_segments(some, plan.head, mine)
            if mine is not None:
                seconds.append(mine)
                cycles.append(self._ticks())
        start = time.perf_counter()
        runner.run(plan.head, len(plan.native))
        if times is not None:
            times += np.sum(seconds, axis=0).tolist()
            times[-1] += time.perf_counter() - start
            self._cycles = np.sum(cycles, axis=0)
            self._cycles[plan.head :] = runner.cycles()[plan.head :]
        return [self._output(o, {}, images) for o in self._graph.outputs]

    def _run_segments(
        self, inputs: tuple[Tensor, ...], last: int, times: list[float] | None = None
    ) -> dict[str, Any]:
        """Run all segments, of native ones only the steps before `last`; the values that torch knows."""
        plan, runner = self._plan, self._runner
        values: dict[str, Any] = dict(zip(self._graph.inputs, inputs, strict=True))
        if times is not None and runner is not None:
            runner.forget_cycles()
        for segment in plan.segments:
            start = time.perf_counter() if times is not None else 0.0
            if isinstance(segment, NativeSegment):
                assert runner is not None
                runner.run(segment.first, min(segment.last, last))
            elif isinstance(segment, ImportSegment):
                place, value = plan.places[segment.place], self._value(segment.value, values)
                assert place.view is not None
                if not place.borrow(value):
                    view = place.view
                    (view if value.shape == view.shape else view[: value.shape[0]]).copy_(value)
            else:
                o = segment.operation
                args, kwargs = (
                    with_values(part, lambda ref: self._value(ref.name, values))
                    for part in (o.args, o.kwargs)
                )
                values[o.output] = o.target(*args, **kwargs)
            if times is not None:
                times.append(time.perf_counter() - start)
        if times is not None and runner is not None:
            self._cycles = runner.cycles()
        return values

    def _adapt(self, inputs: tuple[Tensor, ...], images: int) -> tuple[Tensor, ...]:
        """A batch of another size: fewer jobs when every step is native, else zeros up to the size that torch's part was traced for."""
        if self._plan.is_dynamic:
            self._set_batch(images, images)
            return inputs
        if self._separable is None:
            self._separable = self._is_separable()
        if not self._separable:
            raise EngineError(
                f"A batch of {images} was passed to a network that was compiled for {self.batch_size} and in which one sample's "
                "output depends on the others'. Compile it again with an example input of that size."
            )
        return tuple(
            self._padded(name, value, images) for name, value in zip(self._graph.inputs, inputs, strict=True)
        )

    def _is_separable(self) -> bool:
        """Whether the first sample's outputs stay the same when all other samples change: then padding a batch is harmless."""
        if any(isinstance(o, Ref) and o.name not in self._graph.shapes for o in self._graph.outputs):
            return False  # a number, or a tensor whose size follows from values: those of all samples
        noise = torch.Generator().manual_seed(1)

        def with_other_samples(value: Any, turn: int) -> Any:
            if not self._has_batch(value):
                return value
            if value.is_floating_point():
                other = torch.randn(value.shape, generator=noise)
            elif not _is_uniform(value):
                other = value.flip(0)
            else:
                other = value.logical_not() if value.dtype is torch.bool else value + turn
            return torch.cat([value[:1], other[1:].to(value.dtype)])

        before = self._run(self._example, self.batch_size)
        after = None
        # Of numbers that are all the same the next may be too large, and then the one before too small.
        for turn in (1, -1):
            with contextlib.suppress(IndexError, RuntimeError):
                changed = tuple(with_other_samples(value, turn) for value in self._example)
                after = self._run(changed, self.batch_size)
                break
        if after is None:
            return False
        for one, other in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
            if not isinstance(one, Tensor):
                continue
            if not self._has_batch(one):
                return False
            if not torch.allclose(one[:1], other[:1], rtol=1e-5, atol=1e-6, equal_nan=True):
                return False
        return True

    def _padded(self, name: str, value: Tensor, images: int) -> Tensor:
        wanted = self._graph.shapes.get(name)
        if not wanted or value.shape[:1] != (images,) or wanted[0] != self.batch_size:
            return value
        full = torch.zeros(wanted, dtype=value.dtype)
        full[:images] = value
        return full

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if name in values:
            return values[name]
        home = self._home(name)
        # What torch computes, and what the caller gets, is float32 whatever planes hold.
        return self._graph.constants[name] if home is None else home.float()

    def _home(self, name: str) -> Tensor | None:
        """The value where native code keeps it."""
        place = self._plan.places.get(self._plan.root(name))
        if place is None or place.view is None:
            return None
        # A value that is (N, C) to one reader and (N, C, 1, 1) to another is one place.
        wanted = self._graph.shapes[name]
        return place.view if tuple(place.view.shape) == wanted else place.view.reshape(wanted)

    def _is_constant(self, output: Any) -> bool:
        """Whether an output is a parameter, or follows from parameters, so that no batch changes it."""
        return isinstance(output, Ref) and output.name in self._graph.constants

    def _output(self, output: Any, values: Mapping[str, Any], images: int) -> Any:
        if not isinstance(output, Ref):
            return output
        value = self._value(output.name, values)
        if not isinstance(value, Tensor):
            return value
        room = self._plan.batch if output.name in self._in_head else self._plan.images
        if images != room and not self._is_constant(output) and value.dim() > 0 and value.shape[0] == room:
            value = value[:images]
        return value.clone(memory_format=torch.contiguous_format)

    # ---- kernels

    def _install(self, steps: Steps) -> None:
        from explorer.inference.threads import Runner

        if self._runner is None or steps.scratch_bytes > self._runner.scratch_bytes:
            self._runner = Runner(self._isa, self.threads, len(self._plan.native), steps.scratch_bytes)
        self._runner.use(steps)
        # Steps that ran before may be set for a smaller batch.
        self._steps, self._batch = steps, (0, 0)
        self._set_batch(self._plan.images, self._plan.images)
        self._straight = self._straight_path(self._runner)

    def _straight_path(self, runner: Runner) -> StraightPath | None:
        segments, outputs = self._plan.segments, self._graph.outputs
        if self._least > 1 or self._captured.arguments is not None:
            return None
        leaf = object()
        match segments:
            case [ImportSegment(value, place), NativeSegment(0, last)]:
                inputs_fit = self._graph.inputs == [value] and self._graph.dtypes[value] == torch.float32
            case _:
                return None
        if not inputs_fit or len(outputs) != 1 or not isinstance(outputs[0], Ref):
            return None
        if self._graph.unflatten([leaf]) is not leaf:
            return None
        view, result = self._plan.places[place].view, self._home(outputs[0].name)
        if view is None or result is None or view.shape != self._graph.shapes[value]:
            return None
        moves = self._steps.moves if self._steps and self._plan.head_places else []
        head = self._plan.head if self._plan.batch > self._plan.images and moves else last
        return StraightPath.of(view, self._plan.places[place], runner, last, head, moves, result)

    def _choose(self) -> None:
        """Take the kernel of each layer that was fastest before, or time the candidates inside the network."""
        if not self._plan.native:
            return
        from explorer.inference.steps import build_steps

        layers = self._plan.layers(self._graph)
        self._densities = densities = {i: self._density(i) for i in layers}
        larger = self._larger_kernels()
        about = {
            i: {
                "paired": in_pairs(self._weight(i)),
                "code": i in larger.code,
                "winograd": i in larger.winograd,
            }
            for i in layers
        }
        candidates = {
            i: self._plan.candidates(self._graph, i, self._mode, densities[i], **about[i]) for i in layers
        }
        cache = choice_cache()
        questions = {
            i: self._plan.question(self._graph, i, densities[i], **about[i])
            for i, several in candidates.items()
            if len(several) > 1 and self._mode == "auto"
        }
        for i, question in questions.items():
            answer = cache.get(question)
            candidates[i] = [c for c in candidates[i] if c.label == answer] or candidates[i]
        packed: dict[tuple[str, Choice], Any] = {}
        self._choices = {i: c[0] for i, c in candidates.items()}
        if any(len(several) > 1 for several in candidates.values()):
            self._time_candidates(candidates, packed)
            cache.put({question: self._choices[i].label for i, question in questions.items()})
        # Where whole layers are known to be faster nothing is cut into bands, which takes time too.
        question = f"order {self._mode} {self._plan.network(self._graph, self._densities)}"
        by_bands = cache.get(question) != _LAYERS
        steps = build_steps(self._plan, self._graph, self._choices, packed, by_bands=by_bands)
        steps.use_bands = by_bands
        self._install(steps)
        self._order_bands(question)

    def _larger_kernels(self) -> Larger:
        """The layers whose kernels may need more memory than others."""
        layers = {}
        for i, share in self._densities.items():
            # Dense kernels do not ask which weights are zero.
            density = 1.0 if self._mode == "dense" else share
            size, can = self._weight(i).size, self._plan.may_be_code(self._graph, i)
            vectors = self._plan.vectors_of(self._graph.operations[i])
            winograd = self._plan.may_be_winograd(self._graph, i, density)
            layers[i] = Weighed(size, round(density * size), vectors, can, winograd)
        return larger_kernels(layers, self._plan.memory.n_bytes)

    def _order_bands(self, question: str) -> None:
        """Let what can run band by band do so where that is faster: it depends on caches, and on who else uses them, more than anything that is known here.

        The answer is remembered under `question`.
        """
        steps = self._steps
        if steps is None or not steps.chains:
            return
        answer = choice_cache().get(question)
        if answer not in (_BANDS, _LAYERS):
            answer = self._faster_order(steps)
            choice_cache().put({question: answer})
        self._use_bands(steps, answer == _BANDS)

    def _use_bands(self, steps: Steps, yes: bool) -> None:
        steps.use_bands, self._batch = yes, (0, 0)
        self._set_batch(self._plan.images, self._plan.images)

    def _faster_order(self, steps: Steps) -> str:
        best = {_BANDS: float("inf"), _LAYERS: float("inf")}
        example, images = self._example_of_a_turn()
        start, turn = time.perf_counter(), 0
        with torch_threads(self.threads), torch.no_grad():
            while turn < _ORDER_TURNS or (turn < 10 and time.perf_counter() - start < _CHOICE_S):
                for name, before in best.items():
                    self._use_bands(steps, name == _BANDS)
                    begin = time.perf_counter()
                    self._run_together(example, images)
                    best[name] = min(before, time.perf_counter() - begin)
                turn += 1
        return min(best, key=best.__getitem__)

    def _density(self, index: int) -> float:
        return density_of(self._weight(index))

    def _weight(self, index: int) -> NDArray[np.float32]:
        weight: NDArray[np.float32] = (
            self._graph.constants[self._graph.operations[index].weight or ""].detach().numpy()
        )
        return weight

    def _time_candidates(
        self, candidates: Mapping[int, list[Choice]], packed: dict[tuple[str, Choice], Any]
    ) -> None:
        from explorer.inference.steps import build_steps

        rounds = max(len(several) for several in candidates.values())
        # A layer with fewer candidates keeps its first while the others try on.
        tried = [
            {i: c[turn] if turn < len(c) else c[0] for i, c in candidates.items()} for turn in range(rounds)
        ]
        steps = [build_steps(self._plan, self._graph, choices, packed, by_bands=False) for choices in tried]
        best: dict[int, float] = {}
        # The rounds take turns, so that a moment in which the machine is slow falls on all of them.
        start = time.perf_counter()
        for done in range(_CHOICE_PASSES):
            if done > 1 and time.perf_counter() - start > _CHOICE_PASSES_S:
                break  # a large network: its times vary less
            for choices, these in zip(tried, steps, strict=True):
                self._install(these)
                ms = self._step_times()
                for step, index in enumerate(self._plan.native):
                    if index in choices and ms[step] < best.get(index, float("inf")):
                        best[index], self._choices[index] = float(ms[step]), choices[index]

    def _example_of_a_turn(self) -> tuple[tuple[Any, ...], int]:
        """As much of the example input as goes through together, and how many images that is."""
        images = self._plan.images
        if self._at_once is None:
            return self._example, images
        return tuple(value[:images] for value in self._example), images

    def _step_times(self) -> NDArray[np.float64]:
        """The fastest of a few runs of each step, in milliseconds (noise only ever adds)."""
        runs = []
        example, images = self._example_of_a_turn()
        with torch_threads(self.threads), torch.no_grad():
            start = time.perf_counter()
            for turn in range(_CHOICE_REPEATS + 1):
                self._run_together(example, images, [])
                if turn > 0:
                    runs.append(self._ticks())
                if turn > 0 and time.perf_counter() - start > _CHOICE_S:
                    break
        from explorer.inference.threads import cycles_per_ms

        fastest: NDArray[np.int64] = np.min(runs, axis=0)
        return fastest / cycles_per_ms(self._isa)

    def _ticks(self) -> NDArray[np.int64]:
        """Cycles of each step in the last run that was timed."""
        return self._cycles

    def update_weights(self, module: nn.Module, *, choose: bool = True) -> None:
        """Take over the weights of `module`, which must have the structure that was compiled.

        Parameters
        ----------
        module : nn.Module
        choose : bool
            Measure again which kernels are fastest (False keeps the present ones).

        Raises
        ------
        EngineError
            When a parameter is missing, or has another shape or dtype, or `module` is none.
        """
        if not isinstance(module, nn.Module):
            raise EngineError(
                f"A {type(module).__name__} was passed; the weights are taken from an nn.Module. Load a state_dict into one first: "
                "module.load_state_dict(...)."
            )
        with CAPTURING:
            fresh = self._weights_of(module)
            # Before the weights are read: what changes them meanwhile is noticed.
            source = Source(module)
        with self._lock:
            self._compare_few()
            before = dict(self._captured.constants), self._graph, self._choices, self._densities, self._steps
            try:
                self._adopt(fresh, choose=choose)
            except BaseException:
                # Also after Ctrl-C: all old weights or all new ones, never some of each.
                self._captured.constants, self._graph, self._choices, self._densities, steps = before
                if steps is not None:
                    self._install(steps)
                raise
            self._source = source

    def _weights_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of `module` that take the place of constants."""
        state = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        fresh = {}
        for constant, name in self._captured.parameter_names.items():
            shape, new = self._captured.shapes.get(constant), state.get(name)
            if shape is None:
                continue
            new = tensor_attribute(module, name) if new is None else new
            if new is None or tuple(new.shape) != shape:
                found = "is missing" if new is None else f"has shape {tuple(new.shape)}"
                raise EngineError(
                    f"{name} {found}; the compiled network has {shape}. Compile the new module instead."
                )
            if new.dtype != self._captured.dtypes[constant] or not new.is_cpu:
                raise EngineError(
                    f"{name} is {new.dtype} on {new.device}; the compiled network has {self._captured.dtypes[constant]} on the CPU. "
                    "Pass a copy: copy.deepcopy(module).float().cpu()."
                )
            fresh[constant] = new.detach()
        return fresh

    def _adopt(self, constants: Mapping[str, Tensor], *, choose: bool) -> None:
        """Run with these weights from now on."""
        for operation in self._captured.derived:
            self._captured.constants.pop(operation.output, None)
        self._captured.constants.update(constants)
        self._graph = self._lowered()
        self._plan.adopt(self._graph)
        if choose or not self._plan.native:
            self._choose()
        else:
            from explorer.inference.steps import build_steps

            self._densities = {i: self._density(i) for i in self._choices}
            by_bands = self._steps is None or self._steps.use_bands
            self._install(build_steps(self._plan, self._graph, self._choices, by_bands=by_bands))
            assert self._steps is not None
            self._use_bands(self._steps, by_bands)
        self._let_go()

    def remember(self, module: nn.Module) -> None:
        """Know `module`, whose weights these are, for `compare`. It is not kept alive."""
        self._source = Source(module)

    # ---- measuring

    def compare(self, *inputs: Tensor, module: nn.Module | None = None) -> Deviation:
        """How far this network's outputs are from its module's own, computed by torch in float32.

        Parameters
        ----------
        inputs : Tensor
            As for a call; real images tell more than noise.
        module : nn.Module, optional
            One with the same weights; when not given, the module that was compiled (or last passed to `update_weights`), which must still exist
            unchanged.

        Returns
        -------
        Deviation

        Raises
        ------
        EngineError
            When there is no module to compare with, or no floating-point output.

        Examples
        --------
        >>> import torch, explorer
        >>> net, x = torch.nn.Conv2d(3, 8, 3).eval(), torch.ones(1, 3, 8, 8)
        >>> explorer.compile(net, x).compare(x).relative_l2 < 1e-5
        True
        """
        if module is None:
            if self._source is None:
                raise EngineError(
                    "No module is known to compare with. Pass one with the same weights: sparse.compare(x, module=net)."
                )
            module = self._source.module()
        return deviation(self(*inputs), run_aside(module, inputs), self.precision)

    def benchmark(self, *inputs: Tensor, repeats: int = 50, warn: bool = True) -> Benchmark:
        """Latency of whole calls: the median of `repeats`, with spread.

        Warns
        -----
        EngineWarning
            When the spread is more than a tenth of the median: something else was running. `warn` switches it off, for callers that measure many times.

        Raises
        ------
        EngineError
            When the inputs do not fit, or `repeats` is less than one.
        """
        check_repeats(repeats)
        images, times = self._check(self._tensors(inputs)), []
        with torch_threads(self.threads), torch.inference_mode():
            for i in range(repeats + 5):
                start = time.perf_counter()
                self(*inputs)
                if i >= 5:
                    times.append((time.perf_counter() - start) * 1e3)
        result = summarise(
            times,
            threads=self.threads,
            batch_size=images,
            isa=self.isa,
            precision=self.precision,
        )
        if warn and result.is_noisy:
            warnings.warn(
                f"This machine is noisy: calls took {result.latency_ms:.3g} ± {result.spread_ms:.2g} ms. Close what else is running and measure again.",
                EngineWarning,
                stacklevel=2,
            )
        return result

    def profile(self, *inputs: Tensor, repeats: int = 30) -> tuple[LayerTiming, ...]:
        """What each step costs inside the network: medians over `repeats` runs, in execution order.

        Steps of native segments are timed by the CPU's own counter, without leaving native code; torch operators and copies by the
        system's clock. The last row, "call", is what remains of the whole.

        Returns
        -------
        tuple of LayerTiming
            Their milliseconds add up to the time of a call; `explorer.plots.roofline` draws them.

        Raises
        ------
        EngineError
            When the inputs do not fit, or `repeats` is less than one.
        """
        check_repeats(repeats)
        inputs = self._tensors(inputs)
        images = self._check(inputs)
        ticks, segments, wholes = [], [], []
        with self._lock, torch_threads(self.threads), torch.inference_mode():
            for i in range(repeats + 3):
                times: list[float] = []
                start = time.perf_counter()
                self._run(inputs, images, times)
                whole = time.perf_counter() - start
                if i >= 3:
                    ticks.append(self._ticks())
                    segments.append(times)
                    wholes.append(whole)
        step_ms, peak_gflops = np.zeros(0), 0.0
        if self._plan.native:
            from explorer.inference.peak import peak_of
            from explorer.inference.threads import cycles_per_ms

            peak_gflops = peak_of(self._isa).gflops * self.threads
            step_ms = np.median(ticks, axis=0) / cycles_per_ms(self._isa)
        segment_ms = np.median(segments, axis=0) * 1e3
        rows = []
        for segment, ms in zip(self._plan.segments, segment_ms, strict=True):
            if isinstance(segment, TorchSegment):
                o = segment.operation
                rows.append(
                    LayerTiming(o.name or "model", _operator(o.target), float(ms), "torch", 0.0, 0, False)
                )
            elif isinstance(segment, ImportSegment):
                rows.append(LayerTiming(segment.value, "copy", float(ms), "copy", 0.0, 0, False))
            else:
                rows += [
                    self._row(step, float(step_ms[step]), images, peak_gflops)
                    for step in range(segment.first, segment.last)
                ]
        # Python between the segments, waking helpers, and copying the output: so that the parts make up the whole.
        rest = float(np.median(wholes)) * 1e3 - sum(row.ms for row in rows)
        rows.append(LayerTiming("call", "call", max(rest, 0.0), "python", 0.0, 0, False))
        return tuple(rows)

    def _row(self, step: int, ms: float, images: int, peak_gflops: float) -> LayerTiming:
        assert self._steps is not None
        index = self._plan.native[step]
        o, shapes = self._graph.operations[index], self._graph.shapes
        sparsity, macs = 0.0, 0
        prunable = o.kind in ("conv", "linear")
        if prunable:
            sparsity = 1 - self._densities[index]
            room = self._plan.batch if o.output in self._in_head else self._plan.images
            macs = prod(shapes[o.output]) * images // room * prod(shapes[o.weight or ""][1:])
        places = {*self._plan.operands(o), o.output}
        touched = (
            sum(self._plan.places[place].layout.n_bytes for place in places) * images // self._plan.images
        )
        return LayerTiming(
            o.name or "model",
            o.kind,
            ms,
            self._steps.labels[step],
            sparsity,
            macs,
            prunable,
            self._steps.table_bytes[step] + touched,
            float(peak_gflops),
            self.precision,
        )


def _is_uniform(value: Tensor) -> bool:
    """Whether all numbers of a tensor are the same one."""
    return value.numel() > 0 and bool((value == value.flatten()[:1]).all())


def _operator(target: Any) -> str:
    return str(target).removeprefix("aten.")
