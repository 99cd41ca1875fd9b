"""The numpy twins that go in the order of a kernel's loops: they compute what is wanted, from the tables and programs that kernels read."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from explorer.inference import kernels, native, pack
from explorer.inference.kernels import avx512, conv, conv_code, conv_sparse
from explorer.inference.kernels.conv_code import GROUP, NEAR_WEIGHTS, REACH_BYTES
from explorer.inference.kernels.conv_tables import BLOCK
from explorer.inference.kernels.registers import unroll
from explorer.inference.larger_kernels import has_programs
from explorer.inference.layout import MAX_TILE, PitchClasses, Planes
from explorer.inference.native import Isa
from explorer.inference.sparse_code import programs
from explorer.inference.sparse_rows import SparseWeights
from explorer.inference.taps import Taps
from tests.inference.graphs import kernel_classes, relative_error
from tests.inference.test_partners import needs_code, random_rows

TOLERANCE = 1e-5
HALF_TOLERANCE = 2e-2  # sums in float16 are rounded at each step


@dataclass(frozen=True)
class Layer:
    """A convolution of one image at stride one, and its tensors as they lie in memory."""

    image: NDArray[np.float32]
    weight: NDArray[np.float32]
    padding: tuple[int, int]
    x: Planes
    y: Planes
    isa: Isa

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        channels: int,
        rows: NDArray[np.float32],
        kernel: tuple[int, int],
        padding: tuple[int, int],
        isa: Isa,
    ) -> Layer:
        """With such rows of weights, of so many input channels."""
        image = np.random.default_rng(0).standard_normal((channels, *size)).astype(isa.dtype)
        out = tuple(n + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel, strict=True))
        assume(min(out) > 0)
        classes = PitchClasses()
        classes.add("x", *size)
        classes.add("y", *out)
        classes.tie("x", "y")
        classes.pad("x", *padding)
        x = classes.planes("x", (1, channels, *size), 1, channels, *size, isa)
        y = classes.planes("y", (1, len(rows), *out), 1, len(rows), *out, isa)
        weight = rows.reshape(len(rows), channels, *kernel)
        return cls(image.astype(np.float32), weight, padding, x, y, isa)

    @property
    def memory(self) -> NDArray[np.floating[Any]]:
        """The image with all zeros around it; what lies before the first pixel of channel 0 is `x.before` elements."""
        storage = torch.zeros(self.x.elements, dtype=getattr(torch, f"float{8 * self.x.element_bytes}"))
        view = self.x.view(storage)
        assert view is not None
        view[0] = torch.from_numpy(self.image)
        return storage.numpy()

    def operands(self, reach: str, tile: int) -> pack.Operands:
        taps = Taps.of({"padding": self.padding}, self.weight.shape[2:])
        shifts, planes = taps.shifts(self.x.pitch), taps.planes(self.x.channels)
        return pack.operands(planes, shifts, self.x.plane, reach, tile, self.isa)

    def tile(self, most: int) -> int:
        """Vectors of a tile, not more than so many, that divide the planes of the result."""
        return max(t for t in range(1, most + 1) if self.y.vectors % t == 0)

    def pixels(self, planes: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Those of the result, (M, rows, columns), of planes (M, elements)."""
        return planes[:, self.y.inside]

    def wanted(self, bias: NDArray[np.float32]) -> NDArray[np.float32]:
        weight = self.weight.astype(self.isa.dtype).astype(np.float32)
        return conv.reference(self.image[None], weight, bias, padding=self.padding)[0]


def isa_of(lanes: int, precision: str = "fp32", name: str = "avx512") -> Isa:
    """A CPU that this machine packs for, with instructions of its own; nothing else of its code is run."""
    own = native.current_isa()
    return Isa(name, lanes, 32, own.cpu, own.features, precision)


def error(got: NDArray[np.floating[Any]], wanted: NDArray[np.floating[Any]]) -> float:
    return relative_error(torch.from_numpy(got.astype(np.float32)), torch.from_numpy(wanted))


SHAPES = {
    "size": st.tuples(st.integers(1, 11), st.integers(1, 19)),
    "channels": st.integers(1, 9),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 4)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "lanes": st.sampled_from([4, 8, 16]),
    "outputs": st.integers(1, 13),
    "density": st.sampled_from([0.0, 0.1, 0.4, 1.0]),
}


def layer_of(isa: Isa, given: dict[str, Any]) -> Layer:
    size, channels, kernel, padding = (given[name] for name in ("size", "channels", "kernel", "padding"))
    rows = random_rows(given["outputs"], channels * kernel[0] * kernel[1], given["density"], 1)
    return Layer.of(size, channels, rows, kernel, padding, isa)


# ---- conv


