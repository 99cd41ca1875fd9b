"""Sparse weights as programs: their machine code is what an assembler makes, they are written as the numpy twins write them, and they compute what torch does."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.errors import EngineError
from explorer.inference import memory as engine_memory
from explorer.inference import native, plan, sparse_code
from explorer.inference.kernels import avx512, write_programs
from explorer.inference.kernels.conv_code import GROUP, NEAR_WEIGHTS, REACH_BYTES, ROWS
from explorer.inference.larger_kernels import LIMIT, Weighed, has_programs, larger_kernels
from explorer.inference.layout import MAX_TILE
from explorer.inference.memory import Memory, can_run_code
from explorer.inference.plan import Choice, Plan
from explorer.inference.sparse_code import Finish, programs
from explorer.inference.sparse_rows import SparseWeights
from tests.inference.graphs import conv_graph, preferring, relative_error, without_limit
from tests.inference.test_kernels import TOLERANCE, compare_with_torch, convolutions
from tests.inference.test_partners import needs_code, random_rows

runs_programs = pytest.mark.skipif(
    not has_programs(native.current_isa()), reason="this machine does not run programs"
)


def as_code(choice: Choice) -> bool:
    return choice.code


@pytest.fixture
def only_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers become programs wherever they can."""
    monkeypatch.setattr(plan.Plan, "candidates", preferring(as_code))
    monkeypatch.setattr("explorer.inference.choosing.larger_kernels", without_limit)


# ---- instructions


def assembled(text: str) -> bytes:
    """The machine code that LLVM's assembler makes of an instruction for a CPU with AVX512-FP16."""
    llvm = pytest.importorskip("llvmlite.binding")
    native._initialise()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "x86_64-unknown-linux-gnu"
    target = llvm.Target.from_triple(triple).create_target_machine(cpu="sapphirerapids")
    mark = "\\AA\\BB\\CC\\DD\\EE\\A1\\B2\\C3"
    bytes_of_mark = ".byte 0xAA,0xBB,0xCC,0xDD,0xEE,0xA1,0xB2,0xC3"
    module = llvm.parse_assembly(f'module asm "{bytes_of_mark}; {text}; {bytes_of_mark}"')
    module.triple, module.data_layout = triple, str(target.target_data)
    between = target.emit_object(module).split(bytes.fromhex(mark.replace("\\", "")))
    assert len(between) == 3
    return bytes(between[1])


EVERY = [0, 7, 8, 15, 16, 23, 24, 31]
NUMBERS = {"s": avx512.FLOAT32, "h": avx512.FLOAT16}
"""By the last letter of the names of their instructions."""


