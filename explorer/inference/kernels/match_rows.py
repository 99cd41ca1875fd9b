"""Rows of a sparse matrix that share columns, found two by two: what they share is then loaded once for both.

The algorithm in plain words
  The columns of each row become a set of bits. Rows come in runs; each row that is still alone takes, of the
  next `WINDOW` rows of its run that are alone too, the one that shares most columns with it: a greedy matching.
  (Of 1024 rows with about 9 of 91 columns, in runs of one length, 16 % of the operands are then loaded once
  less; always taking the best pair of all that are left would make it 17 %.)

The numpy twin is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I8, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "columns", "first", "count", "base", "run_end", "grain", "sets", "partner", "shared", "is_shared",
        "rows", "set_words",
    )
)  # fmt: skip
"""One call, without jobs. An entry is a nonzero; rows are those of one or several K blocks.

columns      (entries,) int64: the column of each entry, ascending in each row
first        (rows,) int64: the first entry of each row
count        (rows,) int64: its entries
base         (rows,) int64: the column that is bit 0 of its set
run_end      (rows,) int64: the row after the last of its run
grain        (rows,) int64: two rows share a multiple of that many columns
sets         (rows, set_words) int64, zeros: becomes the sets
partner      (rows,) int64, a result: the partner of each row; -1, which must stand there before, for none
shared       (rows,) int64, a result: how many columns each shares with its partner
is_shared    (entries,) uint8, a result: 1 where an entry is one of these, the first that both have
rows
set_words    words of a set, a multiple of `SET_WORDS`
"""

_TABLES = ARGUMENTS.fields[:-2]

SET_WORDS = 8
"""Integers that are compared at once."""

WINDOW = 64
"""Rows among which a partner is looked for (twice as many: 3 % more is shared, in twice the time)."""


@dataclass(frozen=True, slots=True)
class MatchRowsKernel:
    """The machine code depends on nothing but the CPU."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("match_rows")
        f = Function(module, "match_rows", VOID, [PTR], isa)
        b, (args,) = f.b, f.arguments
        tables = {name: f.field(args, ARGUMENTS, name, PTR) for name in _TABLES}
        rows, set_words = f.field(args, ARGUMENTS, "rows"), f.field(args, ARGUMENTS, "set_words")
        words = ir.VectorType(I64, SET_WORDS)

        def read(table: Value, i: Value) -> Value:
            return f.load(table, I64, b.shl(i, I64(3)), 8)

        def write(value: Value, table: Value, i: Value) -> None:
            f.store(value, table, b.shl(i, I64(3)), 8)

        def of(row: Value, name: str) -> Value:
            return read(tables[name], row)

        def is_alone(row: Value) -> Value:
            return b.icmp_signed("<", of(row, "partner"), I64(0))

        def set_of(row: Value) -> Value:
            return f.at(tables["sets"], b.shl(b.mul(row, set_words), I64(3)))

        def each_column(row: Value, body: Callable[..., list[Value]], *carried: Value) -> None:
            """``carried = body(entry, word of the set, bit in it, *carried)`` for the columns of a row."""

            def one(i: Value, *carried: Value) -> list[Value]:
                entry = b.add(of(row, "first"), i)
                column = b.sub(read(tables["columns"], entry), of(row, "base"))
                return body(entry, b.lshr(column, I64(6)), b.and_(column, I64(63)), *carried)

            f.loop(of(row, "count"), one, carried)

        def fill(row: Value) -> None:
            mine = set_of(row)

            def add(_: Value, word: Value, bit: Value) -> list[Value]:
                write(b.or_(read(mine, word), b.shl(I64(1), bit)), mine, word)
                return []

            each_column(row, add)

        def in_common(row: Value, other: Value) -> Value:
            mine, theirs = set_of(row), set_of(other)

            def some(i: Value, total: Value) -> list[Value]:
                at = b.shl(i, I64(6))
                both = b.and_(f.load(mine, words, at, 8), f.load(theirs, words, at, 8))
                return [b.add(total, f.call(f"llvm.ctpop.v{SET_WORDS}i64", words, [both]))]

            zeros = ir.Constant(words, [0] * SET_WORDS)
            [total] = f.loop(b.udiv(set_words, I64(SET_WORDS)), some, [zeros])
            return f.call(f"llvm.vector.reduce.add.v{SET_WORDS}i64", I64, [total])

        def choose(row: Value) -> None:
            following = b.add(row, I64(1))

            def better(other: Value, best: Value, most: Value) -> list[Value]:
                [number] = f.either(is_alone(other), lambda: [in_common(row, other)], lambda: [I64(0)])
                wins = b.icmp_signed(">", number, most)
                return [b.select(wins, other, best), b.select(wins, number, most)]

            with b.if_then(is_alone(row)):
                stop = f.minimum(of(row, "run_end"), b.add(following, I64(WINDOW)))
                best, most = f.loop(stop, better, [I64(-1), I64(0)], following)
                most = b.sub(most, b.urem(most, of(row, "grain")))
                with b.if_then(b.icmp_signed(">", most, I64(0))):
                    for mine, theirs in ((row, best), (best, row)):
                        write(theirs, tables["partner"], mine)
                        write(most, tables["shared"], mine)

        def mark(row: Value) -> None:
            shared = of(row, "shared")

            def is_there(entry: Value, word: Value, bit: Value, done: Value) -> list[Value]:
                found = b.trunc(b.lshr(read(theirs, word), bit), I8)
                found = b.and_(found, b.zext(b.icmp_signed("<", done, shared), I8))
                f.store(found, tables["is_shared"], entry, 1)
                return [b.add(done, b.zext(found, I64))]

            with b.if_then(b.icmp_signed(">", shared, I64(0))):
                theirs = set_of(of(row, "partner"))
                each_column(row, is_there, I64(0))

        for step in (fill, choose, mark):
            f.loop(rows, step)
        b.ret_void()
        return module, "match_rows"


def reference(
    is_there: NDArray[np.bool_], run_end: NDArray[np.int64], grain: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The numpy twin: the partner of each row (-1 for none), and which of its columns are shared with it.

    Parameters
    ----------
    is_there : (rows, columns) bool
        Where each row has an entry.
    run_end, grain : (rows,) int64
        As in `ARGUMENTS`.

    Returns
    -------
    (rows,) int64, (rows, columns) bool
    """
    partner, shared = np.full(len(is_there), -1), np.zeros_like(is_there)
    for row in range(len(is_there)):
        if partner[row] >= 0:
            continue
        others = np.arange(row + 1, min(run_end[row], row + 1 + WINDOW))
        others = others[partner[others] < 0]
        in_common = np.count_nonzero(is_there[others] & is_there[row], axis=1)
        most = in_common.max(initial=0) // grain[row] * grain[row]
        if most:
            other = others[np.argmax(in_common)]
            partner[row], partner[other] = other, row
            first = np.flatnonzero(is_there[row] & is_there[other])[:most]
            shared[row, first] = shared[other, first] = True
    return partner, shared
