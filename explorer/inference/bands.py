"""Cuts a step into bands of its output's pixels: which calls of its kernel compute a band, and which pixels they read and write.

Pixels are counted as elements of a plane: row * pitch + column. What a kernel loads beside them (the rest of a vector) it does not use.
See `explorer.inference.depth_first` for what bands are good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.inference.depth_first import Bands
from explorer.inference.kernels.builder import Record
from explorer.inference.layout import Planes
from explorer.inference.memory import Memory

BAND_VECTORS = 24
"""Vectors of a plane in one band of a kernel that works channel by channel: with fewer, what it does once for each channel would cost more than the pixels."""

Cuts = tuple[NDArray[np.int64], NDArray[np.int64]]
"""First and number of the rows, or vectors, of each band."""


def _reached(writes: NDArray[np.int64], shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is read for those pixels; `shifts`: elements from a pixel to the operand of each tap."""
    return writes + np.array([shifts.min(), shifts.max()])


def _of_convolution(
    calls: Sequence[tuple[tuple[int, int, int], ...]],
    writes: NDArray[np.int64],
    shifts: NDArray[np.int64],
    has_residual: bool,
) -> Bands:
    """`shifts` as in `_reached`."""
    reads = _reached(writes, shifts)
    return Bands(tuple(calls), (reads, writes) if has_residual else (reads,), writes)


def of_tiles(
    y: Planes,
    tiles: int,
    tile: int,
    parts: int,
    shifts: NDArray[np.int64],
    has_residual: bool,
    arguments: int,
) -> Bands:
    """Bands of `kernels.conv`: its tiles of `tile` vectors, one by one; `tile` 0: of a plane that is one tile."""
    size = (tile or y.vectors) * y.lanes
    first = np.arange(tiles) * size
    first[-1] = y.vectors * y.lanes - size  # a last tile that does not fit lies over its neighbour
    calls = [tuple((arguments, part * tiles + i, 1) for part in range(parts)) for i in range(tiles)]
    return _of_convolution(calls, np.stack([first, first + size], 1), shifts, has_residual)


def of_rows(
    y: Planes,
    rows: int,
    tiles: int,
    parts: int,
    shifts: NDArray[np.int64],
    has_residual: bool,
    arguments: int,
) -> Bands:
    """Bands of `kernels.winograd`: so many rows each, in which there are several of its `tiles`."""
    first = np.arange(0, y.rows, rows)
    last = np.minimum(first + rows, y.rows) - 1
    each = tiles // len(first)
    writes = np.stack([first * y.pitch, last * y.pitch + y.row_vectors * y.lanes], 1)
    calls = [
        tuple((arguments, part * tiles + i * each, each) for part in range(parts)) for i in range(len(first))
    ]
    return _of_convolution(calls, writes, shifts, has_residual)


def of_chunks(
    positions: NDArray[np.int64],
    pixels: int,
    per_chunk: int,
    parts: int,
    shifts: NDArray[np.int64],
    has_residual: bool,
    arguments: int,
) -> Bands:
    """Bands of `kernels.conv_channels`: its chunks of `per_chunk` tiles, which begin at `positions` and have so many `pixels`."""
    first = np.arange(0, len(positions), per_chunk)
    last = np.minimum(first + per_chunk, len(positions)) - 1
    writes = np.stack([positions[first], positions[last] + pixels], 1)
    calls = [((arguments, i * parts, parts),) for i in range(len(first))]
    return _of_convolution(calls, writes, shifts, has_residual)


