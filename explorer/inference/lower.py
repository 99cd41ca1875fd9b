"""Makes the graph cheaper without changing what it computes: folds batch normalisation, lets convolutions add and clamp, removes strides."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from explorer.inference.graph import Graph, Operation, Ref


def lower(graph: Graph) -> Graph:
    """Return a new graph that computes the same with less work.

    - "same" operations are gone,
    - a batch norm after a convolution or linear layer is folded into its weight and bias,
    - an addition whose other operand is ready, and then a clamp, ride on the convolution before them,
    - a convolution with a stride reads the phases of its input instead.

    What has no native form any more (a batch norm on its own) runs through torch. The captured graph is left as it was, so that it can be
    lowered again with new weights.
    """
    lowered = replace(
        graph,
        operations=[copy.copy(o) for o in graph.operations],
        constants=dict(graph.constants),
        shapes=dict(graph.shapes),
        dtypes=dict(graph.dtypes),
    )
    lowered.outputs = list(graph.outputs)
    _drop_same(lowered)
    _fold_batch_norm(lowered)
    _ride(lowered, "add")
    _ride(lowered, "clamp")
    _split_phases(lowered)
    for operation in lowered.operations:
        if operation.kind == "batch_norm":
            operation.kind = "torch"
    return lowered


def through_torch(graph: Graph) -> Graph:
    """Return a copy of a captured graph in which every operation runs as torch's own operator, for machines without machine code."""
    operations = [replace(o, kind="torch") for o in graph.operations]
    return replace(graph, operations=operations, constants=dict(graph.constants))


def _rename(graph: Graph, old: str, new: str) -> None:
    """Whoever reads `old` reads `new` from now on."""

    def visit(item: object) -> object:
        if isinstance(item, Ref):
            return Ref(new) if item.name == old else item
        if isinstance(item, list):
            return [visit(part) for part in item]
        if isinstance(item, tuple):
            return tuple(visit(part) for part in item)
        if isinstance(item, dict):
            return {k: visit(v) for k, v in item.items()}
        return item

    for operation in graph.operations:
        operation.inputs = [new if name == old else name for name in operation.inputs]
        operation.args = tuple(visit(a) for a in operation.args)
        operation.kwargs = {k: visit(v) for k, v in operation.kwargs.items()}
    graph.outputs = [visit(output) for output in graph.outputs]


def _drop_same(graph: Graph) -> None:
    """Drop operations that change nothing; one that changes the shape from (N, C, 1, 1) to (N, C) stays, see plan.py."""
    kept = []
    for operation in graph.operations:
        source = operation.inputs[0] if operation.kind == "same" else ""
        if operation.kind == "same" and graph.shapes[source] == graph.shapes[operation.output]:
            _rename(graph, operation.output, source)
        else:
            kept.append(operation)
    graph.operations = kept


def _fold_batch_norm(graph: Graph) -> None:
    """``gamma (W x + b - mean) / sigma + beta`` is a convolution with ``W gamma / sigma`` and ``(b - mean) gamma / sigma + beta``."""
    users = graph.users()
    producer = {o.output: o for o in graph.operations}
    folded: set[str] = set()
    for norm in graph.operations:
        if norm.kind != "batch_norm":
            continue
        before = producer.get(norm.inputs[0])
        if before is None or before.kind not in ("conv", "linear") or users[before.output] != 1:
            continue
        if before.kind == "linear" and len(graph.shapes[before.output]) != 2:
            continue  # batch norm works on axis 1, a linear layer on the last
        c, a = graph.constants, norm.attributes
        gain = torch.rsqrt(c[a["running_var"]].double() + a["eps"])
        if a["weight"] is not None:
            gain = gain * c[a["weight"]].double()
        shift = -c[a["running_mean"]].double()
        assert before.weight is not None
        weight = c[before.weight]
        if before.bias is not None:
            shift = shift + c[before.bias].double()
        shift = shift * gain
        if a["bias"] is not None:
            shift = shift + c[a["bias"]].double()
        scaled = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
        before.weight, before.bias = f"{norm.output}.weight", f"{norm.output}.bias"
        c[before.weight], c[before.bias] = scaled.to(weight.dtype), shift.to(weight.dtype)
        before.output = norm.output
        producer[norm.output] = before
        folded.add(norm.output)
    graph.operations = [o for o in graph.operations if not (o.kind == "batch_norm" and o.output in folded)]


