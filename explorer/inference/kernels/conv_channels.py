"""Dense convolution with output channels in the lanes: no lane is spent on the gap between image rows.

The other dense kernel (conv.py) has neighbouring pixels in its lanes: of rows of 14 pixels that lie 16 apart,
an eighth of its work goes to gaps, and of planes of 7 x 7 pixels almost a quarter. Here a lane is an output
channel, so that the size of the image does not matter.

The algorithm in plain words
  A tile is P neighbouring pixels of one image row, a group is R vectors of output channels; P x R sums stay in
  registers. For each k (input channel x kernel tap): load R vectors of weights, broadcast P pixels one after
  the other, P x R FMAs. A job is a few tiles of one image times a part of the groups. K is cut into blocks;
  each block goes through all groups, and the weights of one group and block stay in the L1 cache while all
  tiles pass by. The first block starts from the bias, the last one transposes the sums of a tile so that the
  lanes become pixels, adds the residual, clamps or applies another activation, and stores the P pixels of each
  channel.

The numpy twin of what is computed is `conv.reference`.

Vectors of output channels and broadcast pixels are the usual form of direct convolution, see Georganas et al.,
"Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures" (2018).
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from explorer.inference.activations import Activation
from explorer.inference.kernels.activation import apply_or_clamp
from explorer.inference.kernels.builder import (
    CACHE_LINE,
    F32,
    I1,
    I32,
    I64,
    PTR,
    VOID,
    Function,
    Record,
    Value,
)
from explorer.inference.native import Isa

ARGUMENTS = Record(
    (
        "x", "x_image", "out", "out_image", "out_plane", "residual", "residual_image", "residual_plane",
        "bias", "low", "high", "x_at", "out_at", "residual_at", "tiles", "tiles_per_job", "chunks", "parts",
        "groups", "groups_per_job", "channels", "blocks", "n_blocks",
    )
)  # fmt: skip
"""One convolution of x (images, C, plane) to out (images, channels, plane). Job = (image, chunk of the tiles,
part of the groups), the part changes fastest.

residual                  (images, channels, plane) values: 0 for none
bias                      (groups * R * lanes,) values, zeros where there is no channel
x_at, out_at, residual_at
                          (tiles,) int32: bytes from pixel 0 to the first pixel of each tile
tiles, tiles_per_job      of an image, and how many of them are a job's
chunks                    jobs that the tiles of an image are dealt to
parts                     jobs that the groups are dealt to
groups, groups_per_job    of R vectors of output channels, and how many of them are a job's
channels                  output channels that there are: the last group may have fewer
blocks                    (n_blocks,) rows of BLOCK
"""

BLOCK = Record(("depth", "offsets", "weights"))
"""One K block.

