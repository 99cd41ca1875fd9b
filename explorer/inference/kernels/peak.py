"""What this machine can do at best, so that a kernel's speed means something: multiply-adds, and reading memory.

fma    as many independent sums as registers allow, nothing else in the loop
read   one pass over a buffer, vector by vector, into four sums

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Value
from explorer.inference.native import Isa

READ_VECTORS = 4
"""Vectors that the reading loop takes at once."""


def sums(isa: Isa) -> int:
    """Independent sums of the multiply-add loop: enough to hide the latency of all FMA units."""
    return min(isa.registers - 4, 16)


@dataclass(frozen=True, slots=True)
class PeakKernel:
    """`kind` is "fma" or "read".

    The entry is ``peak(buffer, rounds)``, of an address on a vector boundary and of how often to go round. It
    leaves the sum of what it computed in the buffer's second vector, so that nothing of it can be left out.
    """

    kind: str

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("peak")
        f = Function(module, "peak", VOID, [PTR, I64], isa)
        b, (buffer, rounds), width = f.b, f.arguments, f.width
        zero = f.constant(0.0)
        if self.kind == "fma":
            # Ordinary numbers: denormal ones would be slow. They come from memory, so that nothing is known
            # beforehand.
            x = f.read(buffer, 0, width)
            total = f.loop(rounds, lambda _, *t: [f.fma(x, x, s) for s in t], [zero] * sums(isa))
        else:

            def four(i: Value, *totals: Value) -> list[Value]:
                at = f.at(buffer, b.mul(i, I64(READ_VECTORS * width)))
                return [b.fadd(t, f.read(at, width * k, width)) for k, t in enumerate(totals)]

            total = f.loop(rounds, four, [zero] * READ_VECTORS)
        result = total[0]
        for one in total[1:]:
            result = b.fadd(result, one)
        f.write(result, buffer, width, width)
        b.ret_void()
        return module, "peak"


def reference(kind: str, buffer: NDArray[np.floating], rounds: int, isa: Isa) -> NDArray[np.float64]:
    """The numpy twin: the vector that is left, (lanes,), of so many rounds over a buffer of whole vectors."""
    vectors = buffer.reshape(-1, isa.lanes).astype(np.float64)
    if kind == "fma":
        return np.asarray(sums(isa) * rounds * vectors[0] ** 2)
    return np.asarray(vectors[: READ_VECTORS * rounds].sum(0))
