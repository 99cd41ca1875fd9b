"""Nearest-neighbour upsampling: every pixel becomes a rectangle of its copies.

As in the decoders of U-Nets and feature pyramids.

The algorithm in plain words
  For each vector of an output row, read the few pixels that it is made of (a vector's lanes / columns of the
  scale), and let a register shuffle repeat each of them. Rows are filled one after the other: what the last
  vector of a row writes beyond the gap is overwritten by the row that follows.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "x_row", "out", "out_image", "out_plane", "out_row", "low", "high", "jobs",
        "channels", "channels_per_job", "rows", "row_scale", "filled", "vectors", "last", "mask",
    )
)  # fmt: skip
"""Each channel of x (images, channels, plane) to that of out, which is `row_scale` times as high and
`UpsampleKernel.scale` times as wide. Job = (image, some channels), see channels.py.

x_row, out_row     bytes from one row to the next
rows               of the input
row_scale          rows of the result that each of them becomes
filled, vectors    of a row of the result: vectors that hold pixels, and those that hold pixels or the gap after
                   them
last               bytes from pixel 0 of a plane of the result to its last vector
mask               (vectors * lanes,) integers of a row of the result
"""


@dataclass(frozen=True, slots=True)
class UpsampleKernel:
    """What the machine code depends on.

    Attributes
    ----------
    scale : int
        Columns of the result that a column becomes; divides the lanes of a vector.
    """

    scale: int

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("upsample")
        f = Function(module, "upsample", VOID, [PTR, I64, PTR], isa)
        b, (args, job, _), width = f.b, f.arguments, f.width

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        x = f.at(field("x", PTR), b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        low, high = (f.splat_float(f.to_float(field(n))) for n in ("low", "high"))
        mask, filled, vectors = field("mask", PTR), field("filled"), field("vectors")
        read = f.lanes // self.scale
        pixels = ir.VectorType(f.vector.element, read)
        repeated = ir.Constant(ir.VectorType(I32, f.lanes), [i // self.scale for i in range(f.lanes)])

        def one_row(source: Value, to: Value) -> None:
            def with_pixels(i: Value) -> None:
                few = f.load(source, pixels, b.mul(i, I64(f.element_bytes * read)), f.element_bytes)
                value = f.clamp(b.shuffle_vector(few, few, repeated), low, high)
                at = b.mul(i, I64(width))
                f.write(f.keep(value, f.read_mask(f.at(mask, at))), to, at)

            f.loop(filled, with_pixels)
            f.loop(vectors, lambda i: f.write(f.constant(0.0), to, b.mul(i, I64(width))), start=filled)

        def one_channel(channel: Value) -> None:
            plane, to = (
                f.at(x, b.mul(channel, field("x_plane"))),
                f.at(out, b.mul(channel, field("out_plane"))),
            )
            f.write(f.constant(0.0), to, field("last"))  # which rows may not reach the end of

            def rows_of(row: Value) -> None:
                source = f.at(plane, b.mul(row, field("x_row")))
                above = b.mul(row, field("row_scale"))

                def one_copy(copy: Value) -> None:
                    one_row(source, f.at(to, b.mul(b.add(above, copy), field("out_row"))))

                f.loop(field("row_scale"), one_copy)

            f.loop(field("rows"), rows_of)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "upsample"


def reference(x: NDArray[np.float32], scale: tuple[int, int]) -> NDArray[np.float32]:
    """The numpy twin: x (N, C, H, W) float32 -> (N, C, H * rows, W * columns) float32."""
    return x.repeat(scale[0], axis=2).repeat(scale[1], axis=3)
