"""The phases of an image: what a convolution with a stride reads, see `explorer.inference.lower`.

Pixel (y, x) of phase (r, s) is pixel (y * stride + r, x * stride + s) of the image. A table holds, for each phase and each of its pixels, the
element of the input plane, or -1 where the phase has none: element -1 of a plane is always zero, see layout.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "jobs", "channels", "channels_per_job", "vectors", "n_phases", "table",
    )
)  # fmt: skip
"""Planes of the output: all phases of channel 0, all of channel 1, and so on."""


@dataclass(frozen=True, slots=True)
class SplitKernel:
    """The same machine code for every split."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("split")
        f = Function(module, "split", VOID, [PTR, I64, PTR], isa.lanes)
        b, (args, job, _), width = f.b, f.arguments, 4 * isa.lanes

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        jobs, size, n_phases, vectors = (
            field(n) for n in ("jobs", "channels_per_job", "n_phases", "vectors")
        )
        image, piece = b.sdiv(job, jobs), b.srem(job, jobs)
        x = f.at(field("x", PTR), b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        first = b.mul(piece, size)
        last = f.minimum(b.add(first, size), field("channels"))
        table, out_plane = field("table", PTR), field("out_plane")

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, field("x_plane")))
            phases = f.at(out, b.mul(b.mul(channel, n_phases), out_plane))

            def one_phase(phase: Value, indices: Value) -> list[Value]:
                to = f.at(phases, b.mul(phase, out_plane))

                def one_vector(i: Value, indices: Value) -> list[Value]:
                    value = f.gather(plane, f.load(indices, f.int_vector, 0, width))
                    f.store(value, f.at(to, b.mul(i, I64(width))), 0, width)
                    return [f.at(indices, width)]

                return f.loop(vectors, one_vector, [indices])

            f.loop(n_phases, one_phase, [table])

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "split"


def reference(
    x: NDArray[np.float32], stride: tuple[int, int], phases: list[tuple[int, int]]
) -> NDArray[np.float32]:
    """The numpy twin: x (N, C, H, W) float32 -> (N, C * phases, ceil(H / stride), ceil(W / stride)) float32, zeros where there is no pixel."""
    n, c, h, w = x.shape
    rows, columns = -(-h // stride[0]), -(-w // stride[1])
    padded = np.pad(x, ((0, 0), (0, 0), (0, rows * stride[0] - h), (0, columns * stride[1] - w)))
    parts = [padded[:, :, r :: stride[0], s :: stride[1]] for r, s in phases]
    return np.stack(parts, 2).reshape(n, c * len(phases), rows, columns)
