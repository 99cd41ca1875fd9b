"""Machine code of a few AVX-512 instructions, for float32 and for float16, written with numpy.

Every instruction here is seven bytes long: those that have an EVEX prefix, an opcode, a register and an address
in memory are, and the others are chosen or filled up so. A program is thus an array (instructions,) uint64,
each of whose elements holds an instruction in its lower seven bytes, and thousands are made at once.

All of this is numpy already: the twin to test it against is an assembler, see `tests/inference/test_programs.py`.

An EVEX instruction (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, section 2.7):

    byte 0   62
    byte 1   R X B R' 0 m m m     upper bits of register numbers, inverted; which table of opcodes
    byte 2   W v v v v 1 p p      lower bits of the second operand, inverted; which variant of the opcode
    byte 3   z L L b V a a a      z: lanes whose mask bit is 0 become zero; L: vectors of 64 bytes; b: the value
                                  in memory is broadcast to all lanes; V: upper bit of the second operand,
                                  inverted; a: the mask register, 0 for none
    byte 4   opcode
    byte 5   mod reg rm           how memory is addressed, lower bits of the register, lower bits of the
                                  register that holds the address
    byte 6   displacement         in units of what is read: 64 bytes, or those of one value where it is broadcast
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from explorer.inference.native import Isa

BYTES = 7
"""Of an instruction."""

RAX, RCX, RDX, RSI, RDI, R8, R9, R10, R11 = 0, 1, 2, 6, 7, 8, 9, 10, 11

Program = NDArray[np.uint64]

_K1 = 1
"""The mask register that `Arithmetic.test` leaves its answer in, and `kept` asks."""

_ZERO_WHERE_K1_IS_NOT = 0x80 | _K1
"""In byte 3: z, and the mask register."""


@dataclass(frozen=True, slots=True)
class _Operation:
    opcode: int
    table: int
    variant: int
    wide: int = 0  # W


_LOAD = _Operation(0x10, 1, 0)  # vmovups
_STORE = _Operation(0x11, 1, 0)  # vmovups


def _words(values: ArrayLike) -> Program:
    return np.atleast_1d(np.asarray(values)).astype(np.int64).view(np.uint64)


def _prefixed(
    operation: _Operation, register: ArrayLike, operand: int, base: int, *, broadcast: bool
) -> Program:
    """The first six bytes, for memory at `base`."""
    register = _words(register)
    one = np.uint64
    inverted = register ^ one(31)
    byte1 = (inverted >> one(3) & one(1)) << one(7) | (inverted >> one(4) & one(1)) << one(4)
    byte1 |= one(0x40 | (base < 8) << 5 | operation.table)
    byte2 = operation.wide << 7 | (~operand & 15) << 3 | 4 | operation.variant
    byte3 = 2 << 5 | broadcast << 4 | (~operand >> 4 & 1) << 3
    byte5 = (register & one(7)) << one(3) | one(0x40 | base & 7)
    fixed = one(0x62 | byte2 << 16 | byte3 << 24 | operation.opcode << 32)
    return fixed | byte1 << one(8) | byte5 << one(40)


def _memory(
    operation: _Operation,
    register: ArrayLike,
    operand: int,
    base: int,
    place: ArrayLike,
    *,
    broadcast: bool = False,
) -> Program:
    return _prefixed(operation, register, operand, base, broadcast=broadcast) | (
        _words(place) & np.uint64(255)
    ) << np.uint64(48)


def load(register: ArrayLike, base: int, vector: ArrayLike) -> Program:
    """``register = memory[base + 64 * vector]``, a vector; -128 <= vector < 128."""
    return _memory(_LOAD, register, 0, base, vector)


def store(register: ArrayLike, base: int, vector: ArrayLike) -> Program:
    """``memory[base + 64 * vector] = register``."""
    return _memory(_STORE, register, 0, base, vector)


def _between_registers(
    operation: _Operation, register: ArrayLike, operand: int, source: ArrayLike
) -> Program:
    """An operation whose last operand is a register in the place of memory. A nop fills the seventh byte."""
    inverted = _words(source) ^ np.uint64(31)
    # Its bits 3 and 4 stand where those of the base and of its index do.
    low = _prefixed(operation, register, operand, 0, broadcast=False) & ~np.uint64(0xC7 << 40 | 0x60 << 8)
    where = (inverted >> np.uint64(4) & np.uint64(1)) << np.uint64(14) | (
        inverted >> np.uint64(3) & np.uint64(1)
    ) << np.uint64(13)
    return (
        low
        | where
        | (np.uint64(0xC0) | _words(source) & np.uint64(7)) << np.uint64(40)
        | np.uint64(0x90 << 48)
    )


def kept(program: Program) -> Program:
    """The same, with 0.0 in the lanes that were zero at the last `Arithmetic.test`.

    Of what `at_least`, `at_most` or `same` make. It costs nothing.
    """
    return program | np.uint64(_ZERO_WHERE_K1_IS_NOT << 24)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The instructions that ask what is in a register: numbers of one type.

    Attributes
    ----------
    value_bytes : int
    """

    value_bytes: int
    _broadcast: _Operation
    _fma: _Operation
    _add: _Operation
    _maximum: _Operation
    _minimum: _Operation
    _move: _Operation
    _test: _Operation

    def broadcast(self, register: ArrayLike, base: int, value: ArrayLike) -> Program:
        """``register = memory[base + value_bytes * value]``, one number in all lanes; -128 <= value < 128."""
        return _memory(self._broadcast, register, 0, base, value)

    def multiply_add(self, register: ArrayLike, operand: int, base: int, value: ArrayLike) -> Program:
        """``register += operand * memory[base + value_bytes * value]``, one number in all lanes."""
        return _memory(self._fma, register, operand, base, value, broadcast=True)

    def add(self, register: ArrayLike, base: int) -> Program:
        """``register += memory[base]``, a vector."""
        register = _words(register)
        return np.concatenate([_memory(self._add, r, int(r), base, 0) for r in register])

    def test(self, register: int) -> Program:
        """Remember which lanes of `register`, as integers, are not zero: for `kept`."""
        return _between_registers(self._test, _K1, register, register)

    def same(self, register: ArrayLike) -> Program:
        """``register = register``: for those of which nothing but what is `kept` changes."""
        return _between_registers(self._move, register, 0, register)

    def at_least(self, register: ArrayLike, bound: int) -> Program:
        """``register = max(register, bound)``; NaN stays NaN: where any is, the second operand comes out."""
        return _between_registers(self._maximum, register, bound, register)

    def at_most(self, register: ArrayLike, bound: int) -> Program:
        """``register = min(register, bound)``; NaN stays NaN."""
        return _between_registers(self._minimum, register, bound, register)


