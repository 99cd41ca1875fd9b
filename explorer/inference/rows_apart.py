"""Steps whose jobs are channels, cut so that each thread computes rows of its own of all of them.

Convolutions are shared out by pixels: each thread computes some rows of all channels. Where the next step is shared out by channels (depthwise convolutions, strided reads), each
thread reads half of what it needs from the other's cache, and so does the convolution after it. Cut by rows, threads exchange no more than the rows at the borders, and each
thread's cache holds its own half of the image. (Intel Xeon, MobileNetV1 at 90 %, one image, two threads: 0.95 of the time.) Small planes lose: what a core fetches ahead of its
use, beyond its own rows, is what the other one has just written. (Those of 14 x 14 pixels would take 1.1 of the time.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from explorer.inference.kernels import pieces
from explorer.inference.layout import Planes
from explorer.inference.step_builder import Row, StepBuilder


@dataclass(frozen=True, slots=True)
class Apart:
    """What stands in the step table in the place of a row.

    Attributes
    ----------
    row : int
    jobs : int
        Of an image.
    kernel, arguments : int
        Addresses.
    """

    row: int
    jobs: int
    kernel: int
    arguments: int


_LEAST_VECTORS = 64
"""Vectors of a channel for each thread."""


def rows_apart(builder: StepBuilder, made: Sequence[tuple[Row, int]], steps: Sequence[int]) -> list[Apart]:
    """The rows of the step table that can be cut so, each anew.

    Parameters
    ----------
    builder : StepBuilder
    made : sequence of (Row, int)
        Each row, and the address of its arguments.
    steps : sequence of int
        The step of each.
    """
    plan, graph, found = builder.plan, builder.graph, []
    for number, ((row, _), step) in enumerate(zip(made, steps, strict=True)):
        operation = graph.operations[plan.native[step]]
        x = plan.places[plan.operands(operation)[0]].layout
        if row.apart is None or not isinstance(x, Planes) or x.vectors < plan.threads * _LEAST_VECTORS:
            continue
        cut = row.apart(plan.threads)
        # What a row writes beyond its end belongs to the next one, which another thread may have written already.
        if len(cut.calls) < plan.threads or np.any(cut.writes[:-1, 1] > cut.writes[1:, 0]):
            continue
        arguments = np.array([address for ((address, _, _),) in cut.calls], np.int64)
        filled = pieces.ARGUMENTS.filled(
            kernel=row.kernel(),
            arguments=builder.memory.put(arguments),
            pieces=len(arguments),
            jobs=row.jobs,
        )
        kernel = builder.code(pieces.PiecesKernel())()
        found.append(Apart(number, row.jobs * len(arguments), kernel, builder.memory.put(filled)))
    return found
