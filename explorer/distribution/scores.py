"""What the solver minimises: a number for each layer and level that stands for the harm of pruning it, after training.

The raw one-shot loss is a poor stand-in: training repairs most of the damage in a layer that fails badly at once, and little in one that
seems unharmed at an extreme sparsity. Scores that temper it, by a root or by a prior that rises with sparsity, led to better
networks (``docs/results/scores.txt``: three networks, three seeds each, at equal measured latency). Every score has the same signature, so that they can be chosen by name and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityTable

__all__ = ["DEFAULT_SCORE", "SCORES", "Score", "score_table"]

_Floats = NDArray[np.float64]

Score = Callable[[SensitivityTable, Sequence[str], _Floats], _Floats]
"""``score(table, layers, levels)`` with levels ``(k,)`` ascending from 0 gives ``(len(layers), k)`` float64, 0 at level 0."""


def kl(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """One-shot KL divergence of the outputs, in nats."""
    return _increase(table, layers, levels, "kl")


def kl_sqrt(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """Square root of the one-shot KL divergence."""
    return np.sqrt(kl(table, layers, levels))


def mix_kl_sqrt(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """Half the square root of KL, scaled to 1 at its largest, and half the quadratic prior."""
    return _half_root(kl(table, layers, levels), quadratic(table, layers, levels))


def mix_loss_sqrt(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """As `mix_kl_sqrt`, of the increase of the one-shot loss: for tables without divergences, such as published ones."""
    return _half_root(loss(table, layers, levels), quadratic(table, layers, levels))


def loss(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """Increase of the one-shot loss."""
    return _increase(table, layers, levels, "loss")


def removed_energy(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """Removed share of the layer's squared weights."""
    return _increase(table, layers, levels, "removed_energy")


def fisher(table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """Second-order estimate of the increase of the loss (Optimal Brain Damage with the empirical Fisher information)."""
    return _increase(table, layers, levels, "fisher")


def quadratic(_table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """The prior of SPDY: the square of how many equal cuts of what remains lead to a level, over that of the largest level.

    Frantar and Alistarh, "SPDY: Accurate pruning with speedup guarantees" (2022), section 3.3: level i of n, each of which removes the
    same fraction of the remaining weights, scores ``(i / (n - 1))**2``. That is ``(log(1 - s) / log(1 - s_max))**2``, the same for every layer:
    0.02 at 0.5, 0.25 at 0.9 and 1 at 0.99, if that is the largest.
    """
    cuts = np.log1p(-levels)
    last = float(cuts[-1])
    return np.tile((cuts / last) ** 2 if last < 0 else np.zeros_like(levels), (len(layers), 1))


SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (mix_kl_sqrt, kl_sqrt, kl, mix_loss_sqrt, loss, removed_energy, fisher, quadratic)
}
DEFAULT_SCORE = "mix_kl_sqrt"


def score_table(name: str, table: SensitivityTable, layers: Sequence[str], levels: _Floats) -> _Floats:
    """Return the named score, ``(len(layers), len(levels))`` float64.

    Raises
    ------
    DistributionError
        If the name is unknown, or the table lacks what the score needs.
    """
    if name not in SCORES:
        raise DistributionError(f"Unknown score {name!r}; choose one of {', '.join(SCORES)}.")
    return SCORES[name](table, layers, levels)


def _half_root(increase: _Floats, prior: _Floats) -> _Floats:
    root = np.sqrt(increase)
    largest = float(root.max(initial=0.0))
    return 0.5 * (root / largest if largest > 0 else root) + 0.5 * prior


def _increase(table: SensitivityTable, layers: Sequence[str], levels: _Floats, kind: str) -> _Floats:
    """Return a loss-like kind less its value at level 0."""
    if not layers:
        return np.zeros((0, levels.size))
    rows = [table.values_at(layer, levels, kind) for layer in layers]
    dense = [table.value(layer, 0.0, kind) for layer in layers]
    return np.asarray(rows) - np.asarray(dense)[:, None]
