"""What a distribution can be solved for on the page: in which unit it is shown, and which argument of `explorer.Study.solve` it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "TargetKind"]


@dataclass(frozen=True, slots=True)
class TargetKind:
    """One kind of target.

    Attributes
    ----------
    name : str
        The argument of `Study.solve`.
    label, unit : str
        As the page names it.
    scale : float
        What is shown on the page, times this, is what `Study.solve` takes.
    digits : int
        Decimals on the page.
    told : callable
        Gives a distribution's value, as `Study.solve` takes it, from its `Prediction` and its harm in nats.
    """

    name: str
    label: str
    unit: str
    scale: float
    digits: int
    told: Callable[[Any, float], float]

    def shown(self, prediction: Any, harm: float) -> float:
        """Return what a distribution has of this, in the unit of the page."""
        return round(self.told(prediction, harm) / self.scale, self.digits)

    def words(self, value: float) -> str:
        """Return a value of the page with its unit."""
        return f"{round(value, self.digits):g} {self.unit}"


KINDS = {
    kind.name: kind
    for kind in (
        TargetKind("speedup", "speed-up", "×", 1.0, 2, lambda told, _: float(told.speedup)),
        TargetKind("latency_ms", "latency", "ms", 1.0, 3, lambda told, _: float(told.latency_ms)),
        TargetKind("sparsity", "sparsity", "%", 0.01, 1, lambda told, _: float(told.sparsity)),
        TargetKind("size_bytes", "size", "kB", 1e3, 1, lambda told, _: float(told.size_bytes)),
        TargetKind("max_loss", "harm", "nats", 1.0, 3, lambda _, harm: harm),
    )
}
