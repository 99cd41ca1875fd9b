"""Measures how long each layer takes on the sparse engine at each sparsity.

All layers are pruned to one level together and timed inside the running network, so one pass a level serves every layer, caches and
threads behave as in use, and the cost does not depend on the depth. The network is compiled once; other levels only bring new
weights into the same program. Each level is timed in turn with the dense network, so that levels can be compared although the machine's speed
changes between them; and all levels are gone through several times, so that a bad moment of the machine does not meet all that a level has.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from explorer.errors import EngineError
from explorer.masks import magnitude_mask
from explorer.models import PrunableLayer
from explorer.sensitivity.cache import cache_folder
from explorer.sensitivity.material import choose_layers
from explorer.sensitivity.points import (
    DEFAULT_LEVELS,
    WHOLE_NETWORK,
    SensitivityPoint,
    check_levels,
    level_order,
)
from explorer.sensitivity.times import TimesFile, times_key

if TYPE_CHECKING:
    from explorer.inference import SparseModule

__all__ = ["LATENCY_PASSES", "measure_latency"]

# On a shared machine a level is now and then 10 or 20 % slow for as long as it is being timed. The median of six rounds bears one bad pass.
LATENCY_PASSES = 3
_ROUNDS_A_PASS = 2
_MILLISECONDS_A_LEVEL = 200.0
_CLOCK_REPEATS = 20
# Of `_Rounds.to_lists`; no layer is called so, since a step's name has no space.
_WHOLE, _SPREAD = " whole", " spread"


def measure_latency(
    module: nn.Module,
    example_input: Tensor,
    *,
    layers: Iterable[str | PrunableLayer] | None = None,
    levels: Sequence[float] = DEFAULT_LEVELS,
    threads: int | None = None,
    repeats: int | None = None,
    resume: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[SensitivityPoint]:
    """Time the network on the sparse engine at each level and yield every layer's median.

    Weights are pruned by magnitude, in one shot, on a copy. Points are of kind "latency_ms"; level 0 comes first, then levels in an order
    that makes the picture useful early. A point with layer "" is the median of the whole network, timed apart from the layers. All levels
    come three times: the later point of a layer and level is the median of more rounds, and replaces the earlier one.

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
        Timed runs a level of the whole network, and as many with a clock in it; by default as many as fit into a fifth of a second,
        within 25 and 500.
    resume : bool
        Keep what is measured on disk, and take from there what an earlier measurement of the same network on this machine has given, in units of the dense network's time
        now (see `explorer.sensitivity.times`).
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
    return _points(module, example_input, reported, everything, ordered, threads, repeats, resume, stop)


