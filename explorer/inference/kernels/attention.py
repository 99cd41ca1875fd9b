"""Scaled dot-product attention: each query gets a mean of all values, weighted by how well it fits their keys.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, equation 1: softmax(Q K^T / sqrt d) V, for
each head.

The algorithm in plain words
  Tokens lie in the lanes and features in planes (see layout.py). A job is one head of one sample, and one tile: T
  vectors of neighbouring queries.
    scores   for R keys at a time: R x T sums in registers; for each feature: T loads of the queries serve R
             keys, each broadcast. The scaled sums, and what a mask adds to them, go to scratch,
             (keys, T * lanes) float32; the largest of each query stays in registers.
    softmax  each score becomes exp(score - largest), and is summed; nothing is ever summed across lanes.
    values   for R features at a time: R x T sums in registers; for each key: T loads of its weights serve R
             values. What leaves is divided by the sum of the weights.

The numpy twin is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels.activation import exponential
from explorer.inference.kernels.builder import I32, I64, PTR, VOID, Function, Record, Value
from explorer.inference.kernels.registers import exponential_parts
from explorer.inference.native import Isa

_OPERANDS = ("q", "k", "v", "out")
ARGUMENTS = Record(
    (
        *_OPERANDS,
        *(f"{name}_{step}" for name in _OPERANDS for step in ("image", "head", "plane")),
        "heads", "tiles", "queries", "keys", "features", "value_features", "last_tile", "scale",
        "added", "added_image", "added_head", "added_key",
    )
)  # fmt: skip
"""Attention of all heads of all samples. Job = (sample, head, tile), the tile changes fastest.

