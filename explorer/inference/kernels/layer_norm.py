"""Layer normalisation of tokens: every token's features get mean 0 and variance 1, then a scale and a shift each.

Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv:1607.06450. Tokens lie in the lanes and features in
planes (see layout.py), so that the mean over features is a sum of vectors and nothing is ever summed across
lanes.

The algorithm in plain words
  A job is one tile: T vectors of neighbouring tokens. It walks over the features three times, the first time
  for the mean, then for the variance around it (a difference of squares would lose digits), then to write the
  result.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import F32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_plane", "x_tile", "out", "out_plane", "out_tile", "weight", "bias", "features",
        "one_over_features", "epsilon", "tiles", "per_tile", "back", "mask", "mask_tile",
    )
)  # fmt: skip
"""Tokens x (features, tokens) to out (features, tokens), values; the tokens of all samples follow one another.
Job = tile.

x_plane, out_plane           bytes from one feature to the next
x_tile, out_tile, mask_tile  bytes from `per_tile` tiles to as many that follow
weight, bias                 (features,) float32
features
one_over_features, epsilon   the bits of a float32
tiles                        jobs in all
per_tile                     how many of the kernel's tiles lie together in a tile of the layout; 1 where it has
                             none
back                         bytes by which the last tile lies over its neighbour, where tiles do not fit evenly
mask                         (tokens, to whole vectors,) integers
"""


@dataclass(frozen=True, slots=True)
class LayerNormKernel:
    """What the machine code depends on.

    Attributes
    ----------
    tile : int
        Vectors of tokens in a tile (T).
    masked : bool
        Whether the last vector holds elements that are no tokens; they are set to zero.
    """

    tile: int
    masked: bool

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("layer_norm")
        f = Function(module, "layer_norm", VOID, [PTR, I64, PTR], isa, wide=True)
        b, (args, job, _), width = f.b, f.arguments, f.width

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        whole, piece = b.sdiv(job, field("per_tile")), b.srem(job, field("per_tile"))
        is_last = b.icmp_signed("==", b.add(job, I64(1)), field("tiles"))
        within = b.sub(b.mul(piece, I64(width * self.tile)), b.select(is_last, field("back"), I64(0)))

        def tensor(name: str) -> Value:
            return f.at(field(name, PTR), b.add(b.mul(whole, field(f"{name}_tile")), within))

        x, out = tensor("x"), tensor("out")
        x_plane, out_plane, features = field("x_plane"), field("out_plane"), field("features")
        one_over, epsilon = (f.splat(f.to_float(field(n))) for n in ("one_over_features", "epsilon"))
        zero, one = f.constant(0.0), f.constant(1.0)

        def vectors(pointer: Value) -> list[Value]:
            return [f.read(pointer, width * i, width) for i in range(self.tile)]

        def add(_: Value, pointer: Value, *sums: Value) -> list[Value]:
            new = [b.fadd(s, v) for s, v in zip(sums, vectors(pointer), strict=True)]
            return [f.at(pointer, x_plane), *new]

        _, *sums = f.loop(features, add, [x, *[zero] * self.tile])
        means = [b.fmul(s, one_over) for s in sums]

        def add_square(_: Value, pointer: Value, *sums: Value) -> list[Value]:
            apart = [b.fsub(v, m) for v, m in zip(vectors(pointer), means, strict=True)]
            return [f.at(pointer, x_plane), *(f.fma(d, d, s) for d, s in zip(apart, sums, strict=True))]

        _, *squares = f.loop(features, add_square, [x, *[zero] * self.tile])
        gains = []
        for square in squares:
            variance = b.fadd(b.fmul(square, one_over), epsilon)
            gains.append(b.fdiv(one, f.intrinsic("sqrt", f.vector, [variance])))
        weight, bias, mask = field("weight", PTR), field("bias", PTR), tensor("mask")

        def write(i: Value, pointer: Value, to: Value) -> list[Value]:
            at = b.mul(i, I64(4))
            scale, shift = (f.splat(f.load(f.at(table, at), F32)) for table in (weight, bias))
            for k, (value, mean, gain) in enumerate(zip(vectors(pointer), means, gains, strict=True)):
                value = f.fma(b.fmul(b.fsub(value, mean), gain), scale, shift)
                if self.masked:
                    value = f.keep(value, f.read_mask(mask, width * k))
                f.write(value, to, width * k, width)
            return [f.at(pointer, x_plane), f.at(to, out_plane)]

        f.loop(features, write, [x, out])
        b.ret_void()
        return module, "layer_norm"


def reference(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], epsilon: float
) -> NDArray[np.float32]:
    """The numpy twin, in float64: x (..., F), weight (F,), bias (F,) float32 -> (..., F) float32."""
    wide = x.astype(np.float64)
    apart = wide - wide.mean(-1, keepdims=True)
    variance = (apart**2).mean(-1, keepdims=True)
    return (apart / np.sqrt(variance + epsilon) * weight + bias).astype(np.float32)
