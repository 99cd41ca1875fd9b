"""Distributions from the literature that need no solver: what a solved one is compared with.

All of them reach the total that was asked for in exact counts, never less; none empties a layer, and by default first and last layer stay dense, as in the papers' own
experiments on convolutional networks. Locked layers keep what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explorer.distribution.distribution import SparsityDistribution, dense_ends
from explorer.errors import DistributionError, InfeasibleTarget
from explorer.masks import n_zeros
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["erk", "global_magnitude", "inverse_sensitivity", "lamp"]

_Floats = NDArray[np.float64]
_BISECTIONS = 80


def erk(
    layers: Sequence[PrunableLayer],
    sparsity: float,
    *,
    dense_first_last: bool = True,
    locked: Mapping[str, float] | None = None,
) -> SparsityDistribution:
    """Erdos-Renyi-Kernel: what remains of a layer is proportional to the sum of its dimensions over their product.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (2018), for linear layers; with kernels in Evci, Gale, Menick, Castro
    and Elsen, "Rigging the lottery" (2020), section 3: density ~ (n_in + n_out + w + h) / (n_in * n_out * w * h). Layers that would be more than dense are dense, and the
    others share what is left.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    sparsity : float
        Zeros over all prunable weights, in [0, 1).
    dense_first_last : bool
    locked : mapping of str to float, optional

    Raises
    ------
    InfeasibleTarget
        If layers that are held leave too few weights to remove.
    DistributionError
        If `sparsity` is out of range, or a name is unknown.
    """
    held = _held(layers, dense_first_last=dense_first_last, locked=locked)
    free = [layer for layer in layers if layer.name not in held]
    raw = np.array([sum(layer.weight_shape) / np.prod(layer.weight_shape) for layer in free])

    def at(scale: float) -> _Floats:
        return 1.0 - np.minimum(scale * raw, 1.0)

    highest = 1.0 / float(raw.min()) if free else 1.0
    return _reaching(layers, held, free, sparsity, at, 0.0, highest, locked)


def global_magnitude(
    module: nn.Module,
    layers: Sequence[PrunableLayer],
    sparsity: float,
    *,
    dense_first_last: bool = True,
    locked: Mapping[str, float] | None = None,
) -> SparsityDistribution:
    """One threshold for the magnitudes of all layers' weights.

    Han, Pool, Tran and Dally, "Learning both weights and connections for efficient neural networks" (2015), with one threshold for the network, as in Lee, Park, Mo, Ahn and
    Shin (2021), who call it Global.

    Raises
    ------
    InfeasibleTarget, DistributionError
        As `erk`.
    """
    return _by_threshold(
        module, layers, sparsity, torch.abs, dense_first_last=dense_first_last, locked=locked
    )


def lamp(
    module: nn.Module,
    layers: Sequence[PrunableLayer],
    sparsity: float,
    *,
    dense_first_last: bool = True,
    locked: Mapping[str, float] | None = None,
) -> SparsityDistribution:
    """One threshold for all layers' LAMP scores: a squared weight over the sum of those in its layer that are not smaller.

    Lee, Park, Mo, Ahn and Shin, "Layer-adaptive sparsity for the magnitude-based pruning" (2021), equation 4. The largest weight of each layer scores 1, so that no
    layer is emptied.

    Raises
    ------
    InfeasibleTarget, DistributionError
        As `erk`.
    """
    return _by_threshold(
        module, layers, sparsity, _lamp_scores, dense_first_last=dense_first_last, locked=locked
    )


def inverse_sensitivity(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    sparsity: float,
    *,
    kind: str = "kl",
    dense_first_last: bool = True,
    locked: Mapping[str, float] | None = None,
) -> SparsityDistribution:
    """Prune each layer until it does the same harm: the less it minds, the sparser it gets.

    Han et al. (2015), section 3.1, choose each layer's threshold by its sensitivity; here, that is one level of harm at which all curves are cut.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    table : SensitivityTable
    sparsity : float
    kind : str
        A kind that rises with sparsity: "kl", "loss", "removed_energy", "fisher".
    dense_first_last : bool
    locked : mapping of str to float, optional

    Raises
    ------
    InfeasibleTarget, DistributionError
        As `erk`, and if a layer has not been measured.
    """
    if kind not in ("kl", "loss", "removed_energy", "fisher"):
        raise DistributionError(
            f"Layers are made to do equal harm in kl, loss, removed_energy or fisher; got {kind!r}."
        )
    held = _held(layers, dense_first_last=dense_first_last, locked=locked)
    free = [layer for layer in layers if layer.name not in held]
    curves = []
    for layer in free:
        levels, values = table.curve(layer.name, kind)
        curves.append((levels, values - values[0]))
    top = max((float(values[-1]) for _, values in curves), default=0.0)

    def at(calm: float) -> _Floats:
        """Where the curves are cut, the lower the calmer: `calm` runs from 0 (the most harm that was measured) to 1 (none)."""
        harm = top * (1.0 - calm) ** 4
        return np.array([_cut(levels, values, harm) for levels, values in curves])

    return _reaching(layers, held, free, sparsity, at, 0.0, 1.0, locked)


def _cut(levels: _Floats, values: _Floats, harm: float) -> float:
    """The highest sparsity at which a monotone curve is not above `harm`."""
    above = np.flatnonzero(values > harm)
    if not above.size:
        return float(levels[-1])
    i = int(above[0])
    if i == 0:
        return float(levels[0])
    share = (harm - values[i - 1]) / (values[i] - values[i - 1])
    return float(levels[i - 1] + share * (levels[i] - levels[i - 1]))


def _held(
    layers: Sequence[PrunableLayer], *, dense_first_last: bool, locked: Mapping[str, float] | None
) -> dict[str, float]:
    everything = SparsityDistribution({layer.name: 0.0 for layer in layers})
    checked = everything.replace(dict(locked or {}))
    ends = dense_ends(layers) if dense_first_last else frozenset()
    return {name: checked[name] for name in checked if name in ends or name in (locked or {})}


def _counts(
    layers: Sequence[PrunableLayer], held: Mapping[str, float], sparsity: float
) -> tuple[int, float, int]:
    """Return the number of weights, how many zeros are wanted (less what rounding may miss), and how many the held layers have."""
    if not 0.0 <= sparsity < 1.0:
        raise DistributionError(
            f"Sparsity is the fraction of zeros, in [0, 1); got {sparsity!r}. Write 90 % as 0.9."
        )
    total = sum(layer.n_params for layer in layers)
    certain = sum(n_zeros(layer.n_params, held[layer.name]) for layer in layers if layer.name in held)
    return total, sparsity * total - 1e-9 * total, certain


def _reaching(
    layers: Sequence[PrunableLayer],
    held: Mapping[str, float],
    free: Sequence[PrunableLayer],
    sparsity: float,
    at: Callable[[float], _Floats],
    low: float,
    high: float,
    locked: Mapping[str, float] | None,
) -> SparsityDistribution:
    """Bisect for the largest argument of `at`, with which sparsities fall, that gives enough zeros."""
    total, wanted, certain = _counts(layers, held, sparsity)

    def zeros(argument: float) -> int:
        chosen = at(argument)
        return certain + sum(
            n_zeros(layer.n_params, min(float(s), 1.0 - 1e-12)) for layer, s in zip(free, chosen, strict=True)
        )

    most = zeros(low)
    if most < wanted:
        raise _out_of_reach(sparsity, most, total, len(held))
    if zeros(high) < wanted:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if zeros(middle) >= wanted else (low, middle)
    else:
        low = high
    found = {layer.name: min(float(s), 1.0 - 1e-12) for layer, s in zip(free, at(low), strict=True)}
    return _ordered(layers, {**held, **found}, locked)


def _by_threshold(
    module: nn.Module,
    layers: Sequence[PrunableLayer],
    sparsity: float,
    score: Callable[[Tensor], Tensor],
    *,
    dense_first_last: bool,
    locked: Mapping[str, float] | None,
) -> SparsityDistribution:
    held = _held(layers, dense_first_last=dense_first_last, locked=locked)
    free = [layer for layer in layers if layer.name not in held]
    total, asked, certain = _counts(layers, held, sparsity)
    wanted = max(0, int(np.ceil(asked)) - certain)
    # The strongest weight of each layer stays: a layer of zeros cuts the network in two.
    most = sum(layer.n_params - 1 for layer in free)
    if wanted > most:
        raise _out_of_reach(sparsity, certain + most, total, len(held))
    scores = []
    for layer in free:
        weight = module.get_submodule(layer.name).get_parameter("weight").detach()
        scores.append(score(weight.double()).flatten())
        scores[-1][scores[-1].argmax()] = float("inf")
    counts = np.zeros(len(free), dtype=np.int64)
    if wanted and free:
        owner = torch.cat([torch.full((len(each),), i) for i, each in enumerate(scores)])
        weakest = torch.argsort(torch.cat(scores), stable=True)[:wanted]
        counts = torch.bincount(owner[weakest], minlength=len(free)).numpy()
    found = {
        # A sparsity of which `n_zeros` makes exactly this count.
        layer.name: int(count) / layer.n_params
        for layer, count in zip(free, counts, strict=True)
    }
    return _ordered(layers, {**held, **found}, locked)


def _lamp_scores(weight: Tensor) -> Tensor:
    squares = weight.square().flatten()
    order = torch.argsort(squares, stable=True)
    # The sum of a weight's own square and of all larger ones, from the largest down.
    larger = squares[order].flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares[order] / torch.where(larger > 0, larger, torch.ones_like(larger))
    return scores.reshape(weight.shape)


def _ordered(
    layers: Sequence[PrunableLayer], chosen: Mapping[str, float], locked: Mapping[str, float] | None
) -> SparsityDistribution:
    return SparsityDistribution(
        {layer.name: chosen[layer.name] for layer in layers}, locked=tuple(locked or ())
    )


def _out_of_reach(sparsity: float, most: int, total: int, n_held: int) -> InfeasibleTarget:
    return InfeasibleTarget(
        f"A sparsity of {sparsity:.4f} is out of reach: with {n_held} layers held it is at most {most / total:.4f}. Ask for that, or hold fewer layers."
    )
