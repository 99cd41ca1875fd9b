"""Pooling through an index table, for windows that `window_pool` does not take, and the average of a whole plane.

The table holds, for each tap of the window and each output pixel, the element of the input plane, or -1 where
the window leaves the image. A maximum ignores such taps; an average reads a zero there (element -1 of a plane
is always zero, see layout.py) and multiplies by one over the size of the window, which differs at the border
when padding is not counted.

The numpy twins are `window_pool.reference_maximum`, `window_pool.reference_average` and, of whole planes,
`reference_plane`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import F32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "low", "high", "jobs", "channels",
        "channels_per_job", "vectors", "n_taps", "table", "table_tap", "mask", "scale",
    )
)  # fmt: skip
"""Each channel of x (images, channels, plane) to that of out: to a plane of another size, or, for the average of
whole planes, to one number of (images, channels) float32. Job = (image, some channels), see channels.py.

vectors      of the plane that is written, or, of whole planes, read
n_taps       of a window
table        (n_taps, vectors * lanes) int32: the element of the input plane that each tap reads for each
             element of the result, -1 for none
table_tap    bytes from one tap to the next in it
mask         (vectors * lanes,) integers, of the plane that is written, or read
scale        (vectors * lanes,) float32, what sums are multiplied with (average); (1,) float32 of whole planes
"""


@dataclass(frozen=True, slots=True)
class PoolKernel:
    """What the machine code depends on.

    Attributes
    ----------
    kind : str
        "max", "average" or "plane".
    masked : bool
        "plane" only: whether the gaps of the operand may hold anything (as those of tiles may, and other images
        beside this one), so that they must not be counted.
    """

    kind: str
    masked: bool = False

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("pool")
        f = Function(module, "pool", VOID, [PTR, I64, PTR], isa, wide=True)
        b, (args, job, _) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        x = f.at(field("x", PTR), b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        low, high = (f.to_float(field(n)) for n in ("low", "high"))
        window = self._plane if self.kind == "plane" else self._window

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, field("x_plane")))
            to = f.at(out, b.mul(channel, field("out_plane")))
            window(f, field, plane, to, low, high)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "pool"

    def _window(self, f: Function, field: Value, plane: Value, to: Value, low: Value, high: Value) -> None:
        b, width = f.b, f.width
        maximum = self.kind == "max"
        low, high = f.splat(low), f.splat(high)
        lowest = float("-inf")
        start = f.constant(lowest if maximum else 0.0)
        table, mask, step, n_taps = (
            field("table", PTR),
            field("mask", PTR),
            field("table_tap"),
            field("n_taps"),
        )

        def one_vector(i: Value) -> None:
            at, at_word = b.mul(i, I64(width)), b.mul(i, I64(4 * f.lanes))

            def one_tap(_: Value, indices: Value, total: Value) -> list[Value]:
                index = f.load(indices, f.int_vector)
                if maximum:
                    inside = b.icmp_signed(">=", index, ir.Constant(f.int_vector, [0] * f.lanes))
                    total = f.larger(f.gather(plane, index, inside, lowest), total)
                else:
                    total = b.fadd(total, f.gather(plane, index))
                return [f.at(indices, step), total]

            _, total = f.loop(n_taps, one_tap, [f.at(table, at_word), start])
            if not maximum:
                total = b.fmul(total, f.load(f.at(field("scale", PTR), at_word), f.vector))
            total = f.keep(f.clamp(total, low, high), f.read_mask(f.at(mask, at)))
            f.write(total, f.at(to, at), 0, width)

        f.loop(field("vectors"), one_vector)

    def _plane(self, f: Function, field: Value, plane: Value, to: Value, low: Value, high: Value) -> None:
        b, width = f.b, f.width

        def one_vector(i: Value, total: Value) -> list[Value]:
            at = b.mul(i, I64(width))
            # An image beside others may begin in the middle of a vector.
            value = f.read(f.at(plane, at), 0, None if self.masked else width)
            if self.masked:
                value = f.keep(value, f.read_mask(f.at(field("mask", PTR), at)))
            return [b.fadd(total, value)]

        (total,) = f.loop(field("vectors"), one_vector, [f.constant(0.0)])
        y = f.sum_lanes(total)
        y = b.fmul(y, f.load(field("scale", PTR), F32))
        f.store(f.clamp(y, low, high), to)


def reference_plane(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numpy twin of the average of a plane: x (N, C, H, W) float32 -> (N, C) float32."""
    return x.astype(np.float64).mean(axis=(2, 3)).astype(np.float32)
