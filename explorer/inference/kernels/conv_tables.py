"""What Python tells the kernel of a convolution (see conv.py): its tables, and how far it reads ahead in them.

`conv_sparse.reference` reads such tables in numpy.
"""

from __future__ import annotations

from explorer.inference.kernels.builder import Record

ARGUMENTS = Record(
    (
        "x", "x_image", "x_tile", "out", "out_image", "out_tile", "out_plane", "residual", "residual_image",
        "residual_tile", "residual_plane", "bias", "low", "high", "tiles", "parts", "back", "mask", "edges",
        "blocks", "n_blocks",
    )
)  # fmt: skip
"""One convolution of x (images, C, plane) to out (images, M, plane); planes are those of layout.py. Job =
(image, part, tile), the tile changes fastest.

x, out, residual    addresses of pixel 0 of channel 0 of image 0; residual (images, M, plane): 0 for none
.._image            bytes from one image to the next
.._plane            bytes from one output channel to the next; where an input channel lies, the offsets of a
                    block tell
.._tile             bytes from one tile of T vectors to the next
tiles, parts        of an image: tiles of its pixels, parts of its output channels
back                bytes by which the last tile lies over its neighbour, where tiles do not divide the plane
bias                (M,) numbers of four bytes, see `Function.weight`
low, high           bounds of the result: the bits of a float32 in the lower half of the field
mask                (pixels of the plane,) integers as wide as a value: -1 keeps a result, 0 makes it zero (gaps
                    between image rows); 0 for none
edges               the same of what a tap reads, where it would reach the image row before or after: one table
                    after another
blocks              (parts, n_blocks) rows of BLOCK
"""

SOURCE, MASKED_SOURCE = 2, 3
"""Numbers (int64) that tell what to copy, and with a mask."""

BLOCK = Record(
    (
        "stage", "n_sources", "sources", "depth", "offsets", "weights", "rows", "groups", "n_groups",
        "n_pair_groups", "has_remainder", "first_channel", "first_operand",
    )
)  # fmt: skip
"""One K block of one part of the output channels. Offsets count from its *base*: the buffer that operands were
copied to, or, where nothing is, the tile's first pixel in x.

all     stage                FIRST_BLOCK + LAST_BLOCK
        sources              (n_sources, 2) int64 {bytes from the tile's first pixel, vectors beyond T}: what is
                             copied to the buffer, one after the other; (n_sources, 3) where it is masked, with
                             {bytes into `edges`}
        offsets              int32, bytes from the base to each operand; where they are short uint16, elements
                             from the base + `first_operand` bytes
        weights              numbers of four bytes, see `Function.weight`
sparse  rows                 (R,) int32, the output channel of each row of weights (the first of two, where two
                             have one pattern)
        groups               (n_groups + n_pair_groups, 3) int32 {columns that two rows share, turns, rows or
                             pairs of rows}: runs of rows of one length; the pairs are partners, see
                             conv_sparse.py, whose `reference` reads these tables
        offsets, weights     of the nonzeros, row by row; of partners as
                             `explorer.inference.sparse_rows.Entries` tells
code    groups               (n_groups,) rows of `conv_code.GROUP`
dense   offsets              (depth,)
        weights              (n_groups, depth, R), then (depth, channels that are left over), which there are if
                             `has_remainder` is 1
        first_channel        of the first group
"""

FIRST_BLOCK, LAST_BLOCK = 1, 2

BUFFER_BYTES = 1 << 17
"""Start of the sums in a thread's scratch; the packed operands lie before it."""

OFFSETS_AHEAD = 3
"""Nonzeros whose offset is loaded before their turn. Cores serve loads by age: the offset of a nonzero would
wait behind the operands of those before it, and its own operands for the offset. (ResNet-50 at 90 %: 1.05 x on
AMD Zen 5, 1 to 4 alike.) As many may be read past the last one. Two are read by one load, so that the operands
have the others: another 1.03 x."""

ROWS_AHEAD = 4
"""Rows of weights before its turn that what the last block writes (and adds to) is fetched: rows come in the
order of their lengths, which no hardware foresees. (ResNet-50 at 90 % on Zen 4: 1.01 x.) As many row numbers
may be read past the last one."""

WEIGHT_PREFETCH_BYTES = 3072
"""How far ahead of their use weights are fetched: of a large network they come from the outermost cache or from
memory."""
