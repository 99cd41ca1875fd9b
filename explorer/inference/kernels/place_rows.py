"""Nonzeros to the places where the sparse convolution reads them, when it takes two rows at once.

The algorithm in plain words
  Entry by entry, row by row: an entry that is shared with the row's partner goes to the next of one list of
  places, any other to the next of another. Both lists have places for offsets and for weights, at a fixed
  distance.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I1, I8, I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "where", "words", "is_shared", "first", "count", "step", "shared_offset", "shared_word", "own_offset",
        "own_word", "offsets", "filled", "rows",
    )
)  # fmt: skip
"""One call, without jobs.

where          (entries,) int64: byte offset of each entry's operand
words          (entries,) int32: its weight, of four bytes
is_shared      (entries,) uint8: whether the row's partner has it too
first          (rows,) int64: the first entry of each row
count          (rows,) int64: its entries
step           (rows,) int64: places from one of its entries to the next: 2 where a partner's stand between
               them, else 1; shared offsets, which serve both, stand side by side
shared_offset, shared_word, own_offset, own_word
               (rows,) int64: the first place of each kind in `offsets` and `filled`
offsets        (places of offsets,) int32, a result
filled         (places of weights,) int32, a result
rows
"""


@dataclass(frozen=True, slots=True)
class PlaceRowsKernel:
    """The machine code depends on nothing but the CPU."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("place_rows")
        f = Function(module, "place_rows", VOID, [PTR], isa)
        b, (args,) = f.b, f.arguments
        tables = {name: f.field(args, ARGUMENTS, name, PTR) for name in ARGUMENTS.fields[:-1]}

        def of(row: Value, name: str) -> Value:
            return f.load(tables[name], I64, b.shl(row, I64(3)), 8)

        def put(value: Value, name: str, place: Value) -> None:
            f.store(value, tables[name], b.shl(place, I64(2)))

        def one_row(row: Value) -> None:
            first, step = of(row, "first"), of(row, "step")

            def one_entry(i: Value, *places: Value) -> list[Value]:
                entry = b.add(first, i)
                is_shared = b.trunc(f.load(tables["is_shared"], I8, entry, 1), I1)
                shared_offset, shared_word, own_offset, own_word = places
                offset = b.select(is_shared, shared_offset, own_offset)
                word = b.select(is_shared, shared_word, own_word)
                put(b.trunc(of(entry, "where"), I32), "offsets", offset)
                put(f.load(tables["words"], I32, b.shl(entry, I64(2))), "filled", word)
                after = [
                    b.add(shared_offset, I64(1)), b.add(shared_word, step), b.add(own_offset, step), b.add(own_word, step),
                ]  # fmt: skip
                return [
                    b.select(is_shared, *(pair if i < 2 else reversed(pair)))
                    for i, pair in enumerate(zip(after, places, strict=True))
                ]

            begin = [of(row, name) for name in ("shared_offset", "shared_word", "own_offset", "own_word")]
            f.loop(of(row, "count"), one_entry, begin)

        f.loop(f.field(args, ARGUMENTS, "rows"), one_row)
        b.ret_void()
        return module, "place_rows"


def reference(is_shared: NDArray[np.bool_], shared: int, own: int, step: int) -> NDArray[np.int64]:
    """The numpy twin, of one row: the places of its weights.

    Parameters
    ----------
    is_shared : (entries,) bool
    shared, own : int
        The first place of either kind.
    step : int

    Returns
    -------
    (entries,) int64
    """
    places = np.empty(len(is_shared), np.int64)
    places[is_shared] = shared + step * np.arange(np.count_nonzero(is_shared))
    places[~is_shared] = own + step * np.arange(np.count_nonzero(~is_shared))
    return places
