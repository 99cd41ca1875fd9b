"""How near the loop over nonzeros, and programs in its place, come to the peak of a core, with operands in the L1 cache: what no layout, plan or cache can exceed.

One tile of pixels and one K block, as a sparse convolution meets them, again and again in native code. Between the shares found here and those of a
profile (`SparseModule.profile`) lies what a network adds: lanes without a pixel, packing, and operands that come from further away.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from explorer.inference.kernels import conv, conv_tables
from explorer.inference.kernels.builder import I64, PTR, VOID, Function, Value
from explorer.inference.kernels.registers import has_partners
from explorer.inference.larger_kernels import has_programs
from explorer.inference.memory import Memory, address
from explorer.inference.native import Isa, current_isa, machine_code
from explorer.inference.pack import weight_words
from explorer.inference.peak import peak_of
from explorer.inference.sparse_code import Finish, programs
from explorer.inference.sparse_rows import SparseWeights, read_beyond, sparse_entries
from explorer.inference.step_builder import block_bytes

__all__ = ["KernelSpeed", "Loop", "measure_loops", "table"]

CHANNELS_OUT = 256
ROWS = ("alone", "partners", "pairs", "code")
"""How output channels are taken: by a loop, one by one, two that happen to share operands at once, or two that share their pattern; or by programs, some 30 at
once."""

_REPEATS = 50
_TURNS = 9


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """The best of a few short runs on one core.

    Attributes
    ----------
    tile : int
        Vectors of pixels that a nonzero is multiplied with.
    nonzeros : float
        Of a row of weights in the K block, on average.
    rows : str
        One of `ROWS`.
    gflops : float
        Products and sums of nonzeros, in 1e9 per second.
    share : float
        Of the measured peak of the core.
    """

    tile: int
    nonzeros: float
    rows: str
    gflops: float
    share: float


class Loop:
    """The sparse loop over one K block in the L1 cache, or the programs in its place, ready to run.

    Parameters
    ----------
    tile : int
        Vectors of pixels.
    nonzeros : float
        Of a row, on average: each weight is kept with the same probability, as uniform pruning of random weights leaves them.
    rows : str
        One of `ROWS`.
    """

    def __init__(self, tile: int, nonzeros: float, rows: str = "alone") -> None:
        self.isa = isa = current_isa()
        self.tile, self.nonzeros, self.rows = tile, nonzeros, rows
        kernel = conv.ConvKernel(
            tile, pairs=rows == "pairs", partners=rows == "partners", code=rows == "code"
        )
        row_bytes = tile * isa.width
        depth = max(block_bytes() // row_bytes, int(nonzeros))
        self.weight = _pruned(depth, min(nonzeros / depth, 1.0), kernel.channels)
        weights = SparseWeights.of(self.weight, isa, channels=kernel.channels)
        self._memory = memory = Memory()
        pixels = tile * isa.lanes
        self.x = memory.zeros(depth * pixels).reshape(depth, pixels)
        self.x[:] = np.random.default_rng(1).normal(size=self.x.shape)
        self.out = memory.zeros(CHANNELS_OUT * pixels).reshape(CHANNELS_OUT, pixels)
        tables = self._programs(weights) if kernel.code else self._entries(weights, kernel)
        memory.seal()
        block = conv_tables.BLOCK.filled(stage=conv_tables.FIRST_BLOCK | conv_tables.LAST_BLOCK, **tables)
        low, high = np.array([-np.inf, np.inf], np.float32).view(np.int32).tolist()
        arguments = conv_tables.ARGUMENTS.filled(
            x=address(self.x),
            out=address(self.out),
            out_plane=row_bytes,
            bias=address(memory.zeros(CHANNELS_OUT)),
            low=low,
            high=high,
            tiles=1,
            parts=1,
            blocks=memory.put(block),
            n_blocks=1,
        )
        self._arguments = memory.put(arguments)
        self._scratch = address(memory.zeros(kernel.scratch_bytes(CHANNELS_OUT, isa) // 4 + 1, np.float32))
        self._kernel = machine_code(isa, kernel)
        repeat = machine_code(isa, _RepeatKernel())
        self._repeat = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(repeat)
        self.operations = 2 * isa.lanes * tile * np.count_nonzero(self.weight)

    def _entries(self, weights: SparseWeights, kernel: conv.ConvKernel) -> dict[str, int]:
        """The fields of a block whose nonzeros are in tables."""
        entries = sparse_entries(
            weights,
            np.arange(weights.shape[1]) * self.tile * self.isa.width,
            np.zeros(weights.shape[1], np.int64),
            1,
            kernel.unroll,
            lambda values: weight_words(values, self.isa),
            self.isa,
            partners=kernel.partners,
        )
        offsets, channels = read_beyond(entries.offsets, entries.rows * np.int32(kernel.channels))
        put = self._memory.put
        return {
            "offsets": put(offsets),
            "weights": put(entries.words),
            "rows": put(channels),
            "groups": put(entries.groups),
            "n_groups": len(entries.groups) - int(entries.pairs[0]),
            "n_pair_groups": int(entries.pairs[0]),
        }

    def _programs(self, weights: SparseWeights) -> dict[str, int]:
        """The fields of a block whose nonzeros are programs."""
        where = np.arange(weights.shape[1]) * self.tile * self.isa.width
        bias = np.zeros(CHANNELS_OUT, np.float32)
        finish = Finish(residual=False, low=False, high=False, mask=False)
        made = programs(weights, where, np.zeros_like(where), 1, bias, self.tile, finish, self.isa)
        return {"groups": self._memory.put(made.placed(self._memory)), "n_groups": len(made.groups)}

    def run(self, times: int) -> None:
        """Compute `out` so many times, in one native call."""
        self._repeat(self._kernel, self._arguments, self._scratch, times)


def _pruned(depth: int, density: float, channels: int) -> NDArray[np.float32]:
    """Random weights, so many neighbouring output channels alike in their pattern."""
    draw = np.random.default_rng(0)
    kept = np.repeat(draw.random((CHANNELS_OUT // channels, depth)) < density, channels, axis=0)
    return (draw.normal(size=kept.shape) * kept).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _RepeatKernel:
    """Calls a kernel again and again for its first job: (kernel, arguments, scratch, times)."""

    def build(self, isa: Isa) -> tuple[Value, str]:
        module = ir.Module("repeat")
        f = Function(module, "repeat", VOID, [I64, PTR, PTR, I64], isa)
        kernel, arguments, scratch, times = f.arguments
        type_ = ir.FunctionType(VOID, [PTR, I64, PTR]).as_pointer()

        def once(_: Value) -> None:
            f.b.call(f.b.inttoptr(kernel, type_), [arguments, I64(0), scratch])

        f.loop(times, once)
        f.b.ret_void()
        return module, "repeat"


def takes(rows: str, tile: int, isa: Isa) -> bool:
    """Whether kernels for this CPU take output channels in this way, one of `ROWS`."""
    return {"partners": has_partners(tile, isa), "code": has_programs(isa)}.get(rows, True)


def measure_loops(tiles: Sequence[int], nonzeros: Sequence[float]) -> list[KernelSpeed]:
    """Measure every combination, with all `ROWS` that this CPU's kernels take, in turn; the best of some turns of each.

    Parameters
    ----------
    tiles : sequence of int
        Vectors of pixels.
    nonzeros : sequence of float
        Of a row and K block.
    """
    isa = current_isa()
    loops = [
        Loop(tile, count, rows)
        for rows in ROWS
        for tile in tiles
        for count in nonzeros
        if takes(rows, tile, isa)
    ]
    best = [float("inf")] * len(loops)
    for _ in range(_TURNS):
        for i, loop in enumerate(loops):
            loop.run(2)
            start = time.perf_counter()
            loop.run(_REPEATS)
            best[i] = min(best[i], (time.perf_counter() - start) / _REPEATS)
    peak = peak_of(isa).gflops
    return [
        KernelSpeed(
            loop.tile,
            loop.nonzeros,
            loop.rows,
            loop.operations / seconds / 1e9,
            loop.operations / seconds / 1e9 / peak,
        )
        for loop, seconds in zip(loops, best, strict=True)
    ]


def table(speeds: Sequence[KernelSpeed]) -> str:
    """The shares of the peak as lines of text: a row for each tile, a column for each number of nonzeros."""
    counts = sorted({speed.nonzeros for speed in speeds})
    lines = ["nonzeros a row:        " + "".join(f"{count:>8g}" for count in counts)]
    for rows, tile in dict.fromkeys((speed.rows, speed.tile) for speed in speeds):
        shares = {s.nonzeros: s.share for s in speeds if (s.rows, s.tile) == (rows, tile)}
        name = f"{tile} vectors{'' if rows == 'alone' else f', {rows}'}"
        lines.append(f"{name:<23}" + "".join(f"{shares[count]:>8.0%}" for count in counts))
    return "\n".join(lines)
