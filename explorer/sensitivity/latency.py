"""Measures how long each layer takes on the sparse engine at each sparsity.

All layers are pruned to one level together and timed inside the running network, so one pass a level serves every layer, caches and
threads behave as in use, and the cost does not depend on the depth. The network is compiled once; other levels only bring new
weights into the same program. Each level is timed in turn with the dense network, so that levels can be compared although the machine's speed
changes between them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from explorer.errors import EngineError
from explorer.masks import magnitude_mask
from explorer.models import PrunableLayer
from explorer.sensitivity.loss import choose_layers
from explorer.sensitivity.points import (
    DEFAULT_LEVELS,
    WHOLE_NETWORK,
    SensitivityPoint,
    check_levels,
    level_order,
)

if TYPE_CHECKING:
    from explorer.inference import SparseModule

__all__ = ["measure_latency"]

_ROUNDS = 5
_MILLISECONDS_A_LEVEL = 200.0


def measure_latency(
    module: nn.Module,
    example_input: Tensor,
    *,
    layers: Iterable[str | PrunableLayer] | None = None,
    levels: Sequence[float] = DEFAULT_LEVELS,
    threads: int | None = None,
    repeats: int | None = None,
    stop: threading.Event | None = None,
) -> Iterator[SensitivityPoint]:
    """Time the network on the sparse engine at each level and yield every layer's median.

    Weights are pruned by magnitude, in one shot, on a copy. Points are of kind "latency_ms"; level 0 comes first, then levels in an order
    that makes the picture useful early. A point with layer "" is the median of the whole network, timed apart from the layers.

    Parameters
    ----------
    module : nn.Module
        Not changed.
    example_input : Tensor
        Fixes shape and batch size.
    layers : iterable of str or PrunableLayer, optional
        Layers to report; all by default. All prunable layers are pruned in any case, as they are in use.
    levels : sequence of float
        Sparsities in [0, 1).
    threads : int, optional
        Threads of the engine; its default otherwise.
    repeats : int, optional
        Timed passes a level of the whole network, and as many with a clock in it; by default as many as fit into a fifth of a second,
        within 25 and 500.
    stop : threading.Event, optional
        When set, the scan ends before the next level.

    Yields
    ------
    SensitivityPoint

    Raises
    ------
    EngineError
        If the engine cannot compile the network, or does not report a layer.
    ModelError
        Unknown layer names.
    DistributionError
        A level outside [0, 1).
    """
    ordered = (0.0, *level_order(check_levels(levels)))
    if repeats is not None and repeats < 1:
        raise EngineError(
            f"repeats={repeats}: at least one timed pass is needed, and 20 or more for a steady median."
        )
    reported = choose_layers(module, example_input, layers)
    everything = choose_layers(module, example_input, None)
    return _points(module, example_input, reported, everything, ordered, threads, repeats, stop)


def _points(
    module: nn.Module,
    example_input: Tensor,
    reported: tuple[PrunableLayer, ...],
    everything: tuple[PrunableLayer, ...],
    levels: tuple[float, ...],
    threads: int | None,
    repeats: int | None,
    stop: threading.Event | None,
) -> Iterator[SensitivityPoint]:
    from explorer import inference  # brings torch.export and llvmlite, which only this function needs

    pruned = copy.deepcopy(module).eval()
    dense = {
        layer.name: pruned.get_submodule(layer.name).get_parameter("weight").detach().clone()
        for layer in everything
    }
    clock: _Clock | None = None
    program: SparseModule | None = None
    for level in levels:
        if stop is not None and stop.is_set():
            return
        n_removed = _prune(pruned, dense, level)
        if clock is None:
            # Level 0 comes first: the dense network is the clock that all other levels are timed by.
            reference = inference.compile(pruned, example_input, threads=threads)
            clock = _Clock(reference, example_input)
            milliseconds, whole_ms, spread_ms = _time(reference, example_input, repeats, None)
            clock.set(whole_ms)
        else:
            if program is None:
                program = inference.compile(pruned, example_input, threads=threads)
            else:
                program.update_weights(pruned)
            milliseconds, whole_ms, spread_ms = _time(program, example_input, repeats, clock)
        is_one_layer = [layer.name for layer in everything] == [WHOLE_NETWORK]
        for layer in () if is_one_layer else reported:
            found = [milliseconds[name] for name in (layer.name, *layer.tied) if name in milliseconds]
            if not found:
                raise EngineError(
                    f"The engine's profile has no step for layer {layer.name!r}; it has {', '.join(milliseconds)}. "
                    "Leave the layer out of `layers`, or report the network as a bug."
                )
            yield SensitivityPoint(
                layer.name, level, "latency_ms", sum(found), n_removed=n_removed[layer.name]
            )
        yield SensitivityPoint(WHOLE_NETWORK, level, "latency_ms", whole_ms, std_error=spread_ms)


class _Clock:
    """The dense network, timed now and then: how fast the machine is at the moment, against when level 0 was measured.

    Other work on a shared machine can halve its speed for seconds. Without this, a level that met such a phase would look slow beside one that
    did not, and a solver would choose between phases of the machine instead of between sparsities.
    """

    def __init__(self, dense: SparseModule, example_input: Tensor) -> None:
        self._dense, self._example_input, self._ms = dense, example_input, 0.0

    def set(self, ms: float) -> None:
        """Take `ms` as the dense network's time."""
        self._ms = ms

    def factor(self, repeats: int) -> float:
        """Return what a time measured now must be multiplied by to compare with level 0."""
        return self._ms / self._dense.benchmark(self._example_input, repeats=repeats).latency_ms


def _time(
    program: SparseModule, example_input: Tensor, repeats: int | None, clock: _Clock | None
) -> tuple[dict[str, float], float, float]:
    """Return milliseconds by layer name, and median and spread of the whole network.

    Whole passes, clocked ones and the dense network take turns in several rounds and the median round counts: other work on the machine comes
    in bursts, and must not fall on one kind alone, since the time outside the layers is their difference.
    """
    if repeats is None:
        first = program.benchmark(example_input, repeats=_ROUNDS).latency_ms
        repeats = min(max(int(_MILLISECONDS_A_LEVEL / max(first, 1e-3)), 25), 500)
    each = max(1, -(-repeats // _ROUNDS))
    whole, spread = [], []
    layers: dict[str, list[float]] = {}
    for _ in range(min(_ROUNDS, repeats)):
        factor = clock.factor(max(1, each // 2)) if clock else 1.0
        timed = program.benchmark(example_input, repeats=each)
        whole.append(timed.latency_ms * factor)
        spread.append(timed.spread_ms * factor)
        total: dict[str, float] = {}
        for timing in program.profile(example_input, repeats=each):
            # A layer that is called twice, or done in several steps, costs the sum.
            total[timing.name] = total.get(timing.name, 0.0) + timing.ms * factor
        for name, ms in total.items():
            layers.setdefault(name, []).append(ms)
    return {name: median(ms) for name, ms in layers.items()}, median(whole), median(spread)


def _prune(module: nn.Module, dense: dict[str, Tensor], level: float) -> dict[str, int]:
    """Set each layer to its dense weight pruned to `level`; returns how many non-zero weights that removed from each."""
    removed: dict[str, int] = {}
    with torch.no_grad():
        for name, weight in dense.items():
            kept = weight * magnitude_mask(weight, level)
            module.get_submodule(name).get_parameter("weight").copy_(kept)
            removed[name] = int(torch.count_nonzero(weight)) - int(torch.count_nonzero(kept))
    return removed
