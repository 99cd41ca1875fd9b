"""Depthwise convolution: each channel is filtered on its own.

A channel has kh x kw weights, so that the work is in moving pixels, and the kernel is made to load few of them
twice.

The algorithm in plain words
  Where vectors have 64 or 16 bytes (AVX-512, NEON): for each column of the window, a *column sum*: over the
  rows of the window, weight times the vector of pixels below one another. The result is the sum of the column
  sums, each shifted by its column: a few register shuffles with the vectors before, instead of a misaligned
  load for each tap. Where they have 32 bytes (AVX2, see `loads_taps`): each tap is loaded where it lies, and
  multiplied into one sum. Rows may then be computed two at a time (`pairs`), so that what both need is loaded
  once for both.
  stride 1      one pass over the whole plane as if it were one row, gaps included: they are zero, so that the
                end of a row and the beginning of the next need no care; pairs of rows go row by row
  stride 2      row by row; two vectors are loaded and split by shuffles into pixels of even and of odd columns,
                and the same sums are formed of these. Nothing is copied beforehand.
  The result is a plane, or lies in tiles (see layout.py): then a table tells where each vector of a channel goes.

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.activations import Activation
from explorer.inference.kernels.activation import apply_or_clamp
from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of, place_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "low", "high", "jobs", "channels",
        "channels_per_job", "weights", "bias", "mask", "rows", "vectors", "x_pitch", "x_row", "out_row",
        "places",
    )
)  # fmt: skip
"""Each channel of x (images, channels, plane) to that of out (images, channels, plane). Job = (image, some
channels), see channels.py.

weights          (channels, taps) numbers of four bytes, see `Function.weight`
bias             (channels,) numbers of four bytes
mask             (vectors * lanes,) integers of a row
rows, vectors    of the result: rows, and vectors of a row; of a plane that is taken as one row, 1 and all its
                 vectors
x_pitch          bytes from one row of the input to the next
x_row            bytes from the input of one row of the result to that of the next: the stride's rows
out_row          bytes from one row of the result to the next; in tiles, bytes of `places` that belong to a row
places           (vectors of the plane,) int32, of a result in tiles: bytes from the first of its channel to
                 each vector
