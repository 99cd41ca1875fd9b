"""What a distribution will give, before anything is pruned: read from the measured tables, with how sure that is.

Losses are one-shot: they say how the network answers if it is pruned so and not trained. Training wins most of it back, so they rank
distributions and do not foretell the final accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from explorer.distribution.distribution import SparsityDistribution, check_same_layers
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["Prediction", "predict"]

_BYTES_PER_VALUE = 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the tables say of a distribution; None where they do not say.

    Attributes
    ----------
    kl, loss : float or None
        One-shot divergence from the dense network in nats, and loss: the dense value plus the layers' increases.
    accuracy : float or None
        One-shot accuracy: the dense value less the layers' losses, not below 0.
    kl_error, loss_error, accuracy_error : float or None
        Standard errors, from those of the layers' values. They do not cover that damages of several layers may not add up.
    latency_ms : float or None
        From each layer's time at its sparsity, by the table's `latency_model`.
    latency_error_ms : float or None
        `latency_ms` times the table's `latency_error`: by what share the same sum missed the measured levels, and how runs spread.
    speedup, speedup_error : float or None
        Baseline latency over `latency_ms`; its error comes from `latency_error_ms`.
    nnz, n_params : int
        Weights of prunable layers that remain, and all of them.
    sparsity : float
        ``1 - nnz / n_params``.
    size_bytes : int
        Size on disc: a layer is stored as one bit a weight that says which remain, and 4 bytes for each that remains, or as 4 bytes for each
        weight where that is less; other parameters take 4 bytes.
    """

    kl: float | None
    loss: float | None
    accuracy: float | None
    latency_ms: float | None
    speedup: float | None
    nnz: int
    n_params: int
    sparsity: float
    size_bytes: int
    kl_error: float | None = None
    loss_error: float | None = None
    accuracy_error: float | None = None
    latency_error_ms: float | None = None
    speedup_error: float | None = None


def predict(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable | None,
    distribution: SparsityDistribution,
    *,
    refreshed: bool = False,
    other_params: int = 0,
) -> Prediction:
    """Predict a distribution from measured tables.

    Parameters
    ----------
    layers : sequence of PrunableLayer
        All prunable layers.
    table : SensitivityTable or None
        None when nothing was measured yet: then only counts and size are predicted.
    distribution : SparsityDistribution
    refreshed : bool
        Read losses from the curves with refreshed BatchNorm statistics.
    other_params : int
        Parameters and buffers outside prunable weights, counted in `size_bytes`.

    Raises
    ------
    DistributionError
        If the distribution is not of these layers.
    """
    check_same_layers(distribution, layers)
    zeros = distribution.zeros(layers)
    n_params = sum(layer.n_params for layer in layers)
    nnz = n_params - sum(zeros.values())
    size = _BYTES_PER_VALUE * other_params + sum(
        stored_bytes(layer.n_params, layer.n_params - zeros[layer.name]) for layer in layers
    )
    losses: dict[str, tuple[float | None, float | None]] = {}
    for kind in ("kl", "loss", "accuracy"):
        losses[kind] = (
            (None, None) if table is None else _sum_of_changes(table, distribution, kind, refreshed=refreshed)
        )
    accuracy = losses["accuracy"][0]
    latency, latency_error = _latency(table, distribution)
    baseline = None if table is None else table.baseline_latency_ms
    speedup = baseline / latency if baseline is not None and latency is not None and latency > 0 else None
    speedup_error = None
    if speedup is not None and latency is not None and latency_error is not None:
        speedup_error = speedup * latency_error / latency
    return Prediction(
        kl=losses["kl"][0],
        loss=losses["loss"][0],
        accuracy=None if accuracy is None else max(0.0, accuracy),
        latency_ms=latency,
        speedup=speedup,
        nnz=nnz,
        n_params=n_params,
        sparsity=1.0 - nnz / n_params,
        size_bytes=size,
        kl_error=losses["kl"][1],
        loss_error=losses["loss"][1],
        accuracy_error=losses["accuracy"][1],
        latency_error_ms=latency_error,
        speedup_error=speedup_error,
    )


def stored_bytes(n_params: int, nnz: int) -> int:
    """Return the bytes of one layer's weights: a bit mask and the float32 values that remain, or all values where that is less.

    Examples
    --------
    >>> stored_bytes(1000, 100), stored_bytes(1000, 1000)
    (525, 4000)
    """
    return min(math.ceil(n_params / 8) + _BYTES_PER_VALUE * nnz, _BYTES_PER_VALUE * n_params)


def _sum_of_changes(
    table: SensitivityTable, distribution: SparsityDistribution, kind: str, *, refreshed: bool
) -> tuple[float | None, float | None]:
    dense = table.baseline(kind)
    if dense is None:
        return None, None
    value, squares, known = dense, 0.0, True
    for name, sparsity in distribution.items():
        if sparsity == 0.0:
            continue
        if not table.has(name, kind, refreshed=refreshed):
            return None, None
        value += table.value(name, sparsity, kind, refreshed=refreshed) - table.value(
            name, 0.0, kind, refreshed=refreshed
        )
        error = table.std_error_at(name, sparsity, kind, refreshed=refreshed)
        known = known and error is not None
        squares += (error or 0.0) ** 2
    return value, math.sqrt(squares) if known else None


def _latency(
    table: SensitivityTable | None, distribution: SparsityDistribution
) -> tuple[float | None, float | None]:
    if table is None:
        return None, None
    if not all(table.has(name, "latency_ms") for name in distribution):
        return None, None
    whole = table.network_latency_ms(
        sum(table.value(name, sparsity, "latency_ms") for name, sparsity in distribution.items())
    )
    if whole is None:
        return None, None
    share = table.latency_error
    return whole, None if share is None else share * whole
