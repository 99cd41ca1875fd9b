"""Small graphs built by hand, so that a kernel can be tested thousands of times without tracing a module each time."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from explorer.inference import choosing
from explorer.inference.execution import Execution
from explorer.inference.graph import Graph, Operation, Ref
from explorer.inference.larger_kernels import Larger, Weighed
from explorer.inference.module import Mode, SparseModule
from explorer.inference.plan import Choice, Plan


def operators_in_torch(engine: SparseModule) -> list[str]:
    """The names of the operators that have no kernel, without their overloads."""
    return [fallback.split(": ")[1].split(".")[0] for fallback in engine.fallbacks]


def conv_graph(
    shape: tuple[int, ...],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    residual: bool = False,
    **attributes: Any,
) -> Graph:
    """One convolution, with an optional residual input."""
    groups = attributes["groups"]
    reference = torch.nn.functional.conv2d(
        torch.zeros(shape),
        weight,
        bias,
        attributes["stride"],
        attributes["padding"],
        attributes["dilation"],
        groups,
    )
    out = tuple(reference.shape)
    inputs = ["x", "other"] if residual else ["x"]
    constants = {"weight": weight} | ({} if bias is None else {"bias": bias})
    operation = Operation(
        "conv",
        "y",
        inputs,
        "conv",
        torch.ops.aten.conv2d.default,
        (
            Ref("x"),
            Ref("weight"),
            None if bias is None else Ref("bias"),
            *(list(attributes[k]) for k in ("stride", "padding", "dilation")),
            groups,
        ),
        attributes=attributes,
        weight="weight",
        bias=None if bias is None else "bias",
    )
    shapes = {"x": shape, "other": out, "y": out, "weight": tuple(weight.shape)}
    return Graph(
        [operation],
        inputs,
        [Ref("y")],
        shapes,
        dict.fromkeys([*shapes, *constants], torch.float32),
        constants,
        {},
        lambda values: values[0],
    )


def kernel_classes() -> list[type]:
    """All classes of kernels, by a look into their modules."""
    from explorer.inference import kernels  # which needs llvmlite

    found: list[type] = []
    for about in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{about.name}")
        here = [thing for thing in vars(module).values() if isinstance(thing, type)]
        found += [thing for thing in here if thing.__module__ == module.__name__ and hasattr(thing, "build")]
    return found


def take_order(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Everything that can runs in this order, whichever is the fastest here."""
    from explorer.inference.orders import LAYERS  # which needs llvmlite

    def find_order(network: Execution, *_: Any) -> None:
        assert network.steps is not None
        network.use_order(network.steps, order if order in network.steps.chains else LAYERS)

    monkeypatch.setattr(choosing, "_find_order", find_order)


def run(graph: Graph, *inputs: torch.Tensor, mode: Mode, threads: int = 1) -> torch.Tensor:
    """Compile a hand-made graph and run it."""
    return SparseModule(graph, inputs, threads, mode)(*inputs)


def relative_error(got: torch.Tensor, wanted: torch.Tensor, usual: torch.Tensor | None = None) -> float:
    """L2 norm of the difference over the norm of what was wanted, or of `usual` where that is larger."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    got, wanted = got.detach().double(), wanted.detach().double()
    size = wanted.norm() if usual is None else torch.maximum(wanted.norm(), usual.double().norm())
    return float((got - wanted).norm() / size.clamp(min=1e-12))


def usual_size(x: torch.Tensor, weight: torch.Tensor, **attributes: Any) -> torch.Tensor:
    """How large each sum of a convolution is with random signs. Products that happen to cancel out leave their rounding errors, which are not the kernel's."""
    return torch.nn.functional.conv2d(x.double() ** 2, weight.double() ** 2, None, **attributes).sqrt()


def preferring(wanted: Callable[[Choice], bool]) -> Callable[..., list[Choice]]:
    """In the place of `Plan.candidates`: only the wanted ones, where there are any. Which kernel is fastest on a small layer is not what a test asks."""
    offered = Plan.candidates

    def candidates(*args: Any, **options: Any) -> list[Choice]:
        several = offered(*args, **options)
        return [choice for choice in several if wanted(choice)] or several

    return candidates


def without_limit(layers: Mapping[int, Weighed], *_: int) -> Larger:
    """In the place of `larger_kernels`: all layers that can."""
    return Larger(
        frozenset(i for i, layer in layers.items() if layer.can),
        frozenset(i for i, layer in layers.items() if layer.winograd),
    )


def compared_convolution(
    size: tuple[int, int],
    outputs: int,
    *,
    images: int = 1,
    channels: int = 5,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    bounds: tuple[float, float] | None = None,
    residual: bool = False,
    threads: int = 1,
    groups: int = 1,
    density: float = 1.0,
    mode: Mode = "dense",
) -> str:
    """Compile one convolution and compare it with the numpy twin, twice and for fewer images; the label of the kernel that ran."""
    from explorer.inference.kernels import conv

    generator = np.random.default_rng(0)
    x = generator.standard_normal((images, channels, *size), np.float32)
    weight = generator.standard_normal((outputs, channels // groups, *kernel)).astype(np.float32)
    weight[generator.random(weight.shape) >= density] = 0
    bias = generator.standard_normal(outputs).astype(np.float32)
    attributes: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    graph = conv_graph(
        x.shape, torch.from_numpy(weight), torch.from_numpy(bias), residual=residual, **attributes
    )
    wanted = torch.from_numpy(conv.reference(x, weight, bias, **attributes))
    inputs = [torch.from_numpy(x)]
    if residual:
        inputs.append(torch.from_numpy(generator.standard_normal(wanted.shape, np.float32)))
        wanted = wanted + inputs[1]
    if bounds:
        graph.operations[0].attributes |= dict(zip(("low", "high"), bounds, strict=True))
        wanted = wanted.clamp(*bounds)
    module = SparseModule(graph, tuple(inputs), threads, mode)
    for _ in range(2):  # the second call finds what the first has left in the buffers
        assert relative_error(module(*inputs), wanted) < 1e-5
    if images > 1:
        fewer = [value[: images - 1] for value in inputs]
        assert relative_error(module(*fewer), wanted[: images - 1]) < 1e-5
    return module.choices["conv"]
