"""Finds attention whose operands lie in planes: heads are then mere ranges of features, and nothing has to be rearranged.

torch writes attention as views of (samples, tokens, features): split the features into heads, move the heads before the tokens, attend, move
back, join. In the token layout (see layout.py) all of that is a matter of byte steps. Which axis is which is decided by following the operators (see
moves.py), not from sizes, which may be equal. A pattern that is anything else is left to torch.

Some of it, as nn.MultiheadAttention, also puts the tokens before the samples and joins the two, for the sake of linear layers, which take each row for itself
and do not mind: those layers read the rows, and leave them, as they lie before, and nothing has to be moved for them either.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from explorer.inference.attention_masks import Mask, can_be_added, causal, make_readable
from explorer.inference.graph import (
    Graph,
    Operation,
    Ref,
    base_name,
    bound_arguments,
    drop_unread,
    with_values,
)
from explorer.inference.moves import Moved, Source, is_move, move
from explorer.inference.without_inputs import WithoutInputs, lets_all_through


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
    across : bool
        Whether the keys are (samples, heads, features, tokens).
    inside : frozenset of str
        What other operations yield on the way.
    mask : Mask or None
    none_is_zero : bool
        Whether a query that may attend to no key gets zeros. A softmax gives NaN.
    """

    operation: Operation
    operands: tuple[str, str, str]
    shape: tuple[int, int, int, int, int, int]
    scale: float
    across: bool = False
    inside: frozenset[str] = frozenset()
    mask: Mask | None = None
    none_is_zero: bool = False


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
    """Turn what fits into "attention" operations: inputs are the values that hold queries, keys and values, and the mask if there is one.

    The result of one is (samples, tokens, heads * features), and torch's must not be needed in any other form. The same holds for linear layers whose rows
    are moved before them.
    """
    known = WithoutInputs(graph)
    attentions = _attentions(graph, known)
    layers = {operation.output for operation in graph.operations if operation.kind == "linear"}
    while True:
        followed = _Followed(graph, attentions, layers)
        if not followed.failed:
            followed.rewrite()
            return
        attentions = {output: one for output, one in attentions.items() if output not in followed.failed}
        layers -= followed.failed


def _attentions(graph: Graph, known: WithoutInputs) -> dict[str, _Attention]:
    """Attention without anything unusual, by its result."""
    users, producer = graph.users(), {o.output: o for o in graph.operations}
    inner = {name: operation for name, operation in producer.items() if users.get(name) == 1}
    found = {}
    for operation in graph.operations:
        name, one = base_name(operation.target), None
        if operation.kind == "torch" and name == "scaled_dot_product_attention":
            one = _plain(operation, graph, known)
        elif operation.kind == "torch" and name == "matmul":
            one = _spelled_out(operation, inner, graph, known)
        if one is not None and (one.mask is None or can_be_added(one.mask, one.shape[:4])):
            found[operation.output] = one
    return found


def _plain(operation: Operation, graph: Graph, known: WithoutInputs) -> _Attention | None:
    """Attention as one operator, if there is no dropout and nothing else unusual."""
    bound = bound_arguments(operation.target, operation.args, operation.kwargs)
    operands = [bound["query"], bound["key"], bound["value"]]
    unusual = bound.get("dropout_p") or bound.get("enable_gqa")
    if unusual or not all(isinstance(o, Ref) for o in operands):
        return None
    q, k, v = (o.name for o in operands)
    shape = _shape(*(graph.shapes.get(name, ()) for name in (q, k, v)))
    if shape is None or any(graph.dtypes[name] != torch.float32 for name in (q, k, v)):
        return None
    mask = causal(shape[2], shape[3]) if bound.get("is_causal") else _mask(bound["attn_mask"], graph, known)
    scale = bound.get("scale")
    return _Attention(
        operation,
        (q, k, v),
        shape,
        shape[4] ** -0.5 if scale is None else float(scale),
        mask=mask,
        none_is_zero=True,
    )


def _mask(ref: Ref | None, graph: Graph, known: WithoutInputs) -> Mask | None:
    """What is known of a mask; None if there is none, or it lets everything through."""
    if ref is None:
        return None
    value = known.value(ref.name)
    if value is not None and lets_all_through(value):
        return None
    if value is None and ref.name in graph.constants:
        # With other weights it may not let everything through.
        value = graph.constants[ref.name].detach()
    return Mask(ref.name, graph.shapes.get(ref.name, ()), graph.dtypes[ref.name], value)


