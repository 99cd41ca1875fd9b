"""What all steps are made with: machine code, memory for packed weights and tables, and the tables that several steps share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explorer.errors import EngineError
from explorer.inference.depth_first import Bands
from explorer.inference.graph import Graph, Operation
from explorer.inference.kernels import conv_tables
from explorer.inference.layout import Planes
from explorer.inference.memory import Memory
from explorer.inference.native import Emitter, Isa, Kernel, l1_bytes
from explorer.inference.pack import PackedConv
from explorer.inference.plan import Choice, Place, Plan
from explorer.inference.sparse_rows import SparseWeights

_LEAST_BLOCK_BYTES = 33 << 10


def bits(value: float) -> int:
    """A float32 as an argument of a kernel."""
    return int(np.float32(value).view(np.int32))


@dataclass(slots=True)
class Row:
    """One step.

    Attributes
    ----------
    kernel : callable
        Waits for the address of its machine code.
    arguments : ndarray
    jobs : int
        Of an image.
    label : str
    bands : callable, optional
        Cuts the step into bands of rows, given the address of its arguments.
    apart : callable, optional
        Cuts a step whose jobs are channels into so many bands, each with all of these jobs, see `explorer.inference.rows_apart`.
    images_per_job : int
        Where a job takes several images: its arguments tell how many there are, and `jobs` counts the jobs of so many images.
    fills : bool
        Whether it writes each vector of the planes, with zeros between the rows.
    """

    kernel: Callable[[], int]
    arguments: NDArray[np.int64]
    jobs: int
    label: str
    bands: Callable[[int], Bands] | None = None
    apart: Callable[[int], Bands] | None = None
    images_per_job: int = 0
    fills: bool = False


def block_bytes() -> int:
    """Operands of one K block: about the L1 cache, beside which sums and weights stream.

    Of 48 KiB, 24 to 64 are within 5 % and 40 the best. Of 32 KiB (Zen 4), 33 were best in all: 1.03 x as fast as 26 in ResNet-50, 1.02 x in BERT, where 40
    would be slower than 26: longer rows are worth more than the last operand's place in the L1 cache, to a degree.
    """
    return min(max(l1_bytes() * 13 // 16, _LEAST_BLOCK_BYTES), conv_tables.BUFFER_BYTES // 2)


@dataclass(slots=True)
class StepBuilder:
    """Makes the steps of one plan for one set of weights; `conv_steps` and `other_steps` say how each kind of operation becomes one.

    Attributes
    ----------
    plan, graph
        As `build_steps` was given them.
    memory : Memory
        Of packed weights, tables and arguments.
    packed : dict
        Packed weights by output and choice, kept from one set of steps to the next.
    emitter : Emitter
    scratch_bytes : int
        What one thread needs for any of the steps so far.
    block_bytes : int
        See `block_bytes`.
    tables : dict
        Addresses of tables that steps share, by what they depend on.
    """

    plan: Plan
    graph: Graph
    memory: Memory
    packed: dict[tuple[str, Choice], Any]
    emitter: Emitter
    scratch_bytes: int = 4096
    block_bytes: int = field(default_factory=block_bytes)
    tables: dict[Any, int] = field(default_factory=dict)

    def code(self, kernel: Kernel, isa: Isa | None = None) -> Callable[[], int]:
        """Have the machine code of a kernel made; the result waits for its address."""
        return self.emitter.code(isa or self.plan.isa, kernel)

    def once(self, operation: Operation, choice: Choice, pack: Callable[[], Any]) -> Any:
        """Packed weights, from an earlier round with the same choice when there was one."""
        key = (operation.output, choice)
        if key not in self.packed:
            self.packed[key] = pack()
        return self.packed[key]

    def shared(self, key: Any, put: Callable[[], int]) -> int:
        """Where something is in memory that several steps read, or turns of one; `put` brings it there the first time."""
        if key not in self.tables:
            self.tables[key] = put()
        return self.tables[key]

    def placed(self, operation: Operation, packed: PackedConv) -> int:
        """Where packed weights are in memory: in one place for all turns of an operation."""
        return self.shared(("packed", operation.output), lambda: packed.place(self.memory))

    @staticmethod
    def bounds(operation: Operation) -> dict[str, int]:
        """Between what its results are clamped, as arguments of its kernel."""
        a = operation.attributes
        return {"low": bits(a.get("low", -math.inf)), "high": bits(a.get("high", math.inf))}

    def constants(self, operation: Operation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight and bias; the gain of a folded batch norm is not yet in the weight, see `dense_weight` and `sparse_weights`."""
        weight = self.array(operation.weight)
        bias = np.zeros(len(weight), np.float32) if operation.bias is None else self.array(operation.bias)
        return weight, self.fitting(operation, bias)

    def array(self, name: str | None) -> NDArray[Any]:
        """A constant of the graph."""
        array: NDArray[Any] = self.graph.constants[name or ""].detach().cpu().contiguous().numpy()
        return array

    def dense_weight(self, operation: Operation) -> NDArray[np.float32]:
        """The weight as a matrix (M, K) float32."""
        weight = self.array(operation.weight)
        weight = weight.reshape(len(weight), -1)
        if operation.gain is not None:
            weight = (weight * self.array(operation.gain)[:, None]).astype(np.float32)
        return self.fitting(operation, weight)

    def sparse_weights(self, operation: Operation, channels: int = 1) -> SparseWeights:
        """The nonzeros of the weight as a matrix (M, K), so many output channels together."""
        weight = self.array(operation.weight)
        gain = None if operation.gain is None else self.array(operation.gain)
        weights = SparseWeights.of(weight.reshape(len(weight), -1), self.plan.isa, gain, channels)
        self.fitting(operation, weights.values)
        return weights

    def fitting(self, operation: Operation, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values of a weight or bias, none of which becomes infinite in the precision of the plan."""
        if self.plan.isa.precision == "fp32" or self.plan.step_family(operation) == "vectors":
            return values
        most = np.finfo(self.plan.isa.dtype).max
        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0)
        if largest > most:
            raise EngineError(
                f"{operation.name or 'The model'} has a weight or bias of {largest:.6g} (after its batch norm has been folded in); the largest float16 is "
                f"{most:.0f}. Compile with precision='fp32'."
            )
        return values

    def places(self, y: Planes) -> int:
        """Where each vector of a channel lies that lies in tiles: bytes from the first, (vectors,) int32."""
        first = np.arange(y.vectors) * y.lanes
        return self.shared(
            ("places", y.vectors, y.tile, y.channels),
            lambda: self.memory.put((y.element(first) * y.element_bytes).astype(np.int32)),
        )

    def mask(self, y: Planes) -> int:
        """All ones where the output has a pixel, zero in its gaps: (vectors * lanes,) integers as wide as a pixel."""

        def put() -> int:
            inside = np.zeros(y.vectors * y.lanes, bool)
            inside[y.inside.reshape(-1)] = True
            return self.mask_of(inside)

        return self.shared(("mask", y.rows, y.columns, y.pitch, y.abreast), put)

    def mask_of(self, inside: NDArray[np.bool_]) -> int:
        """All ones where True, as wide as a pixel."""
        return self.memory.put(-inside.astype(f"i{self.plan.isa.element_bytes}"))

    def tap_places(
        self, x: Planes, y: Planes, taps: Sequence[tuple[int, int]], stride: tuple[int, int]
    ) -> int:
        """For each tap (rows, columns) and output element, the element of the input plane; -1 where there is none.

        The table is (taps, vectors * lanes) int32.
        """
        key = (
            "taps",
            x.rows,
            x.columns,
            x.pitch,
            x.tile and (x.tile, x.channels),
            y.rows,
            y.columns,
            y.pitch,
            tuple(taps),
            stride,
        )
        return self.shared(key, lambda: self.memory.put(self.tap_table(x, y, taps, stride)))

    @staticmethod
    def tap_table(
        x: Planes, y: Planes, taps: Sequence[tuple[int, int]], stride: tuple[int, int]
    ) -> NDArray[np.int32]:
        table = np.full((len(taps), y.vectors * y.lanes), -1, np.int32)
        at = (np.arange(y.rows)[:, None] * y.pitch + np.arange(y.columns)).reshape(-1)
        for row, (dy, dx) in zip(table, taps, strict=True):
            iy = np.arange(y.rows)[:, None] * stride[0] + dy
            ix = np.arange(y.columns)[None, :] * stride[1] + dx
            inside = (iy >= 0) & (iy < x.rows) & (ix >= 0) & (ix < x.columns)
            row[at] = np.where(inside, x.element(iy * x.pitch + ix), -1).reshape(-1)
        return table

    def channel_jobs(self, channels: int) -> dict[str, int]:
        size = max(1, min(16, -(-channels // (2 * self.plan.threads))))
        return {"jobs": -(-channels // size), "channels": channels, "channels_per_job": size}

    def tail(self, y: Planes, vectors: int) -> int:
        """Elements of the last vector of a row of `y` that are stored, where threads that share an image must not write into each other's rows; 0: all.

        Only with AVX-512: elsewhere, storing a part of a vector takes longer than is gained (AVX2 on AMD's CPUs), or one instruction for each element (NEON).
        """
        beyond = vectors * y.lanes - y.pitch
        is_shared = self.plan.threads_on_an_image(y.images) > 1 and not y.is_cut
        return y.lanes - beyond if is_shared and beyond > 0 and self.plan.isa.name == "avx512" else 0

    def by_channel(self, place: Place, out: Place) -> dict[str, int]:
        """What all kernels are told that go from planes to planes, or to one value each, channel by channel."""
        x, y = place.layout, out.layout
        assert isinstance(x, Planes)
        return {
            "x": place.address,
            "x_image": x.image_bytes,
            "x_plane": x.plane_bytes,
            "out": out.address,
            "out_image": y.image_bytes,
            "out_plane": y.plane_bytes if isinstance(y, Planes) else y.element_bytes,
            **self.channel_jobs(x.channels),
        }


def is_capped(operation: Operation) -> bool:
    """Whether the result has a greatest value. A least one most have; the others share their kernels."""
    return bool(operation.attributes.get("high", math.inf) < math.inf)
