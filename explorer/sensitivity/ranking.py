"""Which layer minds most: an order of the layers at one sparsity that says how sure it is.

A layer at which pruning removed nothing has no sensitivity, neither high nor low: it stands apart, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from explorer.errors import DistributionError
from explorer.sensitivity.table import SensitivityTable

__all__ = ["RankedLayer", "ranking"]

_DRAWS = 400


@dataclass(frozen=True, slots=True)
class RankedLayer:
    """One layer's place.

    Attributes
    ----------
    layer : str
    value : float
        On the layer's monotone curve. Of accuracy what was lost, so that larger is always more sensitive.
    std_error : float or None
        Standard error of `value` over images; None when unknown.
    is_known : bool
        False when pruning to this sparsity removed nothing: the value then says nothing about the layer.
    lowest, highest : int
        Places (0 is the most sensitive) between which it lies in 95 of 100 draws of all values within their standard errors. Both the place itself when
        errors are unknown.
    """

    layer: str
    value: float
    std_error: float | None
    is_known: bool
    lowest: int
    highest: int


def ranking(
    table: SensitivityTable, sparsity: float = 0.9, kind: str = "kl", *, refreshed: bool = False
) -> tuple[RankedLayer, ...]:
    """Order the layers at one sparsity, the most sensitive first.

    Parameters
    ----------
    table : SensitivityTable
    sparsity : float
        In [0, 1).
    kind : str
        A loss-like kind, or "accuracy".
    refreshed : bool
        Of what was measured with refreshed BatchNorm statistics.

    Returns
    -------
    tuple of RankedLayer
        Of the layers with points of this kind; those at which nothing was removed come last.

    Raises
    ------
    DistributionError
        If nothing of this kind was measured, or it is no measure of sensitivity.
    """
    if kind == "latency_ms":
        raise DistributionError("A latency is no sensitivity; rank by kl, loss, accuracy or removed_energy.")
    layers = [layer for layer in table.layers if table.has(layer, kind, refreshed=refreshed)]
    if not layers:
        raise DistributionError(
            f"{kind!r} has not been measured; measured are {', '.join(table.kinds) or 'none'}."
        )
    values = np.array([_minded(table, layer, sparsity, kind, refreshed=refreshed) for layer in layers])
    errors = [table.std_error_at(layer, sparsity, kind, refreshed=refreshed) for layer in layers]
    known = np.array([not _is_no_op(table, layer, sparsity, kind, refreshed=refreshed) for layer in layers])
    order = np.lexsort((-values, ~known))
    n_known = int(known.sum())
    spread = np.array([error or 0.0 for error in errors])[order][:n_known]
    draws = values[order][:n_known] + spread * np.random.default_rng(0).standard_normal((_DRAWS, n_known))
    places = np.argsort(np.argsort(-draws, axis=1, kind="stable"), axis=1)
    low, high = np.percentile(places, [2.5, 97.5], axis=0, method="nearest").astype(int)
    return tuple(
        RankedLayer(
            layers[i],
            float(values[i]),
            errors[i],
            bool(known[i]),
            int(low[place]) if place < n_known else place,
            int(high[place]) if place < n_known else place,
        )
        for place, i in enumerate(order)
    )


def _minded(table: SensitivityTable, layer: str, sparsity: float, kind: str, *, refreshed: bool) -> float:
    value = table.value(layer, sparsity, kind, refreshed=refreshed)
    return table.value(layer, 0.0, kind, refreshed=refreshed) - value if kind == "accuracy" else value


def _is_no_op(table: SensitivityTable, layer: str, sparsity: float, kind: str, *, refreshed: bool) -> bool:
    """Whether nothing was removed at any of the levels that the value at `sparsity` is read from."""
    levels = [level for level in table.levels(kind, layer, refreshed=refreshed) if level > 0.0]
    if not levels:
        return False
    up_to = [level for level in levels if level <= sparsity] or levels[:1]
    above = [level for level in levels if level >= sparsity][:1]
    points = [table.point(layer, level, kind, refreshed=refreshed) for level in {up_to[-1], *above}]
    removed = [point.n_removed for point in points if point is not None]
    return bool(removed) and all(count == 0 for count in removed)
