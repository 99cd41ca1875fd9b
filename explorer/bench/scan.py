"""The sensitivity scan against a naive one: what recorded activations save, and that they change no number.

The naive scan prunes a fresh copy for each layer and level and runs the whole network on all images; so most tools do it. Both give the divergence from the dense
outputs, on the same images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
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
    start = time.perf_counter()
    ours: dict[tuple[str, float], float] = {}
    names: dict[str, None] = {}
    first = 0.0
    points = measure_loss(
        module, (inputs, None), layers=layers, levels=levels, n_images=len(inputs), refresh_batchnorm=False
    )
    for point in points:
        if point.kind == "kl" and point.sparsity == 0.0:
            names[point.layer] = None
        elif point.kind == "kl":
            ours[point.layer, point.sparsity] = point.value
            if not first and len({name for name, _ in ours}) == len(names):
                first = time.perf_counter() - start
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    naive = _naive(module, inputs, list(names), levels)
    naive_s = time.perf_counter() - start
    worst = max(abs(naive[cell] - value) / max(1.0, abs(value)) for cell, value in ours.items())
    return ScanComparison(naive_s, ours_s, first, len(names), len(set(levels)), len(inputs), worst)


@torch.inference_mode()
def _naive(
    module: nn.Module, inputs: Tensor, names: Sequence[str], levels: Sequence[float]
) -> dict[tuple[str, float], float]:
    if inputs.ndim == 4:
        # What is known to be faster is given to both.
        module = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    batches = inputs.split(BATCH_SIZE)
    dense = [functional.log_softmax(module(batch).double(), 1) for batch in batches]
    found = {}
    for name in names:
        for level in levels:
            pruned = copy.deepcopy(module)
            weight = pruned.get_submodule(name).get_parameter("weight")
            weight.mul_(magnitude_mask(weight, level))
            total = 0.0
            for batch, log_dense in zip(batches, dense, strict=True):
                log_pruned = functional.log_softmax(pruned(batch).double(), 1)
                total += float((log_dense.exp() * (log_dense - log_pruned)).sum())
            found[name, level] = total / len(inputs)
    return found
