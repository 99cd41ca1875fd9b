"""Native kernels against numpy twins and torch, over shapes, strides, paddings, dilations, groups, sparsities and instruction sets."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from explorer.inference import compilation, conv_steps, native, step_builder
from explorer.inference.activations import LARGEST_ERROR, Activation
from explorer.inference.graph import Operation
from explorer.inference.kernels import (
    attention,
    conv,
    copy_planes,
    depthwise,
    flatten,
    layer_norm,
    linear,
    linear_images,
    pointwise,
    pool,
    registers,
    split,
    window_pool,
    winograd,
)
from explorer.inference.module import Mode, SparseModule
from explorer.inference.native import host_isa
from explorer.inference.pack import operands
from tests.inference.graphs import conv_graph, relative_error, run, usual_size

TOLERANCE = 1e-5
ISAS = ["avx512", "avx2", "neon", "generic"]


def runnable(isa: str) -> bool:
    try:
        host_isa(isa)
    except Exception:  # noqa: BLE001 - this machine cannot run it
        return False
    return True


def run_by(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine generate code for an instruction set; on a CPU that does not run it the test is skipped."""
    if not runnable(isa):
        pytest.skip(f"this CPU does not run {isa}")
    monkeypatch.setenv(native.ISA_VARIABLE, isa)


def why_not(isa: str, precision: str) -> str:
    """Why a test of kernels in this precision, emulated where the CPU lacks it, cannot run; empty when it can."""
    if not runnable(isa):
        return f"this CPU does not run {isa}"
    if precision == "fp16" and isa != native.current_isa().name:
        return "emulated for the widest instruction set only"
    return ""