def _spelled_out(
    operation: Operation, inner: dict[str, Operation], graph: Graph, known: WithoutInputs
) -> _Attention | None:
    """Attention as a softmax of one product that is multiplied with the values; `inner`: what makes values that are read once."""
    weights, values = _factors(operation)
    softmax = inner.get(weights)
    if softmax is None or softmax.kind != "torch" or base_name(softmax.target) != "softmax":
        return None
    a = bound_arguments(softmax.target, softmax.args, softmax.kwargs)
    summed, added = _without_mask(a["self"].name, inner, graph)
    scores, scale, inside = _unscaled(summed, inner)
    product = inner.get(scores)
    if product is None or product.kind != "torch" or base_name(product.target) != "matmul":
        return None
    q, k, v = *_factors(product), values
    q_scale = k_scale = 1.0
    inside = [*inside, weights, scores, a["self"].name]
    # Some scale the queries, or both.
    (q, q_scale, of_q), (k, k_scale, of_k) = _unscaled(q, inner), _unscaled(k, inner)
    shapes = [graph.shapes.get(name, ()) for name in (q, k, v)]
    across = tuple(shapes[1][i] for i in (0, 1, 3, 2)) if len(shapes[1]) == 4 else ()
    shape = _shape(shapes[0], across, shapes[2])
    floats = all(graph.dtypes.get(name) == torch.float32 for name in (q, k, v))
    if shape is None or not floats or a["dtype"] not in (None, torch.float32) or a["dim"] not in (-1, 3):
        return None
    mask = _mask(added, graph, known)
    every = frozenset([*inside, *of_q, *of_k])
    return _Attention(
        operation, (q, k, v), shape, scale * q_scale * k_scale, across=True, inside=every, mask=mask
    )


def _without_mask(name: str, inner: dict[str, Operation], graph: Graph) -> tuple[str, Ref | None]:
    """The scores that a value is a sum of, and what is added to them; the value itself, and None, if it is none."""
    operation = inner.get(name)
    if operation is None or base_name(operation.target) != "add":
        return name, None
    a = bound_arguments(operation.target, operation.args, operation.kwargs)
    for scores, mask in ((a["self"], a["other"]), (a["other"], a["self"])):
        if not isinstance(scores, Ref) or not isinstance(mask, Ref) or a["alpha"] != 1:
            continue
        product = inner.get(_unscaled(scores.name, inner)[0])
        is_product = product is not None and base_name(product.target) == "matmul"
        floats = graph.dtypes.get(mask.name) == torch.float32
        if is_product and floats and graph.shapes.get(scores.name) == graph.shapes.get(name):
            return scores.name, mask
    return name, None


def _factors(product: Operation) -> tuple[str, str]:
    """The operands of a matrix product."""
    a = bound_arguments(product.target, product.args, product.kwargs)
    return a["self"].name, a["other"].name


def _unscaled(name: str, inner: dict[str, Operation]) -> tuple[str, float, list[str]]:
    """What a value is a multiple of, by how much, and the values on the way: those that are made of others by numbers alone."""
    scale, inside = 1.0, []
    while name in inner and inner[name].kind == "affine":
        operation, a = inner[name], inner[name].attributes
        if a["arithmetic"] not in ("mul", "div") or isinstance(a["other"], str) or not a["other"]:
            break
        scale = scale * a["other"] if a["arithmetic"] == "mul" else scale / a["other"]
        inside.append(name)
        [name] = operation.inputs
    return name, float(scale), inside


