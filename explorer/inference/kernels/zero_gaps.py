"""Zeros what lies around the pixels of planes, where another tensor lay in the same memory before.

Pixels are not touched, so that it may go on beside the kernel that writes them. Most kernels write whole
vectors, with zeros between the rows; of what others write, the end of each row is zeroed too.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I1, I64, PTR, VOID, Function, Record, Value
from explorer.inference.layout import Planes
from explorer.inference.native import Isa

ARGUMENTS = Record(
    ("out", "image", "before", "pieces", "channels", "plane", "pixels", "rows", "pitch", "row", "gap"),
)
"""Planes out (images, channels, plane) of any type. Job = (image, piece).

image, plane    bytes from one image to the next, and from one plane to the next
before          bytes in front of an image that are zeroed
pieces          jobs that the channels of an image are dealt to
pixels          bytes of a plane, from pixel 0 on, behind which all is zeroed
rows            of those, rows whose ends are zeroed
pitch, row      bytes from one row to the next, and of a row's pixels
gap             bytes after a row's pixels that are zeroed
"""

_ZERO = ir.Constant(ir.IntType(8), 0)


@dataclass(frozen=True, slots=True)
class ZeroGapsKernel:
    """The machine code depends on nothing."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("zero_gaps")
        f = Function(module, "zero_gaps", VOID, [PTR, I64, PTR], isa)
        b, (args, job, _) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        def zero(start: Value, n_bytes: Value) -> None:
            f.call("llvm.memset.p0.i64", VOID, [start, _ZERO, n_bytes, I1(0)])

        pieces, channels = field("pieces"), field("channels")
        image, piece = b.sdiv(job, pieces), b.srem(job, pieces)
        low, high = (b.sdiv(b.mul(channels, p), pieces) for p in (piece, b.add(piece, I64(1))))
        first = f.at(field("out", PTR), b.mul(image, field("image")))
        before, pixels = field("before"), field("pixels")
        with b.if_then(b.icmp_signed("==", piece, I64(0))):
            zero(f.at(first, b.neg(before)), before)

        def one_plane(channel: Value) -> None:
            plane = f.at(first, b.mul(channel, field("plane")))
            zero(f.at(plane, pixels), b.sub(field("plane"), pixels))

            def one_row(row: Value) -> None:
                end = f.at(plane, b.add(b.mul(row, field("pitch")), field("row")))
                zero(end, field("gap"))

            f.loop(field("rows"), one_row)

        f.loop(high, one_plane, start=low)
        b.ret_void()
        return module, "zero_gaps"


def reference(y: Planes, *, fills: bool) -> NDArray[np.float64]:
    """The numpy twin: all that such planes occupy, (elements,), ones save where zeros are written.

    Parameters
    ----------
    y : Planes
    fills : bool
        Whether each vector of a plane is left to who writes the pixels.
    """
    memory = np.ones(y.elements)
    for image in range(y.images):
        first = y.before + image * y.image
        memory[first - y.guard : first] = 0
        for channel in range(y.channels):
            plane = memory[first + channel * y.plane :][: y.plane]
            if fills:
                plane[y.vectors * y.lanes :] = 0
            else:
                row, column = np.divmod(np.arange(y.plane), y.pitch)
                plane[(row >= y.rows) | (column >= y.columns)] = 0
    return memory
