"""The nonzeros of a sparse convolution as code: one K block, see conv.py, in which each weight is an instruction.

The algorithm in plain words
  Loops over nonzeros (conv_sparse.py) load an operand for each multiply-add, and that load limits them. Here
  the sums of up to `ROWS` output channels, one vector of pixels each, stay in registers, and the nonzeros of
  all of them are gone through input channel by input channel: an operand is loaded once for all nonzeros that
  these output channels have in its column (at 90 % of zeros 30 channels have 3), and each multiply-add reads
  its weight from memory and broadcasts it on the way. Which register it adds to cannot be looked up in a table
  at this speed; so there is no loop and no table, but a program, made for these weights, in which each nonzero
  is one instruction. `explorer.inference.sparse_code` writes it. For each group of output channels it is called
  for each vector of the tile in turn, while it is in the cache.

The numpy twin, `reference`, says what the programs of one K block compute, in their order; the twin of how they
are written, instruction by instruction, is `write_programs.reference`.

Code that is generated for one pattern of zeros: Heinecke et al., "LIBXSMM" (2016), and Wang, "SparseDNN: Fast
Sparse Deep Learning Inference on CPUs" (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import CACHE_LINE, I64, NULL, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.conv_tables import BLOCK

GROUP = Record(("code", "weights", "first_row", "rows", "next", "lines"))
"""Output channels whose sums are in registers together.

code        address of their program
weights     its weights: numbers of the type that programs compute in, in the order in which they are read
first_row   the first of the output channels
rows        how many there are, at most `ROWS`
next        address of what is run after it
lines       cache lines of that which the program fetches for each vector
"""

CALL = Record(("low", "high", "out_plane", "residual_plane", "mask", "next"))
"""What a program is told besides the addresses in its arguments.

low, high                    bounds of the result, in the type that programs compute in, in the lower bytes of a
                             field
out_plane, residual_plane    bytes from an output channel to the next
mask                         (lanes,) integers of these pixels, 0 for none
next                         address of what it fetches of the next programs while it works on them
"""

ROWS = 30
"""Output channels of a group at most: two of the 32 registers hold operands or bounds."""

REACH_BYTES = 128 * 64
"""How far instructions reach from an address, to both sides, where they read vectors of 64 bytes.

Programs are given an address so far ahead of the first operand."""

NEAR_WEIGHTS = 256
"""Weights that instructions reach from an address, half of them before it, where programs are given it."""

_PROGRAM = ir.FunctionType(VOID, [PTR] * 6)
"""Operands, weights, result, residual, sums, and a `CALL`: in RDI, RSI, RDX, RCX, R8 and R9, by the calling
convention of x86-64 on all systems but Windows. A program changes these, RAX, R10, R11 and the vector
registers, which nobody expects back, and needs no stack."""


def run_programs(
    f: Function,
    tile: int,
    row_bytes: int,
    end: Callable[[Value, Value], None] | None,
) -> None:
    """Write the loop over groups and vectors into a function with the arguments of an inner kernel of `conv`.

    Parameters
    ----------
    f : Function
    tile : int
        Vectors of pixels.
    row_bytes : int
        Of the sums of an output channel.
    end : callable, optional
        ``end(first, count)`` finishes so many output channels, whose sums programs leave in memory also after
        the last block.
    """
    b = f.b
    block, operands, sums, _, out, out_plane, residual, residual_plane, mask, low, high = f.arguments
    call = b.inttoptr(b.ptrtoint(b.alloca(ir.ArrayType(I64, len(CALL.fields))), I64), PTR)
    for name, value in (
        ("low", f.narrowed(low)),
        ("high", f.narrowed(high)),
        ("out_plane", out_plane),
        ("residual_plane", residual_plane),
    ):
        f.store(value, call, 8 * CALL.index(name), 8)
    groups = f.field(block, BLOCK, "groups", PTR)
    operands = f.at(operands, REACH_BYTES)
    has_residual, has_mask = f.is_there(residual), f.is_there(mask)

    def one_group(index: Value) -> None:
        group = f.row(groups, GROUP, index)
        program, first, count = (f.field(group, GROUP, name) for name in ("code", "first_row", "rows"))
        weights = f.at(f.field(group, GROUP, "weights", PTR), f.element_bytes * NEAR_WEIGHTS // 2)
        to = f.at(out, b.mul(first, out_plane))
        more = f.at(residual, b.mul(first, residual_plane))
        middle = b.add(first, b.sdiv(count, I64(2)))
        mine = f.at(sums, b.mul(middle, I64(row_bytes)))

        def one_vector(i: Value) -> None:
            def here(pointer: Value) -> Value:
                return f.at(pointer, b.mul(i, I64(f.width)))

            f.store(b.select(has_mask, here(mask), NULL), call, 8 * CALL.index("mask"), 8)
            plus = b.select(has_residual, here(more), NULL)
            arguments = [here(operands), weights, here(to), plus, here(mine), call]
            n_lines = f.field(group, GROUP, "lines")
            fetched = f.at(f.field(group, GROUP, "next", PTR), b.mul(i, b.mul(n_lines, I64(CACHE_LINE))))
            f.store(fetched, call, 8 * CALL.index("next"), 8)
            b.call(b.inttoptr(program, _PROGRAM.as_pointer()), arguments)

        f.loop(I64(tile), one_vector)
        if end is not None:
            end(first, count)

    f.loop(f.field(block, BLOCK, "n_groups"), one_group)


def reference(
    weight: NDArray[np.float32],
    where: NDArray[np.int64],
    operands: NDArray[np.float32],
    base: int,
    sums: NDArray[np.float32],
    lanes: int,
) -> NDArray[np.float32]:
    """The numpy twin: what the programs of one K block make of the sums of a tile, in their order.

    Parameters
    ----------
    weight : (M, K) float32
        Of this block.
    where : (K,) int64
        Byte offset of each column's operand, for the tile's first pixel.
    operands : (elements,) float32
        What offsets count from lies in: an image as it lies in memory, or the buffer that operands were copied
        to.
    base : int
        The element that offsets count from.
    sums : (M, T * lanes) float32
        The bias, or what the block before left.
    lanes : int
        Pixels of a vector.

    Returns
    -------
    (M, T * lanes) float32
        The sums after the block.
    """
    m, sums = len(weight), sums.copy()
    n_groups = -(-m // ROWS)
    groups = np.arange(n_groups + 1) * m // n_groups  # of about as many output channels each
    vector_bytes = lanes * operands.itemsize
    # Those that lie whole vectors apart follow one another: many are reached from one address.
    order = np.lexsort((where, where % vector_bytes))
    for first, last in pairwise(groups.tolist()):  # a program
        for pixel in range(0, sums.shape[1], lanes):  # is called for each vector of the tile
            totals = sums[first:last, pixel : pixel + lanes]  # up to 30 registers
            for column in order:
                used = np.flatnonzero(weight[first:last, column])
                if not len(used):
                    continue  # the program has no instruction for it
                at = base + int(where[column]) // operands.itemsize + pixel
                x = operands[at : at + lanes]  # loaded once, for all these output channels
                for row in used:
                    # One instruction, which broadcasts its weight.
                    totals[row] += weight[first + row, column] * x
    return sums
