"""The tables that the driver walks: one row per native operation, with its machine code, its packed weights and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference import conv_steps, other_steps
from explorer.inference.graph import Graph, Operation
from explorer.inference.kernels import (
    driver,
    flatten,
    linear,
    pool,
    zero_gaps,
)
from explorer.inference.layout import Planes
from explorer.inference.memory import Memory, address
from explorer.inference.native import Emitter
from explorer.inference.orders import LAYERS, ROWS, Chain, Rows, orders
from explorer.inference.plan import Choice, Plan
from explorer.inference.rows_apart import Apart, rows_apart
from explorer.inference.step_builder import Row, StepBuilder


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

    A row of the table is a step, or one turn of a step that takes several, see `Plan.order`. `plain` is the table without jobs and chains. `labels` and
    `table_bytes` (packed weights, tables and arguments) have one item per step.

    Attributes
    ----------
    step_of : (rows,) int64
        The step of each row.
    turn : (rows,) int64
        Its turn; 0 where it has none.
    abreast : int
        Images that late layers take side by side: the turns.
    pieces : (rows,) int64
        Jobs of so many images as one job takes, `images_per_job`.
    fixed : (rows,) int64
        Images of rows that do not follow the batch; 0 for others.
    counts : list of (int, ndarray)
        Rows whose arguments tell the number of images, and where.
    head : int
        The first row of the head, see `Plan`.
    moves : list of Move
        Where the vectors go that the head reads when all turns are over.
    apart : list of Apart
        What stands in the place of rows in the order `ROWS`.
    order : str
        Which of `chains` are run: one of its keys.
    """

    memory: Memory
    threads: int
    table: NDArray[np.int64]
    plain: NDArray[np.int64]
    step_of: NDArray[np.int64]
    turn: NDArray[np.int64]
    abreast: int
    pieces: NDArray[np.int64]
    images_per_job: NDArray[np.int64]
    fixed: NDArray[np.int64]
    counts: list[tuple[int, NDArray[np.int64]]]
    scratch_bytes: int
    labels: list[str]
    table_bytes: list[int]
    chains: Mapping[str, list[Chain]]
    head: int
    moves: list[Move]
    apart: list[Apart]
    order: str = LAYERS

    def set_batch(self, images: int, total: int) -> None:
        """Give each row the number of jobs that `images` images need; the head those of `total`."""
        # Of images side by side the first turn has the first one of each group, and so on; who takes them all counts groups.
        follows = np.maximum(-(-(images - self.turn) // self.abreast), 0)
        follows[self.head :] = total  # it knows no groups
        each = np.where(self.fixed, self.fixed, follows)
        for row, count in self.counts:
            count[0] = each[row]
        for move in self.moves:
            move.to(0)
        jobs, kernel, arguments, gaps = (
            driver.STEP.index(name) for name in ("jobs", "kernel", "arguments", "gaps")
        )
        self.table[:] = self.plain
        self.table[:, jobs] = self.pieces * -(-each // self.images_per_job)
        for cut in self.apart if self.order == ROWS else ():
            anew = cut.jobs * each[cut.row], cut.kernel, cut.arguments
            self.table[cut.row, [jobs, kernel, arguments]] = anew
        for part in self.chains[self.order]:
            mine = follows[part.first]
            # Else threads share an image, or not all of those that go side by side are there.
            if mine % self.threads == 0 and (follows[part.first : part.last] == mine).all():
                self.table[part.first : part.last, [jobs, gaps]] = 0
                self.table[part.first, jobs] = mine
                self.table[part.first, [kernel, arguments]] = part.row

    def row_at(self, step: int) -> int:
        """The first row from which on no step before `step` is run; that must be a step that takes no turns, or the first of all."""
        return step and len(self.table) - (len(self.labels) - step)

    def by_step(self, by_row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sums of what was counted for each row."""
        found = np.zeros(len(self.labels), np.int64)
        np.add.at(found, self.step_of, by_row)
        return found


def _step(builder: StepBuilder, operation: Operation, choice: Choice, turn: int | None) -> Row:
    """One operation as a step, by what it is and how its values lie; `turn` as in `Plan.order`."""
    family = builder.plan.step_family(operation)
    places = [builder.plan.seen(place, turn) for place in builder.plan.operands(operation)]
    out = builder.plan.seen(operation.output, turn)
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
    if operation.kind == "token":
        return other_steps.token_step(builder, operation, places[0], out)
    if operation.kind == "layer_norm":
        return other_steps.norm_step(builder, operation, places[0], out)
    if operation.kind == "attention":
        return other_steps.attention_step(builder, operation, places, out)
    if operation.kind in ("to_tokens", "to_planes"):
        return other_steps.rearrange_step(builder, operation, places[0], out)
    if operation.kind == "split":
        return other_steps.split_step(builder, operation, places[0], out)
    if operation.kind == "upsample":
        return other_steps.upsample_step(builder, operation, places[0], out)
    return other_steps.pool_step(builder, operation, places[0], out)


def zeroing_arguments(y: Planes, start: int, pieces: int = 1, *, fills: bool) -> NDArray[np.int64]:
    """Arguments of `kernels.zero_gaps` for planes whose first pixel is at `start`, each image in so many `pieces`.

    `fills`: who writes them writes zeros between the rows, and to the end of the last vector.
    """
    size, last = y.element_bytes, (y.rows - 1) * y.pitch + y.columns
    return zero_gaps.ARGUMENTS.filled(
        out=start,
        image=y.image_bytes,
        before=size * y.guard,  # the end of the image before has as much
        pieces=pieces,
        channels=y.channels,
        plane=y.plane_bytes,
        pixels=size * (y.vectors * y.lanes if fills else last),
        rows=0 if fills else y.rows - 1,
        pitch=y.pitch_bytes,
        row=size * y.columns,
        gap=y.pitch_bytes - size * y.columns,
    )


_VECTOR_RECORDS = {"plane_average": pool.ARGUMENTS, "flatten": flatten.ARGUMENTS, "token": flatten.ARGUMENTS}


def build_steps(
    plan: Plan,
    graph: Graph,
    choices: Mapping[int, Choice],
    packed: dict[tuple[str, Choice], Any] | None = None,
    *,
    other_orders: bool = True,
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
    other_orders : bool
        Whether to prepare other orders than layer by layer.
    """
    with Emitter() as emitter:
        return _steps(
            plan, graph, choices, {} if packed is None else packed, emitter, other_orders=other_orders
        )


def _steps(
    plan: Plan,
    graph: Graph,
    choices: Mapping[int, Choice],
    packed: dict[tuple[str, Choice], Any],
    emitter: Emitter,
    *,
    other_orders: bool,
) -> Steps:
    memory = Memory()
    builder = StepBuilder(plan, graph, memory, packed, emitter)
    rows: list[tuple[Row, int]] = []
    fixed, counts, moves = [], [], []
    labels, table_bytes = [""] * len(plan.native), [0] * len(plan.native)
    gaps: dict[int, tuple[int, int]] = {}  # row -> arguments for zeroing gaps, and the jobs of an image
    turns = plan.order(graph)
    for this, (step, turn) in enumerate(turns):
        before, operation = memory.n_bytes, graph.operations[plan.native[step]]
        out = plan.seen(operation.output, turn)
        fixed.append(0 if plan.follows_batch(out.layout) else out.layout.images)
        first = turns.index((step, 0)) if turn else this
        if turn and not plan.differs(operation) and not rows[first][0].images_per_job:
            rows.append(rows[first])
            if first in gaps:
                gaps[this] = gaps[first]
            continue
        row = _step(builder, operation, choices.get(plan.native[step], Choice(True)), turn)
        arguments = memory.zeros(len(row.arguments), np.int64)
        arguments[:] = row.arguments
        rows.append((row, address(arguments)))
        if operation.output in plan.unclean:
            assert isinstance(out.layout, Planes)
            each = plan.threads_on_an_image(out.layout.images)
            zeroing = zeroing_arguments(out.layout, out.address, each, fills=row.fills)
            gaps[this] = memory.put(zeroing), each
        labels[step] = row.label
        table_bytes[step] += memory.n_bytes - before
        if row.images_per_job:
            at = linear.ARGUMENTS.index("images")
            counts.append((this, arguments[at : at + 1]))
        if step < plan.head and operation.output in plan.head_places:
            at = _VECTOR_RECORDS[operation.kind].index("out")
            n_bytes = plan.images * plan.places[operation.output].layout.image_bytes
            moves.append(Move(arguments[at : at + 1], int(arguments[at]), n_bytes))
    zero = builder.code(zero_gaps.ZeroGapsKernel())() if gaps else 0
    head = len(rows) - (len(plan.native) - plan.head)
    chains: dict[str, list[Chain]] = {LAYERS: []}
    apart: list[Apart] = []
    if other_orders:
        # Jobs for several images, or for all that there are, are nobody's own.
        is_shared = any(fixed[:head]) or any(row.images_per_job for row, _ in rows[:head])
        chains |= orders(builder, Rows(rows, turns, gaps, zero), 0 if is_shared else head)
        if plan.images < plan.threads:
            apart = rows_apart(builder, rows, [step for step, _ in turns])
            chains |= {ROWS: []} if apart else {}
    table = [[0, row.kernel(), arguments, 0] for row, arguments in rows]
    for this, (where, each) in gaps.items():
        step, turn = turns[this]
        images = plan.seen(graph.operations[plan.native[step]].output, turn).layout.images
        table[this][-1] = memory.put(driver.GAPS.filled(kernel=zero, arguments=where, pieces=images * each))
    plain = np.array(table, np.int64).reshape(-1, len(driver.STEP.fields))
    steps = Steps(
        memory,
        plan.threads,
        memory.zeros(plain.size, np.int64).reshape(plain.shape),
        plain,
        np.array([step for step, _ in turns], np.int64),
        np.array([turn or 0 for _, turn in turns], np.int64),
        plan.abreast.images if plan.abreast else 1,
        np.array([row.jobs for row, _ in rows], np.int64),
        np.array([max(row.images_per_job, 1) for row, _ in rows], np.int64),
        np.array(fixed, np.int64),
        counts,
        builder.scratch_bytes,
        labels,
        table_bytes,
        chains,
        head,
        moves,
        apart,
    )
    steps.set_batch(plan.images, plan.images)
    memory.seal()
    return steps