@pytest.mark.skipif(bool(native.NO_LLVM), reason="no assembler without llvmlite")
@pytest.mark.parametrize(
    ("program", "text"),
    [
        *((avx512.load(r, avx512.RDI, v), f"vmovups {64 * v}(%rdi), %zmm{r}") for r, v in zip(EVERY, [1, -128, 127, 5] * 2, strict=True)),
        *((avx512.load(r, avx512.R8, 3), f"vmovups 192(%r8), %zmm{r}") for r in EVERY),
        *((avx512.store(r, avx512.R8, -9), f"vmovups %zmm{r}, -576(%r8)") for r in EVERY),
        *((avx512.store(r, avx512.RDX, 2), f"vmovups %zmm{r}, 128(%rdx)") for r in EVERY),
        *((avx512.FLOAT32.broadcast(r, avx512.RSI, -128), f"vbroadcastss -512(%rsi), %zmm{r}") for r in EVERY),
        *((avx512.FLOAT32.broadcast(r, avx512.R9, 2), f"vbroadcastss 8(%r9), %zmm{r}") for r in EVERY),
        *((avx512.FLOAT16.broadcast(r, avx512.RSI, -128), f"vpbroadcastw -256(%rsi), %zmm{r}") for r in EVERY),
        *((avx512.FLOAT16.broadcast(r, avx512.R9, 4), f"vpbroadcastw 8(%r9), %zmm{r}") for r in EVERY),
        *((avx512.FLOAT32.multiply_add(r, x, avx512.RSI, 127), f"vfmadd231ps 508(%rsi){{1to16}}, %zmm{x}, %zmm{r}") for r in EVERY for x in (2, 30)),
        *((avx512.FLOAT16.multiply_add(r, x, avx512.RSI, 127), f"vfmadd231ph 254(%rsi){{1to32}}, %zmm{x}, %zmm{r}") for r in EVERY for x in (2, 30)),
        *((n.at_least(r, 30), f"vmaxp{of} %zmm{r}, %zmm30, %zmm{r}") for of, n in NUMBERS.items() for r in EVERY),
        *((n.at_most(r, 31), f"vminp{of} %zmm{r}, %zmm31, %zmm{r}") for of, n in NUMBERS.items() for r in EVERY),
        *((avx512.kept(n.at_least(r, 30)), f"vmaxp{of} %zmm{r}, %zmm30, %zmm{r} {{%k1}} {{z}}") for of, n in NUMBERS.items() for r in EVERY),
        *((avx512.kept(n.at_most(r, 31)), f"vminp{of} %zmm{r}, %zmm31, %zmm{r} {{%k1}} {{z}}") for of, n in NUMBERS.items() for r in EVERY),
        *((avx512.kept(avx512.FLOAT32.same(r)), f"vmovaps %zmm{r}, %zmm{r} {{%k1}} {{z}}") for r in EVERY),
        *((avx512.kept(avx512.FLOAT16.same(r)), f"vmovdqu16 %zmm{r}, %zmm{r} {{%k1}} {{z}}") for r in EVERY),
        *((avx512.FLOAT32.test(r), f"vptestmd %zmm{r}, %zmm{r}, %k1") for r in EVERY),
        *((avx512.FLOAT16.test(r), f"vptestmw %zmm{r}, %zmm{r}, %k1") for r in EVERY),
        *((avx512.advance(r, n), f"addq ${n}, %{name}") for r, name in ((avx512.RDI, "rdi"), (avx512.RSI, "rsi")) for n in (1024, 70000, -16384)),
        *((avx512.fetch(avx512.RAX, n), f"prefetcht1 {n}(%rax)") for n in (128, 64000)),
        *((avx512.advance_by(a, b), f"addq %{y}, %{x}") for a, x in ((avx512.RDX, "rdx"), (avx512.RCX, "rcx")) for b, y in ((avx512.R10, "r10"), (avx512.R11, "r11"))),
        *((avx512.field(r, avx512.R9, 3), f"movq 24(%r9), %{name}") for r, name in ((avx512.RAX, "rax"), (avx512.R10, "r10"), (avx512.R11, "r11"))),
        (avx512.finish(), "ret"),
    ],
)  # fmt: skip
def test_instructions_are_those_of_an_assembler(program: avx512.Program, text: str) -> None:
    made, wanted = avx512.machine_code(program).tobytes(), assembled(text)
    assert len(made) == avx512.BYTES
    assert made[: len(wanted)] == wanted
    assert made[len(wanted) :] in (b"", b"\x90", b"\x0f\x1f\x00", b"\x0f\x1f\x40\x00", b"\x90" * 6)


@pytest.mark.skipif(bool(native.NO_LLVM), reason="no assembler without llvmlite")
@pytest.mark.parametrize("of", NUMBERS)
def test_an_addition_to_each_register_too(of: str) -> None:
    for r in EVERY:
        for base, name in ((avx512.RCX, "rcx"), (avx512.RAX, "rax")):
            # An assembler leaves a displacement of zero out: one of a vector has the same length as here.
            wanted = bytearray(assembled(f"vaddp{of} 64(%{name}), %zmm{r}, %zmm{r}"))
            wanted[6] = 0
            assert avx512.machine_code(NUMBERS[of].add(r, base)).tobytes() == bytes(wanted)


@pytest.mark.parametrize("of", NUMBERS)
def test_a_program_of_many_instructions_is_that_of_each(of: str) -> None:
    numbers = NUMBERS[of]

    def every(i: Any) -> avx512.Program:
        parts = (
            numbers.multiply_add(i, 30, avx512.RSI, i - 15),
            numbers.add(i, avx512.RCX),
            numbers.at_most(i, 31),
        )
        return np.stack(parts)

    several = np.arange(30)
    np.testing.assert_array_equal(every(several), np.concatenate([every(i) for i in several], 1))


# ---- programs as they are written


