"""How sure a mean over images is: its standard error, and the band in which it lies when other images are drawn.

The band is the percentile bootstrap of Efron, "Bootstrap methods: another look at the jackknife" (1979): images are drawn with replacement, as many as there are, and
the mean is taken anew. Divergences have long tails, for which a band of two standard errors to both sides reaches below zero; this one does not. All cells of a
scan share the same draws, so bands of two layers may be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BAND", "MIN_DRAWN", "Estimate", "Resampler"]

BAND = 0.95
"""Share of the draws whose mean lies within the band."""

MIN_DRAWN = 8
"""Fewer values than this, of batches for instance, say nothing about what others would give."""

_DRAWS = 400


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and how sure it is.

    Attributes
    ----------
    value : float
    std_error : float or None
    low, high : float or None
        The band; None where there are too few values.
    """

    value: float
    std_error: float | None
    low: float | None
    high: float | None


class Resampler:
    """Means with bands, all from the same draws."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def estimate(self, values: Tensor, weights: Tensor | None = None) -> Estimate:
        """Return the weighted mean of `values`, its standard error and its band.

        Parameters
        ----------
        values : Tensor, (N,) float64
            Of images, or of batches.
        weights : Tensor, (N,) float64, optional
            What each counts: the sizes of batches. All alike by default.
        """
        n = len(values)
        weights = torch.ones(n, dtype=torch.float64) if weights is None else weights
        mean = float(values @ weights / weights.sum())
        if n < MIN_DRAWN:
            return Estimate(mean, None, None, None)
        residuals = (values - mean) * weights / weights.mean()
        error = float(residuals.square().sum().div(n - 1).sqrt() / n**0.5)
        if not bool(torch.isfinite(values).all()):
            return Estimate(mean, error, None, None)
        drawn = self._drawn(n)
        means = (drawn @ (values * weights)) / (drawn @ weights)
        edges = torch.tensor([(1 - BAND) / 2, (1 + BAND) / 2], dtype=torch.float64)
        low, high = torch.quantile(means, edges).tolist()
        return Estimate(mean, error, min(low, mean), max(high, mean))

    def _drawn(self, n: int) -> Tensor:
        """How often each of n values is drawn: (draws, n) float64."""
        if n not in self._counts:
            chosen = torch.randint(n, (_DRAWS, n), generator=torch.Generator().manual_seed(0))
            counts = torch.zeros(_DRAWS, n, dtype=torch.float64)
            self._counts[n] = counts.scatter_add_(1, chosen, torch.ones_like(counts))
        return self._counts[n]
