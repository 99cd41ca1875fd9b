"""The steps of everything else: norms and attention over tokens, pooling, element by element, and what only moves values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference import bands
from explorer.inference.depth_first import Bands
from explorer.inference.graph import Operation
from explorer.inference.heads import Heads
from explorer.inference.kernels import (
    attention,
    copy_planes,
    flatten,
    layer_norm,
    pointwise,
    pool,
    rearrange,
    registers,
    split,
    upsample,
    window_pool,
)
from explorer.inference.layout import Planes, Vectors
from explorer.inference.memory import address
from explorer.inference.plan import Place
from explorer.inference.rearrange import Rearrangement
from explorer.inference.step_builder import Row, StepBuilder, bits


def norm_step(builder: StepBuilder, operation: Operation, place: Place, out: Place) -> Row:
    """Layer norm over tokens."""
    x, y, a = place.layout, out.layout, operation.attributes
    assert isinstance(x, Planes)
    assert isinstance(y, Planes)
    n = x.channels
    weight = np.ones(n, np.float32) if a["weight"] is None else builder.array(a["weight"])
    bias = np.zeros(n, np.float32) if a["bias"] is None else builder.array(a["bias"])
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
        weight=builder.memory.put(weight),
        bias=builder.memory.put(bias),
        features=n,
        one_over_features=bits(1 / n),
        epsilon=bits(a["eps"]),
        tiles=jobs,
        per_tile=per_tile,
        back=y.vector_bytes * (jobs * tile - y.vectors),
        mask=builder.mask(y),
        mask_tile=y.vector_bytes * per_tile * tile,
    )
    return Row(builder.code(kernel), arguments, jobs, "layer norm")


def attention_step(builder: StepBuilder, operation: Operation, places: list[Place], out: Place) -> Row:
    """Attention; the operands are heads in the channels of one place or several, and perhaps what is added to the scores."""
    a, isa, lanes = operation.attributes, builder.plan.isa, builder.plan.isa.lanes
    queries, keys = a["tokens"]
    heads = (*a["operands"], Heads(0, a["value_features"]))
    values: dict[str, int] = {}
    tokens = (queries, keys, keys, queries)
    q, k, v, *masks = places
    for name, place, where, count in zip(("q", "k", "v", "out"), (q, k, v, out), heads, tokens, strict=True):
        layout = place.layout
        assert isinstance(layout, Planes)
        values[name] = place.address + where.first * layout.plane_bytes
        values[f"{name}_image"] = layout.element_bytes * count
        values[f"{name}_head"] = where.step * layout.plane_bytes
        values[f"{name}_plane"] = layout.plane_bytes
    for mask in masks:  # one, or none
        assert isinstance(mask.layout, Planes)
        samples, n_heads = mask.layout.shape[:2]
        values |= {
            "added": mask.address,
            "added_image": 4 * n_heads * queries if samples > 1 else 0,
            "added_head": 4 * queries if n_heads > 1 else 0,
            "added_key": mask.layout.plane_bytes,
        }
    vectors = -(-queries // lanes)
    tile = min(range(1, min(4, vectors) + 1), key=lambda t: (-(-vectors // t) * (t + 1), -t))
    tiles = -(-vectors // tile)
    # It computes in float32: a vector of float16 fills two registers.
    rows = registers.dense_rows(tile * 4 // isa.element_bytes, isa, whole=True)
    kernel = attention.AttentionKernel(
        tile,
        min(8, rows),
        masked=queries % lanes != 0,
        added=bool(masks),
        none_is_zero=bool(masks) and a["none_is_zero"],
    )
    builder.scratch_bytes = max(builder.scratch_bytes, kernel.scratch_bytes(keys, lanes))
    arguments = attention.ARGUMENTS.filled(
        heads=a["heads"],
        tiles=tiles,
        queries=queries,
        keys=keys,
        features=a["features"],
        value_features=a["value_features"],
        last_tile=isa.width * (vectors - tile),
        scale=bits(a["scale"]),
        **values,
    )
    return Row(builder.code(kernel), arguments, a["samples"] * a["heads"] * tiles, "attention")


def pool_step(builder: StepBuilder, operation: Operation, place: Place, out: Place) -> Row:
    """A maximum or average: of whole planes, of windows, or of as many windows as are asked for."""
    x, y = place.layout, out.layout
    assert isinstance(x, Planes)
    common = builder.by_channel(place, out) | builder.bounds(operation)
    if operation.kind == "plane_average":
        assert isinstance(y, Vectors)
        scale = builder.memory.put(np.array([1.0 / (x.rows * x.columns)], np.float32))
        arguments = pool.ARGUMENTS.filled(
            vectors=x.vectors,
            mask=builder.mask(x),
            scale=scale,
            **common,
        )
        # Who writes tiles may leave in their gaps what lay there before.
        masked = x.has_neighbours or (bool(x.tile) and x.has_gaps)
        average = pool.PoolKernel("plane", masked=masked)
        return Row(builder.code(average), arguments, common["jobs"], "pool")
    assert isinstance(y, Planes)
    if operation.kind == "adaptive_average":
        table, n_taps, scale = _adaptive(builder, x, y)
        arguments = pool.ARGUMENTS.filled(
            vectors=y.vectors,
            n_taps=n_taps,
            table=table,
            table_tap=4 * y.vectors * y.lanes,
            mask=builder.mask(y),
            scale=scale,
            **common,
        )
        return Row(builder.code(pool.PoolKernel("average")), arguments, common["jobs"], "pool")
    return _window_pool_step(builder, operation, x, y, common)


def _window_pool_step(
    builder: StepBuilder, operation: Operation, x: Planes, y: Planes, common: dict[str, int]
) -> Row:
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
        builder.scratch_bytes = max(builder.scratch_bytes, kernel.scratch_bytes(builder.plan.isa))
        arguments = window_pool.ARGUMENTS.filled(
            scale=builder.memory.put(np.append(scale, np.zeros(y.lanes, np.float32))),
            **common,
        )
        return Row(builder.code(kernel), arguments, common["jobs"], "pool")
    window = [(row * dy - py, column * dx - px) for row in range(kh) for column in range(kw)]
    arguments = pool.ARGUMENTS.filled(
        vectors=y.vectors,
        n_taps=len(window),
        table=builder.tap_places(x, y, window, a["stride"]),
        table_tap=4 * y.vectors * y.lanes,
        mask=builder.mask(y),
        scale=builder.memory.put(scale) if average else 0,
        **common,
    )
    kind = "average" if average else "max"
    return Row(builder.code(pool.PoolKernel(kind)), arguments, common["jobs"], "pool")


def upsample_step(builder: StepBuilder, operation: Operation, place: Place, out: Place) -> Row:
    """Nearest-neighbour upsampling."""
    x, y, (rows, columns) = place.layout, out.layout, operation.attributes["scale"]
    assert isinstance(x, Planes)
    assert isinstance(y, Planes)
    vectors, filled = -(-y.pitch // y.lanes), -(-y.columns // y.lanes)
    common = builder.by_channel(place, out) | builder.bounds(operation)
    arguments = upsample.ARGUMENTS.filled(
        x_row=x.pitch_bytes,
        out_row=y.pitch_bytes,
        rows=x.rows,
        row_scale=rows,
        filled=filled,
        vectors=vectors,
        last=(y.vectors - 1) * y.vector_bytes,
        mask=builder.mask_of(np.arange(vectors * y.lanes) < y.columns),
        **common,
    )
    return Row(builder.code(upsample.UpsampleKernel(columns)), arguments, common["jobs"], "upsample")


def split_step(builder: StepBuilder, operation: Operation, place: Place, out: Place) -> Row:
    """The phases of an image, each a channel of its own, for who strides over it."""
    x, y = place.layout, out.layout
    assert isinstance(x, Planes)
    assert isinstance(y, Planes)
    phases, stride = operation.attributes["phases"], operation.attributes["stride"]
    lanes = y.lanes
    common = builder.by_channel(place, out) | {"n_phases": len(phases)}
    if place.cell is not None:
        common |= {"x": address(place.cell), "skipped": place.skipped}
    common["places"] = builder.places(y) if y.is_cut else 0
    if stride[1] > registers.LARGEST_SHUFFLED:
        assert y.abreast == 1
        kernel = split.SplitKernel(0, (), place.cell is not None, tiled=y.is_cut)
        table = builder.tap_places(x, y, phases, stride)
        arguments = split.ARGUMENTS.filled(vectors=y.vectors, table=table, **common)
        mine = bands.ByChannel(builder.memory, split.ARGUMENTS, arguments, x, y)

        def cut(pieces: int) -> Bands:
            table = builder.tap_table(x, y, phases, stride)
            return replace(mine, pieces=pieces).gathered(table, stride[0])

    else:
        rows, columns = (sorted({phase[axis] for phase in phases}) for axis in (0, 1))
        tail = builder.tail(y, -(-y.columns // lanes))
        kernel = split.SplitKernel(
            stride[1],
            tuple(columns),
            place.cell is not None,
            x.tile,
            y.is_cut,
            y.abreast,
            wide=x.element_bytes > y.element_bytes,
            tail=tail,
        )
        builder.scratch_bytes = max(builder.scratch_bytes, kernel.scratch_bytes(x.vectors, builder.plan.isa))
        source = np.arange(y.rows)[:, None] * stride[0] + np.array(rows)
        offsets = np.where(source < x.rows, source * x.pitch_bytes, -1).astype(np.int64)
        chunks = -(-y.columns // lanes)
        lane = np.arange(chunks * lanes)
        if y.abreast > 1:
            lane %= y.slot
            common |= {"x_image": y.abreast * x.image_bytes, "x_next": x.image_bytes}
        inside = lane * stride[1] + np.array(columns)[:, None] < x.columns
        arguments = split.ARGUMENTS.filled(
            table=builder.memory.put(offsets),
            rows=y.rows,
            row_phases=len(rows),
            pitch=4 * y.row_vectors if y.is_cut else y.pitch_bytes,
            chunks=chunks,
            mask=builder.mask_of(inside),
            last_tile=x.vectors // x.tile if x.tile else 0,
            x_tile=x.tile_step(x.tile),
            x_columns=x.columns,
            **common,
        )
        mine = bands.ByChannel(builder.memory, split.ARGUMENTS, arguments, x, y, tail=tail)

        def cut(pieces: int) -> Bands:
            return replace(mine, pieces=pieces).shuffled(offsets, stride[0], chunks)

    return Row(builder.code(kernel), arguments, common["jobs"], "split", lambda _: cut(0), cut)


def pointwise_step(builder: StepBuilder, operation: Operation, places: list[Place], out: Place) -> Row:
    """What is computed element by element."""
    layouts = [p.layout for p in (*places, out)]
    names = ["x", "other", "out"] if len(places) == 2 else ["x", "out"]
    values: dict[str, int] = {}
    a, y = operation.attributes, out.layout
    is_plane = isinstance(y, Planes)
    isa = builder.plan.isa if is_plane else builder.plan.isa.single
    for name, place, layout in zip(names, (*places, out), layouts, strict=True):
        values[name] = place.address
        values[f"{name}_image"] = layout.image_bytes
        # Where one value serves all pixels, the channels' values follow one another.
        values[f"{name}_plane"] = layout.plane_bytes if isinstance(layout, Planes) else 4 * is_plane
    if isinstance(y, Planes):
        # In tiles, all tensors alike: planes of a tile each.
        planes_per_channel = y.vectors // y.tile if y.tile else 1
        jobs = builder.channel_jobs(y.channels * planes_per_channel)
        vectors = y.vectors // planes_per_channel
    else:
        jobs = {"jobs": 1, "channels": 1, "channels_per_job": 1}
        vectors = -(-y.features // isa.lanes)
    activation, moves_zero = a.get("activation"), False
    if operation.kind == "affine":
        n = y.channels if isinstance(y, Planes) else vectors * isa.lanes
        for name in ("scale", "shift"):
            constant = builder.graph.constants[a[name]].numpy()
            table = np.full(n, constant[0] if len(constant) == 1 else 0, np.float32)
            if len(constant) > 1:
                table[: len(constant)] = constant
            values[name] = builder.memory.put(table)
            moves_zero |= name == "shift" and bool(constant.any())
    masked = isinstance(y, Planes) and y.has_gaps and (moves_zero or (activation and activation.moves_zero))
    if masked:
        assert isinstance(y, Planes)
        values["mask"] = builder.mask(y)
    arguments = pointwise.ARGUMENTS.filled(vectors=vectors, **values, **jobs, **builder.bounds(operation))
    kernel = pointwise.PointwiseKernel(
        operation.kind if len(places) == 2 else "",
        one_value="one_value" in a,
        affine=operation.kind == "affine",
        across=not is_plane,
        activation=activation,
        masked=bool(masked),
    )
    return Row(builder.code(kernel, isa), arguments, jobs["jobs"], operation.kind)


def concat_step(builder: StepBuilder, operation: Operation, places: list[Place], out: Place) -> Row:
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
        return Row(builder.code(kernel), copy_planes.ARGUMENTS.filled(), 0, "in place")
    jobs = builder.channel_jobs(len(rows))
    arguments = copy_planes.ARGUMENTS.filled(
        out_image=y.image_bytes,
        vectors=y.vectors,
        table=builder.memory.put(np.array(rows, np.int64)),
        **jobs,
    )
    return Row(builder.code(copy_planes.CopyPlanesKernel()), arguments, jobs["jobs"], "copy")


def flatten_step(builder: StepBuilder, place: Place, out: Place) -> Row:
    """Planes as vectors."""
    x = place.layout
    assert isinstance(x, Planes)
    c, row, column = (np.arange(n) for n in (x.channels, x.rows, x.columns))
    where = c[:, None, None] * x.plane + row[:, None] * x.pitch + column
    return _gathered(builder, place, out, where.reshape(-1), x.image_bytes)


def token_step(builder: StepBuilder, operation: Operation, place: Place, out: Place) -> Row:
    """One token of each sample as a vector."""
    x = place.layout
    assert isinstance(x, Planes)
    where = np.arange(x.channels) * x.plane + operation.attributes["index"]
    return _gathered(builder, place, out, where, x.element_bytes * x.shape[1])


def _gathered(
    builder: StepBuilder, place: Place, out: Place, where: NDArray[np.int64], step_bytes: int
) -> Row:
    """Vectors of these elements of planes, from sample to sample so many bytes further."""
    y, lanes = out.layout, builder.plan.isa.lanes
    assert isinstance(y, Vectors)
    vectors = -(-y.features // lanes)
    table = np.full(vectors * lanes, -1, np.int32)
    table[: y.features] = where
    size = max(1, min(64, -(-vectors // (2 * builder.plan.threads))))
    jobs = -(-vectors // size)
    arguments = flatten.ARGUMENTS.filled(
        x=place.address,
        x_image=step_bytes,
        out=out.address,
        out_image=y.image_bytes,
        jobs=jobs,
        vectors=vectors,
        vectors_per_job=size,
        table=builder.memory.put(table),
    )
    return Row(builder.code(flatten.FlattenKernel()), arguments, jobs, "copy")


def rearrange_step(builder: StepBuilder, operation: Operation, place: Place, out: Place) -> Row:
    """Pixels as tokens, or tokens as pixels."""
    x, y, added = place.layout, out.layout, operation.attributes["added"]
    assert isinstance(x, Planes)
    assert isinstance(y, Planes)
    moved = Rearrangement.of(operation.attributes["pixels"], x, y)
    more: dict[str, int] = {}
    if added is not None:
        tokens, _ = added.shape
        numbers = np.full(y.vectors * y.lanes, -1, np.int32)
        numbers[y.inside.reshape(-1)] = np.arange(y.columns) % tokens
        values = builder.fitting(operation, np.ascontiguousarray(added.T)).astype(builder.plan.isa.dtype)
        # Of float16, the element after one that is gathered is read as well.
        more = {
            "added": builder.memory.put(np.append(values.reshape(-1), np.zeros(2, values.dtype))),
            "added_plane": values.strides[0],
            "added_table": builder.memory.put(numbers),
        }
    arguments = rearrange.ARGUMENTS.filled(
        vectors=y.vectors,
        table=builder.memory.put(moved.table),
        starts=builder.memory.put(moved.starts),
        **builder.by_channel(place, out),
        **more,
    )
    kernel = rearrange.RearrangeKernel(added is not None)
    return Row(builder.code(kernel), arguments, builder.channel_jobs(x.channels)["jobs"], "copy", fills=True)


def _adaptive(builder: StepBuilder, x: Planes, y: Planes) -> tuple[int, int, int]:
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
    return builder.memory.put(table), len(taps), builder.memory.put(scale)


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
