"""Nonzeros to the places where the sparse convolution reads them, when it takes one row at a time.

The algorithm in plain words
  A cell is what a row has in a K block. One pass over the nonzeros counts them, cell by cell; once it is known
  where each cell begins, a second pass puts each nonzero at the next place of its cell. Blocks need not ascend
  along a row, and nothing is sorted.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(
    ("starts", "columns", "words", "block", "where", "next", "last", "offsets", "filled", "rows", "n_blocks")
)
"""One call, without jobs. Where `channels` is that of the kernel:

starts      (rows + 1,) int64: entries before each row
columns     (entries,) int64: the column of each entry
words       (entries, channels) int32: its weights, four bytes each
block       (columns,) int64: the K block of each column
where       (columns,) int32: byte offset of its operand
next        (rows, n_blocks) int64, of each cell: counting adds its entries to it; placing takes its first place
            from it, and leaves the place after its last entry
last        (rows, n_blocks) int64, a result of placing: the last entry of each cell
offsets     (places,) int32, a result of placing: `where` of the entry at each place
filled      (places, channels) int32, a result of placing: its words
rows, n_blocks

Counting needs `starts`, `columns`, `block` and `next` only.
"""

PASSES = ("count", "place")


@dataclass(frozen=True, slots=True)
class PlaceEntriesKernel:
    """Everything that the machine code depends on, besides the CPU.

    Attributes
    ----------
    which : str
        One of `PASSES`.
    channels : int
        Output channels of a row, each with a weight for every entry.
    """

    which: str
    channels: int = 1

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        name = f"{self.which}_entries"
        module = ir.Module(name)
        f = Function(module, name, VOID, [PTR], isa)
        b, (args,), channels = f.b, f.arguments, self.channels
        tables = {field: f.field(args, ARGUMENTS, field, PTR) for field in ARGUMENTS.fields[:-2]}
        rows, n_blocks = (f.field(args, ARGUMENTS, field) for field in ARGUMENTS.fields[-2:])

        def get(table: str, index: Value) -> Value:
            return f.load(tables[table], I64, b.shl(index, I64(3)), 8)

        def put(value: Value, table: str, index: Value) -> None:
            f.store(value, tables[table], b.shl(index, I64(3)), 8)

        def one_row(row: Value) -> None:
            first = get("starts", row)
            cells = b.mul(row, n_blocks)

            def one_entry(i: Value) -> None:
                entry = b.add(first, i)
                column = get("columns", entry)
                cell = b.add(cells, get("block", column))
                place = get("next", cell)
                put(b.add(place, I64(1)), "next", cell)
                if self.which == "count":
                    return
                put(entry, "last", cell)
                f.store(
                    f.load(tables["where"], I32, b.shl(column, I64(2))),
                    tables["offsets"],
                    b.shl(place, I64(2)),
                )
                source = f.at(tables["words"], b.mul(entry, I64(4 * channels)))
                target = f.at(tables["filled"], b.mul(place, I64(4 * channels)))
                for c in range(channels):
                    f.store(f.load(source, I32, 4 * c), target, 4 * c)

            f.loop(b.sub(get("starts", b.add(row, I64(1))), first), one_entry)

        f.loop(rows, one_row)
        b.ret_void()
        return module, name


def reference(
    cell: NDArray[np.int64], begins: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numpy twin: the place of each entry, and how many each cell has.

    Parameters
    ----------
    cell : (entries,) int64
        The cell of each.
    begins : (cells,) int64
        The first place of each.

    Returns
    -------
    (entries,) int64, (cells,) int64
    """
    count = np.bincount(cell, minlength=len(begins))
    order = np.argsort(cell, kind="stable")
    places = np.empty(len(cell), np.int64)
    places[order] = np.arange(len(cell)) + np.repeat(begins - (np.cumsum(count) - count), count)
    return places, count
