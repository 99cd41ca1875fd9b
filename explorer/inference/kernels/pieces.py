"""Calls another kernel for one of several pieces of an image, each with arguments of its own.

See `explorer.inference.rows_apart`. Jobs of one piece follow one another, so that threads, each of which first
takes neighbouring jobs, take pieces of their own. The twin in Python is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.driver import KERNEL
from explorer.inference.native import Isa

ARGUMENTS = Record(("kernel", "arguments", "pieces", "jobs"))
"""Another kernel, piece by piece. Job = (image, piece, job of the piece), the last changes fastest.

kernel       address of its machine code
arguments    (pieces,) addresses of its rows of arguments
pieces       of an image
jobs         of a piece: as many as the kernel has of an image
"""


@dataclass(frozen=True, slots=True)
class PiecesKernel:
    """The machine code depends on nothing."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("pieces")
        f = Function(module, "pieces", VOID, [PTR, I64, PTR], isa)
        b, (args, job, scratch) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        jobs = field("jobs")
        in_image = b.mul(jobs, field("pieces"))
        image, rest = b.sdiv(job, in_image), b.srem(job, in_image)
        piece, mine = b.sdiv(rest, jobs), b.srem(rest, jobs)
        arguments = f.load(field("arguments", PTR), PTR, b.mul(piece, I64(8)), 8)
        kernel = b.inttoptr(field("kernel"), KERNEL.as_pointer())
        b.call(kernel, [arguments, b.add(b.mul(image, jobs), mine), scratch])
        b.ret_void()
        return module, "pieces"


def reference(job: int, pieces: int, jobs: int) -> tuple[int, int]:
    """The twin in Python: the piece that a job is of, and the job of the kernel that it is with that piece's arguments."""
    image, rest = divmod(job, pieces * jobs)
    piece, mine = divmod(rest, jobs)
    return piece, image * jobs + mine
