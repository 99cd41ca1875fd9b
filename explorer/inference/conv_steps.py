"""The steps of layers with weights to skip: convolutions in all their ways, linear layers over tokens and on vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference import bands
from explorer.inference.depth_first import Bands
from explorer.inference.graph import Operation
from explorer.inference.kernels import (
    conv,
    conv_channels,
    conv_tables,
    depthwise,
    linear,
    linear_images,
    registers,
    winograd,
)
from explorer.inference.layout import MAX_TILE, Planes, Vectors, channel_columns, channel_tile, tile_of
from explorer.inference.native import l1_bytes, l2_bytes
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
from explorer.inference.plan import Choice, Place
from explorer.inference.sparse_code import Finish
from explorer.inference.step_builder import Row, StepBuilder, is_capped
from explorer.inference.taps import Taps
from explorer.inference.winograd import ROWS, Chunks, Filter

_SUMS_BYTES = 128 << 10
"""Sums that one job of a convolution with channels in the lanes keeps between K blocks."""

_DENSE_DEPTH = 72
"""Operands that a K block of the dense kernel holds at least, if the L1 cache can."""

_LONG_ROW = 4
"""Vectors of a row that depthwise layers take with another (MobileNetV1 on Zen 3: 112 x 112 pixels 0.84 of the time, 14 x 14 0.97, 7 x 7 1.15)."""

_WORTH_SMALLER_TILES = 0.95


def conv_step(
    builder: StepBuilder, operation: Operation, places: list[Place], out: Place, choice: Choice
) -> Row:
    """A convolution over planes, or a linear layer over tokens."""
    weight, bias = builder.constants(operation)
    x, y = places[0].layout, out.layout
    assert isinstance(x, Planes)
    assert isinstance(y, Planes)
    a = operation.attributes
    weight = weight.reshape(*weight.shape[:2], *[1] * (4 - weight.ndim), *weight.shape[2:])
    m, _, *size = weight.shape
    where = Taps.of(a, tuple(size))
    if choice.reach == "winograd":
        return _winograd_step(builder, operation, places, out, where, choice)
    shifts, planes = where.shifts(x.pitch), where.planes(x.channels // where.phases)
    if choice.reach == "channels":
        return _conv_channels_step(builder, operation, places, out, planes * x.plane + shifts, shifts, choice)
    layouts, groups = _planes(places, out), a.get("groups", 1)
    kernel, tiles, parts = _conv_kernel(builder, layouts, weight, choice, groups)
    kernel = replace(
        kernel,
        activation=a.get("activation"),
        capped=is_capped(operation),
        code=choice.code,
        partners=not (choice.dense or choice.pairs or choice.code)
        and registers.has_partners(kernel.tile, builder.plan.isa),
    )
    edges, masks = 0, None
    if where.reach_over(x.columns, y.columns, x.pitch):
        assert choice.reach == "shift"
        kernel = replace(kernel, masked=True)
        edges, masks = _edges(builder, where, y)
    reach = operands(planes, shifts, x.plane, choice.reach, kernel.tile, builder.plan.isa, masks)
    if groups > 1 and not choice.dense and parts == groups:
        # As many groups at once as fill a K block, and no fewer parts than there are threads.
        fewest = min(groups, builder.plan.threads if tiles < builder.plan.threads else 1)
        parts = min(groups, max(fewest, -(-int(reach.n_bytes.sum()) // builder.block_bytes)))

    words = partial(weight_words, isa=builder.plan.isa)

    def pack() -> PackedConv:
        if choice.dense:
            size = _dense_block_bytes(kernel.tile * builder.plan.isa.width, builder.block_bytes)
            return conv_dense(builder.dense_weight(operation), reach, kernel, parts, size, words, groups)
        weights = builder.sparse_weights(operation, kernel.channels)
        if choice.code:
            mask = bool(y.has_gaps and not y.tile)
            finish = Finish(len(places) > 1, a.get("low", -math.inf) > -math.inf, is_capped(operation), mask)
            size = _k_block(builder, choice, weight)
            return conv_code(weights, bias, reach, kernel, finish, parts, size, builder.plan.isa, groups)
        return conv_sparse(
            weights, reach, kernel, parts, builder.block_bytes, words, builder.plan.isa, groups
        )

    packed = builder.once(operation, choice, pack)
    kernel = replace(kernel, short=packed.short)
    builder.scratch_bytes = max(builder.scratch_bytes, kernel.scratch_bytes(m, builder.plan.isa))
    arguments = conv_tables.ARGUMENTS.filled(
        **_tensors(layouts, places, out),
        **{f"{name}_tile": layout.tile_step(kernel.tile) for name, layout in layouts.items()},
        bias=builder.memory.put(words(bias)),
        tiles=tiles,
        parts=parts,
        back=0 if choice.reach == "compact" else y.vector_bytes * (tiles * kernel.tile - y.vectors),
        mask=builder.mask(y) if y.has_gaps and not y.tile else 0,  # of tiles, nobody counts the gaps
        edges=edges,
        blocks=builder.placed(operation, packed),
        n_blocks=packed.n_blocks,
        **builder.bounds(operation),
    )
    return Row(
        builder.code(kernel),
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


def _conv_channels_step(
    builder: StepBuilder,
    operation: Operation,
    places: list[Place],
    out: Place,
    operands: NDArray[np.int64],
    shifts: NDArray[np.int64],
    choice: Choice,
) -> Row:
    """A dense convolution with output channels in the lanes; `operands`, (C, taps): elements from a pixel to what each weight reads."""
    weight, bias = builder.constants(operation)
    m, isa, y = len(weight), builder.plan.isa, out.layout
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
        is_capped(operation),
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
    parts = _parts(chunks, m, builder.plan.threads, y.images)
    groups_per_job = -(-groups // parts)
    packed = builder.once(
        operation,
        choice,
        lambda: conv_channels_dense(
            builder.dense_weight(operation).astype(isa.dtype),
            operands.reshape(-1) * isa.element_bytes,
            width,
            l1_bytes() // 2,
        ),
    )
    padded = np.zeros(groups * width, isa.dtype)
    padded[:m] = bias
    builder.scratch_bytes = max(
        builder.scratch_bytes,
        kernel.turned_bytes(isa) + groups_per_job * tiles_per_job * kernel.sums_bytes(isa),
    )
    arguments = conv_channels.ARGUMENTS.filled(
        **_tensors(layouts, places, out),
        bias=builder.memory.put(padded),
        **{
            f"{name}_at": builder.memory.put(
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
        blocks=builder.placed(operation, packed),
        n_blocks=packed.n_blocks,
        **builder.bounds(operation),
    )
    cut = partial(bands.of_chunks, positions, pixels, tiles_per_job, parts, shifts, len(places) > 1)
    return Row(builder.code(kernel), arguments, chunks * parts, choice.label, cut)


def _winograd_step(
    builder: StepBuilder, operation: Operation, places: list[Place], out: Place, taps: Taps, choice: Choice
) -> Row:
    """A dense convolution by `kernels.winograd`."""
    weight, bias = builder.constants(operation)
    m, isa, layouts = len(weight), builder.plan.isa, _planes(places, out)
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
        is_capped(operation),
    )
    tiles = -(-y.rows // ROWS) * len(chunks.first)
    parts = _parts(tiles, m, builder.plan.threads, y.images)
    sums_bytes = kernel.points * kernel.channel_bytes(isa)
    # The sums of a piece fill most of the L1 cache, beside which weights stream.
    pieces = -(-m // max(rows, min(-(-m // parts), l1_bytes() * 3 // 4 // sums_bytes)))
    piece = -(-m // pieces // rows) * rows
    pieces = -(-m // piece)
    per_part = -(-pieces // parts)
    parts = -(-pieces // per_part)
    plane_bytes, channels = kernel.plane_bytes(isa), x.channels // taps.phases
    filters = builder.dense_weight(operation).reshape(m, channels, -1)
    packed = builder.once(
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
    builder.scratch_bytes = max(builder.scratch_bytes, sums + kept * piece * sums_bytes)
    places_of_vectors = chunks.places(y) if y.is_cut else np.zeros((0, 0), np.int64)
    tensors = {n: v for n, v in _tensors(layouts, places, out).items() if n != "x"}
    arguments = winograd.ARGUMENTS.filled(
        **tensors,
        x=places[0].address + start,
        x_pitch=x.pitch_bytes,
        x_rows=min(x.rows, y.rows + form.top + form.rows - 1),
        top=form.top,
        out_pitch=places_of_vectors.strides[0] if y.is_cut else y.pitch_bytes,
        places=builder.memory.put(places_of_vectors) if y.is_cut else 0,
        rows=y.rows,
        bias=builder.memory.put(bias),
        chunks=len(chunks.first),
        starts=builder.memory.put(chunks.first * y.element_bytes),
        tiles=tiles,
        parts=parts,
        pieces_per_part=per_part,
        pieces=pieces,
        piece=piece,
        channels=m,
        zeros=builder.memory.put(np.zeros(max(plane_bytes // 4, piece), np.float32)),
        step=step,
        sums=sums,
        piece_bytes=piece * sums_bytes if packed.n_blocks > 1 else 0,
        blocks=builder.placed(operation, packed),
        n_blocks=packed.n_blocks,
        weights=builder.shared(("filters", operation.output), lambda: builder.memory.put(filters)),
        reads=builder.memory.put(reads),
        n_reads=len(reads),
        **builder.bounds(operation),
    )
    cut = partial(bands.of_rows, y, ROWS, tiles, parts, taps.shifts(x.pitch), len(places) > 1)
    return Row(builder.code(kernel), arguments, tiles * parts, choice.label, cut)


def _conv_kernel(
    builder: StepBuilder,
    layouts: Mapping[str, Planes],
    weight: NDArray[np.float32],
    choice: Choice,
    groups: int = 1,
) -> tuple[conv.ConvKernel, int, int]:
    """The kernel for these tensors (see `planes_of`), and into how many tiles and parts of the channels its work is cut: at least one part for each group."""
    compact: dict[str, Any] = {}
    y, channels = layouts["out"], len(weight) // groups
    fixed = max(layout.tile for layout in layouts.values())
    assert all(layout.tile in (0, fixed) for layout in layouts.values())
    tile = fixed or tile_of(y.vectors)
    in_place = _in_place(choice, weight)
    if not fixed and in_place and not choice.code:
        tile = _dense_tile(y, tile) if choice.dense else _sparse_tile(y, weight, tile, builder.block_bytes)
    tiles = -(-y.vectors // tile)
    if choice.reach == "compact":
        tile, tiles = y.compact_vectors, 1
        compact = {"columns": y.columns, "pitch": y.pitch, "plane": y.vectors}
    whole = choice.reach == "compact"
    rows = min(registers.dense_rows(tile, builder.plan.isa, whole=whole), channels) if choice.dense else 0
    kernel = conv.ConvKernel(
        tile,
        rows,
        channels % rows if rows else 0,
        pairs=choice.pairs,
        **compact,
    )
    parts = _parts(tiles * groups, channels, builder.plan.threads, y.images)
    if in_place and groups == 1:
        parts = max(parts, _parts_by_sums(builder, weight, tile, _k_block(builder, choice, weight)))
    return kernel, tiles, groups * parts


def _k_block(builder: StepBuilder, choice: Choice, weight: NDArray[np.float32]) -> int:
    """Bytes of the operands of a K block of a sparse kernel.

    Programs go through them vector by vector, so that the L1 cache need not hold them all, and store the sums of all vectors once for each block: in place
    they are better off with operands in the L2 cache. (1 x 1 layers of ResNet-50 at 90 % on Zen 4, 1 MiB: with 128 KiB 0.80 to 0.90 of the time of 64. With
    256 KiB the 14 x 14 layers of MobileNetV1 take 0.96 of that, a shortcut of ResNet-50 0.86, others the same; with 512 KiB loops won for half of ResNet-50's layers.)
    3 x 3 layers read each operand for every tap: with 256 KiB they would take 1.02 to 1.4 of the time.
    """
    return l2_bytes() // 4 if choice.code and _in_place(choice, weight) else builder.block_bytes


def _parts_by_sums(builder: StepBuilder, weight: NDArray[np.float32], tile: int, block_bytes: int) -> int:
    """Parts of the output channels of a 1 x 1 convolution or linear layer whose sums stay in the L2 cache from one K block to the next.

    Others would copy their operands again for each part. (BERT at 90 % on Zen 3: 0.87 of the time, its 3072 features have 768 KiB of sums; ResNet-50 1.00;
    1/16 to 1/4 of the cache are alike, half of it is slower.)
    """
    channels, depth = weight.shape[:2]
    row_bytes = tile * builder.plan.isa.width
    if depth * row_bytes <= block_bytes:
        return 1
    return max(1, min(-(-channels * row_bytes // (l2_bytes() // 4)), channels // 16))


def _edges(builder: StepBuilder, taps: Taps, y: Planes) -> tuple[int, NDArray[np.int64]]:
    """All ones where a tap of a pixel of `y` reads its own row, zero where it would reach another one: the tables of all distances, and where each tap's begins, in bytes.

    As long as what the taps of a row reach from each other, beside the pixels, since they share what is copied.
    """
    distances, which = np.unique(taps.column, return_inverse=True)
    n = y.vectors + -(-int(np.ptp(taps.shifts(y.pitch))) // y.lanes)
    key = ("edges", n, y.pitch, *distances.tolist())
    if key not in builder.tables:
        reached = np.arange(n * y.lanes) % y.pitch + distances[:, None]
        builder.tables[key] = builder.mask_of((reached >= 0) & (reached < y.pitch))
    return builder.tables[key], which.astype(np.int64) * n * y.vector_bytes


def depthwise_step(
    builder: StepBuilder, operation: Operation, place: Place, out: Place, choice: Choice
) -> Row:
    """A convolution that filters each channel on its own."""
    _, bias = builder.constants(operation)
    x, y, a = place.layout, out.layout, operation.attributes
    assert isinstance(x, Planes)
    assert isinstance(y, Planes)
    size = builder.array(operation.weight).shape[2:]
    kh, kw = size if len(size) == 2 else (1, *size)
    (dy, dx), (py, px), (sy, sx) = a["dilation"], a["padding"], a["stride"]
    taps = tuple((row * dy - py, column * dx - px) for row in range(kh) for column in range(kw))
    by_rows = (sy, sx) != (1, 1)
    # Rows of whole vectors can be taken two at a time; short ones are not worth a loop of their own.
    is_long = y.pitch % y.lanes == 0 and y.row_vectors >= _LONG_ROW
    pairs = not by_rows and is_long and y.rows > 1 and depthwise.loads_taps(builder.plan.isa)
    if not by_rows and not pairs:
        rows, vectors, masked, mask = 1, y.vectors, y.has_gaps and not y.tile, builder.mask(y)
    else:
        rows, vectors = y.rows, y.row_vectors
        masked = vectors * y.lanes != y.columns and not y.tile
        inside = np.arange(vectors * y.lanes) < y.columns
        mask = builder.mask_of(inside)
    tail = builder.tail(y, vectors) if rows > 1 else 0
    kernel = depthwise.DepthwiseKernel(
        taps, sx, masked, a.get("activation"), is_capped(operation), y.is_cut, pairs, tail
    )
    common = builder.by_channel(place, out) | builder.bounds(operation)
    arguments = depthwise.ARGUMENTS.filled(
        weights=builder.memory.put(weight_words(builder.dense_weight(operation), builder.plan.isa)),
        bias=builder.memory.put(weight_words(bias, builder.plan.isa)),
        mask=mask,
        rows=rows,
        vectors=vectors,
        x_pitch=x.pitch_bytes,
        x_row=sy * x.pitch_bytes,
        out_row=4 * vectors if y.is_cut else y.pitch_bytes,
        places=builder.places(y) if y.is_cut else 0,
        **common,
    )
    mine = bands.ByChannel(builder.memory, depthwise.ARGUMENTS, arguments, x, y, tail=tail)
    # A kernel that reads nothing to the right of a pixel takes what is left of its first vector for padding.
    can = by_rows or depthwise.loads_taps(builder.plan.isa) or any(column > 0 for _, column in taps)

    def cut(pieces: int) -> Bands:
        return replace(mine, pieces=pieces).depthwise(taps, (sy, sx), vectors, by_rows, pairs=pairs)

    return Row(
        builder.code(kernel),
        arguments,
        common["jobs"],
        choice.label,
        (lambda _: cut(0)) if can else None,
        cut if can else None,
        fills=not by_rows,
    )


def linear_step(builder: StepBuilder, operation: Operation, place: Place, out: Place, choice: Choice) -> Row:
    """A linear layer, or a convolution of one pixel, on vectors."""
    weight, bias = builder.constants(operation)
    m, f = len(weight), weight[0].size
    isa = builder.plan.isa.single
    x, y, lanes = place.layout, out.layout, isa.lanes
    assert isinstance(x, Vectors)
    assert isinstance(y, Vectors)
    common = {
        "x": place.address, "x_image": x.image_bytes, "out": out.address, "out_image": y.image_bytes, "n_in": f, "n_out": m,
        **builder.bounds(operation),
    }  # fmt: skip
    if choice.dense:
        n_vectors = -(-m // lanes)
        group = registers.linear_group(n_vectors, y.images, isa)
        jobs = -(-n_vectors // group)
        padded = np.zeros(jobs * group * lanes, np.float32)
        padded[:m] = bias
        weights = builder.memory.put(
            builder.once(
                operation, choice, lambda: linear_dense(builder.dense_weight(operation), group, lanes)
            )
        )
        chunk = _chunk(jobs, y.images, builder.plan.threads)
        arguments = linear.ARGUMENTS.filled(
            chunk=chunk, weights=weights, bias=builder.memory.put(padded), **common
        )
        kernel = linear.LinearKernel(group)
        return Row(builder.code(kernel, isa), arguments, jobs, choice.label, images_per_job=chunk)
    starts, indices, values = builder.once(
        operation, choice, lambda: linear_sparse(builder.sparse_weights(operation), lanes)
    )
    many = linear_images.LinearImagesKernel()
    n_bytes = many.scratch_bytes(f, isa)
    if y.images >= lanes // 2 and n_bytes <= l2_bytes() // 2:
        # Whole vectors of outputs, a few jobs: each turns all inputs.
        size = -(-m // (2 * builder.plan.threads * lanes)) * lanes
        room = -(-m // lanes) * lanes
        builder.scratch_bytes = max(builder.scratch_bytes, n_bytes)
        arguments = linear.ARGUMENTS.filled(
            chunk=lanes,
            rows_per_job=size,
            starts=builder.memory.put(np.append(starts, np.full(room - m, starts[-1], np.int32))),
            indices=builder.memory.put(indices),
            weights=builder.memory.put(values),
            bias=builder.memory.put(np.append(bias, np.zeros(room - m, np.float32))),
            **common,
        )
        return Row(builder.code(many, isa), arguments, -(-m // size), choice.label, images_per_job=lanes)
    size = max(1, min(64, -(-m // (4 * builder.plan.threads))))
    jobs = -(-m // size)
    chunk = _chunk(jobs, y.images, builder.plan.threads)
    arguments = linear.ARGUMENTS.filled(
        chunk=chunk,
        rows_per_job=size,
        starts=builder.memory.put(starts),
        indices=builder.memory.put(indices),
        weights=builder.memory.put(values),
        bias=builder.memory.put(bias),
        **common,
    )
    kernel = linear.LinearKernel(0)
    return Row(builder.code(kernel, isa), arguments, jobs, choice.label, images_per_job=chunk)


def _dense_block_bytes(row_bytes: int, sparse: int) -> int:
    """The same for the dense kernel, which needs no long rows, and goes round its operands again and again: they must not push each other out of the L1 cache.

    With vectors of 8 (Zen 3) ResNet-50 takes 0.92, BERT 0.92 of the time of blocks of 33 KiB; 16 to 24 KiB are alike. Tiles of many bytes keep the longer
    blocks, or their sums would be stored and loaded too often.
    """
    return min(sparse, max(l1_bytes() * 5 // 8, _DENSE_DEPTH * row_bytes))


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


def _chunk(pieces: int, images: int, threads: int) -> int:
    """Images that a job of a linear layer on vectors takes: all, as long as its pieces are enough jobs for the threads."""
    return images if pieces >= 2 * threads else -(-images // (2 * threads))


def _parts(tiles: int, channels: int, threads: int, images: int) -> int:
    """Parts of the output channels: enough jobs for all threads at the smallest batch, and no more, since each part packs again."""
    if threads == 1 or tiles % threads == 0 or tiles >= 4 * threads:
        return 1
    return min(threads, max(1, channels // 16))


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
