"""Calls other kernels in a fixed order: the layers that `explorer.inference.depth_first` runs band by band. A job is one image.

What each layer took is added up in the thread's scratch memory, beyond what the kernels use: layers take turns, and the caller's stamps know only the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.driver import KERNEL, cycles
from explorer.inference.native import Isa

ARGUMENTS = Record(("calls", "n_calls", "cycles"))
"""`calls`: table of CALL. `cycles`: byte offset of the counters in the scratch memory."""

CALL = Record(("kernel", "arguments", "first", "jobs", "jobs_per_image", "counter"))
"""`jobs` jobs of a kernel, from `first` on in the first image. `counter`: byte offset of the layer's among the counters."""


@dataclass(frozen=True, slots=True)
class ChainKernel:
    """The machine code depends on nothing."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("chain")
        f = Function(module, "chain", VOID, [PTR, I64, PTR], isa)
        b, (args, image, scratch) = f.b, f.arguments
        counters = f.at(scratch, f.field(args, ARGUMENTS, "cycles"))

        def one_call(index: Value, started: Value) -> list[Value]:
            call = f.row(f.field(args, ARGUMENTS, "calls", PTR), CALL, index)

            def field(name: str, type_: Value = I64) -> Value:
                return f.field(call, CALL, name, type_)

            kernel = b.inttoptr(field("kernel"), KERNEL.as_pointer())
            arguments = field("arguments", PTR)
            first = b.add(b.mul(image, field("jobs_per_image")), field("first"))

            def one_job(job: Value) -> None:
                b.call(kernel, [arguments, job, scratch])

            f.loop(b.add(first, field("jobs")), one_job, start=first)
            now, counter = cycles(f), f.at(counters, field("counter"))
            f.store(b.add(f.load(counter, I64, 0, 8), b.sub(now, started)), counter, 0, 8)
            return [now]

        f.loop(f.field(args, ARGUMENTS, "n_calls"), one_call, [cycles(f)])
        b.ret_void()
        return module, "chain"