FLOAT32 = Arithmetic(
    4,
    _broadcast=_Operation(0x18, 2, 1),  # vbroadcastss
    _fma=_Operation(0xB8, 2, 1),  # vfmadd231ps
    _add=_Operation(0x58, 1, 0),  # vaddps
    _maximum=_Operation(0x5F, 1, 0),  # vmaxps
    _minimum=_Operation(0x5D, 1, 0),  # vminps
    _move=_Operation(0x28, 1, 0),  # vmovaps
    _test=_Operation(0x27, 2, 1),  # vptestmd
)
FLOAT16 = Arithmetic(
    2,
    _broadcast=_Operation(0x79, 2, 1),  # vpbroadcastw
    _fma=_Operation(0xB8, 6, 1),  # vfmadd231ph
    _add=_Operation(0x58, 5, 0),  # vaddph
    _maximum=_Operation(0x5F, 5, 0),  # vmaxph
    _minimum=_Operation(0x5D, 5, 0),  # vminph
    _move=_Operation(0x6F, 1, 3, wide=1),  # vmovdqu16
    _test=_Operation(0x26, 2, 1, wide=1),  # vptestmw
)
"""Of CPUs with AVX512-FP16. (Its multiply-adds broadcast a number of 16 bits on the way, which as an
instruction of its own takes an arithmetic unit.)"""


def arithmetic(isa: Isa) -> Arithmetic:
    """That of what an instruction set computes in."""
    return FLOAT16 if isa.precision == "fp16" else FLOAT32


def advance(base: int, n_bytes: ArrayLike) -> Program:
    """``base += n_bytes``, of one of the lower eight general registers; a number of 32 bits with its sign."""
    return np.uint64(0x48 | 0x81 << 8 | (0xC0 | base) << 16) | (
        _words(n_bytes) & np.uint64(0xFFFFFFFF)
    ) << np.uint64(24)


def fetch(base: int, n_bytes: ArrayLike) -> Program:
    """Fetch the cache line at ``base + n_bytes`` into the L2 cache; `base` is one of the lower eight registers."""
    return np.uint64(0x0F | 0x18 << 8 | (0x90 | base) << 16) | (
        _words(n_bytes) & np.uint64(0xFFFFFFFF)
    ) << np.uint64(24)


def advance_by(base: int, other: int) -> Program:
    """``base += other``; `base` is one of the lower, `other` of the upper eight general registers."""
    return _words(0x4C | 0x01 << 8 | (0xC0 | (other & 7) << 3 | base) << 16 | 0x00401F0F << 24)


def field(register: int, base: int, index: int) -> Program:
    """``register = memory[base + 8 * index]``, 64 bits; `base` is one of the upper eight general registers."""
    prefix = 0x49 | (register >= 8) << 2
    return _words(
        prefix | 0x8B << 8 | (0x40 | (register & 7) << 3 | base & 7) << 16 | 8 * index << 24 | 0x001F0F << 32
    )


def finish() -> Program:
    """Back to the caller."""
    return _words(0xC3 | 0x909090909090 << 8)


def machine_code(program: Program) -> NDArray[np.uint8]:
    """The bytes of a program."""
    return np.ascontiguousarray(program[:, None].view(np.uint8)[:, :BYTES]).reshape(-1)
