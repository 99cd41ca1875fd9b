"""Where to measure next: the cells that would tell most about curves of which a few levels are known.

Between two measured levels a monotone curve can run anywhere in the rectangle that they span. So the rectangle's area is what is not known, and a new level in the
middle halves it. That puts levels where curves bend, without a model of their shape. A step that is within twice its standard errors is noise, and is left alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from explorer.errors import DistributionError
from explorer.sensitivity.table import SensitivityTable

__all__ = ["refinement"]

_NARROWEST = 0.004
"""Levels are not put closer than this."""
_DIGITS = 4
_SIGNIFICANT = 2.0
_NEAR = 8.0
"""How much more a rectangle counts that a distribution's sparsity lies in."""


def refinement(
    table: SensitivityTable,
    n_cells: int,
    *,
    kind: str = "kl",
    refreshed: bool = False,
    layers: Collection[str] | None = None,
    between: tuple[float, float] = (0.0, 1.0),
    near: Mapping[str, float] | None = None,
) -> tuple[tuple[str, float], ...]:
    """Choose cells to be measured, the most telling first.

    Values are compared by their square roots, as the solver's scores do: a layer whose divergence is ten nats at 99 % would take all levels otherwise.
    Sparsities count by the logarithm of what remains, so that 0.98 lies in the middle between 0.96 and 0.99.

    Parameters
    ----------
    table : SensitivityTable
    n_cells : int
        How many, at most.
    kind : str
        A kind that is measured level by level.
    refreshed : bool
        Of what was measured with refreshed BatchNorm statistics.
    layers : collection of str, optional
        Only these: the ones in view.
    between : (float, float)
        Only sparsities in this range: the part in view.
    near : mapping of str to float, optional
        A distribution: what lies around its sparsities counts eight times as much, because predictions and the solver read the curves there.

    Returns
    -------
    tuple of (str, float)
        Layer and sparsity; fewer than asked when nothing is left that measuring would tell.

    Raises
    ------
    DistributionError
        If the kind has not been measured, or a layer is unknown.
    """
    if layers is not None:
        unknown = sorted(set(layers) - set(table.layers))
        if unknown:
            raise DistributionError(
                f"The table has no layer {unknown[0]!r}; it has {', '.join(table.layers)}."
            )
    wanted = [layer for layer in table.layers if layers is None or layer in layers]
    if not any(table.has(layer, kind, refreshed=refreshed) for layer in wanted):
        raise DistributionError(f"{kind!r} has not been measured; measured are {', '.join(table.kinds)}.")
    low, high = between
    heap: list[tuple[float, str, float, float, float]] = []

    def consider(layer: str, start: float, end: float, step: float) -> None:
        weight = _NEAR if near is not None and start <= near.get(layer, -1.0) <= end else 1.0
        area = step * float(np.log1p(-start) - np.log1p(-end))
        if step > 0.0 and end - start >= 2 * _NARROWEST and low <= _middle(start, end) <= high:
            heapq.heappush(heap, (-weight * area, layer, start, end, step))

    for layer in wanted:
        for start, end, step in _steps(table, layer, kind, refreshed=refreshed):
            consider(layer, start, end, step)
    chosen: list[tuple[str, float]] = []
    while heap and len(chosen) < n_cells:
        _, layer, start, end, step = heapq.heappop(heap)
        middle = _middle(start, end)
        chosen.append((layer, middle))
        consider(layer, start, middle, step / 2)
        consider(layer, middle, end, step / 2)
    return tuple(chosen)


def _middle(start: float, end: float) -> float:
    return round(1.0 - float(np.sqrt((1.0 - start) * (1.0 - end))), _DIGITS)


def _steps(
    table: SensitivityTable, layer: str, kind: str, *, refreshed: bool
) -> Iterator[tuple[float, float, float]]:
    """The stretches between a layer's measured levels, and by how much the root of its curve rises over each for sure."""
    if not table.has(layer, kind, refreshed=refreshed):
        return
    levels, values = table.curve(layer, kind, refreshed=refreshed)
    points = [table.point(layer, float(level), kind, refreshed=refreshed) for level in levels]
    errors = np.array([(point.std_error if point is not None else None) or 0.0 for point in points])
    rise = np.abs(np.diff(values)) - _SIGNIFICANT * np.hypot(errors[1:], errors[:-1])
    steps = np.where(rise > 0.0, np.abs(np.diff(np.sqrt(np.maximum(values, 0.0)))), 0.0)
    for i, step in enumerate(steps):
        yield float(levels[i]), float(levels[i + 1]), float(step)
