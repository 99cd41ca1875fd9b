"""The compiled network: call it like the module it came from.

What is here is what the user holds: which inputs are let in, new weights, and measuring. How inputs go through the network is execution.py, which kernels it
has is decided in choosing.py.
"""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explorer.errors import EngineError, EngineWarning
from explorer.inference import choosing, explanation, fork
from explorer.inference.capture import CAPTURING, run_aside, tensor_attribute
from explorer.inference.deviation import Deviation, Source, deviation
from explorer.inference.execution import Execution
from explorer.inference.explanation import KernelChoice
from explorer.inference.few_samples import FewSamples
from explorer.inference.graph import Graph
from explorer.inference.keywords import Keywords
from explorer.inference.native import Isa, current_isa
from explorer.inference.plan import TorchSegment
from explorer.inference.profiling import layer_timings, operator_name
from explorer.inference.straight import has_memory
from explorer.inference.timing import (
    Benchmark,
    CompileTimes,
    LayerTiming,
    check_repeats,
    summarise,
    torch_threads,
)

Mode = Literal["auto", "dense", "sparse"]


class SparseModule:
    """A compiled network. Made by `compile`.

    Threads may share it (calls take turns), a forked child may go on using it, and Ctrl-C leaves it usable. It cannot be pickled or copied: its code
    and buffers belong to one process. In a forked child, what torch does for it is done by one thread: torch by itself waits for ever in a child for threads that it had
    in the parent, and `compile` lets it have some, unless ``torch.set_num_threads(1)`` came before.

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
    keywords : Keywords or None
        What its arguments are called; None before `compile` has ended.
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
        network = Execution(graph, isa or current_isa(), threads, mode, at_once)
        self._network = network
        self.threads, self.batch_size, self.division = threads, network.batch_size, network.division
        self.isa, self.precision = network.isa.name, network.isa.precision
        self.compile_times = CompileTimes(0.0, 0.0)
        self.keywords: Keywords | None = None
        self._lock = fork.EngineLock()
        self._source: Source | None = None
        # Of a batch that goes through in turns, as each of its tensors then does, no more than is looked at again: for few samples, and when kernels are chosen.
        kept = network.batch_size if network.at_once is None else max(network.plan.groups, 2)
        if kept < network.batch_size:
            example = tuple(value[:kept] for value in example)
        self._example = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in example)
        self._few = FewSamples(self._example, kept, network)
        choosing.choose(network, self._example)
        network.let_go()

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
            f"{s.operation.name or 'model'}: {operator_name(s.operation.target)}"
            for s in self._network.plan.segments
            if isinstance(s, TorchSegment)
        )

    @property
    def choices(self) -> dict[str, str]:
        """The kernel of each convolution and linear layer: name -> kernel, as a profile has them (see `explorer.inference.LayerTiming`).

        Measured inside the network, and remembered on disk, see `explain`; where hardly any weight is zero, or most are, only dense or only sparse kernels are tried. Of a
        module that is called several times, the kernel of its last call.
        """
        network = self._network
        return {network.graph.operations[i].name or "model": c.label for i, c in network.choices.items()}

    def explain(self) -> tuple[KernelChoice, ...]:
        """Why each convolution and linear layer has its kernel: what the others took, in execution order.

        Examples
        --------
        >>> import torch, explorer
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).eval()
        >>> for layer in explorer.compile(net, torch.ones(1, 3, 8, 8)).explain():
        ...     print(layer.name, layer.sparsity)
        0 0.0
        """
        network, found = self._network, []
        for i, choice in network.choices.items():
            tried, times = network.tried[i]
            density = network.densities[i]
            why = explanation.reason(network.mode, choice.label, density, tried, times)
            name = network.graph.operations[i].name or "model"
            found.append(explanation.KernelChoice(name, choice.label, 1 - density, why, dict(times)))
        return tuple(found)

    @property
    def n_bytes(self) -> int:
        """Bytes of packed weights and activation buffers, of weights that torch's part reads, and of the example.

        What a compiled network occupies besides: its machine code, each thread's scratch, and what is lost where memory is taken in pages.
        """
        network = self._network
        tensors = [*network.captured.constants.values(), *network.graph.constants.values(), *self._example]
        kept = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor)}
        native = network.plan.memory.n_bytes + (network.steps.memory.n_bytes if network.steps else 0)
        return native + sum(kept.values())

    def __repr__(self) -> str:
        return (
            f"SparseModule({len(self._network.plan.native)} native steps, {len(self.fallbacks)} through torch, "
            f"batch <= {self.batch_size}, {self.threads} thread(s), {self.isa}, {self.precision})"
        )

    # ---- running

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the network.

        Parameters
        ----------
        inputs : Tensor, or whatever the example input had in their place
            As the module's forward takes them; batches may be smaller than the compiled one. They are never written to, also where the module would.
        named : the same
            By the names that forward gives them.

        Raises
        ------
        EngineError
            When a shape or dtype does not fit what was compiled.
        """
        if named:
            assert self.keywords is not None
            inputs = self.keywords.positional(inputs, named)
        if self._network.is_inherited and torch.get_num_threads() > 1:
            with torch_threads(1):
                return self(*inputs)
        straight = self._network.straight
        if straight is not None and len(inputs) == 1:
            x = inputs[0]
            if (
                x.__class__ is Tensor
                and (x.shape == straight.shape or straight.divides(x, self.batch_size))
                and self._few.takes[x.shape[0]]
                and x.dtype is torch.float32
                and x.is_cpu
                and x.layout is torch.strided
                and not x.requires_grad
                and not x.is_neg()
                and has_memory(x)
            ):
                with self._lock.inside():
                    # Another thread may have set new weights since this one looked.
                    if straight is self._network.straight:
                        return self._network.run_straight(straight, x)
        inputs = self._tensors(inputs)
        images = self._check(inputs)
        with self._lock.inside(), torch.no_grad():
            return self._network.run(inputs, images)

    def _tensors(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        known = self._network.captured.arguments
        return arguments if known is None else known.tensors(arguments)

    def _check(self, inputs: tuple[Tensor, ...]) -> int:
        graph, captured = self._network.graph, self._network.captured
        names = graph.inputs
        if len(inputs) != len(names):
            raise EngineError(f"{len(inputs)} inputs were passed; this network takes {len(names)}.")
        images = self.batch_size
        for position, (name, value) in enumerate(zip(names, inputs, strict=True)):
            wanted = captured.shapes[name]
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
            if value.dtype != graph.dtypes[name]:
                raise EngineError(
                    f"Input {position} is {value.dtype}; this network was compiled for {graph.dtypes[name]}."
                )
            if not value.is_cpu or value.layout is not torch.strided:
                raise EngineError(
                    f"Input {position} is a {value.layout} tensor on {value.device}; this network takes torch.strided tensors on cpu. "
                    "Convert it with .to_dense() or .cpu()."
                )
            if not has_memory(value):
                raise EngineError(
                    f"Input {position} has no values in memory: its storage was freed, or torch.export, torch.func or a mode of torch's put a stand-in in its "
                    "place. Compiled code reads memory: call the network outside of them, on a tensor with values."
                )
        if not self._few.takes[images]:
            with self._lock.inside():
                self._few.learn()
            self._few.check(images)
        return images

    # ---- weights

    def ask_for_few(self, module: nn.Module) -> None:
        """Have `module`, whose weights these are, answer for few samples, see `FewSamples`."""
        self._few.ask(module)

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
        with CAPTURING.inside():
            fresh = self._weights_of(module)
            # Before the weights are read: what changes them meanwhile is noticed.
            source = Source(module)
        with self._lock.inside(), torch_threads(1) if self._network.is_inherited else nullcontext():
            # What the module answered for few samples was with the old weights.
            self._few.learn()
            before = self._network.state()
            try:
                self._network.adopt(fresh)
                if choose:
                    choosing.choose(self._network, self._example)
                else:
                    choosing.keep(self._network)
                self._network.let_go()
            except BaseException:
                # Also after Ctrl-C: all old weights or all new ones, never some of each.
                self._network.restore(before)
                raise
            self._source = source

    def _weights_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of `module` that take the place of constants."""
        state = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        fresh, captured = {}, self._network.captured
        for constant, name in captured.parameter_names.items():
            shape, new = captured.shapes.get(constant), state.get(name)
            if shape is None:
                continue
            new = tensor_attribute(module, name) if new is None else new
            if new is None or tuple(new.shape) != shape:
                found = "is missing" if new is None else f"has shape {tuple(new.shape)}"
                raise EngineError(
                    f"{name} {found}; the compiled network has {shape}. Compile the new module instead."
                )
            if new.dtype != captured.dtypes[constant] or not new.is_cpu:
                raise EngineError(
                    f"{name} is {new.dtype} on {new.device}; the compiled network has {captured.dtypes[constant]} on the CPU. "
                    "Pass a copy: copy.deepcopy(module).float().cpu()."
                )
            fresh[constant] = new.detach()
        return fresh

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
            with CAPTURING.inside():
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
        with torch_threads(self._network.torch_threads), torch.inference_mode():
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
        system's clock. What was fused into a layer (batch norm, an addition, an activation) is part of its row. The last row, "call", is what remains of
        a call: Python, waking helpers, copying the answer, and copying the input where that is not a row of its own; on a busy machine also what other work
        cost whole calls, of which the median of a single step knows little.

        Returns
        -------
        tuple of LayerTiming
            Their milliseconds add up to the time of a call, as `benchmark` measures it; `explorer.plots.roofline` draws them. A layer that is called twice has two rows.

        Raises
        ------
        EngineError
            When the inputs do not fit, or `repeats` is less than one.
        """
        check_repeats(repeats)
        tensors = self._tensors(inputs)
        images = self._check(tensors)
        with self._lock.inside(), torch_threads(self._network.torch_threads), torch.inference_mode():
            return layer_timings(self._network, partial(self, *inputs), tensors, images, repeats)
