"""The network as the engine sees it: a list of operations on named values. Written by capture.py, rewritten by lower.py, run by plan.py."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from explorer.errors import EngineError


@dataclass(frozen=True, slots=True)
class Ref:
    """A value by name, wherever it stands among an operation's arguments."""

    name: str


@dataclass(slots=True)
class Operation:
    """One operation.

    Attributes
    ----------
    kind : str
        "conv", "linear", "add", "mul", "affine" (a scale and a shift per channel), "clamp", "activation", "max_pool", "average_pool",
        "adaptive_average", "plane_average", "upsample" (nearest), "concat" and "slice" (of channels), "flatten", "split" (into phases), "pad" (zeros around pixels), "batch_norm", "layer_norm", "attention", "to_tokens" and "to_planes" (pixels that become tokens, and tokens that become pixels), "token" (one of each sample), "same" (no
        change but perhaps between (N, C) and (N, C, 1, 1)), or "torch".
    output : str
        The name of its value.
    inputs : list of str
        Names of the values that native kernels read, in order.
    name : str
        Dotted name of the module that owns its weight, else of the module it was called in.
    attributes : dict
        Parameters of the kind: for "conv" stride, padding (rows above, columns to the left), `beyond` (below, to the right), dilation, groups; for clamps low and high; for activations the
        `explorer.inference.kernels.activation.Activation`; and so on. "affine" names its constants `scale` and `shift`, and the axis of the
        channels: 1, -1, or None when there is but one number.
    weight, bias, gain : str or None
        Names of constants. `gain`: (outputs,) float64, multiplies the outputs before the bias is added (a folded batch norm); it is applied
        when the weights are packed, so that a layer of zeros costs nothing.
    target, args, kwargs
        The torch operator and its arguments (`Ref` for values and constants): what is called when no native kernel fits.
    """

    kind: str
    output: str
    inputs: list[str]
    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: str | None = None
    bias: str | None = None
    gain: str | None = None

    @property
    def is_padded(self) -> bool:
        """Whether a convolution reads zeros around its image."""
        return any((*self.attributes.get("padding", ()), *self.attributes.get("beyond", ())))

    @property
    def read(self) -> list[str]:
        """Every value that it reads in the form in which it is run."""
        return self.references() if self.kind == "torch" else self.inputs

    def references(self) -> list[str]:
        """Every value and constant that the torch form of this operation reads."""
        found: list[str] = []

        def visit(item: Any) -> None:
            if isinstance(item, Ref):
                found.append(item.name)
            elif isinstance(item, list | tuple):
                for part in item:
                    visit(part)
            elif isinstance(item, dict):
                for part in item.values():
                    visit(part)

        visit(self.args)
        visit(self.kwargs)
        return found


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a network is called with: tensors, perhaps in lists and dicts, and other values that stay as they were when it was captured.

    Attributes
    ----------
    spec : TreeSpec
        The structure of the positional arguments, as torch's pytree has it.
    names : tuple of str
        The name of each leaf, for errors.
    fixed : tuple
        The value of each leaf that is no tensor; `TENSOR` in the place of one.
    """

    spec: Any
    names: tuple[str, ...]
    fixed: tuple[Any, ...]

    def tensors(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tensors among `arguments`, in order.

        Raises
        ------
        EngineError
            When the structure is another one, or a value that is no tensor.
        """
        leaves, spec = pytree.tree_flatten(arguments)
        if spec != self.spec:
            raise EngineError(
                f"The arguments have the structure {_drawn(arguments)}; this network was compiled for {_drawn(self.rebuilt(None))}. Pass them as "
                "in the example input."
            )
        for name, value, wanted in zip(self.names, leaves, self.fixed, strict=True):
            if wanted is not TENSOR and (type(value) is not type(wanted) or value != wanted):
                raise EngineError(
                    f"{name!r} is {_drawn(value)}; this network was compiled with {wanted!r}, which it cannot change. Compile it again with the "
                    "value you need."
                )
        return tuple(leaf for leaf, wanted in zip(leaves, self.fixed, strict=True) if wanted is TENSOR)

    def rebuilt(self, tensors: Iterable[Any] | None) -> tuple[Any, ...]:
        """The arguments with these tensors in their places, or with `TENSOR` there."""
        given = None if tensors is None else iter(tensors)
        leaves = [value if value is not TENSOR or given is None else next(given) for value in self.fixed]
        arguments: tuple[Any, ...] = pytree.tree_unflatten(leaves, self.spec)
        return arguments


