"""Operators between convolutions: activations, products, scales, concatenations, slices, flattening and pooling, in every layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import explorer
from explorer.errors import EngineError
from explorer.inference import SparseModule
from tests.inference.graphs import operators_in_torch, relative_error
from tests.inference.test_activations import TORCH
from tests.inference.test_kernels import ISAS, TOLERANCE, run_by


class Function(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def check(
    module: nn.Module, *inputs: Tensor, fallbacks: tuple[str, ...] = (), **options: Any
) -> SparseModule:
    """The engine's outputs are torch's: twice, since the second run finds memory that others have used, and for smaller batches."""
    module.eval()
    engine = explorer.compile(module, inputs, **options)
    assert tuple(operators_in_torch(engine)) == fallbacks
    images = len(inputs[0])
    with torch.no_grad():
        for n in (images, images, 1, images):
            some = [x[:n] for x in inputs]
            got, wanted = engine(*some), module(*some)
            for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, wanted)), strict=True):
                assert relative_error(a, b) < TOLERANCE
    return engine


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", TORCH)
def test_an_activation_between_layers_equals_torch_in_every_layout(kind: str, threads: int) -> None:
    planes = Function(lambda m, x: m.b(TORCH[kind](m.a(x))), a=conv(3, 6), b=conv(6, 5))
    check(planes, torch.randn(2, 3, 7, 9), threads=threads)
    vectors = Function(lambda m, x: m.b(TORCH[kind](m.a(x))), a=nn.Linear(9, 21), b=nn.Linear(21, 3))
    check(vectors, torch.randn(4, 9), threads=threads)
    check(vectors, torch.randn(2, 5, 9), threads=threads)  # tokens


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_keeps_the_gaps_of_planes_zero(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(m.a(x)) + 1
        y = F.hardsigmoid(y) * m.norm(y) - 0.5
        return m.b(torch.cat([y, 1 - y, F.gelu(y)], 1))

    module = Function(forward, a=conv(3, 6), norm=nn.BatchNorm2d(6), b=conv(18, 5, 5))
    module.norm.running_mean.normal_()
    check(module, torch.randn(2, 3, 7, 9))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("size", [(4, 4), (9, 11)])
def test_short_activations_ride_on_convolutions_with_and_without_a_residual(
    size: tuple[int, int], mode: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = F.hardswish(m.a(x))
        z = F.hardsigmoid(m.b(y) + y)
        return m.line(F.leaky_relu(m.c(z), 0.2).flatten(2).transpose(1, 2)), F.leaky_relu(m.d(z), 0.1)

    module = Function(
        forward,
        a=conv(3, 8),
        b=conv(8, 8, 1),
        c=conv(8, 8, 5, stride=2),
        d=conv(8, 6, groups=2),
        line=nn.Linear(8, 3),
    )
    engine = check(module, torch.randn(2, 3, *size), sparse=mode)
    assert "activation" not in [engine._network.graph.operations[i].kind for i in engine._network.plan.native]


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_product_equals_torch_with_equal_shapes_and_with_one_value_a_channel(shift: float) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x)
        scale = torch.sigmoid(m.gate(F.adaptive_avg_pool2d(y, 1)))
        return (
            m.b(torch.relu(y * m.c(y)) + shift),
            m.b(y * scale),
            m.b(F.relu6(scale * y + shift)),
            scale * scale,
        )

    module = Function(forward, a=conv(3, 8), b=conv(8, 4), c=conv(8, 8, 1), gate=nn.Conv2d(8, 8, 1))
    check(module, torch.randn(3, 3, 6, 5))


def test_squeeze_and_excite_with_linear_layers_and_an_expansion_is_native() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        n, c = y.shape[:2]
        scale = m.up(F.silu(m.down(F.adaptive_avg_pool2d(y, 1).view(n, c)))).view(n, c, 1, 1)
        return m.b(y * torch.sigmoid(scale).expand_as(y))

    module = Function(forward, a=conv(3, 8), b=conv(8, 4), down=nn.Linear(8, 2), up=nn.Linear(2, 8))
    check(module, torch.randn(3, 3, 6, 5))


class Scaled(nn.Module):
    """Constants of every shape that is one value per channel, or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.line, self.last = conv(3, 6), conv(6, 4), nn.Linear(7, 9), nn.Linear(9, 4)
        self.norm, self.norm_1d = nn.BatchNorm2d(6), nn.BatchNorm1d(4)
        for name, shape in (
            ("c", (6, 1, 1)),
            ("d", (1, 6, 1, 1)),
            ("f", (9,)),
            ("one", (1,)),
            ("whole", (6, 5, 5)),
        ):
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        y = torch.relu(self.norm(y * self.c + self.d)) / self.d - self.one
        z = self.last(torch.relu(self.line(tokens) * self.f - self.f))
        v = self.norm_1d(torch.relu(self.b(2 - y * 3).mean((2, 3))))
        return self.b(y), z, v * 0.5 + 1, torch.relu(y * self.whole)


