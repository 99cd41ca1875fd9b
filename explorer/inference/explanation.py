"""Why a layer has the kernel that it has: what was measured, or what was known without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from explorer.inference.plan import ALWAYS_DENSE, ALWAYS_SPARSE


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel of a layer, and why it is this one.

    Attributes
    ----------
    name : str
        Dotted name of the layer.
    kernel : str
        As in `LayerTiming`.
    sparsity : float
        Zeros / elements of its weight when it was chosen.
    reason : str
        One sentence.
    candidates_ms : dict of str to float
        Milliseconds of each kernel that was tried, inside the network, for as much of the batch as goes through together; empty where none was. Layers were timed together, and the
        neighbours of a layer tried kernels too: small differences mean nothing.

    Examples
    --------
    >>> KernelChoice("conv1", "code", 0.9, "the fastest of 2", {"code": 0.25, "sparse": 0.5}).line()
    'conv1: code, 90.0 % zeros, the fastest of 2 (code 0.250 ms; sparse 0.500 ms)'
    """

    name: str
    kernel: str
    sparsity: float
    reason: str
    candidates_ms: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """All of it on one line."""
        times = "; ".join(f"{kernel} {ms:.3f} ms" for kernel, ms in self.candidates_ms.items())
        why = f"{self.reason} ({times})" if times else self.reason
        return f"{self.name}: {self.kernel}, {100 * self.sparsity:.1f} % zeros, {why}"


def reason(mode: str, kernel: str, density: float, tried: int, times: Mapping[str, float]) -> str:
    """Why a kernel was taken.

    Parameters
    ----------
    mode : {"auto", "dense", "sparse"}
        What `compile` was asked for.
    kernel : str
        As in `LayerTiming`.
    density : float
        Nonzeros / elements of the weight.
    tried : int
        Kernels that came into question.
    times : mapping
        What each took, where that is known.
    """
    if times:
        return f"the fastest of {len(times)} in this network"
    if tried > 1:
        return f"the fastest of {tried}, as an earlier version of the cache of choices remembers"
    if mode != "auto":
        return f"the only one of its kind (sparse={mode!r} was asked for)"
    if kernel.endswith("depthwise"):
        return "the only one for depthwise layers"
    if density <= ALWAYS_SPARSE:
        return f"the only sparse one, and no dense kernel has been seen to win where {100 * (1 - ALWAYS_SPARSE):.0f} % or more are zeros"
    if density >= ALWAYS_DENSE:
        return f"the only dense one, and no sparse kernel has been seen to win where less than {100 * (1 - ALWAYS_DENSE):.0f} % are zeros"
    return "the only one that can compute it"


def written(times: Mapping[str, float]) -> str:
    """Times of kernels as a line that is remembered beside an answer."""
    return json.dumps(dict(times))


def read(line: str | None) -> dict[str, float]:
    """The times that `written` wrote; none where the line is missing or not one of its own."""
    try:
        found = json.loads(line or "{}")
    except (ValueError, RecursionError):
        return {}
    times = found.items() if isinstance(found, dict) else ()
    return {kernel: float(ms) for kernel, ms in times if isinstance(ms, int | float)}
