"""The tables behind a prediction as plain numbers, so that whoever holds them can predict without asking: a page, while a bar is dragged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["PredictionTables"]

_KINDS = ("kl", "loss", "accuracy", "latency_ms")

Knots = tuple[tuple[float, ...], tuple[float, ...]]
"""Sparsities, ascending, and values: linear between them, the nearest value outside."""


@dataclass(frozen=True, slots=True)
class PredictionTables:
    """What `predict` reads.

    A kind of loss is what the dense network has, ``dense[kind]``, and for each layer what its curve adds to that since sparsity 0. A latency is ``fixed_ms``
    and ``scale`` times the sum over layers; a speed-up is ``baseline_ms`` over it. A layer of n weights, z of them zeros, takes
    ``min(ceil(n / 8) + 4 (n - z), 4 n)`` bytes, everything else ``other_bytes``.

    Attributes
    ----------
    n_params : tuple of int
        Weights of each layer.
    curves : dict of kind to tuple of Knots
        One per layer, in the order of the layers: only kinds of which every layer has a curve.
    dense : dict of kind to float
        Of the losses.
    fixed_ms, scale, baseline_ms : float or None
        None where the latency is not known.
    other_bytes : int
    """

    n_params: tuple[int, ...]
    curves: dict[str, tuple[Knots, ...]]
    dense: dict[str, float]
    fixed_ms: float | None
    scale: float | None
    baseline_ms: float | None
    other_bytes: int

    @classmethod
    def of(
        cls, layers: Sequence[PrunableLayer], table: SensitivityTable, *, other_params: int = 0
    ) -> PredictionTables:
        """Return the tables of these layers."""
        curves, dense = {}, {}
        for kind in _KINDS:
            if not all(table.has(layer.name, kind) for layer in layers):
                continue
            if kind != "latency_ms":
                baseline = table.baseline(kind)
                if baseline is None:
                    continue
                dense[kind] = baseline
            knots = (table.knots(layer.name, kind) for layer in layers)
            curves[kind] = tuple((tuple(levels.tolist()), tuple(values.tolist())) for levels, values in knots)
        model = table.latency_model if "latency_ms" in curves else None
        fixed_ms, scale = (None, None) if model is None else model
        return cls(
            tuple(layer.n_params for layer in layers),
            curves,
            dense,
            fixed_ms,
            scale,
            table.baseline_latency_ms,
            4 * other_params,
        )

    def to_page(self, digits: int = 6) -> dict[str, Any]:
        """Return the same as lists and numbers of so many significant digits."""

        def short(value: float | None) -> float | None:
            return None if value is None else float(f"{value:.{digits}g}")

        return {
            "n_params": list(self.n_params),
            "curves": {
                kind: [[[*map(short, levels)], [*map(short, values)]] for levels, values in knots]
                for kind, knots in self.curves.items()
            },
            "dense": {kind: short(value) for kind, value in self.dense.items()},
            "fixed_ms": short(self.fixed_ms),
            "scale": short(self.scale),
            "baseline_ms": short(self.baseline_ms),
            "other_bytes": self.other_bytes,
        }
