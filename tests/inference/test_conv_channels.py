"""Dense convolution with output channels in the lanes, against the numpy twin of convolution, and when it is a candidate at all."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.inference import conv_steps, native
from explorer.inference.kernels.conv_channels import ConvChannelsKernel
from explorer.inference.layout import channel_columns, channel_tile
from explorer.inference.plan import Choice, Plan
from tests.inference.graphs import compared_convolution, conv_graph, preferring
from tests.inference.test_kernels import CPUS, ISAS, SOME_ISA, compute_in, innermost_loops, runnable

ACROSS = Choice(True, "channels")


@pytest.fixture
def across(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take this kernel wherever it would be a candidate without Winograd's filtering."""
    monkeypatch.setattr(Plan, "candidates", preferring(ACROSS.__eq__))
    monkeypatch.setattr(Plan, "may_be_winograd", lambda *_: False)


def check(size: tuple[int, int], outputs: int, **more: Any) -> None:
    """Compile one convolution, see that this kernel runs it, and compare, see `compared_convolution`."""
    assert compared_convolution(size, outputs, **more) == "dense, channels"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "outputs"), [((7, 7), 40), ((14, 14), 16), ((5, 35), 3), ((3, 8), 65)])
@pytest.mark.usefixtures("across")
def test_every_instruction_set_gives_the_numbers_of_the_numpy_twin(
    isa: str, size: tuple[int, int], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, "fp32", monkeypatch)
    check(size, outputs, images=2, residual=True, bounds=(0.0, math.inf))


PRIME = (17, 19, 31)
"""Columns that no tile divides: the last tile lies over the one before it, which none does that adds a residual."""


@given(
    rows=st.integers(1, 20),
    columns=st.sampled_from([4, 5, 7, 10, 12, 14, 17, 18, 19, 28, 31]),
    outputs=st.integers(1, 70),
    channels=st.integers(1, 40),
    images=st.integers(1, 3),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 3), (2, 4)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    dilation=st.integers(1, 2),
    bounds=st.sampled_from([None, (0.0, 6.0)]),
    residual=st.booleans(),
    threads=st.sampled_from([1, 2]),
    isa=SOME_ISA,
)
@settings(max_examples=80, deadline=None)
def test_any_shape_equals_the_numpy_twin(
    rows: int,
    columns: int,
    outputs: int,
    channels: int,
    images: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: int,
    bounds: tuple[float, float] | None,
    residual: bool,
    threads: int,
    isa: str,
) -> None:
    # As much padding as leaves so many columns, and a column more to the input, which makes sure of a gap.
    reach = [dilation * (k - 1) for k in kernel]
    padding = (reach[0] // 2, max(1, reach[1] // 2))
    width = (columns - 1) * stride[1] + reach[1] + 1 - 2 * padding[1]
    height = max(1, (rows - 1) * stride[0] + reach[0] + 1 - 2 * padding[0])
    if width < 1:
        return
    residual = residual and columns not in PRIME
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ISA_VARIABLE, isa)
        patch.setattr(Plan, "candidates", preferring(ACROSS.__eq__))
        patch.setattr(Plan, "may_be_winograd", lambda *_: False)
        check(
            (height, width),
            outputs,
            channels=channels,
            images=images,
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=(dilation, dilation),
            bounds=bounds,
            residual=residual,
            threads=threads,
        )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("across")
