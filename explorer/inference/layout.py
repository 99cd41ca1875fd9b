"""How a tensor lies in memory between native kernels, and why no convolution needs a border case.

**Planes.** Each channel of each image is a plane: its rows follow one another at a fixed `pitch`, a little wider than the image. The gap at the
end of a row is kept zero and serves as the right padding of that row and the left padding of the next; before and after each plane lie zero
guards, for the rows above and below. So at stride one **every tap of a convolution is the whole input plane shifted by a constant**: the
operand of output pixel p is ``plane[p + shift]``, inside the image or in a zero. Input and output of such a convolution must share the pitch;
so must the operands of an addition. `PitchClasses` finds who shares. A convolution of stride s reads the s x s *phases* of its input (the pixels
at rows and columns that leave the same remainders), each of which is such a plane again, see lower.py.

Where the gaps would cost more lanes than their zeros save work, and all convolutions that read them are sparse, there are none: rows of 28 pixels, which are 14 tiles of 7 vectors of 8 lanes,
and 17 of 6 with a gap of one pixel. A tap then finds the first pixels of the next row, or the last of the row before, and masks zero them while they are copied ("shift", see kernels/conv.py).

**Tiles.** What only 1 x 1 convolutions read (and additions to convolutions) may lie tile by tile instead: the first T vectors of every channel, then the
next T of every channel. A job then reads and writes one piece of memory, every operand on a vector boundary, and two threads that work on neighbouring tiles
have no cache line in common, nor one that the other's hardware prefetcher takes away. (ResNet-50 at 90 % on a Xeon: 1.14 x on two cores, 1.01 to 1.06 x on
one; without zeros 1.02 to 1.03 x.) Operands that follow one another closely also reach the L1 cache sooner. (1 x 1 layers of MobileNetV1 at 90 % on Zen 4, one core: 1.15 to 1.3 x.) The
pixels, with the gaps between their rows, are the same.

**Memory** is shared by tensors that are not alive at the same time, whatever their layouts: what is written then lands where the caches are warm. The zeros around
planes are made anew where something else lay there before, see kernels/zero_gaps.py.

**Tokens** (linear layers on (..., tokens, features)) use the same planes, with features as channels and one long row of tokens.

**Vectors** hold one value per channel (after pooling), one image after another. They are small, and float32 also where planes are float16.

Planes and vectors are also torch views of the same memory, so that operators without a native kernel read and write them in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from explorer.inference.native import Isa

MAX_TILE = 8
"""Vectors of pixels that a job takes at most."""

_SMALLEST_TILE = 4
_NONZERO_COST = 1.5
"""What reading a nonzero costs, in vectors."""

_EVEN_COST = 1.03
"""Of tiles of an even number of vectors: the same vector of neighbouring channels falls into half of the sets of the L1 cache, or fewer. (Layers of ResNet-50
at 28 x 28 pixels, 90 %, Zen 4: with 7 vectors 0.95 to 1.00 of the time of 8, as programs; 0.99 as loops with AVX2.)"""

_WORTH_WHOLE_VECTORS = 1.07
"""A row is rounded up to whole vectors when its plane then costs no more than this factor: 15 to 16, and 29 to 32 (7 tiles of 8 vectors either way),
but not 57 to 64."""

_WORTH_MASKS = 0.97
"""Rows follow one another without a gap where their plane then costs less than this factor: 28 pixels (AVX2: 14 tiles of 7 vectors in place of 17 of 6)."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Planes of pixels.

    Attributes
    ----------
    shape : tuple of int
        The tensor's own shape: (N, C, H, W), (N, C, L), or (..., F) for tokens.
    images, channels, rows, columns : int
    pitch : int
        Elements from one row to the next.
    plane : int
        Elements from one plane to the next: a multiple of the vector length, and an odd one, so that planes do not all fall into the
        same cache sets.
    guard : int
        Zero elements before the first plane (and after each plane).
    lanes : int
    tokens : bool
    of_channels : int
        Channels of the tensor that these planes are a range of; 0 when they stand alone.
    element_bytes : int
        4 for float32, 2 for float16.
    tile : int
        Vectors of a channel that lie together when the tensor lies tile by tile; 0 for whole planes. A plane is then a tile of one channel.
    apart : int
        Elements from one image to the next where a tensor in the same memory needs more than this one; 0: what the planes need.
    abreast : int
        Images that lie side by side in each row, see `explorer.inference.abreast`: `columns` then counts from the first column of the first to the last of
        the last, and `images` counts such planes.
    slot : int
        Elements of a row that belong to one image where others lie beside it, its gap among them; 0 where none do.
    """

    shape: tuple[int, ...]
    images: int
    channels: int
    rows: int
    columns: int
    pitch: int
    plane: int
    guard: int
    lanes: int
    tokens: bool = False
    of_channels: int = 0
    element_bytes: int = 4
    tile: int = 0
    apart: int = 0
    abreast: int = 1
    slot: int = 0

    @property
    def vectors(self) -> int:
        """Vectors that cover the pixels of a plane."""
        return -(-self.rows * self.pitch // self.lanes)

    @property
    def is_cut(self) -> bool:
        """Whether a channel lies in several tiles: of one, its vectors follow one another as those of a plane do."""
        return 0 < self.tile < self.vectors

    @property
    def row_vectors(self) -> int:
        """Vectors that cover a row with its gap."""
        return -(-self.pitch // self.lanes)

    @property
    def takes_rows(self) -> bool:
        """Whether kernels that go row by row, and by whole vectors, may write it in tiles: each vector lies in one tile, or there is only one, and they fit it."""
        last = (self.rows - 1) * self.pitch + self.row_vectors * self.lanes
        return self.pitch % self.lanes == 0 or (
            self.tile == self.vectors and last <= self.vectors * self.lanes
        )

    @property
    def has_gaps(self) -> bool:
        """Whether those vectors hold elements that are no pixels."""
        return self.vectors * self.lanes != self.rows * self.columns

    @property
    def image_columns(self) -> int:
        """Columns of one image."""
        return self.columns - (self.abreast - 1) * self.slot

    @property
    def has_neighbours(self) -> bool:
        """Whether this is one image of several side by side: what follows its columns is not its own."""
        return self.slot > 0 and self.abreast == 1

    @property
    def inside(self) -> NDArray[np.int64]:
        """Where the pixels of a plane lie, in elements of it: (rows, columns of all images)."""
        first = np.arange(self.abreast)[:, None] * self.slot + np.arange(self.image_columns)
        return np.arange(self.rows)[:, None] * self.pitch + first.reshape(-1)

    @property
    def n_bytes(self) -> int:
        """Bytes of the values themselves, without gaps and guards."""
        pixels = self.rows * self.abreast * self.image_columns
        return self.element_bytes * self.images * self.channels * pixels

    @property
    def tiles_overlap(self) -> bool:
        """Whether the last tile computes some pixels of the one before it again."""
        return not self.tile and self.vectors > MAX_TILE and self.vectors % tile_of(self.vectors) != 0

    @property
    def is_compactable(self) -> bool:
        """Whether a plane fits one tile, and its pixels without the gaps need fewer vectors."""
        return self.vectors <= MAX_TILE and self.compact_vectors < self.vectors

    @property
    def compact_vectors(self) -> int:
        """Vectors of a plane's pixels without the gaps."""
        return -(-self.rows * self.columns // self.lanes)

    @property
    def image(self) -> int:
        """Elements from one image to the next."""
        if self.apart:
            return self.apart
        if self.tile:
            return self.channels * self.vectors * self.lanes
        return (self.of_channels or self.channels) * self.plane

    @property
    def image_bytes(self) -> int:
        """Bytes from one image to the next."""
        return self.element_bytes * self.image

    @property
    def plane_bytes(self) -> int:
        """Bytes from one plane to the next."""
        return self.element_bytes * self.plane

    @property
    def pitch_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.element_bytes * self.pitch

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector."""
        return self.element_bytes * self.lanes

    def tile_step(self, tile: int) -> int:
        """Bytes from one tile of `tile` vectors to the next."""
        return self.channels * self.plane_bytes if self.tile else tile * self.vector_bytes

    def element(self, pixels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where pixels (row * pitch + column) of the first channel lie: elements from the first."""
        if not self.tile:
            return pixels
        size = self.tile * self.lanes
        return pixels // size * self.channels * size + pixels % size

    def in_tiles(self, threads: int) -> Planes | None:
        """The same tensor tile by tile, for so many threads that share an image; None where no size of tiles divides the plane.

        Tensors with planes of the same size get tiles of the same size.
        """
        sizes = [t for t in range(_SMALLEST_TILE, MAX_TILE + 1) if self.vectors % t == 0]
        if not sizes:
            return None

        def cost(tile: int) -> float:
            even = _EVEN_COST if tile % 2 == 0 else 1.0
            return even * _cost(self.vectors, tile, threads)

        tile = min(sizes, key=lambda t: (cost(t), -t))
        return replace(self, plane=tile * self.lanes, guard=0, tile=tile)

    @property
    def reuse_key(self) -> tuple[str | int, ...]:
        """Tensors with equal keys may use the same memory one after the other: their guards and gaps coincide.

        Not every kernel writes every gap of a plane: it relies on what the tenants before it left there, which is zero. After a tensor with another key
        gaps are zeroed, see `explorer.inference.kernels.zero_gaps`, if they may not hold anything, as those of tiles may.
        """
        return (
            "planes",
            self.plane,
            self.rows,
            self.columns,
            self.pitch,
            self.guard,
            self.slot,
            self.element_bytes,
        )

    @property
    def before(self) -> int:
        """Elements to reserve before the first pixel (a whole number of vectors). Some kernels read (never write) a few vectors before the guard."""
        if self.tile:
            return 0
        return _round_up(self.guard, self.lanes) + 4 * self.lanes

    @property
    def elements(self) -> int:
        """Elements to reserve in all. Lanes that are no pixels may read (never write) up to two rows past the last plane."""
        if self.tile:
            # Pixels that begin inside a vector are read by whole vectors.
            return self.images * self.image + self.lanes
        return (
            self.before
            + self.images * self.image
            + _round_up(self.guard + 2 * self.pitch, self.lanes)
            + 4 * self.lanes
        )

    def view(self, storage: torch.Tensor, skipped: int = 0) -> torch.Tensor | None:
        """The tensor, as a torch view of `storage` (whose element `skipped` is the first reserved one); None for tiles, which no strides describe."""
        if self.tile:
            return None
        if self.tokens:
            strides = [1] * len(self.shape)
            strides[-1] = self.plane
            for axis in range(len(self.shape) - 3, -1, -1):
                strides[axis] = strides[axis + 1] * self.shape[axis + 1]
            return storage.as_strided(self.shape, strides, skipped + self.before)
        strides = [self.image, self.plane, self.pitch, 1]
        if len(self.shape) == 3:
            strides = [self.image, self.plane, 1]
        return storage.as_strided(self.shape, strides, skipped + self.before)


@dataclass(frozen=True, slots=True)
class Vectors:
    """One value per channel and image, always float32; `stride` elements from one image to the next."""

    shape: tuple[int, ...]
    images: int
    features: int
    stride: int

    @property
    def element_bytes(self) -> int:
        return 4

    @property
    def image_bytes(self) -> int:
        """Bytes from one image to the next."""
        return self.element_bytes * self.stride

    @property
    def n_bytes(self) -> int:
        """Bytes of the values themselves."""
        return self.element_bytes * self.images * self.features

    @property
    def reuse_key(self) -> tuple[str, int]:
        return ("vectors", self.stride)

    @property
    def before(self) -> int:
        return 0

    @property
    def elements(self) -> int:
        return self.images * self.stride

    def view(self, storage: torch.Tensor) -> torch.Tensor:
        """The tensor, as a torch view of `storage`."""
        strides = [self.stride, 1] + [1] * (len(self.shape) - 2)
        return storage.as_strided(self.shape, strides, 0)


Layout = Planes | Vectors


def _cost(vectors: int, tile: int, sharing: int = 1) -> float:
    """Of a plane cut into such tiles, for each of the threads that share them: a tile costs its vectors plus what reading the nonzeros again does."""
    tiles = -(-vectors // tile)
    return -(-tiles // sharing) * (tile + _NONZERO_COST)


def _tile_sizes(vectors: int) -> range:
    return range(min(_SMALLEST_TILE, vectors), min(MAX_TILE, vectors) + 1)


def tile_of(vectors: int) -> int:
    """Vectors per tile: about seven keep both FMA units busy; tiles that divide the plane evenly waste nothing."""
    return min(_tile_sizes(vectors), key=lambda tile: (_cost(vectors, tile), -tile))


def channel_tile(columns: int, channels: int, isa: Isa, *, overlap: bool = False) -> tuple[int, int] | None:
    """Pixels P and vectors of output channels R of a tile with channels in the lanes (see kernels/conv_channels.py); None where none fits.

    The fewest cycles for each product that is wanted: channels that do not exist waste lanes, and so do pixels that are computed twice where the last tile of
    a row may `overlap` the one before it. Otherwise P divides a row.
    """
    best, best_cost = None, float("inf")
    held, lanes = channel_tile_held(isa), isa.lanes
    for pixels in range(4, min(columns, 14) + 1):
        if columns % pixels and not overlap:
            continue
        in_row = len(channel_columns(columns, pixels)) * pixels / columns
        for vectors in range(1, 5):
            if pixels * vectors + vectors + held > isa.registers:
                continue
            sums, width = pixels * vectors, vectors * lanes
            # Of a core with two FMA units of four cycles and two loads a cycle; half a cycle for the loop.
            cycles = max(sums / 2, 4, (pixels + vectors) / 2) + 0.5
            cost = cycles * (-(-channels // width) * width / channels) * in_row / sums
            if cost < best_cost:
                best, best_cost = (pixels, vectors), cost
    return best


def channel_columns(columns: int, pixels: int) -> NDArray[np.int64]:
    """Where the tiles of a row begin: side by side, and a last one that does not fit over its neighbour."""
    return np.minimum(np.arange(0, columns, pixels), columns - pixels)


def channel_tile_held(isa: Isa) -> int:
    """Registers beside sums and weights: one for a pixel; without broadcasts as memory operands (NEON, 16 bytes wide) LLVM loads some ahead."""
    return 1 if isa.width > 16 else 4


def _tiled_cost(rows: int, pitch: int, lanes: int, sharing: int = 1) -> float:
    """Of the fastest way to cut a plane into tiles, for each of the threads that share them."""
    vectors = -(-rows * pitch // lanes)
    return min(_cost(vectors, tile, sharing) for tile in _tile_sizes(vectors))


def worth_masks(rows: int, without: int, pitch: int, lanes: int, sharing: int) -> bool:
    """Whether rows had better have the pitch `without` gaps, at which taps beyond their ends have to be masked; `sharing`: threads that share an image.

    Where rows are whole vectors with their gaps, as 14 pixels and two more are, they had better stay so: without, a 3 x 3 layer needs nine copies of its operand in place of three.
    (Tiles of 5 vectors in place of 7: 1 x 1 layers of ResNet-50 0.92, but 3 x 3 layers 1.10 of the time; Zen 3, 90 %.)
    """
    if pitch % lanes == 0 and without % lanes:
        return False
    return _tiled_cost(rows, without, lanes, sharing) < _WORTH_MASKS * _tiled_cost(
        rows, pitch, lanes, sharing
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(slots=True)
class PitchClasses:
    """Which tensors must share their pitch, and how much zero space the convolutions that read them need (union-find)."""

    parent: dict[str, str] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    gap: dict[str, int] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    rows_above: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rows: int, columns: int) -> None:
        """A tensor of so many rows with `columns` pixels each."""
        if name not in self.parent:
            self.parent[name] = name
            self.columns[name], self.rows[name] = columns, rows
            self.gap[name] = self.beyond[name] = self.rows_above[name] = 0

    def find(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def tie(self, a: str, b: str) -> None:
        """`a` and `b` must have the same pitch."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a
            for table in (self.columns, self.gap, self.beyond, self.rows_above, self.rows):
                table[a] = max(table[a], table[b])

    def pad(self, name: str, rows: int, columns: int, *, masked: bool = False) -> None:
        """A convolution reads `name` with this padding; `masked`: it can do without a gap."""
        root = self.find(name)
        self.rows_above[root] = max(self.rows_above[root], rows)
        self.beyond[root] = max(self.beyond[root], columns)
        if not masked:
            self.gap[root] = max(self.gap[root], columns)

    def planes(
        self,
        name: str,
        shape: tuple[int, ...],
        images: int,
        channels: int,
        rows: int,
        columns: int,
        isa: Isa,
        tokens: bool = False,
        sharing: int = 1,
    ) -> Planes:
        """The layout of tensor `name`, once all ties and paddings are known; `sharing`: threads that share an image."""
        root, lanes = self.find(name), isa.lanes
        gap = self.beyond[root]
        pitch = self.columns[root] + gap
        # Rows of whole vectors leave only three kinds of misaligned taps in a 3 x 3 convolution, see `explorer.inference.pack.operands`.
        whole = _round_up(pitch, lanes)
        tallest = self.rows[root]  # all that share the pitch must come to the same conclusion
        widened = _tiled_cost(tallest, whole, lanes) / _tiled_cost(tallest, pitch, lanes)
        if gap and widened <= _WORTH_WHOLE_VECTORS:
            pitch = whole
        least = self.columns[root] + self.gap[root]
        if least < self.columns[root] + gap and worth_masks(tallest, least, pitch, lanes, sharing):
            pitch = least
        guard = max(self.rows_above[root] * pitch + gap, 1)
        vectors = -(-rows * pitch // lanes)
        plane = _round_up(vectors * lanes + guard, lanes)
        if plane // lanes % 2 == 0:
            plane += lanes
        return Planes(
            shape, images, channels, rows, columns, pitch, plane, guard, lanes, tokens, 0, isa.element_bytes
        )
