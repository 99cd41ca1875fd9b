"""The tables that the driver walks: one row per native operation, with its machine code, its packed weights and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.errors import EngineError
from explorer.inference import bands
from explorer.inference.depth_first import Bands, order
from explorer.inference.graph import Graph, Operation
from explorer.inference.heads import Heads
from explorer.inference.kernels import (
    attention,
    chain,
    conv,
    conv_channels,
    conv_tables,
    copy_planes,
    depthwise,
    driver,
    flatten,
    layer_norm,
    linear,
    pointwise,
    pool,
    registers,
    split,
    upsample,
    window_pool,
    winograd,
    zero_gaps,
)
from explorer.inference.layout import MAX_TILE, Planes, Vectors, channel_columns, channel_tile, tile_of
from explorer.inference.memory import Memory, address
from explorer.inference.native import Emitter, Isa, Kernel, l1_bytes, l2_bytes
from explorer.inference.pack import (
    PackedConv,
    conv_channels_dense,
    conv_code,
    conv_dense,
    conv_sparse,
    conv_winograd,
    linear_dense,
    linear_sparse,
    operands,
    weight_words,
)
from explorer.inference.plan import Choice, Place, Plan
from explorer.inference.sparse_code import Finish
from explorer.inference.sparse_rows import SparseWeights
from explorer.inference.taps import Taps
from explorer.inference.winograd import ROWS, Chunks, Filter

_INFINITY = float("inf")


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


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


@dataclass(slots=True)
class _Row:
    """One step. `kernel` waits for the address of its machine code; `bands`, where it can be cut into them, makes them from the address of its arguments."""

    kernel: Callable[[], int]
    arguments: NDArray[np.int64]
    jobs: int  # per image
    label: str
    bands: Callable[[int], Bands] | None = None
    images_per_job: int = 0  # where a job takes several images: its arguments tell how many there are, and `jobs` counts the jobs of so many images
    fills: bool = False  # whether it writes each vector of the planes, with zeros between the rows


_SUMS_BYTES = 128 << 10
"""Sums that one job of a convolution with channels in the lanes keeps between K blocks."""


_LEAST_BLOCK_BYTES = 33 << 10


def block_bytes() -> int:
    """Operands of one K block: about the L1 cache, beside which sums and weights stream.

    Of 48 KiB, 24 to 64 are within 5 % and 40 the best. Of 32 KiB (Zen 4), 33 were best in all: 1.03 x as fast as 26 in ResNet-50, 1.02 x in BERT, where 40
    would be slower than 26: longer rows are worth more than the last operand's place in the L1 cache, to a degree.
    """
    return min(max(l1_bytes() * 13 // 16, _LEAST_BLOCK_BYTES), conv_tables.BUFFER_BYTES // 2)


def _dense_block_bytes(row_bytes: int, sparse: int) -> int:
    """The same for the dense kernel, which needs no long rows, and goes round its operands again and again: they must not push each other out of the L1 cache.

    With vectors of 8 (Zen 3) ResNet-50 takes 0.92, BERT 0.92 of the time of blocks of 33 KiB; 16 to 24 KiB are alike. Tiles of many bytes keep the longer
    blocks, or their sums would be stored and loaded too often.
    """
    return min(sparse, max(l1_bytes() * 5 // 8, _DENSE_DEPTH * row_bytes))


_DENSE_DEPTH = 72
"""Operands that a K block of the dense kernel holds at least, if the L1 cache can."""

_LONG_ROW = 4
"""Vectors of a row that depthwise layers take with another (MobileNetV1 on Zen 3: 112 x 112 pixels 0.84 of the time, 14 x 14 0.97, 7 x 7 1.15)."""


@dataclass(slots=True)
class _StepBuilder:
    plan: Plan
    graph: Graph
    memory: Memory
    packed: dict[tuple[str, Choice], Any]
    emitter: Emitter
    scratch_bytes: int = 4096
    block_bytes: int = field(default_factory=block_bytes)
    _tables: dict[Any, int] = field(default_factory=dict)

    def step(self, operation: Operation, choice: Choice) -> _Row:
        family = self.plan.step_family(operation)
        places = [self.plan.places[place] for place in self.plan.operands(operation)]
        out = self.plan.places[operation.output]
        if family == "vectors" and operation.kind in ("conv", "linear"):
            return self._vector_linear(operation, places[0], out, choice)
        if operation.attributes.get("depthwise"):
            return self._depthwise(operation, places[0], out, choice)
        if operation.kind in ("conv", "linear"):
            return self._conv(operation, places, out, choice)
        if operation.kind in ("add", "mul", "affine", "clamp", "activation"):
            return self._pointwise(operation, places, out)
        if operation.kind in ("concat", "slice"):
            return self._concat(operation, places, out)
        if operation.kind == "flatten":
            return self._flatten(places[0], out)
        if operation.kind == "layer_norm":
            return self._layer_norm(operation, places[0], out)
        if operation.kind == "attention":
            return self._attention(operation, places, out)
        if operation.kind == "split":
            return self._split(operation, places[0], out)
        if operation.kind == "upsample":
            return self._upsample(operation, places[0], out)
        return self._pool(operation, places[0], out)

    def code(self, kernel: Kernel, isa: Isa | None = None) -> Callable[[], int]:
        """Have the machine code of a kernel made; the result waits for its address."""
        return self.emitter.code(isa or self.plan.isa, kernel)

    def _once(self, operation: Operation, choice: Choice, pack: Callable[[], Any]) -> Any:
        """Packed weights, from an earlier round with the same choice when there was one."""
        key = (operation.output, choice)
        if key not in self.packed:
            self.packed[key] = pack()
        return self.packed[key]

    @staticmethod
    def _bounds(operation: Operation) -> dict[str, int]:
        a = operation.attributes
        return {"low": _bits(a.get("low", -_INFINITY)), "high": _bits(a.get("high", _INFINITY))}

    def _constants(self, operation: Operation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight and bias; the gain of a folded batch norm is not yet in the weight, see `_dense` and `_sparse`."""
        weight = self._array(operation.weight)
        bias = np.zeros(len(weight), np.float32) if operation.bias is None else self._array(operation.bias)
        return weight, self._fitting(operation, bias)

    def _array(self, name: str | None) -> NDArray[Any]:
        array: NDArray[Any] = self.graph.constants[name or ""].detach().cpu().contiguous().numpy()
        return array

    def _dense(self, operation: Operation) -> NDArray[np.float32]:
        """The weight as a matrix (M, K) float32."""
        weight = self._array(operation.weight)
        weight = weight.reshape(len(weight), -1)
        if operation.gain is not None:
            weight = (weight * self._array(operation.gain)[:, None]).astype(np.float32)
        return self._fitting(operation, weight)

    def _sparse(self, operation: Operation, channels: int = 1) -> SparseWeights:
        """The nonzeros of the weight as a matrix (M, K), so many output channels together."""
        weight = self._array(operation.weight)
        gain = None if operation.gain is None else self._array(operation.gain)
        weights = SparseWeights.of(weight.reshape(len(weight), -1), self.plan.isa, gain, channels)
        self._fitting(operation, weights.values)
        return weights

    def _fitting(self, operation: Operation, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values of a weight or bias, none of which becomes infinite in the precision of the plan."""
        if self.plan.isa.precision == "fp32" or self.plan.step_family(operation) == "vectors":
            return values
        most = np.finfo(self.plan.isa.dtype).max
        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0)
        if largest > most:
            raise EngineError(
                f"{operation.name or 'The model'} has a weight or bias of {largest:.6g} (after its batch norm has been folded in); the largest float16 is "
                f"{most:.0f}. Compile with precision='fp32'."
            )
        return values

    # ---- convolutions, and linear layers over tokens

    def _conv(self, operation: Operation, places: list[Place], out: Place, choice: Choice) -> _Row:
        weight, bias = self._constants(operation)
        x, y = places[0].layout, out.layout
        assert isinstance(x, Planes)
        assert isinstance(y, Planes)
        a = operation.attributes
        weight = weight.reshape(*weight.shape[:2], *[1] * (4 - weight.ndim), *weight.shape[2:])
        m, _, *size = weight.shape
        where = Taps.of(a, tuple(size))
        if choice.reach == "winograd":
            return self._winograd(operation, places, out, where, choice)
        shifts, planes = where.shifts(x.pitch), where.planes(x.channels // where.phases)
        if choice.reach == "channels":
            return self._conv_channels(operation, places, out, planes * x.plane + shifts, shifts, choice)
        layouts, groups = _planes(places, out), a.get("groups", 1)
        kernel, tiles, parts = self._conv_kernel(layouts, weight, choice, groups)
        kernel = replace(
            kernel,
            activation=a.get("activation"),
            capped=_is_capped(operation),
            code=choice.code,
            partners=not (choice.dense or choice.pairs or choice.code)
            and registers.has_partners(kernel.tile, self.plan.isa),
        )
        edges, masks = 0, None
        if where.reach_over(x.columns, y.columns, x.pitch):
            assert choice.reach == "shift"
            kernel = replace(kernel, masked=True)
            edges, masks = self._edges(where, y)
        reach = operands(planes, shifts, x.plane, choice.reach, kernel.tile, self.plan.isa, masks)
        if groups > 1 and not choice.dense and parts == groups:
            # As many groups at once as fill a K block, and no fewer parts than there are threads.
            fewest = min(groups, self.plan.threads if tiles < self.plan.threads else 1)
            parts = min(groups, max(fewest, -(-int(reach.n_bytes.sum()) // self.block_bytes)))

        words = partial(weight_words, isa=self.plan.isa)

        def pack() -> PackedConv:
            if choice.dense:
                size = _dense_block_bytes(kernel.tile * self.plan.isa.width, self.block_bytes)
                return conv_dense(self._dense(operation), reach, kernel, parts, size, words, groups)
            weights = self._sparse(operation, kernel.channels)
            if choice.code:
                mask = bool(y.has_gaps and not y.tile)
                finish = Finish(
                    len(places) > 1, a.get("low", -_INFINITY) > -_INFINITY, _is_capped(operation), mask
                )
                size = self._k_block(choice, weight)
                return conv_code(weights, bias, reach, kernel, finish, parts, size, self.plan.isa, groups)
            return conv_sparse(weights, reach, kernel, parts, self.block_bytes, words, self.plan.isa, groups)

        packed = self._once(operation, choice, pack)
        self.scratch_bytes = max(self.scratch_bytes, kernel.scratch_bytes(m, self.plan.isa))
        arguments = conv_tables.ARGUMENTS.filled(
            **_tensors(layouts, places, out),
            **{f"{name}_tile": layout.tile_step(kernel.tile) for name, layout in layouts.items()},
            bias=self.memory.put(words(bias)),
            tiles=tiles,
            parts=parts,
            back=0 if choice.reach == "compact" else y.vector_bytes * (tiles * kernel.tile - y.vectors),
            mask=self._mask(y) if y.has_gaps and not y.tile else 0,  # of tiles, nobody counts the gaps
            edges=edges,
            blocks=packed.place(self.memory),
            n_blocks=packed.n_blocks,
            **self._bounds(operation),
        )
        return _Row(
            self.code(kernel),
            arguments,
            tiles * parts,
            choice.label,
            partial(
                bands.of_tiles,
                y,
                tiles,
                0 if choice.reach == "compact" else kernel.tile,
                parts,
                shifts,
                len(places) > 1,
            ),
            fills=True,
        )

    def _conv_channels(
        self,
        operation: Operation,
        places: list[Place],
        out: Place,
        operands: NDArray[np.int64],
        shifts: NDArray[np.int64],
        choice: Choice,
    ) -> _Row:
        """A dense convolution with output channels in the lanes; `operands`, (C, taps): elements from a pixel to what each weight reads."""
        weight, bias = self._constants(operation)
        m, isa, y = len(weight), self.plan.isa, out.layout
        assert isinstance(y, Planes)
        # A residual may lie where the result does: a pixel that is computed twice would be added to twice.
        form = channel_tile(y.columns, m, isa, overlap=len(places) == 1)
        assert form is not None
        pixels, vectors = form
        layouts = _planes(places, out)
        kernel = conv_channels.ConvChannelsKernel(
            pixels,
            vectors,
            len(places) > 1,
            operation.attributes.get("activation"),
            _is_capped(operation),
        )
        width = vectors * isa.lanes
        groups = -(-m // width)
        rows, columns = np.arange(y.rows)[:, None] * y.pitch, channel_columns(y.columns, pixels)
        positions = (rows + columns).reshape(-1)
        # The sums of a job should stay in the L2 cache, beside the pixels that it reads.
        most = max(1, _SUMS_BYTES // (groups * kernel.sums_bytes(isa)))
        chunks = -(-len(positions) // most)
        tiles_per_job = -(-len(positions) // chunks)
        chunks = -(-len(positions) // tiles_per_job)
        parts = _parts(chunks, m, self.plan.threads, y.images)
        groups_per_job = -(-groups // parts)
        packed = self._once(
            operation,
            choice,
            lambda: conv_channels_dense(
                self._dense(operation).astype(isa.dtype),
                operands.reshape(-1) * isa.element_bytes,
                width,
                l1_bytes() // 2,
            ),
        )
        padded = np.zeros(groups * width, isa.dtype)
        padded[:m] = bias
        self.scratch_bytes = max(
            self.scratch_bytes,
            kernel.turned_bytes(isa) + groups_per_job * tiles_per_job * kernel.sums_bytes(isa),
        )
        arguments = conv_channels.ARGUMENTS.filled(
            **_tensors(layouts, places, out),
            bias=self.memory.put(padded),
            **{
                f"{name}_at": self.memory.put(
                    (layout.element(positions) * layout.element_bytes).astype(np.int32)
                )
                for name, layout in layouts.items()
            },
            tiles=len(positions),
            tiles_per_job=tiles_per_job,
            chunks=chunks,
            parts=parts,
            groups=groups,
            groups_per_job=groups_per_job,
            channels=m,
            blocks=packed.place(self.memory),
            n_blocks=packed.n_blocks,
            **self._bounds(operation),
        )
        cut = partial(bands.of_chunks, positions, pixels, tiles_per_job, parts, shifts, len(places) > 1)
        return _Row(self.code(kernel), arguments, chunks * parts, choice.label, cut)

    def _winograd(
        self, operation: Operation, places: list[Place], out: Place, taps: Taps, choice: Choice
    ) -> _Row:
        """A dense convolution by `kernels.winograd`."""
        weight, bias = self._constants(operation)
        m, isa, layouts = len(weight), self.plan.isa, _planes(places, out)
        x, y = layouts["x"], layouts["out"]
        form, chunks = Filter.of(taps), Chunks.of(y, residual=len(places) > 1)
        assert form is not None
        assert chunks is not None
        rows = min(registers.dense_rows(chunks.tile, isa), m)
        kernel = winograd.WinogradKernel(
            form.rows,
            chunks.tile,
            -(-form.width // isa.lanes),
            rows,
            m % rows,
            chunks.spare,
            len(places) > 1,
            y.is_cut,
            operation.attributes.get("activation"),
            _is_capped(operation),
        )
        tiles = -(-y.rows // ROWS) * len(chunks.first)
        parts = _parts(tiles, m, self.plan.threads, y.images)
        sums_bytes = kernel.points * kernel.channel_bytes(isa)
        # The sums of a piece fill most of the L1 cache, beside which weights stream.
        pieces = -(-m // max(rows, min(-(-m // parts), l1_bytes() * 3 // 4 // sums_bytes)))
        piece = -(-m // pieces // rows) * rows
        pieces = -(-m // piece)
        per_part = -(-pieces // parts)
        parts = -(-pieces // per_part)
        plane_bytes, channels = kernel.plane_bytes(isa), x.channels // taps.phases
        filters = self._dense(operation).reshape(m, channels, -1)
        packed = self._once(
            operation,
            choice,
            lambda: conv_winograd(
                form.transformed(filters),
                form,
                taps.phases,
                x.plane_bytes,
                plane_bytes,
                rows,
                piece,
                l1_bytes() // 2,
            ),
        )
        columns = taps.planes(channels) * x.plane_bytes + (taps.column - form.column.min()) * x.element_bytes
        reads = np.stack([columns, np.broadcast_to(taps.row - form.top, columns.shape)], -1).reshape(-1, 2)
        # Whole cache lines, and one more, so that not all V fall into the same cache sets.
        step = (-(-plane_bytes * packed.most_planes // 64) + 1) * 64
        start, sums = int(form.column.min()) * x.element_bytes, kernel.points * step
        kept = per_part if packed.n_blocks > 1 else 1
        self.scratch_bytes = max(self.scratch_bytes, sums + kept * piece * sums_bytes)
        places_of_vectors = chunks.places(y) if y.is_cut else np.zeros((0, 0), np.int64)
        tensors = {n: v for n, v in _tensors(layouts, places, out).items() if n != "x"}
        arguments = winograd.ARGUMENTS.filled(
            **tensors,
            x=places[0].address + start,
            x_pitch=x.pitch_bytes,
            x_rows=min(x.rows, y.rows + form.top + form.rows - 1),
            top=form.top,
            out_pitch=places_of_vectors.strides[0] if y.is_cut else y.pitch_bytes,
            places=self.memory.put(places_of_vectors) if y.is_cut else 0,
            rows=y.rows,
            bias=self.memory.put(bias),
            chunks=len(chunks.first),
            starts=self.memory.put(chunks.first * y.element_bytes),
            tiles=tiles,
            parts=parts,
            pieces_per_part=per_part,
            pieces=pieces,
            piece=piece,
            channels=m,
            zeros=self.memory.put(np.zeros(max(plane_bytes // 4, piece), np.float32)),
            step=step,
            sums=sums,
            piece_bytes=piece * sums_bytes if packed.n_blocks > 1 else 0,
            blocks=packed.place(self.memory),
            n_blocks=packed.n_blocks,
            weights=self.memory.put(filters),
            reads=self.memory.put(reads),
            n_reads=len(reads),
            **self._bounds(operation),
        )
        cut = partial(bands.of_rows, y, ROWS, tiles, parts, taps.shifts(x.pitch), len(places) > 1)
        return _Row(self.code(kernel), arguments, tiles * parts, choice.label, cut)

    def _conv_kernel(
        self, layouts: Mapping[str, Planes], weight: NDArray[np.float32], choice: Choice, groups: int = 1
    ) -> tuple[conv.ConvKernel, int, int]:
        """The kernel for these tensors (see `_planes`), and into how many tiles and parts of the channels its work is cut: at least one part for each group."""
        compact: dict[str, Any] = {}
        y, channels = layouts["out"], len(weight) // groups
        fixed = max(layout.tile for layout in layouts.values())
        assert all(layout.tile in (0, fixed) for layout in layouts.values())
        tile = fixed or tile_of(y.vectors)
        in_place = _in_place(choice, weight)
        if not fixed and in_place and not choice.code:
            tile = _dense_tile(y, tile) if choice.dense else _sparse_tile(y, weight, tile, self.block_bytes)
        tiles = -(-y.vectors // tile)
        if choice.reach == "compact":
            tile, tiles = y.compact_vectors, 1
            compact = {"columns": y.columns, "pitch": y.pitch, "plane": y.vectors}
        whole = choice.reach == "compact"
        rows = min(registers.dense_rows(tile, self.plan.isa, whole=whole), channels) if choice.dense else 0
        kernel = conv.ConvKernel(
            tile,
            rows,
            channels % rows if rows else 0,
            pairs=choice.pairs,
            **compact,
        )
        parts = _parts(tiles * groups, channels, self.plan.threads, y.images)
        if in_place and groups == 1:
            parts = max(parts, self._parts_by_sums(weight, tile, self._k_block(choice, weight)))
        return kernel, tiles, groups * parts

    def _k_block(self, choice: Choice, weight: NDArray[np.float32]) -> int:
        """Bytes of the operands of a K block of a sparse kernel.

        Programs go through them vector by vector, so that the L1 cache need not hold them all, and store the sums of all vectors once for each block: in place
        they are better off with operands in the L2 cache. (1 x 1 layers of ResNet-50 at 90 % on Zen 4, 1 MiB: with 128 KiB 0.80 to 0.90 of the time of 64. With
        256 KiB the 14 x 14 layers of MobileNetV1 take 0.96 of that, a shortcut of ResNet-50 0.86, others the same; with 512 KiB loops won for half of ResNet-50's layers.)
        3 x 3 layers read each operand for every tap: with 256 KiB they would take 1.02 to 1.4 of the time.
        """
        return l2_bytes() // 4 if choice.code and _in_place(choice, weight) else self.block_bytes

    def _parts_by_sums(self, weight: NDArray[np.float32], tile: int, block_bytes: int) -> int:
        """Parts of the output channels of a 1 x 1 convolution or linear layer whose sums stay in the L2 cache from one K block to the next.

        Others would copy their operands again for each part. (BERT at 90 % on Zen 3: 0.87 of the time, its 3072 features have 768 KiB of sums; ResNet-50 1.00;
        1/16 to 1/4 of the cache are alike, half of it is slower.)
        """
        channels, depth = weight.shape[:2]
        row_bytes = tile * self.plan.isa.width
        if depth * row_bytes <= block_bytes:
            return 1
        return max(1, min(-(-channels * row_bytes // (l2_bytes() // 4)), channels // 16))

    def _depthwise(self, operation: Operation, place: Place, out: Place, choice: Choice) -> _Row:
        _, bias = self._constants(operation)
        x, y, a = place.layout, out.layout, operation.attributes
        assert isinstance(x, Planes)
        assert isinstance(y, Planes)
        size = self._array(operation.weight).shape[2:]
        kh, kw = size if len(size) == 2 else (1, *size)
        (dy, dx), (py, px), (sy, sx) = a["dilation"], a["padding"], a["stride"]
        taps = tuple((row * dy - py, column * dx - px) for row in range(kh) for column in range(kw))
        by_rows = (sy, sx) != (1, 1)
        # Rows of whole vectors can be taken two at a time; short ones are not worth a loop of their own.
        is_long = y.pitch % y.lanes == 0 and y.row_vectors >= _LONG_ROW
        pairs = not by_rows and is_long and y.rows > 1 and depthwise.loads_taps(self.plan.isa)
        if not by_rows and not pairs:
            rows, vectors, masked, mask = 1, y.vectors, y.has_gaps and not y.tile, self._mask(y)
        else:
            rows, vectors = y.rows, y.row_vectors
            masked = vectors * y.lanes != y.columns and not y.tile
            inside = np.arange(vectors * y.lanes) < y.columns
            mask = self._mask_of(inside)
        kernel = depthwise.DepthwiseKernel(
            taps, sx, masked, a.get("activation"), _is_capped(operation), y.is_cut, pairs
        )
        common = self._by_channel(place, out) | self._bounds(operation)
        arguments = depthwise.ARGUMENTS.filled(
            weights=self.memory.put(weight_words(self._dense(operation), self.plan.isa)),
            bias=self.memory.put(weight_words(bias, self.plan.isa)),
            mask=mask,
            rows=rows,
            vectors=vectors,
            x_pitch=x.pitch_bytes,
            x_row=sy * x.pitch_bytes,
            out_row=4 * vectors if y.is_cut else y.pitch_bytes,
            places=self._places(y) if y.is_cut else 0,
            **common,
        )
        mine = bands.ByChannel(self.memory, depthwise.ARGUMENTS, arguments, x, y)
        # A kernel that reads nothing to the right of a pixel takes what is left of its first vector for padding.
        can = by_rows or depthwise.loads_taps(self.plan.isa) or any(column > 0 for _, column in taps)
        return _Row(
            self.code(kernel),
            arguments,
            common["jobs"],
            choice.label,
            (lambda _: mine.depthwise(taps, (sy, sx), vectors, by_rows, pairs=pairs)) if can else None,
            fills=not by_rows,
        )

    def _places(self, y: Planes) -> int:
        """Where each vector of a channel lies that lies in tiles: bytes from the first, (vectors,) int32."""
        key = ("places", y.vectors, y.tile, y.channels)
        if key not in self._tables:
            first = np.arange(y.vectors) * y.lanes
            self._tables[key] = self.memory.put((y.element(first) * y.element_bytes).astype(np.int32))
        return self._tables[key]

    def _mask(self, y: Planes) -> int:
        """All ones where the output has a pixel, zero in its gaps: (vectors * lanes,) integers as wide as a pixel."""
        key = ("mask", y.rows, y.columns, y.pitch)
        if key not in self._tables:
            inside = np.zeros(y.vectors * y.lanes, bool)
            at = np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)
            inside[at.reshape(-1)] = True
            self._tables[key] = self._mask_of(inside)
        return self._tables[key]

    def _edges(self, taps: Taps, y: Planes) -> tuple[int, NDArray[np.int64]]:
        """All ones where a tap of a pixel of `y` reads its own row, zero where it would reach another one: the tables of all distances, and where each tap's begins, in bytes.

        As long as what the taps of a row reach from each other, beside the pixels, since they share what is copied.
        """
        distances, which = np.unique(taps.column, return_inverse=True)
        n = y.vectors + -(-int(np.ptp(taps.shifts(y.pitch))) // y.lanes)
        key = ("edges", n, y.pitch, *distances.tolist())
        if key not in self._tables:
            reached = np.arange(n * y.lanes) % y.pitch + distances[:, None]
            self._tables[key] = self._mask_of((reached >= 0) & (reached < y.pitch))
        return self._tables[key], which.astype(np.int64) * n * y.vector_bytes

    def _mask_of(self, inside: NDArray[np.bool_]) -> int:
        return self.memory.put(-inside.astype(f"i{self.plan.isa.element_bytes}"))

    def _taps(self, x: Planes, y: Planes, taps: Sequence[tuple[int, int]], stride: tuple[int, int]) -> int:
        """For each tap (rows, columns) and output element, the element of the input plane; -1 where there is none.

        The table is (taps, vectors * lanes) int32.
        """
        key = (
            "taps",
            x.rows,
            x.columns,
            x.pitch,
            x.tile and (x.tile, x.channels),
            y.rows,
            y.columns,
            y.pitch,
            tuple(taps),
            stride,
        )
        if key not in self._tables:
            self._tables[key] = self.memory.put(self._tap_table(x, y, taps, stride))
        return self._tables[key]

    @staticmethod
    def _tap_table(
        x: Planes, y: Planes, taps: Sequence[tuple[int, int]], stride: tuple[int, int]
    ) -> NDArray[np.int32]:
        table = np.full((len(taps), y.vectors * y.lanes), -1, np.int32)
        at = (np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)).reshape(-1)
        for row, (dy, dx) in zip(table, taps, strict=True):
            iy = np.arange(y.rows)[:, None] * stride[0] + dy
            ix = np.arange(y.columns)[None, :] * stride[1] + dx
            inside = (iy >= 0) & (iy < x.rows) & (ix >= 0) & (ix < x.columns)
            row[at] = np.where(inside, x.element(iy * x.pitch + ix), -1).reshape(-1)
        return table

    # ---- linear layers on vectors

    def _vector_linear(self, operation: Operation, place: Place, out: Place, choice: Choice) -> _Row:
        weight, bias = self._constants(operation)
        m, f = len(weight), weight[0].size
        isa = self.plan.isa.single
        x, y, lanes = place.layout, out.layout, isa.lanes
        assert isinstance(x, Vectors)
        assert isinstance(y, Vectors)
        common = {
            "x": place.address, "x_image": x.image_bytes, "out": out.address, "out_image": y.image_bytes, "n_in": f, "n_out": m,
            **self._bounds(operation),
        }  # fmt: skip
        if choice.dense:
            n_vectors = -(-m // lanes)
            group = registers.linear_group(n_vectors, y.images, isa)
            jobs = -(-n_vectors // group)
            padded = np.zeros(jobs * group * lanes, np.float32)
            padded[:m] = bias
            weights = self.memory.put(
                self._once(operation, choice, lambda: linear_dense(self._dense(operation), group, lanes))
            )
            chunk = _chunk(jobs, y.images, self.plan.threads)
            arguments = linear.ARGUMENTS.filled(
                chunk=chunk, weights=weights, bias=self.memory.put(padded), **common
            )
            kernel = linear.LinearKernel(group)
            return _Row(self.code(kernel, isa), arguments, jobs, choice.label, images_per_job=chunk)
        starts, indices, values = self._once(
            operation, choice, lambda: linear_sparse(self._sparse(operation), lanes)
        )
        size = max(1, min(64, -(-m // (4 * self.plan.threads))))
        jobs = -(-m // size)
        chunk = _chunk(jobs, y.images, self.plan.threads)
        arguments = linear.ARGUMENTS.filled(
            chunk=chunk,
            rows_per_job=size,
            starts=self.memory.put(starts),
            indices=self.memory.put(indices),
            weights=self.memory.put(values),
            bias=self.memory.put(bias),
            **common,
        )
        kernel = linear.LinearKernel(0)
        return _Row(self.code(kernel, isa), arguments, jobs, choice.label, images_per_job=chunk)

    # ---- tokens

    def _layer_norm(self, operation: Operation, place: Place, out: Place) -> _Row:
        x, y, a = place.layout, out.layout, operation.attributes
        assert isinstance(x, Planes)
        assert isinstance(y, Planes)
        n = x.channels
        weight = np.ones(n, np.float32) if a["weight"] is None else self._array(a["weight"])
        bias = np.zeros(n, np.float32) if a["bias"] is None else self._array(a["bias"])
        fixed = max(x.tile, y.tile)
        tile = max(t for t in (1, 2, 3, 4) if fixed % t == 0) if fixed else min(4, y.vectors)
        jobs, per_tile = -(-y.vectors // tile), max(fixed // tile, 1)
        kernel = layer_norm.LayerNormKernel(tile, y.has_gaps)
        arguments = layer_norm.ARGUMENTS.filled(
            x=place.address,
            x_plane=x.plane_bytes,
            x_tile=x.tile_step(per_tile * tile),
            out=out.address,
            out_plane=y.plane_bytes,
            out_tile=y.tile_step(per_tile * tile),
            weight=self.memory.put(weight),
            bias=self.memory.put(bias),
            features=n,
            one_over_features=_bits(1 / n),
            epsilon=_bits(a["eps"]),
            tiles=jobs,
            per_tile=per_tile,
            back=y.vector_bytes * (jobs * tile - y.vectors),
            mask=self._mask(y),
            mask_tile=y.vector_bytes * per_tile * tile,
        )
        return _Row(self.code(kernel), arguments, jobs, "layer norm")

    def _attention(self, operation: Operation, places: list[Place], out: Place) -> _Row:
        a, isa, lanes = operation.attributes, self.plan.isa, self.plan.isa.lanes
        queries, keys = a["tokens"]
        heads = (*a["operands"], Heads(0, a["value_features"]))
        values: dict[str, int] = {}
        tokens = (queries, keys, keys, queries)
        for name, place, where, count in zip(
            ("q", "k", "v", "out"), (*places, out), heads, tokens, strict=True
        ):
            layout = place.layout
            assert isinstance(layout, Planes)
            values[name] = place.address + where.first * layout.plane_bytes
            values[f"{name}_image"] = layout.element_bytes * count
            values[f"{name}_head"] = where.step * layout.plane_bytes
            values[f"{name}_plane"] = layout.plane_bytes
        vectors = -(-queries // lanes)
        tile = min(range(1, min(4, vectors) + 1), key=lambda t: (-(-vectors // t) * (t + 1), -t))
        tiles = -(-vectors // tile)
        # It computes in float32: a vector of float16 fills two registers.
        rows = registers.dense_rows(tile * 4 // isa.element_bytes, isa, whole=True)
        kernel = attention.AttentionKernel(tile, min(8, rows), queries % lanes != 0)
        self.scratch_bytes = max(self.scratch_bytes, kernel.scratch_bytes(keys, lanes))
        arguments = attention.ARGUMENTS.filled(
            heads=a["heads"],
            tiles=tiles,
            queries=queries,
            keys=keys,
            features=a["features"],
            value_features=a["value_features"],
            last_tile=isa.width * (vectors - tile),
            scale=_bits(a["scale"]),
            **values,
        )
        return _Row(self.code(kernel), arguments, a["samples"] * a["heads"] * tiles, "attention")

    # ---- pooling and pointwise

    def _channel_jobs(self, channels: int) -> dict[str, int]:
        size = max(1, min(16, -(-channels // (2 * self.plan.threads))))
        return {"jobs": -(-channels // size), "channels": channels, "channels_per_job": size}

    def _by_channel(self, place: Place, out: Place) -> dict[str, int]:
        """What all kernels are told that go from planes to planes, or to one value each, channel by channel."""
        x, y = place.layout, out.layout
        assert isinstance(x, Planes)
        return {
            "x": place.address,
            "x_image": x.image_bytes,
            "x_plane": x.plane_bytes,
            "out": out.address,
            "out_image": y.image_bytes,
            "out_plane": y.plane_bytes if isinstance(y, Planes) else y.element_bytes,
            **self._channel_jobs(x.channels),
        }

    def _pool(self, operation: Operation, place: Place, out: Place) -> _Row:
        x, y = place.layout, out.layout
        assert isinstance(x, Planes)
        common = self._by_channel(place, out) | self._bounds(operation)
        if operation.kind == "plane_average":
            assert isinstance(y, Vectors)
            scale = self.memory.put(np.array([1.0 / (x.rows * x.columns)], np.float32))
            arguments = pool.ARGUMENTS.filled(
                vectors=x.vectors,
                mask=self._mask(x),
                scale=scale,
                **common,
            )
            # Who writes tiles may leave in their gaps what lay there before.
            average = pool.PoolKernel("plane", masked=bool(x.tile) and x.has_gaps)
            return _Row(self.code(average), arguments, common["jobs"], "pool")
        assert isinstance(y, Planes)
        if operation.kind == "adaptive_average":
            table, n_taps, scale = self._adaptive(x, y)
            arguments = pool.ARGUMENTS.filled(
                vectors=y.vectors,
                n_taps=n_taps,
                table=table,
                table_tap=4 * y.vectors * y.lanes,
                mask=self._mask(y),
                scale=scale,
                **common,
            )
            return _Row(self.code(pool.PoolKernel("average")), arguments, common["jobs"], "pool")
        return self._windows(operation, x, y, common)

    def _windows(self, operation: Operation, x: Planes, y: Planes, common: dict[str, int]) -> _Row:
        """A maximum or an average over windows; `common`: what all pools are told."""
        a = operation.attributes
        (kh, kw), (dy, dx), (py, px) = a["size"], a["dilation"], a["padding"]
        average = operation.kind == "average_pool"
        scale = _window_scale(x, y, a) if average else np.zeros(0, np.float32)
        if (dy, dx) == (1, 1) and a["stride"][1] <= window_pool.LARGEST_STRIDE:
            kernel = window_pool.WindowPoolKernel(
                average,
                (kh, kw),
                a["stride"],
                (py, px),
                x.rows,
                x.columns,
                x.pitch,
                y.rows,
                y.columns,
                y.pitch,
                y.vectors,
            )
            self.scratch_bytes = max(self.scratch_bytes, kernel.scratch_bytes(self.plan.isa))
            arguments = window_pool.ARGUMENTS.filled(
                scale=self.memory.put(np.append(scale, np.zeros(y.lanes, np.float32))),
                **common,
            )
            return _Row(self.code(kernel), arguments, common["jobs"], "pool")
        window = [(row * dy - py, column * dx - px) for row in range(kh) for column in range(kw)]
        arguments = pool.ARGUMENTS.filled(
            vectors=y.vectors,
            n_taps=len(window),
            table=self._taps(x, y, window, a["stride"]),
            table_tap=4 * y.vectors * y.lanes,
            mask=self._mask(y),
            scale=self.memory.put(scale) if average else 0,
            **common,
        )
        kind = "average" if average else "max"
        return _Row(self.code(pool.PoolKernel(kind)), arguments, common["jobs"], "pool")

    def _upsample(self, operation: Operation, place: Place, out: Place) -> _Row:
        x, y, (rows, columns) = place.layout, out.layout, operation.attributes["scale"]
        assert isinstance(x, Planes)
        assert isinstance(y, Planes)
        vectors, filled = -(-y.pitch // y.lanes), -(-y.columns // y.lanes)
        common = self._by_channel(place, out) | self._bounds(operation)
        arguments = upsample.ARGUMENTS.filled(
            x_row=x.pitch_bytes,
            out_row=y.pitch_bytes,
            rows=x.rows,
            scale=rows,
            filled=filled,
            vectors=vectors,
            last=(y.vectors - 1) * y.vector_bytes,
            mask=self._mask_of(np.arange(vectors * y.lanes) < y.columns),
            **common,
        )
        return _Row(self.code(upsample.UpsampleKernel(columns)), arguments, common["jobs"], "upsample")

    def _split(self, operation: Operation, place: Place, out: Place) -> _Row:
        x, y = place.layout, out.layout
        assert isinstance(x, Planes)
        assert isinstance(y, Planes)
        phases, stride = operation.attributes["phases"], operation.attributes["stride"]
        lanes = y.lanes
        common = self._by_channel(place, out) | {"n_phases": len(phases)}
        if place.cell is not None:
            common["x"] = address(place.cell)
        common["places"] = self._places(y) if y.is_cut else 0
        if stride[1] > split.LARGEST_SHUFFLED:
            kernel = split.SplitKernel(0, (), place.cell is not None, tiled=y.is_cut)
            table = self._taps(x, y, phases, stride)
            arguments = split.ARGUMENTS.filled(vectors=y.vectors, table=table, **common)
            mine = bands.ByChannel(self.memory, split.ARGUMENTS, arguments, x, y)

            def cut(_: int) -> Bands:
                return mine.gathered(self._tap_table(x, y, phases, stride), stride[0])

        else:
            rows, columns = (sorted({phase[axis] for phase in phases}) for axis in (0, 1))
            kernel = split.SplitKernel(stride[1], tuple(columns), place.cell is not None, x.tile, y.is_cut)
            self.scratch_bytes = max(self.scratch_bytes, kernel.scratch_bytes(x.vectors, self.plan.isa))
            source = np.arange(y.rows)[:, None] * stride[0] + np.array(rows)
            offsets = np.where(source < x.rows, source * x.pitch_bytes, -1).astype(np.int64)
            chunks = -(-y.columns // lanes)
            inside = np.arange(chunks * lanes) * stride[1] + np.array(columns)[:, None] < x.columns
            arguments = split.ARGUMENTS.filled(
                table=self.memory.put(offsets),
                rows=y.rows,
                row_phases=len(rows),
                pitch=4 * y.row_vectors if y.is_cut else y.pitch_bytes,
                chunks=chunks,
                mask=self._mask_of(inside),
                last_tile=x.vectors // x.tile if x.tile else 0,
                x_tile=x.tile_step(x.tile),
                **common,
            )
            mine = bands.ByChannel(self.memory, split.ARGUMENTS, arguments, x, y)

            def cut(_: int) -> Bands:
                return mine.shuffled(offsets, stride[0], chunks)

        return _Row(self.code(kernel), arguments, common["jobs"], "split", cut)

    def _pointwise(self, operation: Operation, places: list[Place], out: Place) -> _Row:
        layouts = [p.layout for p in (*places, out)]
        names = ["x", "other", "out"] if len(places) == 2 else ["x", "out"]
        values: dict[str, int] = {}
        a, y = operation.attributes, out.layout
        is_plane = isinstance(y, Planes)
        isa = self.plan.isa if is_plane else self.plan.isa.single
        for name, place, layout in zip(names, (*places, out), layouts, strict=True):
            values[name] = place.address
            values[f"{name}_image"] = layout.image_bytes
            # Where one value serves all pixels, the channels' values follow one another.
            values[f"{name}_plane"] = layout.plane_bytes if isinstance(layout, Planes) else 4 * is_plane
        if isinstance(y, Planes):
            # In tiles, all tensors alike: planes of a tile each.
            planes_per_channel = y.vectors // y.tile if y.tile else 1
            jobs = self._channel_jobs(y.channels * planes_per_channel)
            vectors = y.vectors // planes_per_channel
        else:
            jobs = {"jobs": 1, "channels": 1, "channels_per_job": 1}
            vectors = -(-y.features // isa.lanes)
        activation, moves_zero = a.get("activation"), False
        if operation.kind == "affine":
            n = y.channels if isinstance(y, Planes) else vectors * isa.lanes
            for name in ("scale", "shift"):
                constant = self.graph.constants[a[name]].numpy()
                table = np.full(n, constant[0] if len(constant) == 1 else 0, np.float32)
                if len(constant) > 1:
                    table[: len(constant)] = constant
                values[name] = self.memory.put(table)
                moves_zero |= name == "shift" and bool(constant.any())
        masked = (
            isinstance(y, Planes) and y.has_gaps and (moves_zero or (activation and activation.moves_zero))
        )
        if masked:
            assert isinstance(y, Planes)
            values["mask"] = self._mask(y)
        arguments = pointwise.ARGUMENTS.filled(vectors=vectors, **values, **jobs, **self._bounds(operation))
        kernel = pointwise.PointwiseKernel(
            operation.kind if len(places) == 2 else "",
            one_value="one_value" in a,
            affine=operation.kind == "affine",
            across=not is_plane,
            activation=activation,
            masked=bool(masked),
        )
        return _Row(self.code(kernel, isa), arguments, jobs["jobs"], operation.kind)

    # ---- moving

    def _concat(self, operation: Operation, places: list[Place], out: Place) -> _Row:
        """Copies the parts that do not lie where they belong already; for a slice none."""
        y, rows, first = out.layout, [], 0
        assert isinstance(y, Planes)
        for place in places if operation.kind == "concat" else []:
            x = place.layout
            assert isinstance(x, Planes)
            target = out.address + first * y.plane_bytes
            first += x.channels
            if place.address != target:
                rows += [
                    [place.address + c * x.plane_bytes, x.image_bytes, target + c * y.plane_bytes]
                    for c in range(x.channels)
                ]
        if not rows:
            kernel = copy_planes.CopyPlanesKernel()
            return _Row(self.code(kernel), copy_planes.ARGUMENTS.filled(), 0, "in place")
        jobs = self._channel_jobs(len(rows))
        arguments = copy_planes.ARGUMENTS.filled(
            out_image=y.image_bytes,
            vectors=y.vectors,
            table=self.memory.put(np.array(rows, np.int64)),
            **jobs,
        )
        return _Row(self.code(copy_planes.CopyPlanesKernel()), arguments, jobs["jobs"], "copy")

    def _flatten(self, place: Place, out: Place) -> _Row:
        x, y, lanes = place.layout, out.layout, self.plan.isa.lanes
        assert isinstance(x, Planes)
        assert isinstance(y, Vectors)
        vectors = -(-y.features // lanes)
        table = np.full(vectors * lanes, -1, np.int32)
        c, row, column = (np.arange(n) for n in (x.channels, x.rows, x.columns))
        where = c[:, None, None] * x.plane + row[:, None] * x.pitch + column
        table[: y.features] = where.reshape(-1)
        size = max(1, min(64, -(-vectors // (2 * self.plan.threads))))
        jobs = -(-vectors // size)
        arguments = flatten.ARGUMENTS.filled(
            x=place.address,
            x_image=x.image_bytes,
            out=out.address,
            out_image=y.image_bytes,
            jobs=jobs,
            vectors=vectors,
            vectors_per_job=size,
            table=self.memory.put(table),
        )
        return _Row(self.code(flatten.FlattenKernel()), arguments, jobs, "copy")

    def _adaptive(self, x: Planes, y: Planes) -> tuple[int, int, int]:
        """Index table, its taps and scale of an average over windows that cover the image, as evenly as they can (torch's rule)."""

        def windows(n_in: int, n_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            i = np.arange(n_out)
            return i * n_in // n_out, -(-(i + 1) * n_in // n_out)

        (top, bottom), (left, right) = windows(x.rows, y.rows), windows(x.columns, y.columns)
        taps = [(r, c) for r in range(int((bottom - top).max())) for c in range(int((right - left).max()))]
        at = (np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)).reshape(-1)
        table = np.full((len(taps), y.vectors * y.lanes), -1, np.int32)
        for row, (r, c) in zip(table, taps, strict=True):
            iy, ix = (top + r)[:, None], (left + c)[None, :]
            row[at] = np.where((iy < bottom[:, None]) & (ix < right), iy * x.pitch + ix, -1).reshape(-1)
        scale = np.zeros(y.vectors * y.lanes, np.float32)
        scale[at] = (1.0 / ((bottom - top)[:, None] * (right - left))).reshape(-1)
        return self.memory.put(table), len(taps), self.memory.put(scale)


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


def _is_capped(operation: Operation) -> bool:
    """Whether the result has a greatest value. A least one most have; the others share their kernels."""
    return bool(operation.attributes.get("high", _INFINITY) < _INFINITY)


def _planes(places: list[Place], out: Place) -> dict[str, Planes]:
    """The layouts of a convolution's input, its residual (when there is a second operand) and its output."""
    named = {}
    for name, place in zip((*("x", "residual")[: len(places)], "out"), (*places, out), strict=True):
        assert isinstance(place.layout, Planes)
        named[name] = place.layout
    return named


def _tensors(layouts: Mapping[str, Planes], places: list[Place], out: Place) -> dict[str, int]:
    """Addresses of the same, and bytes between their images and planes."""
    values = {name: place.address for name, place in zip(layouts, (*places, out), strict=True)}
    values |= {f"{name}_image": layout.image_bytes for name, layout in layouts.items()}
    # Where a convolution finds the planes of its input is in the offsets of its operands.
    return values | {f"{name}_plane": x.plane_bytes for name, x in layouts.items() if name != "x"}


def _window_scale(x: Planes, y: Planes, a: dict[str, Any]) -> NDArray[np.float32]:
    """One over the number of elements that each window averages, per output element."""
    (kh, kw), (sh, sw), (ph, pw) = a["size"], a["stride"], a["padding"]

    def counts(n_out: int, n_in: int, k: int, s: int, p: int) -> NDArray[np.int64]:
        start = np.arange(n_out) * s - p
        # With padding counted, a window is cut only where it leaves even the padded image.
        low, high = (-p, n_in + p) if a["count_padding"] else (0, n_in)
        return np.minimum(start + k, high) - np.maximum(start, low)

    n: Any = a["divisor"]
    if n is None:
        n = counts(y.rows, x.rows, kh, sh, ph)[:, None] * counts(y.columns, x.columns, kw, sw, pw)[None, :]
    scale = np.zeros(y.vectors * y.lanes, np.float32)
    at = np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)
    scale[at.reshape(-1)] = np.broadcast_to(1.0 / np.asarray(n), at.shape).reshape(-1)
    return scale


def _in_place(choice: Choice, weight: NDArray[np.float32]) -> bool:
    """Whether each operand is read where it lies, by one weight of an output channel."""
    return choice.reach == "direct" and weight[0, 0].size == 1


def _sparse_tile(y: Planes, weight: NDArray[np.float32], usual: int, block_bytes: int) -> int:
    """Vectors per tile of a sparse 1 x 1 convolution or linear layer.

    A smaller tile takes more of the channels into one K block, so that a row's sums are stored and loaded again less often; each nonzero then
    serves fewer pixels. In cycles, roughly: a nonzero costs its vectors and 0.8, a row of a block three times its vectors and 6.
    """
    channels, depth = weight.shape[:2]
    nonzeros = np.count_nonzero(weight != 0)

    def cost(tile: int) -> float:
        n_blocks = -(-depth * tile * y.vector_bytes // block_bytes)
        padding = (registers.unroll(tile) - 1) / 2
        rows = channels * n_blocks
        return ((nonzeros + rows * padding) * (tile + 0.8) + rows * (3 * tile + 6)) / tile

    # Only what divides the plane: a last tile that overlaps its neighbour would waste what is gained.
    smaller = [t for t in range(2, usual) if y.vectors % t == 0]
    best = min([usual, *smaller], key=cost)
    return best if cost(best) < _WORTH_SMALLER_TILES * cost(usual) else usual


def _dense_tile(y: Planes, usual: int) -> int:
    """Vectors per tile of a dense 1 x 1 convolution or linear layer between planes.

    Half of a large tile leaves registers for twice the output channels, and the L1 cache holds twice the input channels: 1.0 to 1.09 x on layers of 56 x 56
    and 28 x 28 pixels alone, 1.01 x on MobileNetV1 without zeros (Xeon, AVX-512). Where tiles of 7 fit, they are faster; planes of few tiles would read
    large weights once more.
    """
    is_large = usual == MAX_TILE and y.vectors >= 4 * MAX_TILE
    return usual // 2 if is_large and y.vectors % (usual // 2) == 0 else usual


_WORTH_SMALLER_TILES = 0.95


def _chunk(pieces: int, images: int, threads: int) -> int:
    """Images that a job of a linear layer on vectors takes: all, as long as its pieces are enough jobs for the threads."""
    return images if pieces >= 2 * threads else -(-images // (2 * threads))


def _parts(tiles: int, channels: int, threads: int, images: int) -> int:
    """Parts of the output channels: enough jobs for all threads at the smallest batch, and no more, since each part packs again."""
    if threads == 1 or tiles % threads == 0 or tiles >= 4 * threads:
        return 1
    return min(threads, max(1, channels // 16))


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
    builder = _StepBuilder(plan, graph, memory, packed, emitter)
    rows, fixed, counts, moves, table_bytes = [], [], [], [], []
    gaps: dict[int, int] = {}  # step -> arguments for zeroing gaps
    for step, index in enumerate(plan.native):
        before, operation = memory.n_bytes, graph.operations[index]
        row, out = builder.step(operation, choices.get(index, Choice(True))), plan.places[operation.output]
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
    builder: _StepBuilder,
    rows: Sequence[tuple[_Row, int]],
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
