"""The phases of an image: what a convolution with a stride reads, see `explorer.inference.lower`.

Pixel (y, x) of phase (r, s) is pixel (y * stride + r, x * stride + s) of the image.

The algorithm in plain words
  small strides   one row of all phases that share its rows at a time: load as many vectors as the stride has
                  columns, and pick every stride-th element of them by register shuffles. What is stored past
                  the end of a row are zeros, or is overwritten by the next row. An image that lies tile by tile
                  is laid out in scratch memory first, channel by channel: a shuffle of what lies in several
                  tiles would be a gather, which takes four times as long. Where the result is to lie in tiles,
                  a table tells where each vector goes.
  large strides   element by element through an index table, which holds -1 where a phase has no pixel

The numpy twin is `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.channels import channels_of, place_of
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "x_plane", "out", "out_image", "out_plane", "jobs", "channels", "channels_per_job",
        "n_phases", "table", "vectors", "rows", "row_phases", "pitch", "chunks", "mask", "first_tile",
        "last_tile", "x_tile", "places", "skipped", "x_next", "x_columns",
    )
)  # fmt: skip
"""x (images, channels, plane) to out (images, channels * n_phases, plane): all phases of channel 0, all of
channel 1, and so on, those of the same rows side by side. Job = (image, some channels), see channels.py.

x                      where the kernel `borrows`, the address of the cell that holds the address
skipped                where it does, bytes from where the caller has the first image to the first that is split
n_phases
places                 (vectors of a plane,) int32, of a result in tiles: bytes from the first of its channel to
                       each vector

Small strides:
table                  (rows, row_phases) int64: bytes from pixel 0 to the row of the image that each row phase
                       reads, -1 for none
rows                   of the result
row_phases             phases that differ in their rows; those that differ in columns: `SplitKernel.columns`
pitch                  bytes from one row of the result to the next; in tiles, bytes of `places` that belong to
                       a row
chunks                 vectors that cover the pixels of a row of the result
mask                   (column phases, chunks * lanes) integers
x_columns              pixels in a row of the image, beyond which nothing is read where it is float32 (`wide`)
x_next                 bytes from an image to the one whose phases lie beside its own (`abreast`)
first_tile, last_tile  tiles [first, last) hold the rows, of an image in tiles
x_tile                 bytes from one tile to the next

Large strides:
table                  (n_phases, vectors * lanes) int32: the element of the image's plane that each element of
                       the result is, -1 for none