def compute_in(isa: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks be compiled for this instruction set and precision, or skip the test."""
    if why := why_not(isa, precision):
        pytest.skip(why)
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    monkeypatch.setattr(compilation, "half_isa", partial(native.half_isa, emulated=True))


SOME_ISA = st.sampled_from([*filter(runnable, ISAS)])
"""For sweeps: any instruction set that this machine can run, not only its widest."""


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    kernel = (draw(st.sampled_from([1, 2, 3, 5, 7])), draw(st.sampled_from([1, 3, 4, 5, 7])))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    per_group = draw(st.integers(1, 9))
    outputs = groups * draw(st.integers(1, 11))
    return {
        "images": draw(st.integers(1, 3)),
        "size": tuple(draw(st.integers(low, low + 19)) for low in smallest),
        "channels": groups * per_group,
        "outputs": outputs,
        "kernel": kernel,
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "sparsity": draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, (0.0, float("inf")), (0.0, 6.0)])),
        "mode": draw(st.sampled_from(["dense", "sparse", "auto"])),
        "threads": draw(st.sampled_from([1, 1, 2])),
        "seed": draw(st.integers(0, 10**6)),
    }


@given(case=convolutions(), isa=SOME_ISA)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_convolution_equals_torch(case: dict, isa: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ISA_VARIABLE, isa)
        compare_with_torch(case, case["outputs"], case["mode"])


def compare_with_torch(case: dict[str, Any], outputs: int, mode: Mode) -> None:
    """Run one of the `convolutions` with so many output channels, and compare with torch in float64."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["images"], case["channels"], *case["size"])
    weight = torch.randn(outputs, case["channels"] // case["groups"], *case["kernel"], generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < case["sparsity"]] = 0
    bias = torch.randn(outputs, generator=generator) if case["bias"] else None
    attributes = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    graph = conv_graph(shape, weight, bias, residual=case["residual"], **attributes)
    x = torch.randn(shape, generator=generator)
    wanted = torch.nn.functional.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), *attributes.values()
    )
    inputs = [x]
    if case["residual"]:
        inputs.append(torch.randn(wanted.shape, generator=generator))
        wanted = wanted + inputs[1]
    if case["activation"] is not None:
        graph.operations[0].attributes |= dict(zip(("low", "high"), case["activation"], strict=True))
        wanted = wanted.clamp(*case["activation"])
    got = run(graph, *inputs, mode=mode, threads=case["threads"])
    assert relative_error(got, wanted, usual_size(x, weight, **attributes)) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"),
    [(3, 1, 1), (3, 2, 1), (1, 1, 1), (3, 1, 2), (1, 1, 4), (3, 2, 4), (3, 1, 8), (3, 2, 8)],
)
def test_every_instruction_set_gives_the_numbers_of_the_numpy_twin(
    isa: str, mode: str, kernel: int, stride: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 8, 13, 11), np.float32)
    weight = generator.standard_normal((24, 8 // groups, kernel, kernel)).astype(np.float32)
    weight[generator.random(weight.shape) < 0.7] = 0
    bias = generator.standard_normal(24).astype(np.float32)
    pad = kernel // 2
    attributes = {"stride": (stride, stride), "padding": (pad, pad), "dilation": (1, 1), "groups": groups}
    graph = conv_graph(x.shape, torch.from_numpy(weight), torch.from_numpy(bias), **attributes)
    got = run(graph, torch.from_numpy(x), mode=mode)
    wanted = conv.reference(x, weight, bias, **attributes)
    assert relative_error(got, torch.from_numpy(wanted)) < TOLERANCE


def test_a_stride_reads_the_phases_of_its_input_once_for_all_readers() -> None:
    import explorer

    class Both(torch.nn.Module):
        """A strided block and its shortcut read the same image."""

        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Conv2d(5, 7, 3, stride=2, padding=1)
            self.narrow = torch.nn.Conv2d(5, 7, 1, stride=2)
            self.other = torch.nn.Conv2d(5, 7, 3, stride=3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.wide(x) + self.narrow(x), self.other(x)

    torch.manual_seed(0)
    module, x = Both().eval(), torch.randn(3, 5, 13, 10)
    engine = explorer.compile(module, x)
    rows = engine.profile(x)
    assert [row.name for row in rows if row.kind == "split"] == ["wide", "other"]
    with torch.no_grad():
        expected = module(x)
    for got, wanted in zip(engine(x), expected, strict=True):
        assert relative_error(got, wanted) < TOLERANCE


@pytest.mark.parametrize("phases", [((0, 0),), ((0, 0), (0, 1), (1, 0), (1, 1)), ((1, 0), (1, 2))])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (1, 4)])
def test_the_phases_equal_their_numpy_twin(
    size: tuple[int, int], phases: tuple[tuple[int, int], ...]
) -> None:
    stride = (2, 3)
    rows, columns = -(-size[0] // stride[0]), -(-size[1] // stride[1])
    shape = (2, 3 * len(phases), rows, columns)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    # A 1 x 1 identity lets the phases come out of the engine.
    identity = torch.eye(shape[1])[:, :, None, None]
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    graph = conv_graph(shape, identity, None, **plain)
    graph.operations[0].inputs = ["phases"]
    graph.operations.insert(0, Operation("split", "phases", ["x"], "", torch.add))
    graph.operations[0].attributes = {"stride": stride, "phases": phases}
    graph.shapes |= {"x": tuple(x.shape), "phases": shape}
    graph.dtypes["phases"] = torch.float32
    np.testing.assert_array_equal(
        run(graph, x, mode="dense").numpy(), split.reference(x.numpy(), stride, list(phases))
    )


@given(
    channels=st.integers(1, 4),
    shifts=st.lists(st.integers(-60, 60), min_size=1, max_size=12, unique=True),
    tile=st.integers(1, 8),
    lanes=st.sampled_from([4, 8, 16]),
)
@settings(deadline=None)
def test_shared_copies_hold_the_operand_of_every_tap(
    channels: int, shifts: list[int], tile: int, lanes: int
) -> None:
    taps, plane, start = len(shifts), 1000, 200
    memory = np.arange(channels * plane + 2 * start)  # each element holds its own place
    planes = np.tile(np.arange(channels)[:, None], (1, taps))
    reach = operands(planes, np.array(shifts), plane, "shift", tile, native.Isa("test", lanes, 16, "", ""))
    buffer: list[int] = []
    rows = []
    for offset, extra in reach.sources:
        rows.append(4 * len(buffer))
        at = start + offset // 4
        buffer += memory[at : at + (tile + extra) * lanes].tolist()
    assert reach.n_bytes.sum() == 4 * len(buffer)
    assert len(reach.sources) <= channels * taps
    for k, (source, within) in enumerate(zip(reach.source, reach.within, strict=True)):
        first = (rows[source] + within) // 4
        assert within % (4 * lanes) == 0
        wanted = start + k // taps * plane + shifts[k % taps]
        assert buffer[first : first + tile * lanes] == memory[wanted : wanted + tile * lanes].tolist()


def test_in_rows_of_whole_vectors_three_copies_serve_nine_taps() -> None:
    shifts = np.array([dy * 16 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    reach = operands(np.zeros((1, 9), np.int64), shifts, 1000, "shift", 7, native.Isa("test", 16, 32, "", ""))
    assert reach.sources.tolist() == [[-4 * 16, 2], [4 * (1 - 16), 2], [4 * (-1 - 16), 2]]


def test_the_numpy_twin_of_the_convolution_is_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(s, generator=generator) for s in ((2, 6, 9, 8), (4, 3, 3, 2), (4,)))
    wanted = torch.nn.functional.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2)
    got = conv.reference(x.numpy(), w.numpy(), b.numpy(), (2, 1), (1, 2), (1, 2), 2)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize(("features", "outputs"), [(1, 1), (7, 10), (192, 10), (100, 129), (512, 1000)])
def test_a_linear_layer_on_vectors_equals_its_numpy_twin(mode: str, features: int, outputs: int) -> None:
    import explorer

    torch.manual_seed(0)
    layer = torch.nn.Linear(features, outputs)
    layer.weight.data[torch.rand_like(layer.weight) < 0.6] = 0
    x = torch.randn(5, features)
    engine = explorer.compile(layer, x, sparse=mode)
    wanted = linear.reference(x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy())
    assert engine.fallbacks == ()
    assert relative_error(engine(x), torch.from_numpy(wanted)) < TOLERANCE


@given(
    size=st.tuples(st.integers(5, 20), st.integers(5, 70)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    shift=st.floats(-3, 3),
)
@settings(max_examples=60, deadline=None)
def test_maximum_pooling_equals_its_numpy_twin_also_on_negative_values(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    shift: float,
) -> None:
    import explorer

    padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)) + shift
    engine = explorer.compile(torch.nn.MaxPool2d(kernel, stride, padding), x)
    wanted = window_pool.reference_maximum(x.numpy(), kernel, stride, padding)
    assert engine.fallbacks == ()
    np.testing.assert_array_equal(engine(x).numpy(), wanted)


@pytest.mark.parametrize("size", [(7, 9), (16, 33), (28, 64), (5, 112)])
@pytest.mark.parametrize(
    ("pool", "options"),
    [
        (torch.nn.MaxPool2d, {}),
        (torch.nn.MaxPool2d, {"ceil_mode": True}),
        (torch.nn.MaxPool2d, {"dilation": 2}),
        (torch.nn.MaxPool2d, {"stride": 5}),
        (torch.nn.AvgPool2d, {}),
        (torch.nn.AvgPool2d, {"ceil_mode": True}),
        (torch.nn.AvgPool2d, {"stride": 5}),
        (torch.nn.AvgPool2d, {"divisor_override": 2}),
    ],
)
def test_what_lies_around_the_pixels_of_a_pooled_plane_is_zero_for_the_convolution_that_follows(
    size: tuple[int, int], pool: type[torch.nn.Module], options: dict[str, Any]
) -> None:
    import explorer

    torch.manual_seed(0)
    pooled = pool(**{"kernel_size": 3, "stride": 2, "padding": 1, **options})
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), pooled, torch.nn.Conv2d(6, 5, 3, padding=1), torch.nn.ReLU()
    ).eval()
    x = torch.randn(2, 3, *size) - 1
    engine = explorer.compile(net, x, threads=2)
    for _ in range(2):  # the second time in memory that other values have been in
        with torch.no_grad():
            assert relative_error(engine(x), net(x)) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_instruction_set_pools_like_the_numpy_twin(
    isa: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import explorer

    run_by(isa, monkeypatch)
    x = torch.randn(2, 5, 11, 37, generator=torch.Generator().manual_seed(0)) - 1
    engine = explorer.compile(torch.nn.MaxPool2d(3, stride, 1), x)
    assert engine.isa == isa
    window = (3, 3), (stride, stride), (1, 1)
    np.testing.assert_array_equal(engine(x).numpy(), window_pool.reference_maximum(x.numpy(), *window))
    for counted in (False, True):
        averages = explorer.compile(torch.nn.AvgPool2d(3, stride, 1, count_include_pad=counted), x)
        wanted = window_pool.reference_average(x.numpy(), *window, count_padding=counted)
        np.testing.assert_allclose(averages(x).numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_a_nan_in_a_window_is_its_maximum_as_in_torch() -> None:
    import explorer

    x = torch.randn(1, 2, 9, 40)
    x[0, 1, 4, 17] = torch.nan
    module = torch.nn.MaxPool2d(3, 2, 1)
    engine = explorer.compile(module, x)
    np.testing.assert_array_equal(engine(x).numpy(), module(x).numpy())


WINDOWS = {
    "size": st.tuples(st.integers(5, 19), st.integers(5, 37)),
    "kernel": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "stride": st.tuples(st.integers(1, 4), st.integers(1, 5)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
}


@given(**WINDOWS, count_padding=st.booleans())
@settings(max_examples=40, deadline=None)
def test_average_pooling_equals_its_numpy_twin_and_the_twin_is_torchs(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], count_padding: bool
) -> None:  # fmt: skip
    import explorer

    padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    module = torch.nn.AvgPool2d(kernel, stride, padding, count_include_pad=count_padding)
    wanted = window_pool.reference_average(x.numpy(), kernel, stride, padding, count_padding=count_padding)
    np.testing.assert_allclose(wanted, module(x).numpy(), rtol=1e-4, atol=1e-6)
    engine = explorer.compile(module, x)
    assert engine.fallbacks == ()
    np.testing.assert_allclose(engine(x).numpy(), wanted, rtol=1e-4, atol=1e-6)


@given(**WINDOWS, dilation=st.tuples(st.integers(1, 2), st.integers(2, 3)))
@settings(max_examples=30, deadline=None)
def test_maxima_over_dilated_windows_equal_their_numpy_twin_and_the_twin_is_torchs(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:  # fmt: skip
    import explorer

    kernel = (min(kernel[0], 3), min(kernel[1], 2))
    padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0)) - 2
    module = torch.nn.MaxPool2d(kernel, stride, padding, dilation)
    wanted = window_pool.reference_maximum(x.numpy(), kernel, stride, padding, dilation)
    np.testing.assert_array_equal(wanted, module(x).numpy())
    engine = explorer.compile(module, x)
    assert engine.fallbacks == ()
    np.testing.assert_array_equal(engine(x).numpy(), wanted)


@given(size=st.tuples(st.integers(1, 20), st.integers(1, 37)), channels=st.integers(1, 35))
@settings(max_examples=30, deadline=None)
def test_the_average_of_a_plane_equals_its_numpy_twin(size: tuple[int, int], channels: int) -> None:
    import explorer

    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)) + 1
    engine = explorer.compile(torch.nn.AdaptiveAvgPool2d(1), x)
    assert engine.fallbacks == ()
    wanted = torch.from_numpy(pool.reference_plane(x.numpy()))
    assert relative_error(engine(x)[:, :, 0, 0], wanted) < TOLERANCE


