"""Winograd's minimal filtering along columns: its matrices, which convolutions have a filter for it, and how their results are cut into jobs.

The kernel that uses all this is kernels/winograd.py, which explains the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from explorer.inference.layout import Planes, channel_columns, tile_of
from explorer.inference.taps import Taps

ROWS = 4
"""Rows of the result that are computed together."""

_POINTS = {3: (0.0, 1.0, -1.0, 0.5, -2.0), 4: (0.0, 1.0, -1.0, 0.5, -2.0, -0.5)}
"""For a filter of R rows, where its polynomial is evaluated; one more point is infinity. The second and third are 1 and -1. Of those tried these have the
smallest errors."""

_WORTH = 0.75
"""Products / those of the definition, beyond which sums of rows would cost what is gained: in two phases a filter of three rows has 0.83."""


@cache
def transforms(taps: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A (4, N), G (N, R) and B (N, N) for a filter of R = 3 or 4 rows, N = R + 3: ``y = A ((G g) * (B d))``.

    Rows of B are divided by powers of two, and those of G multiplied, so that what is transformed stays about as large as it was.
    """
    points, n = np.array(_POINTS[taps]), taps + ROWS - 1

    def values(count: int) -> NDArray[np.float64]:
        """Of each power below `count`, in all points."""
        at_infinity = np.arange(count) == count - 1
        return np.vstack([points[:, None] ** np.arange(count), at_infinity])

    b = np.zeros((n, n))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        b[i, : n - 1] = np.poly(others)[::-1] / np.prod(point - others)
    b[-1] = np.poly(points)[::-1]
    scale = 2.0 ** np.round(np.log2(np.abs(b).max(1)))[:, None]
    return values(ROWS).T, values(taps) * scale, b / scale


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter whose taps stand in columns of R rows, in each phase.

    Attributes
    ----------
    top : int
        Rows from a row of the result to the first that it reads.
    rows : int
        R.
    phase, column : (G,) int64
        Of each column of taps.
    taps : (G, R) int64
        The taps of each, -1 where there is none.
    """

    top: int
    rows: int
    phase: NDArray[np.int64]
    column: NDArray[np.int64]
    taps: NDArray[np.int64]

    @classmethod
    def of(cls, taps: Taps) -> Filter | None:
        """The filter with these taps; None where it is too high, or too low to be worth it."""
        top, rows = int(taps.row.min()), int(np.ptp(taps.row)) + 1
        places = np.stack([taps.phase, taps.column], 1)
        columns, which = np.unique(places, axis=0, return_inverse=True)
        products = len(columns) * (rows + ROWS - 1) / (len(taps.row) * ROWS)
        if rows not in _POINTS or products > _WORTH:
            return None
        table = np.full((len(columns), rows), -1)
        table[which.reshape(-1), taps.row - top] = np.arange(len(taps.row))
        return cls(top, rows, columns[:, 0], columns[:, 1], table)

    @property
    def points(self) -> int:
        """Products for each column of four results (N)."""
        return self.rows + ROWS - 1

    @property
    def width(self) -> int:
        """Columns from the first tap of a row to the last."""
        return int(np.ptp(self.column))

    def transformed(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """G g of weights (M, C, taps): (N, M, C, G)."""
        with_zeros = np.concatenate([weight, np.zeros((*weight.shape[:2], 1), np.float32)], 2)
        columns = with_zeros[:, :, self.taps].astype(np.float64)
        return np.einsum("nr,mcgr->nmcg", transforms(self.rows)[1], columns).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Chunks:
    """How the columns of a result are cut.

    Attributes
    ----------
    tile : int
        Vectors of a chunk.
    first : (chunks,) int64
        The first column of each.
    spare : int
        Columns by which the only chunk is wider than the result.
    """

    tile: int
    first: NDArray[np.int64]
    spare: int

    @classmethod
    def of(cls, y: Planes, *, residual: bool) -> Chunks | None:
        """None where the rows of this result are too short, or a residual would lie in tiles. What is added must be added once only."""
        columns = y.columns
        if columns < y.lanes or (y.is_cut and residual):
            return None
        vectors = -(-columns // y.lanes)
        tile = tile_of(vectors)
        if tile >= vectors:
            first, spare = np.zeros(1, np.int64), vectors * y.lanes - columns
        else:
            first, spare = channel_columns(columns, tile * y.lanes), 0
        again = spare or bool(np.any(np.diff(first) < tile * y.lanes))
        return None if residual and again else cls(tile, first, spare)

    def places(self, y: Planes) -> NDArray[np.int64]:
        """Of a result in tiles, where the vectors of each row go: rows of `kernels.winograd.PLACE`, (rows, chunks * tile, 3)."""
        vectors = np.minimum(np.arange(self.tile) * y.lanes, self.tile * y.lanes - self.spare - y.lanes)
        first = (self.first[:, None] + vectors).reshape(-1) + np.arange(y.rows)[:, None] * y.pitch
        size = y.tile * y.lanes
        count = np.minimum(size - first % size, y.lanes)
        where = y.element(np.stack([first, first + count], -1)) - count[..., None] * np.array([0, 1])
        return np.concatenate([where * y.element_bytes, count[..., None]], -1)
