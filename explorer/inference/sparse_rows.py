"""The nonzeros of sparse weights, in the order in which the sparse kernel takes them: by row, or by two rows that share columns."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.errors import EngineError
from explorer.inference.kernels import conv_tables, find_nonzeros, match_rows, place_entries, place_rows
from explorer.inference.kernels.builder import Record
from explorer.inference.native import Isa, Kernel, machine_code

Words = Callable[[NDArray[np.float32]], NDArray[np.int32]]
"""`explorer.inference.pack.weight_words` for a CPU and precision."""


@dataclass(frozen=True, slots=True)
class SparseWeights:
    """The nonzeros of a matrix.

    Attributes
    ----------
    shape : (int, int)
    starts : (rows + 1,) int64
        Nonzeros before each row.
    columns : (nonzeros,) int64
        Row by row, ascending in each.
    values : (nonzeros, channels) float32
        One column, or two when a row stands for a pair of output channels: then a place counts as nonzero when either has a weight there.
    """

    shape: tuple[int, int]
    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        weight: NDArray[np.float32],
        isa: Isa,
        gain: NDArray[np.float64] | None = None,
        channels: int = 1,
    ) -> SparseWeights:
        """Find the nonzeros.

        Parameters
        ----------
        weight : (M, columns) float32
        isa : Isa
            The CPU that looks for them.
        gain : (M,) float64, optional
            Multiplies the weights of each output channel.
        channels : int
            Output channels of a row; divides M.

        Raises
        ------
        EngineError
            When another thread has changed the weights meanwhile, and was noticed.
        """
        n_rows, n_columns = len(weight) // channels, weight.shape[1]
        # On booleans numpy counts ten times as fast as on floats. Of channels together there are no more than of each.
        most = int(np.count_nonzero(weight != 0))
        starts = np.zeros(n_rows + 1, np.int64)
        space = most + n_columns + 1
        columns, values = np.empty(space, np.int64), np.empty((space, channels), np.float32)
        tables: dict[str, NDArray[Any]] = {
            "weight": weight,
            "ends": starts[1:],
            "columns": columns,
            "values": values,
        }
        if gain is not None:
            tables["gain"] = gain.astype(np.float64)
        kernel = find_nonzeros.FindNonzerosKernel(channels)
        run_kernel(kernel, find_nonzeros.ARGUMENTS, isa, tables, rows=n_rows, row_length=n_columns, most=most)
        if starts[-1] > most:
            raise EngineError(
                "The weights were changed while they were read. Let the thread that trains them wait, or pass a copy of the module."
            )
        return cls((n_rows, n_columns), starts, columns[: starts[-1]], values[: starts[-1]])

    def rows(self, low: int, high: int) -> SparseWeights:
        """Rows [low, high) as a matrix of their own."""
        mine = slice(self.starts[low], self.starts[high])
        starts = self.starts[low : high + 1] - self.starts[low]
        return SparseWeights((high - low, self.shape[1]), starts, self.columns[mine], self.values[mine])


@dataclass(frozen=True, slots=True)
class Entries:
    """Nonzeros as the sparse kernel reads them: in each K block first the rows that stand alone, then the pairs of rows.

    Attributes
    ----------
    offsets : (O,) int32
        Byte offset of the operand of each nonzero. Of a pair, first those of the columns that both rows have, then one of each row in turn.
    words : (W, channels) int32
        The weights beside them; of a pair always one of each row in turn.
    rows : (R,) int32
        The rows, those of a pair side by side. Those with equally many entries follow one another. All rows are kept in the first block (it brings the
        bias) and in the last (it writes the result); others keep those that have a nonzero.
    groups : (G, 3) int32
        {columns that two rows share, turns, rows or pairs} of each run of alike ones. A turn is `unroll` nonzeros of a row alone, or one of each row of
        a pair that the other does not have.
    starts : (n_blocks + 1, 4) int64
        Offsets, words, rows and groups before each block.
    pairs : (n_blocks,) int64
        How many groups of a block, its last, are of pairs.
    """

    offsets: NDArray[np.int32]
    words: NDArray[np.int32]
    rows: NDArray[np.int32]
    groups: NDArray[np.int32]
    starts: NDArray[np.int64]
    pairs: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Cells:
    """What each row has in each K block, in the order in which it is worked on: by block and length.

    Attributes
    ----------
    row, block : (cells,) int64
    place : (cells,) int64
        Where each stands in a table of all (row, block), row by row.
    count : (cells,) int64
        Nonzeros.
    """

    row: NDArray[np.int64]
    block: NDArray[np.int64]
    place: NDArray[np.int64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64], n_blocks: int, unroll: int = 1) -> _Cells:
        """Of nonzeros counted row by row, and by block in each; only the first block and the last keep what is empty."""
        turns = -(-counts // unroll)
        kept = (turns > 0).reshape(-1, n_blocks)
        kept[:, [0, -1]] = True
        block, row = np.nonzero(kept.T)
        place = row * n_blocks + block
        order = np.lexsort((turns[place], block))
        place = place[order]
        return cls(row[order], block[order], place, counts[place])


def sparse_entries(
    weights: SparseWeights,
    where: NDArray[np.int64],
    block: NDArray[np.int64],
    n_blocks: int,
    unroll: int,
    words: Words,
    isa: Isa,
    *,
    partners: bool = False,
) -> Entries:
    """The nonzeros of some rows, in the order in which the sparse kernel takes them.

    Parameters
    ----------
    weights : SparseWeights
    where : (K,) int64
        Byte offset of the operand of each column, below 2^31.
    block : (K,) int64
        The K block of each column.
    n_blocks : int
    unroll : int
        A row's entries in a block are filled up to a multiple of this.
    words : callable
    isa : Isa
        The CPU that packs.
    partners : bool
        Take two rows at once where they share columns; then without an `unroll`.
    """
    if partners:
        return _in_pairs(weights, where, block, n_blocks, words, isa)
    n_cells = weights.shape[0] * n_blocks
    counts = np.zeros(n_cells, np.int64)
    channels = weights.values.shape[1]
    tables: dict[str, NDArray[Any]] = {
        "starts": weights.starts,
        "columns": weights.columns,
        "block": block,
    }

    def run(which: str, **more: NDArray[Any]) -> None:
        kernel = place_entries.PlaceEntriesKernel(which, channels if which == "place" else 1)
        numbers = {"rows": weights.shape[0], "n_blocks": n_blocks}
        run_kernel(kernel, place_entries.ARGUMENTS, isa, tables | more, **numbers)

    run("count", next=counts)
    cells = _Cells.of(counts, n_blocks, unroll)
    turns = -(-cells.count // unroll)
    padded = turns * unroll
    ends = np.cumsum(padded)
    total = int(ends[-1]) if len(ends) else 0
    first, last = np.zeros(n_cells, np.int64), np.zeros(n_cells, np.int64)
    first[cells.place] = ends - padded
    offsets, filled = np.zeros(total, np.int32), np.zeros((total, channels), np.int32)
    run(
        "place",
        words=words(weights.values),
        where=where.astype(np.int32),
        next=first,
        last=last,
        offsets=offsets,
        filled=filled,
    )
    slots, row, share = fill_up(cells.count, padded)
    entry = last[cells.place[row]]
    offsets[slots] = where[weights.columns[entry]]
    filled[slots] = words(weights.values[entry] * share[:, None])
    groups, begins = _runs(cells.block, np.zeros_like(ends), turns)
    starts = _starts(cells.block, n_blocks, begins, padded, padded, np.ones_like(ends))
    return Entries(offsets, filled, cells.row.astype(np.int32), groups, starts, np.zeros(n_blocks, np.int64))


def _runs(
    block: NDArray[np.int64], shared: NDArray[np.int64], turns: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Runs of rows (or pairs) that are alike: their `groups`, and where each begins."""
    is_new = np.ones(len(block), bool)
    is_new[1:] = (np.diff(block) != 0) | (np.diff(shared) != 0) | (np.diff(turns) != 0)
    begins = np.flatnonzero(is_new)
    lengths = np.diff(np.append(begins, len(block)))
    return np.stack([shared[begins], turns[begins], lengths], 1).astype(np.int32), begins


