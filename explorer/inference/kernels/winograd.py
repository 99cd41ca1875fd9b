"""Dense convolution, four rows at a time, with half of the multiplications: Winograd's minimal filtering.

The algorithm in plain words
  Of one column of pixels, four results need N = R + 3 pixels, where the filter has R rows:
  ``y[j] = sum of g[k] d[j + k]``, 4 R products. But filter and results are the coefficients of polynomials, and
  so many values in N points determine a product of polynomials: N products are enough.
    input      V[i] = sum of B[i, k] d[k]        N sums of rows, once for all output channels
    products   M[i] = sum over K of U[i] V[i]    K: input channel x tap of a row; N products in place of 4 R.
                                                 U[i] = sum of G[i, k] g[k] is computed when weights are packed
    output     y[j] = sum of A[j, i] M[i]
  Along the rows nothing changes: each tap of a row reads V shifted by a constant, as in conv.py, whose loops
  over groups of output channels do the products. The phases of a strided convolution, whose filters have R rows
  or fewer, share their sums.

  A job is four rows of a tile (T vectors of neighbouring columns) of one image, times some pieces of the output
  channels. What it adds up for a piece, and mostly V too, stays in the L1 cache. Its loops:
    for each K block of the input channels:
      transform: N rows of V of each of its planes, to scratch
      for each piece of the output channels:
        for each of the N points: the dense kernel of conv.py adds its products to the sums of this point
        after the last block: four rows of results of the N sums (A), residual, activation, store

  What is infinite or no number would spread to all four results (inf - inf is NaN): a job that meets some
  computes its results by the definition. To notice it, each pixel times zero is added up.

Only one of the two dimensions is transformed: rows are vectors, so that sums of rows need no shuffles, and the
error stays near that of adding in order. (Of its largest value a sum of 42 products has an error of 1.3e-7 with
R = 4 and of 0.8e-7 with R = 3, where adding in order has 0.6e-7.)

The numpy twin is `reference`; the matrices A, G and B are those of `explorer.inference.winograd.transforms`.

Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks" (2016), in two dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from explorer.inference.activations import Activation
from explorer.inference.kernels.activation import apply_or_clamp
from explorer.inference.kernels.builder import F32, I64, NULL, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.conv import ConvGenerator, ConvKernel
from explorer.inference.kernels.conv_tables import BLOCK, SOURCE
from explorer.inference.native import Isa
from explorer.inference.winograd import ROWS, transforms

ARGUMENTS = Record(
    (
        "x", "x_image", "x_pitch", "x_rows", "top", "out", "out_image", "out_pitch", "out_plane", "residual",
        "residual_image", "residual_plane", "rows", "bias", "low", "high", "chunks", "starts", "tiles",
        "parts", "pieces_per_part", "pieces", "piece", "channels", "zeros", "places", "step", "sums",
        "piece_bytes", "blocks", "n_blocks", "weights", "reads", "n_reads",
    )
)  # fmt: skip
"""One convolution of x (images, C, plane) to out (images, channels, plane), float32. Job = (image, part, tile),
the tile changes fastest; tiles are numbered (four rows, chunk).

x                   the first column that the filter reads for pixel 0 of the result
x_pitch             bytes from one row to the next
x_rows, top         rows that there are of x, and rows from a row of the result to the first that it reads:
                    above row 0 and below the last of them stand zeros
out_pitch           bytes from one row to the next; in tiles, bytes of `places` that belong to a row
residual            (images, channels, plane), which lies as the result does
rows, channels      of the result
bias                (channels,) float32
chunks              tiles that a row is cut into
starts              (chunks,) int64: bytes from a row's first pixel to each of them
tiles, parts        of an image: tiles of four rows, parts of the output channels
pieces, piece       of the output channels: how many pieces, and channels of a piece (the last may be smaller)
pieces_per_part     pieces of a job
zeros               as many zero bytes as a transformed row has, or 4 * piece if that is more: for rows that are
                    not there, and for the bias at points other than `_BIAS_AT`
