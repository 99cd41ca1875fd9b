"""Finds attention whose operands lie in planes: heads are then mere ranges of features, and nothing has to be rearranged.

torch writes attention as views of (samples, tokens, features): split the features into heads, move the heads before the tokens, attend, move
back, join. In the token layout (see layout.py) all of that is a matter of byte steps. Which axis is which is decided by following the operators (see
moves.py), not from sizes, which may be equal. A pattern that is anything else is left to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from explorer.inference.graph import Graph, Operation, Ref, base_name, bound_arguments, with_values
from explorer.inference.moves import Moved, Source, is_move, move


@dataclass(frozen=True, slots=True)
class Heads:
    """Where an operand of attention lies in a value of shape (..., features), whose rows are the tokens of one sample after the other.

    Attributes
    ----------
    first : int
        Feature of the first head's first element.
    step : int
        Features from one head to the next.
    """

    first: int
    step: int


@dataclass(frozen=True, slots=True)
class _Attention:
    """What may become an "attention" operation.

    Attributes
    ----------
    operation : Operation
        The one whose result is (samples, heads, tokens, features).
    operands : tuple of str
        Queries, keys and values.
    shape : tuple of int
        Samples, heads, queries, keys, features of a query, and of a value.
    scale : float
        Of the products of queries and keys.
    """

    operation: Operation
    operands: tuple[str, str, str]
    shape: tuple[int, int, int, int, int, int]
    scale: float


@dataclass(frozen=True, slots=True)
class _Origin:
    """A value by the elements of another one, of this shape."""

    source: str
    shape: tuple[int, ...]
    moved: Source

    @property
    def is_whole(self) -> bool:
        """Whether it is the other one, as it is."""
        return self.moved == Moved.unmoved(self.shape)


def find_attention(graph: Graph) -> None:
    """Turn what fits into "attention" operations: inputs are the values that hold queries, keys and values.

    The result of one is (samples, tokens, heads * features), and torch's must not be needed in any other form.
    """
    found = _attentions(graph)
    while found:
        followed = _Followed(graph, found)
        if not followed.failed:
            followed.rewrite()
            return
        found = {output: one for output, one in found.items() if output not in followed.failed}


def _attentions(graph: Graph) -> dict[str, _Attention]:
    """Attention without anything unusual, by its result."""
    found = {}
    for operation in graph.operations:
        if operation.kind == "torch" and base_name(operation.target) == "scaled_dot_product_attention":
            one = _plain(operation, graph)
            if one is not None:
                found[operation.output] = one
    return found


def _plain(operation: Operation, graph: Graph) -> _Attention | None:
    """Attention as one operator, if there is no mask, no dropout and nothing else unusual."""
    bound = bound_arguments(operation.target, operation.args, operation.kwargs)
    unusual = any(bound.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    operands = [bound["query"], bound["key"], bound["value"]]
    if unusual or bound.get("attn_mask") is not None or not all(isinstance(o, Ref) for o in operands):
        return None
    q, k, v = (o.name for o in operands)
    shape = _shape(*(graph.shapes.get(name, ()) for name in (q, k, v)))
    if shape is None or any(graph.dtypes[name] != torch.float32 for name in (q, k, v)):
        return None
    scale = bound.get("scale")
    return _Attention(operation, (q, k, v), shape, shape[4] ** -0.5 if scale is None else float(scale))


def _shape(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> tuple[int, int, int, int, int, int] | None:
    """The sizes of an attention of such queries, keys and values; None for what broadcasts, or has another number of axes, which is left to torch."""
    if any(len(s) != 4 or 0 in s for s in (q, k, v)):
        return None
    fits = q[:2] == k[:2] == v[:2] and q[3] == k[3] and k[2] == v[2]
    return (q[0], q[1], q[2], k[2], q[3], v[3]) if fits else None


class _Followed:
    """Where every value comes from, if `attentions` become native operations.

    Attributes
    ----------
    failed : set of str
        Those whose operands do not lie as they must, or whose result somebody reads in a form that does not exist then.
    """

    def __init__(self, graph: Graph, attentions: dict[str, _Attention]) -> None:
        self._graph, self._attentions = graph, attentions
        self._origins: dict[str, _Origin] = {}
        self._operands: dict[str, list[tuple[str, Heads]]] = {}
        # What makes each value that there is not yet.
        self._makers: dict[str, str] = {}
        self.failed: set[str] = set()
        for operation in graph.operations:
            self._follow(operation)
        self._check()

    def _follow(self, operation: Operation) -> None:
        out = operation.output
        if out in self._attentions:
            self._attend(self._attentions[out])
        elif is_move(operation):
            read = [name for name in operation.references() if name not in self._graph.constants]
            origin = self._origin(read[0]) if len(read) == 1 else None
            several = out not in self._graph.shapes
            if origin is None or not (several or self._graph.dtypes[out] == torch.float32):
                return
            moved = move(operation, origin.moved, self._graph.shapes.get(out))
            if moved is not None:
                self._origins[out] = _Origin(origin.source, origin.shape, moved)

    def _origin(self, name: str) -> _Origin | None:
        if name in self._origins:
            return self._origins[name]
        shape = self._graph.shapes.get(name)
        if shape is None or 0 in shape or self._graph.dtypes[name] != torch.float32:
            return None
        return _Origin(name, shape, Moved.unmoved(shape))

    def _attend(self, one: _Attention) -> None:
        samples, heads, queries, keys, features, value_features = one.shape
        counts = (queries, keys, keys)
        sizes = (features, features, value_features)
        found = [
            self._heads(name, (samples, heads, tokens, size))
            for name, tokens, size in zip(one.operands, counts, sizes, strict=True)
        ]
        out = one.operation.output
        if None in found:
            self.failed.add(out)
            return
        self._operands[out] = [operand for operand in found if operand is not None]
        joined = (samples, queries, heads * value_features)
        split = Moved.unmoved(joined).reshaped((samples, queries, heads, value_features))
        assert split is not None
        self._make(f"{out}.joined", joined, split.permuted((0, 2, 1, 3)), out)

    def _make(self, name: str, shape: tuple[int, ...], moved: Moved, instead: str) -> None:
        """There is to be a value `name`, of whose elements that of the operation `instead` consists."""
        self._makers[name] = instead
        self._origins[instead] = _Origin(name, shape, moved)

    def _heads(self, name: str, shape: tuple[int, int, int, int]) -> tuple[str, Heads] | None:
        """The value of shape (..., features) that holds an operand of this shape, and where in it the heads lie."""
        origin = self._origin(name)
        if origin is None or not isinstance(origin.moved, Moved) or len(origin.shape) < _TOKENS:
            return None
        samples, heads, tokens, size = shape
        width = origin.shape[-1]
        of_samples, of_heads, of_tokens, of_features = origin.moved.axes
        # All rows, in their order: `first` and the heads are then within a row.
        lies = (
            prod(origin.shape) == samples * tokens * width
            and of_samples == _axis(samples, tokens * width)
            and of_tokens == _axis(tokens, width)
            and of_features == _axis(size, 1)
            and len(of_heads) <= 1
        )
        if not lies or origin.source in self._graph.constants:
            return None
        return origin.source, Heads(origin.moved.first, of_heads[0][1] if of_heads else size)

    def _check(self) -> None:
        """Find what is read in a form that there is not going to be."""
        returned = [output.name for output in self._graph.outputs if isinstance(output, Ref)]
        self._need(returned)
        for operation in self._graph.operations:
            out = operation.output
            followed = out in self._origins and is_move(operation)
            if not followed and out not in self._operands:
                self._need([*operation.inputs, *operation.references()])

    def _need(self, names: list[str]) -> None:
        for name in names:
            origin = self._origins.get(name)
            if origin is not None and origin.source in self._makers and not origin.is_whole:
                self.failed.add(self._makers[origin.source])

    def rewrite(self) -> None:
        """Make it so."""
        graph = self._graph
        renamed = {
            name: origin.source
            for name, origin in self._origins.items()
            if origin.source in self._makers and origin.is_whole
        }
        for name, instead in self._makers.items():
            graph.shapes[name], graph.dtypes[name] = self._origins[instead].shape, torch.float32
        graph.operations = [self._rewritten(operation) for operation in graph.operations]

        def new(ref: Ref) -> Ref:
            return Ref(renamed.get(ref.name, ref.name))

        for operation in graph.operations:
            operation.inputs = [renamed.get(name, name) for name in operation.inputs]
            operation.args, operation.kwargs = (
                with_values(part, new) for part in (operation.args, operation.kwargs)
            )
        graph.outputs = with_values(graph.outputs, new)
        _drop_unread_moves(graph)

    def _rewritten(self, operation: Operation) -> Operation:
        one = self._attentions.get(operation.output)
        if one is None:
            return operation
        where = self._operands[operation.output]
        samples, n_heads, queries, keys, features, value_features = one.shape
        attention = Operation(
            "attention",
            self._origins[operation.output].source,
            [source for source, _ in where],
            operation.name,
            operation.target,
        )
        attention.attributes = {
            "samples": samples,
            "tokens": (queries, keys),
            "heads": n_heads,
            "features": features,
            "value_features": value_features,
            "operands": tuple(heads for _, heads in where),
            "scale": one.scale,
        }
        return attention


_TOKENS = 3
"""Axes of a value that is (samples, tokens, features); one with fewer is (samples, features) to the kernels."""


def _axis(size: int, step: int) -> tuple[tuple[int, int], ...]:
    """An axis that is one range."""
    return ((size, step),) if size > 1 else ()


def _drop_unread_moves(graph: Graph) -> None:
    """Views that nobody reads any more."""
    kept: list[Operation] = []
    read = {output.name for output in graph.outputs if isinstance(output, Ref)}
    for operation in reversed(graph.operations):
        if operation.output in read or not is_move(operation):
            kept.append(operation)
            read.update(operation.references(), operation.inputs)
    graph.operations = kept[::-1]
