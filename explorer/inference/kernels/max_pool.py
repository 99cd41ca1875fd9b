"""Maximum over windows, separably: first over the rows of a window, then over its columns.

The algorithm in plain words
  For each output row, the maximum of the image rows that its window covers goes into one line of scratch, vector by vector. Left and right of the
  image that line holds minus infinity, so that columns need no border case. The maximum over the window's columns is then that of the line
  read at as many positions; with a stride of s, s vectors are read and every s-th element is picked by register shuffles.

A window without dilation costs kh + s * kw loads a vector; through an index table (`explorer.inference.kernels.pool`) it takes kh * kw gathers, which
cost an order of magnitude more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "low", "high", "jobs", "channels", "channels_per_job",
    )
)  # fmt: skip

LARGEST_STRIDE = 4
"""Wider strides would read more vectors than they use."""


@dataclass(frozen=True, slots=True)
class MaxPoolKernel:
    """What the machine code depends on.

    Attributes
    ----------
    size, stride, padding : (int, int)
        Rows and columns; no dilation, column stride up to `LARGEST_STRIDE`.
    rows, columns, pitch : int
        Input planes: pixels, and elements from one row to the next.
    out_rows, out_columns, out_pitch, out_vectors : int
        Output planes; everything in their vectors that is no pixel is set to zero.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    rows: int
    columns: int
    pitch: int
    out_rows: int
    out_columns: int
    out_pitch: int
    out_vectors: int

    def _left(self, lanes: int) -> int:
        """Elements of the line before the image: whole vectors."""
        return -(-self.padding[1] // lanes) * lanes

    def _line_vectors(self, lanes: int) -> int:
        """Vectors of the line: the image, and all that the last output vector reads."""
        stride, out = self.stride[1], -(-self.out_pitch // lanes) * lanes
        last = (out - lanes) * stride - self.padding[1] + self.size[1] - 1 + stride * lanes
        return -(-(self._left(lanes) + max(last, self.columns)) // lanes) + 1

    def scratch_bytes(self, isa: Isa) -> int:
        """Bytes of scratch that a job needs."""
        return isa.width * self._line_vectors(isa.lanes)

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("max_pool")
        f = Function(module, "max_pool", VOID, [PTR, I64, PTR], isa)
        b, (args, job, scratch) = f.b, f.arguments
        width, lanes = f.width, f.lanes

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        x = f.at(field("x", PTR), b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        low, high = (f.splat_float(f.to_float(field(n))) for n in ("low", "high"))
        zero, lowest = (f.constant(v) for v in (0.0, float("-inf")))
        line = f.at(scratch, f.element_bytes * self._left(lanes))
        for i in range(self._line_vectors(lanes)):
            f.write(lowest, scratch, width * i, width)

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, field("x_plane")))
            to = f.at(out, b.mul(channel, field("out_plane")))
            f.write(zero, to, width * (self.out_vectors - 1))

            def one_row(row: Value) -> None:
                top = b.sub(b.mul(row, I64(self.stride[0])), I64(self.padding[0]))
                start = b.select(b.icmp_signed("<", top, I64(0)), I64(0), top)
                stop = f.minimum(b.add(top, I64(self.size[0])), I64(self.rows))
                self._fill_line(f, plane, line, lowest, start, stop)
                self._read_line(
                    f, line, f.at(to, b.mul(row, I64(f.element_bytes * self.out_pitch))), low, high
                )

            f.loop(I64(self.out_rows), one_row)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "max_pool"

    def _fill_line(
        self, f: Function, plane: Value, line: Value, lowest: Value, start: Value, stop: Value
    ) -> None:
        """The maximum of rows [start, stop) of the plane, to the line."""
        b, width = f.b, f.width
        row_bytes = I64(f.element_bytes * self.pitch)

        def maximum(offset: Value) -> Value:
            def one_row(_: Value, pointer: Value, total: Value) -> list[Value]:
                return [f.at(pointer, row_bytes), _larger(f, f.read(pointer), total)]

            pointer = f.at(f.at(plane, b.mul(start, row_bytes)), offset)
            return f.loop(stop, one_row, [pointer, lowest], start=start)[1]

        def one_vector(i: Value) -> None:
            at = b.mul(i, I64(width))
            f.write(maximum(at), f.at(line, at), 0, width)

        whole, rest = divmod(self.columns, f.lanes)
        f.loop(I64(whole), one_vector)
        if rest:
            inside = ir.Constant(
                ir.VectorType(ir.IntType(1), f.lanes), [int(i < rest) for i in range(f.lanes)]
            )
            value = b.select(inside, maximum(I64(whole * width)), lowest)
            f.write(value, line, whole * width, width)

    def _read_line(self, f: Function, line: Value, to: Value, low: Value, high: Value) -> None:
        """The maximum over the window's columns, to one output row and the gap after it."""
        b, width, stride = f.b, f.width, self.stride[1]

        def maximum(at: Value) -> Value:
            total = None
            for column in range(self.size[1]):
                pointer = f.at(
                    f.at(line, b.mul(at, I64(stride))), f.element_bytes * (column - self.padding[1])
                )
                vectors = [f.read(pointer, width * i) for i in range(stride)]
                (value,) = f.pick(vectors, range(0, stride * f.lanes, stride), 1) if stride > 1 else vectors
                total = value if total is None else _larger(f, value, total)
            return f.clamp(total, low, high)

        def one_vector(i: Value) -> None:
            at = b.mul(i, I64(width))
            f.write(maximum(at), f.at(to, at))

        whole, rest = divmod(self.out_columns, f.lanes)
        f.loop(I64(whole), one_vector)
        if rest:
            mask = ir.Constant(f.mask_type, [-int(i < rest) for i in range(f.lanes)])
            f.write(f.keep(maximum(I64(whole * width)), mask), to, whole * width)
        for i in range(whole + bool(rest), -(-self.out_pitch // f.lanes)):
            f.write(f.constant(0.0), to, i * width)


def _larger(f: Function, value: Value, total: Value) -> Value:
    """The larger; a NaN is taken, and then never given up, as in torch."""
    b = f.b
    return b.select(
        b.or_(b.fcmp_ordered(">", value, total), b.fcmp_unordered("uno", value, value)), value, total
    )


def reference(
    x: NDArray[np.float32],
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> NDArray[np.float32]:
    """The numpy twin: x (N, C, H, W) float32 -> (N, C, OH, OW) float32, floor mode."""
    pad = ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)
    padded = np.pad(x, pad, constant_values=-np.inf)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    taps = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return np.asarray(taps.max(axis=(4, 5)), np.float32)
