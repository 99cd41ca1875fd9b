"""Pixels of an image as tokens, or tokens as pixels: a job is some channels, whose elements all change their places in the same way.

The algorithm in plain words
  A table tells for each element of the result which element of the operand's channel it is. Where those of a vector follow one another (the pixels of a row
  become neighbouring tokens) they are loaded at once, from wherever they begin; others are gathered one by one. Elements that are none become zero. Then
  the constant of each token is added, if there is one: positions, and tokens that come from no pixel.
`reference` is the numpy twin.
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
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "jobs", "channels", "channels_per_job",
        "vectors", "table", "starts", "added", "added_plane", "added_table",
    )
)  # fmt: skip
"""From x (channels, plane) to out (images, channels, plane).

x, out              addresses of element 0 of channel 0 (of image 0)
x_plane, .._image   bytes from one channel, or image of the result, to the next; `x_image` is not used: the table knows the images of the operand
jobs                of an image of the result
vectors             of a channel of the result
table               (images, vectors * lanes) int32: which element of the operand's channel each one is; -1 for none
starts              (images, vectors) int32: the first of these where they follow one another, else -1
added               (channels, tokens) values, `added_plane` bytes from one channel to the next
added_table         (vectors * lanes,) int32: which of them is added to each element of the result; -1 for none
"""


@dataclass(frozen=True, slots=True)
class RearrangeKernel:
    """What the machine code depends on.

    Attributes
    ----------
    adds : bool
        Whether a constant is added.
    """

    adds: bool = False

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("rearrange")
        f = Function(module, "rearrange", VOID, [PTR, I64, PTR], isa)
        b, (args, job, _) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        x, vectors = field("x", PTR), field("vectors")
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        done = b.mul(image, vectors)
        table = f.at(field("table", PTR), b.mul(done, I64(4 * f.lanes)))
        starts = f.at(field("starts", PTR), b.mul(done, I64(4)))
        added, added_table = field("added", PTR), field("added_table", PTR)
        none = ir.Constant(f.int_vector, [0] * f.lanes)

        def gathered(base: Value, numbers: Value) -> Value:
            return f.gather(base, numbers, f.b.icmp_signed(">=", numbers, none))

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, field("x_plane")))
            to = f.at(out, b.mul(channel, field("out_plane")))
            more = f.at(added, b.mul(channel, field("added_plane")))

            def one_vector(i: Value) -> None:
                start = f.load(starts, I32, b.mul(i, I64(4)))
                line = b.mul(i, I64(4 * f.lanes))

                def whole() -> list[Value]:
                    return [f.read(plane, b.mul(b.sext(start, I64), I64(f.element_bytes)))]

                def apart() -> list[Value]:
                    return [gathered(plane, f.load(table, f.int_vector, line))]

                [value] = f.either(b.icmp_signed(">=", start, I32(0)), whole, apart)
                if self.adds:
                    value = b.fadd(value, gathered(more, f.load(added_table, f.int_vector, line)))
                f.write(value, to, b.mul(i, I64(f.width)), f.width)

            f.loop(vectors, one_vector)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "rearrange"


def reference(
    x: NDArray[np.float32], pixels: NDArray[np.int64], added: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The numpy twin.

    Parameters
    ----------
    x : (samples, channels, size) float32
        Images, row by row; tokens are one sample.
    pixels : (count,) int64
        Which pixel, counted through all samples, each one of the result is; -1 for none.
    added : (tokens, channels) float32, optional
        Added to each `tokens` elements of the result.

    Returns
    -------
    (channels, count) float32
    """
    lines = x.transpose(1, 0, 2).reshape(x.shape[1], -1)
    out = np.where(pixels < 0, np.float32(0), lines[:, pixels])
    return out if added is None else out + np.tile(added.T, len(pixels) // len(added))
