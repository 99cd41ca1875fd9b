"""A mask as a small picture: which weights of a layer are alive, and what that leaves unused.

A weight is laid out as a matrix, one row an output and one column a weight of an input. Where that is more than a screen shows, neighbouring
rows or columns share a cell, and the cell says which share of its weights is alive. Whole inputs and whole outputs are put together, and
always the same number of them: cells of unequal content would draw stripes that are not in the mask. Invariant: a cell is 0 exactly when
all its weights are dead, and 255 only when more than 254 of 255 are alive.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_ROWS = 128
MAX_COLUMNS = 256
"""Most cells of a picture, so that one is at most 32 KiB and its cells can still be seen."""

FULL = 255
"""Value of a cell whose weights are all alive."""


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """One layer's mask, made small.

    Parameters
    ----------
    cells : bytes
        Share alive of each cell, 0 to 255, row by row.
    n_rows, n_columns : int
        Cells from top to bottom and from left to right.
    row_span : int
        Outputs in a row; the last row may have fewer.
    column_span : int
        Weights of one output in a column; the last column may have fewer.
    kernel : int
        Weights that join one input to one output: the positions of a convolution's kernel.
    n_outputs, n_inputs : int
        Channels of a convolution, features of a linear layer.
    channels : bool
        Whether it is a convolution.
    n_weights, n_alive : int
    dead_outputs : int
        Outputs without a single weight alive: they are constant.
    unused_inputs : int
        Inputs that no output reads.
    """

    cells: bytes
    n_rows: int
    n_columns: int
    row_span: int
    column_span: int
    kernel: int
    n_outputs: int
    n_inputs: int
    channels: bool
    n_weights: int
    n_alive: int
    dead_outputs: int
    unused_inputs: int

    def packed(self) -> bytes:
        """Return rows and columns as little-endian uint16, then the cells: one value that a page cannot tear apart."""
        return struct.pack("<HH", self.n_rows, self.n_columns) + self.cells

    def describe(self, name: str) -> str:
        """Return in words what the picture shows."""
        some, total = f"{self.dead_outputs:,}", f"{self.n_outputs:,}"
        if self.channels:
            dead = phrase("mask.output_channels", count=self.n_outputs, some=some, total=total)
        else:
            dead = phrase("mask.outputs", count=self.n_outputs, some=some, total=total)
        some, total = f"{self.unused_inputs:,}", f"{self.n_inputs:,}"
        if self.channels:
            unused = phrase("mask.input_channels", count=self.n_inputs, some=some, total=total)
        else:
            unused = phrase("mask.inputs", count=self.n_inputs, some=some, total=total)
        return phrase(
            "mask.picture",
            layer=name,
            share=f"{100 * self.n_alive / self.n_weights:.1f}",
            weights=f"{self.n_weights:,}",
            dead=dead,
            unused=unused,
        )

    @property
    def grouped(self) -> bool:
        """Whether each output reads only some of the inputs."""
        return self.n_outputs * self.n_inputs * self.kernel > self.n_weights


def picture_of(
    mask: Any, *, groups: int = 1, max_rows: int = MAX_ROWS, max_columns: int = MAX_COLUMNS
) -> MaskPicture:
    """Make a picture of a mask.

    Parameters
    ----------
    mask : array or Tensor
        ``(out, in / groups, *kernel)`` or ``(out, in)`` bool, true where a weight is alive; not empty.
    groups : int
        Groups of the convolution, a divisor of `out`.
    max_rows, max_columns : int
        Most cells, at least 1 each.

    Raises
    ------
    ValueError
        If the mask is empty, has fewer than two dimensions, or cannot be split into so many groups.

    Examples
    --------
    >>> picture = picture_of(
    ...     np.array([[True, False, False, False], [True, True, False, False]]), max_columns=2
    ... )
    >>> list(picture.cells), picture.dead_outputs, picture.unused_inputs
    ([128, 0, 255, 0], 0, 2)
    """
    alive = np.asarray(mask, dtype=bool)
    if alive.ndim < 2 or alive.size == 0:
        raise ValueError(
            f"A mask of shape {alive.shape} is no matrix; give one of shape (out, in) or (out, in, *kernel)."
        )
    n_outputs, n_inputs = alive.shape[:2]
    if n_outputs % groups:
        raise ValueError(f"{n_outputs} outputs cannot be split into {groups} groups of equal size.")
    kernel = math.prod(alive.shape[2:])
    matrix = np.ascontiguousarray(alive.reshape(n_outputs, n_inputs * kernel))
    row_span = -(-n_outputs // max_rows)
    column_span = 1 if n_inputs * kernel <= max_columns else kernel * -(-n_inputs // max_columns)
    counts = _block_sums(matrix, row_span, column_span)
    sizes = np.outer(_spans(n_outputs, row_span), _spans(n_inputs * kernel, column_span))
    # Rounded up: a single weight in a large cell is not to vanish.
    cells = -(-FULL * counts // sizes)
    read = matrix.reshape(groups, n_outputs // groups, n_inputs, kernel).any(axis=(1, 3))
    return MaskPicture(
        cells=cells.astype(np.uint8).tobytes(),
        n_rows=counts.shape[0],
        n_columns=counts.shape[1],
        row_span=row_span,
        column_span=column_span,
        kernel=kernel,
        n_outputs=n_outputs,
        n_inputs=groups * n_inputs,
        channels=alive.ndim > 2,
        n_weights=alive.size,
        n_alive=int(counts.sum()),
        dead_outputs=n_outputs - int(np.count_nonzero(matrix.any(axis=1))),
        unused_inputs=read.size - int(np.count_nonzero(read)),
    )


def limits_for(n_layers: int, n_pictures: int, budget: int) -> tuple[int, int]:
    """Return the most rows and columns of a picture, so that `n_pictures` of each of `n_layers` layers stay within `budget` bytes.

    Examples
    --------
    >>> limits_for(10, 24, 16 << 20), limits_for(160, 24, 16 << 20)
    ((128, 256), (46, 93))
    """
    cells = budget / max(1, n_layers * n_pictures)
    scale = min(1.0, math.sqrt(cells / (MAX_ROWS * MAX_COLUMNS)))
    return max(1, int(scale * MAX_ROWS)), max(1, int(scale * MAX_COLUMNS))


def _block_sums(matrix: NDArray[np.bool_], row_span: int, column_span: int) -> NDArray[np.int64]:
    """Return how many entries are true in each block, `(rows / row_span, columns / column_span)` rounded up."""
    along = np.add.reduceat(matrix, np.arange(0, matrix.shape[1], column_span), axis=1, dtype=np.int32)
    return np.add.reduceat(along, np.arange(0, matrix.shape[0], row_span), axis=0, dtype=np.int64)


def _spans(length: int, span: int) -> NDArray[np.int64]:
    """Return the sizes of the parts of `length` that are cut every `span`."""
    starts = np.arange(0, length, span)
    return np.minimum(span, length - starts)