vectors                of a plane of the result
"""


@dataclass(frozen=True, slots=True)
class SplitKernel:
    """What the machine code depends on.

    Attributes
    ----------
    stride : int
        Columns from one pixel of a phase to the next; 0 for the table of indices, which serves any stride.
    columns : tuple of int
        The column phases, ascending (small strides only, as all that follows but `borrows` and `tiled`).
    borrows : bool
        Whether `x` is the address of the image's address: it lies where the caller has it.
    tile : int
        Vectors of a channel that lie together where the image lies tile by tile; 0 for planes.
    tiled : bool
        Whether the result lies in tiles.
    abreast : int
        Images whose phases lie side by side in the rows of the result, each of which is then one vector.
    wide : bool
        Whether the image is float32 and the result float16: then nothing behind the ends of rows is read (an
        image in planes only).
    tail : int
        Elements of the last vector of a row that are stored; 0: all, where what lies behind is nobody's, or is
        written later.
    """

    stride: int
    columns: tuple[int, ...]
    borrows: bool = False
    tile: int = 0
    tiled: bool = False
    abreast: int = 1
    wide: bool = False
    tail: int = 0

    def scratch_bytes(self, vectors: int, isa: Isa) -> int:
        """Bytes of scratch that a job needs for planes of so many vectors, beyond which rows are read."""
        return self.abreast * (vectors + (self.stride + 1) * self.tile) * isa.width if self.tile else 0

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        module = ir.Module("split")
        f = Function(module, "split", VOID, [PTR, I64, PTR], isa)
        b, (args, job, scratch) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        image, first, last = channels_of(f, field, job)
        n_phases = field("n_phases")
        x = field("x", PTR)
        if self.borrows:
            x = f.at(f.load(x, PTR, 0, 8), field("skipped"))
        x = f.at(x, b.mul(image, field("x_image")))
        out = f.at(field("out", PTR), b.mul(image, field("out_image")))
        table, out_plane = field("table", PTR), field("out_plane")
        part = self._shuffled(f, field, out_plane) if self.stride else self._gathered(f, field, out_plane)

        def one_channel(channel: Value) -> None:
            plane = f.at(x, b.mul(channel, field("x_plane")))
            planes = [
                f.at(plane, b.mul(I64(i), field("x_next"))) if i else plane for i in range(self.abreast)
            ]
            if self.tile:
                tiles = b.add(field("last_tile"), I64(self.stride + 1))
                laid_out = b.mul(tiles, I64(f.width * self.tile))
                lines = [
                    f.at(scratch, b.mul(I64(i), laid_out)) if i else scratch for i in range(self.abreast)
                ]
                for one, line in zip(planes, lines, strict=True):
                    self._lay_out(f, field, one, line)
                planes = lines
            phases = f.at(out, b.mul(b.mul(channel, n_phases), out_plane))
            f.loop(
                field("rows") if self.stride else n_phases,
                lambda i, entry: part(planes, phases, i, entry),
                [table],
            )

        f.loop(last, one_channel, start=first)
        b.ret_void()
        return module, "split"

    def _lay_out(self, f: Function, field: Value, first: Value, scratch: Value) -> None:
        """The tiles of one channel, of which `first` is tile 0, side by side."""
        b, width = f.b, f.width

        def one_tile(index: Value) -> None:
            source = f.at(first, b.mul(index, field("x_tile")))
            to = f.at(scratch, b.mul(index, I64(width * self.tile)))
            for i in range(self.tile):
                f.write(f.read(source, width * i, width), to, width * i, width)

        f.loop(field("last_tile"), one_tile, start=field("first_tile"))

    def _gathered(self, f: Function, field: Value, out_plane: Value) -> Value:
        b, width, vectors, places = f.b, f.width, field("vectors"), field("places", PTR)

        def one_phase(planes: list[Value], phases: Value, phase: Value, indices: Value) -> list[Value]:
            [plane] = planes
            to = f.at(phases, b.mul(phase, out_plane))

            def one_vector(i: Value, indices: Value) -> list[Value]:
                where = f.load(indices, f.int_vector)
                zero = ir.Constant(f.int_vector, [0] * f.lanes)
                value = f.gather(plane, where, b.icmp_signed(">=", where, zero))
                at = place_of(f, places, i) if self.tiled else b.mul(i, I64(width))
                f.write(value, f.at(to, at), 0, width)
                return [f.at(indices, 4 * f.lanes)]

            return f.loop(vectors, one_vector, [indices])

        return one_phase

    def _shuffled(self, f: Function, field: Value, out_plane: Value) -> Value:
        b, width, n = f.b, f.width, len(self.columns)
        pitch, chunks, mask = field("pitch"), field("chunks"), field("mask", PTR)
        mask_row = b.mul(chunks, I64(width))
        places = field("places", PTR)

        columns = field("x_columns")
        read_bytes = f.lanes * (4 if self.wide else f.element_bytes)

        def read(line: Value, chunk: Value, i: int) -> Value:
            """Vector `i` of what a chunk needs of a row."""
            first = b.mul(chunk, I64(self.stride))
            pixels = f.at(line, b.mul(first, I64(read_bytes)))
            if not self.wide:
                return f.read(pixels, read_bytes * i)
            start = b.add(b.mul(first, I64(f.lanes)), I64(f.lanes * i))
            return f.read_wide(pixels, read_bytes * i, b.sub(columns, start))

        each = f.lanes // self.abreast  # elements of a vector of the result that belong to one image
        n_loaded = -(-self.stride * each // f.lanes)

        def one_row(planes: list[Value], phases: Value, y: Value, entry: Value) -> list[Value]:
            """One row of each phase: neighbouring rows of the image."""

            def one_phase(phase: Value, entry: Value) -> list[Value]:
                group = f.at(phases, b.mul(b.mul(phase, I64(n)), out_plane))
                offset = f.load(entry, I64, 0, 8)
                row = f.at(places if self.tiled else group, b.mul(y, pitch))
                is_there = b.icmp_signed(">=", offset, I64(0))
                keep = b.sext(is_there, f.mask_type.element)
                sources = [f.at(plane, b.select(is_there, offset, I64(0))) for plane in planes]

                def one_chunk(c: Value) -> None:
                    at = b.mul(c, I64(width))
                    loaded = [read(line, c, i) for line in sources for i in range(n_loaded)]
                    to = f.at(group, place_of(f, row, c)) if self.tiled else f.at(row, at)
                    for k, column in enumerate(self.columns):
                        wanted = [
                            lane // each * n_loaded * f.lanes + column + self.stride * (lane % each)
                            for lane in range(f.lanes)
                        ]
                        [value] = f.pick(loaded, wanted, 1)
                        inside = f.read_mask(f.at(mask, b.add(at, b.mul(I64(k), mask_row))))
                        value = f.keep(value, b.and_(inside, f.splat(keep)))
                        there = f.at(to, b.mul(I64(k), out_plane))
                        f.write_in_row(value, there, c, chunks, self.tail)

                f.loop(chunks, one_chunk)
                return [f.at(entry, 8)]

            return f.loop(field("row_phases"), one_phase, [entry])

        return one_row


def reference(
    x: NDArray[np.float32], stride: tuple[int, int], phases: list[tuple[int, int]]
) -> NDArray[np.float32]:
    """The numpy twin: x (N, C, H, W) -> (N, C * phases, ceil(H / stride), ceil(W / stride)), both float32.

    Zeros stand where a phase, (rows, columns) from the first pixel, has none.
    """
    n, c, h, w = x.shape
    rows, columns = -(-h // stride[0]), -(-w // stride[1])
    padded = np.pad(x, ((0, 0), (0, 0), (0, rows * stride[0] - h), (0, columns * stride[1] - w)))
    parts = [padded[:, :, r :: stride[0], s :: stride[1]] for r, s in phases]
    return np.stack(parts, 2).reshape(n, c * len(phases), rows, columns)
