"""The sparse CPU engine: compiles a network so that zeros in its weights cost nothing.

Imports no other room of the house (only the error types), so that it could leave as a package of its own. The way through it: `capture` (torch.export
in, our graph out), `lower` (fold and fuse), `plan` (layouts, buffers, tables), `kernels/` (LLVM IR), `native` (machine code, cache), `threads` (the
driver's helpers), `module` (what the user holds), `timing`.
"""

from __future__ import annotations

from explorer.inference.module import SparseModule, compile
from explorer.inference.timing import Benchmark, EngineCall, LayerTiming, compare_latency, dense_contestants

__all__ = [
    "Benchmark",
    "EngineCall",
    "LayerTiming",
    "SparseModule",
    "compare_latency",
    "compile",
    "dense_contestants",
]
