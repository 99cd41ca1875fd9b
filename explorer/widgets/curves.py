"""The measured points, gathered into the curves that the page draws.

A measurement yields points in an order that makes the picture useful early, not in the order of the axis. Here they are sorted by
layer and level. A `Curves` value never changes, so that the worker can post it and go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS = ("kl", "loss", "accuracy", "latency_ms")
"""Kinds of curves that the page can show; `kl` in nats, `latency_ms` in milliseconds, `accuracy` as a fraction."""

Series = tuple[tuple[float, float], ...]
"""Pairs of sparsity and value, sorted by sparsity."""

Band = tuple[tuple[float, float, float], ...]
"""Sparsity, lowest and highest value, sorted by sparsity."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves per kind and layer: ``curves.series["kl"]["conv1"]`` is a `Series`."""

    series: dict[str, dict[str, Series]] = field(default_factory=dict)
    bands: dict[str, dict[str, Band]] = field(default_factory=dict)
    """Where each point lies in 95 of 100 draws of other images: per kind and layer."""

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
        return _break_even(self.of("latency_ms", layer), tolerance)

    @property
    def harm_kind(self) -> str:
        """What layers are coloured by: "kl" where it was measured, else "loss"; the latter as its increase over the dense network's."""
        return "kl" if "kl" in self.series or "loss" not in self.series else "loss"

    def harm_to_page(self, layers: Iterable[str]) -> list[list[list[float]]]:
        """Return plain lists of what layers are coloured by: per layer `[sparsities, nats]`."""
        page = []
        for name in layers:
            curve = self.of(self.harm_kind, name)
            dense = curve[0][1] if curve and self.harm_kind == "loss" and curve[0][0] == 0 else 0.0
            page.append([[s for s, _ in curve], [_short(max(0.0, value - dense)) for _, value in curve]])
        return page

    def bands_to_page(self, layers: Iterable[str]) -> dict[str, list[list[list[float]]]]:
        """Return plain lists for the page: per kind, per layer of `layers`, `[sparsities, lowest, highest]`."""
        names = list(layers)
        return {
            kind: [
                [
                    [s for s, _, _ in of.get(name, ())],
                    [_short(low) for _, low, _ in of.get(name, ())],
                    [_short(high) for _, _, high in of.get(name, ())],
                ]
                for name in names
            ]
            for kind, of in self.bands.items()
        }

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


@lru_cache(maxsize=4096)
def _break_even(curve: Series, tolerance: float) -> float | None:
    """`Curves.break_even` of a latency curve. Kept: views ask for every layer each time they draw, and a curve stays what it is."""
    if len(curve) < 2 or curve[0][0] > 0:
        return None
    # The table's own rule, so that page, figures and solver agree. Imported late: it brings torch, which is there once anything was measured.
    from explorer.sensitivity import SensitivityPoint, SensitivityTable

    points = [SensitivityPoint("layer", s, "latency_ms", ms) for s, ms in curve]
    return SensitivityTable.from_points(points, layers=["layer"]).break_even("layer", tolerance)


class CurveBuilder:
    """Collects points and makes `Curves` of them. Used by one thread at a time.

    Points with refreshed BatchNorm statistics are left out: predictions and targets are made from the others, and a page must not
    show one thing and solve with another.
    """

    def __init__(self, points: Iterable[Any] = ()) -> None:
        self._values: dict[str, dict[str, dict[float, float]]] = {}
        self._bands: dict[str, dict[str, dict[float, tuple[float, float]]]] = {}
        for point in points:
            self.add(point)

    def add(self, point: Any) -> None:
        """Add a `SensitivityPoint`; unknown kinds and values that are no numbers are left out."""
        if point.kind not in KINDS or point.refreshed or not math.isfinite(point.value):
            return
        self._values.setdefault(point.kind, {}).setdefault(point.layer, {})[point.sparsity] = float(
            point.value
        )
        band = self._bands.setdefault(point.kind, {}).setdefault(point.layer, {})
        band.pop(point.sparsity, None)  # that of an earlier point is not this one's
        if point.low is not None and point.high is not None:
            band[point.sparsity] = (float(point.low), float(point.high))

    def count(self, kind: str) -> int:
        """Return how many points of `kind` are there."""
        return sum(len(levels) for levels in self._values.get(kind, {}).values())

    def curves(self) -> Curves:
        """Return what was collected so far."""
        return Curves(
            {
                kind: {layer: tuple(sorted(levels.items())) for layer, levels in layers.items()}
                for kind, layers in self._values.items()
            },
            {
                kind: {
                    layer: tuple((level, low, high) for level, (low, high) in sorted(levels.items()))
                    for layer, levels in layers.items()
                }
                for kind, layers in self._bands.items()
                if any(layers.values())
            },
        )


def _short(value: float) -> float:
    """Round to five significant digits: more is noise, and bytes to the page."""
    return float(f"{value:.5g}")
