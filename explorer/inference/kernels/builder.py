"""A thin layer over llvmlite's IR builder, so that a kernel reads like a description of the kernel.

It adds three things: structured loops that carry values, vectors of the machine's own width, and records (rows
of 64-bit fields) by which Python hands addresses and sizes to native code. It knows no kernel.

Planes hold float32 or, on request, float16 values (`Isa.precision`). A kernel reads and writes them by `read` and
`write`, and computes with what they hold, or, where that would lose digits (`wide`), with float32.

How to read a generator, for who knows numpy and no LLVM
  A generator is Python that runs once and writes the kernel: each call of `Function` adds an instruction, and
  yields a name for its result (a `Value`), not a number. A Python ``for`` or ``if`` is therefore gone when
  the kernel runs: a loop over the vectors of a tile is so many instructions, one after the other. A loop that
  the kernel runs itself is `Function.loop`, and a choice that it makes is `Function.either` or ``b.if_then``.
  A `Value` is a 64-bit integer, an address, or a vector: one register, `lanes` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.native import Isa

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, PTR, VOID = ir.HalfType(), ir.FloatType(), ir.PointerType(), ir.VoidType()
NULL = ir.Constant(PTR, None)

CACHE_LINE = 64
"""Bytes, of nearly all CPUs: what a prefetch brings, and what two threads had better not write to at once."""

Value = Any  # an llvmlite value; llvmlite ships no types


def _suffix(element: Value) -> str:
    """As the names of LLVM's functions end."""
    return "f16" if element == F16 else "f32"


@dataclass(frozen=True, slots=True)
class Record:
    """Names of the 64-bit fields of a table row that Python fills and native code reads."""

    fields: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return 8 * len(self.fields)

    def index(self, name: str) -> int:
        return self.fields.index(name)

    def filled(self, **values: int) -> NDArray[np.int64]:
        """A row with these fields; all others are 0."""
        row = np.zeros(len(self.fields), np.int64)
        for name, value in values.items():
            row[self.index(name)] = value
        return row


