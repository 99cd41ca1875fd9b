"""Which layers may become programs, where each nonzero is an instruction: these are the faster kernels, and the larger ones.

A program takes twice the bytes of a table. What a compiled network occupies has a limit, and what programs gain is the less the fewer pixels a layer has:
each instruction then does little before the next one has to be fetched. The layers with most pixels come first, until the limit is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from explorer.inference.memory import can_run_code
from explorer.inference.native import Isa

LIMIT = 1.3
"""What a network may occupie / (8 bytes for each nonzero + its activations)."""

LEAST_DENSITY = 0.03
"""Nonzeros / weights below which no operand is shared by enough output channels (ResNet-50 on Zen 4: at 0.05 programs still take 0.95 of the time)."""

_ROWS_BYTES, _PROGRAM_BYTES = 8.5, 15.0
"""What tables and programs need for a nonzero of ResNet-50 at 90 %, with all that belongs to them: 8.4 and 14.4."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A layer that could become a program.

    Attributes
    ----------
    nonzeros : int
    vectors : int
        Vectors of pixels of its result.
    """

    nonzeros: int
    vectors: int


def has_programs(isa: Isa) -> bool:
    """Whether sparse weights can become programs: of AVX-512 only, in float32, and where the system lets a process run what it has written."""
    return isa.name == "avx512" and isa.precision == "fp32" and can_run_code()


def layers_as_code(layers: Mapping[int, Weighed], nonzeros: int, activation_bytes: int) -> frozenset[int]:
    """The layers that may become programs.

    Parameters
    ----------
    layers : mapping
        Those that could.
    nonzeros : int
        Of all layers of the network.
    activation_bytes : int
    """
    left = LIMIT * (8 * nonzeros + activation_bytes) - activation_bytes - _ROWS_BYTES * nonzeros
    chosen = set()
    for index, layer in sorted(layers.items(), key=lambda item: (-item[1].vectors, item[1].nonzeros)):
        more = (_PROGRAM_BYTES - _ROWS_BYTES) * layer.nonzeros
        if more <= left:
            chosen.add(index)
            left -= more
    return frozenset(chosen)
