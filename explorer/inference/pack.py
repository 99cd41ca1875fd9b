"""Weights, packed the way the kernels read them. Nothing here knows buffers or addresses, except offsets within one image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference.kernels import conv, conv_channels, conv_tables
from explorer.inference.kernels.builder import Record
from explorer.inference.kernels.conv_code import GROUP
from explorer.inference.larger_kernels import SHORT, has_programs
from explorer.inference.memory import Memory
from explorer.inference.native import Isa
from explorer.inference.sparse_code import ADDRESSES, Finish, Programs, programs
from explorer.inference.sparse_rows import SparseWeights, Words, fill_up, read_beyond, sparse_entries
from explorer.inference.winograd import Filter


@dataclass(frozen=True, slots=True)
class Operands:
    """Where a convolution finds the operand of each weight.

    Attributes
    ----------
    sources : (S, 2 or 3) int64
        Byte offset from the pixel, vectors beyond the tile, and where they are masked the mask's place: what is copied to the buffer, in rows one after another.
    source : (K,) int64
        The source of each operand.
    within : (K,) int64
        Byte offset of each operand in the row that its source becomes ("direct": from the pixel itself).
    n_bytes : (S,) int64
        Bytes of each source's row in the buffer ("direct": its share of what its channel occupies in the cache).
    is_copied : bool
        Whether there is a buffer at all, or operands are read where they lie ("direct").
    """

    sources: NDArray[np.int64]
    source: NDArray[np.int64]
    within: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    is_copied: bool = True

    def of_groups(self, groups: range, count: int) -> Operands:
        """What neighbouring groups of the input channels hold, of `count` groups in all."""
        mine, weights = (
            slice(n // count * groups.start, n // count * groups.stop)
            for n in (len(self.sources), len(self.source))
        )
        source = self.source[weights] - mine.start
        return Operands(self.sources[mine], source, self.within[weights], self.n_bytes[mine], self.is_copied)


def operands(
    planes: NDArray[np.int64],
    shifts: NDArray[np.int64],
    plane: int,
    reach: str,
    tile: int,
    isa: Isa,
    masks: NDArray[np.int64] | None = None,
) -> Operands:
    """Plan how operands are reached.

    Parameters
    ----------
    planes : (C, taps) int64
        The plane that each tap of each channel reads.
    shifts : (taps,) int64
        Elements from a pixel to the operand of each tap.
    plane : int
        Elements from one plane to the next.
    reach : str
        "direct", "shift" or "compact", see `conv`.
    tile : int
        Vectors of pixels.
    isa : Isa
    masks : (taps,) int64, optional
        Place of the mask that is applied to what each tap reads ("shift"): other masks, other copies.
    """
    channels, taps = planes.shape
    lanes, size, width = isa.lanes, isa.element_bytes, isa.width
    row_bytes = width * tile
    place = (planes * plane + shifts) * size
    if reach != "shift":
        each = np.arange(channels * taps)
        sources = np.stack([place.reshape(-1), np.zeros(channels * taps, np.int64)], 1)
        if reach == "compact":
            return Operands(sources, each, np.zeros_like(each), np.full(len(each), row_bytes))
        # Taps of one channel overlap in the cache: together they occupy a tile and the distance between the outermost of them.
        channel_bytes = row_bytes + size * int(np.ptp(shifts))
        n_bytes = np.full(len(each), -(-channel_bytes // taps))
        return Operands(sources, each, place.reshape(-1), n_bytes, is_copied=False)
    # Taps that read the same plane, at shifts that differ by whole vectors, share a source. All channels are alike.
    groups: list[list[int]] = []
    mask = np.zeros(taps, np.int64) if masks is None else masks
    kinds = list(zip(planes[0].tolist(), mask.tolist(), (shifts % lanes).tolist(), strict=True))
    for tap in sorted(range(taps), key=lambda t: (kinds[t], shifts[t])):
        last = groups[-1][0] if groups else -1
        together = (
            bool(groups)
            and kinds[last] == kinds[tap]
            and shifts[tap] - shifts[last] <= _LONGEST_SHARE * tile * lanes
        )
        if together:
            groups[-1].append(tap)
        else:
            groups.append([tap])
    group = np.empty(taps, np.int64)
    for i, members in enumerate(groups):
        group[members] = i
    first = np.array([members[0] for members in groups])
    extra = np.array([(shifts[members[-1]] - shifts[members[0]]) // lanes for members in groups])
    source = np.arange(channels)[:, None] * len(groups) + group
    within = np.broadcast_to((shifts - shifts[first][group]) * size, (channels, taps))
    columns = [extra] if masks is None else [extra, mask[first]]
    sources = np.stack([place[:, first], *(np.broadcast_to(c, (channels, len(groups))) for c in columns)], 2)
    n_bytes = np.tile(row_bytes + extra * width, channels)
    return Operands(sources.reshape(-1, sources.shape[-1]), source.reshape(-1), within.reshape(-1), n_bytes)


def weight_words(weights: NDArray[np.float32], isa: Isa) -> NDArray[np.int32]:
    """Weights that are broadcast one by one, four bytes each: float32, or the same float16 twice, see `Function.weight`."""
    if isa.precision == "fp32":
        return np.ascontiguousarray(weights, np.float32).view(np.int32)
    half = weights.astype(np.float16).view(np.uint16).astype(np.uint32)
    return (half << 16 | half).view(np.int32)


_LONGEST_SHARE = 2
"""Taps further apart than this many tiles do not share a copy: it would be mostly of pixels that no tap reads."""


@dataclass(frozen=True, slots=True)
class PackedConv:
    """The K blocks of a convolution, for all parts of its output channels.

    Attributes
    ----------
    tables : dict of ndarray
        What fields of `record` point into, by their names. Other fields are plain numbers in `blocks`.
    blocks : (parts * n_blocks, fields) int64
        Rows of `record`, part by part; pointers are still element numbers in their table.
    n_blocks : int
        Of each part.
    record : Record
        What a row of `blocks` is.
    short : bool
        Whether offsets have 16 bits.
    """

    tables: dict[str, NDArray[Any]]
    blocks: NDArray[np.int64]
    n_blocks: int
    record: Record = conv_tables.BLOCK
    short: bool = False

    def place(self, memory: Memory) -> int:
        """Copy everything to `memory`; the address of the rows of `record`, which then hold addresses."""
        placed = self.blocks.copy()
        for name, table in self.tables.items():
            column = self.record.index(name)
            # Weights are prefetched past their end, which never faults: no table needs padding.
            placed[:, column] = memory.put(table) + placed[:, column] * table.strides[0]
        return memory.put(placed)


@dataclass(frozen=True, slots=True)
class PackedCode(PackedConv):
    """K blocks whose groups are `programs`; they, and not `tables`, have the rows that the field `groups` points to."""

    programs: Programs | None = None

    def place(self, memory: Memory) -> int:
        assert self.programs is not None
        tables = {**self.tables, "groups": self.programs.placed(memory)}
        return PackedConv(tables, self.blocks, self.n_blocks).place(memory)


def conv_code(
    weights: SparseWeights,
    bias: NDArray[np.float32],
    reach: Operands,
    kernel: conv.ConvKernel,
    finish: Finish,
    parts: int,
    block_bytes: int,
    isa: Isa,
    groups: int = 1,
) -> PackedCode:
    """Sparse weights of a convolution as programs, see `explorer.inference.sparse_code`.

    Parameters
    ----------
    weights, reach, kernel, parts, isa, groups
        As for `conv_sparse`.
    bias : (M,) float32
    finish : Finish
        What is done with the sums, where the programs do it themselves.
    block_bytes : int
        Operands of one K block, in bytes.
    """
    pieces = list(_pieces(weights, reach, parts, groups))
    n_blocks = _count_blocks(pieces, block_bytes)
    made, sources_of, rows_of_blocks = [], [], []
    n_groups = n_sources = n_bytes = 0
    for low, piece, mine, sources in pieces:
        block_of, row_start, cuts = _cut(mine, sources, n_blocks)
        these = programs(
            piece,
            mine.within + row_start[mine.source],
            block_of[mine.source],
            n_blocks,
            bias[low : low + piece.shape[0]],
            kernel.tile,
            finish if kernel.finishes_itself else None,
            isa,
        )
        each = len(these.groups) // n_blocks
        blocks = np.zeros((n_blocks, len(conv_tables.BLOCK.fields)), np.int64)
        columns: dict[str, Any] = {
            "stage": _stages(n_blocks),
            "n_sources": np.diff(cuts) * mine.is_copied,
            "sources": n_sources + cuts[:-1],
            "groups": n_groups + each * np.arange(n_blocks),
            "n_groups": each,
        }
        for name, column in columns.items():
            blocks[:, conv_tables.BLOCK.index(name)] = column
        these.groups[:, ADDRESSES] += n_bytes
        these.groups[:, GROUP.index("first_row")] += low
        made.append(these)
        rows_of_blocks.append(blocks)
        sources_of.append(mine.sources[sources])
        n_groups, n_sources = n_groups + len(these.groups), n_sources + len(sources)
        n_bytes += len(these.code)
    return PackedCode(
        {"sources": np.concatenate(sources_of)},
        np.concatenate(rows_of_blocks),
        n_blocks,
        programs=Programs(np.concatenate([p.code for p in made]), np.concatenate([p.groups for p in made])),
    )


def _stages(n_blocks: int) -> NDArray[np.int64]:
    stages = np.zeros(n_blocks, np.int64)
    stages[0] |= conv_tables.FIRST_BLOCK
    stages[-1] |= conv_tables.LAST_BLOCK
    return stages


@dataclass(frozen=True, slots=True)
class Part:
    """Output channels that run as jobs of their own, or rows of weights that stand for them.

    Attributes
    ----------
    low, high : int
        Rows [low, high).
    groups : range
        The groups of input channels that they read.
    """

    low: int
    high: int
    groups: range


def parts_of(rows: int, parts: int, step: int = 1, groups: int = 1) -> list[Part]:
    """Cut the rows of a convolution's weights into parts: multiples of `step` of a group's rows, about equal, or whole groups.

    Parameters
    ----------
    rows : int
        Divided by `groups` without remainder.
    parts : int
        A multiple of `groups`, or less than them.
    step : int
        Where a group is cut.
    groups : int
    """
    each = rows // groups
    if parts < groups:
        bounds = [groups * p // parts for p in range(parts + 1)]
        return [Part(each * low, each * high, range(low, high)) for low, high in pairwise(bounds)]
    cuts = parts // groups
    bounds = [min(each, -(-each * p // cuts // step) * step) for p in range(cuts)] + [each]
    return [
        Part(each * group + low, each * group + high, range(group, group + 1))
        for group in range(groups)
        for low, high in pairwise(bounds)
    ]


def _rows_of(weights: SparseWeights, part: Part, groups: int) -> SparseWeights:
    """The rows of a part, whose columns count from its first group on: what is left of a block-diagonal matrix."""
    piece = weights.rows(part.low, part.high)
    if len(part.groups) == 1:
        return piece
    group = np.arange(len(piece.starts) - 1) * groups // weights.shape[0]
    columns = piece.columns + np.repeat(group, np.diff(piece.starts)) * weights.shape[1]
    shape = (piece.shape[0], piece.shape[1] * len(part.groups))
    return SparseWeights(shape, piece.starts, columns, piece.values)


def conv_sparse(
    weights: SparseWeights,
    reach: Operands,
    kernel: conv.ConvKernel,
    parts: int,
    block_bytes: int,
    words: Words,
    isa: Isa,
    groups: int = 1,
) -> PackedConv:
    """Sparse weights of a convolution, (M, K) or (M / 2, K) in pairs, see `SparseWeights`.

    Parameters
    ----------
    weights : SparseWeights
        K is what an output channel reads: of several groups, the operands of one.
    reach : Operands
        Of all groups.
    kernel : ConvKernel
    parts : int
        Parts of the output channels that run as separate jobs, see `parts_of`.
    block_bytes : int
        Operands of one K block, in bytes: what stays in the L1 cache.
    words : callable
    isa : Isa
        The CPU that packs, which is the one that will run them.
    groups : int
    """
    pieces = list(_pieces(weights, reach, parts, groups))
    n_blocks = _count_blocks(pieces, block_bytes)
    tables: list[tuple[NDArray[Any], ...]] = []
    rows_of_blocks = []
    before = np.zeros(5, np.int64)  # offsets, weights, rows, groups and sources of earlier parts
    cut = [_cut(mine, sources, n_blocks) for _, _, mine, sources in pieces]
    placed: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [
        (mine.within + row_start[mine.source], block_of[mine.source])
        for (_, _, mine, _), (block_of, row_start, _) in zip(pieces, cut, strict=True)
    ]
    firsts, short = np.zeros((len(pieces), n_blocks), np.int64), False
    if has_programs(isa):
        lowest = [_first_of_blocks(where, block, n_blocks) for where, block in placed]
        near = [
            ((where - first[block]) // isa.element_bytes, block)
            for (where, block), first in zip(placed, lowest, strict=True)
        ]
        short = all(where.max(initial=0) < SHORT for where, _ in near)
        if short:
            placed, firsts = near, np.stack(lowest)
    for (low, piece, mine, sources), (_, _, cuts), (where, block), first in zip(
        pieces, cut, placed, firsts, strict=True
    ):
        entries = sparse_entries(
            piece, where, block, n_blocks, kernel.unroll, words, isa, partners=kernel.partners
        )
        starts = entries.starts
        blocks = np.zeros((n_blocks, len(conv_tables.BLOCK.fields)), np.int64)
        for name, column in {
            "stage": _stages(n_blocks),
            "n_sources": np.diff(cuts) * mine.is_copied,
            "sources": before[4] + cuts[:-1],
            "offsets": before[0] + starts[:-1, 0],
            "weights": before[1] + starts[:-1, 1],
            "rows": before[2] + starts[:-1, 2],
            "groups": before[3] + starts[:-1, 3],
            "n_groups": np.diff(starts[:, 3]) - entries.pairs,
            "n_pair_groups": entries.pairs,
            "first_operand": first,
        }.items():
            blocks[:, conv_tables.BLOCK.index(name)] = column
        rows_of_blocks.append(blocks)
        rows = (entries.rows + np.int32(low)) * kernel.channels
        tables.append((entries.offsets, entries.words, rows, entries.groups, mine.sources[sources]))
        before += np.append(starts[-1], len(sources))
    joined = [np.concatenate(column) for column in zip(*tables, strict=True)]
    joined[0], joined[2] = read_beyond(joined[0], joined[2])
    if short:
        joined[0] = joined[0].astype(np.uint16)
    named: dict[str, NDArray[Any]] = dict(
        zip(("offsets", "weights", "rows", "groups", "sources"), joined, strict=True)
    )
    return PackedConv(named, np.concatenate(rows_of_blocks), n_blocks, short=short)


def _first_of_blocks(where: NDArray[np.int64], block: NDArray[np.int64], n_blocks: int) -> NDArray[np.int64]:
    """The lowest of the operands' places in each K block, 0 in one that has none."""
    first = np.full(n_blocks, np.iinfo(np.int64).max)
    np.minimum.at(first, block, where)
    return np.where(first == np.iinfo(np.int64).max, 0, first)


