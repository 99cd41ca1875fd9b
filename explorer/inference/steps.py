"""The tables that the driver walks: one row per native operation, with its machine code, its packed weights and its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference import conv_steps, other_steps
from explorer.inference.depth_first import order
from explorer.inference.graph import Graph, Operation
from explorer.inference.kernels import (
    chain,
    driver,
    flatten,
    linear,
    pool,
    zero_gaps,
)
from explorer.inference.layout import Planes
from explorer.inference.memory import Memory, address
from explorer.inference.native import Emitter
from explorer.inference.plan import Choice, Plan
from explorer.inference.step_builder import Row, StepBuilder


@dataclass(frozen=True, slots=True)
class Chain:
    """Steps [first, last), which one thread runs band by band for an image, see `explorer.inference.depth_first`.

    `row` stands in the table instead of the first of them. `counters` is the byte offset in the scratch memory of the cycles that each took.
    """

    first: int
    last: int
    row: tuple[int, int]
    counters: int


@dataclass(frozen=True, slots=True)
class Move:
    """An address in the arguments of a step that moves on by `n_bytes` from one turn of images to the next; `cell` holds it."""

    cell: NDArray[np.int64]
    start: int
    n_bytes: int

    def to(self, turn: int) -> None:
        self.cell[0] = self.start + turn * self.n_bytes


@dataclass(slots=True)
class Steps:
    """The step tables for one set of weights and choices. Owns the memory that they point to.

    `plain` is the table without jobs and chains. `labels` and `table_bytes` (packed weights, tables and arguments) have one item per step.

    Attributes
    ----------
    pieces : (steps,) int64
        Jobs of so many images as one job takes, `images_per_job`.
    fixed : (steps,) int64
        Images of steps that do not follow the batch; 0 for others.
    counts : list of (int, ndarray)
        Steps whose arguments tell the number of images, and where.
    head : int
        See `Plan`.
    moves : list of Move
        Where the vectors go that the head reads when all turns are over.
    use_bands : bool
        Whether `chains` are run as such.
    """

    memory: Memory
    threads: int
    table: NDArray[np.int64]
    plain: NDArray[np.int64]
    pieces: NDArray[np.int64]
    images_per_job: NDArray[np.int64]
    fixed: NDArray[np.int64]
    counts: list[tuple[int, NDArray[np.int64]]]
    scratch_bytes: int
    labels: list[str]
    table_bytes: list[int]
    chains: list[Chain]
    head: int
    moves: list[Move]
    use_bands: bool = True

    def set_batch(self, images: int, total: int) -> None:
        """Give each step the number of jobs that `images` images need; the head those of `total`."""
        follows = np.full(len(self.fixed), images)
        follows[self.head :] = total
        each = np.where(self.fixed, self.fixed, follows)
        for step, count in self.counts:
            count[0] = each[step]
        for move in self.moves:
            move.to(0)
        jobs, kernel, arguments, gaps = (
            driver.STEP.index(name) for name in ("jobs", "kernel", "arguments", "gaps")
        )
        self.table[:] = self.plain
        self.table[:, jobs] = self.pieces * -(-each // self.images_per_job)
        if images % self.threads or not self.use_bands:
            return  # threads share an image, or it is faster without
        for part in self.chains:
            self.table[part.first : part.last, [jobs, gaps]] = 0
            self.table[part.first, jobs] = images
            self.table[part.first, [kernel, arguments]] = part.row


def _step(builder: StepBuilder, operation: Operation, choice: Choice) -> Row:
    """One operation as a step, by what it is and how its values lie."""
    family = builder.plan.step_family(operation)
    places = [builder.plan.places[place] for place in builder.plan.operands(operation)]
    out = builder.plan.places[operation.output]
    if family == "vectors" and operation.kind in ("conv", "linear"):
        return conv_steps.linear_step(builder, operation, places[0], out, choice)
    if operation.attributes.get("depthwise"):
        return conv_steps.depthwise_step(builder, operation, places[0], out, choice)
    if operation.kind in ("conv", "linear"):
        return conv_steps.conv_step(builder, operation, places, out, choice)
    if operation.kind in ("add", "mul", "affine", "clamp", "activation"):
        return other_steps.pointwise_step(builder, operation, places, out)
    if operation.kind in ("concat", "slice"):
        return other_steps.concat_step(builder, operation, places, out)
    if operation.kind == "flatten":
        return other_steps.flatten_step(builder, places[0], out)
    if operation.kind == "layer_norm":
        return other_steps.norm_step(builder, operation, places[0], out)
    if operation.kind == "attention":
        return other_steps.attention_step(builder, operation, places, out)
    if operation.kind == "split":
        return other_steps.split_step(builder, operation, places[0], out)
    if operation.kind == "upsample":
        return other_steps.upsample_step(builder, operation, places[0], out)
    return other_steps.pool_step(builder, operation, places[0], out)


def zeroing_arguments(y: Planes, start: int, *, fills: bool) -> NDArray[np.int64]:
    """Arguments of `kernels.zero_gaps` for planes whose first pixel is at `start`; `fills`: who writes them writes zeros between the rows, and to the end of the last vector."""
    size, last = y.element_bytes, (y.rows - 1) * y.pitch + y.columns
    return zero_gaps.ARGUMENTS.filled(
        out=start,
        image=y.image_bytes,
        before=size * y.guard,  # the end of the image before has as much
        channels=y.channels,
        plane=y.plane_bytes,
        pixels=size * (y.vectors * y.lanes if fills else last),
        rows=0 if fills else y.rows - 1,
        pitch=y.pitch_bytes,
        row=size * y.columns,
        gap=y.pitch_bytes - size * y.columns,
    )


_VECTOR_RECORDS = {"plane_average": pool.ARGUMENTS, "flatten": flatten.ARGUMENTS}


def build_steps(
    plan: Plan,
    graph: Graph,
    choices: Mapping[int, Choice],
    packed: dict[tuple[str, Choice], Any] | None = None,
    *,
    by_bands: bool = True,
) -> Steps:
    """Fill the step tables.

    Parameters
    ----------
    plan : Plan
    graph : Graph
        Lowered; the same structure as the plan's, perhaps with other weights.
    choices : mapping
        Kernel per operation index, for convolutions and linear layers.
    packed : dict, optional
        Keeps packed weights between calls with the same graph, by output and choice.
    by_bands : bool
        Whether to find the parts that may run band by band.
    """
    with Emitter() as emitter:
        return _steps(plan, graph, choices, {} if packed is None else packed, emitter, by_bands=by_bands)


def _steps(
    plan: Plan,
    graph: Graph,
    choices: Mapping[int, Choice],
    packed: dict[tuple[str, Choice], Any],
    emitter: Emitter,
    *,
    by_bands: bool,
) -> Steps:
    memory = Memory()
    builder = StepBuilder(plan, graph, memory, packed, emitter)
    rows, fixed, counts, moves, table_bytes = [], [], [], [], []
    gaps: dict[int, int] = {}  # step -> arguments for zeroing gaps
    for step, index in enumerate(plan.native):
        before, operation = memory.n_bytes, graph.operations[index]
        row, out = _step(builder, operation, choices.get(index, Choice(True))), plan.places[operation.output]
        arguments = memory.zeros(len(row.arguments), np.int64)
        arguments[:] = row.arguments
        rows.append((row, address(arguments)))
        if operation.output in plan.unclean:
            assert isinstance(out.layout, Planes)
            gaps[step] = memory.put(zeroing_arguments(out.layout, out.address, fills=row.fills))
        table_bytes.append(memory.n_bytes - before)
        fixed.append(0 if plan.follows_batch(out.layout) else out.layout.images)
        if row.images_per_job:
            at = linear.ARGUMENTS.index("images")
            counts.append((step, arguments[at : at + 1]))
        if step < plan.head and operation.output in plan.head_places:
            at = _VECTOR_RECORDS[operation.kind].index("out")
            n_bytes = plan.images * out.layout.image_bytes
            moves.append(Move(arguments[at : at + 1], out.address, n_bytes))
    zero = builder.code(zero_gaps.ZeroGapsKernel())() if gaps else 0
    chains = _chains(plan, graph, builder, rows, zero, gaps) if by_bands else []
    table = [[0, row.kernel(), arguments, 0] for row, arguments in rows]
    for step, zeroing in gaps.items():
        images = plan.places[graph.operations[plan.native[step]].output].layout.images
        table[step][-1] = memory.put(driver.GAPS.filled(kernel=zero, arguments=zeroing, images=images))
    plain = np.array(table, np.int64).reshape(-1, len(driver.STEP.fields))
    steps = Steps(
        memory,
        plan.threads,
        memory.zeros(plain.size, np.int64).reshape(plain.shape),
        plain,
        np.array([row.jobs for row, _ in rows], np.int64),
        np.array([max(row.images_per_job, 1) for row, _ in rows], np.int64),
        np.array(fixed, np.int64),
        counts,
        builder.scratch_bytes,
        [row.label for row, _ in rows],
        table_bytes,
        chains,
        plan.head,
        moves,
    )
    steps.set_batch(plan.images, plan.images)
    memory.seal()
    return steps


def _chains(
    plan: Plan,
    graph: Graph,
    builder: StepBuilder,
    rows: Sequence[tuple[Row, int]],
    zero: int,
    gaps: Mapping[int, int],
) -> list[Chain]:
    """The parts of the network that go band by band. Needs memory and scratch of its own, which it takes from `builder`.

    `zero`: the kernel that zeroes gaps, before the first band of the steps that have arguments for it in `gaps`.
    """
    chains = []
    for first, last in plan.deep(graph, [row.bands is not None for row, _ in rows]):
        cut = [row.bands(arguments) for row, arguments in rows[first:last] if row.bands]
        calls: list[tuple[int, ...]] = []
        for s, band in order([plan.accesses(graph, first + s, these) for s, these in enumerate(cut)]):
            row = rows[first + s][0]
            if band == 0 and first + s in gaps:
                calls.append((zero, gaps[first + s], 0, 1, 1, 8 * s))
            calls += [(row.kernel(), *call, row.jobs, 8 * s) for call in cut[s].calls[band]]
        calls = _joined(calls)
        counters = -(-builder.scratch_bytes // 64) * 64
        arguments = chain.ARGUMENTS.filled(
            calls=builder.memory.put(np.array(calls, np.int64)),
            n_calls=len(calls),
            cycles=counters,
        )
        builder.scratch_bytes = counters + 8 * len(cut)
        in_table = builder.code(chain.ChainKernel())(), builder.memory.put(arguments)
        chains.append(Chain(first, last, in_table, counters))
    return chains


def _joined(calls: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The same calls, with neighbouring ones of the same arguments and jobs that follow one another as one."""
    found: list[tuple[int, ...]] = []
    for call in calls:
        kernel, arguments, first, jobs, *rest = call
        if found and found[-1][:2] == call[:2] and found[-1][2] + found[-1][3] == first:
            found[-1] = (kernel, arguments, found[-1][2], found[-1][3] + jobs, *rest)
        else:
            found.append(call)
    return found
