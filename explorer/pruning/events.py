"""What a run tells the outside while it goes on.

Events are plain values: the command line prints them, a notebook plots them, the widgets draw them, a test collects them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from explorer.pruning.result import RunResult

Phase = Literal["stabilise", "prune", "fine-tune"]


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One optimiser step was made.

    `step` counts finished steps, from 1 to `total_steps`. `loss` is that of the training batch, `sparsity` the fraction of zeros over
    all layers that the distribution names, `seconds_left` an estimate that includes the evaluations to come.
    """

    step: int
    total_steps: int
    phase: Phase
    loss: float
    learning_rate: float
    sparsity: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class EvalEvent:
    """The network was evaluated on validation data after `step` steps; step 0 is the network as it came."""

    step: int
    accuracy: float
    loss: float
    sparsity: float


@dataclass(frozen=True, slots=True)
class LatencyEvent:
    """The pruned network was timed after `step` steps, while no training step ran.

    `latency_ms` is a median and `spread_ms` its interquartile half-range. `dense_ms` is the median of the fastest dense network,
    timed in turn with it on the same threads and batch; `speedup` is `dense_ms / latency_ms`.
    """

    step: int
    latency_ms: float
    spread_ms: float
    dense_ms: float
    speedup: float


@dataclass(frozen=True, slots=True, eq=False)
class MaskEvent:
    """Masks were selected: these hold after `step` steps and until the next such event; step 0 is the network as it came.

    `zeros` counts the masked weights by layer. `masks` are bool, shaped like the weights, true where a weight is kept; they are the
    run's own, never written to again, so holding them costs a byte a weight and reading them is safe in any thread.
    """

    step: int
    zeros: Mapping[str, int]
    masks: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The run has ended, by itself or because it was stopped."""

    result: RunResult


RunEvent = StepEvent | EvalEvent | LatencyEvent | MaskEvent | DoneEvent