def test_scales_and_shifts_equal_torch_and_follow_new_weights() -> None:
    network, other = Scaled().eval(), Scaled().eval()
    x, tokens = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 7)
    for module in (network, other):
        for norm in (module.norm, module.norm_1d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    engine = explorer.compile(network, (x, tokens))
    assert [f.split(": ")[1] for f in engine.fallbacks] == [
        "mul.Tensor",
        "relu.default",
    ]  # by a constant of many values
    with torch.no_grad():
        for module, choose in ((network, True), (other, True), (network, False)):
            engine.update_weights(module, choose=choose)
            for got, wanted in zip(engine(x, tokens), module(x, tokens), strict=True):
                assert relative_error(got, wanted) < TOLERANCE


def test_a_scale_per_channel_is_native_also_where_its_operand_comes_from_torch() -> None:
    module = Function(
        lambda m, x: torch.relu(m.norm(torch.sin(x)) + m.a(x)), norm=nn.BatchNorm2d(3), a=conv(3, 3)
    )
    module.norm.running_mean.normal_()
    check(module, torch.randn(2, 3, 5, 6), fallbacks=("sin",))


# ---- concatenations and slices


def copies(engine: SparseModule) -> list[str]:
    """What each concatenation and slice of the network does."""
    assert engine._network.steps is not None
    kinds = [engine._network.graph.operations[i].kind for i in engine._network.plan.native]
    return [
        label
        for kind, label in zip(kinds, engine._network.steps.labels, strict=True)
        if kind in ("concat", "slice")
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_branches_are_written_side_by_side_without_a_copy(threads: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        pooled = m.d(F.avg_pool2d(y, 3, 1, 1))
        return m.out(
            torch.relu(torch.cat([m.a(y), F.silu(m.b(y)), m.c(y), pooled, F.max_pool2d(y, 3, 1, 1)], 1))
        )

    module = Function(
        forward,
        stem=conv(3, 8),
        a=conv(8, 3, 1),
        b=conv(8, 5),
        c=conv(8, 4, 5),
        d=conv(8, 2, 1),
        out=conv(22, 4),
    )
    engine = check(module, torch.randn(2, 3, 9, 11), threads=threads)
    assert copies(engine) == ["in place"]


@pytest.mark.parametrize("size", [(4, 4), (9, 11)])
def test_a_dense_block_needs_no_copies(size: tuple[int, int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        features = [m.stem(x)]
        for i in range(4):
            y = torch.cat(features, 1)
            features.append(m.get_submodule(f"conv{i}")(torch.relu(m.get_submodule(f"norm{i}")(y))))
        return m.out(F.avg_pool2d(torch.relu(torch.cat(features, 1)), 2))

    layers = {f"conv{i}": conv(8 + 4 * i, 4) for i in range(4)} | {
        f"norm{i}": nn.BatchNorm2d(8 + 4 * i) for i in range(4)
    }
    module = Function(forward, stem=conv(3, 8), out=conv(24, 5), **layers)
    for layer in layers.values():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
    engine = check(module, torch.randn(2, 3, *size))
    assert copies(engine) == ["in place"] * 5


def test_a_concatenation_of_concatenations_needs_no_copies() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.a(x), m.b(x), m.c(x)
        return m.out(torch.cat([torch.cat([a, b], 1), torch.cat([c], 1)], 1)) + m.one(a)

    module = Function(forward, a=conv(3, 4), b=conv(3, 5), c=conv(3, 6), one=conv(4, 3), out=conv(15, 3))
    engine = check(module, torch.randn(2, 3, 6, 7))
    assert copies(engine) == ["in place"] * 3


def test_parts_that_cannot_lie_where_they_belong_are_copied() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        a, b = m.a(x), m.b(x)
        twice, turned = torch.cat([a, a], 1), torch.cat([b, a], 1)
        shared = torch.cat([x, b, torch.sin(a)], 1)
        return m.c(twice), m.d(turned), m.e(shared), twice, a

    module = Function(forward, a=conv(3, 4), b=conv(3, 5), c=conv(8, 3), d=conv(9, 3), e=conv(12, 3))
    engine = check(module, torch.randn(2, 3, 6, 7), fallbacks=("sin",))
    assert copies(engine).count("copy") >= 2


def test_the_input_may_be_part_of_a_concatenation() -> None:
    module = Function(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=conv(3, 4), b=conv(7, 3))
    engine = check(module, torch.randn(3, 3, 6, 7))
    assert copies(engine) == ["in place"]


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_a_sum_does_not_overwrite_a_part_of_a_concatenation(mode: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        b = m.b(x)
        y = m.c(torch.cat([m.a(x), b], 1))
        return m.e(m.d(y) + b)  # the last reader of the concatenation's memory reads a part of it

    module = Function(forward, a=conv(3, 2), b=conv(3, 24), c=conv(26, 8), d=conv(8, 24, 1), e=conv(24, 3))
    # Sparse rows are computed in the order of their nonzeros, not of their channels.
    module.d.weight.data[torch.rand_like(module.d.weight) < 0.7] = 0
    check(module, torch.randn(3, 3, 9, 11), sparse=mode)


def test_slices_are_read_where_they_lie() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x)
        p, q = y.chunk(2, 1)
        r, s, t = torch.split(y, [3, 1, 4], 1)
        u, _ = y.split(5, 1)
        whole = torch.cat([p, q], 1)  # lies there already
        return (
            m.b(p) + m.b(q),
            m.c(torch.cat([m.b(q), p], 1)),
            r,
            m.d(s * 2),
            t,
            m.e(y[:, 2:-1]),
            m.e(u),
            m.f(whole),
        )

    module = Function(
        forward, a=conv(3, 8), b=conv(4, 4), c=conv(8, 3), d=conv(1, 3), e=conv(5, 3), f=conv(8, 3)
    )
    engine = check(module, torch.randn(2, 3, 6, 7))
    assert copies(engine).count("copy") == 1


def test_a_write_into_a_part_of_a_split_changes_the_whole_as_in_torch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        p, _ = y.chunk(2, 1)
        p.relu_()
        return m.b(y)

    module, x = Function(forward, a=conv(3, 8), b=conv(8, 2)).eval(), torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        assert relative_error(explorer.compile(module, x)(x), module(x)) < TOLERANCE


def test_a_write_to_a_part_leaves_its_concatenation_as_it_was() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c = m.a(x), m.b(x), torch.sigmoid(m.a(x))
        z = torch.cat([a, b, c], 1)
        a.sin_()
        b.relu_()
        c.pow_(m.exponent)  # torch has no form of this one that is not in place
        return m.c(z), a, b, c

    module = Function(forward, a=conv(3, 4), b=conv(3, 5), c=conv(13, 3))
    module.register_buffer("exponent", torch.rand(1))
    check(module, torch.randn(2, 3, 6, 7), fallbacks=("sin", "pow_"))


def test_a_copy_in_memory_of_its_own_is_no_work() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x)
        z = y.contiguous().clone()
        z.mul_(2).sin_()
        return m.b(z), m.b(y), F.avg_pool2d(y, y.shape[2:]).flatten(1)

    check(Function(forward, a=conv(3, 4), b=conv(4, 3)), torch.randn(2, 3, 6, 7), fallbacks=("sin",))


def test_shuffled_channels_equal_torch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        p, q = m.a(x).chunk(2, 1)
        y = torch.cat([p, m.b(q)], 1)
        n, c, h, w = y.shape
        return m.c(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    module = Function(forward, a=conv(3, 8), b=conv(4, 4, groups=4), c=conv(8, 3))
    check(module, torch.randn(2, 3, 6, 7), fallbacks=("reshape", "transpose", "reshape"))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Random networks: each operation names the earlier values that it reads."""
    program: list[tuple[str, list[int]]] = []
    for known in range(1, draw(st.integers(3, 14))):
        kind = draw(
            st.sampled_from(
                ["conv", "sum", "sum", "concat", "concat", "concat", "slice", "act", "pool", "sine"]
            )
        )
        count = {"concat": draw(st.integers(1, 4)), "sum": 2}.get(kind, 1)
        program.append((kind, [draw(st.integers(max(0, known - 5), known - 1)) for _ in range(count)]))
    return program


@given(program=programs(), threads=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mixture_of_concatenations_slices_and_layers_equals_torch(
    program: list[tuple[str, list[int]]], threads: int
) -> None:
    torch.manual_seed(0)
    channels, layers = [4], {}
    for i, (kind, read) in enumerate(program):
        n = sum(channels[r] for r in read)
        if kind == "sum":
            layers[f"layer{i}"] = conv(channels[read[0]], n := channels[read[1]], 1)
            # Sparse rows are computed in the order of their nonzeros, not of their channels.
            layers[f"layer{i}"].weight.data[torch.rand_like(layers[f"layer{i}"].weight) < 0.6] = 0
        elif kind == "conv" or n > 40:
            layers[f"layer{i}"] = conv(n, 3 + i % 3, 3)
            n = 3 + i % 3
        elif kind == "slice":
            n = -(-n // 2)
        channels.append(n)

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for i, (kind, read) in enumerate(program):
            y = torch.cat([values[r] for r in read], 1) if kind == "concat" else values[read[0]]
            if kind == "sum":
                y = m.get_submodule(f"layer{i}")(y) + values[read[1]]
            elif f"layer{i}" in layers:
                y = m.get_submodule(f"layer{i}")(y)
            elif kind == "slice":
                y = y.chunk(2, 1)[0]
            elif kind == "act":
                y = torch.sigmoid(y)
            elif kind == "pool":
                y = F.max_pool2d(y, 3, 1, 1)
            elif kind == "sine":
                y = torch.sin(y)
            values.append(y)
        return tuple(values[-2:])

    module, x = Function(forward, **layers).eval(), torch.randn(2, 4, 5, 6)
    engine = explorer.compile(module, x, threads=threads)
    with torch.no_grad():
        for some in (x, x + 1, x[:1]):
            for got, wanted in zip(engine(some), module(some), strict=True):
                assert relative_error(got, wanted) < TOLERANCE


# ---- flattening and pooling


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 3), (4, 16)])
@pytest.mark.parametrize("way", ["flatten", "view", "reshape"])
def test_images_are_flattened_natively(size: tuple[int, int], way: str) -> None:
    flat = {
        "flatten": lambda y: torch.flatten(y, 1),
        "view": lambda y: y.view(y.shape[0], -1),
        "reshape": lambda y: y.reshape(-1, y.shape[1] * y.shape[2] * y.shape[3]),
    }[way]
    features = 6 * size[0] * size[1]
    module = Function(lambda m, x: m.b(torch.relu(flat(m.a(x)))), a=conv(3, 6), b=nn.Linear(features, 4))
    check(module, torch.randn(3, 3, *size), threads=2)


def test_a_depthwise_convolution_down_to_one_pixel_may_be_flattened() -> None:
    module = Function(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Conv2d(6, 6, 5, groups=6), b=nn.Linear(6, 4))
    network = nn.Sequential(conv(3, 6), module).eval()
    check(network, torch.randn(3, 3, 5, 5))


@pytest.mark.parametrize("output", [1, 2, 3, (7, 7), (3, 5), (None, 1), (9, 12)])
def test_adaptive_average_pooling_equals_torch(output: Any) -> None:
    module = Function(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), output)), a=conv(3, 5), b=conv(5, 4))
    check(module, torch.randn(2, 3, 7, 9))


@given(
    size=st.tuples(st.integers(4, 15), st.integers(4, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    ceil=st.booleans(),
    options=st.sampled_from([None, {}, {"count_include_pad": False}, {"divisor_override": 3}]),
)
@settings(max_examples=55, deadline=None)
def test_pooling_equals_torch_with_windows_cut_at_the_end(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil: bool,
    options: dict[str, Any] | None,
) -> None:
    padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    common = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil}
    pooling = nn.MaxPool2d(**common) if options is None else nn.AvgPool2d(**common, **options)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)) - 1
    engine = explorer.compile(pooling, x)
    assert engine.fallbacks == ()
    assert relative_error(engine(x), pooling(x)) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(3, 2, 1), (5, 1, 1), (5, 2, 1), (7, 1, 1), (3, 1, 2), (5, 2, 2)]
)
def test_depthwise_convolutions_of_all_sizes_equal_torch(
    size: int, stride: int, dilation: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    padding = dilation * (size - 1) // 2
    depthwise = nn.Conv2d(12, 12, size, stride, padding, dilation, 12)
    multiplied = nn.Conv2d(12, 24, size, stride, padding, dilation, 12)
    module = Function(lambda m, x: (F.relu6(m.a(x)), m.b(x)), a=depthwise, b=multiplied)
    check(module, torch.randn(2, 12, 13, 15))


# ---- what has no native form: sizes that are unknown, sizes that are zero, lists, and overloads of other arguments


FOUND: dict[str, Callable[[Any, Tensor], Any]] = {
    "nonzero": lambda m, x: F.relu(m.a(x)).nonzero(),
    "a mask": lambda m, x: m.b(torch.sigmoid(m.a(x)[x[:, 0] > 0])),
    "unique": lambda m, x: torch.unique(m.a(x).round()),
    "repetitions": lambda m, x: m.a(x).repeat_interleave((x[0] > 0).long() + 1, 1),
    "a part of such a size": lambda m, x: m.a(x)[:, : (x[0, 0] > 0).long().item() + 1],
    "a number": lambda m, x: m.b(m.a(x) * x.sum().item()),
    "a number that is returned": lambda m, x: (m.a(x), x.sum().item()),
}


@pytest.mark.parametrize("found", FOUND)
def test_sizes_and_numbers_that_follow_from_values_are_those_of_each_call(found: str) -> None:
    module, xs = Function(FOUND[found], a=nn.Linear(8, 8), b=nn.Linear(8, 3)).eval(), torch.randn(5, 4, 8)
    engine = explorer.compile(module, xs[0])
    with torch.no_grad():
        for x in xs:
            for got, wanted in zip(tree_leaves(engine(x)), tree_leaves(module(x)), strict=True):
                assert relative_error(torch.as_tensor(got), torch.as_tensor(wanted)) < TOLERANCE
    # How many rows were found says nothing about how many belong to the images of a smaller batch.
    with pytest.raises(EngineError, match="depends on the others"):
        engine(xs[0, :1])


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_empty_runs_through_torch_with_all_that_follows_it(threads: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has nothing to initialise
        none, of, lines = nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(0, 6)
        norm = nn.BatchNorm1d(8)
    norm.running_mean.normal_()
    module = Function(
        lambda m, x: (F.relu(m.none(x)), F.relu(m.norm(m.of(m.none(x)))) + 1, m.b(torch.relu(m.of(m.none(x))))),
        none=none, of=of, b=nn.Linear(8, 3), norm=norm,
    )  # fmt: skip
    check_leaves(module, torch.randn(4, 8), threads=threads)
    check_leaves(Function(lambda m, x: F.relu(m.a(x)), a=lines), torch.randn(2, 5, 0), threads=threads)
    parts = Function(
        lambda m, x: (m.a(x).split([0, 6], 1), F.relu(m.a(x)[:, :0]), m.a(x)[:, 3:3] * 2), a=conv(3, 6)
    )
    check_leaves(parts, torch.randn(2, 3, 5, 5), threads=threads)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 6, 6)])
def test_an_empty_input_has_an_empty_answer(shape: tuple[int, ...]) -> None:
    layer = conv(3, 6) if len(shape) == 4 else nn.Linear(8, 6)
    check_leaves(Function(lambda m, x: F.relu(m.a(x)) + 1, a=layer), torch.randn(shape))
    ids = torch.zeros(shape, dtype=torch.long)
    check_leaves(Function(lambda m, i: F.relu(m.e(i)), e=nn.Embedding(3, 4)), ids)


def check_leaves(module: nn.Module, x: Tensor, **options: Any) -> None:
    """As `check`, of results in any structure, for this batch alone."""
    engine = explorer.compile(module.eval(), x, **options)
    with torch.no_grad():
        for _ in range(2):
            for got, wanted in zip(tree_leaves(engine(x)), tree_leaves(module(x)), strict=True):
                assert relative_error(got, wanted) < TOLERANCE


def test_a_mean_of_all_elements_and_a_weight_of_one_dimension_run_through_torch() -> None:
    for forward in (
        lambda m, x: m.a(x).mean(),
        lambda m, x: m.a(x).mean(dtype=torch.float64).float(),
        lambda m, x: m.a(x).mean((), keepdim=True),
    ):
        check_leaves(Function(forward, a=conv(3, 6)), torch.randn(2, 3, 5, 5))
    module = Function(lambda m, x: F.relu(F.linear(m.a(x), m.b.bias)), a=nn.Linear(8, 6), b=nn.Linear(3, 6))
    check_leaves(module, torch.randn(4, 8))


def test_operators_that_write_to_a_list_of_tensors_are_made_functional() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y, z = m.a(x), m.b(x)
        torch._foreach_mul_([y, z], [2.0, 3.0])
        return m.b(torch.relu(y)), z

    check_leaves(Function(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8))
