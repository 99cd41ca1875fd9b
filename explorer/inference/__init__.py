"""The sparse CPU engine: compiles a network so that zeros in its weights cost nothing.

Imports no other room of the house (only the error types), so that it could leave as a package of its own. The way through it: `capture` (torch.export
in, our graph out), `lower` (fold and fuse), `plan` (layouts, buffers, tables), `kernels/` (LLVM IR), `sparse_code` (weights as programs), `native` (machine code, cache), `steps` (the tables of what is run), `threads` (the
driver's helpers), `execution` (inputs through the plan), `choosing` (kernels, by measuring), `module` (what the user holds), `compilation` (all of it in order), `timing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from explorer.inference.compilation import compile
from explorer.inference.deviation import Deviation
from explorer.inference.explanation import KernelChoice
from explorer.inference.module import SparseModule
from explorer.inference.timing import Benchmark, EngineCall, LayerTiming, compare_latency, dense_contestants

if TYPE_CHECKING:
    from explorer.inference.peak import MachinePeak, machine_peak

__all__ = [
    "Benchmark",
    "Deviation",
    "EngineCall",
    "KernelChoice",
    "LayerTiming",
    "MachinePeak",
    "SparseModule",
    "compare_latency",
    "compile",
    "dense_contestants",
    "machine_peak",
]


def __getattr__(name: str) -> Any:
    # What measures the machine needs llvmlite: imported when it is asked for.
    if name in ("MachinePeak", "machine_peak"):
        from explorer.inference import peak

        return getattr(peak, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