def _points(
    module: nn.Module,
    example_input: Tensor,
    reported: tuple[PrunableLayer, ...],
    everything: tuple[PrunableLayer, ...],
    levels: tuple[float, ...],
    threads: int | None,
    repeats: int | None,
    resume: bool,
    stop: threading.Event | None,
) -> Iterator[SensitivityPoint]:
    from explorer import inference  # brings torch.export and llvmlite, which only this function needs

    pruned = copy.deepcopy(module).eval()
    dense = {
        layer.name: pruned.get_submodule(layer.name).get_parameter("weight").detach().clone()
        for layer in everything
    }
    is_one_layer = [layer.name for layer in everything] == [WHOLE_NETWORK]
    # Level 0 comes first, with the weights as they are: the dense network is the clock that all else is timed by.
    reference = inference.compile(pruned, example_input, threads=threads)
    clock = _Clock(reference, example_input)
    program: SparseModule | None = None
    rounds: dict[float, _Rounds] = {level: _Rounds() for level in levels}
    kept = TimesFile("", None)
    if resume:
        with torch.inference_mode():
            answers = reference(example_input)
        about = f"{reference.isa} threads {threads} repeats {repeats}"
        kept = TimesFile(times_key(module, example_input, answers, about), cache_folder())
        for level, known in kept.rounds(clock.now(_CLOCK_REPEATS)).items():
            if level in rounds:
                rounds[level] = _Rounds.from_lists(known)
    for number, level in enumerate(levels * LATENCY_PASSES):
        if stop is not None and stop.is_set():
            return
        n_removed = _prune(pruned, dense, level)
        measured = rounds[level]
        # A level that was taken from disk has its rounds already, and comes at once.
        if len(measured.whole_ms) < (number // len(levels) + 1) * _ROUNDS_A_PASS:
            if level == 0.0:
                timed = reference
            elif program is None:
                timed = program = inference.compile(pruned, example_input, threads=threads)
            else:
                timed = program
                program.update_weights(pruned)
            measured.add(timed, example_input, repeats, clock)
            if resume and clock.first_ms is not None:
                kept.put({level: measured.to_lists()}, clock.first_ms)
        milliseconds = measured.layers_ms()
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
        yield SensitivityPoint(
            WHOLE_NETWORK,
            level,
            "latency_ms",
            median(measured.whole_ms),
            std_error=median(measured.spread_ms),
        )


class _Clock:
    """The dense network, timed now and then: how fast the machine is at the moment, against when it was timed first.

    Other work on a shared machine can halve its speed for seconds. Without this, a level that met such a phase would look slow beside one that
    did not, and a solver would choose between phases of the machine instead of between sparsities.
    """

    def __init__(self, dense: SparseModule, example_input: Tensor) -> None:
        self._dense, self._example_input = dense, example_input
        self.first_ms: float | None = None

    def now(self, repeats: int) -> float:
        """Return the dense network's milliseconds at this moment, which from the first call on are the unit."""
        ms = self._dense.benchmark(self._example_input, repeats=repeats, warn=False).latency_ms
        if self.first_ms is None:
            self.first_ms = ms
        return ms

    def factor(self, repeats: int) -> float:
        """Return what a time measured now must be multiplied by to compare with one measured at the first call."""
        ms = self.now(repeats)
        return (self.first_ms or ms) / ms


@dataclasses.dataclass(slots=True)
class _Rounds:
    """What was measured of one level: one entry a round, in the clock's milliseconds.

    Whole passes, clocked ones and the dense network take turns and the median round counts: other work on the machine comes
    in bursts, and must not fall on one kind alone, since the time outside the layers is their difference.
    """

    whole_ms: list[float] = dataclasses.field(default_factory=list)
    spread_ms: list[float] = dataclasses.field(default_factory=list)
    by_layer: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, program: SparseModule, example_input: Tensor, repeats: int | None, clock: _Clock) -> None:
        """Time the rounds of one more pass of `program`."""
        if repeats is None:
            first = program.benchmark(example_input, repeats=_ROUNDS_A_PASS, warn=False).latency_ms
            repeats = min(max(int(_MILLISECONDS_A_LEVEL / max(first, 1e-3)), 25), 500)
        each = -(-repeats // (LATENCY_PASSES * _ROUNDS_A_PASS))
        for _ in range(_ROUNDS_A_PASS):
            factor = clock.factor(max(1, each // 2))
            timed = program.benchmark(example_input, repeats=each, warn=False)
            self.whole_ms.append(timed.latency_ms * factor)
            self.spread_ms.append(timed.spread_ms * factor)
            total: dict[str, float] = {}
            for timing in program.profile(example_input, repeats=each):
                # A layer that is called twice, or done in several steps, costs the sum.
                total[timing.name] = total.get(timing.name, 0.0) + timing.ms * factor
            for name, ms in total.items():
                self.by_layer.setdefault(name, []).append(ms)

    @classmethod
    def from_lists(cls, lists: Mapping[str, list[float]]) -> _Rounds:
        """Make rounds of what `to_lists` gave."""
        layers = {name: list(each) for name, each in lists.items() if name not in (_WHOLE, _SPREAD)}
        return cls(list(lists[_WHOLE]), list(lists[_SPREAD]), layers)

    def to_lists(self) -> dict[str, list[float]]:
        """Return all milliseconds, for `times.TimesFile`."""
        return {_WHOLE: self.whole_ms, _SPREAD: self.spread_ms, **self.by_layer}

    def layers_ms(self) -> dict[str, float]:
        """Return the median milliseconds by layer name."""
        return {name: median(ms) for name, ms in self.by_layer.items()}


def _prune(module: nn.Module, dense: dict[str, Tensor], level: float) -> dict[str, int]:
    """Set each layer to its dense weight pruned to `level`; returns how many non-zero weights that removed from each."""
    removed: dict[str, int] = {}
    with torch.no_grad():
        for name, weight in dense.items():
            kept = weight * magnitude_mask(weight, level)
            module.get_submodule(name).get_parameter("weight").copy_(kept)
            removed[name] = int(torch.count_nonzero(weight)) - int(torch.count_nonzero(kept))
    return removed
