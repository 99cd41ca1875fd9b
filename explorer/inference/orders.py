"""The orders in which the steps of a network may be run, and the chains of calls that make them.

Which is the fastest depends on caches, and on who else uses them: it is measured, see choosing.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from explorer.inference.depth_first import order
from explorer.inference.kernels import chain
from explorer.inference.plan import NativeSegment
from explorer.inference.step_builder import Row, StepBuilder

LAYERS, BANDS = "layer by layer", "band by band"
ROWS = "layer by layer, each thread with rows of its own"
ALONE, ALONE_BY_BANDS = "each thread alone", "each thread alone, band by band"
"""Layer by layer all threads take part in each step; with rows of its own, each thread keeps to its part of large images also where a step would be shared out by channels, see
`explorer.inference.rows_apart`. Band by band one thread goes through neighbouring large layers with an image, see `explorer.inference.depth_first`. Alone, a thread takes an image of its
own through all layers, and waits for nobody until it is through: threads that share caches, or a core with other work, are never equally fast. (ResNet-50 at 90 %, 16 images, two
threads, Zen 4: 0.99 of the time of bands in quiet.)"""

Call = tuple[int, ...]
"""A row of `explorer.inference.kernels.chain.CALL`, with the row of the step table that it belongs to in the place of its counter."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Rows [first, last) of the step table, which one thread runs for an image, in an order of their own.

    `row` stands in the table instead of the first of them. `counters` is the byte offset in the scratch memory of the cycles that each took.
    """

    first: int
    last: int
    row: tuple[int, int]
    counters: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The step table in the making.

    Attributes
    ----------
    made : sequence of (Row, int)
        Each row, and the address of its arguments.
    turns : sequence of (int, int or None)
        The step of each, and its turn, see `Plan.order`.
    gaps : mapping
        Of the rows that need zeros in gaps before they begin: arguments for that, and its jobs for an image.
    zero : int
        The kernel that does so.
    """

    made: Sequence[tuple[Row, int]]
    turns: Sequence[tuple[int, int | None]]
    gaps: Mapping[int, tuple[int, int]]
    zero: int

    def zeroing(self, row: int) -> list[Call]:
        """What comes before the first call of a row."""
        if row not in self.gaps:
            return []
        arguments, jobs = self.gaps[row]
        return [(self.zero, arguments, 0, jobs, jobs, row)]

    def whole(self, row: int) -> list[Call]:
        """All jobs of an image."""
        made, arguments = self.made[row]
        return [*self.zeroing(row), (made.kernel(), arguments, 0, made.jobs, made.jobs, row)]


Bands = dict[int, tuple[int, list[Call]]]
"""By the first row of neighbouring ones that go band by band: the row after the last, and their calls."""


def orders(builder: StepBuilder, rows: Rows, head: int) -> dict[str, list[Chain]]:
    """The chains of each order but `LAYERS` and `ROWS` that a network could be run in.

    Parameters
    ----------
    builder : StepBuilder
        Gives them memory, and scratch memory.
    rows : Rows
    head : int
        The rows before it a thread could run alone; 0 where it could not.
    """
    plan, found = builder.plan, {}
    bands = _bands(builder, rows)
    if bands:
        found[BANDS] = [_chain(builder, first, last, calls) for first, (last, calls) in bands.items()]
    # An input that is brought between two native calls is not there when the first of them begins.
    in_one_call = sum(isinstance(segment, NativeSegment) for segment in plan.segments) == 1
    if plan.threads > 1 and plan.groups >= plan.threads and plan.is_dynamic and in_one_call and head > 1:
        found[ALONE] = [_chain(builder, 0, head, _all(rows, head, {}))]
        if bands:
            found[ALONE_BY_BANDS] = [_chain(builder, 0, head, _all(rows, head, bands))]
    return found


def _bands(builder: StepBuilder, rows: Rows) -> Bands:
    plan, graph = builder.plan, builder.graph
    can = [True] * len(plan.native)
    for (step, _), (row, _) in zip(rows.turns, rows.made, strict=True):
        can[step] &= row.bands is not None
    found: Bands = {}
    for first, last in plan.deep(graph, can):
        for at in (row for row, (step, _) in enumerate(rows.turns) if step == first):
            made = rows.made[at : at + last - first]
            cut = [row.bands(arguments) for row, arguments in made if row.bands]
            calls: list[Call] = []
            for s, band in order([plan.accesses(graph, first + s, these) for s, these in enumerate(cut)]):
                row, _ = made[s]
                if band == 0:
                    calls += rows.zeroing(at + s)
                calls += [(row.kernel(), *call, row.jobs, at + s) for call in cut[s].calls[band]]
            found[at] = at + last - first, _joined(calls)
    return found


def _all(rows: Rows, head: int, bands: Bands) -> list[Call]:
    """The calls of all rows before `head`, of some band by band."""

    def in_turn() -> Iterator[Call]:
        row = 0
        while row < head:
            after, calls = bands[row] if row in bands else (row + 1, rows.whole(row))
            yield from calls
            row = after

    return list(in_turn())


def _chain(builder: StepBuilder, first: int, last: int, calls: Sequence[Call]) -> Chain:
    """Rows [first, last) as these calls."""
    counters = -(-builder.scratch_bytes // 64) * 64
    table, counter = np.array(calls, np.int64), chain.CALL.index("counter")
    table[:, counter] = 8 * (table[:, counter] - first)
    arguments = chain.ARGUMENTS.filled(
        calls=builder.memory.put(table),
        n_calls=len(calls),
        cycles=counters,
    )
    builder.scratch_bytes = counters + 8 * (last - first)
    in_table = builder.code(chain.ChainKernel())(), builder.memory.put(arguments)
    return Chain(first, last, in_table, counters)


def _joined(calls: Iterable[Call]) -> list[Call]:
    """The same calls, with neighbouring ones of the same arguments and jobs that follow one another as one."""
    found: list[Call] = []
    for call in calls:
        kernel, arguments, first, jobs, *rest = call
        if found and found[-1][:2] == call[:2] and found[-1][2] + found[-1][3] == first:
            found[-1] = (kernel, arguments, found[-1][2], found[-1][3] + jobs, *rest)
        else:
            found.append(call)
    return found
