"""The nonzeros of a convolution as programs in which each of them is an instruction, see `explorer.inference.kernels.conv_code`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference.kernels import avx512, write_programs
from explorer.inference.kernels.conv_code import CALL, GROUP, NEAR_WEIGHTS, ROWS
from explorer.inference.kernels.write_programs import PROGRAM
from explorer.inference.memory import Memory
from explorer.inference.native import Isa
from explorer.inference.sparse_rows import SparseWeights, run_kernel

_OPERAND, _LOW, _HIGH = 30, 30, 31
"""Registers: an operand, and when all are used up the bounds."""

_BYTES_FETCHED = 24
"""Of the programs that follow, fetched for each nonzero. It takes some 14 itself; where little is computed with it before the next is needed (planes of 7 x 7
pixels, Zen 4) fetching 14 takes 1.13 of the time, 20 to 42 are alike, 56 take 1.05."""


@dataclass(frozen=True, slots=True)
class Finish:
    """What programs do with the sums after the last block.

    Attributes
    ----------
    residual, low, high, mask : bool
        Whether they add a residual, have a lower and an upper bound, and zero gaps.
    """

    residual: bool
    low: bool
    high: bool
    mask: bool


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of some output channels.

    Attributes
    ----------
    code : (bytes,) uint8
        Programs and their weights.
    groups : (blocks * groups, fields) int64
        Rows of `conv_code.GROUP`, block by block, with offsets into `code` in place of addresses.
    """

    code: NDArray[np.uint8]
    groups: NDArray[np.int64]

    def placed(self, memory: Memory) -> NDArray[np.int64]:
        """Copy the code to `memory`; the groups, which then hold addresses."""
        groups = self.groups.copy()
        groups[:, ADDRESSES] += memory.put_code(self.code)
        return groups


ADDRESSES = [GROUP.index(name) for name in ("code", "weights", "next")]
"""The fields of groups that say where something is."""


