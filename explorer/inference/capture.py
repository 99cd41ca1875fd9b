"""A module in, our graph out: torch.export traces the forward pass, and each operator is read into an `Operation` (see operators.py).

In-place operators are made functional: after ``relu_(x)``, whoever reads x reads the result. What follows from constants alone becomes a constant, and graphs
within the graph are read as if they stood in their place.
"""

from __future__ import annotations

import operator
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from explorer.errors import EngineError
from explorer.inference.fork import EngineLock
from explorer.inference.graph import TENSOR, Arguments, Graph, Operation, Ref, base_name, is_pure
from explorer.inference.in_place import (
    has_in_place,
    is_in_place,
    without_idle_dropout,
    writes_through_views,
)
from explorer.inference.interrupts import uninterrupted
from explorer.inference.operators import name_items, read_operator


def capture(module: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Graph:
    """Trace `module` on `example_input`.

    Parameters
    ----------
    module : nn.Module
        Captured in eval mode; its own mode is given back.
    example_input : Tensor or tuple
        The forward arguments. Their shapes are the largest the compiled network takes.

    Raises
    ------
    EngineError
        When torch.export cannot capture the module; the message carries torch's reason and the line.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with (
            CAPTURING.inside(),
            uninterrupted(),
            evaluating(module),
            _without_stack_traces(),
            torch.no_grad(),
        ):
            exported = torch.export.export(module, _each_apart(module, args), strict=False)
            if has_in_place(exported.graph):
                without_idle_dropout(exported.graph)
            is_rewritten = writes_through_views(exported.graph)
            if is_rewritten:
                exported = exported.run_decompositions({})
    except Exception as error:  # torch.export raises many kinds; all of them mean the same to the user
        raise EngineError(_explained(module, args, error)) from error
    _check_state(module, exported)
    if is_rewritten:
        _check_answers(module, exported, args)
    return _read(exported, module)


def _each_apart(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with a copy of each tensor that is another one's too, or the module's: torch.export takes equal objects for one input."""
    seen = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def apart(value: Tensor) -> Tensor:
        if id(value) in seen:
            return value.clone()
        seen.add(id(value))
        return value

    return pytree.tree_map_only(Tensor, apart, args)


CAPTURING = EngineLock()
"""Held by who captures a module, or reads one: torch.export keeps where it is in variables of the whole process, and meanwhile puts tensors without
values in the place of a module's parameters."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All of a module's parts in eval mode, and back as they were."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """torch.export does not note which lines led to each node, which nobody reads here: it takes a sixth of the time of capturing ResNet-50."""
    config: Any = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", None)  # older versions of torch do not know it
    try:
        if before is not None:
            config.do_not_emit_stack_traces = True
        yield
    finally:
        if before is not None:
            config.do_not_emit_stack_traces = before


def run_aside(module: nn.Module, args: Sequence[Any]) -> Any:
    """What a module answers in eval mode; arguments, buffers and torch's random numbers stay as they are."""
    copies = pytree.tree_map_only(Tensor, Tensor.clone, tuple(args))
    with CAPTURING.inside(), torch.no_grad():
        kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
        try:
            with evaluating(module), torch.random.fork_rng(devices=[]):
                return module(*copies)
        finally:
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _explained(module: nn.Module, args: Sequence[Any], error: Exception) -> str:
    """Why a module could not be captured, where, and what to do."""
    name = type(module).__name__
    try:
        run_aside(module, args)
    except Exception as own:  # noqa: BLE001 - whatever the user's code raises
        return f"{name} cannot be run on this example input: {_first_line(own)}{_users_line(own)}"
    return (
        f"torch.export could not capture {name}: {_first_line(error)}{_users_line(error)}\n"
        "Control flow that depends on values, and calls into other libraries, cannot be captured. Replace that line, "
        "or compile the largest submodule that does not contain it."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def _users_line(error: BaseException) -> str:
    """The innermost line on the way to an error that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = max((i for i, frame in enumerate(frames) if frame.filename == __file__), default=-1)
    theirs = [frame for frame in frames[ours + 1 :] if not frame.filename.startswith(_TORCH)]
    if theirs:
        return f' File "{theirs[-1].filename}", line {theirs[-1].lineno}, in {theirs[-1].name}'
    told = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
    told = [line for line in told if _TORCH not in line]
    return f" {told[-1]}" if told else ""


def _check_state(module: nn.Module, exported: Any) -> None:
    """Refuse a network whose answers depend on what an earlier call has left in a buffer."""
    signature = exported.graph_signature
    changed = {spec.target for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    if not changed:
        return
    homes = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target in changed}
    *_, output = exported.graph.nodes
    kinds = [spec.kind for spec in signature.output_specs]
    waiting = [
        node
        for node, kind in zip(output.args[0], kinds, strict=True)
        if kind is OutputKind.USER_OUTPUT and isinstance(node, torch.fx.Node)
    ]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name in homes:
            raise EngineError(
                f"The forward of {type(module).__name__} changes its buffer {homes[node.name]!r} and reads it in the next call; a compiled network "
                "keeps nothing from call to call. Pass it as an argument and return the new value, or compile the largest submodule without it."
            )
        waiting += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)


def _check_answers(module: nn.Module, exported: Any, args: Sequence[Any]) -> None:
    """Refuse a network that answers otherwise once torch has made its in-place operators functional: of some views torch does not know whose memory they are."""
    signature = exported.graph_signature
    tensors = {**exported.state_dict, **exported.constants}
    given = iter(pytree.tree_leaves(pytree.tree_map_only(Tensor, Tensor.clone, tuple(args))))
    inputs = [
        next(given) if spec.kind is InputKind.USER_INPUT else tensors[spec.target]
        for spec in signature.input_specs
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        wanted = run_aside(module, args)
        torch.manual_seed(0)
        found = torch.fx.Interpreter(exported.graph_module).run(*inputs)
    returned = [
        value
        for value, spec in zip(found, signature.output_specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    if not are_close(returned, pytree.tree_leaves(wanted), 1e-3):
        raise EngineError(
            f"{type(module).__name__} writes to a tensor in place of which it reads a view, in a way that torch.export does not follow. Write "
            "x = torch.relu(x) in place of torch.relu_(x), and the like, near unfold, as_strided and other views."
        )


def are_close(found: Any, wanted: Any, tolerance: float) -> bool:
    """Whether two results have the same structure, and no number differs by more than `tolerance` times the largest of its tensor."""
    mine, theirs = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    if len(mine) != len(theirs):
        return False
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or (a is not b and a != b):
                return False
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        largest = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=tolerance * largest + 1e-6, equal_nan=True):
            return False
    return True


def tensor_attribute(module: nn.Module, path: str) -> Tensor | None:
    """The tensor at a dotted path, a plain attribute of a module, if there is one."""
    *parts, last = path.split(".")
    owner: Any = module
    for part in parts:
        owner = getattr(owner, part, None)
    found = getattr(owner, last, None)
    return found if isinstance(found, Tensor) else None


def _read(exported: Any, module: nn.Module) -> Graph:
    signature = exported.graph_signature
    tensors = {**exported.state_dict, **exported.constants}
    graph = Graph([], [], [], {}, {}, {}, {}, lambda values: values)
    reader = _Reader(graph)
    specs = iter(signature.input_specs)
    names: list[str] = []
    fixed: list[Any] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = next(specs)
            if spec.kind in _CONSTANTS:
                reader.remember(node)
                graph.constants[node.name] = tensors[spec.target].detach()
                if (
                    spec.kind is not InputKind.CONSTANT_TENSOR
                    or tensor_attribute(module, spec.target) is not None
                ):
                    graph.parameter_names[node.name] = spec.target
                continue
            if spec.kind is not InputKind.USER_INPUT or not isinstance(
                spec.arg, TensorArgument | ConstantArgument
            ):
                raise EngineError(
                    f"The input {node.name!r} of the captured network is of a kind that the engine does not know."
                )
            names.append(node.name)
            if isinstance(spec.arg, ConstantArgument):
                reader.stand_for(node, spec.arg.value)
                fixed.append(spec.arg.value)
            else:
                reader.remember(node)
                graph.inputs.append(node.name)
                fixed.append(TENSOR)
        elif node.op == "output":
            kinds = [spec.kind for spec in signature.output_specs]
            wanted = [n for n, k in zip(node.args[0], kinds, strict=True) if k is OutputKind.USER_OUTPUT]
            graph.outputs = [reader.reference(n) for n in wanted]
        else:
            reader.read(node)
    name_items(graph)
    given, returned = exported.call_spec.in_spec, exported.call_spec.out_spec
    arguments = Arguments(given.child(0), tuple(names), tuple(fixed))
    if len(graph.inputs) != arguments.spec.num_children or any(
        not s.is_leaf() for s in arguments.spec.children()
    ):
        graph.arguments = arguments
    if returned is not None:
        graph.unflatten = lambda values: pytree.tree_unflatten(values, returned)
    return graph


_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)

_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Operators that run a graph under another setting, and how many arguments stand before the graph."""


class _Reader:
    """Writes the nodes of a captured graph, and of the graphs inside it, into `graph`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # What stands for a node: a value's name, a graph, or the values of a tuple.
        self._meaning: dict[torch.fx.Node, Any] = {}
        self._renamed: dict[str, str] = {}

    def reference(self, item: Any) -> Any:
        """An argument with names in the place of nodes."""
        if isinstance(item, torch.fx.Node):
            meaning = self._meaning[item]
            return Ref(self._renamed.get(meaning.name, meaning.name)) if isinstance(meaning, Ref) else meaning
        if isinstance(item, list | tuple):
            parts = [self.reference(part) for part in item]
            return type(item)(parts) if type(item) in (list, tuple) else parts
        if isinstance(item, dict):
            return {k: self.reference(v) for k, v in item.items()}
        return item

    def stand_for(self, node: torch.fx.Node, value: Any) -> None:
        """Let `value`, which is no tensor, stand in the place of a node."""
        self._meaning[node] = value

    def remember(self, node: torch.fx.Node, inside: str = "") -> None:
        """Give a node's value its name, shape and dtype."""
        name, value = inside + node.name, node.meta.get("val")
        self._meaning[node] = Ref(name)
        if isinstance(value, Tensor):
            sizes = [s if isinstance(s, int) else s.node.maybe_as_int() for s in value.shape]
            if None not in sizes:  # a size that follows from values, as of what `nonzero` finds, is left open
                self.graph.shapes[name] = tuple(sizes)
            self.graph.dtypes[name] = value.dtype

    def read(self, node: torch.fx.Node, inside: str = "") -> None:
        """Read a node that is neither an input nor an output; `inside` is what the names in an inner graph begin with."""
        if node.op == "get_attr":
            self._meaning[node] = getattr(node.graph.owning_module, str(node.target))
            return
        args, kwargs = self.reference(node.args), self.reference(node.kwargs)
        if node.target is operator.getitem and isinstance(args[0], tuple | list):
            self._meaning[node] = args[0][args[1]]
            return
        wrapper = str(node.target)
        # Autocast that is switched on computes in another precision: it is left to torch.
        if wrapper in _WRAPPERS and not (wrapper == "wrap_with_autocast" and args[2]):
            before = _WRAPPERS[wrapper]
            self._meaning[node] = self._inline(args[before], args[before + 1 :], f"{inside}{node.name}.")
            return
        if base_name(node.target) == "_assert_tensor_metadata":
            return  # of types that cannot be others than those of the example
        self.remember(node, inside)
        operation = read_operator(node, inside + node.name, args, kwargs, self.graph)
        if _is_derived(node, operation, self.graph):
            self.graph.derived.append(operation)
            self.graph.derive([operation])
            return
        self.graph.operations.append(operation)
        if is_in_place(node.target):
            self._renamed[args[0].name] = operation.output

    def _inline(self, inner: torch.fx.GraphModule, arguments: Sequence[Any], inside: str) -> Any:
        """Read an inner graph as if it stood here; the result is what it returns."""
        given = iter(arguments)
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                self._meaning[node] = next(given)
            elif node.op == "output":
                return self.reference(node.args[0])
            else:
                self.read(node, inside)
        raise AssertionError("a graph without an output")


_BY_LITERAL_SIZES = {"expand", "expand_as", "repeat", "tile", "broadcast_to"}


def _is_derived(node: torch.fx.Node, operation: Operation, graph: Graph) -> bool:
    """Whether a value follows from constants alone, as a standardised weight or a bias of relative positions does.

    What may hold as many rows as there are images is no constant: a smaller batch has fewer.
    """
    names = operation.references()
    return (
        bool(names)
        and all(name in graph.constants for name in names)
        and is_pure(operation)
        and not is_in_place(node.target)
        and base_name(node.target) not in _BY_LITERAL_SIZES
        and isinstance(node.meta.get("val"), Tensor)
    )