def _starts(
    block: NDArray[np.int64], n_blocks: int, begins: NDArray[np.int64], *sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """What lies before each block, of things of these `sizes` for each row (or pair), and of groups."""
    bounds = np.searchsorted(block, np.arange(n_blocks + 1))
    before = [np.append(0, np.cumsum(size))[bounds] for size in sizes]
    return np.stack([*before, np.searchsorted(block[begins], np.arange(n_blocks + 1))], 1)


def _in_pairs(
    weights: SparseWeights,
    where: NDArray[np.int64],
    block: NDArray[np.int64],
    n_blocks: int,
    words: Words,
    isa: Isa,
) -> Entries:
    """The same where rows of a block that share columns, and are of one length, are taken two at a time."""
    columns, values = weights.columns, weights.values
    # The nonzeros of a cell have to stand side by side: they do when the blocks ascend along each row.
    key = block[columns] + np.repeat(np.arange(weights.shape[0]) * n_blocks, np.diff(weights.starts))
    if n_blocks > 1 and np.any(key[1:] < key[:-1]):
        order = np.argsort(key, kind="stable")
        key, columns, values = key[order], columns[order], values[order]
    counts = np.bincount(key, minlength=weights.shape[0] * n_blocks)
    cells = _Cells.of(counts, n_blocks)
    first = (np.cumsum(counts) - counts)[cells.place]
    partner, shared_of, is_shared = _match(cells, first, columns, n_blocks, isa)
    # A pair stands where the first of its rows does.
    lead = np.flatnonzero((partner < 0) | (partner > np.arange(len(partner))))
    is_pair, shared = partner[lead] >= 0, shared_of[lead]
    lead = lead[np.lexsort((shared, cells.count[lead] - shared, is_pair, cells.block[lead]))]
    second, shared, in_block = partner[lead], shared_of[lead], cells.block[lead]
    is_pair, turns = second >= 0, cells.count[lead] - shared
    step = 1 + is_pair
    n_offsets, n_words = shared + step * turns, step * (shared + turns)
    groups, begins = _runs(2 * in_block + is_pair, shared, turns)
    starts = _starts(in_block, n_blocks, begins, n_offsets, n_words, step)

    first_offset, first_word = np.cumsum(n_offsets) - n_offsets, np.cumsum(n_words) - n_words
    names = ("shared_offset", "shared_word", "own_offset", "own_word", "step")
    places = {name: np.zeros(len(partner), np.int64) for name in names}
    for side, these, who in ((0, lead, slice(None)), (1, second[is_pair], is_pair)):
        beside = (0, side, side, side, 0)
        begins_of = (first_offset, first_word, first_offset + shared, first_word + step * shared, step)
        for name, begin, more in zip(names, begins_of, beside, strict=True):
            places[name][these] = begin[who] + more
    offsets, filled = np.zeros(int(n_offsets.sum()), np.int32), np.zeros((int(n_words.sum()), 1), np.int32)
    entries: dict[str, NDArray[Any]] = {
        "where": where[columns],
        "words": words(values),
        "is_shared": is_shared,
    }
    cells_of: dict[str, NDArray[Any]] = {
        "first": first,
        "count": cells.count,
        "offsets": offsets,
        "filled": filled,
    }
    run_kernel(
        place_rows.PlaceRowsKernel(),
        place_rows.ARGUMENTS,
        isa,
        entries | cells_of | places,
        rows=len(partner),
    )
    ends = np.cumsum(step)
    rows = np.repeat(cells.row[lead], step).astype(np.int32)
    rows[ends[is_pair] - 1] = cells.row[second[is_pair]]
    pairs = np.bincount(in_block[begins], weights=is_pair[begins], minlength=n_blocks).astype(np.int64)
    return Entries(offsets, filled, rows, groups, starts, pairs)


def run_kernel(
    kernel: Kernel, record: Record, isa: Isa, tables: Mapping[str, NDArray[Any]], **numbers: int
) -> None:
    """Call a kernel that works on tables of the weights, and needs no thread of the engine."""
    placed = {name: np.ascontiguousarray(table) for name, table in tables.items()}
    arguments = np.zeros(len(record.fields), np.int64)
    for name, table in placed.items():
        arguments[record.index(name)] = table.ctypes.data
    for name, number in numbers.items():
        arguments[record.index(name)] = number
    code = machine_code(isa.single, kernel)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code)(arguments.ctypes.data)