class Rearranged(torch.nn.Module):
    """Ranges of the planes of a maximum one after the other, or all of them as one vector."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        super().__init__()
        self.ranges = ranges

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.max_pool2d(x, 1)
        return torch.cat([y[:, i:j] for i, j in self.ranges], 1) if self.ranges else y.flatten(1)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 37)),
    ranges=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3)), max_size=5),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_planes_are_copied_and_flattened_as_their_numpy_twins_do(
    size: tuple[int, int],
    ranges: list[tuple[int, int]],
    isa: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import explorer

    assume(runnable(isa))
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    x = torch.randn(2, 9, *size, generator=torch.Generator().manual_seed(0))
    engine = explorer.compile(Rearranged([(i, i + n) for i, n in ranges]), x, threads=threads)
    planes = np.array([i + k for i, n in ranges for k in range(n)])
    wanted = copy_planes.reference(x.numpy(), planes) if ranges else flatten.reference(x.numpy())
    assert engine.fallbacks == ()
    for _ in range(2):
        np.testing.assert_array_equal(engine(x).numpy(), wanted)
    np.testing.assert_array_equal(engine(x[:1]).numpy(), wanted[:1])


class Sum(torch.nn.Module):
    """An addition and a clamp that no convolution takes along: their operands come from pooling, or are read twice."""

    def __init__(self, high: float) -> None:
        super().__init__()
        self.same, self.act = torch.nn.MaxPool2d(1), torch.nn.Hardtanh(0.0, high)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.act(self.same(x) + self.same(y))


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 37)),
    channels=st.integers(1, 19),
    high=st.sampled_from([0.5, 6.0, float("inf")]),
    threads=st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_additions_and_clamps_equal_their_numpy_twin(
    size: tuple[int, int], channels: int, high: float, threads: int
) -> None:
    import explorer

    x, y = torch.randn(2, 2, channels, *size, generator=torch.Generator().manual_seed(0))
    engine = explorer.compile(Sum(high), (x, y), threads=threads)
    assert [row.kind for row in engine.profile(x, y, repeats=2) if row.kernel == "add"] == ["add"]
    wanted = pointwise.reference(x.numpy(), y.numpy(), low=0.0, high=high)
    np.testing.assert_array_equal(engine(x, y).numpy(), wanted)


@given(
    features=st.integers(1, 150),
    outputs=st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    mode=st.sampled_from(["dense", "sparse"]),
    threads=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_any_linear_layer_on_vectors_equals_its_numpy_twin(
    features: int, outputs: int, sparsity: float, mode: str, threads: int
) -> None:
    import explorer

    torch.manual_seed(0)
    layer = torch.nn.Linear(features, outputs)
    layer.weight.data[torch.rand_like(layer.weight) < sparsity] = 0
    x = torch.randn(3, features)
    engine = explorer.compile(torch.nn.Sequential(layer, torch.nn.ReLU()), x, sparse=mode, threads=threads)
    wanted = linear.reference(x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy())
    assert relative_error(engine(x), torch.from_numpy(np.maximum(wanted, 0))) < TOLERANCE


def test_maximum_pooling_and_clamps_keep_nan_as_torch_does() -> None:
    import explorer

    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1, 3, 3] = float("nan")
    module = torch.nn.Sequential(torch.nn.MaxPool2d(3, 1, 1), torch.nn.ReLU6())
    got, wanted = explorer.compile(module, x)(x), module(x)
    assert torch.equal(torch.isnan(got), torch.isnan(wanted))
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(
    ("triple", "lanes", "cpu", "compare"),
    [
        ("aarch64-unknown-linux-gnu", 4, "cortex-a76", "fcmgt"),
        ("x86_64-unknown-linux-gnu", 8, "haswell", "vcmp"),
    ],
)
def test_maximum_pooling_is_vector_code_without_gathers_on_other_cpus_too(
    triple: str, lanes: int, cpu: str, compare: str
) -> None:
    isa = native.Isa("test", lanes, 32 if lanes == 4 else 16, cpu, "+neon" if lanes == 4 else "")
    kernel = window_pool.WindowPoolKernel(
        False, (3, 3), (2, 2), (1, 1), 112, 112, 112, 56, 56, 57, -(-56 * 57 // lanes)
    )
    lines = native.assembly(isa, kernel.build(isa)[0], triple).splitlines()
    compared = [line for line in lines if compare in line]
    assert compared
    assert all((".4s" in line) if lanes == 4 else ("ymm" in line) for line in compared)
    assert not [line for line in lines if "gather" in line]


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
CPUS = {
    "avx512": (
        native.Isa("avx512", 16, 32, "skylake-avx512", "-prefer-256-bit"),
        X86,
        "vfmadd",
        "zmm",
    ),
    "avx2": (native.Isa("avx2", 8, 16, "haswell", ""), X86, "vfmadd", "ymm"),
    "neon": (native.Isa("neon", 4, 32, "cortex-a76", "+neon"), ARM, "fmla", ".4s"),
    "avx512 fp16": (
        native.Isa("avx512", 32, 32, "sapphirerapids", "-prefer-256-bit", "fp16"),
        X86,
        "vfmadd231ph",
        "zmm",
    ),
    "neon fp16": (native.Isa("neon", 8, 32, "cortex-a76", "+neon,+fullfp16", "fp16"), ARM, "fmla", ".8h"),
}


def innermost_loops(text: str) -> list[list[str]]:
    """The instructions between a label and the next branch back to it that hold no other such label and branch."""
    lines = [re.split(r"\s##?\s|//", line)[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and (line.endswith(":") or not line.startswith("."))]
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        words = re.split(r"[\s,]+", line)
        if re.match(r"(j[a-z]+|b(\.[a-z]+)?|cbn?z|tbn?z)$", words[0]) and at.get(words[-1], i) < i:
            loops.append((at[words[-1]], i))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return [lines[a : b + 1] for a, b in inner]


def conv_kernels(isa: native.Isa) -> list[conv.ConvKernel]:
    """Sparse and dense kernels at every tile, with the most rows that the registers are said to hold."""
    compact = {"columns": 4, "pitch": 5}
    rows = {tile: registers.dense_rows(tile, isa) for tile in (1, 2, 3, 4, 6, 7, 8)}
    found = [
        *(conv.ConvKernel(tile) for tile in rows),
        *(conv.ConvKernel(tile, r) for tile, r in rows.items()),
        conv.ConvKernel(4, **compact, plane=5),
        conv.ConvKernel(4, rows[4], **compact, plane=5),
        *(conv.ConvKernel(tile, pairs=True) for tile in (1, 2, 4, 6, 7, 8)),
        conv.ConvKernel(4, **compact, plane=5, pairs=True),
        *(
            conv.ConvKernel(tile, **more, partners=True)
            for tile in range(1, 9)
            for more in ({}, compact | {"plane": tile + 1})
            if registers.has_partners(tile, isa)
        ),
    ]
    has_short = isa.name == "avx512" and isa.precision == "fp32"
    return found + [replace(kernel, short=True) for kernel in found if has_short and not kernel.dense_rows]


def sizes_of_parts(kernel: conv.ConvKernel, isa: native.Isa) -> tuple[int, ...]:
    """Vectors of the tile that a hot loop takes at once."""
    if kernel.dense_rows and not kernel.compact:
        return registers.dense_parts(kernel.tile, kernel.dense_rows, isa)
    return registers.pair_parts(kernel.tile, isa) if kernel.pairs else (kernel.tile,)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_hot_loops_hold_vector_fmas_and_never_touch_the_stack(cpu: str) -> None:
    isa, triple, instruction, register = CPUS[cpu]
    vectors = (
        [linear.LinearKernel(0), linear.LinearKernel(8), linear_images.LinearImagesKernel()]
        if isa.precision == "fp32"
        else []
    )
    for kernel in [*conv_kernels(isa), *vectors]:
        text = native.assembly(isa, kernel.build(isa)[0], triple)
        hot = [loop for loop in innermost_loops(text) if any(instruction in line for line in loop)]
        assert hot, kernel
        counts = set()
        for loop in hot:
            fmas = [line for line in loop if instruction in line]
            assert all(register in line for line in fmas), (kernel, fmas)
            if isinstance(kernel, conv.ConvKernel):
                counts.add(len(fmas))
            stack = [line for line in loop if re.search(r"%rsp|\bsp\b", line)]
            assert stack == [], (kernel, stack)
        if isinstance(kernel, conv.ConvKernel):
            several = {kernel.dense_rows or max(kernel.unroll, 2) * kernel.channels}
            if kernel.partners:
                several = {1, 2}  # rows, at one nonzero each
            assert counts == {rows * size for rows in several for size in sizes_of_parts(kernel, isa)}, kernel
        # A call would mean that LLVM made a library call of an FMA or of a gather.
        assert "fmaf" not in text


def other_kernels(isa: native.Isa) -> list[native.Kernel]:
    """The other kernels that compute much: at the widest windows, which hold most, and with every activation."""
    parameters = {"leaky_relu": (0.1,), "elu": (1.0, 1.0, 1.0)}
    activations = [Activation(kind, parameters.get(kind, ())) for kind in LARGEST_ERROR]
    windows = {size: tuple(np.ndindex(size, size)) for size in (3, 5, 7)}
    rows = {tile: registers.dense_rows(tile, isa, whole=True) for tile in (1, 2, 3, 4)}
    return [
        *(
            depthwise.DepthwiseKernel(taps, stride, masked, pairs=pairs)
            for taps in windows.values()
            for masked in (False, True)
            for stride, pairs in ((1, False), (1, True), (2, False))
            if not pairs or depthwise.loads_taps(isa)
        ),
        *(depthwise.DepthwiseKernel(windows[3], 1, True, a) for a in activations if a.is_short),
        *(pointwise.PointwiseKernel("add", affine=True, activation=a) for a in activations),
        *(winograd.WinogradKernel(taps, tile, 1, r) for taps in (3, 4) for tile, r in rows.items()),
        *(
            attention.AttentionKernel(tile, min(8, r), True, added=added, none_is_zero=added)
            for tile, r in rows.items()
            for added in (False, True)
        ),
        *(layer_norm.LayerNormKernel(tile, True) for tile in rows),
    ]


MOST_STORED = {
    ("avx2", winograd.WinogradKernel, 4): 2,  # transforming seven rows, with their seven factors
    ("neon", depthwise.DepthwiseKernel, 49): 1,  # 7 x 7 at stride 2: six vectors of each of seven column sums
}
"""Of about a hundred instructions: vectors that a loop does put aside."""


@pytest.mark.parametrize("cpu", ["avx2", "avx512", "neon"])
def test_loops_that_multiply_put_no_vector_aside(cpu: str) -> None:
    """Constants may wait on the stack, as they would in the constants' own memory; no loop writes a vector there."""
    isa, triple, instruction, _ = CPUS[cpu]
    store = r"vmov\w+\s+%[xyz]mm\d+, .*%rsp|st[rp]\s+[qdv].*\bsp\b"
    for kernel in other_kernels(isa):
        text = native.assembly(isa, kernel.build(isa)[0], triple)
        hot = [loop for loop in innermost_loops(text) if any(instruction in line for line in loop)]
        assert hot, kernel
        n_taps = getattr(kernel, "taps", 0)
        n_taps = n_taps if isinstance(n_taps, int) else len(n_taps)
        for loop in hot:
            stored = [line for line in loop if re.match(store, line)]
            assert len(stored) <= MOST_STORED.get((cpu, type(kernel), n_taps), 0), (kernel, stored)