"""

_HELD_WEIGHTS = 16
"""More weights than this are broadcast from memory each time, instead of being held in registers."""


@dataclass(frozen=True, slots=True)
class DepthwiseKernel:
    """What the machine code depends on.

    Attributes
    ----------
    taps : tuple of (int, int)
        Rows and columns from an output pixel (times the stride) to each weight's pixel.
    stride : int
        Columns from one output pixel to the next in the input: 1 or 2.
    masked : bool
        Whether there are elements that are no pixels, to be set to zero.
    activation : Activation or None
        Applied last; the clamp when None.
    capped : bool
        Whether there is a greatest value.
    tiled : bool
        Whether the result lies in tiles.
    pairs : bool
        Whether rows are computed two at a time, so that what both need is loaded once (stride 1, where each tap
        is loaded, see `loads_taps`; two rows at least). Of an odd number the last but one is computed twice.
    tail : int
        Lanes of the last vector of a row that are stored; 0: all, where what lies behind is nobody's, or is
        written later.
    """

    taps: tuple[tuple[int, int], ...]
    stride: int
    masked: bool
    activation: Activation | None = None
    capped: bool = True
    tiled: bool = False
    pairs: bool = False
    tail: int = 0

    @property
    def shifts(self) -> dict[int, int]:
        """For each column of the window, by how many vector elements its sum is read to the right."""
        return {column: column // self.stride for _, column in self.taps}

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        return _Generator(self, isa).module()


def loads_taps(isa: Isa) -> bool:
    """Whether each tap is loaded where it lies.

    Of vectors of 32 bytes half of the misaligned ones cross a cache line, and AVX2 needs two instructions to
    shift sums.
    """
    return isa.width == 32


class _Generator:
    def __init__(self, kernel: DepthwiseKernel, isa: Isa) -> None:
        self.k, self.width = kernel, isa.width
        self.ir = ir.Module("depthwise")
        self.f = Function(self.ir, "depthwise", VOID, [PTR, I64, PTR], isa)
        self.columns = sorted(kernel.shifts)
        # Output p needs the sum of column c at p + shift[c], which may lie in a vector that is not computed yet.
        # So column sums run `ahead` of the output, by the largest shift; that of column c is then read
        # ``back[c] = ahead - shift[c]`` elements behind the newest, which reaches into its last ``kept[c]`` vectors.
        self.ahead = max(0, *kernel.shifts.values())
        self.back = {column: self.ahead - shift for column, shift in kernel.shifts.items()}
        self.kept = {column: -(-back // isa.lanes) for column, back in self.back.items()}
        self.loads = loads_taps(isa)

    def module(self) -> tuple[Value, str]:
        f, b = self.f, self.f.b
        args, job, _ = f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        x = f.at(field("x", PTR), b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        self.low, self.high = (f.splat_float(f.to_float(field(n))) for n in ("low", "high"))
        self.mask, vectors = field("mask", PTR), field("vectors")
        self.vectors = vectors
        weights, bias = field("weights", PTR), field("bias", PTR)
        rows, x_row, out_row = field("rows"), field("x_row"), field("out_row")
        pitch, places = field("x_pitch"), field("places", PTR)
        taps = len(self.k.taps)

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, field("x_plane")))
            self.channel = f.at(out, b.mul(channel, field("out_plane")))
            mine = f.at(weights, b.mul(channel, I64(4 * taps)))
            self.bias = f.weight(f.at(bias, b.mul(channel, I64(4))))
            held = [f.weight(mine, 4 * i) for i in range(taps)] if taps <= _HELD_WEIGHTS else None

            def weight(i: int) -> Value:
                return held[i] if held else f.weight(mine, 4 * i)

            self.weight = weight
            to = places if self.k.tiled else self.channel
            if self.k.pairs:
                self._pairs(plane, pitch, to, rows, vectors, out_row)
                return
            f.loop(
                rows,
                lambda _, source, to: self._row(source, pitch, to, vectors, x_row, out_row),
                [plane if self.loads else f.at(plane, f.element_bytes * self.k.stride * self.ahead), to],
            )

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return self.ir, "depthwise"

    def _row(
        self, source: Value, pitch: Value, to: Value, vectors: Value, x_row: Value, out_row: Value
    ) -> list[Value]:
        """One row, which begins at `source`; `to`: where the result does, or its part of the table of places."""
        f = self.f
        # Each row of the window has a pointer of its own, so that all of them share the way to a vector.
        lines = {
            row: f.at(source, f.b.mul(pitch, I64(row))) for row in sorted({row for row, _ in self.k.taps})
        }
        if self.loads:
            f.loop(vectors, lambda i, at: self._loaded(lines, i, at, [to]), [I64(0)])
            return [f.at(source, x_row), f.at(to, out_row)]
        # The vectors left of the row: zeros where only padding lies there, and computed where sums reach ahead
        # into the row.
        zero = f.constant(0.0)
        most = max(self.kept.values())
        before: list[dict[int, Value]] = []
        for i in range(-most, 0):
            if self.ahead:
                before.append(self._sums(lines, i * self.width * self.k.stride))
            else:
                before.append(dict.fromkeys(self.columns, zero))
        # What one vector hands on to the next: the last kept[c] sums of each column c, column by column.
        state = [sums[c] for c in self.columns for sums in before[most - self.kept[c] :]]

        def one_vector(i: Value, offset: Value, *state: Value) -> list[Value]:
            sums = self._sums(lines, offset)
            total, new, at = self.bias, [], 0
            for column in self.columns:
                n, back = self.kept[column], self.back[column]
                row = [*state[at : at + n], sums[column]]
                wanted = [n * f.lanes - back + lane for lane in range(f.lanes)]
                [shifted] = f.pick(row, wanted, 1) if back else [sums[column]]
                total = f.b.fadd(total, shifted)
                new += row[1:]
                at += n
            self._store(total, i, to)
            return [f.b.add(offset, I64(self.width * self.k.stride)), *new]

        f.loop(vectors, one_vector, [I64(0), *state])
        return [f.at(source, x_row), f.at(to, out_row)]

    def _loaded(self, lines: dict[int, Value], i: Value, offset: Value, to: list[Value]) -> list[Value]:
        """A vector of each of some rows below one another: each tap is loaded where it lies, once for all of them.

        `lines`: where each row of the window begins; `to`: where each row of the result does.
        """
        f, k = self.f, self.k
        # One sum a row: the core works on the next vectors while it waits.
        totals = [self.bias] * len(to)
        for row, line in lines.items():
            uses = [(n, tap, c) for n in range(len(to)) for tap, (r, c) in enumerate(k.taps) if r + n == row]
            pixels = self._phases(f.at(line, offset), {column for _, _, column in uses})
            for n, tap, column in sorted(uses, key=lambda use: use[2]):
                # In any order of the lanes, the bias is the same.
                totals[n] = f.fma(self.weight(tap), pixels[column], totals[n])
        for total, there in zip(totals, to, strict=True):
            [ordered] = f.pick([total], np.argsort(self._order()).tolist(), 1) if k.stride > 1 else [total]
            self._store(ordered, i, there)
        return [f.b.add(offset, I64(self.width * k.stride))]

    def _pairs(
        self, plane: Value, pitch: Value, to: Value, rows: Value, vectors: Value, out_row: Value
    ) -> None:
        """The rows of a channel, two at a time."""
        f, b = self.f, self.f.b
        window = sorted({row for row, _ in self.k.taps})

        def two_rows(i: Value) -> None:
            row = f.minimum(b.mul(i, I64(2)), b.sub(rows, I64(2)))
            source, first = f.at(plane, b.mul(row, pitch)), f.at(to, b.mul(row, out_row))
            both = [first, f.at(first, out_row)]
            lines = {
                r: f.at(source, b.mul(pitch, I64(r))) for r in sorted({r + n for r in window for n in (0, 1)})
            }
            f.loop(vectors, lambda i, at: self._loaded(lines, i, at, both), [I64(0)])

        f.loop(b.sdiv(b.add(rows, I64(1)), I64(2)), two_rows)

    def _order(self) -> list[int]:
        """Which pixel is in each lane where `_phases` splits two vectors within their 16 bytes.

        Of 8 lanes: 0 1 4 5 2 3 6 7.
        """
        quarter, lanes = 2, self.f.lanes
        return [
            v * lanes // 2 + part + i
            for part in range(0, lanes // 2, quarter)
            for v in range(2)
            for i in range(quarter)
        ]

    def _phases(self, here: Value, columns: set[int]) -> dict[int, Value]:
        """The pixels of these columns of the window, a vector of each.

        At stride 2 in the order of `_order`, for which a shuffle within 16 bytes will do.
        """
        f, k = self.f, self.k
        found: dict[int, Value] = {}
        for column in sorted(columns):
            if column in found:
                continue
            loaded = [f.read(here, f.element_bytes * column + self.width * i) for i in range(k.stride)]
            if k.stride == 1:
                found[column] = loaded[0]
                continue
            for s in range(2):
                [found[column + s]] = f.pick(loaded, [s + 2 * pixel for pixel in self._order()], 1)
        return found

    def _sums(self, lines: dict[int, Value], offset: int | Value) -> dict[int, Value]:
        """The column sums of one vector, `offset` bytes after the beginning of each row of the window."""
        f, k = self.f, self.k
        sums: dict[int, Value] = {}
        for row, line in lines.items():
            pixels = f.at(line, offset)
            loaded = [f.read(pixels, self.width * i) for i in range(k.stride)]
            phases = {
                s: f.pick(loaded, [s + k.stride * lane for lane in range(f.lanes)], 1)[0]
                if k.stride > 1
                else loaded[0]
                for s in sorted({column % k.stride for _, column in k.taps})
            }
            for i, (r, column) in enumerate(k.taps):
                if r == row:
                    product = self.weight(i), phases[column % k.stride]
                    sums[column] = f.fma(*product, sums[column]) if column in sums else f.b.fmul(*product)
        return sums

    def _store(self, total: Value, i: Value, to: Value) -> None:
        f, k = self.f, self.k
        total = apply_or_clamp(k.activation, f, total, self.low, self.high, capped=k.capped)
        at = f.b.mul(i, I64(self.width))
        if k.masked:
            total = f.keep(total, f.read_mask(f.at(self.mask, at)))
        there = f.at(self.channel, place_of(f, to, i)) if k.tiled else f.at(to, at)
        f.write_in_row(total, there, i, self.vectors, k.tail)


def reference(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> NDArray[np.float32]:
    """The numpy twin, in float64.

    x (N, C, H, W), weight (C, 1, KH, KW), bias (C,) float32 -> (N, C, OH, OW) float32.
    """
    _, _, h, w = x.shape
    kh, kw = weight.shape[2:]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    oh, ow = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((h, w), padding, dilation, (kh, kw), stride, strict=True)
    )
    out = np.zeros((*x.shape[:2], oh, ow)) + bias.astype(np.float64)[:, None, None]
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + (oh - 1) * stride[0] + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + (ow - 1) * stride[1] + 1, stride[1])
            out += weight.astype(np.float64)[:, 0, i, j, None, None] * padded[:, :, rows, columns]
    return out.astype(np.float32)