_GRAIN = 14
"""Runs of n rows share a multiple of this / sqrt(n) columns, at least of one: where few pairs are alike the core foresees the end of no loop, which costs
it more than some loads. (Sparse layers at 90 % on Zen 4, multiples of 2 in place of all that is shared: ResNet-50 0.99, BERT 0.97; 7 to 20 are alike.)"""


def _match(
    cells: _Cells, first: NDArray[np.int64], columns: NDArray[np.int64], n_blocks: int, isa: Isa
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """The partner of each cell (-1 for none), how many columns they share, and whether each entry is of these; `first` is the first entry of each cell."""
    n = len(cells.row)
    lowest, highest = np.full(n_blocks, np.iinfo(np.int64).max), np.full(n_blocks, -1)
    filled = np.flatnonzero(cells.count)
    begin = first[filled]
    np.minimum.at(lowest, cells.block[filled], columns[begin])
    np.maximum.at(highest, cells.block[filled], columns[begin + cells.count[filled] - 1])
    span = int((highest - lowest)[highest >= 0].max(initial=0)) + 1
    set_words = -(-span // (64 * match_rows.SET_WORDS)) * match_rows.SET_WORDS
    runs, begins = _runs(cells.block, np.zeros_like(cells.count), cells.count)
    lengths = runs[:, 2]
    grain = np.maximum(np.rint(_GRAIN / np.sqrt(lengths)), 1).astype(np.int64)
    partner, shared = np.full(n, -1), np.zeros(n, np.int64)
    is_shared = np.zeros(len(columns), np.uint8)
    tables: dict[str, NDArray[Any]] = {
        "columns": columns,
        "first": first,
        "count": cells.count,
        "base": lowest[cells.block],
        "run_end": np.repeat(begins + lengths, lengths),
        "grain": np.repeat(grain, lengths),
        "sets": np.zeros(n * set_words, np.int64),
        "partner": partner,
        "shared": shared,
        "is_shared": is_shared,
    }
    kernel = match_rows.MatchRowsKernel()
    run_kernel(kernel, match_rows.ARGUMENTS, isa, tables, rows=n, set_words=set_words)
    return partner, shared, is_shared


def fill_up(
    count: NDArray[np.int64], padded: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
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
    row : (E,) int64
        The row whose last nonzero it is a piece of.
    share : (E,) float32
        Its share of the weight.
    """
    rows = np.flatnonzero((padded > count) & (count > 0))
    pieces = (padded - count + 1)[rows]
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    slots = np.repeat((np.cumsum(padded) - padded + count - 1)[rows], pieces) + piece
    total = np.repeat(pieces, pieces)
    # Of 5 pieces, 3 are quarters and 2 are eighths.
    power = 2 ** np.floor(np.log2(total))
    share = np.where(piece < 2 * (total - power), 0.5, 1.0) / power
    return slots, np.repeat(rows, pieces), share.astype(np.float32)


def read_beyond(
    offsets: NDArray[np.int32], rows: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The same tables, with what the sparse kernel reads ahead past their ends."""
    return np.append(offsets, np.zeros(conv_tables.OFFSETS_AHEAD + 1, np.int32)), np.append(
        rows, np.zeros(conv_tables.ROWS_AHEAD, np.int32)
    )