@dataclass(frozen=True, slots=True)
class ByChannel:
    """A kernel whose jobs are groups of channels. Each band has arguments of its own, and all of the jobs.

    Attributes
    ----------
    memory : Memory
        Where they are put.
    record : Record
    arguments : ndarray
        Those of the whole step.
    x, y : Planes
        The operand, and the result.
    pieces : int
        Bands, all of about the same size; 0: as many as keep to `BAND_VECTORS`.
    tail : int
        Elements of the last vector of a row that are stored, where not all are.
    """

    memory: Memory
    record: Record
    arguments: NDArray[np.int64]
    x: Planes
    y: Planes
    pieces: int = 0
    tail: int = 0

    def _cut(self, count: int, size: int) -> Cuts:
        """Rows or vectors of each band: so many of `count`, or what makes the number of bands that is wanted."""
        size = -(-count // self.pieces) if self.pieces else size
        first = np.arange(0, count, size)
        return first, np.minimum(first + size, count) - first

    @property
    def _is_tiled(self) -> bool:
        """Whether a table tells where the result's vectors go."""
        return bool(self.arguments[self.record.index("places")])

    def depthwise(
        self,
        taps: Sequence[tuple[int, int]],
        stride: tuple[int, int],
        vectors: int,
        by_rows: bool,
        *,
        pairs: bool = False,
    ) -> Bands:
        """Bands of `kernels.depthwise`, whose rows have so many vectors and may be taken in `pairs`, or which takes the plane for one row."""
        x, y = self.x, self.y
        if not by_rows and not pairs:
            first, count = self._cut(y.vectors, BAND_VECTORS)
            start = first * y.vector_bytes
            mask = start if self.arguments[self.record.index("mask")] else 0
            shifts = np.array([row * x.pitch + column for row, column in taps])
            writes = np.stack([first, first + count], 1) * y.lanes
            reads = _reached(writes, shifts)
            to = {"places": 4 * first} if self._is_tiled else {"out": start}
            return self._bands(reads, writes, {"vectors": count}, {"x": start, "mask": mask} | to)
        first, count = self._cut(y.rows, max(1 + pairs, BAND_VECTORS // vectors))
        if pairs and count[-1] == 1:  # goes with the rows before it
            first, count = first[:-1], np.append(count[:-2], count[-2] + 1)
        window, columns = [row for row, _ in taps], [column for _, column in taps]
        top, bottom = first * stride[0] + min(window), (first + count - 1) * stride[0] + max(window) + 1
        reads = np.stack([top, bottom], 1) * x.pitch + np.array([min(columns), max(columns)])
        to = {"places": 4 * first * vectors} if self._is_tiled else {"out": first * y.pitch_bytes}
        moved = {"x": first * stride[0] * x.pitch_bytes} | to
        return self._bands(reads, self._rows(first, count, vectors), {"rows": count}, moved)

    def shuffled(self, offsets: NDArray[np.int64], stride: int, chunks: int) -> Bands:
        """Bands of `kernels.split` for small strides; `offsets`, (rows, row phases), and `chunks` as in its arguments."""
        x, y = self.x, self.y
        first, count = self._cut(y.rows, max(1, BAND_VECTORS // chunks))
        tables = [self.memory.put(offsets[a : a + n]) for a, n in zip(first, count, strict=True)]
        reads = np.stack([first, first + count], 1) * stride * x.pitch
        new = {"rows": count, "table": np.array(tables)}
        if x.tile:
            size, tiles = x.tile * x.lanes, x.vectors // x.tile
            new |= {
                "first_tile": reads[:, 0] // size,
                "last_tile": np.minimum(-(-reads[:, 1] // size), tiles),
            }
        to = {"places": 4 * first * y.row_vectors} if self._is_tiled else {"out": first * y.pitch_bytes}
        return self._bands(reads, self._rows(first, count, chunks), new, to)

    def gathered(self, table: NDArray[np.int32], stride: int) -> Bands:
        """Bands of `kernels.split` with a table of indices, (phases, elements)."""
        x, y = self.x, self.y
        first, count = self._cut(y.vectors, BAND_VECTORS)
        writes = np.stack([first, first + count], 1) * y.lanes
        tables = [self.memory.put(table[:, a:b]) for a, b in writes]
        top, bottom = writes[:, 0] // y.pitch, (writes[:, 1] - 1) // y.pitch + 1
        reads = np.stack([top, bottom], 1) * stride * x.pitch
        new = {"vectors": count, "table": np.array(tables)}
        to = {"places": 4 * first} if self._is_tiled else {"out": first * y.vector_bytes}
        return self._bands(reads, writes, new, to)

    def _rows(self, first: NDArray[np.int64], count: NDArray[np.int64], vectors: int) -> NDArray[np.int64]:
        """What rows of so many vectors write: the last one may reach into the row after it, which is written later."""
        beyond = self.y.lanes - self.tail if self.tail else 0
        last = (first + count - 1) * self.y.pitch + vectors * self.y.lanes - beyond
        return np.stack([first * self.y.pitch, last], 1)

    def _bands(
        self,
        reads: NDArray[np.int64],
        writes: NDArray[np.int64],
        new: dict[str, NDArray[np.int64]],
        moved: dict[str, Any],
    ) -> Bands:
        """`new`: arguments that each band has of its own; `moved`: bytes that are added to addresses."""
        rows = np.tile(self.arguments, (len(writes), 1))
        for name, values in new.items():
            rows[:, self.record.index(name)] = values
        for name, added in moved.items():
            rows[:, self.record.index(name)] += added
        start, jobs = self.memory.put(rows), int(self.arguments[self.record.index("jobs")])
        calls = tuple(((start + i * rows.strides[0], 0, jobs),) for i in range(len(rows)))
        return Bands(calls, (reads,), writes)
