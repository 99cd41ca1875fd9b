"""Smooth activations by name, and what they are: definitions in float64, and how close the kernels come to them.

The instructions are in `explorer.inference.kernels.activation`; what reads a network needs no more than this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_ERROR = {
    "sigmoid": 2.5e-7,
    "hard_sigmoid": 1.5e-7,
    "hard_swish": 2.5e-7,
    "silu": 3e-7,
    "gelu": 4e-7,
    "gelu_tanh": 1e-6,
    "tanh": 2.5e-7,
    "leaky_relu": 1e-7,
    "elu": 3e-7,
}
"""Error relative to the value, for all float32 whose value is at least 1e-28; smaller ones may come out as zero. "gelu_tanh" is that
exact where the value is at least 1e-3, and 1e-9 absolute below. Of "gelu" the error is relative to half its argument, as torch's own is: what is left of a
very negative number has no exact digits."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of one number.

    Attributes
    ----------
    kind : str
        A key of `LARGEST_ERROR`.
    parameters : tuple of float
        "leaky_relu": the slope; "elu": alpha, scale and input scale, as torch orders them.
    """

    kind: str
    parameters: tuple[float, ...] = ()

    @property
    def moves_zero(self) -> bool:
        """Whether f(0) is not 0: then the gaps of planes must be masked."""
        return self.kind in ("sigmoid", "hard_sigmoid")

    @property
    def is_short(self) -> bool:
        """Whether it takes a few instructions, without an exponential or a long polynomial.

        These ride on convolutions. The others keep about twenty constants in registers, which a loop of their own loads once and the end of a
        convolution would load again for each channel: measured, that costs at least what a step of its own does (GELU on BERT-base: twice that).
        """
        return self.kind in ("hard_sigmoid", "hard_swish", "leaky_relu")

    def reference(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """The numpy twin: the definition, in float64."""
        return _DEFINITIONS[self.kind](np.asarray(x, np.float64), *self.parameters)


def _logistic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x < 0, e, 1.0) / (1 + e))


_erfc = np.vectorize(math.erfc, otypes=[np.float64])

_DEFINITIONS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "sigmoid": _logistic,
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "silu": lambda x: x * _logistic(x),
    "gelu": lambda x: x * _erfc(-x * math.sqrt(0.5)) / 2,
    "gelu_tanh": lambda x: x * _logistic(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "tanh": np.tanh,
    "leaky_relu": lambda x, slope: np.where(x > 0, x, slope * x),
    "elu": lambda x, alpha, scale, input_scale: (
        scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x * input_scale, 0)))
    ),
}