q                 (samples, heads, features, queries) values: the address of the first feature of the first head
k                 (samples, heads, features, keys) values
v                 (samples, heads, value_features, keys) values
out               (samples, heads, value_features, queries) values
.._image          bytes from one sample to the next: tokens of all samples follow one another in a plane
.._head           bytes from one head to the next
.._plane          bytes from one feature to the next
heads, tiles      of a sample: heads, tiles of its queries
queries, keys     tokens of a sample
features          of a query and a key, of one head
value_features    of a value, of one head
last_tile         bytes from query 0 to the last tile, which overlaps its neighbour when tiles do not fit evenly
scale             of the scores: the bits of a float32
added             (samples, heads, keys, queries) float32, added to the scaled scores, where there is a mask
added_image       bytes from one sample's to the next one's; 0 where it is the same for all
added_head        bytes from one head's to the next one's; 0 where it is the same for all
added_key         bytes from one key to the next
"""


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """What the machine code depends on.

    Attributes
    ----------
    tile : int
        Vectors of queries in a tile (T).
    rows : int
        Keys, and then features, that share their loads (R).
    masked : bool
        Whether the last vector of a sample reaches into the next one, so that it must not be stored whole.
    added : bool
        Whether something is added to the scores: a mask of zeros and minus infinity, or a bias.
    none_is_zero : bool
        Whether a query yields zeros when all its scores are minus infinity, as torch's scaled_dot_product_attention
        does. It yields NaN otherwise, as a softmax does.
    """

    tile: int
    rows: int
    masked: bool
    added: bool = False
    none_is_zero: bool = False

    def scratch_bytes(self, n_keys: int, lanes: int) -> int:
        """Bytes of scratch that a job needs: the scores of its tile."""
        return n_keys * self.tile * 4 * lanes

    def build(self, isa: Isa) -> tuple[Value, str]:
        """The IR module of this kernel and the name of its entry."""
        return _Generator(self, isa).module()


class _Generator:
    def __init__(self, kernel: AttentionKernel, isa: Isa) -> None:
        self.k = kernel
        # Scores are float32 whatever planes hold.
        self.score_bytes = 4 * isa.lanes
        self.score_row_bytes = kernel.scratch_bytes(1, isa.lanes)
        self.exponentials = exponential_parts(kernel.tile, isa)
        self.ir = ir.Module("attention")
        self.f = Function(self.ir, "attention", VOID, [PTR, I64, PTR], isa, wide=True)

    def field(self, name: str, type_: Value = I64) -> Value:
        return self.f.field(self.f.arguments[0], ARGUMENTS, name, type_)

    def module(self) -> tuple[Value, str]:
        f, b = self.f, self.f.b
        _, job, scores = f.arguments
        tiles, heads = self.field("tiles"), self.field("heads")
        tile, rest = b.srem(job, tiles), b.sdiv(job, tiles)
        head, image = b.srem(rest, heads), b.sdiv(rest, heads)
        position = f.minimum(b.mul(tile, I64(f.width * self.k.tile)), self.field("last_tile"))
        q, k, v, out = (
            f.at(
                self.field(name, PTR),
                b.add(b.mul(image, self.field(f"{name}_image")), b.mul(head, self.field(f"{name}_head"))),
            )
            for name in _OPERANDS
        )
        added = self._added(image, head, position) if self.k.added else None
        largest = self._scores(f.at(q, position), k, added, scores)
        sums = self._softmax(scores, largest)
        self._values(scores, v, f.at(out, position), sums, position)
        b.ret_void()
        return self.ir, "attention"

    def _added(self, image: Value, head: Value, position: Value) -> Value:
        """Where what is added to this job's scores begins."""
        f, b = self.f, self.f.b
        of_image = b.mul(image, self.field("added_image"))
        of_head = b.mul(head, self.field("added_head"))
        # `position` counts the bytes of queries, which may be float16.
        of_query = b.mul(position, I64(4 // f.element_bytes))
        return f.at(self.field("added", PTR), b.add(b.add(of_image, of_head), of_query))

    def _read(self, pointer: Value, vector: int) -> Value:
        return self.f.read(pointer, self.f.width * vector)

    def _read_score(self, row: Value, vector: int) -> Value:
        return self.f.load(row, self.f.vector, self.score_bytes * vector, self.score_bytes)

    def _groups(
        self, count: Value, body: Callable[[int, Value, list[Value]], Sequence[Value]], carried: list[Value]
    ) -> list[Value]:
        """``body(rows, first, carried)`` for all of `count`: R at a time, then one at a time."""
        f, b, rows = self.f, self.f.b, self.k.rows
        full = b.sdiv(count, I64(rows))
        carried = f.loop(full, lambda i, *c: body(rows, b.mul(i, I64(rows)), list(c)), carried)
        if rows == 1:
            return carried
        return f.loop(count, lambda i, *c: body(1, i, list(c)), carried, start=b.mul(full, I64(rows)))

    def _products(
        self,
        count: Value,
        pointers: list[Value],
        steps: list[Value],
        read: Callable[[Value, int], Value],
        weights: list[Value],
    ) -> list[Value]:
        """Sums over `count` of a vector operand times R scalars.

        The first pointer is of the vectors, which `read` reads, the second of the scalars; both go on by their
        `steps`. Row r's scalar lies `weights[r]` bytes after the second pointer. Returns R x T vectors, row by
        row.
        """
        f, tile = self.f, self.k.tile

        def one(_: Value, x: Value, w: Value, *sums: Value) -> list[Value]:
            new = f.add_products(
                sums, (len(weights), tile), lambda r: f.read_one(w, weights[r]), partial(read, x)
            )
            return [f.at(x, steps[0]), f.at(w, steps[1]), *new]

        zeros = [f.constant(0.0)] * (tile * len(weights))
        return f.loop(count, one, [*pointers, *zeros])[2:]

    def _scores(self, q: Value, k: Value, added: Value | None, scores: Value) -> list[Value]:
        """Write the scaled products of queries and keys, and what is added to them; the largest of each query."""
        f, b, tile = self.f, self.f.b, self.k.tile
        scale = f.splat(f.to_float(self.field("scale")))
        steps = [self.field("q_plane"), self.field("k_plane")]
        features = self.field("features")

        def group(rows: int, first: Value, largest: list[Value]) -> list[Value]:
            size = f.element_bytes
            pointers = [q, f.at(k, b.mul(first, I64(size)))]
            sums = self._products(features, pointers, steps, self._read, [I64(size * r) for r in range(rows)])
            to = f.at(scores, b.mul(first, I64(self.score_row_bytes)))
            for i, total in enumerate(sums):
                score = b.fmul(total, scale)
                if added is not None:
                    row = f.at(added, b.mul(b.add(first, I64(i // tile)), self.field("added_key")))
                    score = b.fadd(score, f.load(row, f.vector, self.score_bytes * (i % tile)))
                f.store(score, to, self.score_bytes * i, self.score_bytes)
                larger = b.fcmp_ordered(">", score, largest[i % tile])
                largest[i % tile] = b.select(larger, score, largest[i % tile])
            return largest

        largest = self._groups(self.field("keys"), group, [f.constant(float("-inf"))] * tile)
        if not self.k.none_is_zero:
            return largest
        # Minus infinity less itself would be NaN; less this it stays what it is, of which the exponential is zero.
        lowest = f.constant(float(np.finfo(np.float32).min))
        return [b.select(b.fcmp_ordered("<", one, lowest), lowest, one) for one in largest]

    def _softmax(self, scores: Value, largest: list[Value]) -> list[Value]:
        """Scores become weights, in place; the sum of each query's weights."""
        f, b = self.f, self.f.b

        def one_key(which: Sequence[int], _: Value, row: Value, *sums: Value) -> list[Value]:
            new = []
            for i, total in zip(which, sums, strict=True):
                weight = exponential(f, b.fsub(self._read_score(row, i), largest[i]))
                f.store(weight, row, self.score_bytes * i, self.score_bytes)
                new.append(b.fadd(total, weight))
            return [f.at(row, self.score_row_bytes), *new]

        sums: list[Value] = []
        for size in self.exponentials:
            which = range(len(sums), len(sums) + size)
            zeros = [f.constant(0.0)] * size
            sums += f.loop(self.field("keys"), partial(one_key, which), [scores, *zeros])[1:]
        return sums

    def _values(self, weights: Value, v: Value, out: Value, sums: list[Value], position: Value) -> None:
        """Write the means of the values."""
        f, b, tile = self.f, self.f.b, self.k.tile
        v_plane, out_plane, keys = self.field("v_plane"), self.field("out_plane"), self.field("keys")
        shares = [b.fdiv(f.constant(1.0), total) for total in sums]
        if self.k.none_is_zero:
            zero = f.constant(0.0)
            shares = [
                b.select(b.fcmp_ordered("==", total, zero), zero, share)
                for total, share in zip(sums, shares, strict=True)
            ]
        inside = self._inside(position) if self.k.masked else []

        def group(rows: int, first: Value, _: list[Value]) -> list[Value]:
            pointers = [weights, f.at(v, b.mul(first, v_plane))]
            planes = [b.mul(I64(r), v_plane) for r in range(rows)]
            steps = [I64(self.score_row_bytes), I64(f.element_bytes)]
            means = self._products(keys, pointers, steps, self._read_score, planes)
            for i, mean in enumerate(means):
                to = f.at(out, b.mul(b.add(first, I64(i // tile)), out_plane))
                value = b.fmul(mean, shares[i % tile])
                if inside:
                    f.store_where(inside[i % tile], value, to, f.width * (i % tile))
                else:
                    f.write(value, to, f.width * (i % tile))
            return []

        self._groups(self.field("value_features"), group, [])

    def _inside(self, position: Value) -> list[Value]:
        """Which lanes of each vector hold a query of this sample."""
        f, b = self.f, self.f.b
        left = b.trunc(b.sub(self.field("queries"), b.sdiv(position, I64(f.element_bytes))), I32)
        return [f.first_lanes(b.sub(left, I32(i * f.lanes))) for i in range(self.k.tile)]


def reference(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    scale: float,
    added: NDArray[np.float32] | None = None,
    *,
    none_is_zero: bool = False,
) -> NDArray[np.float32]:
    """The numpy twin, in float64: q (..., Q, D), k (..., K, D), v (..., K, E), added (..., Q, K) float32 -> (..., Q, E) float32."""
    scores = q.astype(np.float64) @ np.swapaxes(k.astype(np.float64), -1, -2) * scale
    if added is not None:
        scores = scores + added
    largest = scores.max(-1, keepdims=True)
    if none_is_zero:
        largest = np.maximum(largest, np.finfo(np.float32).min)
    weights = np.exp(scores - largest)
    sums = weights.sum(-1, keepdims=True)
    shares = np.divide(1.0, sums, out=np.zeros_like(sums), where=(sums != 0) | (not none_is_zero))
    return (weights @ v.astype(np.float64) * shares).astype(np.float32)
