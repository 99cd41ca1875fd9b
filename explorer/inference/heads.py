"""Finds attention whose operands lie in planes: heads are then mere ranges of features, and nothing has to be rearranged.

torch writes attention as views of (samples, tokens, features): split the features into heads, move the heads before the tokens, attend, move
back, join. In the token layout (see layout.py) all of that is a matter of byte steps. A pattern that is anything else is left to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from explorer.inference.graph import Graph, Operation, Ref, bound_arguments, with_values

_MOVES = {
    "view", "reshape", "unflatten", "transpose", "permute", "chunk", "split", "unbind", "getitem", "slice", "select", "squeeze", "unsqueeze",
    "split_with_sizes", "contiguous", "swapaxes", "movedim", "flatten", "alias", "detach", "_unsafe_view", "tensor_split", "narrow",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """Where an operand of attention lies in a value of shape (samples, tokens, features).

    Attributes
    ----------
    first : int
        Feature of the first head's first element.
    step : int
        Features from one head to the next.
    """

    first: int
    step: int


def find_attention(graph: Graph) -> None:
    """Turn what fits into "attention" operations: inputs are the values that hold queries, keys and values."""
    producer = {o.output: o for o in graph.operations}
    readers = graph.readers()
    returned = {output.name for output in graph.outputs if isinstance(output, Ref)}
    for operation in list(graph.operations):
        if _name(operation) == "scaled_dot_product_attention":
            found = _plain_arguments(operation, graph)
            joined = _joined(operation, graph, readers, returned)
            if found is None or joined is None:
                continue
            traced = [_trace(name, graph, producer) for name in found]
            if all(one is not None for one in traced):
                _rewrite(graph, operation, found, [one for one in traced if one is not None], joined)
    _drop_unread_moves(graph)


def _name(operation: Operation) -> str:
    return (
        str(operation.target)
        .removeprefix("aten.")
        .split(".")[0]
        .removeprefix("<built-in function ")
        .rstrip(">")
    )


def _plain_arguments(operation: Operation, graph: Graph) -> list[str] | None:
    """The names of queries, keys and values, if there is no mask, no dropout and nothing else unusual."""
    bound = bound_arguments(operation.target, operation.args, operation.kwargs)
    plain = (
        bound.get("attn_mask") is None
        and not bound.get("dropout_p")
        and not bound.get("is_causal")
        and not bound.get("enable_gqa")
    )
    operands = [bound["query"], bound["key"], bound["value"]]
    if not plain or not all(isinstance(o, Ref) for o in operands):
        return None
    names = [o.name for o in operands]
    shapes = [graph.shapes.get(n, ()) for n in names]
    if any(len(s) != 4 or 0 in s for s in shapes) or any(graph.dtypes[n] != torch.float32 for n in names):
        return None
    q, k, v = shapes
    # What broadcasts is left to torch.
    return names if q[:2] == k[:2] == v[:2] and q[3] == k[3] and k[2] == v[2] else None


def _trace(name: str, graph: Graph, producer: dict[str, Operation]) -> tuple[str, Heads] | None:
    """The value of shape (samples, tokens, features) that `name` is a view of, and where in it the heads lie."""
    chain: list[Operation] = []
    source = name
    while (
        source in producer
        and _name(producer[source]) in _MOVES
        and producer[source].kind in ("torch", "slice", "flatten")
    ):
        operation = producer[source]
        chain.append(operation)
        read = [r for r in operation.references() if r not in graph.constants]
        if len(read) != 1:
            return None
        source = read[0]
    shape = graph.shapes.get(source, ())
    if len(shape) != 3 or graph.dtypes.get(source) != torch.float32 or source in graph.constants:
        return None
    held: dict[str, Any] = {source: torch.empty(shape, device="meta")}
    storage = held[source].untyped_storage()._cdata  # noqa: SLF001  # the only name that a storage without data has
    for operation in reversed(chain):
        held[operation.output] = operation.target(
            *with_values(operation.args, lambda ref: held[ref.name]), **operation.kwargs
        )
    view = held[name]
    samples, heads, tokens, features = graph.shapes[name]
    in_place = view.untyped_storage()._cdata == storage  # noqa: SLF001
    steps = view.stride()
    fits = (samples, tokens) == shape[:2] and (
        (steps[0], samples) == (shape[1] * shape[2], samples) or samples == 1
    )
    if not in_place or not fits or (steps[2] != shape[2] and tokens > 1) or (steps[3] != 1 and features > 1):
        return None
    return source, Heads(int(view.storage_offset()), int(steps[1]) if heads > 1 else features)


def _joined(
    operation: Operation, graph: Graph, readers: dict[str, list[Operation]], returned: set[str]
) -> Operation | None:
    """The operation that yields (samples, tokens, heads * features) from the result and is all that becomes of it."""
    if len(graph.shapes[operation.output]) != 4:
        return None
    samples, heads, tokens, features = graph.shapes[operation.output]
    value, moved = operation.output, torch.empty(graph.shapes[operation.output], device="meta")
    held = {value: moved}

    def seen(ref: Ref) -> torch.Tensor:
        return held[ref.name]

    while value not in returned and len(readers.get(value, [])) == 1:
        [reader] = readers[value]
        if _name(reader) not in _MOVES or reader.kind not in ("torch", "flatten"):
            return None
        shape = graph.shapes.get(reader.output)
        if moved.shape == (samples, tokens, heads, features) and shape == (samples, tokens, heads * features):
            # Joining the last two axes of this is the only thing that such a change of shape can be.
            return reader
        if _name(reader) not in ("contiguous", "alias", "detach"):
            held = {value: moved}
            moved = reader.target(*with_values(reader.args, seen), **reader.kwargs)
            wanted = (heads * tokens * features, features, tokens * features, 1)
            if moved.shape != (samples, tokens, heads, features) or moved.stride() != wanted:
                return None
        value = reader.output
    return None


def _rewrite(
    graph: Graph,
    operation: Operation,
    names: list[str],
    traced: list[tuple[str, Heads]],
    joined: Operation,
) -> None:
    _, heads, _, features = graph.shapes[names[0]]
    scale = operation.kwargs.get("scale")
    attention = Operation(
        "attention", joined.output, [source for source, _ in traced], operation.name, operation.target
    )
    attention.attributes = {
        "heads": heads,
        "features": features,
        "value_features": graph.shapes[names[2]][3],
        "operands": tuple(where for _, where in traced),
        "scale": features**-0.5 if scale is None else float(scale),
    }
    graph.operations[graph.operations.index(operation)] = attention
    graph.operations.remove(joined)


def _drop_unread_moves(graph: Graph) -> None:
    """Views that nobody reads any more."""
    while True:
        users = graph.users()
        dead = [o for o in graph.operations if not users.get(o.output) and _name(o) in _MOVES]
        if not dead:
            return
        graph.operations = [o for o in graph.operations if o not in dead]
