"""What a distribution can be solved for on the page: in which unit it is shown, and which argument of `explorer.Study.solve` it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from explorer.widgets.texts import phrase

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
    task : str
        What solving for it does.
    scale : float
        What is shown on the page, times this, is what `Study.solve` takes.
    digits : int
        Decimals on the page.
    told : callable
        Gives a distribution's value, as `Study.solve` takes it, from its `Prediction` and its harm in nats.
    least, most : float
        What makes sense at all, in the unit of the page.
    bend : int
        The dial moves as this power: sizes and harm are chosen near their lower ends, where it is to move slowly.
    """

    name: str
    label: str
    unit: str
    task: str
    scale: float
    digits: int
    told: Callable[[Any, float], float]
    least: float = 0.0
    most: float = math.inf
    bend: int = 1

    def shown(self, prediction: Any, harm: float) -> float:
        """Return what a distribution has of this, in the unit of the page."""
        return round(self.told(prediction, harm) / self.scale, self.digits)

    def words(self, value: float) -> str:
        """Return a value of the page with its unit."""
        return f"{round(value, self.digits):g} {self.unit}"

    def to_page(self) -> dict[str, Any]:
        """Return what the page has to know of it."""
        return {
            "name": self.name,
            "label": self.label,
            "unit": self.unit,
            "task": self.task,
            "digits": self.digits,
            "bend": self.bend,
        }


KINDS = {
    kind.name: kind
    for kind in (
        TargetKind(
            "speedup", phrase("target.speedup.name"), "×", phrase("target.speedup.task"), 1.0, 2,
            lambda told, _: float(told.speedup), least=1.0,
        ),
        TargetKind(
            "latency_ms", phrase("target.latency.name"), "ms", phrase("target.latency.task"), 1.0, 3,
            lambda told, _: float(told.latency_ms),
        ),
        TargetKind(
            "sparsity", phrase("target.sparsity.name"), "%", phrase("target.sparsity.task"), 0.01, 1,
            lambda told, _: float(told.sparsity), most=99.0,
        ),
        TargetKind(
            "size_bytes", phrase("target.size.name"), "kB", phrase("target.size.task"), 1e3, 1,
            lambda told, _: float(told.size_bytes), bend=3,
        ),
        TargetKind(
            "max_loss", phrase("target.harm.name"), phrase("common.nats"), phrase("target.harm.task"), 1.0, 3,
            lambda _, harm: harm, bend=3,
        ),
    )
}  # fmt: skip
