"""Smooth activations on vectors of float32: what other kernels apply to values that they already hold in registers.

Most rest on the exponential of a number that is not positive, and are written so that nothing cancels: the
error stays relative to the function's value, also where that is tiny. GELU, of which transformers compute
millions, needs neither an exponential nor a division, and takes a third of the time.

  exp, expm1   n = round(x / ln 2), r = x - n ln 2 (ln 2 in two parts), and the polynomial of Cephes' expf (S.
               Moshier, netlib) for exp(r) - 1
  sigmoid      1 / (1 + e) and e / (1 + e) with e = exp(-abs(x))
  tanh         -m / (2 + m) with m = expm1(-2 abs(x))
  GELU         x Phi(x) with Phi(x) = 1/2 + x q(x^2): q is a polynomial that meets erf(x / sqrt 2) / 2x in
               Chebyshev points of abs(x) < 5.5, in a variable that goes from -1 to 1, so that its terms do not
               cancel. Beyond 5.5, Phi is 0 or 1 to float32's precision. As in torch, which adds erf to 1, the
               error is relative to x and not to what little is left of it where x is very negative.
  tanh GELU    x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the same function without the tanh

The numpy twins, and the largest error of each, are in `explorer.inference.activations`;
`tests/inference/test_activations.py` measures the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.polynomial import chebyshev

from explorer.inference.activations import Activation
from explorer.inference.kernels.builder import F32, Function, Value

_LOG2_E = math.log2(math.e)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""(exp(r) - 1 - r) / r^2, highest power first; Cephes, expf.c."""
_PHI_END, _PHI_DEGREE = 5.5, 15
"""The end of the interval on which Phi is a polynomial, and the degree at which that is as exact as float32
(5e-9)."""
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


def apply_or_clamp(
    activation: Activation | None, f: Function, x: Value, low: Value, high: Value, *, capped: bool = True
) -> Value:
    """How a layer ends: with its activation, or, where it has none, between its bounds, see `Function.clamp`.

    `x`, `low` and `high` are vectors of what is computed with.
    """
    return apply(activation, f, x) if activation else f.clamp(x, low, high, capped=capped)


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

    def long_polynomial(self, x: Value, coefficients: tuple[float, ...]) -> Value:
        """By Estrin's scheme, highest power first.

        Neighbours are joined to polynomials in x^2, those in x^4, and so on.
        Horner's rule waits for each multiplication before the next; of a long polynomial more would wait than a
        core can hold.
        """
        terms = [self.constant(c) for c in coefficients[::-1]]
        while len(terms) > 1:
            pairs = zip(terms[::2], terms[1::2], strict=False)
            terms = [self.f.fma(high, x, low) for low, high in pairs] + terms[len(terms) // 2 * 2 :]
            x = self.b.fmul(x, x)
        return terms[0]

    def power_and_rest(self, x: Value) -> tuple[Value, Value]:
        """2^n and exp(r) - 1, which make exp(x); x <= 0."""
        shifted = self.f.fma(x, self.constant(_LOG2_E), self.constant(_ROUND))
        n = self.plus(shifted, -_ROUND)
        r = self.f.fma(n, self.constant(-_LN2_LOW), self.f.fma(n, self.constant(-_LN2_HIGH), x))
        rest = self.f.fma(self.b.fmul(r, r), self.polynomial(r, _EXP), r)
        exponent = self.b.shl(self.as_bits(shifted), self.bits(23))
        return self.as_floats(self.b.add(exponent, self.bits(127 << 23))), rest

    def exp(self, x: Value) -> Value:
        """exp(x), for x <= 0; what is no normal number is zero; NaN stays."""
        power, rest = self.power_and_rest(self.clamp(x, _SMALLEST, 0.0))
        y = self.f.fma(power, rest, power)
        return self.b.select(self.b.fcmp_ordered("<", x, self.constant(_SMALLEST)), self.constant(0.0), y)

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


@cache
def _phi() -> tuple[float, ...]:
    """(Phi(x) - 1/2) / x in powers of 2 (x / end)^2 - 1, highest first."""
    points = chebyshev.chebpts1(_PHI_DEGREE + 1)
    x = _PHI_END * np.sqrt((points + 1) / 2)  # no point is -1
    values = [math.erf(value * math.sqrt(0.5)) / (2 * value) for value in x]
    series = chebyshev.chebfit(points, values, _PHI_DEGREE)
    return tuple(chebyshev.cheb2poly(series)[::-1].tolist())


def _gelu(v: _Vector, x: Value) -> Value:
    b = v.b
    inside = v.clamp(x, -_PHI_END, _PHI_END)
    u = v.f.fma(b.fmul(inside, inside), v.constant(2 / _PHI_END**2), v.constant(-1.0))
    phi = v.f.fma(inside, v.long_polynomial(u, _phi()), v.constant(0.5))
    is_below = b.fcmp_ordered("<", x, v.constant(-_PHI_END))
    return b.fmul(x, b.select(is_below, v.constant(0.0), phi))


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