depth      operands (k)
offsets    (depth,) int32: bytes from a tile's first pixel to each operand
weights    (groups, depth, R * lanes) values
"""

_LEVEL_2 = 2
"""As `Function.prefetch` counts."""


@dataclass(frozen=True, slots=True)
class ConvChannelsKernel:
    """What the machine code depends on.

    Attributes
    ----------
    pixels : int
        Pixels in a tile (P).
    vectors : int
        Vectors of output channels in a group (R).
    residual : bool
        Whether a residual is added.
    activation : Activation or None
        Applied last, instead of the clamp.
    capped : bool
        Whether there is a greatest value.
    """

    pixels: int
    vectors: int
    residual: bool
    activation: Activation | None = None
    capped: bool = True

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        return _Generator(self, isa).module()

    def sums_bytes(self, isa: Isa) -> int:
        """Bytes of the sums of one tile and group."""
        return isa.width * self.pixels * self.vectors

    def turned_bytes(self, isa: Isa) -> int:
        """Bytes of one tile and group with pixels in the lanes."""
        return isa.width * self.vectors * isa.lanes * _pixel_vectors(self.pixels, isa.lanes)


def _pixel_vectors(pixels: int, lanes: int) -> int:
    return -(-pixels // lanes)


class _Generator:
    def __init__(self, kernel: ConvChannelsKernel, isa: Isa) -> None:
        self.k, self.isa = kernel, isa
        self.ir = ir.Module("convolution")
        self.width = isa.width
        self.n_pixel_vectors = _pixel_vectors(kernel.pixels, isa.lanes)

    def module(self) -> tuple[Value, str]:
        self._tile()
        self._finish()
        self._job()
        return self.ir, "convolution"

    def _tile(self) -> None:
        """One tile and group through one K block.

        Its arguments: depth and offsets (of `BLOCK`), weights ((depth, R * lanes) values, of the group), x (the
        tile's first pixel), is_first (whether the block is the first, which starts from the bias), bias ((R *
        lanes,) values), sums ((P, R * lanes) values of the scratch memory, which other blocks start from),
        is_last (whether the block is the last), turned ((R * lanes, whole vectors of P) values: where the last
        block leaves its result, with pixels in the lanes; others leave theirs in sums), soon (an address to
        fetch, of the weights of the next group) and pace (bytes by which it moves on in each step).
        """
        k, width = self.k, self.width
        f = Function(self.ir, "tile", VOID, [I64, PTR, PTR, PTR, I1, PTR, PTR, I1, PTR, PTR, I64], self.isa)
        f.native.linkage = "internal"
        depth, offsets, weights, x, is_first, bias, sums, is_last, turned, soon, pace = f.arguments
        for argument in (offsets, weights, x, bias, sums, turned):
            argument.add_attribute("noalias")
        places = [width * i for i in range(k.pixels * k.vectors)]

        def from_bias() -> list[Value]:
            return [f.read(bias, width * r, width) for r in range(k.vectors)] * k.pixels

        def from_sums() -> list[Value]:
            return [f.read(sums, place, width) for place in places]

        def step(_: Value, offset: Value, weight: Value, soon: Value, *totals: Value) -> list[Value]:
            pointer = f.opaque(f.at(x, f.b.sext(f.load(offset, I32), I64)))
            held = [f.read(weight, width * r, width) for r in range(k.vectors)]
            new = []
            for p in range(k.pixels):
                pixel = f.read_one(pointer, f.element_bytes * p)
                new += [
                    f.fma(pixel, w, total)
                    for w, total in zip(held, totals[p * k.vectors : (p + 1) * k.vectors], strict=True)
                ]
            f.prefetch(soon, 0, _LEVEL_2)
            return [f.at(offset, 4), f.at(weight, width * k.vectors), f.at(soon, pace), *new]

        start = f.either(is_first, from_bias, from_sums)
        _, _, _, *totals = f.loop(depth, step, [offsets, weights, soon, *start])
        with f.b.if_else(is_last) as (yes, no):
            with yes:
                self._turn(f, totals, turned)
            with no:
                for total, place in zip(totals, places, strict=True):
                    f.write(total, sums, place, width)
        f.b.ret_void()

    def _turn(self, f: Function, totals: list[Value], turned: Value) -> None:
        """Store the sums [pixel][channel] as [channel][pixel], each channel's pixels in whole vectors."""
        k, width, lanes = self.k, self.width, self.isa.lanes
        zero = f.constant(0.0)
        for r in range(k.vectors):
            for v in range(self.n_pixel_vectors):
                square = [totals[p * k.vectors + r] for p in range(k.pixels)[v * lanes : (v + 1) * lanes]]
                columns = f.transpose([*square, *[zero] * (lanes - len(square))])
                for lane, column in enumerate(columns):
                    row = r * lanes + lane
                    f.write(column, turned, width * (row * self.n_pixel_vectors + v), width)

    def _finish(self) -> None:
        """The epilogue of one tile and group.

        Its arguments: turned (as `_tile` leaves it), channels (how many of the group there are), out and
        residual (the tile's first pixel in the group's first channel), out_plane and residual_plane (bytes from
        one channel to the next), low and high (float32).
        """
        k, width, lanes = self.k, self.width, self.isa.lanes
        f = Function(self.ir, "finish", VOID, [PTR, I64, PTR, I64, PTR, I64, F32, F32], self.isa)
        f.native.linkage = "internal"
        turned, channels, out, out_plane, residual, residual_plane, low, high = f.arguments
        low, high = f.splat_float(low), f.splat_float(high)

        def one_channel(_: Value, values: Value, to: Value, added: Value) -> list[Value]:
            for v in range(self.n_pixel_vectors):
                value = f.read(values, width * v, width)
                if k.residual:
                    value = f.b.fadd(value, f.read(added, width * v))
                value = apply_or_clamp(k.activation, f, value, low, high, capped=k.capped)
                count = min(lanes, k.pixels - v * lanes)
                if count == lanes:
                    f.write(value, to, width * v)
                else:
                    f.store_where(f.first_lanes(count), value, to, width * v)
            return [
                f.at(values, width * self.n_pixel_vectors),
                f.at(to, out_plane),
                f.at(added, residual_plane),
            ]

        f.loop(channels, one_channel, [turned, out, residual])
        f.b.ret_void()

    def _job(self) -> None:
        k, width, lanes = self.k, self.width, self.isa.lanes
        f = Function(self.ir, "convolution", VOID, [PTR, I64, PTR], self.isa)
        b, (args, job, scratch) = f.b, f.arguments

        def field(name: str, type_: Value = I64) -> Value:
            return f.field(args, ARGUMENTS, name, type_)

        parts, chunks = field("parts"), field("chunks")
        part, rest = b.srem(job, parts), b.sdiv(job, parts)
        chunk, image = b.srem(rest, chunks), b.sdiv(rest, chunks)
        first_tile = b.mul(chunk, field("tiles_per_job"))
        n_tiles = f.minimum(field("tiles_per_job"), b.sub(field("tiles"), first_tile))
        first_group = b.mul(part, field("groups_per_job"))
        n_groups = f.minimum(field("groups_per_job"), b.sub(field("groups"), first_group))

        def tensor(name: str) -> Value:
            return f.at(field(name, PTR), b.mul(image, field(f"{name}_image")))

        addend = "residual" if k.residual else "out"
        places = {n: f.at(field(f"{n}_at", PTR), b.mul(first_tile, I64(4))) for n in ("x", "out", addend)}
        tensors = {name: tensor(name) for name in places}
        bias, blocks, n_blocks = field("bias", PTR), field("blocks", PTR), field("n_blocks")
        low, high = f.to_float(field("low")), f.to_float(field("high"))
        out_plane, residual_plane, channels = field("out_plane"), field("residual_plane"), field("channels")
        tile_bytes = k.sums_bytes(self.isa)
        turned, all_sums = scratch, f.at(scratch, k.turned_bytes(self.isa))

        def one_block(index: Value) -> None:
            block = f.row(blocks, BLOCK, index)
            depth, offsets, weights = (
                f.field(block, BLOCK, name, type_)
                for name, type_ in (("depth", I64), ("offsets", PTR), ("weights", PTR))
            )
            group_bytes = b.mul(depth, I64(width * k.vectors))
            is_first = b.icmp_signed("==", index, I64(0))
            is_last = b.icmp_signed("==", b.add(index, I64(1)), n_blocks)

            def one_group(g: Value) -> None:
                group = b.add(first_group, g)
                mine = f.at(weights, b.mul(group, group_bytes))
                channel = b.mul(group, I64(k.vectors * lanes))
                left = f.minimum(b.sub(channels, channel), I64(k.vectors * lanes))
                mine_bias = f.at(bias, b.mul(channel, I64(f.element_bytes)))

                def one_tile(t: Value) -> None:
                    def first_pixel(name: str) -> Value:
                        place = f.at(places[name], b.mul(t, I64(4)))
                        return f.at(tensors[name], b.sext(f.load(place, I32), I64))

                    sums = f.at(all_sums, b.mul(b.add(b.mul(g, n_tiles), t), I64(tile_bytes)))
                    # The first tiles fetch the weights that come next into the L2 cache, a line in each step:
                    # evenly, not in a burst.
                    lines = -(-width * k.vectors // CACHE_LINE)
                    soon = f.at(mine, b.add(group_bytes, b.mul(b.mul(t, depth), I64(CACHE_LINE))))
                    pace = b.select(b.icmp_signed("<", t, I64(lines)), I64(CACHE_LINE), I64(0))
                    b.call(
                        self.ir.globals["tile"],
                        [
                            depth,
                            offsets,
                            mine,
                            first_pixel("x"),
                            is_first,
                            mine_bias,
                            sums,
                            is_last,
                            turned,
                            soon,
                            pace,
                        ],
                    )
                    with b.if_then(is_last):
                        to = f.at(first_pixel("out"), b.mul(channel, out_plane))
                        added = f.at(first_pixel(addend), b.mul(channel, residual_plane))
                        b.call(
                            self.ir.globals["finish"],
                            [turned, left, to, out_plane, added, residual_plane, low, high],
                        )

                f.loop(n_tiles, one_tile)

            f.loop(n_groups, one_group)

        f.loop(n_blocks, one_block)
        b.ret_void()
