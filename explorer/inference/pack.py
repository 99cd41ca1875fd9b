"""Weights, packed the way the kernels read them. Nothing here knows buffers or addresses, except offsets within one image."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from explorer.inference.kernels import conv
from explorer.inference.memory import Memory


@dataclass(frozen=True, slots=True)
class Operands:
    """Where a convolution finds the operand of each weight.

    Attributes
    ----------
    sources : (S, 2) int64
        Byte offset from the pixel, and vectors beyond the tile: what is copied to the buffer, in rows one after another.
    source : (K,) int64
        The source of each operand.
    within : (K,) int64
        Byte offset of each operand in the row that its source becomes ("direct": from the pixel itself).
    n_bytes : (S,) int64
        Bytes of each source's row in the buffer ("direct": its share of what its channel occupies in the cache).
    """

    sources: NDArray[np.int64]
    source: NDArray[np.int64]
    within: NDArray[np.int64]
    n_bytes: NDArray[np.int64]


def operands(
    planes: NDArray[np.int64], shifts: NDArray[np.int64], plane: int, kernel: conv.ConvKernel, lanes: int
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
    kernel : ConvKernel
    lanes : int
    """
    channels, taps = planes.shape
    width = 4 * lanes
    row_bytes = width * kernel.tile
    place = (planes * plane + shifts) * 4
    if kernel.reach != "shift":
        each = np.arange(channels * taps)
        sources = np.stack([place.reshape(-1), np.zeros(channels * taps, np.int64)], 1)
        if kernel.reach == "compact":
            return Operands(sources, each, np.zeros_like(each), np.full(len(each), row_bytes))
        # Taps of one channel overlap in the cache: together they occupy a tile and the distance between the outermost of them.
        channel_bytes = row_bytes + 4 * int(np.ptp(shifts))
        return Operands(sources, each, place.reshape(-1), np.full(len(each), -(-channel_bytes // taps)))
    # Taps that read the same plane, at shifts that differ by whole vectors, share a source. All channels are alike.
    groups: list[list[int]] = []
    for tap in sorted(range(taps), key=lambda t: (planes[0, t], shifts[t] % lanes, shifts[t])):
        last = groups[-1][0] if groups else -1
        together = (
            bool(groups)
            and planes[0, last] == planes[0, tap]
            and (shifts[tap] - shifts[last]) % lanes == 0
            and shifts[tap] - shifts[last] <= _LONGEST_SHARE * kernel.tile * lanes
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
    within = np.broadcast_to((shifts - shifts[first][group]) * 4, (channels, taps))
    sources = np.stack([place[:, first], np.broadcast_to(extra, (channels, len(groups)))], 2)
    n_bytes = np.tile(row_bytes + extra * width, channels)
    return Operands(sources.reshape(-1, 2), source.reshape(-1), within.reshape(-1), n_bytes)


_LONGEST_SHARE = 2
"""Taps further apart than this many tiles do not share a copy: it would be mostly of pixels that no tap reads."""


@dataclass(frozen=True, slots=True)
class Block:
    """One K block of one part of the output channels, see `explorer.inference.kernels.conv.BLOCK`."""

    sources: NDArray[np.int64]
    depth: int
    offsets: NDArray[np.int32]
    entries: NDArray[np.generic]
    rows: NDArray[np.int32] | int
    groups: NDArray[np.int32] | int
    first_channel: int = 0

    def place(self, memory: Memory) -> list[int]:
        """The fields of BLOCK, with the tables copied to `memory`."""
        rows = self.rows if isinstance(self.rows, int) else memory.put(self.rows)
        groups, n_groups = 0, self.groups
        if not isinstance(self.groups, int):
            groups, n_groups = memory.put(self.groups), self.groups.size // 2
        # Weights are prefetched past their end, which never faults; the entries need no padding.
        sources, offsets, entries = (memory.put(t) for t in (self.sources, self.offsets, self.entries))
        return [
            len(self.sources),
            sources,
            self.depth,
            offsets,
            entries,
            rows,
            groups,
            int(n_groups),
            self.first_channel,
        ]


ENTRY = np.dtype([("offset", "<i4"), ("weight", "<f4")])


def sparse_rows(
    weight: NDArray[np.float32],
    offsets: NDArray[np.int64],
    channels: NDArray[np.int64],
    unroll: int,
    *,
    keep_empty: bool,
) -> tuple[NDArray[np.generic], NDArray[np.int32], NDArray[np.int32]]:
    """Nonzeros of some rows, in the order in which the sparse kernel takes them.

    Parameters
    ----------
    weight : (rows, K) float32
    offsets : (rows, K) or (K,) int64
        Byte offset of the operand of each weight.
    channels : (rows,) int64
        Output channel of each row.
    unroll : int
        Rows are padded to a multiple of this many entries.
    keep_empty : bool
        Whether rows without a nonzero must be visited all the same (in the first and the last block they must).

    Returns
    -------
    entries : (padded nonzeros,) of {offset int32, weight float32}
    rows : (rows kept,) int32
        Output channels, rows with equally many entries next to one another.
    groups : (2 * groups,) int32
        {entries / unroll, rows} of each run of such rows.
    """
    present = weight != 0
    turns = -(-present.sum(1) // unroll)
    order = np.argsort(turns, kind="stable")
    if not keep_empty:
        order = order[turns[order] > 0]
    turns = turns[order]
    r, k = np.nonzero(present[order])
    count = np.bincount(r, minlength=len(order))
    padded = turns * unroll
    within = np.arange(len(r)) - np.repeat(np.cumsum(count) - count, count)
    at = (np.cumsum(padded) - padded)[r] + within
    where = (offsets[order[r], k] if offsets.ndim == 2 else offsets[k]).astype(np.int32)
    entries = np.zeros(int(padded.sum()), ENTRY)
    kept = weight[order[r], k]
    entries["offset"][at], entries["weight"][at] = where, kept
    slots, last, share = _fill_up(count, padded)
    entries["offset"][slots], entries["weight"][slots] = where[last], kept[last] * share
    values, starts = np.unique(turns, return_index=True)
    sizes = np.diff(np.append(starts, len(order)))
    groups = np.stack([values, sizes], 1).astype(np.int32).reshape(-1)
    return entries, channels[order].astype(np.int32), groups


def _fill_up(
    count: NDArray[np.int64], padded: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """How the last nonzero of each row fills the row up to its padded length.

    Its weight is cut into pieces, one for each entry that is left: powers of two of it, which add up to it exactly. Entries of weight zero would turn an
    infinite operand into NaN.

    Parameters
    ----------
    count, padded : (rows,) int64
        Nonzeros and entries of each row.

    Returns
    -------
    slots : (E,) int64
        The entries that hold a piece.
    last : (E,) int64
        The nonzero that it is a piece of.
    share : (E,) float64
        Its share of the weight.
    """
    rows = np.flatnonzero((padded > count) & (count > 0))
    pieces = (padded - count + 1)[rows]
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    slots = np.repeat((np.cumsum(padded) - padded + count - 1)[rows], pieces) + piece
    last = np.repeat((np.cumsum(count) - 1)[rows], pieces)
    total = np.repeat(pieces, pieces)
    # Of 5 pieces, 3 are quarters and 2 are eighths.
    power = 2 ** np.floor(np.log2(total))
    return slots, last, np.where(piece < 2 * (total - power), 0.5, 1.0) / power


def conv_blocks(
    weight: NDArray[np.float32], reach: Operands, kernel: conv.ConvKernel, parts: int
) -> list[list[Block]]:
    """The K blocks of a convolution, per part of the output channels.

    Parameters
    ----------
    weight : (M, K) float32
    reach : Operands
    kernel : ConvKernel
    parts : int
        Parts of the output channels that run as separate jobs.
    """
    m = len(weight)
    step = max(kernel.dense_rows, 1)
    bounds = [min(m, -(-m * p // parts // step) * step) for p in range(parts)] + [m]
    everything = np.arange(len(reach.sources))
    needed = [everything] * parts
    if not kernel.dense_rows:
        # What no nonzero of a part reads need not be copied.
        needed = [np.unique(reach.source[weight[low:high].any(0)]) for low, high in pairwise(bounds)]
    n_blocks = max(1, *(-(-int(reach.n_bytes[sources].sum()) // conv.BLOCK_BYTES) for sources in needed))
    result = []
    for (low, high), sources in zip(pairwise(bounds), needed, strict=True):
        part = weight[low:high]
        n_bytes = reach.n_bytes[sources]
        # Blocks of about equal size: a last block of a few rows would pay all the overhead of a block.
        block_of = (np.cumsum(n_bytes) - n_bytes) * n_blocks // max(int(n_bytes.sum()), 1)
        blocks = []
        for i in range(n_blocks):
            mine = sources[block_of == i]
            starts = np.full(len(reach.sources), -1)
            starts[mine] = np.cumsum(reach.n_bytes[mine]) - reach.n_bytes[mine]
            ks = np.flatnonzero(starts[reach.source] >= 0)
            offsets = reach.within[ks] + (0 if kernel.reach == "direct" else starts[reach.source[ks]])
            copied = reach.sources[mine]
            if kernel.dense_rows:
                blocks.append(_dense_block(part[:, ks], offsets, copied, low, kernel.dense_rows))
                continue
            entries, rows, counts = sparse_rows(
                part[:, ks], offsets, np.arange(low, high), kernel.unroll, keep_empty=i in (0, n_blocks - 1)
            )
            blocks.append(Block(copied, len(ks), _NO_OFFSETS, entries, rows, counts))
        result.append(blocks)
    return result


_NO_OFFSETS = np.empty(0, np.int32)


def _dense_block(
    piece: NDArray[np.float32], offsets: NDArray[np.int64], sources: NDArray[np.int64], first: int, rows: int
) -> Block:
    """Weights as [group][k][row in group], then [k][row] of the remainder."""
    m, depth = piece.shape
    full = m // rows
    body = piece[: full * rows].reshape(full, rows, depth).transpose(0, 2, 1).reshape(-1)
    rest = piece[full * rows :].T.reshape(-1)
    has_rest = int(m % rows != 0)
    packed = np.concatenate([body, rest]).astype(np.float32)
    return Block(sources, depth, offsets.astype(np.int32), packed, has_rest, full, first)


def grouped_blocks(
    weight: NDArray[np.float32], groups: int, reach: Operands, kernel: conv.ConvKernel, parts: int
) -> list[list[Block]]:
    """A grouped convolution is a block-diagonal sparse matrix: each row holds the operands of its own group only, read where they lie.

    Parameters
    ----------
    weight : (M, C / groups, taps) float32
    groups : int
    reach : Operands
        "direct".
    kernel : ConvKernel
    parts : int
        Parts of the groups that run as separate jobs.
    """
    m, cg, taps = weight.shape
    per_group = m // groups
    channels = np.arange(m)
    inputs = (channels // per_group)[:, None] * cg + np.arange(
        cg
    )  # (M, C / groups): what each output channel reads
    flat, where = weight.reshape(m, cg * taps), reach.within.reshape(-1, taps)
    result = []
    for p in range(parts):
        mine = slice(groups * p // parts * per_group, groups * (p + 1) // parts * per_group)
        offsets = where[inputs[mine]].reshape(-1, cg * taps)
        entries, rows, counts = sparse_rows(
            flat[mine], offsets, channels[mine], kernel.unroll, keep_empty=True
        )
        result.append([Block(np.empty((0, 2), np.int64), cg * taps, _NO_OFFSETS, entries, rows, counts)])
    return result


def linear_sparse(
    weight: NDArray[np.float32], lanes: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Nonzeros of each row of (M, F) float32, filled up to whole vectors: starts (M + 1,) in vectors, indices and weights."""
    flat = np.flatnonzero(weight)
    r, k = np.divmod(flat, weight.shape[1])
    count = np.bincount(r, minlength=len(weight))
    starts = np.concatenate([[0], np.cumsum(-(-count // lanes))])
    indices = np.zeros(starts[-1] * lanes, np.int32)
    values = np.zeros(starts[-1] * lanes, np.float32)
    within = np.arange(len(r)) - np.repeat(np.cumsum(count) - count, count)
    at = starts[r] * lanes + within
    kept = weight[r, k]
    indices[at], values[at] = k, kept
    slots, last, share = _fill_up(count, np.diff(starts) * lanes)
    indices[slots], values[slots] = k[last], kept[last] * share
    return starts.astype(np.int32), indices, values


def linear_dense(weight: NDArray[np.float32], group: int, lanes: int) -> NDArray[np.float32]:
    """(M, F) float32 as [group of U vectors][input][U * lanes], padded with zero outputs."""
    m, f = weight.shape
    width = group * lanes
    padded = np.zeros((-(-m // width) * width, f), np.float32)
    padded[:m] = weight
    return padded.reshape(-1, width, f).transpose(0, 2, 1).reshape(-1)
