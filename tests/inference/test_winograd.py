"""Winograd's minimal filtering along columns: its matrices, the kernel against the numpy twin of convolution, its error, and where it is a candidate."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.inference import conv_steps, native
from explorer.inference.kernels import conv, winograd
from explorer.inference.kernels.registers import dense_parts, dense_rows
from explorer.inference.larger_kernels import Larger, Weighed, larger_kernels
from explorer.inference.module import SparseModule
from explorer.inference.plan import Choice, Plan
from explorer.inference.taps import Taps
from explorer.inference.winograd import ROWS, Filter, transforms
from tests.inference.graphs import (
    compared_convolution,
    conv_graph,
    preferring,
    relative_error,
    run,
    without_limit,
)
from tests.inference.test_kernels import CPUS, ISAS, TOLERANCE, compute_in, innermost_loops

CHOICE = Choice(True, "winograd")


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take this kernel wherever they can."""
    monkeypatch.setattr(Plan, "candidates", preferring(CHOICE.__eq__))
    monkeypatch.setattr("explorer.inference.choosing.larger_kernels", without_limit)


def check(size: tuple[int, int], outputs: int, **more: Any) -> bool:
    """Compile one convolution and compare, see `compared_convolution`; whether this kernel ran."""
    return compared_convolution(size, outputs, **more) == "dense, winograd"


@pytest.mark.parametrize("taps", [3, 4])
def test_four_results_are_those_of_the_definition(taps: int) -> None:
    a, g, b = transforms(taps)
    generator = np.random.default_rng(0)
    filters, pixels = generator.standard_normal((50, taps)), generator.standard_normal((50, taps + ROWS - 1))
    wanted = [[f @ d[j : j + taps] for j in range(ROWS)] for f, d in zip(filters, pixels, strict=True)]
    got = ((filters @ g.T) * (pixels @ b.T)) @ a.T
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("taps", [3, 4])
def test_the_numpy_twin_is_a_convolution(taps: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5, 14, 17), np.float32)
    weight = generator.standard_normal((6, 5, taps, 3)).astype(np.float32)
    wanted = conv.reference(x[None], weight, np.zeros(6, np.float32))[0]
    got = winograd.reference(x, weight)
    assert relative_error(torch.from_numpy(got), torch.from_numpy(wanted)) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "outputs"), [((16, 32), 12), ((9, 28), 40), ((5, 57), 3), ((18, 112), 65)])
@pytest.mark.usefixtures("preferred")
def test_every_instruction_set_gives_the_numbers_of_the_numpy_twin(
    isa: str, size: tuple[int, int], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, "fp32", monkeypatch)
    assert check(size, outputs, images=2, bounds=(0.0, math.inf))
    strided = size[0] * 2, size[1] * 2
    assert check(strided, outputs, channels=3, kernel=(7, 7), stride=(2, 2), padding=(3, 3), bounds=(0, 6))


