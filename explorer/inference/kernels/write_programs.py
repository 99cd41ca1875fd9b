"""The nonzeros of a convolution written as programs, see conv_code.py. Native code: a network has millions of them.

The algorithm in plain words
  order    Nonzeros stand row by row, and are wanted group of output channels by group, in each column by
           column, since all that read one operand follow one another. A counting sort: count what each column
           of each group has, add up, and put every nonzero in its place. A *key* is a column of a group: keys
           are numbered group by group.
  write    For each K block and group: its weights, in the order in which they are read, then its program. That
           begins with the sums, a text that is made before; then, column by column, an operand is loaded, and
           each nonzero becomes the multiply-add of its row, to which only the place of its weight is added. An
           instruction reaches operands and weights near an address; where the next is further away, the address
           is moved on. Once in a while one line is fetched of what runs next. In the end the sums are finished,
           a text that is made before.

The numpy twins are `order_reference` and `reference`; what the programs compute, `conv_code.reference` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels import avx512
from explorer.inference.kernels.builder import CACHE_LINE, I1, I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.conv_code import NEAR_WEIGHTS, REACH_BYTES
from explorer.inference.native import Isa

ORDER = Record(
    ("starts", "columns", "values", "group", "place", "next", "rows_of", "values_of", "rows", "length")
)
"""One call of `OrderColumnsKernel`, without jobs. Rows are output channels.

starts       (rows + 1,) int64: nonzeros before each row
columns      (nonzeros,) int64: the column of each
values       (nonzeros,) float32: its weight; one that is zero is left out
group        (rows,) int64: the first key of each row's group
place        (columns,) int64: the place of each column among the keys of a group
next         (length + 1,) int64, zeros; a result: the nonzeros up to the end of each key
rows_of      (nonzeros,) int64, a result: the row of each nonzero, in the order of the keys
values_of    (nonzeros,) float32, a result: its weight
rows
length       keys
"""

WRITE = Record(
    (
        "ends", "rows_of", "values_of", "homes", "loads", "sums", "texts", "bias", "out", "programs", "count",
        "fetch_after",
    )
)  # fmt: skip
"""One call of `WriteProgramsKernel`, without jobs. Numbers are float32 or float16, what programs compute in.

ends           (keys,) int64: the nonzeros up to the end of each key, which is what `ORDER` leaves in `next`
rows_of        (nonzeros,) int64, as ordered
values_of      (nonzeros,) numbers, as ordered
homes          (columns,) int64: for each place of a column the address from which its operand is reached, see
               `homes`
loads          (columns,) int64: the instruction that loads it from there
sums           (rows,) int64: the instruction that adds to each output channel's sum, without the place of the
               weight
texts          bytes that programs begin and end with: instructions of seven bytes
bias           (rows,) numbers
out            bytes, enough of them, a result
programs       (count,) rows of PROGRAM, partly a result
fetch_after    nonzeros for each line of the following programs that is fetched
"""

PROGRAM = Record(
    (
        "first_key", "last_key", "first_place", "begin", "begin_bytes", "end", "end_bytes", "first_bias",
        "biases", "code", "weights", "next", "lines",
    )
)  # fmt: skip
"""The program of a K block and group of output channels.

first_key, last_key      its keys: [first, last)
first_place              the place of the first of these
begin, begin_bytes       the text that it begins with: where in `texts`, and how long
end, end_bytes           the text that it ends with
first_bias, biases       the biases that it begins with: the first, and how many; none but in the first block
code, weights, next      results, in bytes from `out`: where the code and the weights are, and where the next
                         program begins
lines                    a result: lines of the next programs that are fetched while one vector of pixels is
                         worked on
