"""Element by element: ``clamp(a)`` and ``clamp(a + b)``, for additions and activations that no convolution could take along.

The clamp of a gap (zero) must be zero again: true for ReLU and ReLU6, and the planner offers this kernel for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "other", "other_image", "other_plane", "out", "out_image", "out_plane", "low", "high",
        "jobs", "channels", "channels_per_job", "vectors",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PointwiseKernel:
    """What the machine code depends on: whether a second operand is added."""

    add: bool

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("pointwise")
        f = Function(module, "pointwise", VOID, [PTR, I64, PTR], isa.lanes)
        b, (args, job, _), width = f.b, f.arguments, 4 * isa.lanes

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        low, high = (f.splat(f.to_float(field(n))) for n in ("low", "high"))
        names = ("x", "other", "out") if self.add else ("x", "out")
        bases = {n: f.at(field(n, PTR), b.mul(image, field(f"{n}_image"))) for n in names}

        def one_channel(channel: Value) -> None:
            planes = {n: f.at(base, b.mul(channel, field(f"{n}_plane"))) for n, base in bases.items()}

            def one_vector(i: Value) -> None:
                at = b.mul(i, I64(width))
                value = f.load(f.at(planes["x"], at), f.vector, 0, width)
                if self.add:
                    value = b.fadd(value, f.load(f.at(planes["other"], at), f.vector, 0, width))
                f.store(f.clamp(value, low, high), f.at(planes["out"], at), 0, width)

            f.loop(field("vectors"), one_vector)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "pointwise"


def reference(a: NDArray[np.float32], b: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """The numpy twin: ``clip(a + b, low, high)``."""
    return np.clip(a + b, np.float32(low), np.float32(high))