def programs(
    weights: SparseWeights,
    where: NDArray[np.int64],
    block: NDArray[np.int64],
    n_blocks: int,
    bias: NDArray[np.float32],
    tile: int,
    finish: Finish | None,
    isa: Isa,
) -> Programs:
    """Write the programs of a matrix of weights.

    Parameters
    ----------
    weights : SparseWeights
        A row for each output channel.
    where : (columns,) int64
        Byte offset of the operand of each column.
    block : (columns,) int64
        The K block of each.
    n_blocks : int
    bias : (output channels,) float32
    tile : int
        Vectors of pixels in a tile, which the sums of an output channel in the scratch memory are apart.
    finish : Finish, optional
        Without, the sums are left in the scratch memory.
    isa : Isa
        The CPU that writes, which is the one that will run them.
    """
    m, length = weights.shape
    n_groups = -(-m // ROWS)
    bounds = np.arange(n_groups + 1) * m // n_groups
    sizes = np.diff(bounds)
    group_of = np.repeat(np.arange(n_groups), sizes)
    # Operands whose addresses differ by whole vectors follow one another: many are reached from one address.
    order = np.lexsort((where, where % _VECTOR, block))
    where = where[order]
    homes = write_programs.homes(where)
    loads = avx512.load(np.full(length, _OPERAND), avx512.RDI, (where - homes) // _VECTOR)
    entries = _ordered(weights, np.argsort(order), group_of * length, n_groups * length, isa)

    numbers = avx512.arithmetic(isa)
    texts = _Texts(tile, finish, numbers)
    first_place = np.searchsorted(block[order], np.arange(n_blocks + 1))
    table: NDArray[np.int64] = np.zeros((n_blocks, n_groups, len(PROGRAM.fields)), np.int64)
    for b in range(n_blocks):
        begin = np.array([texts.begin(int(n), is_first=b == 0) for n in sizes])
        end = np.array([texts.end(int(n), is_last=b == n_blocks - 1) for n in sizes])
        for name, column in {
            "first_key": np.arange(n_groups) * length + first_place[b],
            "last_key": np.arange(n_groups) * length + first_place[b + 1],
            "first_place": first_place[b],
            "begin": begin[:, 0],
            "begin_bytes": begin[:, 1],
            "end": end[:, 0],
            "end_bytes": end[:, 1],
            "first_bias": bounds[:-1],
            "biases": sizes * (b == 0),
        }.items():
            table[b, :, PROGRAM.index(name)] = column
    table = table.reshape(-1, len(PROGRAM.fields))
    fetch_after = max(1, _VECTOR * tile // _BYTES_FETCHED)
    out = np.empty(_most_bytes(len(entries["rows_of"]), table, fetch_after, isa), np.uint8)
    tables = entries | {
        "values_of": entries["values_of"].astype(isa.dtype, copy=False),
        "homes": homes,
        "loads": loads,
        "sums": numbers.multiply_add(np.arange(m) - bounds[group_of], _OPERAND, avx512.RSI, 0),
        "texts": texts.joined(),
        "bias": bias.astype(isa.dtype, copy=False),
        "out": out,
        "programs": table,
    }
    kernel = write_programs.WriteProgramsKernel(isa.element_bytes)
    run_kernel(kernel, write_programs.WRITE, isa, tables, count=len(table), fetch_after=fetch_after)
    groups = np.zeros((len(table), len(GROUP.fields)), np.int64)
    for name in ("code", "weights", "next", "lines"):
        groups[:, GROUP.index(name)] = table[:, PROGRAM.index(name)]
    groups[:, GROUP.index("first_row")] = np.tile(bounds[:-1], n_blocks)
    groups[:, GROUP.index("rows")] = np.tile(sizes, n_blocks)
    return Programs(out[: groups[-1, GROUP.index("next")]], groups)


def _ordered(
    weights: SparseWeights, place: NDArray[np.int64], first_key: NDArray[np.int64], n_keys: int, isa: Isa
) -> dict[str, NDArray[Any]]:
    """The nonzeros in the order of their keys, each the `first_key` of its output channel's group and the `place` of its column: what `WRITE` wants of them."""
    n = int(weights.starts[-1])
    ends = np.zeros(n_keys + 1, np.int64)
    rows_of, values_of = np.empty(n, np.int64), np.empty(n, np.float32)
    tables: dict[str, NDArray[Any]] = {
        "starts": weights.starts, "columns": weights.columns[:n], "values": weights.values[:n], "group": first_key, "place": place,
        "next": ends, "rows_of": rows_of, "values_of": values_of,
    }  # fmt: skip
    kernel = write_programs.OrderColumnsKernel()
    run_kernel(kernel, write_programs.ORDER, isa, tables, rows=weights.shape[0], length=n_keys)
    return {"ends": ends, "rows_of": rows_of, "values_of": values_of}


_VECTOR = 64


def _most_bytes(nonzeros: int, table: NDArray[np.int64], fetch_after: int, isa: Isa) -> int:
    """Bytes that programs and weights need at most: each nonzero may need an operand, and another address for it."""
    instructions = 3 * nonzeros + nonzeros // NEAR_WEIGHTS + nonzeros // fetch_after + 2 * len(table)
    texts, biases = (
        int(table[:, [PROGRAM.index(name) for name in names]].sum())
        for names in (("begin_bytes", "end_bytes"), ("biases",))
    )
    numbers = isa.element_bytes * (nonzeros + biases)
    return avx512.BYTES * instructions + texts + numbers + 2 * _VECTOR * (len(table) + 1)


class _Texts:
    """What programs begin and end with, each text once: where it is, and its length, in bytes."""

    def __init__(self, tile: int, finish: Finish | None, numbers: avx512.Arithmetic) -> None:
        self._tile, self._finish, self._numbers = tile, finish, numbers
        self._placed: dict[Any, tuple[int, int]] = {}
        self._pieces: list[NDArray[np.uint8]] = []

    def begin(self, n: int, *, is_first: bool) -> tuple[int, int]:
        return self._place("begin", self._numbers, n, self._tile, is_first)

    def end(self, n: int, *, is_last: bool) -> tuple[int, int]:
        return self._place("end", self._numbers, n, self._tile, self._finish if is_last else None)

    def _place(self, *about: Any) -> tuple[int, int]:
        if about not in self._placed:
            piece = _text(*about)
            self._placed[about] = sum(map(len, self._pieces)), len(piece)
            self._pieces.append(piece)
        return self._placed[about]

    def joined(self) -> NDArray[np.uint8]:
        return np.concatenate(self._pieces)


@cache
def _text(kind: str, *about: Any) -> NDArray[np.uint8]:
    return avx512.machine_code(_begin(*about) if kind == "begin" else _end(*about))


def _begin(numbers: avx512.Arithmetic, n: int, tile: int, is_first: bool) -> avx512.Program:
    """The sums of `n` output channels: their bias, or what the block before left."""
    every = np.arange(n)
    start = avx512.field(avx512.RAX, avx512.R9, CALL.index("next"))
    if is_first:
        return np.concatenate([start, numbers.broadcast(every, avx512.RSI, every - NEAR_WEIGHTS // 2)])
    return np.concatenate([start, avx512.load(every, avx512.R8, (every - n // 2) * tile)])


def _end(numbers: avx512.Arithmetic, n: int, tile: int, finish: Finish | None) -> avx512.Program:
    """Finish the sums, or leave them to who comes after."""
    every = np.arange(n)
    if finish is None:
        return np.concatenate([avx512.store(every, avx512.R8, (every - n // 2) * tile), avx512.finish()])
    start, each = [avx512.field(avx512.R10, avx512.R9, CALL.index("out_plane"))], []
    if finish.mask:
        mask = avx512.field(avx512.RAX, avx512.R9, CALL.index("mask"))
        start += [mask, avx512.load(_HIGH, avx512.RAX, 0), numbers.test(_HIGH)]
    if finish.residual:
        start.append(avx512.field(avx512.R11, avx512.R9, CALL.index("residual_plane")))
        each += [numbers.add(every, avx512.RCX), np.full(n, avx512.advance_by(avx512.RCX, avx512.R11))]
    bounds = []
    for wanted, register, name, bound in (
        (finish.low, _LOW, "low", numbers.at_least),
        (finish.high, _HIGH, "high", numbers.at_most),
    ):
        if wanted:
            start.append(numbers.broadcast(register, avx512.R9, 8 // numbers.value_bytes * CALL.index(name)))
            bounds.append(bound(every, register))
    if finish.mask:
        bounds = bounds or [numbers.same(every)]
        bounds[-1] = avx512.kept(bounds[-1])
    each += bounds
    each += [avx512.store(every, avx512.RDX, 0), np.full(n, avx512.advance_by(avx512.RDX, avx512.R10))]
    return np.concatenate([*start, np.stack(each, 1).reshape(-1), avx512.finish()])