class Function:
    """A native function under construction.

    Parameters
    ----------
    module : llvmlite.ir.Module
        Receives the function.
    name : str
        Symbol name.
    returns, parameters : LLVM types
        Its signature.
    isa : Isa
        The CPU, and what planes hold.
    wide : bool
        Whether to compute in float32 whatever planes hold.

    Attributes
    ----------
    lanes : int
        Values in a vector.
    width : int
        Bytes of a vector in memory.
    vector : LLVM type
        What is computed with.
    """

    def __init__(
        self,
        module: Value,
        name: str,
        returns: Value,
        parameters: Sequence[Value],
        isa: Isa,
        *,
        wide: bool = False,
    ) -> None:
        self.module, self.lanes, self.width = module, isa.lanes, isa.width
        self.element_bytes = isa.element_bytes
        self._element = F16 if isa.precision == "fp16" else F32
        self.native = ir.Function(module, ir.FunctionType(returns, parameters), name)
        self.native.attributes.add("nounwind")
        self.b = ir.IRBuilder(self.native.append_basic_block())
        self._stored = ir.VectorType(self._element, isa.lanes)
        self.vector = ir.VectorType(F32, isa.lanes) if wide else self._stored
        self.int_vector = ir.VectorType(I32, isa.lanes)

    @property
    def arguments(self) -> tuple[Value, ...]:
        return tuple(self.native.args)

    # ---- memory

    def at(self, pointer: Value, offset: int | Value) -> Value:
        """The address `offset` bytes after `pointer`."""
        if isinstance(offset, int):
            if offset == 0:
                return pointer
            offset = I64(offset)
        return self.b.gep(pointer, [offset], source_etype=I8)

    def is_there(self, pointer: Value) -> Value:
        """Whether an address is not null."""
        return self.b.icmp_signed("!=", pointer, NULL)

    def load(self, pointer: Value, type_: Value, offset: int | Value = 0, align: int = 4) -> Value:
        value = self.b.load(self.at(pointer, offset), typ=type_)
        value.align = align
        return value

    def store(self, value: Value, pointer: Value, offset: int | Value = 0, align: int = 4) -> None:
        self.b.store(value, self.at(pointer, offset)).align = align

    def read(self, pointer: Value, offset: int | Value = 0, align: int | None = None) -> Value:
        """A vector of a plane."""
        return self._computed(self.load(pointer, self._stored, offset, align or self.element_bytes))

    def read_wide(self, pointer: Value, offset: int, count: Value) -> Value:
        """The first `count` of as many float32 as a vector has lanes, as what is computed with.

        The others are not read; zeros stand in their place.
        """
        wide = ir.VectorType(F32, self.lanes)
        mask = self.first_lanes(self.minimum(count, I64(self.lanes)))
        zero = ir.Constant(wide, [0.0] * self.lanes)
        arguments = [self.at(pointer, offset), I32(4), mask, zero]
        value = self.call(f"llvm.masked.load.v{self.lanes}f32.p0", wide, arguments)
        return value if self.vector == wide else self.b.fptrunc(value, self.vector)

    def read_one(self, pointer: Value, offset: int | Value = 0) -> Value:
        """One value of a plane, in all lanes."""
        value = self.load(pointer, self._element, offset, self.element_bytes)
        return self.splat(value if self.vector == self._stored else self._extended(value))

    def write(self, value: Value, pointer: Value, offset: int | Value = 0, align: int | None = None) -> None:
        """Store a vector to a plane."""
        self.store(self._to_store(value), pointer, offset, align or self.element_bytes)

    def _extended(self, value: Value) -> Value:
        return value if self._element == F32 else self.b.fpext(value, F32)

    def _computed(self, value: Value) -> Value:
        return value if self.vector == self._stored else self.b.fpext(value, self.vector)

    def _to_store(self, value: Value) -> Value:
        return value if self.vector == self._stored else self.b.fptrunc(value, self._stored)

    def store_where(self, mask: Value, value: Value, pointer: Value, offset: int | Value = 0) -> None:
        """Store the lanes whose mask (a vector of i1) is true, and leave the memory of the others alone."""
        # As integers: LLVM knows masked stores of 16 bits on more CPUs than masked stores of float16.
        bits = ir.VectorType(ir.IntType(8 * self.element_bytes), self.lanes)
        name = f"llvm.masked.store.v{self.lanes}i{bits.element.width}.p0"
        value = self.b.bitcast(self._to_store(value), bits)
        self.call(name, VOID, [value, self.at(pointer, offset), I32(self.element_bytes), mask])

    def write_first(self, count: Value, value: Value, pointer: Value, offset: int | Value = 0) -> None:
        """Store the first `count` lanes of a vector to a plane, and leave the memory of the others alone."""
        self.store_where(self.first_lanes(count), value, pointer, offset)

    def write_in_row(self, value: Value, pointer: Value, index: Value, vectors: Value, tail: int) -> None:
        """Store vector `index` of a row of `vectors`; of the last one `tail` lanes only, unless that is 0."""
        if not tail:
            self.write(value, pointer)
            return
        is_last = self.b.icmp_signed("==", self.b.add(index, I64(1)), vectors)
        self.write_first(self.b.select(is_last, I64(tail), I64(self.lanes)), value, pointer)

    def first_lanes(self, count: int | Value) -> Value:
        """The mask (a vector of i1) of the first `count` lanes; none where that is negative."""
        if isinstance(count, int):
            return ir.Constant(ir.VectorType(I1, self.lanes), [int(i < count) for i in range(self.lanes)])
        numbers = ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes)))
        return self.b.icmp_signed("<", numbers, self.splat(self.b.trunc(count, I32)))

    def field(self, row: Value, record: Record, name: str, type_: Value = I64) -> Value:
        """Field `name` of the record at `row`."""
        return self.load(row, type_, 8 * record.index(name), 8)

    def row(self, table: Value, record: Record, index: Value) -> Value:
        """The address of row `index` of a table of records."""
        return self.at(table, self.b.mul(index, I64(record.n_bytes)))

    def to_float(self, field: Value) -> Value:
        """A float32 that travelled in the low half of a 64-bit field."""
        return self.b.bitcast(self.b.trunc(field, I32), F32)

    def weight(self, pointer: Value, offset: int | Value = 0) -> Value:
        """A weight of four bytes, in all lanes: a float32, or the same float16 twice.

        Broadcasting 32 bits takes a load, 16 bits an arithmetic unit as well.
        """
        if self.vector.element == F32:
            return self.splat(self.load(pointer, F32, offset))
        return self.b.bitcast(self.splat(self.load(pointer, I32, offset), self.lanes // 2), self.vector)

    def two_weights(self, pointer: Value, offset: int | Value = 0) -> list[Value]:
        """Two neighbouring weights, each in all lanes: one load for both, a shuffle for each (AVX2, float32)."""
        both = self.splat(self.load(pointer, ir.DoubleType(), offset), self.lanes // 2)
        # Behind a wall: LLVM would make two broadcasts of it, which are loads.
        both = self.b.asm(ir.FunctionType(both.type, [both.type]), "", "=x,0", [both], False)
        both = self.b.bitcast(both, self.vector)
        every_other = ([i // 2 * 2 + which for i in range(self.lanes)] for which in range(2))
        return [self.pick([both], lanes, 1)[0] for lanes in every_other]

    # ---- vectors

    def constant(self, value: float) -> Value:
        """`value` in all lanes."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def splat_float(self, scalar: Value) -> Value:
        """A float32 in all lanes, as what is computed with."""
        return self.splat(self.narrowed(scalar))

    def narrowed(self, scalar: Value) -> Value:
        """A float32 as what is computed with."""
        return scalar if self.vector.element == F32 else self.b.fptrunc(scalar, F16)

    def splat(self, scalar: Value, count: int | None = None) -> Value:
        type_ = ir.VectorType(scalar.type, count or self.lanes)
        undefined = ir.Constant(type_, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(I32, type_.count), [0] * type_.count)
        return self.b.shuffle_vector(self.b.insert_element(undefined, scalar, I32(0)), undefined, zeros)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c`` (fused where the CPU can)."""
        return self.intrinsic("fmuladd", c.type, [a, b, c])

    def add_products(
        self,
        sums: Sequence[Value],
        counts: tuple[int, int],
        scalar: Callable[[int], Value],
        vector: Callable[[int], Value],
    ) -> list[Value]:
        """``sums[r * S + i] + scalar(r) * vector(i)`` of R scalars (in all lanes) and S vectors, `counts`.

        The smaller of the two sets of operands is held in registers, the other streamed, as registers.py
        counts them.
        """
        (rows, size), new = counts, list(sums)

        def add(r: int, i: int, a: Value, b: Value) -> None:
            new[r * size + i] = self.fma(a, b, new[r * size + i])

        if rows <= size:
            held = [scalar(r) for r in range(rows)]
            for i in range(size):
                x = vector(i)
                for r in range(rows):
                    add(r, i, held[r], x)
        else:
            held = [vector(i) for i in range(size)]
            for r in range(rows):
                w = scalar(r)
                for i in range(size):
                    add(r, i, w, held[i])
        return new

    def clamp(self, value: Value, low: Value, high: Value, *, capped: bool = True) -> Value:
        """Between `low` and `high`, or, unless `capped`, no less than `low`; NaN stays NaN, as in torch."""
        value = self.b.select(self.b.fcmp_ordered("<", value, low), low, value)
        if capped:
            value = self.b.select(self.b.fcmp_ordered(">", value, high), high, value)
        return value

    def larger(self, value: Value, total: Value) -> Value:
        """The larger of each lane; a NaN is taken, and then never given up, as in torch."""
        b = self.b
        larger = b.select(b.fcmp_ordered(">", value, total), value, total)  # a NaN in `total` stays
        return b.select(b.fcmp_unordered("uno", value, value), value, larger)

    def keep(self, value: Value, mask: Value) -> Value:
        """`value` where the integer mask (as wide as its elements) is all ones, 0.0 where it is zero.

        An AND: masked loads become one instruction for each element on NEON.
        """
        return self.b.bitcast(self.b.and_(self.b.bitcast(value, self.mask_type), mask), value.type)

    @property
    def mask_type(self) -> Value:
        """Integers as wide as what is computed with."""
        return ir.VectorType(I32 if self.vector.element == F32 else I16, self.lanes)

    def read_mask(self, pointer: Value, offset: int | Value = 0) -> Value:
        """A vector of a mask in memory: integers as wide as a value of a plane, -1 or 0."""
        stored = ir.VectorType(ir.IntType(8 * self.element_bytes), self.lanes)
        mask = self.load(pointer, stored, offset, self.width)
        return mask if stored == self.mask_type else self.b.sext(mask, self.mask_type)

    def sum_lanes(self, value: Value) -> Value:
        """The sum of a vector's lanes, halves added to halves."""
        count = self.lanes
        while count > 1:
            count //= 2
            low, high = (
                ir.Constant(ir.VectorType(I32, count), [i + start for i in range(count)])
                for start in (0, count)
            )
            value = self.b.fadd(
                self.b.shuffle_vector(value, value, low), self.b.shuffle_vector(value, value, high)
            )
        return self.b.extract_element(value, I32(0))

    def pick(self, vectors: Sequence[Value], elements: Sequence[int | None], count: int) -> list[Value]:
        """`count` vectors of the given elements of the row that `vectors` form; zeros for None and past the end.

        The elements are constants, so that this becomes register shuffles, two source vectors at a time.
        """
        wanted = [*elements, *[None] * (count * self.lanes - len(elements))]
        result = []
        for i in range(count):
            mine = wanted[i * self.lanes : (i + 1) * self.lanes]
            total = self.constant(0.0)
            for source in sorted({e // self.lanes for e in mine if e is not None}):
                take = [
                    self.lanes + e % self.lanes if e is not None and e // self.lanes == source else lane
                    for lane, e in enumerate(mine)
                ]
                chosen = ir.Constant(ir.VectorType(I32, self.lanes), take)
                total = self.b.shuffle_vector(total, vectors[source], chosen)
            result.append(total)
        return result

    def add_in_pairs(self, values: Sequence[Value], count: int = 1) -> list[Value]:
        """`count` sums of `values`, each of every `count`-th of them: pairs are added, then pairs of these."""
        sums = list(values)
        while len(sums) > count:
            half = len(sums) // 2
            sums = [self.b.fadd(a, c) for a, c in zip(sums[:half], sums[half:], strict=True)]
        return sums

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """Columns of a square of `lanes` vectors: lane i of vector j becomes lane j of vector i.

        Blocks off the diagonal change places, first of half the vectors and lanes, then of a quarter, and so on.
        """
        n, vectors = self.lanes, list(rows)
        size = n // 2
        while size:
            # The lower vector of a pair keeps its lanes whose block number is even, and takes the upper
            # vector's in their place for the odd ones.
            low = [lane if not lane & size else n + lane - size for lane in range(n)]
            high = [lane + size if not lane & size else n + lane for lane in range(n)]
            masks = [ir.Constant(ir.VectorType(I32, n), take) for take in (low, high)]
            for i in (i for i in range(n) if not i & size):
                a, b = vectors[i], vectors[i + size]
                vectors[i], vectors[i + size] = (self.b.shuffle_vector(a, b, mask) for mask in masks)
            size //= 2
        return vectors

    def gather(self, base: Value, indices: Value, mask: Value | None = None, otherwise: float = 0.0) -> Value:
        """``base[indices]`` of a plane; lanes whose mask is false give `otherwise`.

        CPUs gather no less than 32 bits: of float16 the element after it is read as well, and dropped.
        """
        addresses = self.b.gep(base, [indices], source_etype=self._element)
        addresses.type = ir.VectorType(PTR, self.lanes)  # llvmlite infers a scalar pointer
        if mask is None:
            mask = ir.Constant(ir.VectorType(I1, self.lanes), [1] * self.lanes)
        bits = np.dtype(f"f{self.element_bytes}").type(otherwise).view(f"u{self.element_bytes}")
        words = self.int_vector
        name = f"llvm.masked.gather.v{self.lanes}i32.v{self.lanes}p0"
        instead = ir.Constant(words, [int(bits)] * self.lanes)
        found = self.call(name, words, [addresses, I32(self.element_bytes), mask, instead])
        if self.element_bytes == 2:
            found = self.b.trunc(found, ir.VectorType(I16, self.lanes))
        return self._computed(self.b.bitcast(found, self._stored))

    # ---- calls

    def call(self, name: str, returns: Value, arguments: Sequence[Value]) -> Value:
        callee = self.module.globals.get(name)
        if callee is None:
            callee = ir.Function(self.module, ir.FunctionType(returns, [a.type for a in arguments]), name)
        return self.b.call(callee, arguments)

    def intrinsic(self, name: str, type_: Value, arguments: Sequence[Value]) -> Value:
        is_vector = isinstance(type_, ir.VectorType)
        suffix = f"v{type_.count}{_suffix(type_.element)}" if is_vector else _suffix(type_)
        return self.call(f"llvm.{name}.{suffix}", type_, arguments)

    def prefetch(self, pointer: Value, offset: int, locality: int = 3) -> None:
        """Fetch a cache line without waiting for it; never faults.

        `locality`: 3 into the L1 cache, 2 into the L2 cache.
        """
        self.call("llvm.prefetch.p0", VOID, [self.at(pointer, offset), I32(0), I32(locality), I32(1)])

    def opaque(self, pointer: Value) -> Value:
        """The same pointer, behind a wall that LLVM does not look through.

        It would merge offsets otherwise; each load is to stay one [register + constant].
        """
        return self.b.asm(ir.FunctionType(PTR, [PTR]), "", "=r,0", [pointer], False)

    # ---- control flow

    def loop(
        self,
        stop: Value,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
        start: Value | None = None,
    ) -> list[Value]:
        """``for i in range(start, stop): carried = body(i, *carried)``; returns the last values carried."""
        b, type_ = self.b, stop.type
        start = type_(0) if start is None else start
        before, head = b.block, self.native.append_basic_block()
        done = self.native.append_basic_block()
        b.cbranch(b.icmp_signed("<", start, stop), head, done)
        b.position_at_end(head)
        counter = b.phi(type_)
        counter.add_incoming(start, before)
        phis = [b.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        new = list(body(counter, *phis) or [])
        following = b.add(counter, type_(1))
        end = b.block
        b.cbranch(b.icmp_signed("<", following, stop), head, done)
        counter.add_incoming(following, end)
        for phi, value in zip(phis, new, strict=True):
            phi.add_incoming(value, end)
        b.position_at_end(done)
        results = []
        for value, last in zip(carried, new, strict=True):
            result = b.phi(value.type)
            result.add_incoming(value, before)
            result.add_incoming(last, end)
            results.append(result)
        return results

    @contextmanager
    def forever(self) -> Iterator[Callable[[Value], None]]:
        """An endless loop; calling what it yields with a condition leaves the loop when the condition holds."""
        b = self.b
        head, done = self.native.append_basic_block(), self.native.append_basic_block()
        b.branch(head)
        b.position_at_end(head)

        def leave_if(condition: Value) -> None:
            stay = self.native.append_basic_block()
            b.cbranch(condition, done, stay)
            b.position_at_end(stay)

        yield leave_if
        b.branch(head)
        b.position_at_end(done)

    def either(
        self, condition: Value, yes: Callable[[], Sequence[Value]], no: Callable[[], Sequence[Value]]
    ) -> list[Value]:
        """The values of ``yes()`` where the condition holds, else those of ``no()``: a branch.

        For what is too dear to compute both ways.
        """
        b = self.b
        blocks = [self.native.append_basic_block() for _ in range(2)]
        done = self.native.append_basic_block()
        b.cbranch(condition, *blocks)
        ends = []
        for block, arm in zip(blocks, (yes, no), strict=True):
            b.position_at_end(block)
            values = list(arm())
            ends.append((values, b.block))
            b.branch(done)
        b.position_at_end(done)
        results = []
        for pair in zip(*(values for values, _ in ends), strict=True):
            result = b.phi(pair[0].type)
            for value, (_, end) in zip(pair, ends, strict=True):
                result.add_incoming(value, end)
            results.append(result)
        return results

    def minimum(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)
