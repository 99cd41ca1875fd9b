"""Smooth activations on vectors of float32: what other kernels apply to values that they already hold in registers.

Everything rests on the exponential of a number that is not positive, and each function is written so that nothing cancels: the error stays
relative to the function's value, also where that is tiny.

  exp, expm1   n = round(x / ln 2), r = x - n ln 2 (ln 2 in two parts), and the polynomial of Cephes' expf (S. Moshier, netlib) for exp(r) - 1
  sigmoid      1 / (1 + e) and e / (1 + e) with e = exp(-abs(x))
  tanh         -m / (2 + m) with m = expm1(-2 abs(x))
  GELU         x Phi(x), where Phi(-abs(x)) = erfc(abs(x) / sqrt 2) / 2 by the Chebyshev fit `erfcc` of Press et al., Numerical Recipes, section 6.2
               (its own error is at most 1.2e-7 of the value). The exponent -x^2 / 2 goes in as an exact and a small part: rounded once, it
               would lose digits in proportion to its size.
  tanh GELU    x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the same function without the tanh

`tests/inference/test_activations.py` measures the errors; `explorer.inference.activations.LARGEST_ERROR` states them, and holds the numpy twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir

from explorer.inference.activations import Activation
from explorer.inference.kernels.builder import F32, Function, Value

_LOG2_E = math.log2(math.e)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""(exp(r) - 1 - r) / r^2, highest power first; Cephes, expf.c."""
_ERFC = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223,
)  # fmt: skip
"""ln(erfc(z) / t) + z^2 in powers of t = 1 / (1 + z / 2), highest first; Numerical Recipes, erfcc."""
_SMALLEST = -87.33
"""exp of less is no normal float32; it comes out as zero."""
_ROUND = 1.5 * 2**23
"""Adding it leaves a float32 rounded to a whole number, which its lowest bits then hold."""


def apply(activation: Activation, f: Function, x: Value) -> Value:
    """Instructions for one vector; float16 is computed in float32 and rounded once."""
    write, v = _WRITERS[activation.kind], _Vector(f)
    if x.type == v.type:
        return write(v, x, *activation.parameters)
    return f.b.fptrunc(write(v, f.b.fpext(x, v.type), *activation.parameters), x.type)


class _Vector:
    """Arithmetic with constants, so that the formulas below read like formulas."""

    def __init__(self, f: Function) -> None:
        self.f, self.b = f, f.b
        self.type = ir.VectorType(F32, f.lanes)

    def constant(self, value: float) -> Value:
        return ir.Constant(self.type, [float(np.float32(value))] * self.f.lanes)

    def bits(self, value: int) -> Value:
        return ir.Constant(self.f.int_vector, [value] * self.f.lanes)

    def as_bits(self, x: Value) -> Value:
        return self.b.bitcast(x, self.f.int_vector)

    def as_floats(self, x: Value) -> Value:
        return self.b.bitcast(x, self.type)

    def times(self, x: Value, factor: float) -> Value:
        return self.b.fmul(x, self.constant(factor))

    def plus(self, x: Value, term: float) -> Value:
        return self.b.fadd(x, self.constant(term))

    def clamp(self, x: Value, low: float, high: float) -> Value:
        return self.f.clamp(x, self.constant(low), self.constant(high))

    def where_negative(self, x: Value, yes: Value, no: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered("<", x, self.constant(0.0)), yes, no)

    def absolute(self, x: Value) -> Value:
        return self.f.intrinsic("fabs", self.type, [x])

    def polynomial(self, x: Value, coefficients: tuple[float, ...]) -> Value:
        """By Horner's rule, highest power first."""
        total = self.constant(coefficients[0])
        for c in coefficients[1:]:
            total = self.f.fma(total, x, self.constant(c))
        return total

    def power_and_rest(self, x: Value, low: Value | None = None) -> tuple[Value, Value]:
        """2^n and exp(r) - 1, which make exp(x + low); x <= 0. `low` joins when most of x has been taken off, so that both keep their digits."""
        total = x if low is None else self.b.fadd(x, low)
        shifted = self.f.fma(total, self.constant(_LOG2_E), self.constant(_ROUND))
        n = self.plus(shifted, -_ROUND)
        r = self.f.fma(n, self.constant(-_LN2_LOW), self.f.fma(n, self.constant(-_LN2_HIGH), x))
        if low is not None:
            r = self.b.fadd(r, low)
        rest = self.f.fma(self.b.fmul(r, r), self.polynomial(r, _EXP), r)
        exponent = self.b.shl(self.as_bits(shifted), self.bits(23))
        return self.as_floats(self.b.add(exponent, self.bits(127 << 23))), rest

    def exp(self, x: Value, low: Value | None = None) -> Value:
        """exp(x + low), for x <= 0; what is no normal number is zero; NaN stays."""
        power, rest = self.power_and_rest(self.clamp(x, _SMALLEST, 0.0), low)
        y = self.f.fma(power, rest, power)
        total = x if low is None else self.b.fadd(x, low)
        return self.b.select(self.b.fcmp_ordered("<", total, self.constant(_SMALLEST)), self.constant(0.0), y)

    def expm1(self, x: Value) -> Value:
        """exp(x) - 1, for x <= 0."""
        power, rest = self.power_and_rest(self.clamp(x, _SMALLEST, 0.0))
        return self.f.fma(power, rest, self.plus(power, -1.0))