@needs_code
@given(
    rows=st.integers(1, 70),
    columns=st.sampled_from([1, 5, 64, 300]),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_nonzeros_are_ordered_as_the_numpy_twin_orders_them(
    rows: int, columns: int, density: float, seed: int
) -> None:
    weight = random_rows(rows, columns, density, seed)
    place = np.random.default_rng(seed).permutation(columns)
    group = np.arange(rows) // 30 * columns
    n_keys = int(group[-1]) + columns
    isa = native.current_isa().single
    got = sparse_code._ordered(SparseWeights.of(weight, isa), place, group, n_keys, isa)
    wanted = write_programs.order_reference(weight, place, group, n_keys)
    expected: Any
    for name, expected in zip(("ends", "rows_of", "values_of"), wanted, strict=True):
        np.testing.assert_array_equal(got[name][: len(expected)], expected)


@needs_code
@given(
    rows=st.integers(1, 95),
    columns=st.sampled_from([1, 40, 300]),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    blocks=st.integers(1, 3),
    tile=st.integers(1, 8),
    pitch=st.sampled_from([64, 448, 3 * 448 + 4, 9000]),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_programs_are_written_as_the_numpy_twin_writes_them(
    rows: int, columns: int, density: float, blocks: int, tile: int, pitch: int, half: bool, seed: int
) -> None:
    weight = random_rows(rows, columns, density, seed)
    where, block = np.arange(columns) * pitch, np.arange(columns) * blocks // columns
    bias = np.arange(rows, dtype=np.float32)
    finish = Finish(residual=True, low=True, high=False, mask=bool(seed % 2))
    # Written by a CPU that need not be able to run them.
    isa = native.half_isa(native.current_isa(), emulated=True) if half else native.current_isa().single
    assert isa is not None
    numbers = avx512.arithmetic(isa)
    made = programs(SparseWeights.of(weight, isa), where, block, blocks, bias, tile, finish, isa)
    order = np.lexsort((where, where % 64, block))
    begins = 0
    n_groups = -(-rows // ROWS)
    assert len(made.groups) == blocks * n_groups
    for index, group in enumerate(made.groups):
        about = dict(zip(GROUP.fields, group, strict=True))
        number, first, n = index // n_groups, about["first_row"], about["rows"]
        mine = order[block[order] == number]
        biases = bias[first : first + n] if number == 0 else bias[:0]
        fetch_after = max(1, 64 * tile // sparse_code._BYTES_FETCHED)
        values, program, lines = write_programs.reference(
            weight[first : first + n, mine],
            where[mine],
            len(biases),
            fetch_after,
            sparse_code._OPERAND,
            numbers,
        )
        is_last = number == blocks - 1
        whole = [
            sparse_code._begin(numbers, n, tile, number == 0),
            program,
            sparse_code._end(numbers, n, tile, finish if is_last else None),
        ]
        code = avx512.machine_code(np.concatenate(whole))
        assert about["weights"] == begins
        assert about["code"] % 64 == 0
        assert about["lines"] == lines
        np.testing.assert_array_equal(made.code[about["code"] :][: len(code)], code)
        there = made.code[begins : begins + isa.element_bytes * (len(biases) + len(values))].view(isa.dtype)
        np.testing.assert_array_equal(there, np.concatenate([biases.astype(isa.dtype), values]))
        assert about["next"] >= about["code"] + len(code)
        begins = about["next"]
    assert begins == len(made.code)


def test_instructions_reach_every_operand_and_weight() -> None:
    where = np.arange(-3, 70000, 4)
    away = where - write_programs.homes(where)
    assert np.all(away % 64 == 0)
    assert np.all((away >= -128 * 64) & (away < 128 * 64))
    assert REACH_BYTES == 128 * 64
    assert NEAR_WEIGHTS == 256
    # What programs leave in the scratch memory is reached from its middle.
    assert ROWS * MAX_TILE <= 256


# ---- what they compute


@runs_programs
@given(case=convolutions())
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_convolution_as_a_program_equals_torch(only_programs: None, case: dict[str, Any]) -> None:
    # Several groups of output channels, some of them partly filled.
    compare_with_torch(case, 9 * case["outputs"], "sparse")


def pruned(network: Any, sparsity: float) -> Any:
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.normal_()
            layer.weight.data[torch.rand_like(layer.weight) < sparsity] = 0
    return network.eval()


class Block(nn.Module):
    """Several K blocks, tiles and groups, an activation that programs leave to the kernel, and a residual."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, middle, 3, padding=1)
        self.c, self.d = nn.Conv2d(middle, channels, 1), nn.Conv2d(channels, middle, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.c(nn.functional.silu(self.b(nn.functional.relu6(self.a(x))))) + x)
        return nn.functional.gelu(self.d(y))


@runs_programs
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (33, 29)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_of_programs_equals_torch(
    only_programs: None, size: tuple[int, int], sparsity: float, threads: int
) -> None:
    network = pruned(Block(400, 130), sparsity)
    x = torch.randn(2, 400, *size)
    engine = explorer.compile(network, x, threads=threads, sparse="sparse")
    assert all("code" in label for label in engine.choices.values())
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < TOLERANCE
        other = pruned(Block(400, 130), sparsity / 2)
        engine.update_weights(other)
        assert relative_error(engine(x), other(x)) < TOLERANCE
        assert relative_error(engine(x[:1]), other(x[:1])) < TOLERANCE


@runs_programs
def test_linear_layers_over_tokens_as_programs_equal_torch(only_programs: None) -> None:
    network = pruned(nn.Sequential(nn.Linear(300, 500), nn.GELU(), nn.Linear(500, 300)), 0.9)
    x = torch.randn(2, 77, 300)
    engine = explorer.compile(network, x, sparse="sparse")
    assert set(engine.choices.values()) == {"code"}
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < TOLERANCE


@runs_programs
def test_weights_in_pairs_are_programs_as_well(only_programs: None) -> None:
    network = pruned(nn.Conv2d(40, 64, 3, padding=1), 0.9)
    weight = network.weight.data
    weight[1::2] = torch.where(weight[::2] != 0, torch.randn_like(weight[::2]), 0.0)
    weight[1, :, 0, 0] = 0.0  # where one of the two has none
    x = torch.randn(1, 40, 20, 20)
    engine = explorer.compile(network, x, sparse="sparse")
    assert set(engine.choices.values()) == {"code"}
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < TOLERANCE


@runs_programs
def test_programs_pass_nan_and_infinity_on_as_torch_does(only_programs: None) -> None:
    weight = torch.zeros(40, 8, 1, 1)
    weight[torch.arange(40), torch.arange(40) % 8] = 1.0
    x = torch.ones(1, 8, 9, 9)
    x[0, 1, 4, 4], x[0, 2, 3, 3], x[0, 3, 2, 2] = float("nan"), float("inf"), -float("inf")
    for activation in (nn.ReLU(), nn.ReLU6(), nn.Identity()):
        conv = nn.Conv2d(8, 40, 1)
        conv.weight.data[:] = weight
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        network = nn.Sequential(conv, activation).eval()
        engine = explorer.compile(network, torch.ones_like(x), sparse="sparse")
        assert set(engine.choices.values()) == {"code"}
        with torch.no_grad():
            # Channels that do not read the place of a NaN have none: no weight of zero is multiplied.
            wanted = activation(x[:, torch.arange(40) % 8])
        torch.testing.assert_close(engine(x), wanted, equal_nan=True)


# ---- who becomes a program


def test_layers_with_most_pixels_become_programs_until_the_memory_is_used_up() -> None:
    def layer(nonzeros: int, vectors: int, *, weights: int = 0, can: bool = True) -> Weighed:
        return Weighed(weights or 10 * nonzeros, nonzeros, vectors, can)

    rest = {9: layer(1_000_000, 200, can=False)}
    layers = {0: layer(100_000, 4), 1: layer(100_000, 200), 2: layer(10_000_000, 90), 3: layer(200_000, 14)}
    assert larger_kernels(layers | rest, 0).code == {0, 1, 2, 3} - {2}
    assert larger_kernels({0: layer(300_000, 4), 1: layer(300_000, 5)}, 0).code == frozenset()
    assert larger_kernels({0: layer(300_000, 4), 1: layer(300_000, 5)}, 4_000_000).code == {1}
    assert larger_kernels({0: layer(300_000, 4), 1: layer(300_000, 5)}, 11_000_000).code == {0, 1}


def test_what_is_too_sparse_or_large_and_dense_does_not_become_a_program() -> None:
    small, large = int(native.l2_bytes() / 4 / 16), int(native.l2_bytes() / 4 / 15)
    for weights, nonzeros, gains in (
        (10**6, 29_000, False), (10**6, 31_000, True), (10**6, 749_000, True), (10**6, 760_000, False), (small, small, True),
        (large, large, False), (0, 0, False),
    ):  # fmt: skip
        assert Weighed(weights, nonzeros, 7, True).may_gain == gains, (weights, nonzeros)
        assert not Weighed(weights, nonzeros, 7, False).may_gain
    # Those of float16 are smaller.
    assert Weighed(large, large, 7, True, half=True).may_gain


@runs_programs
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_a_network_with_programs_keeps_to_the_limit_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, sparsity: float, precision: Any
) -> None:
    if precision == "fp16" and native.half_isa(native.current_isa()) is None:
        pytest.skip("this CPU does not compute in float16")
    # Whatever is fastest on a machine that is busy: all that may be programs are.
    monkeypatch.setattr(plan.Plan, "candidates", preferring(as_code))
    network = pruned(
        nn.Sequential(Block(512, 256), *[nn.Conv2d(256, 256, 3, padding=1) for _ in range(4)]), sparsity
    )
    x = torch.randn(1, 512, 14, 14)
    engine = explorer.compile(network, x, sparse="sparse", precision=precision)
    labels = engine.choices.values()
    assert any("code" in label for label in labels)
    assert not all("code" in label for label in labels)
    nonzeros = sum(int(torch.count_nonzero(p)) for p in network.parameters() if p.dim() > 1)
    assert engine.n_bytes <= LIMIT * (8 * nonzeros + engine._network.plan.memory.n_bytes)


@needs_code
def test_only_those_that_can_are_offered_as_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = native.Isa("avx512", 16, 32, "", "")
    plain: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}

    def may(isa: native.Isa, groups: int = 1, channels: int = 16) -> bool:
        graph = conv_graph(
            (1, channels, 20, 20),
            torch.ones(channels, channels // groups, 1, 1),
            None,
            **plain,
            groups=groups,
        )
        return Plan(graph, isa, 1).may_be_code(graph, 0)

    monkeypatch.setattr("explorer.inference.larger_kernels.can_run_code", lambda: True)
    assert may(wide)
    assert may(wide, groups=2)
    assert not may(wide, groups=16)
    assert not may(native.Isa("avx2", 8, 16, "", ""))
    assert not may(native.Isa("neon", 4, 32, "", ""))
    assert not may(native.Isa("avx512", 32, 32, "", "+avx512f", "fp16"))
    assert may(native.Isa("avx512", 32, 32, "", "+avx512f,+avx512fp16", "fp16"))
    monkeypatch.setattr("explorer.inference.larger_kernels.can_run_code", lambda: False)
    assert not may(wide)


def test_a_system_that_forbids_to_run_what_was_written_has_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hardened:
        @staticmethod
        def mprotect(*_: object) -> int:
            ctypes.set_errno(errno.EACCES)
            return -1

    Hardened.mprotect.argtypes = None  # type: ignore[attr-defined]
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Hardened)
    engine_memory.can_run_code.cache_clear()
    try:
        assert not can_run_code()
        memory = Memory()
        memory.put_code(np.zeros(3, np.uint8))
        with pytest.raises(EngineError, match="does not let memory be made runnable"):
            memory.seal()
        network = pruned(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), 0.9)
        x = torch.randn(1, 16, 20, 20)
        engine = explorer.compile(network, x, sparse="sparse")
        assert not any("code" in label for label in engine.choices.values())
        with torch.no_grad():
            assert relative_error(engine(x), network(x)) < TOLERANCE
    finally:
        engine_memory.can_run_code.cache_clear()


@runs_programs
def test_code_that_was_sealed_runs_and_more_can_follow() -> None:
    memory = Memory()
    for value in (1.5, -2.0):
        memory.zeros(3, np.float32)
        # One vector: the bias of one output channel, and no nonzero.
        isa = native.current_isa().single
        weights = SparseWeights.of(np.zeros((1, 1), np.float32), isa)
        made = programs(
            weights,
            np.zeros(1, np.int64),
            np.zeros(1, np.int64),
            1,
            np.array([value], np.float32),
            1,
            None,
            isa,
        )
        start = memory.put_code(made.code)
        memory.seal()
        about = dict(zip(GROUP.fields, (int(v) for v in made.groups[0]), strict=True))
        sums, call = memory.zeros(16, np.float32), memory.zeros(8, np.int64)
        program = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)(start + about["code"])
        program(
            0,
            start + about["weights"] + 2 * NEAR_WEIGHTS,
            0,
            0,
            engine_memory.address(sums),
            engine_memory.address(call),
        )
        np.testing.assert_array_equal(sums, np.full(16, value, np.float32))