def _shape(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> tuple[int, int, int, int, int, int] | None:
    """The sizes of an attention of such queries, keys and values; None for what broadcasts, or has another number of axes, which is left to torch."""
    if any(len(s) != 4 or 0 in s for s in (q, k, v)):
        return None
    fits = q[:2] == k[:2] == v[:2] and q[3] == k[3] and k[2] == v[2]
    return (q[0], q[1], q[2], k[2], q[3], v[3]) if fits else None


class _Followed:
    """Where every value comes from, if `attentions` become native operations, and linear `layers` read rows where these lie before they are moved.

    Attributes
    ----------
    failed : set of str
        Those whose operands do not lie as they must, or whose result somebody reads in a form that does not exist then.
    """

    def __init__(self, graph: Graph, attentions: dict[str, _Attention], layers: set[str]) -> None:
        self._graph, self._attentions, self._layers = graph, attentions, layers
        self._origins: dict[str, _Origin] = {}
        self._operands: dict[str, list[tuple[str, Heads]]] = {}
        # What the layers read in place of their operands.
        self._rows: dict[str, str] = {}
        # What native attention does without.
        self._inside: set[str] = set()
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
        elif out in self._layers:
            self._read_rows(operation)
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
            self._heads(name, (samples, heads, tokens, size), across=one.across and position == 1)
            for position, (name, tokens, size) in enumerate(zip(one.operands, counts, sizes, strict=True))
        ]
        out = one.operation.output
        if None in found:
            self.failed.add(out)
            return
        self._operands[out] = [operand for operand in found if operand is not None]
        joined = (samples, queries, heads * value_features)
        split = Moved.unmoved(joined).reshaped((samples, queries, heads, value_features))
        assert split is not None
        self._inside |= one.inside
        self._make(f"{out}.joined", joined, split.permuted((0, 2, 1, 3)), out)

    def _read_rows(self, operation: Operation) -> None:
        """A linear layer: if its operand is all rows of another value in whatever order, so is its result."""
        origin, out = self._origin(operation.inputs[0]), operation.output
        if origin is None or origin.is_whole or not isinstance(origin.moved, Moved):
            return
        rows, width = origin.moved.axes[:-1], origin.shape[-1]
        fits = (
            len(origin.shape) >= _TOKENS
            and prod(origin.moved.shape) == prod(origin.shape)
            and origin.moved.axes[-1] == _axis(width, 1)
            and all(step % width == 0 for axis in rows for _, step in axis)
        )
        features = self._graph.shapes[out][-1]
        if not fits or features == 0:
            return
        wider = tuple(tuple((n, step // width * features) for n, step in axis) for axis in rows)
        self._rows[out] = origin.source
        moved = Moved((*wider, _axis(features, 1)))
        self._make(f"{out}.rows", (*origin.shape[:-1], features), moved, out)

    def _make(self, name: str, shape: tuple[int, ...], moved: Moved, instead: str) -> None:
        """There is to be a value `name`, of whose elements that of the operation `instead` consists."""
        self._makers[name] = instead
        self._origins[instead] = _Origin(name, shape, moved)

    def _heads(
        self, name: str, shape: tuple[int, int, int, int], *, across: bool
    ) -> tuple[str, Heads] | None:
        """The value of shape (..., features) that holds an operand of this shape, and where in it the heads lie.

        `across`: the operand's last two axes are the other way round.
        """
        origin = self._origin(name)
        if origin is None or not isinstance(origin.moved, Moved) or len(origin.shape) < _TOKENS:
            return None
        samples, _, tokens, size = shape
        width = origin.shape[-1]
        of_samples, of_heads, of_tokens, of_features = origin.moved.axes
        if across:
            of_tokens, of_features = of_features, of_tokens
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
            if not followed and not any(out in some for some in (self._operands, self._rows, self._inside)):
                self._need([*operation.inputs, *operation.references()])
            mask = self._attentions[out].mask if out in self._operands else None
            if mask is not None and mask.value is None:
                self._need([mask.name])

    def _need(self, names: list[str]) -> None:
        for name in names:
            origin = self._origins.get(name)
            if origin is not None and origin.source in self._makers and not origin.is_whole:
                self.failed.add(self._makers[origin.source])

    def rewrite(self) -> None:
        """Make it so."""
        graph = self._graph
        renamed = {name: origin.source for name, origin in self._origins.items() if origin.is_whole}
        for name, instead in self._makers.items():
            graph.shapes[name], graph.dtypes[name] = self._origins[instead].shape, torch.float32
        operations: list[Operation] = []
        for operation in graph.operations:
            if operation.output not in self._inside:
                rewritten = self._rewritten(operation)
                operations += self._add_mask(operation.output, rewritten)
                operations.append(rewritten)
        graph.operations = operations

        def new(ref: Ref) -> Ref:
            return Ref(renamed.get(ref.name, ref.name))

        for operation in graph.operations:
            operation.inputs = [renamed.get(name, name) for name in operation.inputs]
            operation.args, operation.kwargs = (
                with_values(part, new) for part in (operation.args, operation.kwargs)
            )
        graph.outputs = with_values(graph.outputs, new)
        drop_unread(graph)

    def _rewritten(self, operation: Operation) -> Operation:
        out = operation.output
        if out in self._rows:
            source, a = self._rows[out], bound_arguments(operation.target, operation.args, operation.kwargs)
            operation.output, operation.inputs = self._origins[out].source, [source]
            operation.args, operation.kwargs = (Ref(source), a["weight"], a["bias"]), {}
        if out not in self._operands:
            return operation
        one, where = self._attentions[out], self._operands[out]
        samples, n_heads, queries, keys, features, value_features = one.shape
        attention = Operation(
            "attention",
            self._origins[out].source,
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
            "none_is_zero": one.none_is_zero,
        }
        return attention

    def _add_mask(self, out: str, attention: Operation) -> list[Operation]:
        """Let an attention, of the value `out` as it was, read its mask; the operations that are missing before it."""
        one = self._attentions.get(out)
        if one is None or one.mask is None:
            return []
        mask, missing = make_readable(one.mask, attention.name, one.shape[:4], self._graph)
        attention.inputs.append(mask)
        return missing


_TOKENS = 3
"""Axes of a value that is (samples, tokens, features); one with fewer is (samples, features) to the kernels."""


def _axis(size: int, step: int) -> tuple[tuple[int, int], ...]:
    """An axis that is one range."""
    return ((size, step),) if size > 1 else ()