def exponential(f: Function, x: Value) -> Value:
    """exp(x), for x <= 0; what is no normal number is zero; NaN stays."""
    return _Vector(f).exp(x)


def _sigmoid(v: _Vector, x: Value) -> Value:
    e = v.exp(v.b.fneg(v.absolute(x)))
    return v.b.fdiv(v.where_negative(x, e, v.constant(1.0)), v.plus(e, 1.0))


def _hard_sigmoid(v: _Vector, x: Value) -> Value:
    return v.times(v.clamp(v.plus(x, 3.0), 0.0, 6.0), 1 / 6)


def _hard_swish(v: _Vector, x: Value) -> Value:
    return v.b.fmul(x, _hard_sigmoid(v, x))


def _silu(v: _Vector, x: Value) -> Value:
    return v.b.fmul(x, _sigmoid(v, x))


def _tanh(v: _Vector, x: Value) -> Value:
    m = v.expm1(v.times(v.absolute(x), -2.0))
    y = v.b.fdiv(v.b.fneg(m), v.plus(m, 2.0))
    return v.f.intrinsic("copysign", v.type, [y, x])


def _gelu(v: _Vector, x: Value) -> Value:
    b = v.b
    # Beyond 20 the smaller side is zero in float32; infinity would give NaN below.
    a = v.clamp(v.absolute(x), 0.0, 20.0)
    t = b.fdiv(v.constant(1.0), v.f.fma(a, v.constant(0.5 * math.sqrt(0.5)), v.constant(1.0)))
    # a^2 / 2 = high^2 / 2 + (a - high) (a + high) / 2, where `high` has half the digits, so that its square is exact.
    high = v.as_floats(b.and_(v.as_bits(a), v.bits(-4096)))
    square = v.times(b.fmul(high, high), -0.5)
    rest = v.times(b.fmul(b.fsub(a, high), b.fadd(a, high)), -0.5)
    small = v.times(b.fmul(t, v.exp(square, b.fadd(rest, v.polynomial(t, _ERFC)))), 0.5)
    return b.fmul(x, v.where_negative(x, small, b.fsub(v.constant(1.0), small)))


def _gelu_tanh(v: _Vector, x: Value) -> Value:
    c = 2 * math.sqrt(2 / math.pi)
    inner = v.f.fma(v.b.fmul(x, x), v.constant(c * 0.044715), v.constant(c))
    return v.b.fmul(x, _sigmoid(v, v.b.fmul(x, inner)))


def _leaky_relu(v: _Vector, x: Value, slope: float) -> Value:
    return v.b.select(v.b.fcmp_ordered(">", x, v.constant(0.0)), x, v.times(x, slope))


def _elu(v: _Vector, x: Value, alpha: float, scale: float, input_scale: float) -> Value:
    below = v.times(v.expm1(v.times(x, input_scale)), alpha * scale)
    return v.b.select(v.b.fcmp_ordered(">", x, v.constant(0.0)), v.times(x, scale), below)


_WRITERS: dict[str, Callable[..., Value]] = {
    "sigmoid": _sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": _hard_swish,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": _tanh,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
}
