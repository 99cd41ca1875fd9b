"""Output channels that share some of their operands, taken two at a time: who is whose partner, where their weights go, and that nothing is lost."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import explorer
from explorer.inference import compilation, native, sparse_rows
from explorer.inference.kernels import conv, conv_sparse, conv_tables, match_rows, place_rows, registers
from explorer.inference.pack import weight_words
from explorer.inference.sparse_rows import Entries, SparseWeights, sparse_entries
from explorer.masks import magnitude_mask
from tests.inference.graphs import relative_error
from tests.inference.test_kernels import CPUS, ISAS, TOLERANCE, innermost_loops, run_by

WIDE = native.Isa("test", 16, 32, "", "")
needs_code = pytest.mark.skipif(
    native.current_isa().name == "torch", reason="no machine code on this machine"
)


def random_rows(rows: int, columns: int, density: float, seed: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    weight[generator.random(weight.shape) >= density] = 0
    return weight


def entries_of(weight: NDArray[np.float32], block: NDArray[np.int64], *, partners: bool = True) -> Entries:
    weights = SparseWeights.of(weight, native.current_isa())
    return sparse_entries(
        weights,
        4 * np.arange(weights.shape[1]),
        block,
        int(block.max()) + 1,
        1,
        partial(weight_words, isa=WIDE),
        native.current_isa(),
        partners=partners,
    )


def unpacked(entries: Entries, shape: tuple[int, int]) -> NDArray[np.float32]:
    """The weights, as the numpy twin reads them: of operands that are one in one pixel each, the sums are the weights."""
    rows, columns = shape
    operands = np.zeros(2 * columns, np.float32)
    operands[columns - 1] = 1  # that of column k is one in pixel columns - 1 - k
    names = ("offsets", "weights", "rows", "groups")
    tables = dict(zip(names, (entries.offsets, entries.words, entries.rows, entries.groups), strict=True))
    sums = np.zeros((rows, columns), np.float32)
    for (here, after), pairs in zip(pairwise(entries.starts.tolist()), entries.pairs.tolist(), strict=True):
        block = conv_tables.BLOCK.filled(
            **dict(zip(names, here, strict=True)),
            n_groups=after[3] - here[3] - pairs,
            n_pair_groups=pairs,
        )
        sums = conv_sparse.reference(tables, block, operands, 0, sums)
    return sums[:, ::-1]


@needs_code
@given(
    rows=st.integers(1, 90),
    columns=st.sampled_from([1, 7, 64, 100, 600]),
    density=st.sampled_from([0.02, 0.1, 0.3, 0.9, 1.0]),
    runs=st.integers(1, 4),
    grain=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_partners_are_those_of_the_numpy_twin(
    rows: int, columns: int, density: float, runs: int, grain: int, seed: int
) -> None:
    weights = SparseWeights.of(random_rows(rows, columns, density, seed), native.current_isa())
    run_end = np.array([-(-rows * (i * runs // rows + 1) // runs) for i in range(rows)], np.int64)
    set_words = -(-columns // 512) * match_rows.SET_WORDS
    base = 1000  # of a block that does not begin at column 0
    tables: dict[str, NDArray[Any]] = {
        "columns": weights.columns + base,
        "first": weights.starts[:-1],
        "count": np.diff(weights.starts),
        "base": np.full(rows, base),
        "run_end": run_end,
        "grain": np.full(rows, grain),
        "sets": np.zeros(rows * set_words, np.int64),
        "partner": np.full(rows, -1),
        "shared": np.zeros(rows, np.int64),
        "is_shared": np.zeros(len(weights.columns), np.uint8),
    }
    kernel = match_rows.MatchRowsKernel()
    sparse_rows.run_kernel(
        kernel, match_rows.ARGUMENTS, native.current_isa(), tables, rows=rows, set_words=set_words
    )
    is_there = np.zeros((rows, columns), bool)
    row = np.repeat(np.arange(rows), np.diff(weights.starts))
    is_there[row, weights.columns] = True
    partner, shared = match_rows.reference(is_there, run_end, np.full(rows, grain))
    np.testing.assert_array_equal(tables["partner"], partner)
    np.testing.assert_array_equal(tables["is_shared"], shared[row, weights.columns])
    np.testing.assert_array_equal(tables["shared"], shared.sum(1))


@needs_code
@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=1, max_size=6), st.integers(1, 2))
@settings(deadline=None)
def test_entries_are_placed_as_the_numpy_twin_places_them(rows: list[list[bool]], step: int) -> None:
    count = np.array([len(row) for row in rows], np.int64)
    first = np.cumsum(count) - count
    n = int(count.sum())
    begin = 50 * np.arange(len(rows))
    tables: dict[str, NDArray[Any]] = {
        "where": 3 * np.arange(n),
        "words": np.arange(1, n + 1, dtype=np.int32),
        "is_shared": np.array([entry for row in rows for entry in row], np.uint8),
        "first": first,
        "count": count,
        "step": np.full(len(rows), step),
        "shared_offset": begin,
        "shared_word": begin,
        "own_offset": begin + 25,
        "own_word": begin + 25,
        "offsets": np.full(50 * len(rows), -1, np.int32),
        "filled": np.zeros(50 * len(rows), np.int32),
    }
    kernel = place_rows.PlaceRowsKernel()
    sparse_rows.run_kernel(kernel, place_rows.ARGUMENTS, native.current_isa(), tables, rows=len(rows))
    filled, offsets = np.zeros(50 * len(rows), np.int32), np.full(50 * len(rows), -1, np.int32)
    for at, entries, row in zip(begin, first, rows, strict=True):
        flags = np.array(row, bool)
        places = place_rows.reference(flags, at, at + 25, step)
        filled[places] = entries + np.arange(1, len(row) + 1)
        places[flags] = at + np.arange(np.count_nonzero(flags))
        offsets[places] = 3 * (entries + np.arange(len(row)))
    np.testing.assert_array_equal(tables["filled"], filled)
    np.testing.assert_array_equal(tables["offsets"], offsets)


@needs_code
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.05, 0.2, 0.6, 1.0]),
    blocks=st.integers(1, 4),
    ordered=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_no_weight_is_lost_or_taken_twice(
    rows: int, columns: int, density: float, blocks: int, ordered: bool, seed: int
) -> None:
    weight = random_rows(rows, columns, density, seed)
    block = np.arange(columns) * blocks // columns
    if not ordered:  # the taps of a channel can fall into two blocks
        block = np.random.default_rng(seed).permutation(block)
    entries = entries_of(weight, block)
    np.testing.assert_array_equal(unpacked(entries, (rows, columns)), weight)
    assert len(entries.words) == np.count_nonzero(weight)
    ends = entries.starts[:, 2]
    for b in {0, int(block.max())}:
        assert sorted(entries.rows[ends[b] : ends[b + 1]]) == list(range(rows))


@needs_code
def test_what_two_rows_share_is_loaded_once() -> None:
    weight = random_rows(256, 91, 0.1, 0)
    block = np.zeros(91, np.int64)
    alone, together = (len(entries_of(weight, block, partners=p).offsets) for p in (False, True))
    assert alone == np.count_nonzero(weight)
    assert 0.85 * alone < together < 0.95 * alone
    # Two rows of one pattern share all of it.
    twice = np.repeat(weight[:64], 2, axis=0)
    entries = entries_of(twice, block)
    assert len(entries.offsets) < 0.6 * np.count_nonzero(twice)
    np.testing.assert_array_equal(unpacked(entries, (128, 91)), twice)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride"),
    [
        (300, (14, 14), 1, 1),
        (40, (14, 14), 3, 1),
        (96, (7, 7), 3, 1),
        (9, (28, 28), 5, 2),
        (700, (6, 7), 1, 1),
    ],
)
def test_every_instruction_set_takes_two_channels_at_once(
    isa: str, channels: int, size: tuple[int, int], kernel: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 61, kernel, stride, kernel // 2).eval()
    layer.weight.data *= magnitude_mask(layer.weight.data, 0.85)
    x = torch.randn(2, channels, *size)
    engine = explorer.compile(layer, x, sparse="sparse", threads=2)
    with torch.no_grad():
        wanted = nn.functional.conv2d(
            x.double(), layer.weight.double(), layer.bias.double(), stride, kernel // 2
        )
    for _ in range(2):
        assert relative_error(engine(x), wanted) < TOLERANCE
    other = magnitude_mask(torch.randn_like(layer.weight), 0.5)
    layer.weight.data = torch.randn_like(layer.weight) * other
    engine.update_weights(layer)
    with torch.no_grad():
        assert relative_error(engine(x), layer(x)) < 10 * TOLERANCE


@needs_code
def test_float16_takes_two_channels_at_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "half_isa", partial(native.half_isa, emulated=True))
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 64, 3, padding=1).eval(), torch.randn(1, 16, 28, 28)
    layer.weight.data *= magnitude_mask(layer.weight.data, 0.8)
    engine = explorer.compile(layer, x, sparse="sparse", precision="fp16")
    assert engine.precision == "fp16"
    assert engine.compare(x).relative_l2 < 2e-3


@pytest.mark.parametrize("cpu", ["avx512", "neon", "avx512 fp16"])
def test_one_loop_loads_for_two_rows_and_the_other_for_one(cpu: str) -> None:
    isa, triple, instruction, _ = CPUS[cpu]
    tile = 4
    assert registers.has_partners(tile, isa)
    kernel = conv.ConvKernel(tile, partners=True)
    text = native.assembly(isa, kernel.build(isa)[0], triple)
    hot = [loop for loop in innermost_loops(text) if any(instruction in line for line in loop)]
    fmas = [sum(instruction in line for line in loop) for loop in hot]
    assert sorted(fmas) == [tile, 2 * tile, 2 * tile]
    if cpu == "neon":
        return  # its multiply-adds read no memory, and a load may fetch two vectors
    loads = [sum("zmm" in line and "(%" in line and "broadcast" not in line for line in loop) for loop in hot]
    # A row alone; two rows: what they share, and what each has of its own.
    assert sorted(zip(fmas, loads, strict=True)) == [(tile, tile), (2 * tile, tile), (2 * tile, 2 * tile)]


def test_partners_where_their_sums_stay_in_registers() -> None:
    narrow = native.Isa("test", 8, 16, "", "")
    assert [registers.has_partners(tile, WIDE) for tile in (1, 2, 3, 8)] == [False, False, True, True]
    assert not any(registers.has_partners(tile, narrow) for tile in range(1, 9))