def test_one_load_brings_the_weights_of_two_nonzeros() -> None:
    isa, triple, instruction, _ = CPUS["avx2"]
    for tile, pairs in ((4, False), (7, False), (8, False), (6, True)):
        text = native.assembly(isa, conv.ConvKernel(tile, pairs=pairs).build(isa)[0], triple)
        hot = [loop for loop in innermost_loops(text) if any(instruction in line for line in loop)]
        assert hot
        for loop in hot:
            broadcasts = [line for line in loop if "broadcast" in line]
            shuffles = [line for line in loop if re.search("vmovs[lh]dup", line)]
            n_weights = len([line for line in loop if instruction in line]) // tile
            assert len(shuffles) == (0 if pairs else n_weights), loop
            assert len(broadcasts) == (n_weights if pairs else n_weights // 2), loop


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("cpu", ["avx2", "avx512"])
def test_the_products_of_attention_stay_in_registers(cpu: str, added: bool) -> None:
    isa, triple, instruction, _ = CPUS[cpu]
    rows = registers.dense_rows(4, isa, whole=True)
    kernel = attention.AttentionKernel(4, rows, masked=False, added=added, none_is_zero=added)
    text = native.assembly(isa, kernel.build(isa)[0], triple)
    products = [
        loop
        for loop in innermost_loops(text)
        if sum(instruction in line for line in loop) == 4 * rows and any("broadcast" in line for line in loop)
    ]
    assert len(products) == 2  # scores, and means of values
    assert not [line for loop in products for line in loop if "%rsp" in line]


@pytest.mark.parametrize("n_registers", [16, 32])
def test_the_parts_of_a_tile_fill_it_and_their_sums_fit_the_registers(n_registers: int) -> None:
    isa = native.Isa("test", 8, n_registers, "", "")
    for tile in range(1, 9):
        assert sum(registers.pair_parts(tile, isa)) == tile
        assert 2 * max(registers.pair_parts(tile, isa)) + 3 <= n_registers
        rows, in_one = registers.dense_rows(tile, isa), registers.dense_rows(tile, isa, whole=True)
        parts = registers.dense_parts(tile, rows, isa)
        assert sum(parts) == tile
        assert max(parts) - min(parts) <= 1
        assert rows * max(parts) + min(rows, max(parts)) + 1 <= n_registers
        assert in_one * tile + min(in_one, tile) + 1 <= n_registers
        if len(parts) > 1:  # more sums in registers than a tile in one part would leave room for
            assert rows * max(parts) > in_one * tile


@pytest.mark.parametrize("dense", [False, True])
def test_channels_go_in_parts_whose_sums_stay_in_the_cache(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of several K blocks, whose sums would fill a small level 2 cache several times over."""
    if native.current_isa().name == "torch":
        pytest.skip("no machine code on this machine")
    for part in (conv_steps, step_builder):
        monkeypatch.setattr(part, "l1_bytes", lambda: 4096)
    monkeypatch.setattr(step_builder, "_LEAST_BLOCK_BYTES", 4096)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 96, 1, 1, generator=generator)
    if not dense:
        weight *= torch.rand(weight.shape, generator=generator) > 0.8
    x = torch.randn(2, 96, 12, 16, generator=generator)
    attributes: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    wanted = torch.nn.functional.conv2d(x.double(), weight.double())
    jobs = []
    for cache in (1 << 30, 1 << 15):
        monkeypatch.setattr(conv_steps, "l2_bytes", lambda cache=cache: cache)
        graph = conv_graph(x.shape, weight, None, **attributes)
        engine = SparseModule(graph, (x,), 1, "dense" if dense else "sparse")
        assert relative_error(engine(x), wanted) < TOLERANCE
        jobs.append(int(engine._network.steps.pieces[0]))
    assert jobs[1] > jobs[0]


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    channels=st.integers(2, 9),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    clamped=st.booleans(),
    threads=st.sampled_from([1, 2]),
    isa=SOME_ISA,
)
@settings(max_examples=150, deadline=None)
def test_a_depthwise_convolution_equals_its_numpy_twin(
    size: tuple[int, int],
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
    clamped: bool,
    threads: int,
    isa: str,
) -> None:
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p > s for n, p, s in zip(size, padding, spans, strict=True)))
    assume(spans[1] <= 8)
    generator = np.random.default_rng(1)
    x = generator.standard_normal((2, channels, *size)).astype(np.float32)
    weight = generator.standard_normal((channels, 1, *kernel)).astype(np.float32)
    added = generator.standard_normal(channels).astype(np.float32) if bias else np.zeros(channels, np.float32)
    attributes: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    graph = conv_graph(
        x.shape,
        torch.from_numpy(weight),
        torch.from_numpy(added) if bias else None,
        groups=channels,
        **attributes,
    )
    if clamped:
        graph.operations[0].attributes |= {"low": 0.0, "high": 6.0}
    engine = SparseModule(graph, (torch.from_numpy(x),), threads, "auto", native.host_isa(isa))
    assert engine.choices == {"conv": "dense, depthwise"}
    wanted = depthwise.reference(x, weight, added, **attributes)
    if clamped:
        wanted = np.clip(wanted, 0, 6)
    for _ in range(2):
        assert relative_error(engine(torch.from_numpy(x)), torch.from_numpy(wanted)) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_every_instruction_set_filters_channels_like_the_numpy_twin(
    isa: str, stride: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, 6, 23, 37)).astype(np.float32)
    weight = generator.standard_normal((6, 1, kernel, kernel)).astype(np.float32)
    pad = kernel // 2
    attributes: dict[str, Any] = {"stride": (stride, stride), "padding": (pad, pad), "dilation": (1, 1)}
    graph = conv_graph(x.shape, torch.from_numpy(weight), None, groups=6, **attributes)
    got = run(graph, torch.from_numpy(x), mode="auto")
    wanted = depthwise.reference(x, weight, np.zeros(6, np.float32), **attributes)
    assert relative_error(got, torch.from_numpy(wanted)) < TOLERANCE


def test_a_spill_in_a_hot_loop_would_be_found() -> None:
    isa, triple, *_ = CPUS["avx2"]
    # 32 sums in 16 registers: what lies compact is not taken in parts.
    kernel = conv.ConvKernel(8, 4, columns=4, pitch=5, plane=10)
    loops = innermost_loops(native.assembly(isa, kernel.build(isa)[0], triple))
    assert any("%rsp" in line for loop in loops for line in loop if "ymm" in line)
