"""The loops of the sparse convolution over the nonzeros of one K block, see conv.py.

The algorithm in plain words
  A row of weights is an output channel, or two of one pattern ("pairs"). Its sums, one for each vector of the
  tile, stay in registers while its nonzeros are added one by one: an offset tells where the operand lies, T
  loads and T multiply-adds follow. Rows come in groups of equally many nonzeros, so that the core foresees the
  end of each row. Two rows that share columns ("partners") are taken at once: first the columns that both have,
  each loaded once for 2 x T multiply-adds, then those that only one has, one of each row in turn.

Why the loop has this shape: each multiply-add needs an operand of its own from memory, and a core starts no more
loads than multiply-adds in a cycle, so that loads are the limit. What is left is to load little else: two offsets
come by one load (with AVX2 two weights as well), and what partners share is loaded once for both. An offset is
loaded `OFFSETS_AHEAD` nonzeros early, or it would wait behind the operands of those before it, and its own
operands for it. Where a row has few sums, successive nonzeros are added to several sets of them, since a
multiply-add waits some four cycles for the one before it that changed the same sum.

The numpy twin, `reference`, reads the tables of `conv_tables.BLOCK` as these loops do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference.kernels.builder import CACHE_LINE, I1, I16, I32, I64, PTR, Function, Value
from explorer.inference.kernels.conv_tables import BLOCK, OFFSETS_AHEAD, ROWS_AHEAD, WEIGHT_PREFETCH_BYTES
from explorer.inference.native import Isa

Nonzeros = Callable[[range, list[Value]], list[Value]]
"""Adds all nonzeros of a row, or of two, for some vectors of the tile: ``carried = add_all(vectors, carried)``.