@given(**SHAPES, most=st.integers(1, MAX_TILE), block=st.integers(1, 40))
@settings(deadline=None)
def test_the_tiles_of_the_twin_are_the_convolution(most: int, block: int, **shapes: Any) -> None:
    layer = layer_of(Isa("test", shapes["lanes"], 32, "", ""), shapes)
    tile = layer.tile(most)
    width = tile * shapes["lanes"]
    memory, weight = layer.memory, layer.weight.reshape(shapes["outputs"], -1)
    offsets = layer.x.before + layer.operands("direct", tile).within // 4
    bias = np.arange(len(weight), dtype=np.float32)
    tiles = [
        conv.reference_tile(memory, offsets, weight, bias, start, width, block)
        for start in range(0, layer.y.vectors * shapes["lanes"], width)
    ]
    assert error(layer.pixels(np.concatenate(tiles, 1)), layer.wanted(bias)) < TOLERANCE


def test_a_tile_may_begin_at_any_pixel() -> None:
    x, weight = np.arange(40, dtype=np.float32), np.array([[2.0, 0.0, 1.0]], np.float32)
    offsets, bias = np.array([0, 10, 20]), np.array([1000.0], np.float32)
    got = conv.reference_tile(x, offsets, weight, bias, 3, 4, 2)
    np.testing.assert_array_equal(got, [1000 + 2 * x[3:7] + x[23:27]])


# ---- conv_sparse


def copied(
    x: NDArray[Any], base: int, sources: NDArray[np.int64], tile: int, isa: Isa, gaps: Planes | None
) -> NDArray[Any]:
    """The buffer that a block's operands are copied to; of `gaps`, the planes whose gaps are left out ("compact")."""
    rows = []
    for place, more in sources[:, :2].tolist():
        at = base + place // isa.element_bytes
        if gaps is None:
            rows.append(x[at : at + (tile + more) * isa.lanes])
        else:
            row = x[at + gaps.inside.reshape(-1)]
            rows.append(np.append(row, np.zeros(tile * isa.lanes - len(row), row.dtype)))
    return np.concatenate([np.empty(0, x.dtype), *rows])


