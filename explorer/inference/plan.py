"""Where every tensor lives, which kernel runs each operation, and the tables that the driver walks.

A `Plan` is made once per network: layouts, buffers (reused by liveness), torch views, the order of native and torch segments. `Plan.steps` then
fills the step tables for given weights and kernel choices; it is what runs again when only the weights change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from explorer.inference.graph import Graph, Operation, Ref
from explorer.inference.kernels import conv, driver, linear, pointwise, pool
from explorer.inference.kernels.builder import Record
from explorer.inference.layout import Layout, PitchClasses, Planes, Vectors
from explorer.inference.memory import Memory, address
from explorer.inference.native import Isa, machine_code
from explorer.inference.pack import conv_blocks, linear_dense, linear_sparse

_INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class Choice:
    """How one convolution or linear layer runs: a dense or a sparse kernel, and how it reaches its operands (convolutions)."""

    dense: bool
    reach: str = "direct"

    @property
    def label(self) -> str:
        return ("dense" if self.dense else "sparse") + ("" if self.reach == "direct" else f", {self.reach}")


@dataclass(frozen=True, slots=True)
class NativeSegment:
    """Steps [first, last) in one native call."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class TorchSegment:
    """One operator through torch; when `into` is set its result is copied to that native tensor."""

    operation: Operation


@dataclass(frozen=True, slots=True)
class ImportSegment:
    """Copy a torch value to its native place."""

    value: str
    place: str


Segment = NativeSegment | TorchSegment | ImportSegment


@dataclass(slots=True)
class Place:
    """A tensor's home in native memory."""

    layout: Layout
    start: int = 0
    view: torch.Tensor | None = None

    @property
    def address(self) -> int:
        """Of the first pixel of the first plane, or of the first value."""
        return self.start + 4 * self.layout.before


@dataclass(slots=True)
class Steps:
    """The step tables for one set of weights and choices. Owns the memory that they point to."""

    memory: Memory
    table: NDArray[np.int64]
    jobs_per_image: NDArray[np.int64]
    jobs_fixed: NDArray[np.int64]
    scratch_bytes: int
    labels: list[str]
    graph: Graph

    def set_batch(self, images: int) -> None:
        """Give each step the number of jobs that `images` images need."""
        self.table[:, driver.STEP.index("jobs")] = self.jobs_per_image * images + self.jobs_fixed


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