What is carried: [address in the offsets, address in the weights, the `OFFSETS_AHEAD` offsets that are loaded
already, *sums]. The addresses are of what comes next. Sums are [set][channel][vector]."""

_GROUP_BYTES = 12  # three int32


def loads_two_weights(isa: Isa, channels: int) -> bool:
    """Whether rows of so many output channels take the weights of two nonzeros by one load.

    One of the loads that limit the loop becomes shuffles, which have a port of their own where vectors have
    32 bytes. (With AVX-512, Intel's share one with the multiply-adds.) Pairs of channels have two products for
    each load, which do not limit them. (ResNet-50 at 90 % on Zen 3: layers of 28 x 28 pixels and fewer 0.93 to
    0.99.)
    """
    return isa.name == "avx2" and isa.precision == "fp32" and channels == 1


@dataclass(frozen=True, slots=True)
class SparseLoops:
    """Writes the loops into a function whose first arguments are a row of `BLOCK` and what offsets count from.

    Attributes
    ----------
    f : Function
    channels : int
        Output channels of a row of weights, 1 or 2.
    sets : int
        Sets of sums of a row, which successive nonzeros are added to in turn.
    parts : list of range
        The vectors of the tile that are taken at once; for each part the nonzeros are gone through again.
    start : callable
        ``start(channels, vectors)``: the sums before the block, channel by channel.
    end : callable
        ``end(channels, sums, vectors)``: what becomes of them after it.
    fetch : callable
        ``fetch(channels)``, which is a callable as well: fetch what `end` will need for them, some rows later.
    by_twos : bool
        Whether the weights of two nonzeros come by one load, see `loads_two_weights`.
    short : bool
        Whether offsets are elements, in 16 bits, and not bytes, in 32.
    """

    f: Function
    channels: int
    sets: int
    parts: list[range]
    start: Callable[[list[Value], range], list[Value]]
    end: Callable[[list[Value], list[Value], range], None]
    fetch: Callable[[Callable[[], list[Value]]], None]
    by_twos: bool = False
    short: bool = False

    @property
    def _offset_bytes(self) -> int:
        return 2 if self.short else 4

    def run(self, *, partners: bool) -> None:
        """All rows of the block: those that stand alone, then, if there are any, the partners."""
        f = self.f
        block = f.arguments[0]
        rows, places, weights = (f.field(block, BLOCK, name, PTR) for name in ("rows", "offsets", "weights"))
        begin = [places, weights, rows, *self._offsets(places, OFFSETS_AHEAD, 0)]
        alone = f.field(block, BLOCK, "n_groups")
        if not partners:
            f.loop(alone, self._rows_of_one_length, begin)
            return
        carried = f.loop(alone, self._rows_without_partner, begin)
        f.loop(f.b.add(alone, f.field(block, BLOCK, "n_pair_groups")), self._partners, carried, alone)

    # ---- groups of rows

    def _group(self, index: Value) -> list[Value]:
        """{columns that two rows share, turns, rows or pairs of them}, see `BLOCK`."""
        f = self.f
        groups = f.field(f.arguments[0], BLOCK, "groups", PTR)
        group = f.at(groups, f.b.mul(index, I64(_GROUP_BYTES)))
        return [f.b.zext(f.load(group, I32, 4 * i), I64) for i in range(3)]

    def _rows_of_one_length(self, index: Value, *carried: Value) -> list[Value]:
        b = self.f.b
        _, turns, n_rows = self._group(index)
        if self.sets > 1:  # a turn is a nonzero for each set
            return self._all(n_rows, 1, partial(self._add_row, turns, self.sets), carried)
        # Two nonzeros at a time; an odd one is taken before them, since rows of one set are not filled up.
        half, is_odd = b.lshr(turns, I64(1)), b.trunc(turns, I1)
        return self.f.either(
            is_odd,
            lambda: self._all(n_rows, 1, partial(self._add_row, half, 2, odd=True), carried),
            lambda: self._all(n_rows, 1, partial(self._add_row, half, 2), carried),
        )

    def _rows_without_partner(self, index: Value, *carried: Value) -> list[Value]:
        """They are few: a loop over single nonzeros, which is less code, will do."""
        _, turns, n_rows = self._group(index)
        return self._all(n_rows, 1, partial(self._add_row, turns, 1), carried)

    def _partners(self, index: Value, *carried: Value) -> list[Value]:
        shared, turns, n_pairs = self._group(index)
        return self._all(n_pairs, 2, partial(self._add_two_rows, shared, turns), carried)

    def _all(
        self, count: Value, rows_at_once: int, add_all: Nonzeros, carried: Sequence[Value]
    ) -> list[Value]:
        return self.f.loop(count, lambda _, *c: self._one(rows_at_once, add_all, *c), carried)

    def _one(
        self, rows_at_once: int, add_all: Nonzeros, places: Value, weights: Value, row: Value, *ahead: Value
    ) -> list[Value]:
        """A row, or two, from the first to the last of its nonzeros."""
        f, n = self.f, self.channels
        for line in range(rows_at_once):
            f.prefetch(places, WEIGHT_PREFETCH_BYTES + CACHE_LINE * line)
        for line in range(n * rows_at_once):
            f.prefetch(weights, WEIGHT_PREFETCH_BYTES * n + CACHE_LINE * line)

        def channels_from(first: int) -> list[Value]:
            numbers = [f.b.sext(f.load(row, I32, 4 * (first + r)), I64) for r in range(rows_at_once)]
            return [f.b.add(number, I64(c)) if c else number for number in numbers for c in range(n)]

        channels = channels_from(0)
        self.fetch(lambda: channels_from(ROWS_AHEAD))
        begin: list[Value] = [places, weights, *ahead]
        after: list[Value] = []
        for vectors in self.parts:
            if after:  # the same nonzeros again
                begin[2:] = self._offsets(places, OFFSETS_AHEAD, 0)
            sums = self.start(channels, vectors)
            more_sets = [f.constant(0.0)] * (len(sums) * (self.sets - 1))
            after = add_all(vectors, [*begin, *sums, *more_sets])
            self.end(channels, f.add_in_pairs(after[len(begin) :], len(sums)), vectors)
        places, weights, *ahead_of_next = after[: len(begin)]
        return [places, weights, f.at(row, 4 * rows_at_once), *ahead_of_next]

    # ---- nonzeros

    def _add_row(
        self, turns: Value, count: int, vectors: range, carried: list[Value], *, odd: bool = False
    ) -> list[Value]:
        """The nonzeros of a row, `count` of them in each turn."""
        if odd:
            carried = self._add(vectors, [range(self.channels)], carried)
        users = [range(self.channels)] * count
        return self.f.loop(turns, lambda _, *c: self._add(vectors, users, list(c)), carried)

    def _add_two_rows(self, shared: Value, turns: Value, vectors: range, carried: list[Value]) -> list[Value]:
        """What two rows share, then one nonzero of each in turn."""
        both, each = [range(2)], [range(1), range(1, 2)]
        carried = self.f.loop(shared, lambda _, *c: self._add(vectors, both, list(c)), carried)
        return self.f.loop(turns, lambda _, *c: self._add(vectors, each, list(c)), carried)

    def _add(self, vectors: range, users: list[range], carried: list[Value]) -> list[Value]:
        """The next ``len(users)`` nonzeros: a load for each vector, and a multiply-add of it for each user.

        ``users[i]`` tells whose sums nonzero i feeds, of the channels that are taken at once: ``range(1)`` the
        only one, or the first; ``range(2)`` both (two of one pattern, or a column that partners share);
        ``range(1, 2)`` the second partner alone. `carried` is what `Nonzeros` tells of. Nonzero i is added to
        set ``i % sets``, so that successive multiply-adds do not wait for each other; `_one` adds the sets up
        at the end of the row.
        """
        f, size = self.f, len(vectors)
        places, weights, *rest = carried
        offsets = [*rest[:OFFSETS_AHEAD], *self._offsets(places, len(users))]
        sums = rest[OFFSETS_AHEAD:]
        n_sums, n_weights = len(sums) // self.sets, 0
        loaded: list[Value] = []
        for i, channels in enumerate(users):
            if not loaded and self.by_twos and i + 1 < len(users):
                loaded = f.two_weights(weights, 4 * n_weights)
            elif not loaded:
                loaded = [f.weight(weights, 4 * (n_weights + c)) for c in range(len(channels))]
            splats, loaded = loaded[: len(channels)], loaded[len(channels) :]
            n_weights += len(channels)
            first = i % self.sets * n_sums
            pointer = f.opaque(f.at(f.arguments[1], offsets[i]))
            for v, vector in enumerate(vectors):
                x = f.read(pointer, f.width * vector)
                for channel, weight in zip(channels, splats, strict=True):
                    at = first + channel * size + v
                    sums[at] = f.fma(weight, x, sums[at])
        return [
            f.at(places, self._offset_bytes * len(users)),
            f.at(weights, 4 * n_weights),
            *offsets[len(users) :],
            *sums,
        ]

    def _offsets(self, places: Value, count: int, first: int = OFFSETS_AHEAD) -> list[Value]:
        """`count` offsets in bytes, from number `first` after `places` on, two by one load."""
        f, b, found = self.f, self.f.b, []
        if self.short:
            element = I64(f.element_bytes.bit_length() - 1)
            for i in range(first, first + count // 2 * 2, 2):
                two = f.load(places, I32, 2 * i, 2)
                found += [b.and_(two, I32(0xFFFF)), b.lshr(two, I32(16))]
            if count % 2:
                found.append(f.load(places, I16, 2 * (first + count - 1), 2))
            return [b.shl(b.zext(offset, I64), element) for offset in found]
        for i in range(first, first + count // 2 * 2, 2):
            two = f.load(places, I64, 4 * i)
            found += [b.sext(b.trunc(two, I32), I64), b.ashr(two, I64(32))]
        if count % 2:
            found.append(b.sext(f.load(places, I32, 4 * (first + count - 1)), I64))
        return found


def reference(
    tables: Mapping[str, NDArray[Any]],
    block: NDArray[np.int64],
    operands: NDArray[np.floating],
    base: int,
    sums: NDArray[np.floating],
    unroll: int = 1,
) -> NDArray[np.floating]:
    """The numpy twin: what the loops make of the sums of a tile in one K block, from its packed tables.

    In their order, but with one set of sums for each channel where rows are short (`SparseLoops.sets`).

    Parameters
    ----------
    tables : mapping
        `offsets`, `weights`, `rows` and `groups`, see `BLOCK`: the `tables` of a
        `explorer.inference.pack.PackedConv`.
    block : (fields,) int64
        A row of `BLOCK` with element numbers of these tables in place of addresses: one of its `blocks`.
    operands : (elements,) float32 or float16
        What offsets count from lies in: an image as it lies in memory, or the buffer that operands were copied
        to.
    base : int
        The element that offsets count from.
    sums : (channels, T * lanes), of the same type
        The bias, or what the block before left.
    unroll : int
        Nonzeros of a turn of a row that stands alone, `ConvKernel.unroll`.

    Returns
    -------
    (channels, T * lanes), of the same type
        The sums after the block.
    """
    about = dict(zip(BLOCK.fields, block.tolist(), strict=True))
    offsets, rows, groups = (tables[name][about[name] :] for name in ("offsets", "rows", "groups"))
    channels = tables["weights"].shape[1]  # of a row of weights: 1, or 2 of one pattern
    # A weight has four bytes: it is a float32, or the same float16 twice.
    words = tables["weights"][about["weights"] :].reshape(-1)
    weights = words.view(operands.dtype)[:: 4 // operands.itemsize]
    if offsets.dtype == np.uint16:  # elements
        base, unit = base + about["first_operand"] // operands.itemsize, 1
    else:  # bytes
        unit = operands.itemsize

    sums, width = sums.copy(), sums.shape[1]
    place = weight = row = 0  # what comes next of offsets, weights and rows: no table is gone back in
    for index in range(about["n_groups"] + about["n_pair_groups"]):
        shared, turns, count = groups[index].tolist()
        is_pair = index >= about["n_groups"]
        at_once = 2 if is_pair else 1
        if is_pair:  # what both have, then a nonzero of each in turn
            users = [range(2)] * shared + [range(1), range(1, 2)] * turns
        else:
            users = [range(channels)] * (unroll * turns)
        for _ in range(count):
            mine = [r + c for r in rows[row : row + at_once].tolist() for c in range(channels)]
            row += at_once
            totals = sums[mine]  # registers: T for each channel
            for fed in users:
                at = base + int(offsets[place]) // unit
                x = operands[at : at + width]  # T loads
                place += 1
                for channel in fed:
                    totals[channel] += weights[weight] * x  # T multiply-adds
                    weight += 1
            sums[mine] = totals
    return sums