def _pieces(
    weights: SparseWeights, reach: Operands, parts: int, groups: int
) -> Iterator[tuple[int, SparseWeights, Operands, NDArray[np.int64]]]:
    """Of each part: its first row, its weights, the operands of its groups, and the sources among them that any nonzero reads: others need not be copied."""
    for part in parts_of(weights.shape[0], parts, groups=groups):
        piece, mine = _rows_of(weights, part, groups), reach.of_groups(part.groups, groups)
        used = np.zeros(len(mine.sources), bool)
        used[mine.source[np.bincount(piece.columns, minlength=piece.shape[1]) > 0]] = True
        yield part.low, piece, mine, np.flatnonzero(used)


def _count_blocks(
    pieces: list[tuple[int, SparseWeights, Operands, NDArray[np.int64]]], block_bytes: int
) -> int:
    """K blocks, the same for all parts, none of whose operands need more than so many bytes."""
    return max(1, *(-(-int(mine.n_bytes[sources].sum()) // block_bytes) for _, _, mine, sources in pieces))


def _cut(
    reach: Operands, sources: NDArray[np.int64], n_blocks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The K block of each source, where its row begins in the buffer (0 where nothing is copied), and how many of `sources` precede each block."""
    block_of = _blocks_of(reach, sources, n_blocks)
    cuts = np.searchsorted(block_of[sources], np.arange(n_blocks + 1))
    row_start = np.zeros(len(reach.sources), np.int64)
    if reach.is_copied:
        # Each block fills the buffer from its beginning.
        end = np.cumsum(reach.n_bytes[sources])
        row_start[sources] = end - reach.n_bytes[sources] - np.append(0, end)[cuts[:-1]][block_of[sources]]
    return block_of, row_start, cuts


def _blocks_of(reach: Operands, sources: NDArray[np.int64], n_blocks: int) -> NDArray[np.int64]:
    """The K block of each source, ascending, all of about equal size: a last block of a few rows would pay all the overhead of a block."""
    n_bytes = reach.n_bytes[sources]
    total = max(int(n_bytes.sum()), 1)
    result = np.zeros(len(reach.sources), np.int64)
    result[sources] = (np.cumsum(n_bytes) - n_bytes) * n_blocks // total
    return result


def conv_dense(
    weight: NDArray[np.float32],
    reach: Operands,
    kernel: conv.ConvKernel,
    parts: int,
    block_bytes: int,
    words: Words,
    groups: int = 1,
) -> PackedConv:
    """Dense weights of a convolution: in each block [group of R channels][k][R], then [k][channels left over].

    Parameters
    ----------
    weight : (M, K) float32
    reach, kernel, block_bytes, words, groups
        As for `conv_sparse`.
    parts : int
        A multiple of `groups`.
    """
    step = kernel.dense_rows
    n_blocks = max(1, -(-int(reach.n_bytes.sum()) // groups // block_bytes))
    weights, offsets, sources, rows_of_blocks = [], [], [], []
    n_weights = n_offsets = n_sources = 0
    for part in parts_of(len(weight), parts, step, groups):
        mine = reach.of_groups(part.groups, groups)
        block_of = _blocks_of(mine, np.arange(len(mine.sources)), n_blocks)
        starts = np.cumsum(mine.n_bytes) - mine.n_bytes
        rows = weight[part.low : part.high]
        full = len(rows) // step
        for i, stage in enumerate(_stages(n_blocks)):
            here = np.flatnonzero(block_of == i)
            ks = np.flatnonzero(block_of[mine.source] == i)
            where = mine.within[ks]
            if mine.is_copied:
                where = where + starts[mine.source[ks]] - starts[here[0]]
            piece = rows[:, ks]
            weights.append(_in_groups(piece, step))
            offsets.append(where.astype(np.int32))
            sources.append(mine.sources[here])
            row = conv_tables.BLOCK.filled(
                stage=int(stage),
                n_sources=len(here) * mine.is_copied,
                sources=n_sources,
                depth=len(ks),
                offsets=n_offsets,
                weights=n_weights,
                has_remainder=int(len(rows) % step != 0),
                n_groups=full,
                first_channel=part.low,
            )
            n_sources += len(here)
            n_offsets += len(ks)
            n_weights += piece.size
            rows_of_blocks.append(row)
    tables: dict[str, NDArray[Any]] = {
        "weights": words(np.concatenate(weights)),
        "offsets": np.concatenate(offsets),
        "sources": np.concatenate(sources),
    }
    return PackedConv(tables, np.array(rows_of_blocks), n_blocks)


def _in_groups(weight: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """(M, K) as [group of `step` channels][k][channel], then [k][channels left over]."""
    (m, depth), full = weight.shape, len(weight) // step * step
    body = weight[:full].reshape(-1, step, depth).transpose(0, 2, 1)
    return np.concatenate([body.reshape(-1), weight[full:m].T.reshape(-1)])


@dataclass(frozen=True, slots=True)
class PackedWinograd(PackedConv):
    """Rows [K block][piece][point] of `conv_tables.BLOCK`; none of the blocks transforms more than `most_planes`."""

    most_planes: int = 0


def conv_winograd(
    weight: NDArray[np.float32],
    form: Filter,
    phases: int,
    x_plane: int,
    row_bytes: int,
    step: int,
    piece: int,
    block_bytes: int,
) -> PackedWinograd:
    """Transformed weights for `kernels.winograd`: of each block, piece and point as `conv_dense` has them of a block.

    Parameters
    ----------
    weight : (N, M, C, G) float32
        See `Filter.transformed`.
    form : Filter
    phases : int
        Planes of each input channel.
    x_plane : int
        Bytes from one plane of the input to the next.
    row_bytes : int
        Of a transformed row of a plane.
    step, piece : int
        Output channels of a group, and of a piece: a multiple of them.
    block_bytes : int
        Transformed rows of one point and K block: what stays in the L1 cache.
    """
    n, m, channels, columns = weight.shape
    n_blocks = min(channels, max(1, -(-channels * phases * row_bytes // block_bytes)))
    edges = [channels * i // n_blocks for i in range(n_blocks + 1)]
    within = form.phase * row_bytes + (form.column - form.column.min()) * weight.itemsize
    weights, offsets, rows = [], [], []
    n_weights = n_offsets = 0
    for low, high in pairwise(edges):
        depth = (high - low) * columns
        offsets.append((np.arange(high - low)[:, None] * phases * row_bytes + within).reshape(-1))
        for first in range(0, m, piece):
            mine = weight[:, first : first + piece, low:high].reshape(n, -1, depth)
            for of_point in mine:
                weights.append(_in_groups(of_point, step))
                row = conv_tables.BLOCK.filled(
                    stage=conv_tables.FIRST_BLOCK if low == 0 else 0,
                    n_sources=(high - low) * phases,
                    sources=low * phases,
                    depth=depth,
                    offsets=n_offsets,
                    weights=n_weights,
                    has_remainder=int(mine.shape[1] % step != 0),
                    n_groups=mine.shape[1] // step,
                )
                rows.append(row)
                n_weights += of_point.size
        n_offsets += depth
    planes = np.arange(channels * phases) * x_plane
    tables: dict[str, NDArray[Any]] = {
        "weights": np.concatenate(weights),
        "offsets": np.concatenate(offsets).astype(np.int32),
        "sources": np.stack([planes, np.zeros_like(planes)], 1),
    }
    most = phases * max(high - low for low, high in pairwise(edges))
    return PackedWinograd(tables, np.array(rows), n_blocks, most_planes=most)


def conv_channels_dense(
    weight: NDArray[np.floating], offsets: NDArray[np.int64], width: int, block_bytes: int
) -> PackedConv:
    """Dense weights with output channels in the lanes: in each block [group][k][channel], padded with channels of zeros.

    Parameters
    ----------
    weight : (M, K) float32 or float16
        As the kernel reads them.
    offsets : (K,) int64
        Byte offset of each operand from the pixel.
    width : int
        Channels of a group.
    block_bytes : int
        Weights of one group and K block: what stays in the L1 cache.
    """
    m, depth = weight.shape
    groups = -(-m // width)
    n_blocks = max(1, -(-depth * width * weight.itemsize // block_bytes))
    edges = [depth * i // n_blocks for i in range(n_blocks + 1)]
    padded = np.zeros((groups * width, depth), weight.dtype)
    padded[:m] = weight
    by_group = padded.reshape(groups, width, depth).transpose(0, 2, 1)
    blocks = np.zeros((n_blocks, len(conv_channels.BLOCK.fields)), np.int64)
    for name, column in {
        "depth": np.diff(edges),
        "offsets": edges[:-1],
        "weights": np.array(edges[:-1]) * groups * width,
    }.items():
        blocks[:, conv_channels.BLOCK.index(name)] = column
    tables = {
        "offsets": offsets.astype(np.int32),
        "weights": np.concatenate([by_group[:, low:high].reshape(-1) for low, high in pairwise(edges)]),
    }
    return PackedConv(tables, blocks, n_blocks, conv_channels.BLOCK)


def linear_sparse(
    weights: SparseWeights, lanes: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Nonzeros of each row of (M, F), filled up to whole vectors: starts (M + 1,) in vectors, indices and weights."""
    count = np.diff(weights.starts)
    starts = np.concatenate([[0], np.cumsum(-(-count // lanes))])
    indices = np.zeros(starts[-1] * lanes, np.int32)
    values = np.zeros(starts[-1] * lanes, np.float32)
    at = np.arange(len(weights.columns)) + np.repeat(starts[:-1] * lanes - weights.starts[:-1], count)
    indices[at], values[at] = weights.columns, weights.values[:, 0]
    slots, row, share = fill_up(count, np.diff(starts) * lanes)
    last = weights.starts[1:][row] - 1
    indices[slots], values[slots] = weights.columns[last], weights.values[last, 0] * share
    return starts.astype(np.int32), indices, values


def linear_dense(weight: NDArray[np.float32], group: int, lanes: int) -> NDArray[np.float32]:
    """(M, F) float32 as [group of U vectors][input][U * lanes], padded with zero outputs."""
    m, f = weight.shape
    width = group * lanes
    padded = np.zeros((-(-m // width) * width, f), np.float32)
    padded[:m] = weight
    return padded.reshape(-1, width, f).transpose(0, 2, 1).reshape(-1)
