"""The nonzeros of a matrix, row by row, in one pass over it.

The algorithm in plain words
  Each weight, zero or not, is written to the next free entry; only a nonzero moves on to the entry after it, so
  that zeros are written over. No branch depends on the pattern, which no core could foresee. What a row is to
  be multiplied with (the gain of a batch norm) then meets the nonzeros only.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import F32, I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(("weight", "gain", "ends", "columns", "values", "rows", "row_length", "most"))
"""One call, without jobs. Where `channels` is that of the kernel:

weight              (rows, channels, row_length) float32
gain                (rows, channels) float64: what the weights are multiplied with; 0 for none
ends                (rows,) int64, a result: the entries up to the end of each row
columns             (most + row_length + 1,) int64, a result: the column of each entry
values              (most + row_length + 1, channels) float32, a result: its weights
rows, row_length
most                no row is begun behind more entries than that, so that the tables above are never left, even
                    if another thread changes the weights
"""

F64 = ir.DoubleType()


@dataclass(frozen=True, slots=True)
class FindNonzerosKernel:
    """Everything that the machine code depends on, besides the CPU.

    Attributes
    ----------
    channels : int
        Output channels of a row: a column counts where any of them has a weight.
    """

    channels: int = 1

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("find_nonzeros")
        f = Function(module, "find_nonzeros", VOID, [PTR], isa)
        b, (args,), channels = f.b, f.arguments, self.channels
        weight, gain, ends, columns, values = (
            f.field(args, ARGUMENTS, name, PTR) for name in ARGUMENTS.fields[:5]
        )
        rows, length, most = (f.field(args, ARGUMENTS, name) for name in ARGUMENTS.fields[5:])
        row_bytes = b.shl(length, I64(2))
        has_gain = f.is_there(gain)

        def entry(n: Value) -> Value:
            return f.at(values, b.mul(n, I64(4 * channels)))

        def one_row(row: Value, end: Value) -> list[Value]:
            begin = f.at(weight, b.mul(b.mul(row, I64(channels)), row_bytes))
            lines = [f.at(begin, b.mul(row_bytes, I64(c))) for c in range(channels)]

            def one_column(column: Value, n: Value) -> list[Value]:
                place = b.shl(column, I64(2))
                words = [f.load(line, I32, place) for line in lines]
                for c, word in enumerate(words):
                    f.store(word, entry(n), 4 * c)
                f.store(column, columns, b.shl(n, I64(3)), 8)
                # All bits but the sign: 0.0 and -0.0 are zeros, NaN is none.
                any_bit = words[0]
                for word in words[1:]:
                    any_bit = b.or_(any_bit, word)
                is_nonzero = b.icmp_signed("!=", b.shl(any_bit, I32(1)), I32(0))
                return [b.add(n, b.zext(is_nonzero, I64))]

            fits = b.icmp_signed("<=", end, most)
            (new_end,) = f.loop(b.select(fits, length, I64(0)), one_column, [end])
            with b.if_then(has_gain):
                place = b.shl(b.mul(row, I64(channels)), I64(3))
                gains = [f.load(gain, F64, b.add(place, I64(8 * c)), 8) for c in range(channels)]

                def one_entry(n: Value) -> None:
                    for c, factor in enumerate(gains):
                        value = b.fpext(f.load(entry(n), F32, 4 * c), F64)
                        f.store(b.fptrunc(b.fmul(value, factor), F32), entry(n), 4 * c)

                f.loop(new_end, one_entry, start=end)
            f.store(new_end, ends, b.shl(row, I64(3)), 8)
            return [new_end]

        f.loop(rows, one_row, [I64(0)])
        b.ret_void()
        return module, "find_nonzeros"


def reference(
    weight: NDArray[np.float32], gain: NDArray[np.float64] | None, channels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The numpy twin: where the entries of each row end, their columns, and their weights, (entries, channels).

    Parameters
    ----------
    weight : (M, columns) float32
    gain : (M,) float64 or None
    channels : int
        Divides M.
    """
    together = weight.reshape(len(weight) // channels, channels, weight.shape[1])
    rows, columns = np.nonzero((together != 0).any(1))
    values = together[rows, :, columns]
    if gain is not None:
        values = (values * gain.reshape(-1, channels)[rows]).astype(np.float32)
    ends = np.cumsum(np.bincount(rows, minlength=len(together)))
    return ends, columns, values
