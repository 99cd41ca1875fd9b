"""Maximum or average over windows, separably: first over the rows of a window, then over its columns.

The algorithm in plain words
  For each output row, the maximum (or the sum) of the image rows that its window covers goes into one line of
  scratch, vector by vector. Left and right of the image that line holds minus infinity (or zero), so that
  columns need no border case. The result over the window's columns is then that of the line read at as many
  positions; with a stride of s, s vectors are read and every s-th element is picked by register shuffles. A sum
  is multiplied by one over the size of the window, which differs at the border when padding is not counted.

A window without dilation costs kh + s * kw loads a vector; through an index table (pool.py) it takes kh * kw
gathers, which cost an order of magnitude more.

The numpy twins are `reference_maximum` and `reference_average`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import F32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "low", "high", "jobs", "channels",
        "channels_per_job", "scale",
    )
)  # fmt: skip
"""Each channel of x (images, channels, plane) to a plane of another size. Job = (image, some channels),
see channels.py; the sizes of planes are known to the code.

scale    ((vectors + 1) * lanes,) float32: what sums are multiplied with, for each element of a plane of the
         result (average)
"""

F32_BYTES = 4

_UNROLLED = 8
"""Rows of a window that are combined without a loop."""

LARGEST_STRIDE = 4
"""Wider strides would read more vectors than they use."""


@dataclass(frozen=True, slots=True)
class WindowPoolKernel:
    """What the machine code depends on.

    Attributes
    ----------
    average : bool
        Whether windows are averaged, in float32 whatever planes hold; otherwise their maximum is taken.
    size, stride, padding : (int, int)
        Rows and columns; no dilation, column stride up to `LARGEST_STRIDE`.
    rows, columns, pitch : int
        Input planes: pixels, and elements from one row to the next.
    out_rows, out_columns, out_pitch, out_vectors : int
        Output planes; everything in their vectors that is no pixel is set to zero.
    """

    average: bool
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

    def left(self, lanes: int) -> int:
        """Elements of the line before the image: whole vectors."""
        return -(-self.padding[1] // lanes) * lanes

    def line_vectors(self, lanes: int) -> int:
        """Vectors of the line: the image, and all that the last output vector reads."""
        stride, out = self.stride[1], -(-self.out_pitch // lanes) * lanes
        last = (out - lanes) * stride - self.padding[1] + self.size[1] - 1 + stride * lanes
        return -(-(self.left(lanes) + max(last, self.columns)) // lanes) + 1

    def scratch_bytes(self, isa: Isa) -> int:
        """Bytes of scratch that a job needs."""
        return F32_BYTES * isa.lanes * self.line_vectors(isa.lanes)

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        return _Generator(self, isa).module(), "window_pool"


class _Generator:
    def __init__(self, kernel: WindowPoolKernel, isa: Isa) -> None:
        self.k = kernel
        self.ir = ir.Module("window_pool")
        self.f = Function(self.ir, "window_pool", VOID, [PTR, I64, PTR], isa, wide=kernel.average)
        # The line holds what is computed with.
        self._cell = F32_BYTES if self.f.vector.element == F32 else self.f.element_bytes
        self._outside = self.f.constant(0.0 if kernel.average else float("-inf"))

    def module(self) -> Value:
        f, k = self.f, self.k
        b, (_, job, scratch) = f.b, f.arguments
        image, first, last = channels_of(f, self._field, job)
        x = f.at(self._field("x", PTR), b.mul(image, self._field("x_image")))
        out = f.at(self._field("out", PTR), b.mul(image, self._field("out_image")))
        low, high = (f.splat_float(f.to_float(self._field(n))) for n in ("low", "high"))
        line = f.at(scratch, self._cell * k.left(f.lanes))
        for i in range(k.line_vectors(f.lanes)):
            self._keep(self._outside, scratch, i)

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, self._field("x_plane")))
            to = f.at(out, b.mul(channel, self._field("out_plane")))
            f.write(f.constant(0.0), to, f.width * (k.out_vectors - 1))

            def one_row(row: Value) -> None:
                top = b.sub(b.mul(row, I64(k.stride[0])), I64(k.padding[0]))
                start = b.select(b.icmp_signed("<", top, I64(0)), I64(0), top)
                stop = f.minimum(b.add(top, I64(k.size[0])), I64(k.rows))
                self._fill_line(plane, line, start, stop)
                self._read_line(line, b.mul(row, I64(k.out_pitch)), to, low, high)

            f.loop(I64(k.out_rows), one_row)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return self.ir

    def _field(self, name: str, type_: Value = I64) -> Value:
        return self.f.field(self.f.arguments[0], ARGUMENTS, name, type_)

    def _keep(self, value: Value, line: Value, index: int | Value) -> None:
        """Store vector number `index` of the line."""
        f, n_bytes = self.f, self._cell * self.f.lanes
        at = index * n_bytes if isinstance(index, int) else f.b.mul(index, I64(n_bytes))
        f.store(value, line, at, n_bytes)

    def _combined(self, value: Value, total: Value) -> Value:
        return self.f.b.fadd(value, total) if self.k.average else self.f.larger(value, total)

    def _fill_line(self, plane: Value, line: Value, start: Value, stop: Value) -> None:
        """The maximum, or the sum, of rows [start, stop) of the plane, to the line."""
        f, b, k = self.f, self.f.b, self.k
        row_bytes = I64(f.element_bytes * k.pitch)

        def in_parts(index: Value) -> Value:
            def one_row(_: Value, pointer: Value, total: Value) -> list[Value]:
                return [f.at(pointer, row_bytes), self._combined(f.read(pointer), total)]

            pointer = f.at(f.at(plane, b.mul(start, row_bytes)), b.mul(index, I64(f.width)))
            return f.loop(stop, one_row, [pointer, self._outside], start=start)[1]

        def whole_window(index: Value) -> Value:
            pointer = f.at(f.at(plane, b.mul(start, row_bytes)), b.mul(index, I64(f.width)))
            rows = [f.read(pointer, f.element_bytes * k.pitch * i) for i in range(k.size[0])]
            return reduce(lambda total, row: self._combined(row, total), rows)

        whole, rest = divmod(k.columns, f.lanes)
        inside = f.first_lanes(rest)

        def fill(combined: Callable[[Value], Value]) -> None:
            f.loop(I64(whole), lambda i: self._keep(combined(i), line, i))
            if rest:
                self._keep(b.select(inside, combined(I64(whole)), self._outside), line, whole)

        if k.size[0] > _UNROLLED:
            fill(in_parts)
            return
        # Nearly all windows have all of their rows in the image, and need no loop over them.
        is_whole = b.icmp_signed("==", b.sub(stop, start), I64(k.size[0]))
        with b.if_else(is_whole) as (yes, no):
            with yes:
                fill(whole_window)
            with no:
                fill(in_parts)

    def _read_line(self, line: Value, first: Value, plane: Value, low: Value, high: Value) -> None:
        """The same over the window's columns, to the output row that begins at element `first` of its plane.

        Zeros go to the gap after it.
        """
        f, b, k = self.f, self.f.b, self.k
        stride = k.stride[1]
        to = f.at(plane, b.mul(first, I64(f.element_bytes)))
        scale = f.at(self._field("scale", PTR), b.mul(first, I64(F32_BYTES))) if k.average else None

        def combined(index: Value) -> Value:
            total = None
            begin = f.at(line, b.mul(index, I64(self._cell * f.lanes * stride)))
            for column in range(k.size[1]):
                pointer = f.at(begin, self._cell * (column - k.padding[1]))
                vectors = [
                    f.load(pointer, f.vector, self._cell * f.lanes * i, self._cell) for i in range(stride)
                ]
                (value,) = f.pick(vectors, range(0, stride * f.lanes, stride), 1) if stride > 1 else vectors
                total = value if total is None else self._combined(value, total)
            if scale is not None:
                total = b.fmul(total, f.load(scale, f.vector, b.mul(index, I64(F32_BYTES * f.lanes))))
            return f.clamp(total, low, high)

        whole, rest = divmod(k.out_columns, f.lanes)
        f.loop(I64(whole), lambda i: f.write(combined(i), to, b.mul(i, I64(f.width))))
        if rest:
            mask = ir.Constant(f.mask_type, [-int(i < rest) for i in range(f.lanes)])
            f.write(f.keep(combined(I64(whole)), mask), to, whole * f.width)
        for i in range(whole + bool(rest), -(-k.out_pitch // f.lanes)):
            f.write(f.constant(0.0), to, i * f.width)


def reference_maximum(
    x: NDArray[np.float32],
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> NDArray[np.float32]:
    """The numpy twin of the maximum: x (N, C, H, W) float32 -> (N, C, OH, OW) float32, floor mode."""
    pad = ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)
    padded = np.pad(x, pad, constant_values=-np.inf)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    taps = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return np.asarray(taps.max(axis=(4, 5)), np.float32)


def reference_average(
    x: NDArray[np.float32],
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    count_padding: bool,
) -> NDArray[np.float32]:
    """The numpy twin of the average: x (N, C, H, W) float32 -> (N, C, OH, OW) float32, floor mode."""
    pad = ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)

    def sums(values: NDArray[np.float64], outside: float) -> NDArray[np.float64]:
        padded = np.pad(values, pad, constant_values=outside)
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))
        return np.asarray(windows[:, :, :: stride[0], :: stride[1]].sum(axis=(4, 5)))

    counts = sums(np.ones(x.shape), float(count_padding))
    return (sums(x.astype(np.float64), 0.0) / counts).astype(np.float32)
