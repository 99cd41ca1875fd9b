"""Finds what only moves pixels to tokens, or tokens to pixels, so that it can be done where they lie.

In an image each channel is a plane of pixels; in tokens (..., features) each feature is a line of tokens (see layout.py). torch goes from one to the other
by permutations and reshapes, which change nothing but the place of each pixel, alike in all channels. Which place that is follows from the operators (see
moves.py). Constant tokens that a vision transformer puts before or behind the patches, and positions that it adds to all, come along: they are one constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explorer.inference.graph import (
    Graph,
    Operation,
    Ref,
    base_name,
    bound_arguments,
    computed,
    drop_unread,
)
from explorer.inference.moves import Moved, Source, is_move, move

_IMAGES = {"conv", "max_pool", "average_pool", "adaptive_average", "upsample", "concat", "to_planes"}
_TOKENS = {"linear", "layer_norm", "attention", "to_tokens"}
"""What yields images, or tokens, whatever it reads."""

_FOLLOWING = {"batch_norm", "affine", "add", "mul", "clamp", "activation"}
"""What yields what it reads."""


def find_rearrangements(graph: Graph) -> None:
    """Turn what fits into "to_tokens", "to_planes" and "token" operations.

    Their attributes: `pixels` (tokens of all samples, or samples x rows x columns,) int64 says for each token or pixel of the result which of the operand it is, counted
    through all samples; -1 for none. `added` (tokens of a sample, features) float32, or None, is added to the tokens of each sample.
    Of "token", which takes one of each sample, `index` says which.
    """
    producer = {operation.output: operation for operation in graph.operations}
    for operation in [o for o in graph.operations if is_move(o)]:
        one = _one_token(operation, graph, producer)
        if one is not None:
            operation.kind, operation.inputs = "token", [one[0]]
            operation.args, operation.kwargs = (Ref(one[0]),), {}
            operation.attributes = {"index": one[1]}
            continue
        found = _moved(operation, graph, producer)
        if found is None:
            continue
        kind, source, pixels = found
        readers, users = graph.readers(), graph.users()
        last, added, inside = operation, None, set()
        if kind == "to_tokens":
            samples = graph.shapes[source][0]
            while True:
                more = _joined(last, pixels, added, samples, graph, producer, readers, users)
                if more is None:
                    break
                inside.add(last.output)
                last, pixels, added = more
        kinds = {reader.kind for reader in readers.get(last.output, ())}
        if not kinds & (_TOKENS if kind == "to_tokens" else (_IMAGES | _FOLLOWING)):
            continue  # torch reads it as it lies
        last.kind, last.inputs = kind, [source]
        last.args, last.kwargs = (Ref(source),), {}
        last.attributes = {"pixels": pixels, "added": added}
        graph.operations = [o for o in graph.operations if o.output not in inside]
    drop_unread(graph)


def _moved(
    operation: Operation, graph: Graph, producer: dict[str, Operation]
) -> tuple[str, str, NDArray[np.int64]] | None:
    """What kind of rearrangement ends with an operation, of what, and its pixels."""
    name, moved = _followed(operation, graph, producer)
    shape, after = graph.shapes.get(name, ()), graph.shapes.get(operation.output, ())
    if moved is None or moved.first or prod(shape) != prod(after):
        return None
    kind = _kind_of(name, producer)
    if kind == "planes" and len(shape) in (3, 4) and len(after) > 2:
        channels, size = shape[1], prod(shape[2:])
        if channels > 1 and moved.axes[-1] == ((channels, size),):
            first = _elements(moved.axes[:-1])
            return "to_tokens", name, first // (channels * size) * size + first % size
    if kind == "tokens" and len(after) == 4:
        channels = shape[-1]
        if channels > 1 and moved.axes[1] == ((channels, 1),):
            return "to_planes", name, _elements((moved.axes[0], *moved.axes[2:])) // channels
    return None


def _one_token(operation: Operation, graph: Graph, producer: dict[str, Operation]) -> tuple[str, int] | None:
    """The tokens of which an operation takes the same one of each sample, and which one."""
    name, moved = _followed(operation, graph, producer)
    shape = graph.shapes.get(name, ())
    if moved is None or len(shape) != 3 or shape[2] < 2 or _kind_of(name, producer) != "tokens":
        return None
    samples, tokens, features = shape
    wanted = Moved.unmoved((samples, tokens, features)).cut(1, 0, 1, 1, keep=False)
    assert wanted is not None
    index, rest = divmod(moved.first, features)
    return (name, index) if moved.axes == wanted.axes and not rest and index < tokens else None


def _followed(operation: Operation, graph: Graph, producer: dict[str, Operation]) -> tuple[str, Moved | None]:
    """The value whose elements an operation and the moves before it only move, and how; None where that is not known."""
    way, name = [operation], _operand(operation)
    while name in producer and is_move(producer[name]):
        way.append(producer[name])
        name = _operand(producer[name])
    shape = graph.shapes.get(name, ())
    if name in graph.constants or len(shape) < 3 or 0 in shape or graph.dtypes.get(name) != torch.float32:
        return name, None
    moved: Source = Moved.unmoved(shape)
    for step in reversed(way):
        moved = move(step, moved, graph.shapes.get(step.output))
    return name, moved if isinstance(moved, Moved) else None


def _operand(operation: Operation) -> str:
    """The one value that a move reads."""
    return next(iter(operation.references()), "")


def _kind_of(name: str, producer: dict[str, Operation]) -> str | None:
    """Whether a value is certain to be "planes" or "tokens" by the time it is read."""
    while name in producer:
        operation = producer[name]
        if operation.kind in _IMAGES:
            return "planes"
        if operation.kind in _TOKENS:
            return "tokens"
        if operation.kind not in _FOLLOWING:
            return None
        name = operation.inputs[0]
    return None


def _elements(axes: tuple[Any, ...]) -> NDArray[np.int64]:
    """The elements of the source along these axes of a `Moved`, the last axis the fastest."""
    found = np.zeros(1, np.int64)
    for digits in axes:
        for size, step in digits:
            found = (found[:, None] + np.arange(size) * step).reshape(-1)
    return found


def _joined(
    operation: Operation,
    pixels: NDArray[np.int64],
    added: NDArray[np.float32] | None,
    samples: int,
    graph: Graph,
    producer: dict[str, Operation],
    readers: dict[str, list[Operation]],
    users: dict[str, int],
) -> tuple[Operation, NDArray[np.int64], NDArray[np.float32] | None] | None:
    """The same with what reads it next, where that puts constant tokens beside it, or adds a constant."""
    name, next_ = operation.output, readers.get(operation.output, [])
    shape = graph.shapes[name]
    if users.get(name) != 1 or len(next_) != 1 or len(shape) != 3 or shape[0] != samples:
        return None
    reader, features = next_[0], shape[-1]
    tokens = graph.shapes[reader.output][1] if len(graph.shapes.get(reader.output, ())) == 3 else 0
    if base_name(reader.target) == "cat":
        bound = bound_arguments(reader.target, reader.args, reader.kwargs)
        if bound["dim"] not in (1, -2):
            return None
        mine, constants = [], []
        for part in bound["tensors"]:
            if part.name == name:
                mine.append(pixels.reshape(samples, -1))
                constants.append(np.zeros((shape[1], features), np.float32) if added is None else added)
                continue
            value = _same_for_all(_constant(part.name, graph, producer), samples, features)
            if value is None:
                return None
            mine.append(np.full((samples, len(value)), -1))
            constants.append(value)
        return reader, np.concatenate(mine, 1).reshape(-1), np.concatenate(constants)
    if base_name(reader.target).rstrip("_") == "add" and tokens == shape[1]:
        bound = bound_arguments(reader.target, reader.args, reader.kwargs)
        other = next((bound[n] for n in ("self", "other") if bound[n] != Ref(name)), None)
        if bound.get("alpha", 1) != 1 or not isinstance(other, Ref):
            return None
        value = _same_for_all(_constant(other.name, graph, producer), samples, features)
        if value is None or len(value) not in (1, tokens):
            return None
        value = np.broadcast_to(value, (tokens, features))
        return reader, pixels, value.copy() if added is None else added + value
    return None


def _constant(name: str, graph: Graph, producer: dict[str, Operation]) -> Tensor | None:
    """The value of a constant, or of what is computed from constants alone."""
    if name in graph.constants:
        return graph.constants[name]
    operation = producer.get(name)
    if operation is None or operation.kind != "torch" or not _is_spread(operation):
        return None
    parts = {n: _constant(n, graph, producer) for n in operation.references()}
    if not parts or any(value is None for value in parts.values()):
        return None
    with torch.no_grad():
        value: Tensor = computed(operation, parts)
    return value


def _is_spread(operation: Operation) -> bool:
    """Whether an operation gives each sample the same."""
    return is_move(operation) or base_name(operation.target) in ("expand", "expand_as")


def _same_for_all(value: Tensor | None, samples: int, features: int) -> NDArray[np.float32] | None:
    """A constant of (1 or all samples, tokens, features), or fewer axes, as (tokens, features), where all samples have the same."""
    if value is None or value.dtype != torch.float32 or value.dim() > 3 or value.shape[-1:] != (features,):
        return None
    value = value.detach()
    value = value.reshape(*[1] * (3 - value.dim()), *value.shape)
    # Equal numbers are not enough: new weights may bring others.
    if value.shape[0] != 1 and (value.shape[0] != samples or value.stride(0)):
        return None
    found: NDArray[np.float32] = value[0].contiguous().numpy()
    return found


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """What the kernel is told of a rearrangement, for one layout of its operand and its result.

    Attributes
    ----------
    table : (images * vectors * lanes,) int32
        For each element of a channel of the result, of each of its images, which element of the operand's channel it is, images counted in; -1 for none.
    starts : (images * vectors,) int32
        The first of these of each vector whose elements follow one another; -1 for others.
    """

    table: NDArray[np.int32]
    starts: NDArray[np.int32]

    @classmethod
    def of(cls, pixels: NDArray[np.int64], x: Any, y: Any) -> Rearrangement:
        """Of `pixels` as `find_rearrangements` has them, from planes `x` to planes `y`."""
        within = x.inside.reshape(-1)
        image, pixel = np.divmod(pixels, len(within))
        source = np.where(pixels < 0, -1, image * x.image + within[pixel])
        table = np.full((y.images, y.vectors * y.lanes), -1, np.int64)
        table[:, y.inside.reshape(-1)] = source.reshape(y.images, -1)
        lines = table.reshape(-1, y.lanes)
        follows = (lines[:, :1] >= 0) & (lines == lines[:, :1] + np.arange(y.lanes))
        starts = np.where(follows.all(1), lines[:, 0], -1)
        return cls(table.reshape(-1).astype(np.int32), starts.astype(np.int32))
