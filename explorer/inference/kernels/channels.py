"""Jobs of the kernels that work channel by channel: some channels of one image each."""

from __future__ import annotations

from collections.abc import Callable

from explorer.inference.kernels.builder import Function, Value


def channels_of(f: Function, field: Callable[[str], Value], job: Value) -> tuple[Value, Value, Value]:
    """The image of a job, its first channel and the one after its last.

    The kernel's arguments hold `jobs` (of one image), `channels` and `channels_per_job`.
    """
    b, jobs, size = f.b, field("jobs"), field("channels_per_job")
    image, piece = b.sdiv(job, jobs), b.srem(job, jobs)
    first = b.mul(piece, size)
    return image, first, f.minimum(b.add(first, size), field("channels"))
