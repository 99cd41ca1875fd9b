"""Copies whole planes from anywhere to anywhere, by a table.

For the parts of a concatenation that could not be written in their place. The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(("out_image", "jobs", "channels", "channels_per_job", "vectors", "table"))
"""Whole planes, vectors of values. Job = (image, some planes), see channels.py.

out_image    bytes from one image to the next, where planes are copied to
jobs, channels, channels_per_job
             as for all kernels that go channel by channel: `channels` planes of an image are copied
vectors      of a plane, gaps included
table        (channels,) rows of PLANE
"""

PLANE = Record(("source", "source_image", "target"))
"""A plane that is copied.

source          address of that of image 0
source_image    bytes from one image to the next, where it is read
target          address of where that of image 0 goes to
"""


@dataclass(frozen=True, slots=True)
class CopyPlanesKernel:
    """The machine code depends on nothing.

    Source and target have the same layout, and the gaps of a plane (zero) are copied like its pixels.
    """

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("copy_planes")
        f = Function(module, "copy_planes", VOID, [PTR, I64, PTR], isa)
        b, (args, job, _), width = f.b, f.arguments, f.width

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        table, skipped, vectors = field("table", PTR), b.mul(image, field("out_image")), field("vectors")

        def one_plane(index: Value) -> None:
            plane = f.row(table, PLANE, index)
            source = f.at(
                f.field(plane, PLANE, "source", PTR), b.mul(image, f.field(plane, PLANE, "source_image"))
            )
            target = f.at(f.field(plane, PLANE, "target", PTR), skipped)

            def one_vector(i: Value) -> None:
                at = b.mul(i, I64(width))
                f.write(f.read(f.at(source, at), 0, width), f.at(target, at), 0, width)

            f.loop(vectors, one_vector)

        f.loop(last, one_plane, start=first)
        b.ret_void()
        return module, "copy_planes"


def reference(x: NDArray[np.float32], planes: NDArray[np.int64]) -> NDArray[np.float32]:
    """The numpy twin: of x (N, C, H, W) float32 the `planes`, (P,) int64 -> (N, P, H, W) float32."""
    return x[:, planes]
