"""What a distribution shall reach."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityTable

__all__ = ["Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """Exactly one of these.

    Attributes
    ----------
    speedup : float or None
        Baseline latency over latency, positive; the baseline is the table's `baseline_latency_ms`.
    latency_ms : float or None
        Latency of the whole network in milliseconds, positive.
    sparsity : float or None
        Share of zeros among the weights of all prunable layers, in [0, 1).
    params : int or None
        Weights of prunable layers that remain, at most; positive.
    size_bytes : int or None
        Size on disc, see `explorer.distribution.Prediction`, at most; positive.
    max_loss : float or None
        Predicted one-shot divergence in nats (of tables without divergences the increase of the loss), at most; the fastest distribution within it is wanted. Not negative.

    Raises
    ------
    DistributionError
        If none or several are given, or one is out of range.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    sparsity: float | None = None
    params: int | None = None
    size_bytes: int | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) is not None
        }
        if len(given) != 1:
            names = "=, ".join(field.name for field in fields(self))
            raise DistributionError(f"A target is exactly one of {names}=; got {given or 'none of them'}.")
        value = self.value
        if self.name == "sparsity" and not 0.0 <= value < 1.0:
            raise DistributionError(
                f"Target sparsity is a fraction of zeros in [0, 1); got {value!r}. Write 90 % as 0.9."
            )
        if self.name == "max_loss" and not 0.0 <= value < math.inf:
            raise DistributionError(f"Target max_loss is in nats, 0 or more; got {value!r}.")
        if self.name not in ("sparsity", "max_loss") and not 0.0 < value < math.inf:
            raise DistributionError(f"Target {self.name} must be positive and finite; got {value!r}.")

    @property
    def name(self) -> str:
        """Which one is given."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def value(self) -> float:
        """What is given."""
        value: float = getattr(self, self.name)
        return value

    @property
    def is_time(self) -> bool:
        """Whether it is a latency, directly or as a speed-up."""
        return self.name in ("speedup", "latency_ms")

    def budget_ms(self, table: SensitivityTable) -> float:
        """Return the latency that this target allows the whole network.

        Raises
        ------
        DistributionError
            If it is no target in time, or the table knows no baseline latency.
        """
        if self.latency_ms is not None:
            return self.latency_ms
        if self.speedup is None:
            raise DistributionError(f"A target {self.name} allows no particular latency.")
        baseline = table.baseline_latency_ms
        if baseline is None:
            raise DistributionError(
                "A speed-up needs measured latencies; run the latency measurement first, or set a sparsity."
            )
        return baseline / self.speedup