def test_many_blocks_jobs_and_groups_add_up(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """K in blocks of a few operands, the tiles of an image in several jobs, and a last group with few channels."""
    monkeypatch.setattr(conv_steps, "l1_bytes", lambda: 2048)
    monkeypatch.setattr(conv_steps, "_SUMS_BYTES", 1)
    check((14, 28), 70, channels=37, images=3, residual=True, threads=threads)


def test_it_is_a_candidate_where_rows_have_gaps_and_tiles_fit() -> None:
    isa = native.current_isa()
    if isa.name == "torch":
        pytest.skip("no machine code on this machine")

    def offered(columns: int, padding: int, residual: bool = False) -> bool:
        weight = torch.ones(4, 3, 1, 1 + 2 * padding)
        attributes = {"stride": (1, 1), "padding": (0, padding), "dilation": (1, 1), "groups": 1}
        graph = conv_graph((1, 3, 6, columns), weight, None, residual=residual, **attributes)
        return ACROSS in Plan(graph, isa, 1).candidates(graph, 0, "auto", 1.0)

    assert offered(14, 1)
    assert offered(7, 1)
    assert not offered(64, 0)  # whole vectors without gaps: neighbouring pixels in the lanes waste nothing
    assert offered(17, 1)
    assert offered(14, 1, residual=True)
    assert not offered(17, 1, residual=True)  # no tile divides a row
    assert not offered(3, 1)


@pytest.mark.parametrize("isa", [*(cpu[0] for cpu in CPUS.values()), native.Isa("generic", 4, 16, "", "")])
@pytest.mark.parametrize("channels", [1, 24, 64, 512])
@pytest.mark.parametrize("overlap", [False, True])
def test_tiles_cover_rows_and_fit_the_registers(isa: native.Isa, channels: int, overlap: bool) -> None:
    for columns in range(1, 120):
        tile, registers = channel_tile(columns, channels, isa, overlap=overlap), isa.registers
        # The smallest tile of a row is one vector of channels: even it must find room.
        held = 1 if isa.width > 16 else 4
        sizes = [p for p in range(4, min(columns, 14) + 1) if overlap or columns % p == 0]
        assert (tile is None) == (not [p for p in sizes if p + 1 + held <= registers])
        if tile is not None:
            pixels, vectors = tile
            assert pixels * vectors + vectors + held <= registers
            times = np.zeros(columns, int)
            for first in channel_columns(columns, pixels):
                times[first : first + pixels] += 1
            assert times.min() == 1
            assert overlap or times.max() == 1


@pytest.mark.parametrize("cpu", CPUS)
def test_the_hot_loop_holds_vector_fmas_and_never_touches_the_stack(cpu: str) -> None:
    isa, triple, instruction, register = CPUS[cpu]
    for columns, channels in ((14, 256), (7, 512), (8, 512), (5, 96)):
        tile = channel_tile(columns, channels, isa)
        assert tile is not None
        pixels, vectors = tile
        kernel = ConvChannelsKernel(pixels, vectors, residual=True)
        text = native.assembly(isa, kernel.build(isa)[0], triple)
        hot = [loop for loop in innermost_loops(text) if any(instruction in line for line in loop)]
        assert len(hot) == 1
        fmas = [line for line in hot[0] if instruction in line]
        assert len(fmas) == pixels * vectors
        assert all(register in line for line in fmas)
        assert [line for line in hot[0] if re.search(r"%rsp|\bsp\b", line)] == []


def test_columns_of_a_square_of_vectors_become_its_rows() -> None:
    """The transposition alone, run on every instruction set that this machine has, against numpy's."""
    import ctypes

    from llvmlite import ir

    from explorer.inference.kernels.builder import PTR, VOID, Function

    @dataclass(frozen=True)
    class Transpose:
        def build(self, isa: native.Isa) -> tuple[ir.Module, str]:
            module = ir.Module("transpose")
            f = Function(module, "transpose", VOID, [PTR, PTR], isa)
            source, to = f.arguments
            rows = [f.load(source, f.vector, 4 * isa.lanes * i) for i in range(isa.lanes)]
            for i, row in enumerate(f.transpose(rows)):
                f.store(row, to, 4 * isa.lanes * i)
            f.b.ret_void()
            return module, "transpose"

    for name in filter(runnable, ISAS):
        isa = native.host_isa(name)
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(native.machine_code(isa, Transpose()))
        square = np.arange(isa.lanes**2, dtype=np.float32).reshape(isa.lanes, isa.lanes)
        got = np.zeros_like(square)
        call(square.ctypes.data, got.ctypes.data)
        np.testing.assert_array_equal(got, square.T)
