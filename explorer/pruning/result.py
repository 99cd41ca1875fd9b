"""What a run leaves: a network whose pruned weights are exactly zero, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from explorer.pruning.events import EvalEvent, LatencyEvent
from explorer.pruning.settings import RunSettings


@dataclass(frozen=True, eq=False)
class RunResult:
    """The state of a run, usable whenever it is taken.

    Parameters
    ----------
    module : nn.Module
        The pruned network in evaluation mode, a copy that nobody else holds.
    masks : mapping of str to Tensor
        Bool, shaped like the weights, true where a weight is kept.
    asked : mapping of str to float
        Final sparsity that was asked for, by layer.
    locked : tuple of str
        Layers whose sparsity a person had fixed.
    groups : tuple of tuple of str
        Layers that moved together.
    achieved : mapping of str to (int, int)
        Zeros and elements of each layer's weight, counted in the weight itself.
    dense_accuracy, accuracy : float
        Fractions of the same samples before and after; nan before anything was evaluated.
    measured_on : str
        "test", or "validation" when there are no test data or the run is still going on.
    n_evaluated : int
        Samples behind both accuracies.
    stopped : bool
        Whether the run ended, or was looked at, before its last step.
    failure : str or None
        Why the run could not go on; the network is then the last good one.
    step, total_steps : int
        Optimiser steps made, and planned.
    seconds : float
        Time spent in the run, without pauses and without what the consumer of the events did.
    evaluations : tuple of EvalEvent
        What was measured on validation data during the run.
    settings : RunSettings
        How it was made.
    latencies : tuple of LatencyEvent
        The pruned network's latency during the run, beside the dense one's.
    """

    module: nn.Module
    masks: Mapping[str, Tensor]
    asked: Mapping[str, float]
    locked: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    achieved: Mapping[str, tuple[int, int]]
    dense_accuracy: float
    accuracy: float
    measured_on: str
    n_evaluated: int
    stopped: bool
    failure: str | None
    step: int
    total_steps: int
    seconds: float
    evaluations: tuple[EvalEvent, ...]
    settings: RunSettings
    latencies: tuple[LatencyEvent, ...] = ()

    @property
    def sparsity(self) -> float:
        """Zeros over elements of all layers that the distribution names, a fraction in [0, 1]."""
        zeros = sum(zeros for zeros, _ in self.achieved.values())
        return zeros / max(1, sum(elements for _, elements in self.achieved.values()))
