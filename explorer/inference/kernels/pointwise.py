"""Element by element: an operand added or multiplied, a scale and a shift per channel, a clamp or an activation.

For what no convolution could take along. The gaps of planes must be zero again: where a shift or an activation
moves zero, they are masked. The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.activations import Activation
from explorer.inference.kernels.activation import apply_or_clamp
from explorer.inference.kernels.builder import F32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "other", "other_image", "other_plane", "out", "out_image", "out_plane",
        "low", "high", "jobs", "channels", "channels_per_job", "vectors", "scale", "shift", "mask",
    )
)  # fmt: skip
"""Planes, (images, channels, plane) values, or vectors, (images, features) float32. Job = (image, some channels).

other           values of the second operand; one value per channel, `other_plane` bytes apart, where there is
                one for all pixels
vectors         of a plane, or of all features where channels lie across the lanes: these are then one channel
scale, shift    (channels,) float32
mask            (vectors * lanes,) integers
"""


@dataclass(frozen=True, slots=True)
class PointwiseKernel:
    """What the machine code depends on.

    Attributes
    ----------
    operand : str
        "add" or "mul" for a second operand, "" for none.
    one_value : bool
        Whether the second operand holds one value per image and channel (squeeze and excite), not one per pixel.
    affine : bool
        Whether values are scaled and shifted, channel by channel.
    across : bool
        Whether the channels lie in the lanes of a vector (vectors), not in planes of their own.
    activation : Activation or None
        Applied last; the clamp when None.
    masked : bool
        Whether gaps must be set to zero.
    """

    operand: str = ""
    one_value: bool = False
    affine: bool = False
    across: bool = False
    activation: Activation | None = None
    masked: bool = False

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("pointwise")
        f = Function(module, "pointwise", VOID, [PTR, I64, PTR], isa, wide=True)
        b, (args, job, _), width = f.b, f.arguments, f.width

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        low, high = (f.splat(f.to_float(field(n))) for n in ("low", "high"))
        names = ("x", "other", "out") if self.operand else ("x", "out")
        bases = {n: f.at(field(n, PTR), b.mul(image, field(f"{n}_image"))) for n in names}
        tables = {n: field(n, PTR) for n in ("scale", "shift")} if self.affine else {}
        mask = field("mask", PTR)

        def one_channel(channel: Value) -> None:
            planes = {n: f.at(base, b.mul(channel, field(f"{n}_plane"))) for n, base in bases.items()}
            same = {}  # what all pixels of a channel share
            if self.one_value:
                same["other"] = f.splat(f.load(planes["other"], F32))
            if not self.across:
                same |= {n: f.splat(f.load(f.at(t, b.mul(channel, I64(4))), F32)) for n, t in tables.items()}

            def one_vector(i: Value) -> None:
                at = b.mul(i, I64(width))

                def operand(name: str, pointer: Value) -> Value:
                    return same[name] if name in same else f.read(f.at(pointer, at), 0, width)

                value = operand("x", planes["x"])
                if self.operand:
                    combine = b.fadd if self.operand == "add" else b.fmul
                    value = combine(value, operand("other", planes["other"]))
                if self.affine:
                    value = f.fma(value, *(operand(n, t) for n, t in tables.items()))
                value = apply_or_clamp(self.activation, f, value, low, high)
                if self.masked:
                    value = f.keep(value, f.read_mask(f.at(mask, at)))
                f.write(value, f.at(planes["out"], at), 0, width)

            f.loop(field("vectors"), one_vector)

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "pointwise"


def reference(
    x: NDArray[np.float32],
    other: NDArray[np.float32] | None = None,
    *,
    operand: str = "add",
    scale: NDArray[np.float32] | None = None,
    shift: NDArray[np.float32] | None = None,
    low: float = -np.inf,
    high: float = np.inf,
    activation: Activation | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The numpy twin.

    Parameters
    ----------
    x : (N, C) or (N, C, ...) float32
    other : float32, optional
        The second operand, "add"ed or, "mul", multiplied: of the same shape, or (N, C), one value for all pixels.
    scale, shift : (C,) float32, optional
        Applied after it.
    low, high : float
        Bounds of the result where there is no activation.
    activation : Activation, optional
    mask : (...) bool, optional
        Where a result is kept; elsewhere it is zero.

    Returns
    -------
    ndarray, float32
        Of the shape of `x`.
    """

    def by_channel(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values.reshape(*values.shape, *[1] * (x.ndim - 2))

    y: NDArray[Any] = x
    if other is not None:
        other = other if other.ndim == x.ndim else by_channel(other)
        y = y + other if operand == "add" else y * other
    if scale is not None and shift is not None:
        y = y * by_channel(scale) + by_channel(shift)
    y = np.clip(y, np.float32(low), np.float32(high)) if activation is None else activation.reference(y)
    return (y if mask is None else np.where(mask, y, 0)).astype(np.float32)