class Plan:
    """Layouts, buffers and the order of execution of a lowered graph.

    Parameters
    ----------
    graph : Graph
        Lowered.
    isa : Isa
    threads : int
        Work is cut so that this many threads find jobs in each step.
    """

    def __init__(self, graph: Graph, isa: Isa, threads: int) -> None:
        self.isa, self.threads = isa, threads
        self.images = graph.shapes[graph.inputs[0]][0] if graph.inputs and graph.shapes.get(graph.inputs[0]) else 1
        self.places: dict[str, Place] = {}
        self.native: list[int] = []  # indices into graph.operations, one per step
        self.segments: list[Segment] = []
        self._alias: dict[str, str] = {}
        self._family: dict[str, str] = {}
        self._decide(graph)
        self._lay_out(graph)
        self._allocate(graph)
        self.is_dynamic = not any(isinstance(s, TorchSegment) for s in self.segments) and all(
            self.follows_batch(p.layout) for p in self.places.values()
        )

    def follows_batch(self, layout: Layout) -> bool:
        """Whether the first axis of this tensor is the batch, so that a smaller batch needs fewer jobs."""
        return layout.images == self.images and not (isinstance(layout, Planes) and layout.tokens)

    # ---- which operations are native, and in which layout family each value is needed

    def _fits(self, operation: Operation, graph: Graph) -> str | None:
        """The layout family in which this operation can run natively: "planes", "tokens", "vectors"; None for torch."""
        shapes = [graph.shapes.get(name, ()) for name in operation.inputs]
        if not shapes or any(len(s) == 0 or 0 in s for s in shapes):
            return None
        if any(graph.dtypes.get(name) != torch.float32 for name in operation.inputs):
            return None
        shape = shapes[0]
        if operation.kind == "conv":
            if len(shape) == 4 and shape[2:] == (1, 1):
                weight = graph.constants[operation.weight or ""]
                is_vector = weight.shape[2:] == (1, 1) and operation.attributes["groups"] == 1
                return "vectors" if is_vector and len(operation.inputs) == 1 and operation.attributes["padding"] == (0, 0) else None
            return "planes"
        if operation.kind == "linear":
            return "vectors" if len(shape) == 2 else "tokens"
        if operation.kind in ("max_pool", "average_pool", "plane_average"):
            return "planes" if len(shape) == 4 and shape[2:] != (1, 1) else None
        if operation.kind in ("add", "clamp"):
            families = {self._family.get(self.root(name)) for name in operation.inputs} - {None}
            return next(iter(families)) if len(families) == 1 else None
        return None

    def root(self, name: str) -> str:
        """The value whose memory `name` is another name of."""
        while name in self._alias:
            name = self._alias[name]
        return name

    def _decide(self, graph: Graph) -> None:
        """Order of segments; imports are put right before the first native step that needs them."""
        imported: set[str] = set()
        for index, operation in enumerate(graph.operations):
            if operation.kind == "same":
                source = self.root(operation.inputs[0])
                if self._family.get(source) == "vectors":
                    self._alias[operation.output] = source
                    continue
                operation.kind = "torch"
            family = self._fits(operation, graph)
            if family is None:
                operation.kind = "torch"
                self.segments.append(TorchSegment(operation))
                continue
            for name in operation.inputs:
                place = self._place_name(name, family)
                if place not in imported and self._family.get(self.root(name)) != family:
                    imported.add(place)
                    self.segments.append(ImportSegment(name, place))
            self._family[operation.output] = self._output_family(operation, family)
            last = self.segments[-1] if self.segments else None
            step = len(self.native)
            if isinstance(last, NativeSegment):
                self.segments[-1] = NativeSegment(last.first, step + 1)
            else:
                self.segments.append(NativeSegment(step, step + 1))
            self.native.append(index)

    @staticmethod
    def _output_family(operation: Operation, family: str) -> str:
        return "vectors" if operation.kind == "plane_average" else family

    def _place_name(self, name: str, family: str) -> str:
        """The key of a value's native home in a family; a value that lives elsewhere gets a second home by an import."""
        root = self.root(name)
        return root if self._family.get(root) == family else f"{root}@{family}"

    def adopt(self, graph: Graph) -> None:
        """Make a freshly lowered graph of the same structure run in the places of this plan."""
        torch_now = {s.operation.output: s for s in self.segments if isinstance(s, TorchSegment)}
        for operation in graph.operations:
            if operation.output in torch_now:
                operation.kind = "torch"

    # ---- layouts

    def _step_family(self, operation: Operation) -> str:
        out = self._family[operation.output]
        return "planes" if operation.kind == "plane_average" else out

    def _lay_out(self, graph: Graph) -> None:
        lanes, classes = self.isa.lanes, PitchClasses()
        sizes: dict[str, tuple[tuple[int, ...], int, int, int, int, bool]] = {}
        vectors: dict[str, tuple[tuple[int, ...], int]] = {}

        def meet(place: str, shape: tuple[int, ...], family: str) -> None:
            if family == "vectors":
                vectors.setdefault(place, (shape, 0))
                return
            if place in sizes:
                return
            if family == "tokens":
                pixels = int(np.prod(shape[:-1]))
                sizes[place] = (shape, 1, shape[-1], 1, pixels, True)
            else:
                rows = shape[2] if len(shape) == 4 else 1
                sizes[place] = (shape, shape[0], shape[1], rows, shape[-1], False)
            classes.add(place, sizes[place][4])

        for index in self.native:
            operation = graph.operations[index]
            family = self._step_family(operation)
            ins = [self._place_name(name, family) for name in operation.inputs]
            for name, place in zip(operation.inputs, ins, strict=True):
                meet(place, graph.shapes[name], family)
            out = operation.output
            meet(out, graph.shapes[out], self._family[out])
            if family == "vectors":
                continue
            a = operation.attributes
            if operation.kind == "conv":
                if a["stride"] == (1, 1):
                    classes.tie(ins[0], out)
                    classes.pad(ins[0], *a["padding"])
                for other in ins[1:]:
                    classes.tie(other, out)
            elif operation.kind in ("linear", "add", "clamp"):
                for place in ins:
                    classes.tie(place, out)
        for place, (shape, images, channels, rows, columns, tokens) in sizes.items():
            self.places[place] = Place(classes.planes(place, shape, images, channels, rows, columns, lanes, tokens))
        for place, (shape, _) in vectors.items():
            # Dense kernels write whole groups of vectors: leave room for the widest group.
            stride = -(-shape[1] // (8 * lanes)) * 8 * lanes if shape[1] > 8 * lanes else -(-shape[1] // lanes) * lanes
            self.places[place] = Place(Vectors(shape, shape[0], shape[1], stride))

    # ---- buffers

    def _allocate(self, graph: Graph) -> None:
        """Give each place memory; places whose guards coincide share it when their lives do not overlap."""
        self.memory = Memory()
        last_use: dict[str, float] = {}
        pinned: set[str] = {s.place for s in self.segments if isinstance(s, ImportSegment)}
        for step, index in enumerate(self.native):
            operation = graph.operations[index]
            family = self._step_family(operation)
            for name in operation.inputs:
                last_use[self._place_name(name, family)] = step
        for segment in self.segments:
            if isinstance(segment, TorchSegment):
                # torch may return a view of what it was given: such memory is never given away
                pinned.update(self.root(n) for n in segment.operation.references())
            if isinstance(segment, ImportSegment):
                pinned.add(self.root(segment.value))
        pinned.update(self.root(o.name) for o in graph.outputs if isinstance(o, Ref))
        born = {graph.operations[index].output: step for step, index in enumerate(self.native)}
        groups: dict[tuple[Any, ...], list[tuple[float, list[str]]]] = {}
        owners: list[list[str]] = []
        for place in sorted(self.places, key=lambda p: born.get(p, -1)):
            layout = self.places[place].layout
            end = _INFINITY if place in pinned else last_use.get(place, born.get(place, _INFINITY))
            slots = groups.setdefault(layout.reuse_key, [])
            free = [i for i, (until, _) in enumerate(slots) if until < born.get(place, -1)]
            if free and place not in pinned:
                slots[free[0]][1].append(place)
                slots[free[0]] = (end, slots[free[0]][1])
            else:
                slots.append((end, [place]))
                owners.append(slots[-1][1])
        for names in owners:
            size = max(self.places[name].layout.elements for name in names)
            array = self.memory.zeros(size)
            storage = torch.from_numpy(array)
            for name in names:
                place = self.places[name]
                place.start, place.view = address(array), place.layout.view(storage)

    # ---- steps

    def candidates(self, graph: Graph, index: int, mode: str) -> list[Choice]:
        """The kernels worth timing for operation `index`, best guess first."""
        operation = graph.operations[index]
        if operation.kind not in ("conv", "linear"):
            return [Choice(True)]
        weight = graph.constants[operation.weight or ""]
        density = float((weight != 0).float().mean())
        forms = ["direct"]
        a = operation.attributes
        if operation.kind == "conv" and self._family[operation.output] == "planes":
            if a["stride"] != (1, 1):
                forms = ["gather"]
            elif weight.shape[2:].numel() > 1:
                forms = ["shift", "direct"]
            if a["groups"] > 1:
                return [Choice(False, forms[-1])]
        dense = [Choice(True, form) for form in forms]
        sparse = [Choice(False, form) for form in forms]
        if mode == "dense":
            return dense
        if mode == "sparse":
            return sparse
        # Above three quarters of nonzeros no sparse kernel has been seen to win, below a twentieth no dense one.
        return (sparse if density < 0.75 else []) + (dense if density > 0.05 else [])

    def steps(self, graph: Graph, choices: Mapping[int, Choice]) -> Steps:
        """Fill the step tables.

        Parameters
        ----------
        graph : Graph
            Lowered; the same structure as the plan's, perhaps with other weights.
        choices : mapping
            Kernel per operation index, for convolutions and linear layers.
        """
        memory = Memory()
        builder = _StepBuilder(self, graph, memory)
        rows, per_image, fixed, labels = [], [], [], []
        for index in self.native:
            row = builder.step(graph.operations[index], choices.get(index, Choice(True)))
            rows.append([0, row.kernel, memory.put(row.arguments)])
            labels.append(row.label)
            layout = self.places[graph.operations[index].output].layout
            follows = self.follows_batch(layout)
            per_image.append(row.jobs if follows else 0)
            fixed.append(0 if follows else row.jobs * layout.images)
        table = memory.zeros(max(len(rows), 1) * 3, np.int64).reshape(-1, 3)
        if rows:
            table[:] = np.array(rows, np.int64)
        steps = Steps(
            memory, table, np.array(per_image, np.int64), np.array(fixed, np.int64), builder.scratch_bytes, labels, graph
        )  # fmt: skip
        if rows:
            steps.set_batch(self.images)
        return steps


@dataclass(slots=True)
class _Row:
    kernel: int
    arguments: NDArray[np.int64]
    jobs: int  # per image
    label: str


def _fill(record: Record, **values: int) -> NDArray[np.int64]:
    row = np.zeros(len(record.fields), np.int64)
    for name, value in values.items():
        row[record.index(name)] = value
    return row


@dataclass(slots=True)
class _StepBuilder:
    plan: Plan
    graph: Graph
    memory: Memory
    scratch_bytes: int = 4096
    _tables: dict[Any, int] = field(default_factory=dict)

    def step(self, operation: Operation, choice: Choice) -> _Row:
        family = self.plan._step_family(operation)
        places = [self.plan.places[self.plan._place_name(name, family)] for name in operation.inputs]
        out = self.plan.places[operation.output]
        if family == "vectors" and operation.kind in ("conv", "linear"):
            return self._vector_linear(operation, places[0], out, choice)
        if operation.kind in ("conv", "linear"):
            return self._conv(operation, places, out, choice)
        if operation.kind in ("add", "clamp"):
            return self._pointwise(operation, places, out)
        return self._pool(operation, places[0], out)

    def _code(self, kernel: Any) -> int:
        return machine_code(self.plan.isa, repr(kernel), lambda: kernel.build(self.plan.isa))

    @staticmethod
    def _bounds(operation: Operation) -> dict[str, int]:
        a = operation.attributes
        return {"low": _bits(a.get("low", -_INFINITY)), "high": _bits(a.get("high", _INFINITY))}

    def _constants(self, operation: Operation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        weight = self.graph.constants[operation.weight or ""].detach().to("cpu", torch.float32).contiguous().numpy()
        if operation.bias is None:
            return weight, np.zeros(len(weight), np.float32)
        return weight, self.graph.constants[operation.bias].detach().to("cpu", torch.float32).contiguous().numpy()

    # ---- convolutions, and linear layers over tokens

    def _conv(self, operation: Operation, places: list[Place], out: Place, choice: Choice) -> _Row:
        weight, bias = self._constants(operation)
        x, y = places[0].layout, out.layout
        assert isinstance(x, Planes) and isinstance(y, Planes)
        a = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **operation.attributes}
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        elif weight.ndim == 3:
            weight = weight[:, :, None, :]
        m, cg, kh, kw = weight.shape
        lanes, vectors = self.plan.isa.lanes, y.vectors
        tile = _tile(vectors)
        rows = min(conv.dense_rows(tile, self.plan.isa), m) if choice.dense else 0
        tiles = -(-vectors // tile)
        parts = _parts(tiles, m, self.plan.threads, y.images)
        aligned = choice.reach == "direct" and kh * kw == 1 and a["padding"] == (0, 0)
        independent = a["groups"] > 1
        kernel = conv.ConvKernel(
            tile, choice.reach, rows, m % rows if rows else 0, len(places) > 1, y.has_gaps, aligned, independent
        )  # fmt: skip
        table, table_tap = 0, 0
        if choice.reach == "gather":
            table = self._taps(x, y, (kh, kw), a["stride"], a["padding"], a["dilation"])
            table_tap = 4 * vectors * lanes
            where = np.zeros((x.channels, kh * kw, 2), np.int64)
            where[:, :, 0] = np.arange(x.channels)[:, None] * x.plane * 4
            where[:, :, 1] = np.arange(kh * kw)
        else:
            dy = np.arange(kh)[:, None] * a["dilation"][0] - a["padding"][0]
            dx = np.arange(kw)[None, :] * a["dilation"][1] - a["padding"][1]
            shifts = (dy * x.pitch + dx).reshape(-1)
            where = (np.arange(x.channels, dtype=np.int64)[:, None] * x.plane + shifts) * 4
        blocks = conv_blocks(weight.reshape(m, cg, kh * kw), a["groups"], where, kernel, lanes, parts)
        rows_of_blocks = np.array([block.place(self.memory) for part in blocks for block in part], np.int64)
        self.scratch_bytes = max(self.scratch_bytes, kernel.scratch_bytes(m, lanes))
        residual = places[1] if len(places) > 1 else None
        arguments = _fill(
            conv.ARGUMENTS,
            x=places[0].address,
            x_image=4 * x.image,
            out=out.address,
            out_image=4 * y.image,
            out_plane=4 * y.plane,
            residual=residual.address if residual else 0,
            residual_image=4 * residual.layout.image if residual and isinstance(residual.layout, Planes) else 0,
            residual_plane=4 * residual.layout.plane if residual and isinstance(residual.layout, Planes) else 0,
            bias=self.memory.put(bias),
            tiles=tiles,
            parts=parts,
            last_tile=4 * lanes * (vectors - tile),
            mask=self._mask(y),
            table=table,
            table_tap=table_tap,
            blocks=self.memory.put(rows_of_blocks),
            n_blocks=len(blocks[0]),
            **self._bounds(operation),
        )
        return _Row(self._code(kernel), arguments, tiles * parts, choice.label)

    def _mask(self, y: Planes) -> int:
        """All ones where the output has a pixel, zero in its gaps: (vectors * lanes,) int32."""
        key = ("mask", y.rows, y.columns, y.pitch)
        if key not in self._tables:
            mask = np.zeros(y.vectors * y.lanes, np.int32)
            at = np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)
            mask[at.reshape(-1)] = -1
            self._tables[key] = self.memory.put(mask)
        return self._tables[key]

    def _taps(
        self, x: Planes, y: Planes, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
    ) -> int:
        """For each tap and output element, the element of the input plane; -1 where there is none: (taps, vectors * lanes) int32."""
        key = ("taps", x.rows, x.columns, x.pitch, y.rows, y.columns, y.pitch, size, stride, padding, dilation)
        if key not in self._tables:
            table = np.full((size[0] * size[1], y.vectors * y.lanes), -1, np.int32)
            at = (np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)).reshape(-1)
            for tap in range(len(table)):
                iy = np.arange(y.rows)[:, None] * stride[0] + tap // size[1] * dilation[0] - padding[0]
                ix = np.arange(y.columns)[None, :] * stride[1] + tap % size[1] * dilation[1] - padding[1]
                inside = (iy >= 0) & (iy < x.rows) & (ix >= 0) & (ix < x.columns)
                table[tap, at] = np.where(inside, iy * x.pitch + ix, -1).reshape(-1)
            self._tables[key] = self.memory.put(table)
        return self._tables[key]

    # ---- linear layers on vectors

    def _vector_linear(self, operation: Operation, place: Place, out: Place, choice: Choice) -> _Row:
        weight, bias = self._constants(operation)
        weight = weight.reshape(len(weight), -1)
        m, f = weight.shape
        x, y, lanes = place.layout, out.layout, self.plan.isa.lanes
        assert isinstance(x, Vectors) and isinstance(y, Vectors)
        common = {
            "x": place.address, "x_image": 4 * x.stride, "out": out.address, "out_image": 4 * y.stride, "n_in": f, "n_out": m,
            **self._bounds(operation),
        }  # fmt: skip
        if choice.dense:
            n_vectors = -(-m // lanes)
            group = 8 if n_vectors > 8 else n_vectors
            jobs = -(-n_vectors // group)
            padded = np.zeros(jobs * group * lanes, np.float32)
            padded[:m] = bias
            weights = self.memory.put(linear_dense(weight, group, lanes))
            arguments = _fill(linear.ARGUMENTS, jobs=jobs, weights=weights, bias=self.memory.put(padded), **common)
            return _Row(self._code(linear.LinearKernel(group)), arguments, jobs, choice.label)
        starts, indices, values = linear_sparse(weight, lanes)
        size = max(1, min(64, -(-m // (4 * self.plan.threads))))
        jobs = -(-m // size)
        arguments = _fill(
            linear.ARGUMENTS,
            jobs=jobs,
            rows_per_job=size,
            starts=self.memory.put(starts),
            indices=self.memory.put(indices),
            weights=self.memory.put(values),
            bias=self.memory.put(bias),
            **common,
        )
        return _Row(self._code(linear.LinearKernel(0)), arguments, jobs, choice.label)

    # ---- pooling and pointwise

    def _channel_jobs(self, channels: int) -> dict[str, int]:
        size = max(1, min(16, -(-channels // (2 * self.plan.threads))))
        return {"jobs": -(-channels // size), "channels": channels, "channels_per_job": size}

    def _pool(self, operation: Operation, place: Place, out: Place) -> _Row:
        x, y = place.layout, out.layout
        assert isinstance(x, Planes)
        jobs = self._channel_jobs(x.channels)
        common = {"x": place.address, "x_image": 4 * x.image, "x_plane": 4 * x.plane, "out": out.address, **jobs}
        common |= self._bounds(operation)
        if operation.kind == "plane_average":
            assert isinstance(y, Vectors)
            scale = self.memory.put(np.array([1.0 / (x.rows * x.columns)], np.float32))
            arguments = _fill(
                pool.ARGUMENTS, out_image=4 * y.stride, out_plane=4, vectors=x.vectors, scale=scale, **common
            )  # fmt: skip
            return _Row(self._code(pool.PoolKernel("plane")), arguments, jobs["jobs"], "pool")
        assert isinstance(y, Planes)
        a = operation.attributes
        table = self._taps(x, y, a["size"], a["stride"], a["padding"], a["dilation"])
        taps = a["size"][0] * a["size"][1]
        scale = 0
        if operation.kind == "average_pool":
            scale = self.memory.put(_window_scale(x, y, a))
        arguments = _fill(
            pool.ARGUMENTS,
            out_image=4 * y.image,
            out_plane=4 * y.plane,
            vectors=y.vectors,
            n_taps=taps,
            table=table,
            table_tap=4 * y.vectors * y.lanes,
            mask=self._mask(y),
            scale=scale,
            **common,
        )
        kind = "max" if operation.kind == "max_pool" else "average"
        return _Row(self._code(pool.PoolKernel(kind)), arguments, jobs["jobs"], "pool")

    def _pointwise(self, operation: Operation, places: list[Place], out: Place) -> _Row:
        layouts = [p.layout for p in (*places, out)]
        names = ["x", "other", "out"] if len(places) == 2 else ["x", "out"]
        values: dict[str, int] = {}
        for name, place, layout in zip(names, (*places, out), layouts, strict=True):
            values[name] = place.address
            values[f"{name}_image"] = 4 * (layout.image if isinstance(layout, Planes) else layout.stride)
            values[f"{name}_plane"] = 4 * layout.plane if isinstance(layout, Planes) else 0
        y = out.layout
        if isinstance(y, Planes):
            jobs, vectors = self._channel_jobs(y.channels), y.vectors
        else:
            jobs = {"jobs": 1, "channels": 1, "channels_per_job": 1}
            vectors = -(-y.features // self.plan.isa.lanes)
        arguments = _fill(pointwise.ARGUMENTS, vectors=vectors, **values, **jobs, **self._bounds(operation))
        kernel = pointwise.PointwiseKernel(len(places) == 2)
        return _Row(self._code(kernel), arguments, jobs["jobs"], operation.kind)


def _window_scale(x: Planes, y: Planes, a: dict[str, Any]) -> NDArray[np.float32]:
    """One over the number of elements that each window averages, per output element."""
    (kh, kw), (sh, sw), (ph, pw) = a["size"], a["stride"], a["padding"]

    def counts(n_out: int, n_in: int, k: int, s: int, p: int) -> NDArray[np.int64]:
        start = np.arange(n_out) * s - p
        # With padding counted, a window is cut only where it leaves even the padded image.
        low, high = (-p, n_in + p) if a["count_padding"] else (0, n_in)
        return np.minimum(start + k, high) - np.maximum(start, low)

    n = counts(y.rows, x.rows, kh, sh, ph)[:, None] * counts(y.columns, x.columns, kw, sw, pw)[None, :]
    scale = np.zeros(y.vectors * y.lanes, np.float32)
    at = np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)
    scale[at.reshape(-1)] = (1.0 / n).reshape(-1)
    return scale


def _tile(vectors: int) -> int:
    """Vectors per tile: about seven keep both FMA units busy; tiles that divide the plane evenly waste nothing.

    Each tile costs its vectors plus about one and a half for reading the nonzeros again.
    """
    sizes = range(min(4, vectors), min(8, vectors) + 1)
    return min(sizes, key=lambda t: (-(-vectors // t) * (t + 1.5), -t))


def _parts(tiles: int, channels: int, threads: int, images: int) -> int:
    """Parts of the output channels: enough jobs for all threads at the smallest batch, and no more, since each part packs again."""
    if threads == 1 or tiles % threads == 0 or tiles >= 4 * threads:
        return 1
    return min(threads, max(1, channels // 16))
