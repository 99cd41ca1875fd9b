"""The sensitivity scan against a naive one: what recorded activations save, and that they change no number.

The naive scan prunes a fresh copy for each layer and level and runs the whole network on all images; so most tools do it. Both give the divergence from the dense
outputs, on the same images, cell by cell in turn. The naive scan has a process of its own: how ours has the C library keep freed memory must not help it.
"""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.masks import magnitude_mask
from explorer.sensitivity import measure_loss
from explorer.sensitivity.scan import BATCH_SIZE

__all__ = ["ScanComparison", "compare_scans"]


@dataclass(frozen=True, slots=True)
class ScanComparison:
    """Times and numbers of both.

    Attributes
    ----------
    naive_s, ours_s : float
    first_picture_s : float
        Until every layer had a point above sparsity 0.
    n_layers, n_levels, n_images : int
    largest_difference : float
        Between their divergences, relative to the larger of 1 and the value.
    """

    naive_s: float
    ours_s: float
    first_picture_s: float
    n_layers: int
    n_levels: int
    n_images: int
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.n_layers} layers, {self.n_levels} levels, {self.n_images} images: naive {self.naive_s:.1f} s, ours {self.ours_s:.1f} s "
            f"({self.naive_s / self.ours_s:.1f} x), all layers in the picture after {self.first_picture_s:.1f} s; "
            f"largest difference {self.largest_difference:.1e}"
        )


def compare_scans(
    module: nn.Module, inputs: Tensor, levels: Sequence[float], *, layers: Sequence[str] | None = None
) -> ScanComparison:
    """Scan a classifier's layers both ways.

    Parameters
    ----------
    module : nn.Module
    inputs : Tensor, (N, ...) float32
        At least 16.
    levels : sequence of float
        In (0, 1).
    layers : sequence of str, optional
        Names; all prunable layers by default.
    """
    module = copy.deepcopy(module).eval()
    ours: dict[tuple[str, float], float] = {}
    theirs: dict[tuple[str, float], float] = {}
    names: dict[str, None] = {}
    first = ours_s = 0.0
    process = ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(module, inputs, torch.get_num_threads()),
    )
    points = measure_loss(
        module,
        (inputs, None),
        layers=layers,
        levels=levels,
        kinds=("kl",),
        n_images=len(inputs),
        refresh_batchnorm=False,
    )
    with process:
        process.submit(_seconds).result()  # its dense pass is over before ours begins
        start = time.perf_counter()
        for point in points:
            now = time.perf_counter()
            ours_s += now - start
            if point.sparsity == 0.0:
                names[point.layer] = None
            else:
                cell = (point.layer, point.sparsity)
                ours[cell] = point.value
                if not first and len({name for name, _ in ours}) == len(names):
                    first = ours_s
                # In turn: what slows the machine down slows both.
                if cell not in theirs:
                    theirs[cell] = process.submit(_measured, *cell).result()
            start = time.perf_counter()
        ours_s += time.perf_counter() - start
        naive_s = process.submit(_seconds).result()
    worst = max(abs(theirs[cell] - value) / max(1.0, abs(value)) for cell, value in ours.items())
    return ScanComparison(naive_s, ours_s, first, len(names), len(set(levels)), len(inputs), worst)


class _Naive:
    """Prunes a fresh copy for each cell and runs all of it on all images; counts the seconds."""

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        start = time.perf_counter()
        if inputs.ndim == 4:
            # What is known to be faster is given to both.
            module = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        self._module = module
        self._batches = inputs.split(BATCH_SIZE)
        self._dense = self._answers(module)
        self.seconds = time.perf_counter() - start

    @torch.inference_mode()
    def _answers(self, module: nn.Module) -> list[Tensor]:
        return [functional.log_softmax(module(batch).double(), 1) for batch in self._batches]

    def measure(self, name: str, level: float) -> float:
        """Return the divergence of one cell."""
        start = time.perf_counter()
        pruned = copy.deepcopy(self._module)
        weight = pruned.get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            weight.mul_(magnitude_mask(weight, level))
        total = sum(
            float((dense.exp() * (dense - answer)).sum())
            for dense, answer in zip(self._dense, self._answers(pruned), strict=True)
        )
        self.seconds += time.perf_counter() - start
        return total / sum(map(len, self._batches))


# What the process of the naive scan works with.
_naive: dict[str, _Naive] = {}


def _begin(module: nn.Module, inputs: Tensor, threads: int) -> None:
    torch.set_num_threads(threads)
    _naive["scan"] = _Naive(module, inputs)


def _measured(name: str, level: float) -> float:
    return _naive["scan"].measure(name, level)


def _seconds() -> float:
    return _naive["scan"].seconds
