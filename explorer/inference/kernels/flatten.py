"""From planes to vectors (of float32): the pixels of an image, without the gaps.

Channel after channel, row after row. The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(("x", "x_image", "out", "out_image", "jobs", "vectors", "vectors_per_job", "table"))
"""Planes x (images, channels, plane) to out (images, features) float32. Job = (image, some vectors of its
result).

jobs               of an image
vectors            of an image's result, of `lanes` float32
vectors_per_job
table              (vectors * lanes,) int32: for each element of the result the element of the input image; past
                   the end -1, where a zero lies (see layout.py)
"""


@dataclass(frozen=True, slots=True)
class FlattenKernel:
    """The machine code depends on nothing. A job is some vectors of one image's output."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("flatten")
        f = Function(module, "flatten", VOID, [PTR, I64, PTR], isa, wide=True)
        b, (args, job, _), width = f.b, f.arguments, 4 * f.lanes

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        jobs, size = field("jobs"), field("vectors_per_job")
        image, first = b.sdiv(job, jobs), b.mul(b.srem(job, jobs), size)
        x = f.at(field("x", PTR), b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        table = field("table", PTR)

        def one_vector(i: Value) -> None:
            at = b.mul(i, I64(width))
            value = f.gather(x, f.load(f.at(table, at), f.int_vector, 0, width))
            f.store(value, f.at(out, at), 0, width)

        f.loop(f.minimum(b.add(first, size), field("vectors")), one_vector, start=first)
        b.ret_void()
        return module, "flatten"


def reference(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numpy twin: x (N, C, H, W) or (N, C, W) float32 -> (N, C * H * W) float32."""
    return x.reshape(len(x), -1)