def _ride(graph: Graph, kind: str) -> None:
    """Let each operation of `kind` ride on the convolution (or linear layer, for clamps; or addition) whose value only it reads."""
    users = graph.users()
    order = {o.output: i for i, o in enumerate(graph.operations)}
    producer = {o.output: o for o in graph.operations}
    gone: set[int] = set()
    for rider in list(graph.operations):
        if rider.kind != kind:
            continue
        # Of the operands of an addition, the one that is computed last must carry it: the other is ready by then.
        carrier = producer.get(max(rider.inputs, key=lambda name: order.get(name, -1)))
        if carrier is None or users[carrier.output] != 1 or "low" in carrier.attributes:
            continue
        if kind == "add":
            other = rider.inputs[0] if rider.inputs[1] == carrier.output else rider.inputs[1]
            if carrier.kind != "conv" or other == carrier.output:
                continue
            carrier.inputs = [*carrier.inputs, other]
        elif carrier.kind == "add" and len(graph.shapes[carrier.output]) not in (2, 3, 4):
            continue  # no layout for it: it may have to run through torch, without the clamp
        elif carrier.kind in ("conv", "linear", "add", "max_pool", "average_pool", "plane_average"):
            carrier.attributes = {**carrier.attributes, **rider.attributes}
        else:
            continue
        gone.add(id(rider))
        producer[rider.output] = carrier
        order[rider.output] = order.pop(carrier.output)
        carrier.output = rider.output
    graph.operations = [o for o in graph.operations if id(o) not in gone]


def _split_phases(graph: Graph) -> None:
    """Turn strides into phases: pixel (y, x) of phase (r, s) is pixel (y * stride + r, x * stride + s) of the image.

    A convolution of stride s then reads planes at stride one, and one split serves all that read the same image at the same stride.
    """
    wanted: dict[tuple[str, tuple[int, int]], tuple[set[int], set[int]]] = {}
    strided = []
    for operation in graph.operations:
        a = operation.attributes
        if operation.kind != "conv" or a["stride"] == (1, 1):
            continue
        shape = graph.shapes[operation.inputs[0]]
        kernel = tuple(graph.constants[operation.weight or ""].shape)
        if shape[2:] == kernel[2:] and a["padding"] == (0, 0):
            operation.attributes = {**a, "stride": (1, 1)}  # one output pixel: there is nothing to step over
            continue
        if graph.dtypes[operation.inputs[0]] != torch.float32 or 0 in shape:
            continue
        strided.append(operation)
        needed = wanted.setdefault((operation.inputs[0], a["stride"]), (set(), set()))
        sizes = zip(needed, _two(kernel[2:]), a["dilation"], a["padding"], a["stride"], strict=True)
        for remainders, n, d, p, s in sizes:
            remainders.update((k * d - p) % s for k in range(n))
    done: dict[tuple[str, tuple[int, int]], str] = {}
    for operation in strided:
        source, stride = key = operation.inputs[0], operation.attributes["stride"]
        rows, columns = wanted[key]
        phases = tuple((r, c) for r in sorted(rows) for c in sorted(columns))
        if key not in done:
            done[key] = f"{source}.phases_{stride[0]}x{stride[1]}"
            n, channels, *size = graph.shapes[source]
            steps = stride[2 - len(size) :]
            graph.shapes[done[key]] = (
                n,
                channels * len(phases),
                *(-(-a // s) for a, s in zip(size, steps, strict=True)),
            )
            graph.dtypes[done[key]] = torch.float32
            split = Operation("split", done[key], [source], operation.name, operation.target)
            split.attributes = {"stride": stride, "phases": phases}
            graph.operations.insert(graph.operations.index(operation), split)
        operation.inputs = [done[key], *operation.inputs[1:]]
        operation.attributes = {**operation.attributes, "phases": phases}


def _two(size: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns; a line of pixels has one row."""
    return size if len(size) == 2 else (1, *size)
