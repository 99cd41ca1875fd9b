"""Which layer minds most: an order of the layers at one sparsity that says how sure it is.

A layer at which pruning removed nothing has no sensitivity, neither high nor low: it stands apart, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explorer.errors import DistributionError
from explorer.sensitivity.table import SensitivityTable

__all__ = ["RankedLayer", "Stability", "ranking", "stability"]

_DRAWS = 400
_STABLE = 0.95
"""Mean rank correlation from which an order is called stable; that of 500 images with the whole test set is 0.97 or more for divergences on Fashion-MNIST."""
_FACTORS = (2, 4, 8, 16, 32)


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
    places = _drawn_places(values[order][:n_known], spread)
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


@dataclass(frozen=True, slots=True)
class Stability:
    """Whether other images would give the same order.

    Attributes
    ----------
    correlation : float
        Spearman's, between the order and orders drawn within the standard errors, on average; 1 when errors are unknown.
    is_stable : bool
    images_factor : int or None
        How many times as many images would make it stable; 1 when it is, and None when not even 32 times as many would: those layers are alike.
    """

    correlation: float
    is_stable: bool
    images_factor: int | None

    def hint(self, n_images: int) -> str:
        """Say what to do, to a user who measured on so many images."""
        if self.is_stable:
            return f"The order of the layers is stable on {n_images:,} images (rank correlation {self.correlation:.2f})."
        if self.images_factor is None:
            return (
                f"Some layers are so alike that no number of images would order them (rank correlation {self.correlation:.2f} on {n_images:,}); "
                "among those the order does not matter."
            )
        return (
            f"Other images may order the layers otherwise (rank correlation {self.correlation:.2f} on {n_images:,}); "
            f"measure on about {n_images * self.images_factor:,}."
        )


def stability(
    table: SensitivityTable, sparsity: float = 0.9, kind: str = "kl", *, refreshed: bool = False
) -> Stability:
    """Tell whether the ranking at one sparsity would be the same on other images.

    Standard errors fall with the square root of the number of images.

    Raises
    ------
    DistributionError
        As `ranking`.
    """
    known = [one for one in ranking(table, sparsity, kind, refreshed=refreshed) if one.is_known]
    values = np.array([one.value for one in known])
    errors = np.array([one.std_error or 0.0 for one in known])
    correlation = _correlation(values, errors)
    if correlation >= _STABLE:
        return Stability(correlation, True, 1)
    for factor in _FACTORS:
        if _correlation(values, errors / factor**0.5) >= _STABLE:
            return Stability(correlation, False, factor)
    return Stability(correlation, False, None)


def _drawn_places(values: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places of the values, 0 the largest, when they are drawn within their errors: (draws, values) int64, the same at every call."""
    draws = values + errors * np.random.default_rng(0).standard_normal((_DRAWS, len(values)))
    return np.argsort(np.argsort(-draws, axis=1, kind="stable"), axis=1)


def _correlation(values: NDArray[np.float64], errors: NDArray[np.float64]) -> float:
    """Spearman's correlation of the order with orders drawn within the errors, on average."""
    n = len(values)
    if n < 2:
        return 1.0
    ranks = _drawn_places(values, errors)
    own = np.argsort(np.argsort(-values, kind="stable"))
    return float(1 - 6 * ((ranks - own) ** 2).sum(1).mean() / (n * (n**2 - 1)))


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
