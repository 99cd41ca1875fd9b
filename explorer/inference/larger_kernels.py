"""Which layers may have the kernels that are faster and larger: programs, where each nonzero is an instruction, and Winograd's filtering.

A program takes twice the bytes of a table, transformed weights with those that they come from three times the bytes of dense ones. What a compiled network
occupies has a limit, and what such kernels gain is the less the fewer pixels a layer has: each instruction, or weight, then does little before the next one has
to be fetched. The layers with most pixels come first, until the limit is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from explorer.inference.memory import can_run_code
from explorer.inference.native import Isa, l2_bytes

LIMIT = 1.3
"""What a network may occupy / (8 bytes for each nonzero + its activations)."""

_LEAST_DENSITY, _MOST_DENSITY = 0.03, 0.75
"""Nonzeros / weights between which programs may be faster: below, no operand is shared by enough output channels (ResNet-50 on Zen 4: at 0.05 they still take
0.95 of the time), above, dense kernels are as fast."""

_SMALL = 0.25
"""Programs of so much of the L2 cache may be faster than dense kernels: first layers of three channels (of ResNet-50 0.91, of MobileNetV1 0.70 of the time)."""

SHORT = 1 << 16
"""Elements from the first operand of a K block to its last, below which the offsets in tables have 16 bits: they save two of the eight bytes of a nonzero, which are worth more as
programs. (Only where there are programs: without, nothing is gained by it.)"""

_DENSE_BYTES, _TABLE_BYTES, _SHORT_BYTES, _PROGRAM_BYTES, _WINOGRAD_BYTES = 4.2, 8.5, 6.5, 15.5, 12.2
"""What a weight needs in a dense kernel, a nonzero in tables, in tables with offsets of 16 bits, and in programs, with all that belongs to them (ResNet-50 at 90 %: 8.3, 6.3 and 15.4;
programs in float16 need two less), and a weight where Winograd's filtering has transformed it to twice its size."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A layer with weights.

    Attributes
    ----------
    weights, nonzeros : int
    vectors : int
        Vectors of pixels of its result.
    can : bool
        Whether its kernels could be programs at all.
    winograd : bool
        Whether Winograd's filtering could compute it, and faster than a sparse kernel.
    short : bool
        Whether the offsets of its tables have 16 bits.
    half : bool
        Whether programs compute in float16.
    """

    weights: int
    nonzeros: int
    vectors: int
    can: bool
    winograd: bool = False
    short: bool = False
    half: bool = False

    @property
    def program_bytes(self) -> float:
        """Bytes that it needs as a program, about."""
        return (_PROGRAM_BYTES - 2 * self.half) * self.nonzeros

    @property
    def may_gain(self) -> bool:
        """Whether a program may be faster than other kernels."""
        density = self.nonzeros / max(self.weights, 1)
        is_small = self.program_bytes <= _SMALL * l2_bytes()
        return self.can and density >= _LEAST_DENSITY and (density < _MOST_DENSITY or is_small)

    @property
    def n_bytes(self) -> float:
        """Bytes that it needs otherwise, about."""
        each = _SHORT_BYTES if self.short else _TABLE_BYTES
        return min(_DENSE_BYTES * self.weights, each * self.nonzeros)


def has_programs(isa: Isa) -> bool:
    """Whether sparse weights can become programs: of AVX-512 only, which must compute in what they do, and where the system lets a process run what it has written."""
    return isa.name == "avx512" and isa.computes_natively and can_run_code()


@dataclass(frozen=True, slots=True)
class Larger:
    """The layers that may become programs, and those that Winograd's filtering may compute. A layer can be in both: it will be one of them."""

    code: frozenset[int]
    winograd: frozenset[int]


def larger_kernels(layers: Mapping[int, Weighed], activation_bytes: int, other_bytes: int = 0) -> Larger:
    """Share out what the limit leaves beside the smaller kernels. Winograd's filtering, which saves half of the products, comes before programs.

    Parameters
    ----------
    layers : mapping
        All layers of a network.
    activation_bytes : int
    other_bytes : int
        What the network occupies besides, which the limit does not allow for.
    """
    nonzeros = sum(layer.nonzeros for layer in layers.values())
    left = (
        LIMIT * (8 * nonzeros + activation_bytes)
        - activation_bytes
        - other_bytes
        - sum(layer.n_bytes for layer in layers.values())
    )
    in_order = sorted(layers.items(), key=lambda item: (-item[1].vectors, item[1].nonzeros))
    taken: dict[int, float] = {}  # by layer, beyond what it needs otherwise

    def take(index: int, n_bytes: float) -> bool:
        """Whether there is room for the layer to need so many bytes."""
        nonlocal left
        before = taken.get(index, 0.0)
        more = max(n_bytes - layers[index].n_bytes, before)
        fits = more - before <= left
        if fits:
            left, taken[index] = left - (more - before), more
        return fits

    winograd = {i for i, layer in in_order if layer.winograd and take(i, _WINOGRAD_BYTES * layer.weights)}
    code = {i for i, layer in in_order if layer.may_gain and take(i, layer.program_bytes)}
    return Larger(frozenset(code), frozenset(winograd))
