"""How a tile of pixels is cut so that the sums of a convolution stay in registers.

Plain arithmetic, which needs no code generator. Everywhere a tile has T vectors of pixels, R output channels
share their loads, S vectors are taken at once.
"""

from __future__ import annotations

from explorer.inference.native import Isa

MANY_REGISTERS = 32
"""As AVX-512 and NEON have; AVX2 has half of them."""

LARGEST_SHUFFLED = 4
"""The widest stride that is split into phases by shuffles; their number grows with its square."""

_WORTH_PARTS = 0.95
"""A dense kernel takes a tile in parts where that costs less than this share of taking it whole: it reads the
weights once for each part."""


def _even_parts(tile: int, most: int) -> tuple[int, ...]:
    """A tile in as few parts of at most so many vectors as it takes, and as even."""
    count = -(-tile // most)
    return tuple(tile // count + (i < tile % count) for i in range(count))


def pair_parts(tile: int, isa: Isa) -> tuple[int, ...]:
    """The vectors S of each part of a tile that a pair of output channels takes at once.

    2 x S sums, two weights and an operand stay in registers.
    """
    return _even_parts(tile, (isa.registers - 3) // 2)


def _most_vectors(rows: int, isa: Isa) -> int:
    """The largest S for which R x S sums, the fewer of R and S operands and one more fit registers; 0 for none."""

    def held(s: int) -> int:
        # On NEON LLVM loads ahead of their turn: several operands of float16; of float32 the weights two by
        # two, where the S vectors of pixels are held and the R weights streamed.
        more = 1 if isa.width > 16 else 5 if isa.precision == "fp16" else 1 + 2 * (rows > s)
        return rows * s + min(rows, s) + more

    return max(s for s in range(isa.registers) if not s or held(s) <= isa.registers)


def dense_parts(tile: int, rows: int, isa: Isa) -> tuple[int, ...]:
    """The vectors S of each part of a tile that R output channels of the dense kernel take at once."""
    return _even_parts(tile, max(_most_vectors(rows, isa), 1))


def dense_rows(tile: int, isa: Isa, *, whole: bool = False) -> int:
    """The R with the fewest cycles for a product, of those whose sums stay in registers.

    In one part where others win little, or `whole` asks for it. Two loads and two multiply-adds a cycle; sums
    that are fewer than eight wait for each other; half a cycle is the loop's own.
    """

    def cost(rows: int) -> float:
        cycles = [max(rows * s / 2, (rows + s + 1) / 2, 4) + 0.5 for s in dense_parts(tile, rows, isa)]
        return sum(cycles) / (rows * tile)

    fitting = [rows for rows in range(1, 17) if _most_vectors(rows, isa)]
    in_one = max((rows for rows in fitting if _most_vectors(rows, isa) >= tile), default=1)
    best = min(fitting, key=cost)
    return best if not whole and cost(best) < _WORTH_PARTS * cost(in_one) else in_one


def exponential_parts(tile: int, isa: Isa) -> tuple[int, ...]:
    """The vectors of each part of a tile whose exponentials attention takes at once.

    Beside them their constants need registers, unless they are read where they are used, as x86 can.
    """
    if isa.registers < MANY_REGISTERS:
        return (1,) * tile  # of several, constants and sums would wait on the stack
    return _even_parts(tile, tile if isa.width > 16 else 3)


def unroll(sums: int) -> int:
    """Nonzeros that the sparse kernel takes at once, each with sums of its own: `sums` vectors.

    An FMA takes four cycles and a core starts two a cycle: eight independent sums keep it busy. With one vector
    a row, four do, since the core begins the next row before this one has ended, and eight would pay for more
    padding and more additions at the end. Rows are filled up to a multiple of this, see sparse_rows.py.
    """
    return min(4, 1 << max(0, (8 // sums).bit_length() - 1))


def has_partners(tile: int, isa: Isa) -> bool:
    """Whether the sparse kernel takes two output channels at once that share some operands.

    Their sums must be enough to keep the core busy, and fit the registers together. Tiles that fit 16 registers
    (3 to 6 vectors) gain nothing: 1.00 of the time for the sparse layers of ResNet-50, 1.03 of MobileNetV1
    (AVX2 code on Zen 4).
    """
    return isa.registers >= MANY_REGISTERS and unroll(2 * tile) == 1


_WIDE_GROUP, _NARROW_GROUP = 8, 3
"""Vectors of outputs that a linear layer on vectors computes at once: eight sums keep the core busy with one
image; where registers are few, three leave some for three images, so that weights are read a third as often (16
images, Zen 3: 0.53 of the time for the classifier of MobileNetV1)."""


def images_at_once(group: int, isa: Isa) -> int:
    """Images G of a group of U vectors: G x U sums, a value of each image and a vector of weights fit registers."""
    return max(1, (isa.registers - 2) // (group + 1))


def linear_group(vectors: int, images: int, isa: Isa) -> int:
    """U for a layer of so many vectors of outputs and so many images."""
    is_wide = images == 1 or images_at_once(_WIDE_GROUP, isa) > 1
    return min(vectors, _WIDE_GROUP if is_wide else _NARROW_GROUP)


def linear_room(vectors: int) -> int:
    """Vectors that are written where so many are wanted: whole groups, whichever they are."""
    groups = (min(vectors, group) for group in (_WIDE_GROUP, _NARROW_GROUP))
    return max(-(-vectors // group) * group for group in groups)
