"""A module in, our graph out: torch.export traces the forward pass, and each operator is read into an `Operation` (see operators.py).

In-place operators are made functional: after ``relu_(x)``, whoever reads x reads the result. What follows from constants alone becomes a constant, and graphs
within the graph are read as if they stood in their place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from explorer.errors import EngineError
from explorer.inference.graph import Graph, Operation, Ref, base_name
from explorer.inference.in_place import is_in_place, writes_through_views
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
        with evaluating(module), torch.no_grad():
            exported = torch.export.export(module, args, strict=False)
            if writes_through_views(exported.graph):
                exported = exported.run_decompositions({})
    except Exception as error:  # torch.export raises many kinds; all of them mean the same to the user
        raise EngineError(
            f"torch.export could not capture {type(module).__name__}: {_reason(error)}\n"
            "Control flow that depends on values, and calls into other libraries, cannot be captured. Replace that line, "
            "or compile the largest submodule that does not contain it."
        ) from error
    return _read(exported)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All of a module's parts in eval mode, and back as they were."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    return " ".join(([lines[0]] if lines else [type(error).__name__]) + where[-1:])


def _read(exported: Any) -> Graph:
    signature = exported.graph_signature
    state: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = dict(signature.inputs_to_lifted_tensor_constants)
    tensors = {**exported.state_dict, **exported.constants}
    graph = Graph([], [], [], {}, {}, {}, state, lambda values: values)
    reader = _Reader(graph)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            reader.remember(node)
            if node.name in state or node.name in lifted:
                graph.constants[node.name] = tensors[state.get(node.name) or lifted[node.name]].detach()
            elif node.name in signature.user_inputs:
                graph.inputs.append(node.name)
            else:
                raise EngineError(
                    f"The input {node.name!r} of the captured network is of a kind that the engine does not know."
                )
        elif node.op == "output":
            flat = node.args[0]
            wanted = [n for n in flat if not isinstance(n, torch.fx.Node) or n.name in signature.user_outputs]
            graph.outputs = [reader.reference(n) for n in wanted]
        else:
            reader.read(node)
    name_items(graph)
    spec = exported.call_spec.out_spec
    if spec is not None:
        graph.unflatten = lambda values: pytree.tree_unflatten(values, spec)
    return graph


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

    def remember(self, node: torch.fx.Node, inside: str = "") -> None:
        """Give a node's value its name, shape and dtype."""
        name, value = inside + node.name, node.meta.get("val")
        self._meaning[node] = Ref(name)
        if isinstance(value, Tensor):
            self.graph.shapes[name] = tuple(int(s) for s in value.shape)
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
        and isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001 - its only name
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and not is_in_place(node.target)
        and base_name(node.target) not in _BY_LITERAL_SIZES
        and isinstance(node.meta.get("val"), Tensor)
    )
