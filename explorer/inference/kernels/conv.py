"""Convolution of one tile of pixels for many output channels, with sparse or dense weights.

The algorithm in plain words
  A job is one tile (T vectors of neighbouring pixels of one image) times a part of the output channels. The K
  dimension (input channel x kernel tap) is cut into blocks whose operands fit the L1 cache. For each block:
    reach     "direct"   operands are read where they lie: every tap is the input plane, shifted by a constant
                         (layout.py)
              "shift"    the shifted pixels are first copied into an L1 buffer, so that the hot loop loads whole
                         cache lines. Taps whose shifts differ by whole vectors share one copy, a few vectors
                         longer: in rows of whole vectors, 3 copies serve 3 x 3 taps. Where there is no gap
                         between rows, masks zero what a tap would read of the row before or after
              "compact"  the same, and the gaps between image rows are left out (small planes: 4 x 4 pixels are
                         one vector of 16, not two)
              The first two are one kernel: a block that names nothing to copy is read where it lies.
    sparse    for each output channel: T sums in registers; for each nonzero: broadcast the weight, T FMAs with
              a memory operand (small tiles take several nonzeros at once, each with T sums of its own, to keep
              the FMA units busy)
    partners  two output channels at once that share some of their operands: 2 x T sums; T loads of what they
              share serve 2 x T FMAs, then one operand of each in turn
    code      each nonzero is an instruction of a program that is made for these weights, see conv_code.py
              (AVX-512)
    pairs     two neighbouring output channels whose nonzeros stand in the same places: as if they were one,
              with two weights for each nonzero
    dense     for each group of R output channels: R x T sums in registers; for each k: T loads serve R x T FMAs
  Where registers are few, pairs and groups take a tile in parts, one after the other: S of its vectors, and
  R x S sums, at once. The loops over nonzeros are in conv_sparse.py. The first block starts from the bias, the
  last adds the residual, if there is one, clamps (ReLU, ReLU6) or applies another activation, and zeroes the
  gaps between image rows where a mask asks for it. Whether there is a residual, and a mask, is decided at run
  time, once a row, from fields of the table (0: there is none): kernels of their own would be four times as
  many to compile.

Numpy twins: `reference` is the convolution by its definition; `reference_tile` is one job of the sparse kernel,
in the order of its loops; those of conv_sparse.py and conv_code.py read one block as their loops and programs
do. The tables are those of conv_tables.py.

The register tile and the K blocks follow Elsen et al., "Fast Sparse ConvNets" (2020), and Park et al., "Faster
CNNs with Direct Sparse Convolutions and Guided Pruning" (2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.activations import Activation
from explorer.inference.kernels import conv_code
from explorer.inference.kernels.activation import apply_or_clamp
from explorer.inference.kernels.builder import (
    CACHE_LINE,
    F32,
    I32,
    I64,
    NULL,
    PTR,
    VOID,
    Function,
    Value,
)
from explorer.inference.kernels.conv_sparse import SparseLoops, loads_two_weights
from explorer.inference.kernels.conv_tables import (
    ARGUMENTS,
    BLOCK,
    BUFFER_BYTES,
    FIRST_BLOCK,
    LAST_BLOCK,
    MASKED_SOURCE,
    SOURCE,
    WEIGHT_PREFETCH_BYTES,
)
from explorer.inference.kernels.registers import dense_parts, pair_parts, unroll
from explorer.inference.native import Isa


@dataclass(frozen=True, slots=True)
class ConvKernel:
    """Everything that the machine code of a convolution depends on.

    Attributes
    ----------
    tile : int
        Vectors of pixels in a tile (T).
    dense_rows : int
        Output channels that share their operand loads (R); 0 for the sparse kernel.
    remainder : int
        Output channels of the last, smaller group (dense only).
    columns, pitch, plane : int
        Where gaps between image rows are left out ("compact"): pixels in an image row, elements from one row to
        the next, and vectors of the plane with its gaps. `tile` counts vectors without gaps.
    activation : Activation or None
        Applied last, instead of the clamp.
    pairs : bool
        Whether the sparse kernel takes two output channels as one.
    partners : bool
        Whether the sparse kernel takes output channels that share operands two at a time.
    code : bool
        Whether the nonzeros are programs of their own, see `conv_code`.
    masked : bool
        Whether what lies beyond the ends of rows is zeroed while it is copied ("shift"): where rows have no gaps.
    capped : bool
        Whether there is a greatest value (ReLU6): where nonzeros are few, a bound that is none costs time too.
    short : bool
        Whether the sparse kernel's offsets have 16 bits.
    """

    tile: int
    dense_rows: int = 0
    remainder: int = 0
    columns: int = 0
    pitch: int = 0
    plane: int = 0
    activation: Activation | None = None
    pairs: bool = False
    partners: bool = False
    capped: bool = True
    code: bool = False
    masked: bool = False
    short: bool = False

    @property
    def compact(self) -> bool:
        """Whether the gaps between image rows are left out."""
        return self.plane > 0

    @property
    def channels(self) -> int:
        """Output channels of a row of sparse weights."""
        return 2 if self.pairs else 1

    @property
    def finishes_itself(self) -> bool:
        """Whether programs add the residual and clamp, with nothing left to do for this kernel."""
        return self.code and not self.compact and self.activation is None

    @property
    def unroll(self) -> int:
        """Nonzeros that the sparse kernel takes at once, see `unroll`; partners have sums enough as they are."""
        return 1 if self.partners else unroll(self.tile * self.channels)

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        return ConvGenerator(self, isa).module()

    def scratch_bytes(self, n_channels: int, isa: Isa) -> int:
        """Bytes of scratch that a job needs: the copied operands, then the sums, (n_channels, T * lanes) values."""
        return BUFFER_BYTES + n_channels * self.tile * isa.width + 256


def _by_channel(channels: int, values: list[Value]) -> list[list[Value]]:
    """What is carried in one list, channel after channel."""
    n = len(values) // channels
    return [values[i * n : (i + 1) * n] for i in range(channels)]


class ConvGenerator:
    """Writes the kernel; `winograd` uses its loops over groups of output channels."""

    def __init__(self, kernel: ConvKernel, isa: Isa) -> None:
        self.k, self.isa = kernel, isa
        self.ir = ir.Module("convolution")
        self.width = isa.width
        self.row_bytes = self.width * kernel.tile
        self._all = range(kernel.tile)

    def module(self) -> tuple[Value, str]:
        k = self.k
        if k.dense_rows:
            inner = [self._dense(k.dense_rows)]
            if k.remainder:
                inner.append(self._dense(k.remainder))
        else:
            inner = [self._code() if k.code else self._sparse()]
        self._job(inner)
        return self.ir, "convolution"

    # ---- pieces shared by the sparse and the dense inner kernel

    def _inner(self, name: str) -> Function:
        """An inner kernel, which takes one K block of one job to its end.

        Its arguments: block (a row of `BLOCK`), operands (what offsets count from), sums ((channels, T * lanes)
        values of the scratch memory), bias ((channels,) numbers of four bytes), out and residual (the tile's
        first pixel in channel 0; residual is null for none), out_plane and residual_plane (bytes from one
        channel to the next), mask ((T * lanes,) integers of this tile, null for none), low and high (float32).
        """
        f = Function(self.ir, name, VOID, [PTR, PTR, PTR, PTR, PTR, I64, PTR, I64, PTR, F32, F32], self.isa)
        f.native.linkage = "internal"
        # The output is not among them: it may be where the residual is.
        for argument in (0, 1, 2, 3, 8):
            f.native.args[argument].add_attribute("noalias")
        return f

    def _vectors(
        self, f: Function, pointer: Value, align: int | None, which: range | None = None
    ) -> list[Value]:
        return [f.read(pointer, self.width * i, align) for i in which or self._all]

    def _compact(self, f: Function, plane: list[Value]) -> list[Value]:
        """The pixels of a plane without the gaps between its rows."""
        k = self.k
        pixels = [i for i in range(k.plane * f.lanes) if i % k.pitch < k.columns]
        return f.pick(plane, pixels[: k.tile * f.lanes], k.tile)

    def _spread(self, f: Function, pixels: list[Value]) -> list[Value]:
        """The opposite of `_compact`, with zeros in the gaps."""
        k = self.k
        n = k.tile * f.lanes
        where = [
            i // k.pitch * k.columns + i % k.pitch if i % k.pitch < k.columns else None
            for i in range(k.plane * f.lanes)
        ]
        return f.pick(pixels, [i if i is not None and i < n else None for i in where], k.plane)

    def _finish(
        self, f: Function, channels: list[Value], sums: list[Value], low: Value, high: Value, which: range
    ) -> None:
        """The epilogue of some output channels, for these vectors of the tile.

        Residual, clamp or activation, gap mask, store. `sums`: channel by channel, those of the vectors `which`.
        """
        _, _, _, _, out, out_plane, residual, residual_plane, mask, _, _ = f.arguments
        k, all_of = self.k, range(self.k.plane) if self.k.compact else which
        each = partial(_by_channel, len(channels))

        def added() -> list[Value]:
            lines = [f.at(residual, f.b.mul(channel, residual_plane)) for channel in channels]
            more = [self._vectors(f, line, self.width, all_of) for line in lines]
            more = [self._compact(f, plane) for plane in more] if k.compact else more
            return [f.b.fadd(s, r) for s, r in zip(sums, chain(*more), strict=True)]

        def kept() -> list[Value]:
            masks = [f.read_mask(mask, self.width * i) for i in all_of]
            return [f.keep(s, m) for values in each(sums) for s, m in zip(values, masks, strict=True)]

        # One question for the channels together: each is a branch.
        sums = f.either(f.is_there(residual), added, lambda: sums)
        sums = [apply_or_clamp(k.activation, f, s, low, high, capped=k.capped) for s in sums]
        sums = [s for values in each(sums) for s in self._spread(f, values)] if k.compact else sums
        sums = f.either(f.is_there(mask), kept, lambda: sums)
        for channel, values in zip(channels, each(sums), strict=True):
            to = f.at(out, f.b.mul(channel, out_plane))
            for i, value in zip(all_of, values, strict=True):
                f.write(value, to, self.width * i, self.width)

    def _is(self, f: Function, stage: int) -> Value:
        """Whether this block is the first, or the last, of its part.

        The same for all rows, so that the branch costs next to nothing.
        """
        flags = f.b.and_(f.field(f.arguments[0], BLOCK, "stage"), I64(stage))
        return f.b.icmp_signed("!=", flags, I64(0))

    def _start(self, f: Function, is_first: Value, channels: list[Value], which: range) -> list[Value]:
        """The sums of some channels, for these vectors of the tile, at the beginning of a block.

        In the first block they are the bias, later what the block before left.
        """
        _, _, sums, bias, *_ = f.arguments

        def from_bias() -> list[Value]:
            values = [f.weight(bias, f.b.mul(c, I64(4))) for c in channels]
            return [value for value in values for _ in which]

        def from_sums() -> list[Value]:
            rows = [f.at(sums, f.b.mul(c, I64(self.row_bytes))) for c in channels]
            return [value for row in rows for value in self._vectors(f, row, self.width, which)]

        return f.either(is_first, from_bias, from_sums)

    def _end(
        self, f: Function, is_last: Value, channels: list[Value], totals: list[Value], which: range
    ) -> None:
        """Finish the channels, or leave their sums to the block that follows."""
        *_, low, high = f.arguments
        mine = _by_channel(len(channels), totals)
        with f.b.if_else(is_last) as (yes, no):
            with yes:
                low, high = f.splat_float(low), f.splat_float(high)
                if self.k.dense_rows:  # the addresses of so many would not fit the registers
                    for channel, values in zip(channels, mine, strict=True):
                        self._finish(f, [channel], values, low, high, which)
                else:
                    self._finish(f, channels, totals, low, high, which)
            with no:
                self._leave(f, channels, totals, which)

    def _leave(self, f: Function, channels: list[Value], totals: list[Value], which: range) -> None:
        """Store the sums of some channels, for what follows."""
        sums = f.arguments[2]
        for channel, values in zip(channels, _by_channel(len(channels), totals), strict=True):
            to = f.at(sums, f.b.mul(channel, I64(self.row_bytes)))
            for i, value in zip(which, values, strict=True):
                f.write(value, to, self.width * i, self.width)

    def _fetch(self, f: Function, channels: list[Value]) -> None:
        """Fetch the cache lines that `_finish` will read and write for these channels."""
        _, _, _, _, out, out_plane, residual, residual_plane, *_ = f.arguments
        is_there = f.is_there(residual)
        where, plane = f.b.select(is_there, residual, out), f.b.select(is_there, residual_plane, out_plane)
        for channel in channels:
            line = f.at(where, f.b.mul(channel, plane))
            for offset in range(0, self.row_bytes, max(self.width, CACHE_LINE)):
                f.prefetch(line, offset)

    def _parts(self, n_rows: int) -> list[range]:
        """The vectors that so many output channels take at once, part by part.

        What lies "compact" is spread out as a whole, and is taken so.
        """
        k = self.k
        sizes: tuple[int, ...] = (k.tile,)
        if not k.compact and (k.dense_rows or k.pairs):
            sizes = pair_parts(k.tile, self.isa) if k.pairs else dense_parts(k.tile, n_rows, self.isa)
        return [range(last - size, last) for size, last in zip(sizes, accumulate(sizes), strict=True)]

    # ---- sparse

    def _sparse(self) -> str:
        name = "sparse"
        f, k = self._inner(name), self.k
        is_first, is_last = self._is(f, FIRST_BLOCK), self._is(f, LAST_BLOCK)

        def fetch(channels: Callable[[], list[Value]]) -> None:
            with f.b.if_then(is_last):
                self._fetch(f, channels())

        SparseLoops(
            f,
            k.channels,
            k.unroll,
            self._parts(k.channels),
            partial(self._start, f, is_first),
            partial(self._end, f, is_last),
            fetch,
            loads_two_weights(self.isa, k.channels),
            k.short,
        ).run(partners=k.partners)
        f.b.ret_void()
        return name

    # ---- sparse, as code

    def _code(self) -> str:
        name = "code"
        f, k = self._inner(name), self.k
        is_last = self._is(f, LAST_BLOCK)
        _, _, sums, *_, low, high = f.arguments

        def end(first: Value, count: Value) -> None:
            def one_channel(channel: Value) -> None:
                row = f.at(sums, f.b.mul(channel, I64(self.row_bytes)))
                bounds = f.splat_float(low), f.splat_float(high)
                self._finish(f, [channel], self._vectors(f, row, self.width), *bounds, self._all)

            with f.b.if_then(is_last):
                f.loop(f.b.add(first, count), one_channel, start=first)

        conv_code.run_programs(f, k.tile, self.row_bytes, None if k.finishes_itself else end)
        f.b.ret_void()
        return name

    # ---- dense

    def _dense(self, n_rows: int) -> str:
        """`n_rows` channels at once."""
        name = f"dense_{n_rows}"
        f, k = self._inner(name), self.k
        b = f.b
        block, operands = f.arguments[:2]
        is_first, is_last = self._is(f, FIRST_BLOCK), self._is(f, LAST_BLOCK)
        depth, offsets = f.field(block, BLOCK, "depth"), f.field(block, BLOCK, "offsets", PTR)
        weights = f.field(block, BLOCK, "weights", PTR)
        is_rest = n_rows == k.remainder and n_rows != k.dense_rows
        groups = f.field(block, BLOCK, "has_remainder" if is_rest else "n_groups")
        first_channel = f.field(block, BLOCK, "first_channel")
        parts = self._parts(n_rows)
        if is_rest:
            done = f.field(block, BLOCK, "n_groups")
            first_channel = b.add(first_channel, b.mul(done, I64(k.dense_rows)))
            weights = f.at(weights, b.mul(b.mul(done, depth), I64(4 * k.dense_rows)))

        def one_group(index: Value, weight: Value) -> list[Value]:
            channel = b.add(first_channel, b.mul(index, I64(n_rows)))
            channels = [b.add(channel, I64(r)) for r in range(n_rows)]
            end = weight
            for which in parts:
                start = self._start(f, is_first, channels, which)
                end, _, *totals = f.loop(depth, partial(one_k, which), [weight, offsets, *start])
                self._end(f, is_last, channels, totals, which)
            return [end]

        def one_k(which: range, _: Value, weight: Value, offset: Value, *totals: Value) -> list[Value]:
            """One k for some vectors of the tile."""
            if which.start == 0:
                f.prefetch(weight, WEIGHT_PREFETCH_BYTES)
            pointer = f.opaque(f.at(operands, b.sext(f.load(offset, I32), I64)))

            def load_x(i: int) -> Value:
                return f.read(pointer, self.width * which[i])

            def load_w(r: int) -> Value:
                return f.weight(weight, 4 * r)

            new = f.add_products(totals, (n_rows, len(which)), load_w, load_x)
            return [f.at(weight, 4 * n_rows), f.at(offset, 4), *new]

        f.loop(groups, one_group, [weights])
        b.ret_void()
        return name

    # ---- one job

    def _pack(self, f: Function, block: Value, x: Value, buffer: Value, edges: Value) -> None:
        """Operands of one K block into the L1 buffer, source by source; `edges`: the masks of this tile, if any."""
        sources = f.field(block, BLOCK, "sources", PTR)
        step = 8 * (MASKED_SOURCE if self.k.masked else SOURCE)

        def shifted(_: Value, source: Value, to: Value) -> list[Value]:
            pointer = f.opaque(f.at(x, f.load(source, I64, 0, 8)))
            extra = f.load(source, I64, 8, 8)
            mask = f.at(edges, f.load(source, I64, 16, 8)) if self.k.masked else edges

            def copy(pointer: Value, to: Value, mask: Value, offset: int) -> None:
                value = f.read(pointer, offset)
                value = f.keep(value, f.read_mask(mask, offset)) if self.k.masked else value
                f.write(value, to, offset, self.width)

            for i in self._all:
                copy(pointer, to, mask, self.width * i)

            def one_more(_: Value, pointer: Value, to: Value, mask: Value) -> list[Value]:
                copy(pointer, to, mask, 0)
                return [f.at(pointer, self.width), f.at(to, self.width), f.at(mask, self.width)]

            start = [f.at(place, self.row_bytes) for place in (pointer, to, mask)]
            _, to, _ = f.loop(extra, one_more, start)
            return [f.at(source, step), to]

        def compacted(_: Value, source: Value, to: Value) -> list[Value]:
            pointer = f.opaque(f.at(x, f.load(source, I64, 0, 8)))
            for i, value in enumerate(self._compact(f, self._vectors(f, pointer, None, range(self.k.plane)))):
                f.write(value, to, self.width * i, self.width)
            return [f.at(source, step), f.at(to, self.row_bytes)]

        body = compacted if self.k.compact else shifted
        f.loop(f.field(block, BLOCK, "n_sources"), body, [sources, buffer])

    def _job(self, inner: list[str]) -> None:
        f = Function(self.ir, "convolution", VOID, [PTR, I64, PTR], self.isa)
        b, (args, job, scratch) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        n_parts, tiles = field("parts"), field("tiles")
        # Part by part: a thread that takes half of the jobs reads half of the weights.
        tile, rest = b.srem(job, tiles), b.sdiv(job, tiles)
        part, image = b.srem(rest, n_parts), b.sdiv(rest, n_parts)
        is_last = b.icmp_signed("==", b.add(tile, I64(1)), tiles)
        back = b.select(is_last, field("back"), I64(0))

        def position(tile_bytes: Value) -> Value:
            return b.sub(b.mul(tile, tile_bytes), back)

        def tensor(name: str) -> Value:
            place = b.add(b.mul(image, field(f"{name}_image")), position(field(f"{name}_tile")))
            return f.at(field(name, PTR), place)

        x = tensor("x")
        out = tensor("out")
        residual = b.select(f.is_there(field("residual", PTR)), tensor("residual"), NULL)
        masks = field("mask", PTR)
        mask = b.select(f.is_there(masks), f.at(masks, position(I64(self.row_bytes))), NULL)
        edges = f.at(field("edges", PTR), position(I64(self.row_bytes))) if self.k.masked else NULL
        low, high = f.to_float(field("low")), f.to_float(field("high"))
        bias, n_blocks = field("bias", PTR), field("n_blocks")
        blocks = f.row(field("blocks", PTR), BLOCK, b.mul(part, n_blocks))
        sums = f.at(scratch, BUFFER_BYTES)

        def one_block(index: Value) -> None:
            block = f.row(blocks, BLOCK, index)
            is_copied = b.icmp_signed("!=", f.field(block, BLOCK, "n_sources"), I64(0))
            operands = b.select(is_copied, scratch, x)
            if self.k.short:
                operands = f.at(operands, f.field(block, BLOCK, "first_operand"))
            self._pack(f, block, x, scratch, edges)

            for name in inner:
                b.call(
                    self.ir.globals[name],
                    [
                        block, operands, sums, bias, out, field("out_plane"), residual, field("residual_plane"), mask, low, high,
                    ],
                )  # fmt: skip

        f.loop(n_blocks, one_block)
        b.ret_void()


def reference(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> NDArray[np.float32]:
    """The numpy twin of all kernels of convolutions: by its definition, in float64.

    Parameters
    ----------
    x : (N, C, H, W) float32
    weight : (M, C / groups, KH, KW) float32
    bias : (M,) float32
    stride, padding, dilation : (int, int)
        Rows and columns.
    groups : int

    Returns
    -------
    (N, M, OH, OW) float32
    """
    n, _, h, w = x.shape
    m, cg, kh, kw = weight.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    oh = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out = np.zeros((n, m, oh, ow)) + bias.astype(np.float64)[None, :, None, None]
    for o in range(m):
        group = o // (m // groups)
        for c in range(cg):
            for i in range(kh):
                for j in range(kw):
                    rows = slice(i * dilation[0], i * dilation[0] + (oh - 1) * stride[0] + 1, stride[0])
                    columns = slice(j * dilation[1], j * dilation[1] + (ow - 1) * stride[1] + 1, stride[1])
                    out[:, o] += float(weight[o, c, i, j]) * padded[:, group * cg + c, rows, columns]
    return out.astype(np.float32)


def reference_tile(
    x: NDArray[np.float32],
    offsets: NDArray[np.int64],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    start: int,
    width: int,
    block: int,
) -> NDArray[np.float32]:
    """The numpy twin of one job of the sparse kernel, in its order: one tile, all output channels, reach "direct".

    Parameters
    ----------
    x : (elements,) float32
        One image as it lies in memory, all planes and zeros one after another, see layout.py.
    offsets : (K,) int64
        For each k = (input channel, tap) the element of `x` that element 0 of a plane of the result reads.
        Element p reads what lies p further, since every tap is the input plane shifted by a constant.
    weight : (M, K) float32
    bias : (M,) float32
    start : int
        Element of the planes that the tile begins with.
    width : int
        Elements of a tile: T vectors of so many lanes.
    block : int
        Operands of a K block.

    Returns
    -------
    (M, width) float32
        Elements [start, start + width) of the planes of the result. What stands in gaps between rows is no pixel.
    """
    sums = np.repeat(bias[:, None], width, 1)  # scratch memory
    for first in range(0, len(offsets), block):  # what these operands read of x stays in the L1 cache
        for channel, row in enumerate(weight[:, first : first + block]):
            total = sums[channel]  # T registers
            for k in np.flatnonzero(row):
                at = start + offsets[first + k]
                total = total + row[k] * x[at : at + width]  # T loads, T multiply-adds
            sums[channel] = total
    return sums
