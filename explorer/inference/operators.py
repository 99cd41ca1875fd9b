"""What torch's operators mean: each that has a native kernel is read into an `Operation` of its own kind, every other one stays a torch call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from explorer.inference.activations import Activation
from explorer.inference.graph import Graph, Operation, Ref, base_name, bound_arguments
from explorer.inference.in_place import OnCopy, is_in_place

_INFINITY = float("inf")


def _module_name(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def read_operator(node: torch.fx.Node, output: str, args: Any, kwargs: Any, graph: Graph) -> Operation:
    """The operation of a node whose value is called `output`; its arguments name values of `graph`."""
    assert callable(node.target)
    target: Any = node.target
    if base_name(target) in ("view", "_unsafe_view") and not any(
        isinstance(part, torch.dtype) for part in args
    ):
        # A view needs the strides that were traced; native tensors have others. Nobody writes through it, so a copy will do.
        target = torch.ops.aten.reshape.default
    elif is_in_place(target):
        # Nobody reads the old value, so a new one will do; written in place, it could change a concatenation that shares its memory.
        packet = getattr(torch.ops.aten, base_name(target).removesuffix("_"), None)
        target = getattr(packet, target._overloadname, None) or OnCopy(target)  # noqa: SLF001 - the only way to name overloads
    operation = Operation("torch", output, [], _module_name(node), target, tuple(args), dict(kwargs))
    reader = _READERS.get(base_name(node.target).rstrip("_"))
    if reader is not None and _is_native((output, *operation.references()), graph):
        reader(operation, bound_arguments(target, args, kwargs), graph)
    return operation


def _is_native(names: Sequence[str], graph: Graph) -> bool:
    """Whether kernels know values like these: tensors of float32 whose size is known, and not zero.

    No tensor is a tuple, or a number that is computed. Unknown is the size of what `nonzero` finds.
    """
    return all(
        name in graph.shapes and 0 not in graph.shapes[name] and graph.dtypes[name] == torch.float32
        for name in names
    )


def _pair(value: Any, default: int = 0) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    if not values:
        values = [default]
    return (int(values[0]), int(values[-1]))


def _repeat(value: Any, count: int) -> list[int]:
    """One number per axis, from one for all or one each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _constant(item: Any, graph: Graph) -> str | None:
    return item.name if isinstance(item, Ref) and item.name in graph.constants else None


def _layer_name(weight: str, graph: Graph, otherwise: str) -> str:
    full = graph.parameter_names.get(weight)
    return otherwise if full is None else full.removesuffix("weight").rstrip("._")


