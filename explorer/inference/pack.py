"""Weights, packed the way the kernels read them. Nothing here knows buffers or addresses, except offsets within one image."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from explorer.inference.kernels import conv
from explorer.inference.memory import Memory


@dataclass(frozen=True, slots=True)
class Block:
    """One K block of one part of the output channels, see `explorer.inference.kernels.conv.BLOCK`."""

    n_rows: int
    sources: NDArray[np.int64]
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
        tables = [memory.put(self.sources), memory.put(self.offsets), memory.put(self.entries)]
        return [self.n_rows, *tables, rows, groups, int(n_groups), self.first_channel]


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
        Rows are padded with zero weights to a multiple of this many entries.
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
    # A padding entry reads what its row's last entry reads: an operand that is needed anyway, times zero.
    ends = np.cumsum(count)[count > 0] - 1
    entries["offset"] = np.repeat(where[ends], padded[count > 0])
    entries["offset"][at], entries["weight"][at] = where, weight[order[r], k]
    values, starts = np.unique(turns, return_index=True)
    sizes = np.diff(np.append(starts, len(order)))
    groups = np.stack([values, sizes], 1).astype(np.int32).reshape(-1)
    return entries, channels[order].astype(np.int32), groups


def conv_blocks(
    weight: NDArray[np.float32],
    groups: int,
    direct_offsets: NDArray[np.int64],
    kernel: conv.ConvKernel,
    lanes: int,
    parts: int,
) -> list[list[Block]]:
    """The K blocks of a convolution, per part of the output channels.

    Parameters
    ----------
    weight : (M, C / groups, taps) float32
    groups : int
    direct_offsets : (C, taps) int64
        Byte offset of each operand from the pixel itself ("direct", "shift"), or (C, taps, 2): plane offset and tap ("gather").
    kernel : ConvKernel
    lanes : int
    parts : int
        Parts of the output channels that run as separate jobs.
    """
    m, cg, taps = weight.shape
    row_bytes = 4 * lanes * kernel.tile
    if groups > 1:
        return _grouped_blocks(weight, groups, direct_offsets, kernel, row_bytes, parts)
    depth = cg * taps
    flat = weight.reshape(m, depth)
    per_block = depth
    if kernel.reach != "direct" or kernel.dense_rows:
        per_block = max(8, conv.BLOCK_BYTES // row_bytes)
    # Blocks of equal size: a last block of a few rows would pay all the overhead of a block.
    n_blocks = max(1, -(-depth // per_block))
    edges = np.linspace(0, depth, n_blocks + 1).astype(int)
    step = max(kernel.dense_rows, 1)
    bounds = [min(m, -(-m * p // parts // step) * step) for p in range(parts)] + [m]
    where = direct_offsets.reshape(depth, -1)
    result = []
    for low, high in pairwise(bounds):
        blocks = []
        for i, (start, stop) in enumerate(pairwise(edges)):
            piece = flat[low:high, start:stop]
            sources = where[start:stop].reshape(-1).astype(np.int64)
            offsets = (
                where[start:stop, 0]
                if kernel.reach == "direct"
                else np.arange(stop - start, dtype=np.int64) * row_bytes
            )
            if kernel.dense_rows:
                blocks.append(_dense_block(piece, offsets, sources, low, kernel.dense_rows))
            else:
                entries, rows, counts = sparse_rows(
                    piece, offsets, np.arange(low, high), kernel.unroll, keep_empty=i in (0, n_blocks - 1)
                )
                blocks.append(Block(stop - start, sources, np.empty(0, np.int32), entries, rows, counts))
        result.append(blocks)
    return result


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
    return Block(depth, sources, offsets.astype(np.int32), packed, has_rest, full, first)


def _grouped_blocks(
    weight: NDArray[np.float32],
    groups: int,
    where: NDArray[np.int64],
    kernel: conv.ConvKernel,
    row_bytes: int,
    parts: int,
) -> list[list[Block]]:
    """A grouped convolution is a block-diagonal sparse matrix: each row holds the operands of its own group only."""
    m, cg, taps = weight.shape
    per_group = m // groups
    channels = np.arange(m)
    inputs = (channels // per_group)[:, None] * cg + np.arange(
        cg
    )  # (M, C / groups): input channels of each output channel
    flat = weight.reshape(m, cg * taps)
    empty = np.empty(0, np.int32)
    result = []
    for p in range(parts):
        low, high = groups * p // parts, groups * (p + 1) // parts
        if kernel.reach == "direct":
            mine = slice(low * per_group, high * per_group)
            offsets = where[inputs[mine]].reshape(-1, cg * taps)
            entries, rows, counts = sparse_rows(
                flat[mine], offsets, channels[mine], kernel.unroll, keep_empty=True
            )
            result.append([Block(cg * taps, np.empty(0, np.int64), empty, entries, rows, counts)])
            continue
        blocks = []
        at_once = max(1, conv.BLOCK_BYTES // (row_bytes * cg * taps))
        for start in range(low, high, at_once):
            stop = min(start + at_once, high)
            mine = slice(start * per_group, stop * per_group)
            sources = where[start * cg : stop * cg].reshape(-1).astype(np.int64)
            local = (inputs[mine] - start * cg)[:, :, None] * taps + np.arange(taps)
            offsets = (local * row_bytes).reshape(-1, cg * taps)
            entries, rows, counts = sparse_rows(
                flat[mine], offsets, channels[mine], kernel.unroll, keep_empty=True
            )
            blocks.append(Block((stop - start) * cg * taps, sources, empty, entries, rows, counts))
        result.append(blocks)
    most = max(len(blocks) for blocks in result)
    nothing = Block(0, np.empty(0, np.int64), empty, np.empty(0, ENTRY), empty, empty)
    return [blocks + [nothing] * (most - len(blocks)) for blocks in result]


def linear_sparse(
    weight: NDArray[np.float32], lanes: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Nonzeros of each row of (M, F) float32, padded to whole vectors: starts (M + 1,) in vectors, indices and weights."""
    flat = np.flatnonzero(weight)
    r, k = np.divmod(flat, weight.shape[1])
    count = np.bincount(r, minlength=len(weight))
    starts = np.concatenate([[0], np.cumsum(-(-count // lanes))])
    indices = np.zeros(starts[-1] * lanes, np.int32)
    values = np.zeros(starts[-1] * lanes, np.float32)
    within = np.arange(len(r)) - np.repeat(np.cumsum(count) - count, count)
    at = starts[r] * lanes + within
    indices[at], values[at] = k, weight[r, k]
    return starts.astype(np.int32), indices, values


def linear_dense(weight: NDArray[np.float32], group: int, lanes: int) -> NDArray[np.float32]:
    """(M, F) float32 as [group of U vectors][input][U * lanes], padded with zero outputs."""
    m, f = weight.shape
    width = group * lanes
    padded = np.zeros((-(-m // width) * width, f), np.float32)
    padded[:m] = weight
    return padded.reshape(-1, width, f).transpose(0, 2, 1).reshape(-1)