@given(
    rows=st.integers(1, 20),
    columns=st.sampled_from([16, 17, 19, 24, 28, 31, 48, 56, 80]),
    outputs=st.integers(1, 40),
    channels=st.integers(1, 20),
    images=st.integers(1, 3),
    form=st.sampled_from(
        [
            ((3, 3), (1, 1)),
            ((3, 1), (1, 1)),
            ((4, 2), (1, 1)),
            ((7, 7), (2, 2)),
            ((7, 3), (2, 1)),
            ((3, 5), (1, 2)),
        ]
    ),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    bounds=st.sampled_from([None, (0.0, 6.0)]),
    residual=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_the_numpy_twin(
    rows: int,
    columns: int,
    outputs: int,
    channels: int,
    images: int,
    form: tuple[tuple[int, int], tuple[int, int]],
    padding: tuple[int, int],
    bounds: tuple[float, float] | None,
    residual: bool,
    threads: int,
) -> None:
    kernel, stride = form
    height, width = (
        (n - 1) * s + k - 2 * p for n, s, k, p in zip((rows, columns), stride, kernel, padding, strict=True)
    )
    if height < 1 or width < 1:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "candidates", preferring(CHOICE.__eq__))
        patch.setattr("explorer.inference.choosing.larger_kernels", without_limit)
        ran = check(
            (height, width),
            outputs,
            channels=channels,
            images=images,
            kernel=kernel,
            stride=stride,
            padding=padding,
            bounds=bounds,
            residual=residual,
            threads=threads,
        )
    assert ran or residual


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("preferred")
def test_many_blocks_pieces_and_parts_add_up(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """K in blocks of a few channels, output channels in pieces of a group, which two threads share where an image has one tile."""
    monkeypatch.setattr(conv_steps, "l1_bytes", lambda: 2048)
    assert check((14, 32), 70, channels=37, images=3, threads=threads)
    assert check((4, 16), 70, channels=7, residual=True, threads=threads)


@pytest.mark.usefixtures("preferred")
def test_results_go_to_tiles_and_residuals_are_added_where_they_lie() -> None:
    """In a bottleneck the result is read by a 1 x 1 layer, from tiles; in a basic block it is added to the input."""

    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.c, self.d = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 32, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.b(torch.relu(self.a(x))) + x)
            return self.d(torch.relu(self.c(x)))

    import explorer

    torch.manual_seed(0)
    for size in ((16, 15), (30, 31), (28, 28), (32, 32), (56, 56)):
        module, x = Blocks().eval(), torch.randn(2, 8, *size)
        engine = explorer.compile(module, x, sparse="dense")
        assert relative_error(engine(x), module(x)) < TOLERANCE
        fits = engine._network.isa.lanes <= size[1]
        assert {engine.choices[name] == "dense, winograd" for name in "ac"} == {fits}
        assert size[0] < 56 or any(place.layout.is_cut for place in engine._network.plan.places.values())


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 1)), ((7, 7), (2, 2))])
def test_the_error_stays_near_that_of_adding_in_order(
    kernel: tuple[int, int], stride: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(1, 16, 64, 64, generator=generator),
        torch.randn(32, 16, *kernel, generator=generator),
    )
    attributes = {"stride": stride, "padding": (1, 1), "dilation": (1, 1)}
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), None, **attributes)
    graph = conv_graph(x.shape, weight, None, groups=1, **attributes)
    error = (run(graph, x, mode="dense") - wanted).square().mean().sqrt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "candidates", preferring(Choice(True, "shift").__eq__))
        usual = (run(graph, x, mode="dense") - wanted).square().mean().sqrt()
    assert 0 < error < 3 * usual


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_no_finite_number_spreads_as_far_as_in_torch(
    poison: float, kernel: int, stride: int, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the definition, which such jobs go back to; channels in several blocks, the last of which may be the one that meets it."""
    monkeypatch.setattr(conv_steps, "l1_bytes", lambda: 2048)
    columns = 32
    weight = torch.randn(9, 5, kernel, kernel)
    attributes = {"stride": (stride,) * 2, "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
    shape = (2, 5, 14 * stride, columns * stride)
    graph = conv_graph(shape, weight, torch.randn(9), residual=residual, **attributes)
    graph.operations[0].attributes |= {"low": 0.0, "high": 6.0}
    added = [torch.randn(2, 9, 14, columns)] * residual
    engine = SparseModule(graph, (torch.zeros(shape), *added), 1, "dense")
    assert engine.choices == {"conv": "dense, winograd"}
    for channel, row, column in ((0, 0, 0), (4, 9, 20), (2, shape[2] - 1, shape[3] - 1)):
        x = torch.randn(shape)
        x[0, channel, row, column] = poison
        wanted = torch.nn.functional.conv2d(x, weight, graph.constants["bias"], stride, kernel // 2)
        wanted = sum(added, wanted).clamp(0, 6)
        torch.testing.assert_close(engine(x, *added), wanted, equal_nan=True, rtol=0, atol=1e-4)


def test_it_is_a_candidate_where_it_saves_enough_and_rows_are_long_enough() -> None:
    isa = native.current_isa()
    if isa.name == "torch":
        pytest.skip("no machine code on this machine")

    def offered(
        kernel: tuple[int, int], columns: int = 32, groups: int = 1, dilation: int = 1, density: float = 1.0
    ) -> bool:
        weight = torch.ones(4, 4 // groups, *kernel)
        padding = tuple(k // 2 * dilation for k in kernel)
        attributes = {"stride": (1, 1), "padding": padding, "dilation": (dilation,) * 2, "groups": groups}
        graph = conv_graph((1, 4, 32, columns), weight, None, **attributes)
        return Plan(graph, isa, 1).may_be_winograd(graph, 0, density)

    assert offered((3, 3))
    assert offered((3, 1))
    assert offered((4, 4))
    assert not offered((1, 1))
    assert not offered((1, 3))
    assert not offered((5, 5))
    assert not offered((3, 3), groups=2)
    assert not offered((3, 3), dilation=2)
    assert not offered((3, 3), columns=isa.lanes - 1)
    assert offered((3, 3), density=0.21)
    assert not offered((3, 3), density=0.19)


def test_transformed_weights_take_what_the_limit_of_memory_leaves_most_pixels_first() -> None:
    def layer(weights: int, vectors: int, *, can: bool = False) -> Weighed:
        return Weighed(weights, weights, vectors, can, winograd=True)

    others = {9: Weighed(1_000_000, 1_000_000, 50, can=False)}  # a dense layer leaves 6.2 bytes a weight
    assert larger_kernels({0: layer(1000, 4)}, 0).winograd == frozenset()
    assert larger_kernels({0: layer(1000, 4)}, 10_000).winograd == {0}
    layers = {0: layer(700_000, 4), 1: layer(700_000, 90), 2: layer(50_000, 2)}
    assert larger_kernels(layers | others, 0).winograd == {0, 1, 2}
    layers[0] = layer(7_000_000, 4)
    assert larger_kernels(layers | others, 0).winograd == {1, 2}
    # A layer that may be either needs room for the larger of the two only.
    small = {0: layer(1000, 4, can=True)}
    assert larger_kernels(small, 9_000) == Larger(frozenset(), frozenset({0}))
    assert larger_kernels(small, 20_000) == Larger(frozenset({0}), frozenset({0}))


def in_phases(size: int) -> Filter | None:
    """Of a square filter at stride 2."""
    phases = ((0, 0), (0, 1), (1, 0), (1, 1))
    return Filter.of(Taps.of({"stride": (2, 2), "padding": (size // 2,) * 2, "phases": phases}, (size, size)))


def test_at_stride_two_a_filter_needs_seven_rows() -> None:
    assert in_phases(3) is None  # 0.83 of the products
    assert in_phases(7) is not None
    assert in_phases(9) is None  # five rows in a phase


def test_filters_know_their_rows_columns_and_phases() -> None:
    form = in_phases(7)
    assert form is not None
    assert (form.top, form.rows, form.points, form.width) == (-2, 4, 7, 3)
    weight = np.arange(49, dtype=np.float32)
    for phase, column, mine in zip(form.phase, form.column, form.taps, strict=True):
        rows, which = 2 * (np.arange(4) - 2) + phase // 2 + 3, 2 * column + phase % 2 + 3
        there = (rows >= 0) & (rows < 7)
        assert np.array_equal(mine >= 0, there)
        assert np.array_equal(weight[mine[there]], 7 * rows[there] + which)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_hot_loops_hold_vector_fmas_and_never_touch_the_stack(cpu: str) -> None:
    isa, triple, instruction, register = CPUS[cpu]
    for tile in (2, 4, 7, 8):
        rows = dense_rows(tile, isa)
        kernel = winograd.WinogradKernel(4, tile, 1, rows)
        text = native.assembly(isa, kernel.build(isa)[0], triple)
        wanted = sorted(rows * size for size in dense_parts(tile, rows, isa))
        loops = [[line for line in loop if instruction in line] for loop in innermost_loops(text)]
        hot = [loop for loop, fmas in zip(innermost_loops(text), loops, strict=True) if len(fmas) in wanted]
        assert (
            sorted(len([line for line in loop if instruction in line]) for loop in hot)[: len(wanted)]
            == wanted
        )
        for loop in hot:
            assert all(register in line for line in loop if instruction in line)
            assert [line for line in loop if re.search(r"%rsp|\bsp\b", line)] == []
