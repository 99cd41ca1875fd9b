"""What Python tells the kernel of a convolution (see conv.py): the rows of its tables, and how far it reads ahead in them."""

from __future__ import annotations

from explorer.inference.kernels.builder import Record

ARGUMENTS = Record(
    (
        "x", "x_image", "x_tile", "out", "out_image", "out_tile", "out_plane", "residual", "residual_image", "residual_tile",
        "residual_plane", "bias", "low", "high", "tiles", "parts", "back", "mask", "edges", "blocks", "n_blocks",
    )
)  # fmt: skip
"""One convolution. `..._tile`: bytes from one tile to the next. `back`: bytes by which the last tile lies back, over its neighbour, when tiles do not fit
evenly. `residual`, `mask`: 0 for none. `edges`: all ones where a tap may read, zero where it would reach the row before or after, for each vector of a plane; one table after another."""

SOURCE, MASKED_SOURCE = 2, 3
"""Numbers that tell what to copy, and with a mask."""

BLOCK = Record(
    (
        "stage", "n_sources", "sources", "depth", "offsets", "weights", "rows", "groups", "n_groups", "n_pair_groups",
        "first_channel", "first_operand",
    )
)  # fmt: skip
"""One K block of one part. `stage`: FIRST_BLOCK and LAST_BLOCK, added. `sources`: {byte offset from the pixel, vectors beyond T} pairs, what to copy into
the buffer, with {bytes from `edges` to the table} where it is masked; where there are none, operands are read where they lie. `offsets`: bytes from the tile (or the buffer) to each operand, int32; where they are
short, elements from the `first_operand` of the block, which is so many bytes from there, in 16 bits. `weights`: four bytes each, see `Function.weight`.
Sparse: `rows` (channels, or the first of each pair), `groups` and `n_pair_groups` of them that follow the first `n_groups`; offsets and weights of the
nonzeros, row by row; all as `explorer.inference.sparse_rows.Entries` tells.
Code: `n_groups` rows of `conv_code.GROUP` from `groups`.
Dense: `n_groups` full groups of R channels from `first_channel`, `rows` is 1 when a remainder group follows; weights [group][k][R]."""

FIRST_BLOCK, LAST_BLOCK = 1, 2

BUFFER_BYTES = 1 << 17
"""Start of the sums in a thread's scratch; the packed operands lie before it."""

CACHE_LINE = 64
"""Bytes, of nearly all CPUs: what a prefetch brings."""

OFFSETS_AHEAD = 3
"""Nonzeros whose offset is loaded before their turn. Cores serve loads by age: the offset of a nonzero would wait behind the operands of those before it,
and its own operands for the offset. (ResNet-50 at 90 %: 1.05 x on AMD Zen 5, 1 to 4 alike.) As many may be read past the last one. Two are read by one
load, so that the operands have the others: another 1.03 x."""

ROWS_AHEAD = 4
"""Rows of weights before its turn that what the last block writes (and adds to) is fetched: rows come in the order of their lengths, which no hardware
foresees. (ResNet-50 at 90 % on Zen 4: 1.01 x.) As many row numbers may be read past the last one."""

WEIGHT_PREFETCH_BYTES = 3072
"""How far ahead of their use weights are fetched: of a large network they come from the outermost cache or from memory."""
