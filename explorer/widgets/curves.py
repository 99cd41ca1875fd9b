"""The measured points, gathered into the curves that the page draws.

A measurement yields points in an order that makes the picture useful early, not in the order of the axis. Here they are sorted by
layer and level. A `Curves` value never changes, so that the worker can post it and go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS = ("kl", "loss", "accuracy", "latency_ms")
"""Kinds of curves that the page can show; `kl` in nats, `latency_ms` in milliseconds, `accuracy` as a fraction."""

Series = tuple[tuple[float, float], ...]
"""Pairs of sparsity and value, sorted by sparsity."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves per kind and layer: ``curves.series["kl"]["conv1"]`` is a `Series`."""

    series: dict[str, dict[str, Series]] = field(default_factory=dict)

    def of(self, kind: str, layer: str) -> Series:
        """Return one curve, empty when nothing of it was measured."""
        return self.series.get(kind, {}).get(layer, ())

    def break_even(self, layer: str, tolerance: float = 0.02) -> float | None:
        """Return the sparsity above which the layer is faster than dense, or None when it is not known or never is.

        Parameters
        ----------
        layer : str
        tolerance : float
            A layer counts as faster when it takes less than ``1 - tolerance`` of its dense time; timing noise is no gain.
        """
        curve = self.of("latency_ms", layer)
        if len(curve) < 2 or curve[0][0] > 0:
            return None
        bound = curve[0][1] * (1 - tolerance)
        slow = [i for i, (_, ms) in enumerate(curve) if ms >= bound]
        last = slow[-1]
        if last == len(curve) - 1:
            return None
        (s0, ms0), (s1, ms1) = curve[last], curve[last + 1]
        crossing = s0 + (s1 - s0) * (ms0 - bound) / (ms0 - ms1)
        if last + 2 < len(curve):
            # The curve is flat as long as the dense kernel is faster, and linear after that: the line through the next two levels,
            # drawn on, finds the corner between two levels, which a straight line between them would cut.
            s2, ms2 = curve[last + 2]
            if ms2 < ms1:
                crossing = max(crossing, s1 - (bound - ms1) * (s2 - s1) / (ms1 - ms2))
        return crossing

    def to_page(self, layers: Iterable[str]) -> dict[str, list[list[list[float]]]]:
        """Return plain lists for the page: per kind, per layer of `layers`, `[sparsities, values]`."""
        names = list(layers)
        return {
            kind: [
                [[s for s, _ in self.of(kind, name)], [_short(v) for _, v in self.of(kind, name)]]
                for name in names
            ]
            for kind in KINDS
            if kind in self.series
        }


class CurveBuilder:
    """Collects points and makes `Curves` of them. Used by one thread at a time.

    Points with refreshed BatchNorm statistics are left out: predictions and targets are made from the others, and a page must not
    show one thing and solve with another.
    """

    def __init__(self) -> None:
        self._values: dict[str, dict[str, dict[float, float]]] = {}

    def add(self, point: Any) -> None:
        """Add a `SensitivityPoint`; unknown kinds and values that are no numbers are left out."""
        if point.kind not in KINDS or point.refreshed or not math.isfinite(point.value):
            return
        self._values.setdefault(point.kind, {}).setdefault(point.layer, {})[point.sparsity] = float(
            point.value
        )

    def count(self, kind: str) -> int:
        """Return how many points of `kind` are there."""
        return sum(len(levels) for levels in self._values.get(kind, {}).values())

    def curves(self) -> Curves:
        """Return what was collected so far."""
        return Curves(
            {
                kind: {layer: tuple(sorted(levels.items())) for layer, levels in layers.items()}
                for kind, layers in self._values.items()
            }
        )


def _short(value: float) -> float:
    """Round to five significant digits: more is noise, and bytes to the page."""
    return float(f"{value:.5g}")