places              (rows, chunks, T) rows of PLACE, of a result in tiles: where each vector goes
step, sums          bytes of scratch memory from V[i] to V[i + 1], and from V[0] to the sums
piece_bytes         from the sums of one piece, (N, piece, T * lanes) float32, to those of the next
blocks              (n_blocks, pieces, N) rows of `conv_tables.BLOCK`; the `sources` of a block, those of its
                    first row, are the planes that are transformed
weights             (channels, n_reads) float32: the filter as it is
reads               (n_reads,) rows of READ: what each of these weights is multiplied with
"""


PLACE = Record(("first", "second", "count"))
"""Where a vector of the result goes.

first     bytes from the channel's first pixel to where the first `count` elements of the vector begin
second    bytes to where the vector would begin of which the others are the end: they lie in the next tile
count     elements, all `lanes` where one tile holds the vector
"""

READ = Record(("offset", "row"))
"""What a weight is multiplied with.

offset    bytes from the tile's first pixel to the plane and column
row       rows below the first that a row of the result reads
"""

_BIAS_AT = 1
"""The point at which the value of every polynomial is the sum of its coefficients (1): what is added to its
sums is added to all four results."""


@dataclass(frozen=True, slots=True)
class WinogradKernel:
    """What the machine code depends on.

    Attributes
    ----------
    taps : int
        Rows of the filter (R).
    tile : int
        Vectors of a tile (T).
    more : int
        Vectors of a transformed row beyond those of the tile, for the taps of a row.
    dense_rows, remainder : int
        As in `ConvKernel`.
    spare : int
        Columns by which a tile is wider than the result, less than a vector; its last vector is stored over the
        one before it.
    residual : bool
        Whether a residual is added. It lies as the result does.
    tiled : bool
        Whether the result lies in tiles.
    activation : Activation or None
        Applied last, instead of the clamp.
    capped : bool
        Whether there is a greatest value.
    """

    taps: int
    tile: int
    more: int
    dense_rows: int
    remainder: int = 0
    spare: int = 0
    residual: bool = False
    tiled: bool = False
    activation: Activation | None = None
    capped: bool = True

    @property
    def points(self) -> int:
        """Products for each column of four results (N)."""
        return self.taps + ROWS - 1

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        return _Generator(self, isa).module()

    def plane_bytes(self, isa: Isa) -> int:
        """Bytes of one transformed row of a plane."""
        return (self.tile + self.more) * isa.width

    def channel_bytes(self, isa: Isa) -> int:
        """Bytes of one of the N sums of an output channel."""
        return self.tile * isa.width


class _Generator(ConvGenerator):
    """The loops over groups of output channels are those of `conv`; what they leave is finished here."""

    def __init__(self, kernel: WinogradKernel, isa: Isa) -> None:
        super().__init__(ConvKernel(kernel.tile, kernel.dense_rows, kernel.remainder), isa)
        self.own = kernel
        self.results, _, self.values = transforms(kernel.taps)

    def _end(self, f: Function, _: Value, channels: list[Value], totals: list[Value], which: range) -> None:
        """All sums stay in memory."""
        self._leave(f, channels, totals, which)

    def _combine(self, f: Function, factors: Sequence[float], values: Sequence[Value]) -> Value:
        """``sum(factor * value)``, in order."""
        total = None
        for factor, value in zip(factors, values, strict=True):
            if factor == 0:
                continue
            if total is None:
                total = value if factor == 1 else f.b.fmul(value, f.constant(factor))
            elif factor == 1:
                total = f.b.fadd(total, value)
            elif factor == -1:
                total = f.b.fsub(total, value)
            else:
                total = f.fma(value, f.constant(factor), total)
        return total

    def _results(self, f: Function, m: list[Value]) -> list[Value]:
        """The four results of N sums.

        The points 1 and -1, the second and third, differ in the sign of odd powers only.
        """
        even, odd = f.b.fadd(m[1], m[2]), f.b.fsub(m[1], m[2])
        return [
            self._combine(f, [row[0], 1.0, *row[3:]], [m[0], odd if j % 2 else even, *m[3:]])
            for j, row in enumerate(self.results.tolist())
        ]

    def _transform(
        self,
        f: Function,
        block: Value,
        rows: list[tuple[Value, Value]],
        zeros: Value,
        step: Value,
        nothing: Value,
    ) -> Value:
        """Leave V of the planes of a K block in scratch memory: (N, planes, T + more vectors).

        `rows`: of each of the N input rows whether it is there, and where, in the plane at 0. Each pixel times
        zero is added to `nothing`, which is returned.
        """
        k, n = self.own, self.own.points
        sources, scratch = f.field(block, BLOCK, "sources", PTR), f.arguments[2]

        def one_plane(_: Value, source: Value, to: Value, nothing: Value) -> list[Value]:
            offset = f.load(source, I64, 0, 8)
            pointers = [f.b.select(there, f.at(row, offset), zeros) for there, row in rows]

            def one_vector(i: Value, nothing: Value) -> list[Value]:
                at = f.b.mul(i, I64(self.width))
                pixels = [f.read(pointer, at) for pointer in pointers]
                for j in range(n):
                    value = self._combine(f, self.values[j].tolist(), pixels)
                    f.write(value, f.at(to, f.b.mul(I64(j), step)), at, self.width)
                return [reduce(lambda total, pixel: f.fma(pixel, f.constant(0.0), total), pixels, nothing)]

            [nothing] = f.loop(I64(k.tile + k.more), one_vector, [nothing])
            return [f.at(source, 8 * SOURCE), f.at(to, k.plane_bytes(self.isa)), nothing]

        count = f.field(block, BLOCK, "n_sources")
        return f.loop(count, one_plane, [sources, scratch, nothing])[2]

    def _finish_piece(self) -> None:
        """Results of one piece.

        The arguments of this function: sums ((N, piece, T * lanes) float32), sums_step (bytes from one point to
        the next), channels (how many of the piece there are), out and residual (the tile's first pixel in the
        piece's first channel; in tiles that channel's first pixel), out_pitch, out_plane and residual_plane (as
        in `ARGUMENTS`), places (the row of PLACE of the tile's first vector), rows (of the result, from this
        one on), low and high (float32).
        """
        k, width, n = self.own, self.width, self.own.points
        f = Function(
            self.ir,
            "finish",
            VOID,
            [PTR, I64, I64, PTR, I64, I64, PTR, I64, PTR, I64, F32, F32],
            self.isa,
        )
        f.native.linkage = "internal"
        b = f.b
        sums, sums_step, channels, out, pitch, plane, residual, residual_plane, places, rows, low, high = (
            f.arguments
        )
        low, high = f.splat_float(low), f.splat_float(high)
        last = width * k.tile - f.element_bytes * k.spare - width

        def one_channel(_: Value, mine: Value, to: Value, more: Value) -> list[Value]:
            def one_vector(i: Value) -> None:
                at = f.minimum(b.mul(i, I64(width)), I64(last))
                m = [f.read(f.at(mine, b.mul(I64(j), sums_step)), at) for j in range(n)]
                for j, value in enumerate(self._results(f, m)):
                    with b.if_then(b.icmp_signed("<", I64(j), rows)):
                        self._store(f, value, b.mul(I64(j), pitch), at, i, to, more, places, low, high)

            f.loop(I64(k.tile), one_vector)
            return [f.at(mine, self.row_bytes), f.at(to, plane), f.at(more, residual_plane)]

        f.loop(channels, one_channel, [sums, out, residual])
        b.ret_void()

    def _define_piece(self) -> None:
        """Results of one piece by the definition.

        The arguments of this function: those of the kernel, x (the tile's first pixel in row 0), first (the row
        of x to start from), channel (the piece's first), and channels, out, residual, places, rows, low and
        high as above.
        """
        k, width = self.own, self.width
        f = Function(
            self.ir, "define", VOID, [PTR, PTR, I64, I64, I64, PTR, PTR, PTR, I64, F32, F32], self.isa
        )
        f.native.linkage = "internal"
        b = f.b
        args, x, first, channel, channels, out, residual, places, rows, low, high = f.arguments
        low, high = f.splat_float(low), f.splat_float(high)

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        n_reads, pitch, x_rows = field("n_reads"), field("x_pitch"), field("x_rows")
        zeros, bias, out_pitch = field("zeros", PTR), field("bias", PTR), field("out_pitch")
        last = width * k.tile - f.element_bytes * k.spare - width

        def one_channel(c: Value, to: Value, more: Value) -> list[Value]:
            number = b.add(channel, c)
            constant = f.weight(bias, b.mul(number, I64(4)))
            weights = f.at(field("weights", PTR), b.mul(number, b.mul(n_reads, I64(4))))

            def one_row(j: Value) -> None:
                def one_vector(i: Value) -> None:
                    at = f.minimum(b.mul(i, I64(width)), I64(last))

                    def one_weight(index: Value, total: Value) -> list[Value]:
                        read = f.row(field("reads", PTR), READ, index)
                        row = b.add(b.add(first, j), f.field(read, READ, "row"))
                        line = f.at(f.at(x, f.field(read, READ, "offset")), b.add(b.mul(row, pitch), at))
                        pixels = f.read(b.select(_is_there(f, row, x_rows), line, zeros))
                        return [f.fma(f.weight(weights, b.mul(index, I64(4))), pixels, total)]

                    [total] = f.loop(n_reads, one_weight, [constant])
                    self._store(f, total, b.mul(j, out_pitch), at, i, to, more, places, low, high)

                f.loop(I64(k.tile), one_vector)

            f.loop(f.minimum(rows, I64(ROWS)), one_row)
            return [f.at(to, field("out_plane")), f.at(more, field("residual_plane"))]

        f.loop(channels, one_channel, [out, residual])
        b.ret_void()

    def _store(
        self,
        f: Function,
        value: Value,
        below: Value,
        at: Value,
        i: Value,
        to: Value,
        more: Value,
        places: Value,
        low: Value,
        high: Value,
    ) -> None:
        """The end of vector `i` of the tile: residual, activation, store.

        It lies `at` bytes from the tile's beginning, in the row that lies `below` bytes from its first (or in
        the table of places).
        """
        k, b = self.own, f.b
        if k.residual:
            value = b.fadd(value, f.read(more, b.add(below, at)))
        value = apply_or_clamp(k.activation, f, value, low, high, capped=k.capped)
        if k.tiled:
            self._write_to_tiles(f, value, to, f.row(f.at(places, below), PLACE, i))
        else:
            f.write(value, to, b.add(below, at))

    @staticmethod
    def _write_to_tiles(f: Function, value: Value, to: Value, place: Value) -> None:
        """Store a vector of a channel that begins at `to`, of which a part may lie in the next tile."""
        b = f.b
        first, second, count = (f.field(place, PLACE, name) for name in PLACE.fields)
        with b.if_else(b.icmp_signed("==", count, I64(f.lanes))) as (together, apart):
            with together:
                f.write(value, to, first)
            with apart:
                in_first = f.first_lanes(count)
                f.store_where(in_first, value, to, first)
                f.store_where(b.not_(in_first), value, to, second)

    def _job(self, inner: list[str]) -> None:
        self._finish_piece()
        self._define_piece()
        k, n = self.own, self.own.points
        f = Function(self.ir, "convolution", VOID, [PTR, I64, PTR], self.isa)
        b, (args, job, scratch) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        n_parts, tiles, chunks = field("parts"), field("tiles"), field("chunks")
        tile, rest = b.srem(job, tiles), b.sdiv(job, tiles)
        part, image = b.srem(rest, n_parts), b.sdiv(rest, n_parts)
        row, chunk = b.mul(b.sdiv(tile, chunks), I64(ROWS)), b.srem(tile, chunks)
        start = f.load(field("starts", PTR), I64, b.mul(chunk, I64(8)), 8)

        def tensor(name: str) -> Value:
            return f.at(field(name, PTR), b.mul(image, field(f"{name}_image")))

        pitch, out_pitch, step = field("x_pitch"), field("out_pitch"), field("step")
        first = b.add(row, field("top"))
        x, rows = f.at(tensor("x"), start), []
        for i in range(n):
            mine = b.add(first, I64(i))
            rows.append((_is_there(f, mine, field("x_rows")), f.at(x, b.mul(mine, pitch))))
        below = b.mul(row, out_pitch)
        out, residual, places = tensor("out"), tensor("residual"), field("places", PTR)
        if k.tiled:
            places = f.row(f.at(places, below), PLACE, b.mul(chunk, I64(k.tile)))
        else:
            out, residual = (f.at(pointer, b.add(below, start)) for pointer in (out, residual))
        left = b.sub(field("rows"), row)
        low, high = f.to_float(field("low")), f.to_float(field("high"))
        n_blocks, pieces, piece_size = field("n_blocks"), field("pieces"), field("piece")
        first_piece = b.mul(part, field("pieces_per_part"))
        last_piece = f.minimum(b.add(first_piece, field("pieces_per_part")), pieces)
        all_sums, sums_step = f.at(scratch, field("sums")), b.mul(piece_size, I64(self.row_bytes))

        def one_block(index: Value, nothing: Value) -> list[Value]:
            group = f.row(field("blocks", PTR), BLOCK, b.mul(index, b.mul(pieces, I64(n))))
            is_last = b.icmp_signed("==", b.add(index, I64(1)), n_blocks)
            nothing = self._transform(f, group, rows, field("zeros", PTR), step, nothing)
            total = f.sum_lanes(nothing)
            is_finite = b.fcmp_ordered("==", total, total)

            def one_piece(piece: Value) -> None:
                sums = f.at(all_sums, b.mul(b.sub(piece, first_piece), field("piece_bytes")))
                channel = b.mul(piece, piece_size)
                bias = f.at(field("bias", PTR), b.mul(channel, I64(4)))

                def one_point(i: Value) -> None:
                    block = f.row(group, BLOCK, b.add(b.mul(piece, I64(n)), i))
                    mine = b.select(b.icmp_signed("==", i, I64(_BIAS_AT)), bias, field("zeros", PTR))
                    arguments = [block, f.at(scratch, b.mul(i, step)), f.at(sums, b.mul(i, sums_step)), mine]
                    for name in inner:
                        b.call(
                            self.ir.globals[name],
                            [*arguments, NULL, I64(0), NULL, I64(0), NULL, F32(0), F32(0)],
                        )

                f.loop(I64(n), one_point)
                with b.if_then(is_last):
                    count = f.minimum(piece_size, b.sub(field("channels"), channel))
                    to = f.at(out, b.mul(channel, field("out_plane")))
                    more = f.at(residual, b.mul(channel, field("residual_plane")))
                    with b.if_else(is_finite) as (yes, no):
                        with yes:
                            b.call(
                                self.ir.globals["finish"],
                                [
                                    sums, sums_step, count, to, out_pitch, field("out_plane"), more, field("residual_plane"), places, left, low, high,
                                ],
                            )  # fmt: skip
                        with no:
                            b.call(
                                self.ir.globals["define"],
                                [args, x, first, channel, count, to, more, places, left, low, high],
                            )

            f.loop(last_piece, one_piece, start=first_piece)
            return [nothing]

        f.loop(n_blocks, one_block, [f.constant(0.0)])
        b.ret_void()


def _is_there(f: Function, row: Value, rows: Value) -> Value:
    return f.b.and_(f.b.icmp_signed(">=", row, I64(0)), f.b.icmp_signed("<", row, rows))


def reference(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numpy twin, of one image, at stride one, without padding.

    Parameters
    ----------
    x : (C, H, W) float32
    weight : (M, C, R, KW) float32
        R is 3 or 4.

    Returns
    -------
    (M, H - R + 1, W - KW + 1) float32
    """
    m, _, taps, kw = weight.shape
    a, g, b = (t.astype(np.float32) for t in transforms(taps))
    rows, columns = x.shape[1] - taps + 1, x.shape[2] - kw + 1
    u = np.einsum("nr,mcrk->nmck", g, weight)
    out = np.zeros((m, rows, columns), np.float32)
    for first in range(0, rows, ROWS):
        d = np.zeros((len(b), len(x), x.shape[2]), np.float32)  # rows that are not there are zeros
        mine = x[:, first : first + len(b)]
        d[: mine.shape[1]] = mine.transpose(1, 0, 2)
        v = np.einsum("nd,dcw->ncw", b, d)
        sums = sum(np.einsum("nmc,ncw->nmw", u[..., k], v[..., k : k + columns]) for k in range(kw))
        y = np.einsum("jn,nmw->mjw", a, sums)
        out[:, first : first + ROWS] = y[:, : rows - first]
    return out