class _Marker:
    def __repr__(self) -> str:
        return "a tensor"


TENSOR = _Marker()
"""In the place of a tensor."""


def _drawn(arguments: Any) -> str:
    """Arguments in words, without what is in the tensors."""
    return repr(
        pytree.tree_map(lambda leaf: TENSOR if isinstance(leaf, torch.Tensor | _Marker) else leaf, arguments)
    )


@dataclass(slots=True)
class Graph:
    """A captured network.

    Attributes
    ----------
    operations : list of Operation
        In an order in which they can run.
    inputs : list of str
        Values that the caller passes: the tensors among `arguments`.
    outputs : nested structure of Ref and constants
        What the network returns, packed by `unflatten`.
    shapes : dict
        Shape of each tensor value, and of each parameter.
    dtypes : dict
        torch dtype of each tensor value.
    constants : dict
        Parameters, buffers and lifted tensors by name.
    parameter_names : dict
        Constant name -> name in the module's state (for `update_weights`).
    unflatten : callable
        Packs the flat list of outputs as the module returned it.
    arguments : Arguments or None
        What the caller passes them in; None: each argument is a tensor.
    derived : list of Operation
        What computes constants from constants, in order; see `derive`.
    """

    operations: list[Operation]
    inputs: list[str]
    outputs: list[Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    constants: dict[str, torch.Tensor]
    parameter_names: dict[str, str]
    unflatten: Callable[[list[Any]], Any]
    arguments: Arguments | None = None
    derived: list[Operation] = field(default_factory=list)

    def derive(self, operations: Iterable[Operation] | None = None) -> None:
        """Compute the constants that follow from others and are not there, or those of `operations`: once for each set of weights, not in each call."""
        with torch.no_grad():
            for operation in self.derived if operations is None else operations:
                if operation.output not in self.constants:
                    self.constants[operation.output] = computed(operation, self.constants)

    def readers(self) -> dict[str, list[Operation]]:
        """The operations that read each value, each of them once."""
        found: dict[str, list[Operation]] = {}
        for operation in self.operations:
            for name in set(operation.read):
                found.setdefault(name, []).append(operation)
        return found

    def users(self) -> dict[str, int]:
        """How often each value is read (outputs of the network count)."""
        count: dict[str, int] = {}
        for operation in self.operations:
            for name in operation.read:
                count[name] = count.get(name, 0) + 1
        for output in self.outputs:
            if isinstance(output, Ref):
                count[output.name] = count.get(output.name, 0) + 1
        return count


def is_pure(operation: Operation) -> bool:
    """Whether its operator yields the same each time, and changes nothing: who does not need its value need not run it."""
    target = operation.target
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)  # noqa: SLF001 - its only name
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable  # noqa: SLF001 - the only way to ask
        and bool(target._schema.returns)  # noqa: SLF001 - what returns nothing is there to complain
    )


def drop_unread(graph: Graph) -> None:
    """Drop what was only needed for values that are now made in another way, and what nobody ever read."""
    kept: list[Operation] = []
    read = {output.name for output in graph.outputs if isinstance(output, Ref)}
    for operation in reversed(graph.operations):
        if operation.output in read or not is_pure(operation):
            kept.append(operation)
            read.update(operation.references(), operation.inputs)
    graph.operations = kept[::-1]


def with_values(item: Any, value_of: Callable[[Ref], Any]) -> Any:
    """An argument, however nested, with something else in the place of each `Ref`."""
    if isinstance(item, Ref):
        return value_of(item)
    if isinstance(item, list | tuple):
        return type(item)(with_values(part, value_of) for part in item)
    if isinstance(item, dict):
        return {k: with_values(v, value_of) for k, v in item.items()}
    return item


def computed(operation: Operation, values: Mapping[str, Any]) -> Any:
    """What the torch form of an operation yields for these values of what it reads."""
    args, kwargs = (
        with_values(part, lambda ref: values[ref.name]) for part in (operation.args, operation.kwargs)
    )
    return operation.target(*args, **kwargs)


def bound_arguments(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    bound = {}
    for i, argument in enumerate(target._schema.arguments):  # noqa: SLF001 - the only way to name arguments
        if i < len(args):
            bound[argument.name] = args[i]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def base_name(target: Any) -> str:
    """Return the bare name of an operator: relu_ of torch.ops.aten.relu_.default."""
    return str(getattr(target, "_schema", target)).split("::")[-1].split("(")[0].split(".")[0]
