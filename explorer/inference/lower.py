"""Makes the graph cheaper without changing what it computes: folds batch normalisation, lets convolutions add and clamp, removes strides."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from explorer.inference.graph import Graph, Operation, Ref, drop_unread, with_values
from explorer.inference.heads import find_attention
from explorer.inference.rearrange import find_rearrangements


def lower(graph: Graph) -> Graph:
    """Return a new graph that computes the same with less work.

    - "same" operations are gone, and zeros around pixels are the padding of the convolutions that read them,
    - a batch norm after a convolution or linear layer is folded into its weight and bias; one on its own becomes a scale and a shift,
    - an addition whose other operand is ready, and then a clamp or another activation, ride on the convolution before them; a depthwise one takes no
      addition, and no convolution a second,
    - a convolution with a stride (that is not depthwise) reads the phases of its input instead,
    - attention over heads that are ranges of features becomes one operation,
    - so does what only moves pixels to tokens, or tokens to pixels.

    The captured graph is left as it was, so that it can be lowered again with new weights.
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
    _fold_pads(lowered)
    find_attention(lowered)
    find_rearrangements(lowered)
    _fold_batch_norm(lowered)
    _compute_affine(lowered)
    drop_unread(lowered)
    _mark_depthwise(lowered)
    _ride(lowered, "add")
    _ride(lowered, "clamp")
    _ride(lowered, "activation")
    _split_phases(lowered)
    return lowered


def through_torch(graph: Graph) -> Graph:
    """Return a copy of a captured graph in which every operation runs as torch's own operator, for machines without machine code."""
    operations = [replace(o, kind="torch") for o in graph.operations]
    return replace(graph, operations=operations, constants=dict(graph.constants))


def _rename(graph: Graph, old: str, new: str) -> None:
    """Whoever reads `old` reads `new` from now on."""

    def renamed(ref: Ref) -> Ref:
        return Ref(new) if ref.name == old else ref

    for operation in graph.operations:
        operation.inputs = [new if name == old else name for name in operation.inputs]
        operation.args = with_values(operation.args, renamed)
        operation.kwargs = with_values(operation.kwargs, renamed)
    graph.outputs = with_values(graph.outputs, renamed)


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


def _fold_pads(graph: Graph) -> None:
    """Let convolutions pad what was padded for them alone; any other padding is left to torch."""
    returned = {output.name for output in graph.outputs if isinstance(output, Ref)}
    readers = graph.readers()
    folded: set[int] = set()
    # Of several in a row the last is folded first.
    for pad in reversed([o for o in graph.operations if o.kind == "pad"]):
        [source], mine = pad.inputs, readers.get(pad.output, [])
        fits = (
            pad.output not in returned
            and all(o.kind == "conv" and o.inputs == [pad.output] for o in mine)
            and graph.dtypes[source] == torch.float32
        )
        if not fits:
            pad.kind, pad.inputs = "torch", []
            continue
        for conv in mine:
            both = {
                side: tuple(map(sum, zip(conv.attributes[side], pad.attributes[side], strict=True)))
                for side in ("padding", "beyond")
            }
            conv.inputs, conv.attributes = [source], {**conv.attributes, **both}
        readers[source] = [o for o in readers[source] if o is not pad] + mine
        folded.add(id(pad))
    graph.operations = [o for o in graph.operations if id(o) not in folded]


def _compute_affine(graph: Graph) -> None:
    """Give every "affine" its constants: one scale and one shift per channel, or one for all."""
    for operation in graph.operations:
        if operation.kind not in ("affine", "batch_norm"):
            continue
        a, c = operation.attributes, graph.constants
        if operation.kind == "batch_norm":
            scale, shift = _batch_norm(graph, a)
            axis = 1
        else:
            other, axis = a["other"], a["axis"]
            value = (
                c[other].double() if isinstance(other, str) else torch.tensor(float(other)).double()
            ).reshape(-1)
            one, nothing = torch.ones_like(value), torch.zeros_like(value)
            scale, shift = {
                "add": (one, value),
                "sub": (one, -value),
                "rsub": (-one, value),
                "mul": (value, nothing),
                "div": (1 / value, nothing),
            }[a["arithmetic"]]
        names = {"scale": f"{operation.output}.scale", "shift": f"{operation.output}.shift"}
        c[names["scale"]], c[names["shift"]] = scale.float(), shift.float()
        operation.kind, operation.attributes = "affine", {**names, "axis": axis}


