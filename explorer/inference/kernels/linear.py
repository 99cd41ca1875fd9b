"""A linear layer on one vector per image (a classifier after pooling): matrix times vector, sparse or dense.

Linear layers on many tokens are convolutions with a 1x1 kernel over a tokens-as-pixels layout, see layout.py;
here there is one pixel.

The algorithm in plain words
  A job is a piece of the outputs times a chunk of the images: weights, which are most of what is read, come
  from afar once for all images of the chunk.
  sparse   for each output, for each image: gather as many inputs as a vector has lanes by index, FMA, and sum
           the lanes at the end. Rows are filled up to whole vectors, see pack.py.
  dense    for each group of U vectors of outputs, for G images at once, then for those left over: U x G sums in
           registers; for each input: broadcast one value of each image, U x G FMAs with U vectors of weights

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import F32, I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.registers import images_at_once
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "out", "out_image", "bias", "low", "high", "n_in", "n_out", "images", "chunk",
        "rows_per_job", "starts", "indices", "weights",
    )
)  # fmt: skip
"""Vectors x (images, n_in) to out (images, n_out), float32 always. Job = (piece of the outputs, chunk of the
images), the chunk changes fastest.

bias            (n_out,) float32; dense: padded to whole groups
n_in, n_out     inputs and outputs
images          in this call
chunk           images of a job
rows_per_job    sparse: outputs of a piece; dense, a piece is a group of U vectors
starts          sparse: (n_out + 1,) int32, vectors of entries before each output
indices         sparse: (starts[-1] * lanes,) int32, the input of each entry
weights         sparse: (starts[-1] * lanes,) float32; dense: (groups, n_in, U * lanes) float32, padded with zeros
"""


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """What the machine code of a linear layer depends on: `group` is U (dense), or 0 for the sparse kernel."""

    group: int

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("linear")
        f = Function(module, "linear", VOID, [PTR, I64, PTR], isa)
        b, (args, job, _) = f.b, f.arguments
        images, chunk = (f.field(args, ARGUMENTS, name) for name in ("images", "chunk"))
        chunks = b.sdiv(b.add(images, b.sub(chunk, I64(1))), chunk)
        # Piece by piece: what follows one another reads the same weights.
        piece, which = b.sdiv(job, chunks), b.srem(job, chunks)
        first = b.mul(which, chunk)
        last = f.minimum(b.add(first, chunk), images)
        if self.group:
            self._dense(f, args, piece, first, last, images_at_once(self.group, isa))
        else:
            self._sparse(f, args, piece, first, last)
        b.ret_void()
        return module, "linear"

    @staticmethod
    def _image(f: Function, args: Value, name: str, image: Value) -> Value:
        return f.at(
            f.field(args, ARGUMENTS, name, PTR), f.b.mul(image, f.field(args, ARGUMENTS, f"{name}_image"))
        )

    def _sparse(self, f: Function, args: Value, piece: Value, first_image: Value, last_image: Value) -> None:
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

            def one_image(image: Value) -> None:
                x = self._image(f, args, "x", image)

                def vector(i: Value, total: Value) -> list[Value]:
                    o = b.mul(i, I64(width))
                    value = f.gather(x, f.load(f.at(indices, o), f.int_vector, 0, width))
                    return [f.fma(f.load(f.at(weights, o), f.vector, 0, width), value, total)]

                (total,) = f.loop(end, vector, [zero], start=begin)
                y = b.fadd(f.load(f.at(bias, at), F32), f.sum_lanes(total))
                f.store(f.clamp(y, low, high), f.at(self._image(f, args, "out", image), at))

            f.loop(last_image, one_image, start=first_image)

        f.loop(last, one_row, start=first)

    def _dense(
        self, f: Function, args: Value, piece: Value, first_image: Value, last_image: Value, several: int
    ) -> None:
        b, width, group = f.b, 4 * f.lanes, self.group
        weights, bias = (f.field(args, ARGUMENTS, n, PTR) for n in ("weights", "bias"))
        low, high = (f.splat(f.to_float(f.field(args, ARGUMENTS, n))) for n in ("low", "high"))
        n_in = f.field(args, ARGUMENTS, "n_in")
        at = b.mul(piece, I64(width * group))
        start = [f.load(f.at(bias, at), f.vector, width * i, width) for i in range(group)]
        first = f.at(weights, b.mul(at, n_in))

        def some_images(count: int, image: Value) -> None:
            each = [b.add(image, I64(n)) for n in range(count)]
            xs = [self._image(f, args, "x", one) for one in each]

            def one_input(i: Value, weight: Value, *totals: Value) -> list[Value]:
                values = [f.splat(f.load(f.at(x, b.mul(i, I64(4))), F32)) for x in xs]
                f.prefetch(weight, 1024)
                new = list(totals)
                for j in range(group):
                    w = f.load(weight, f.vector, width * j, width)
                    for n, value in enumerate(values):
                        new[n * group + j] = f.fma(value, w, new[n * group + j])
                return [f.at(weight, width * group), *new]

            _, *totals = f.loop(n_in, one_input, [first, *start * count])
            for i, total in enumerate(totals):
                to = f.at(self._image(f, args, "out", each[i // group]), at)
                f.store(f.clamp(total, low, high), to, width * (i % group), width)

        done = first_image
        if several > 1:
            turns = b.sdiv(b.sub(last_image, first_image), I64(several))
            f.loop(turns, lambda i: some_images(several, b.add(first_image, b.mul(i, I64(several)))))
            done = b.add(first_image, b.mul(turns, I64(several)))
        f.loop(last_image, lambda image: some_images(1, image), start=done)


def reference(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The numpy twin, in float64: ``x @ weight.T + bias``.

    x (N, F), weight (M, F), bias (M,) float32 -> (N, M) float32.
    """
    return (x.astype(np.float64) @ weight.astype(np.float64).T + bias).astype(np.float32)
