"""A linear layer on one vector per image (a classifier after pooling): matrix times vector, sparse or dense.

Linear layers on many tokens are convolutions with a 1x1 kernel over a tokens-as-pixels layout, see layout.py; here there is one pixel.

  sparse   for each output: gather 16 inputs by index, FMA, and sum the lanes at the end. Rows are filled up to whole vectors, see pack.py.
  dense    for each group of U vectors of outputs: U sums in registers; for each input: broadcast it, U FMAs with the weights in memory
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import F32, I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "out", "out_image", "bias", "low", "high", "n_in", "n_out", "jobs", "rows_per_job", "starts", "indices", "weights",
    )
)  # fmt: skip
"""Sparse: `starts` (n_out + 1 int32, in vectors), `indices` and `weights` (whole vectors). Dense: `weights` [group][input][U lanes]."""


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """What the machine code of a linear layer depends on: `group` is U (dense), or 0 for the sparse kernel."""

    group: int

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("linear")
        f = Function(module, "linear", VOID, [PTR, I64, PTR], isa)
        b, (args, job, _) = f.b, f.arguments
        jobs = f.field(args, ARGUMENTS, "jobs")
        image, piece = b.sdiv(job, jobs), b.srem(job, jobs)
        x = f.at(f.field(args, ARGUMENTS, "x", PTR), b.mul(image, f.field(args, ARGUMENTS, "x_image")))
        out = f.at(f.field(args, ARGUMENTS, "out", PTR), b.mul(image, f.field(args, ARGUMENTS, "out_image")))
        if self.group:
            self._dense(f, args, piece, x, out)
        else:
            self._sparse(f, args, piece, x, out)
        b.ret_void()
        return module, "linear"

    def _sparse(self, f: Function, args: Value, piece: Value, x: Value, out: Value) -> None:
        b = f.b
        starts, indices, weights, bias = (
            f.field(args, ARGUMENTS, n, PTR) for n in ("starts", "indices", "weights", "bias")
        )
        low, high = (f.to_float(f.field(args, ARGUMENTS, n)) for n in ("low", "high"))
        size = f.field(args, ARGUMENTS, "rows_per_job")
        first = b.mul(piece, size)
        last = f.minimum(b.add(first, size), f.field(args, ARGUMENTS, "n_out"))
        zero = ir.Constant(f.vector, [0.0] * f.lanes)
        width = 4 * f.lanes

        def one_row(row: Value) -> None:
            at = b.mul(row, I64(4))
            begin, end = (b.sext(f.load(f.at(starts, at), I32, o), I64) for o in (0, 4))

            def vector(i: Value, total: Value) -> list[Value]:
                o = b.mul(i, I64(width))
                value = f.gather(x, f.load(f.at(indices, o), f.int_vector, 0, width))
                return [f.fma(f.load(f.at(weights, o), f.vector, 0, width), value, total)]

            (total,) = f.loop(end, vector, [zero], start=begin)
            y = b.fadd(f.load(f.at(bias, at), F32), f.sum_lanes(total))
            f.store(f.clamp(y, low, high), f.at(out, at))

        f.loop(last, one_row, start=first)

    def _dense(self, f: Function, args: Value, piece: Value, x: Value, out: Value) -> None:
        b, width, group = f.b, 4 * f.lanes, self.group
        weights, bias = (f.field(args, ARGUMENTS, n, PTR) for n in ("weights", "bias"))
        low, high = (f.splat(f.to_float(f.field(args, ARGUMENTS, n))) for n in ("low", "high"))
        n_in = f.field(args, ARGUMENTS, "n_in")
        at = b.mul(piece, I64(width * group))
        start = [f.load(f.at(bias, at), f.vector, width * i, width) for i in range(group)]
        first = f.at(weights, b.mul(at, n_in))

        def one_input(i: Value, weight: Value, *totals: Value) -> list[Value]:
            value = f.splat(f.load(f.at(x, b.mul(i, I64(4))), F32))
            f.prefetch(weight, 1024)
            new = [f.fma(value, f.load(weight, f.vector, width * j, width), t) for j, t in enumerate(totals)]
            return [f.at(weight, width * group), *new]

        _, *totals = f.loop(n_in, one_input, [first, *start])
        for i, total in enumerate(totals):
            f.store(f.clamp(total, low, high), f.at(out, at), width * i, width)


def reference(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The numpy twin: ``x @ weight.T + bias`` in float64; x (N, F), weight (M, F), bias (M,) float32 -> (N, M) float32."""
    return (x.astype(np.float64) @ weight.astype(np.float64).T + bias).astype(np.float32)