def _batch_norm(graph: Graph, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the shift of a batch norm, float64."""
    c = graph.constants
    scale = torch.rsqrt(c[a["running_var"]].double() + a["eps"])
    if a["weight"] is not None:
        scale = scale * c[a["weight"]].double()
    shift = -c[a["running_mean"]].double() * scale
    if a["bias"] is not None:
        shift = shift + c[a["bias"]].double()
    return scale, shift


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
        c = graph.constants
        gain, shift = _batch_norm(graph, norm.attributes)
        if before.bias is not None:
            shift = shift + c[before.bias].double() * gain
        if before.gain is not None:
            gain = gain * c[before.gain]
        before.gain, before.bias = f"{norm.output}.gain", f"{norm.output}.bias"
        c[before.gain], c[before.bias] = gain, shift.float()
        before.output = norm.output
        producer[norm.output] = before
        folded.add(norm.output)
    graph.operations = [o for o in graph.operations if not (o.kind == "batch_norm" and o.output in folded)]


_CARRIERS = {
    "add": ("conv", "linear"),
    "clamp": (
        "conv",
        "linear",
        "add",
        "mul",
        "affine",
        "max_pool",
        "average_pool",
        "adaptive_average",
        "plane_average",
    ),
    "activation": ("conv", "linear", "add", "mul", "affine"),
}
"""What the kernel of an operation can do at its end."""


def _ride(graph: Graph, kind: str) -> None:
    """Let each operation of `kind` ride on the operation before it, if nobody else reads the value between them."""
    users = graph.users()
    order = {o.output: i for i, o in enumerate(graph.operations)}
    producer = {o.output: o for o in graph.operations}
    gone: set[int] = set()
    for rider in list(graph.operations):
        if rider.kind != kind:
            continue
        # Of the operands of an addition, the one that is computed last must carry it: the other is ready by then.
        carrier = producer.get(max(rider.inputs, key=lambda name: order.get(name, -1)))
        if carrier is None or users[carrier.output] != 1 or carrier.kind not in _CARRIERS[kind]:
            continue
        if {"low", "activation"} & set(carrier.attributes):
            continue
        if kind == "add":
            other = rider.inputs[0] if rider.inputs[1] == carrier.output else rider.inputs[1]
            if other == carrier.output or (carrier.kind == "linear" and _is_vector(graph, carrier)):
                continue
            if len(carrier.inputs) > 1 or carrier.attributes.get("depthwise"):
                continue
            carrier.inputs = [*carrier.inputs, other]
        elif carrier.kind in ("add", "mul", "affine") and len(graph.shapes[carrier.output]) not in (2, 3, 4):
            continue  # no layout for it: it may have to run through torch, without the rider
        elif (
            kind == "activation"
            and carrier.kind in ("conv", "linear")
            and (_is_vector(graph, carrier) or not rider.attributes["activation"].is_short)
        ):
            continue  # a step of its own is no slower; kernels for one pixel compute single numbers
        else:
            carrier.attributes = {**carrier.attributes, **rider.attributes}
        gone.add(id(rider))
        producer[rider.output] = carrier
        order[rider.output] = order.pop(carrier.output)
        carrier.output = rider.output
    graph.operations = [o for o in graph.operations if id(o) not in gone]


def _is_vector(graph: Graph, operation: Operation) -> bool:
    """Whether its value is (N, C) or (N, C, 1, 1)."""
    shape = graph.shapes[operation.output]
    return len(shape) == 2 or shape[2:] == (1, 1)


_DEPTHWISE_STRIDE, _WIDEST_DEPTHWISE = 2, 8
"""Pixels of more than two columns would need more shuffles than they save; the second is the columns from the first to the last tap, by as many vector
elements sums are shifted."""


def _mark_depthwise(graph: Graph) -> None:
    """Find convolutions that filter each channel on its own: they have a kernel of their own, which takes strides as they are."""
    for operation in graph.operations:
        if operation.kind != "conv" or len(operation.inputs) > 1:
            continue
        a, weight = operation.attributes, graph.shapes[operation.weight or ""]
        per_channel = a["groups"] == weight[0] == graph.shapes[operation.inputs[0]][1] and a["groups"] > 1
        span = (weight[-1] - 1) * a["dilation"][1]
        if per_channel and a["stride"][1] <= _DEPTHWISE_STRIDE and span <= _WIDEST_DEPTHWISE:
            operation.attributes = {**a, "depthwise": True}


def _split_phases(graph: Graph) -> None:
    """Turn strides into phases: pixel (y, x) of phase (r, s) is pixel (y * stride + r, x * stride + s) of the image.

    A convolution of stride s then reads planes at stride one, and one split serves all that read the same image at the same stride.
    """
    wanted: dict[tuple[str, tuple[int, int]], tuple[set[int], set[int]]] = {}
    strided = []
    for operation in graph.operations:
        a = operation.attributes
        if operation.kind != "conv" or a["stride"] == (1, 1) or a.get("depthwise"):
            continue
        shape = graph.shapes[operation.inputs[0]]
        kernel = tuple(graph.constants[operation.weight or ""].shape)
        if shape[2:] == kernel[2:] and not operation.is_padded:
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