"""

_VECTOR = 64
"""Bytes."""


def homes(where: NDArray[np.int64]) -> NDArray[np.int64]:
    """The addresses from which operands are reached.

    They lie in the middle of what an instruction reaches, and away from the operand by whole vectors.

    Parameters
    ----------
    where : (K,) int64
        Byte offset of each operand.

    Returns
    -------
    (K,) int64
    """
    near = 2 * REACH_BYTES
    return where // near * near + where % _VECTOR + REACH_BYTES


@dataclass(frozen=True, slots=True)
class OrderColumnsKernel:
    """Nonzeros in the order in which programs take them; a value that became zero is left out.

    The machine code depends on nothing but the CPU.
    """

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("order_columns")
        f = Function(module, "order_columns", VOID, [PTR], isa)
        b, (args,) = f.b, f.arguments
        table = {name: f.field(args, ORDER, name, PTR) for name in ORDER.fields[:-2]}
        rows = f.field(args, ORDER, "rows")

        def number(name: str, index: Value) -> Value:
            return f.load(table[name], I64, b.shl(index, I64(3)), 8)

        def for_each(then: Callable[[Value, Value, Value], None]) -> None:
            """``then(row, address of the key's number, value)`` for each value that is not zero."""

            def one_row(row: Value) -> None:
                def one_entry(entry: Value) -> None:
                    value = f.load(table["values"], I32, b.shl(entry, I64(2)))
                    with b.if_then(b.icmp_signed("!=", b.shl(value, I32(1)), I32(0))):
                        key = b.add(number("group", row), number("place", number("columns", entry)))
                        then(row, f.at(table["next"], b.shl(key, I64(3))), value)

                f.loop(number("starts", b.add(row, I64(1))), one_entry, start=number("starts", row))

            f.loop(rows, one_row)

        def count(_: Value, at: Value, __: Value) -> None:
            f.store(b.add(f.load(at, I64, 8, 8), I64(1)), at, 8, 8)

        def put(row: Value, at: Value, value: Value) -> None:
            where = f.load(at, I64, 0, 8)
            f.store(row, table["rows_of"], b.shl(where, I64(3)), 8)
            f.store(value, table["values_of"], b.shl(where, I64(2)))
            f.store(b.add(where, I64(1)), at, 0, 8)

        def add_up(key: Value, total: Value) -> list[Value]:
            at = f.at(table["next"], b.shl(key, I64(3)))
            total = b.add(total, f.load(at, I64, 0, 8))
            f.store(total, at, 0, 8)
            return [total]

        for_each(count)
        f.loop(f.field(args, ORDER, "length"), add_up, [I64(0)])
        for_each(put)
        b.ret_void()
        return module, "order_columns"


@dataclass(frozen=True, slots=True)
class WriteProgramsKernel:
    """The programs. The machine code depends on the CPU and on what programs compute in.

    Attributes
    ----------
    value_bytes : int
        Of a weight.
    """

    value_bytes: int

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("write_programs")
        f = Function(module, "write_programs", VOID, [PTR], isa)
        b, (args,) = f.b, f.arguments
        table = {name: f.field(args, WRITE, name, PTR) for name in WRITE.fields[:-2]}
        fetch_after = f.field(args, WRITE, "fetch_after")
        out = table["out"]

        def number(name: str, index: Value) -> Value:
            return f.load(table[name], I64, b.shl(index, I64(3)), 8)

        def of_values(count: Value) -> Value:
            """The bytes of so many values."""
            return b.mul(count, I64(self.value_bytes))

        def copy(source: Value, n_bytes: Value, to: Value) -> Value:
            f.call("llvm.memcpy.p0.p0.i64", VOID, [to, source, n_bytes, I1(0)])
            return f.at(to, n_bytes)

        def instruction(word: Value, to: Value) -> Value:
            f.store(word, to, 0, 1)
            return f.at(to, avx512.BYTES)

        def known(program: avx512.Program) -> Value:
            return ir.Constant(I64, int(program[0].view(np.int64)))

        def where_if(condition: Value, word: Value, to: Value) -> Value:
            """Write the instruction, and go on after it only where it is wanted."""
            f.store(word, to, 0, 1)
            return f.at(to, b.select(condition, I64(avx512.BYTES), I64(0)))

        def aligned(offset: Value) -> Value:
            return b.and_(b.add(offset, I64(CACHE_LINE - 1)), I64(-CACHE_LINE))

        def one_program(index: Value, start: Value) -> list[Value]:
            row = f.row(table["programs"], PROGRAM, index)

            def field(name: str) -> Value:
                return f.field(row, PROGRAM, name)

            def tell(name: str, value: Value) -> None:
                f.store(value, row, 8 * PROGRAM.index(name), 8)

            first_key, last_key, biases = field("first_key"), field("last_key"), field("biases")
            before = b.select(b.icmp_signed(">", first_key, I64(0)), b.sub(first_key, I64(1)), I64(0))
            first = b.select(b.icmp_signed(">", first_key, I64(0)), number("ends", before), I64(0))
            last = number("ends", b.sub(last_key, I64(1)))
            n_weights = b.sub(last, first)
            weights = f.at(out, start)
            after_bias = copy(f.at(table["bias"], of_values(field("first_bias"))), of_values(biases), weights)
            copy(f.at(table["values_of"], of_values(first)), of_values(n_weights), after_bias)
            code = aligned(b.add(start, of_values(b.add(n_weights, biases))))
            tell("weights", start)
            tell("code", code)
            to = copy(f.at(table["texts"], field("begin")), field("begin_bytes"), f.at(out, code))
            places = b.sub(field("first_place"), first_key)

            def one_column(
                key: Value, to: Value, entry: Value, home: Value, left: Value, lines: Value
            ) -> list[Value]:
                place = b.add(key, places)
                end = number("ends", key)
                is_used = b.icmp_signed("<", entry, end)
                new_home = b.select(is_used, number("homes", place), home)
                moved = b.sub(new_home, home)
                bytes_on = b.shl(b.and_(moved, I64(0xFFFFFFFF)), I64(24))
                to = where_if(
                    b.icmp_signed("!=", moved, I64(0)),
                    b.or_(bytes_on, known(avx512.advance(avx512.RDI, 0))),
                    to,
                )
                to = where_if(is_used, number("loads", place), to)

                def one_nonzero(entry: Value, to: Value, left: Value, lines: Value) -> list[Value]:
                    at = b.add(b.sub(entry, first), biases)
                    near = b.and_(at, I64(NEAR_WEIGHTS - 1))
                    is_far = b.and_(b.icmp_signed("==", near, I64(0)), b.icmp_signed(">", at, I64(0)))
                    further = known(avx512.advance(avx512.RSI, self.value_bytes * NEAR_WEIGHTS))
                    to = where_if(is_far, further, to)
                    is_due = b.icmp_signed("==", left, I64(0))
                    line = b.shl(b.mul(lines, I64(CACHE_LINE)), I64(24))
                    to = where_if(is_due, b.or_(line, known(avx512.fetch(avx512.RAX, 0))), to)
                    lines = b.add(lines, b.zext(is_due, I64))
                    left = b.select(is_due, b.sub(fetch_after, I64(1)), b.sub(left, I64(1)))
                    weight = b.shl(b.and_(b.sub(near, I64(NEAR_WEIGHTS // 2)), I64(255)), I64(48))
                    to = instruction(b.or_(number("sums", number("rows_of", entry)), weight), to)
                    return [to, left, lines]

                to, left, lines = f.loop(end, one_nonzero, [to, left, lines], start=entry)
                return [to, end, new_home, left, lines]

            to, _, _, _, lines = f.loop(
                last_key, one_column, [to, first, I64(REACH_BYTES), I64(0), I64(0)], start=first_key
            )
            to = copy(f.at(table["texts"], field("end")), field("end_bytes"), to)
            following = aligned(b.sub(b.ptrtoint(to, I64), b.ptrtoint(out, I64)))
            tell("next", following)
            tell("lines", lines)
            return [following]

        f.loop(f.field(args, WRITE, "count"), one_program, [I64(0)])
        b.ret_void()
        return module, "write_programs"


def order_reference(
    weight: NDArray[np.float32], place: NDArray[np.int64], group: NDArray[np.int64], n_keys: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The numpy twin of `OrderColumnsKernel`: where the nonzeros of each key end, their rows and their values.

    Parameters
    ----------
    weight : (M, K) float32
    place : (K,) int64
    group : (M,) int64
        The first key of each row's group.
    n_keys : int
    """
    rows, columns = np.nonzero(weight)
    keys = group[rows] + place[columns]
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(np.bincount(keys, minlength=n_keys))
    return ends, rows[order], weight[rows, columns][order]


def reference(
    weight: NDArray[np.float32],
    where: NDArray[np.int64],
    biases: int,
    fetch_after: int,
    operand: int,
    numbers: avx512.Arithmetic = avx512.FLOAT32,
) -> tuple[NDArray[np.floating], avx512.Program, int]:
    """The numpy twin of one program, without the texts that it begins and ends with.

    Parameters
    ----------
    weight : (rows, K) float32
        Row r is added to in register r.
    where : (K,) int64
        Byte offset of each column's operand.
    biases : int
        Weights that stand before those of the nonzeros.
    fetch_after, operand : int
        Nonzeros for each line that is fetched, and the register of operands.
    numbers : Arithmetic

    Returns
    -------
    (W,) float32 or float16, program, int
        The weights in the order of their use, the instructions, and how many lines they fetch.
    """
    values: list[float] = []
    program = []
    address, lines = REACH_BYTES, 0
    for column, home in enumerate(homes(where)):
        used = np.flatnonzero(weight[:, column])
        if not len(used):
            continue
        if home != address:
            program.append(avx512.advance(avx512.RDI, home - address))
            address = home
        program.append(avx512.load(operand, avx512.RDI, (where[column] - home) // _VECTOR))
        for row in used:
            at = biases + len(values)
            if at and at % NEAR_WEIGHTS == 0:
                program.append(avx512.advance(avx512.RSI, numbers.value_bytes * NEAR_WEIGHTS))
            if len(values) % fetch_after == 0:
                program.append(avx512.fetch(avx512.RAX, CACHE_LINE * lines))
                lines += 1
            program.append(
                numbers.multiply_add(row, operand, avx512.RSI, at % NEAR_WEIGHTS - NEAR_WEIGHTS // 2)
            )
            values.append(weight[row, column])
    return (
        np.array(values, f"f{numbers.value_bytes}"),
        np.concatenate([np.empty(0, np.uint64), *program]),
        lines,
    )
