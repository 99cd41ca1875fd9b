"""Jobs of the kernels that work channel by channel: some channels of one image each.

Job = (image, piece), of which the piece changes fastest; piece p has the channels from p * channels_per_job on.
"""

from __future__ import annotations

from collections.abc import Callable

from explorer.inference.kernels.builder import I32, I64, Function, Value


def channels_of(f: Function, field: Callable[[str], Value], job: Value) -> tuple[Value, Value, Value]:
    """The image of a job, its first channel and the one after its last.

    The kernel's arguments hold `jobs` (of one image), `channels` (of an image) and `channels_per_job`.
    """
    b, jobs, size = f.b, field("jobs"), field("channels_per_job")
    image, piece = b.sdiv(job, jobs), b.srem(job, jobs)
    first = b.mul(piece, size)
    return image, first, f.minimum(b.add(first, size), field("channels"))


def place_of(f: Function, places: Value, vector: Value) -> Value:
    """Where a vector of a channel goes whose result lies in tiles: bytes from the channel's first.

    `places`: (vectors of a plane,) int32.
    """
    return f.b.sext(f.load(places, I32, f.b.mul(vector, I64(4))), I64)