def _conv(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    weight, bias = _constant(a["weight"], graph), _constant(a["bias"], graph)
    shape = graph.shapes[a["input"].name]
    if weight is None or (a["bias"] is not None and bias is None):
        return
    if len(shape) not in (3, 4) or len(graph.shapes[weight]) != len(shape):
        return
    if isinstance(a["padding"], str):
        spans = [
            d * (k - 1)
            for k, d in zip(graph.shapes[weight][2:], _repeat(a["dilation"], len(shape) - 2), strict=True)
        ]
        spans = [0] * len(spans) if a["padding"] == "valid" else spans
        a = {**a, "padding": [span // 2 for span in spans]}
        beyond = [span - span // 2 for span in spans]
    else:
        beyond = a["padding"]
    flat = len(shape) == 3  # a line of pixels is an image of one row
    operation.kind, operation.inputs = "conv", [a["input"].name]
    operation.weight, operation.bias = weight, bias
    operation.attributes = {
        "stride": (1, _pair(a["stride"])[1]) if flat else _pair(a["stride"]),
        "padding": (0, _pair(a["padding"])[1]) if flat else _pair(a["padding"]),
        "beyond": (0, _pair(beyond)[1]) if flat else _pair(beyond),
        "dilation": (1, _pair(a["dilation"])[1]) if flat else _pair(a["dilation"]),
        "groups": int(a["groups"]),
    }
    operation.name = _layer_name(weight, graph, operation.name)


def _pad(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    """Zeros around images or lines of pixels."""
    name, amounts = next(iter(a.values())).name, list(a["pad"])
    rank = len(graph.shapes.get(name, ()))
    if name in graph.constants or a.get("mode", "constant") != "constant" or a.get("value"):
        return
    if rank not in (3, 4) or len(amounts) > 2 * (rank - 2) or min(amounts, default=-1) < 0:
        return
    left, right, top, bottom = (*amounts, 0, 0)[:4]
    operation.kind, operation.inputs = "pad", [name]
    operation.attributes = {"padding": (top, left), "beyond": (bottom, right)}


def _linear(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    weight, bias = _constant(a["weight"], graph), _constant(a["bias"], graph)
    if weight is None or (a["bias"] is not None and bias is None):
        return
    if len(graph.shapes[a["input"].name]) < 2 or len(graph.shapes[weight]) != 2:
        return  # a weight of one dimension has one output, which is no dimension of the result
    operation.kind, operation.inputs = "linear", [a["input"].name]
    operation.weight, operation.bias = weight, bias
    operation.name = _layer_name(weight, graph, operation.name)


def _batch_norm(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    if a.get("training"):
        return
    names = {k: _constant(a[k], graph) for k in ("weight", "bias", "running_mean", "running_var")}
    if names["running_mean"] is None or names["running_var"] is None:
        return
    operation.kind, operation.inputs = "batch_norm", [a["input"].name]
    operation.attributes = {**names, "eps": float(a["eps"])}


def _clamp(low: float, high: float) -> Callable[[Operation, dict[str, Any], Graph], None]:
    def read(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
        bounds = [a.get("min_val", a.get("min", low)), a.get("max_val", a.get("max", high))]
        bounds = [otherwise if b is None else b for b, otherwise in zip(bounds, (low, high), strict=True)]
        if not all(isinstance(b, int | float) for b in bounds) or not bounds[0] <= 0 <= bounds[1]:
            return
        operation.kind, operation.inputs = "clamp", [next(iter(a.values())).name]
        operation.attributes = {"low": float(bounds[0]), "high": float(bounds[1])}

    return read


def _activation(kind: str, *parameters: str) -> Callable[[Operation, dict[str, Any], Graph], None]:
    def read(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
        values = tuple(float(a[p]) for p in parameters)
        which = "gelu_tanh" if a.get("approximate") == "tanh" else kind
        if kind == "elu" and values[2] <= 0:
            return
        operation.kind, operation.inputs = "activation", [next(iter(a.values())).name]
        operation.attributes = {"activation": Activation(which, values)}

    return read


def _arithmetic(kind: str) -> Callable[[Operation, dict[str, Any], Graph], None]:
    """Addition and multiplication of two values, or of a value with a number or constant, which is "affine": see `_affine`."""

    def read(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
        left, right = a["self"], a["other"]
        if a.get("alpha", 1) != 1 or a.get("rounding_mode") is not None:
            return
        if kind in ("add", "mul") and (not isinstance(left, Ref) or left.name in graph.constants):
            left, right = right, left
        if not isinstance(left, Ref) or left.name in graph.constants:
            return
        if kind == "mul":
            left, right = (_unexpanded(operation, ref, graph) for ref in (left, right))
        shape = graph.shapes.get(left.name)
        if not isinstance(right, Ref) or right.name in graph.constants:
            _affine(operation, kind, left.name, right, graph)
        elif kind in ("add", "mul") and graph.shapes.get(right.name) == shape:
            operation.kind, operation.inputs = kind, [left.name, right.name]
        elif kind == "mul":
            _mul_by_channel(operation, left.name, right.name, graph)

    return read


def _unexpanded(operation: Operation, ref: Any, graph: Graph) -> Any:
    """One value per image and channel, where it was expanded to all pixels: a product spreads it itself."""
    for before in graph.operations if isinstance(ref, Ref) else []:
        if before.output == ref.name and base_name(before.target) in ("expand", "expand_as"):
            source = before.args[0]
            if graph.shapes.get(source.name, ())[2:] == (1, 1) and source.name not in graph.constants:
                operation.args = tuple(source if a == ref else a for a in operation.args)
                return source
    return ref


def _mul_by_channel(operation: Operation, left: str, right: str, graph: Graph) -> None:
    """(N, C, H, W) times (N, C, 1, 1): the larger one is the first input."""
    shapes = graph.shapes[left], graph.shapes[right]
    if any(len(shape) != 4 for shape in shapes) or shapes[0][:2] != shapes[1][:2]:
        return
    if (1, 1) not in (shapes[0][2:], shapes[1][2:]):
        return
    if shapes[0][2:] == (1, 1):
        left, right = right, left
    operation.kind, operation.inputs = "mul", [left, right]
    operation.attributes = {"one_value": True}


def _affine(operation: Operation, kind: str, name: str, other: Any, graph: Graph) -> None:
    """A number or one value per channel is added, subtracted, multiplied or divided by.

    `axis` is where the channels lie: 1, -1, or None for a single number.
    """
    shape, axis = graph.shapes[name], None
    if isinstance(other, Ref):
        # Leading ones change nothing, as long as they do not make the result larger.
        constant = graph.shapes[other.name]
        sizes = (1,) * (len(shape) - len(constant)) + tuple(constant)
        if graph.dtypes[other.name] != torch.float32 or graph.shapes[operation.output] != shape:
            return
        wide = [i for i, n in enumerate(sizes) if n != 1]
        if len(wide) > 1 or (wide and wide[0] not in (1, len(shape) - 1)):
            return
        if wide:
            axis = 1 if wide[0] == 1 else -1
        other = other.name
    elif not isinstance(other, int | float):
        return
    operation.kind, operation.inputs = "affine", [name]
    operation.attributes = {"axis": axis, "arithmetic": kind, "other": other}


def _concat(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    """Over channels only."""
    tensors = a["tensors"]
    if len(graph.shapes[operation.output]) != 4 or a["dim"] % 4 != 1:
        return
    if any(t.name in graph.constants or len(graph.shapes[t.name]) != 4 for t in tensors):
        return  # torch lets an empty tensor of one dimension take part
    operation.kind, operation.inputs = "concat", [t.name for t in tensors]


def _slice(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    """Neighbouring channels."""
    shape = graph.shapes[a["self"].name]
    if len(shape) != 4 or a["dim"] % 4 != 1 or a["step"] != 1:
        return
    start = a["start"] or 0
    first = min(start + shape[1] if start < 0 else start, shape[1])
    operation.kind, operation.inputs = "slice", [a["self"].name]
    operation.attributes = {"first": first}


_DECOMPOSED_NORM = "_native_batch_norm_legit_no_training"
"""What `run_decompositions` makes of a batch norm: the normalised values, and two tensors that are empty."""


def name_items(graph: Graph) -> None:
    """Give what is taken out of a tuple the operator that yields it alone, where there is one; nobody then reads the tuple, see lower.py."""
    producer = {o.output: o for o in graph.operations}
    for item in graph.operations:
        if item.target is not operator.getitem:
            continue
        whole = producer.get(item.args[0].name)
        if whole is None:
            continue
        base = base_name(whole.target)
        if base in ("chunk", "split", "split_with_sizes"):
            _slice_of(item, bound_arguments(whole.target, whole.args, whole.kwargs), graph)
        elif base == _DECOMPOSED_NORM and item.args[1] == 0:
            a = bound_arguments(whole.target, whole.args, whole.kwargs)
            if _is_native((*whole.references(), item.output), graph):
                _batch_norm(item, a, graph)
            if item.kind == "batch_norm":
                item.name, item.target = whole.name, torch.ops.aten.batch_norm.default
                statistics = (a[name] for name in ("weight", "bias", "running_mean", "running_var"))
                item.args = (a["input"], *statistics, False, a["momentum"], a["eps"], False)


def _slice_of(item: Operation, a: dict[str, Any], graph: Graph) -> None:
    """`item` is a part of a chunk or split over channels, of these arguments: a slice of what was split."""
    source, position = a["self"].name, item.args[1]
    if not _is_native((source, item.output), graph):
        return
    shape = graph.shapes[source]
    if len(shape) != 4 or a["dim"] % 4 != 1:
        return
    if "chunks" in a:
        first = position * -(-shape[1] // a["chunks"])
    else:
        sizes = a["split_size"] if "split_size" in a else a["split_sizes"]
        before = [sizes] * position if isinstance(sizes, int) else sizes[:position]
        if not all(isinstance(size, int) for size in before):
            return  # computed from values
        first = sum(before)
    last = first + graph.shapes[item.output][1]
    item.kind, item.inputs, item.attributes = "slice", [source], {"first": first}
    item.target, item.args, item.kwargs = torch.ops.aten.slice.Tensor, (Ref(source), 1, first, last), {}


def _max_pool(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    if len(graph.shapes[a["self"].name]) != 4:
        return
    size = _pair(a["kernel_size"])
    operation.kind, operation.inputs = "max_pool", [a["self"].name]
    operation.attributes = {
        "size": size,
        "stride": _pair(a["stride"]) if a["stride"] else size,
        "padding": _pair(a["padding"]),
        "dilation": _pair(a["dilation"], 1),
    }


def _average_pool(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    if len(graph.shapes[a["self"].name]) != 4:
        return
    size, padding = _pair(a["kernel_size"]), _pair(a["padding"])
    operation.inputs = [a["self"].name]
    if size == graph.shapes[a["self"].name][2:] and padding == (0, 0) and a["divisor_override"] is None:
        operation.kind = "plane_average"
        return
    operation.kind = "average_pool"
    operation.attributes = {
        "size": size,
        "stride": _pair(a["stride"]) if a["stride"] else size,
        "padding": _pair(a["padding"]),
        "dilation": (1, 1),
        "count_padding": bool(a["count_include_pad"]),
        "divisor": a["divisor_override"],
    }


def _adaptive_average(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    source, out = graph.shapes[a["self"].name], graph.shapes[operation.output]
    if len(source) != 4:
        return
    operation.inputs = [a["self"].name]
    if source == out:
        operation.kind = "same"
    elif out[2:] == (1, 1):
        operation.kind = "plane_average"
    else:
        operation.kind = "adaptive_average"


def _upsample(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    """By powers of two, which torch's arithmetic with float32 scales meets exactly."""
    name = next(iter(a.values())).name
    before, after = graph.shapes[name], graph.shapes[operation.output]
    if len(before) != 4 or 0 in before:
        return
    scale = tuple(n // m for m, n in zip(before[2:], after[2:], strict=True))
    given = a.get("scale_factors") or [a.get("scales_h"), a.get("scales_w")]
    asked = all(f is None or f == s for f, s in zip(given, scale, strict=True))
    even = all(
        s > 0 and s & (s - 1) == 0 and s * m == n
        for s, m, n in zip(scale, before[2:], after[2:], strict=True)
    )
    if asked and even:
        operation.kind, operation.inputs, operation.attributes = "upsample", [name], {"scale": scale}


def _mean(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    shape = graph.shapes[a["self"].name]
    dims = {d % len(shape) for d in a.get("dim") or ()}  # of all elements there is an overload without
    if len(shape) == 4 and dims == {2, 3} and a.get("dtype") is None:
        operation.kind, operation.inputs = "plane_average", [a["self"].name]


def _same(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    if not a.get("train", False):
        operation.kind, operation.inputs = "same", [next(iter(a.values())).name]


def _converted(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    """A conversion to the type that a value has anyway, as libraries write it to be sure."""
    name = next(iter(a.values())).name
    is_strided = a.get("layout") in (None, torch.strided)
    if is_strided and graph.dtypes.get(name) == graph.dtypes.get(operation.output):
        operation.kind, operation.inputs = "same", [name]


def _reshape(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    """Between (N, C) and (N, C, 1, 1), which are the same vectors; and images or lines of pixels to vectors."""
    name = next(iter(a.values())).name
    before, after = graph.shapes.get(name, ()), graph.shapes[operation.output]
    if name in graph.constants or len(before) < 2:
        return
    if before == after or (
        before[:2] == after[:2] and {*before[2:], *after[2:]} == {1} and {len(before), len(after)} == {2, 4}
    ):
        operation.kind, operation.inputs = "same", [name]
    elif len(before) in (3, 4) and len(after) == 2 and before[0] == after[0]:
        operation.kind, operation.inputs = "flatten", [name]


def _layer_norm(operation: Operation, a: dict[str, Any], graph: Graph) -> None:
    shape = graph.shapes[a["input"].name]
    names = {k: _constant(a[k], graph) for k in ("weight", "bias")}
    if len(shape) < 3 or list(a["normalized_shape"]) != [shape[-1]]:
        return
    if any(a[k] is not None and names[k] is None for k in names):
        return
    operation.kind, operation.inputs = "layer_norm", [a["input"].name]
    operation.attributes = {**names, "eps": float(a["eps"])}


_READERS: dict[str, Callable[[Operation, dict[str, Any], Graph], None]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "relu": _clamp(0.0, _INFINITY),
    "relu6": _clamp(0.0, 6.0),
    "hardtanh": _clamp(-1.0, 1.0),
    "clamp": _clamp(-_INFINITY, _INFINITY),
    "clamp_min": _clamp(-_INFINITY, _INFINITY),
    "clamp_max": _clamp(-_INFINITY, _INFINITY),
    "sigmoid": _activation("sigmoid"),
    "hardsigmoid": _activation("hard_sigmoid"),
    "hardswish": _activation("hard_swish"),
    "silu": _activation("silu"),
    "gelu": _activation("gelu"),
    "tanh": _activation("tanh"),
    "leaky_relu": _activation("leaky_relu", "negative_slope"),
    "elu": _activation("elu", "alpha", "scale", "input_scale"),
    "add": _arithmetic("add"),
    "sub": _arithmetic("sub"),
    "rsub": _arithmetic("rsub"),
    "mul": _arithmetic("mul"),
    "div": _arithmetic("div"),
    "pad": _pad,
    "constant_pad_nd": _pad,
    "cat": _concat,
    "slice": _slice,
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_average,
    "upsample_nearest2d": _upsample,
    "_upsample_nearest_exact2d": _upsample,
    "mean": _mean,
    "dropout": _same,
    "clone": _same,
    "contiguous": _same,
    "detach": _same,
    "alias": _same,
    "to": _converted,
    "_to_copy": _converted,
    "type_as": _converted,
    "flatten": _reshape,
    "view": _reshape,
    "reshape": _reshape,
}
