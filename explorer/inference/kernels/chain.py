"""Calls other kernels in a fixed order: the layers that `explorer.inference.depth_first` runs band by band.

A job is one image. What each layer took is added up in the thread's scratch memory, beyond what the kernels
use: layers take turns, and the caller's stamps know only the whole. The twin in Python is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.driver import KERNEL, cycles
from explorer.inference.native import Isa

ARGUMENTS = Record(("calls", "n_calls", "cycles"))
"""What a job does.

calls      (n_calls,) rows of CALL, in the order in which they are run
cycles     bytes from the beginning of the scratch memory to the counters, (layers,) int64
"""

CALL = Record(("kernel", "arguments", "first", "jobs", "jobs_per_image", "counter"))
"""Some jobs of a kernel, of the image that the job is.

kernel, arguments    address of the machine code and of its row of arguments
first, jobs          the first of its jobs in image 0, and how many are run
jobs_per_image       of the kernel: so many further are those of the next image
counter              bytes from the first counter to that of the layer
"""


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


def reference(calls: NDArray[np.int64], image: int) -> list[tuple[int, int, int]]:
    """The twin in Python: what a job calls, one after the other.

    Parameters
    ----------
    calls : (n_calls, 6) int64
        Rows of CALL.
    image : int
        The job.

    Returns
    -------
    list of (kernel, arguments, job)
    """
    found = []
    for kernel, arguments, first, jobs, jobs_per_image, _ in calls.tolist():
        begin = image * jobs_per_image + first
        found += [(kernel, arguments, job) for job in range(begin, begin + jobs)]
    return found