@needs_code
@given(
    **SHAPES,
    most=st.integers(1, MAX_TILE),
    reach=st.sampled_from(["direct", "shift", "compact"]),
    kind=st.sampled_from(["alone", "partners", "pairs"]),
    parts=st.integers(1, 3),
    blocks=st.integers(1, 3),
    half=st.booleans(),
    cpu=st.sampled_from(["avx512", "neon"]),  # with offsets of 16 bits, and of 32
)
@settings(deadline=None, max_examples=200)
def test_the_twin_reads_packed_tables_as_the_sparse_kernel_does(
    most: int, reach: str, kind: str, parts: int, blocks: int, half: bool, cpu: str, **shapes: Any
) -> None:
    isa = isa_of(shapes["lanes"], "fp16" if half else "fp32", cpu)
    shapes["outputs"] *= 2 if kind == "pairs" else 1
    layer = layer_of(isa, shapes)
    compact = reach == "compact"
    tile = layer.y.compact_vectors if compact else layer.tile(most)
    sizes = {"columns": layer.y.columns, "pitch": layer.y.pitch, "plane": layer.y.vectors} if compact else {}
    kernel = conv.ConvKernel(tile, pairs=kind == "pairs", partners=kind == "partners", **sizes)
    operands = layer.operands(reach, tile)
    weights = SparseWeights.of(
        layer.weight.reshape(shapes["outputs"], -1), native.current_isa(), channels=kernel.channels
    )
    block_bytes = -(-int(operands.n_bytes.sum()) // blocks)
    words = partial(pack.weight_words, isa=isa)
    packed = pack.conv_sparse(weights, operands, kernel, parts, block_bytes, words, isa)
    assert packed.short == has_programs(isa)
    memory, width = layer.memory, tile * isa.lanes
    bias = np.arange(shapes["outputs"], dtype=np.float32)
    tiles = []
    for start in [0] if compact else range(0, layer.y.vectors * isa.lanes, width):
        sums = np.repeat(bias.astype(isa.dtype)[:, None], width, 1)
        for block in packed.blocks:  # part by part, block by block
            about = dict(zip(BLOCK.fields, block.tolist(), strict=True))
            x, base = memory, layer.x.before + start
            if operands.is_copied:
                sources = packed.tables["sources"][about["sources"] :][: about["n_sources"]]
                x, base = copied(x, base, sources, tile, isa, layer.y if compact else None), 0
                x = np.append(x, np.zeros(width, x.dtype))  # nothing is read where nothing was copied
            sums = conv_sparse.reference(packed.tables, block, x, base, sums, kernel.unroll)
        tiles.append(sums)
    planes = np.concatenate(tiles, 1)
    if compact:
        got = planes[:, : layer.y.rows * layer.y.columns].reshape(layer.wanted(bias).shape)
    else:
        got = layer.pixels(planes)
    assert error(got, layer.wanted(bias)) < (HALF_TOLERANCE if half else TOLERANCE)


@needs_code
def test_rows_of_small_tiles_take_several_nonzeros_in_a_turn() -> None:
    isa = isa_of(8)
    weight = random_rows(20, 50, 0.3, 0)
    kernel = conv.ConvKernel(1)
    assert kernel.unroll == unroll(1) == 4
    where = pack.operands(np.arange(50)[:, None], np.zeros(1, np.int64), 16, "direct", 1, isa)
    weights = SparseWeights.of(weight, native.current_isa())
    packed = pack.conv_sparse(weights, where, kernel, 1, 1 << 20, partial(pack.weight_words, isa=isa), isa)
    x = np.random.default_rng(0).standard_normal(50 * 16).astype(np.float32)
    got = conv_sparse.reference(packed.tables, packed.blocks[0], x, 0, np.zeros((20, 8), np.float32), 4)
    np.testing.assert_allclose(got, weight @ x.reshape(50, 16)[:, :8], atol=1e-5)


# ---- conv_code


def words_of(code: NDArray[np.uint8]) -> list[int]:
    """The instructions of seven bytes that code begins with, to the return."""
    found: list[int] = []
    while not found or found[-1] & 0xFF != 0xC3:
        found.append(int.from_bytes(code[avx512.BYTES * len(found) :][: avx512.BYTES].tobytes(), "little"))
    return found


def signed(value: int, bits: int) -> int:
    return value - (value >> (bits - 1) << bits)


def execute(
    instructions: list[int],
    weights: NDArray[np.float32],
    operands: NDArray[np.float32],
    sums: NDArray[np.float32],
    at: dict[int, int],
) -> None:
    """Do what a program's instructions say, one after the other.

    `at`: the addresses in the general registers, as elements of what they point into: operands (RDI), weights (RSI), and sums in scratch memory (R8).
    """
    memory = {avx512.RDI: operands, avx512.RSI: weights, avx512.R8: sums}
    at, vectors = at.copy(), np.zeros((32, 16), np.float32)
    for word in instructions:
        low = word & 0xFFFF
        if low == 0x8148:  # add a number
            at[word >> 16 & 7] += signed(word >> 24 & 0xFFFFFFFF, 32) // 4
        if word & 0xFF != 0x62:
            assert (
                low in (0x8148, 0x180F, 0x8B49) or low & 0xFF == 0xC3
            )  # or fetch, a field of `CALL`, return
            continue
        opcode = word >> 32 & 0xFF
        register = (word >> 43 & 7) | (~word >> 15 & 1) << 3 | (~word >> 12 & 1) << 4
        base = (word >> 40 & 7) | (~word >> 13 & 1) << 3
        there = at[base] + signed(word >> 48 & 0xFF, 8) * (16 if opcode in (0x10, 0x11) else 1)
        assert there >= 0
        vector = memory[base][there : there + 16]
        if opcode == 0x10:
            vectors[register] = vector
        elif opcode == 0x11:
            vector[:] = vectors[register]
        elif opcode == 0x18:
            vectors[register] = vector[0]
        else:
            assert opcode == 0xB8
            operand = (~word >> 19 & 15) | (~word >> 27 & 1) << 4
            vectors[register] += vector[0] * vectors[operand]


@needs_code
@given(
    rows=st.integers(1, 70),
    columns=st.sampled_from([1, 30, 300]),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    blocks=st.integers(1, 3),
    tile=st.integers(1, 4),
    pitch=st.sampled_from([64, 5 * 64, 3 * 448 + 4, 9000]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_programs_executed_one_instruction_after_another_give_the_numbers_of_the_twin(
    rows: int, columns: int, density: float, blocks: int, tile: int, pitch: int, seed: int
) -> None:
    isa, lanes = isa_of(16), 16
    weight = random_rows(rows, columns, density, seed)
    where = np.random.default_rng(seed).permutation(columns) * pitch
    block = np.arange(columns) * blocks // columns
    bias = np.arange(rows, dtype=np.float32)
    made = programs(SparseWeights.of(weight, isa), where, block, blocks, bias, tile, None, isa)
    base = REACH_BYTES // 4  # so that no address lies before the array
    operands = np.random.default_rng(seed).standard_normal(2 * base + columns * pitch // 4 + 99)
    operands = operands.astype(np.float32)
    # What programs leave, and what the twin says: the same operations in the same order, the same bits.
    got = np.zeros((rows, tile * lanes), np.float32)
    wanted = np.repeat(bias[:, None], tile * lanes, 1)
    for group in made.groups:
        about = dict(zip(GROUP.fields, group.tolist(), strict=True))
        numbers = made.code[about["weights"] : about["code"]].view(np.float32)
        instructions = words_of(made.code[about["code"] :])
        for v in range(tile):
            at = {
                avx512.RDI: base + REACH_BYTES // 4 + v * lanes,
                avx512.RSI: NEAR_WEIGHTS // 2,
                avx512.R8: (about["first_row"] + about["rows"] // 2) * tile * lanes + v * lanes,
            }
            execute(instructions, numbers, operands, got.reshape(-1), at)
    for number in range(blocks):
        here = block == number
        wanted = conv_code.reference(weight[:, here], where[here], operands, base, wanted, lanes)
    np.testing.assert_array_equal(got, wanted)
    plain = weight.astype(np.float64) @ operands[base + where[:, None] // 4 + np.arange(tile * lanes)]
    assert error(wanted, (plain + bias[:, None]).astype(np.float32)) < TOLERANCE


@given(**SHAPES, most=st.integers(1, MAX_TILE))
@settings(deadline=None)
def test_the_twin_of_programs_is_the_convolution(most: int, **shapes: Any) -> None:
    layer = layer_of(Isa("test", shapes["lanes"], 32, "", ""), shapes)
    tile, lanes = layer.tile(most), shapes["lanes"]
    memory, where = layer.memory, layer.operands("direct", tile).within
    bias = np.arange(shapes["outputs"], dtype=np.float32)
    sums = np.repeat(bias[:, None], tile * lanes, 1)
    weight = layer.weight.reshape(shapes["outputs"], -1)
    tiles = [
        conv_code.reference(weight, where, memory, layer.x.before + start, sums, lanes)
        for start in range(0, layer.y.vectors * lanes, tile * lanes)
    ]
    assert error(layer.pixels(np.concatenate(tiles, 1)), layer.wanted(bias)) < TOLERANCE


# ---- what is written about kernels

FOLDER = Path(kernels.__file__).parent


def records() -> dict[str, tuple[list[str], str]]:
    """Of each table that a kernel reads its fields, and the text below it."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for statement, below in zip(body, [*body[1:], None], strict=True):
            call = getattr(statement, "value", None)
            if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Record"):
                continue
            assert isinstance(statement, ast.Assign)
            name = statement.targets[0].id  # type: ignore[attr-defined]
            text = getattr(getattr(below, "value", None), "value", "")
            module = __import__(f"explorer.inference.kernels.{file.stem}", fromlist=[name])
            found[f"{file.stem}.{name}"] = list(getattr(module, name).fields), str(text)
    return found


def test_every_field_of_a_table_is_explained_below_it() -> None:
    common = str(kernels.__doc__).partition("These fields are the same everywhere")[2].partition("\nWords")[0]
    everywhere = set(re.findall(r"\w+", " ".join(re.findall(r"^ {4}(\S.*?)(?:  |$)", common, re.MULTILINE))))
    assert everywhere >= {"x", "out", "_image", "_plane", "low", "jobs", "mask"}
    tables = records()
    assert len(tables) > 20
    missing = {
        f"{table}.{field}"
        for table, (fields, text) in tables.items()
        for field in fields
        if not {field, "_" + field.rpartition("_")[2]} & (everywhere | set(re.findall(r"\w+", text)))
    }
    assert not missing


def twins_of(module: ModuleType, text: str) -> list[Any]:
    """The functions that a text names as ``reference``, or ``other.reference``, each of which there is."""
    names = re.findall(r"`((?:\w+\.)?(?:\w+_)?reference\w*)`", text)
    found = []
    for *other, name in (named.split(".") for named in names):
        home = importlib.import_module(f"{kernels.__name__}.{other[0]}") if other else module
        found.append(getattr(home, name))
    return found


def test_every_kernel_has_a_twin_that_its_text_names() -> None:
    classes = kernel_classes()
    assert len(classes) > 20
    without, unnamed = set(), set()
    for kernel in classes:
        module = sys.modules[kernel.__module__]
        named = twins_of(module, f"{module.__doc__} {kernel.__doc__}")
        assert all(callable(twin) for twin in named)
        if not named:
            without.add(kernel.__name__)
        own = {twin for name, twin in vars(module).items() if "reference" in name and callable(twin)}
        unnamed |= {f"{kernel.__module__}: {twin.__name__}" for twin in own - {*named}}
    assert not without
    assert not unnamed


def test_the_examples_of_the_page_about_kernels_run() -> None:
    if native.current_isa().name == "torch":
        pytest.skip("no machine code on this machine: weights are packed by it")
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried > 20
    assert not failed
