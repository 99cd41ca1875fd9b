"""The choice that is to be made, posed as a table: which layers are free, in which groups, at which levels, and what each level costs.

Levels are the same for all layers, on a grid that gets finer towards the end; where a layer has bounds, or was measured less far, the levels beyond them become the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explorer.distribution.distribution import SparsityDistribution, dense_ends
from explorer.distribution.prediction import stored_bytes
from explorer.distribution.scores import score_table
from explorer.errors import DistributionError
from explorer.masks import n_zeros
from explorer.models import PrunableLayer
from explorer.sensitivity import SensitivityTable

__all__ = ["LEVEL_GRID", "Costs", "Problem", "pose"]

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

# Finer where a step removes a larger share of what is left.
LEVEL_GRID: tuple[float, ...] = tuple(
    float(s)
    for s in np.unique(np.round(np.concatenate([np.linspace(0.0, 0.9, 37), np.linspace(0.9, 0.99, 19)]), 6))
)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a choice costs: ``(free groups, levels)``, and what all that is held costs together."""

    rows: _Floats
    fixed: float

    @property
    def least(self) -> float:
        """The cheapest choice."""
        return self.fixed + float(self.rows.min(axis=1).sum())

    @property
    def most(self) -> float:
        """The dearest choice."""
        return self.fixed + float(self.rows.max(axis=1).sum())


@dataclass(frozen=True, slots=True)
class Problem:
    """What may be chosen.

    Attributes
    ----------
    layers : tuple of PrunableLayer
        All of them.
    free : tuple of tuple of PrunableLayer
        Groups of layers that get one level together; most of one layer.
    held : dict of str to float
        Sparsities of the others.
    levels : ndarray, (k,) float64
        Ascending from 0.
    allowed : ndarray, (free groups, k) int64
        For each level the one that the group gets when it is chosen: itself, or its bound.
    locked : tuple of str
    """

    layers: tuple[PrunableLayer, ...]
    free: tuple[tuple[PrunableLayer, ...], ...]
    held: dict[str, float]
    levels: _Floats
    allowed: _Ints
    locked: tuple[str, ...]

    @property
    def held_words(self) -> str:
        """How much is held, for messages."""
        return f"{len(self.held)} layers held" if self.held else "no layer held"

    @property
    def highest(self) -> float:
        """The highest level that any free layer may get."""
        return float(self.levels[self.allowed.max()]) if self.free else 0.0

    def distribution(self, picks: _Ints) -> SparsityDistribution:
        """Return the distribution of a choice, one level for each group."""
        chosen = dict(self.held)
        for group, allowed, pick in zip(self.free, self.allowed, picks, strict=True):
            chosen.update({layer.name: float(self.levels[allowed[pick]]) for layer in group})
        return SparsityDistribution(
            {layer.name: chosen[layer.name] for layer in self.layers},
            locked=self.locked,
            groups=[[layer.name for layer in group] for group in self.free],
        )

    def costs(self, row: Callable[[PrunableLayer, _Floats], _Floats], scale: float = 1.0) -> Costs:
        """Return what `row` says of each layer at the levels, summed over groups, times `scale`."""
        rows = [
            scale * np.sum([row(layer, self.levels) for layer in group], axis=0)[allowed]
            for group, allowed in zip(self.free, self.allowed, strict=True)
        ]
        held = sum(
            float(row(layer, np.asarray([self.held[layer.name]]))[0])
            for layer in self.layers
            if layer.name in self.held
        )
        return Costs(np.asarray(rows).reshape(len(self.free), self.levels.size), scale * held)

    def latencies(self, table: SensitivityTable) -> Costs:
        """Return milliseconds of the whole network.

        Raises
        ------
        DistributionError
            If no level of latencies is complete.
        """
        model = table.latency_model
        if model is None:
            raise DistributionError(
                "The table holds no complete latency level; run the latency measurement first."
            )
        fixed, scale = model
        found = self.costs(lambda layer, levels: table.values_at(layer.name, levels, "latency_ms"), scale)
        return Costs(found.rows, fixed + found.fixed)

    def remaining(self) -> Costs:
        """Return how many weights remain."""
        return self.costs(
            lambda layer, levels: np.array(
                [float(layer.n_params - n_zeros(layer.n_params, s)) for s in levels.tolist()]
            )
        )

    def sizes(self, other_params: int) -> Costs:
        """Return bytes on disc, `other_params` values of four bytes among them."""
        found = self.costs(
            lambda layer, levels: np.array(
                [
                    float(stored_bytes(layer.n_params, layer.n_params - n_zeros(layer.n_params, s)))
                    for s in levels.tolist()
                ]
            )
        )
        return Costs(found.rows, found.fixed + 4.0 * other_params)

    def harm(self, table: SensitivityTable) -> Costs:
        """Return nats of divergence, or of loss where no divergence was measured."""
        kind = "kl" if "kl" in table.kinds else "loss"

        def row(layer: PrunableLayer, levels: _Floats) -> _Floats:
            return table.values_at(layer.name, levels, kind) - table.value(layer.name, 0.0, kind)

        return self.costs(row)

    def scores(self, name: str, table: SensitivityTable) -> _Floats:
        """Return the named score, ``(free groups, levels)``."""
        names = [layer.name for group in self.free for layer in group]
        every = score_table(name, table, names, self.levels)
        rows, first = [], 0
        for group, allowed in zip(self.free, self.allowed, strict=True):
            rows.append(every[first : first + len(group)].sum(axis=0)[allowed])
            first += len(group)
        return np.asarray(rows)


def pose(
    layers: Sequence[PrunableLayer],
    table: SensitivityTable,
    kinds: Sequence[str],
    *,
    locked: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    groups: Iterable[Iterable[str]] = (),
    max_sparsity: float = 0.99,
    dense_first_last: bool = True,
) -> Problem:
    """Pose the choice.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    table : SensitivityTable
    kinds : sequence of str
        What is read from the table: no level is offered beyond what was measured of it.
    locked : mapping of str to float, optional
    bounds : mapping of str to (float, float), optional
        Least and greatest sparsity of a layer.
    groups : iterable of iterable of str
        Layers that get the same sparsity.
    max_sparsity : float
    dense_first_last : bool
        Unless `locked` or `bounds` say otherwise of them.

    Raises
    ------
    DistributionError
        If an argument is out of range, names an unknown layer, or contradicts another.
    """
    if not layers:
        raise DistributionError("There are no layers to distribute sparsity over.")
    if not 0.0 <= max_sparsity < 1.0:
        raise DistributionError(
            f"max_sparsity is a fraction of zeros in [0, 1); got {max_sparsity!r}. Write 99 % as 0.99."
        )
    locked, bounds = dict(locked or {}), dict(bounds or {})
    # A distribution checks names and values.
    dense = SparsityDistribution({layer.name: 0.0 for layer in layers})
    dense.replace(locked)
    linked = SparsityDistribution(dense, groups=groups)
    for name, (low, high) in bounds.items():
        dense.replace({name: low}).replace({name: high})
        if low > high:
            raise DistributionError(
                f"The bounds of layer {name!r} are {low:g} to {high:g}; the first is larger."
            )
    ends = dense_ends(layers) - set(bounds) if dense_first_last else frozenset()
    held: dict[str, float] = {}
    free: list[tuple[PrunableLayer, ...]] = []
    limits: list[tuple[float, float]] = []
    by_name = {layer.name: layer for layer in layers}
    done: set[str] = set()
    for layer in layers:
        if layer.name in done:
            continue
        members = linked.group_of(layer.name)
        done |= set(members)
        given = {locked[name] for name in members if name in locked}
        if len(given) > 1:
            raise DistributionError(
                f"The layers of a group, {', '.join(members)}, are locked at {sorted(given)}; they have the same sparsity."
            )
        if given or (ends & set(members)):
            held.update(dict.fromkeys(members, given.pop() if given else 0.0))
            continue
        low = max((bounds[name][0] for name in members if name in bounds), default=0.0)
        high = min([max_sparsity, *(bounds[name][1] for name in members if name in bounds)])
        for name in members:
            high = min([high, *(float(table.curve(name, kind)[0][-1]) for kind in kinds)])
        if low > high:
            raise DistributionError(
                f"Layer {layer.name!r} is to have at least {low:g}, but {high:g} is the most that bounds, max_sparsity and measured levels allow."
            )
        free.append(tuple(by_name[name] for name in members))
        limits.append((low, high))
    most = max((high for _, high in limits), default=0.0)
    edges = [edge for pair in limits for edge in pair]
    levels = np.unique(np.asarray([0.0, *(level for level in LEVEL_GRID if level < most), *edges]))
    allowed = np.asarray(
        [np.searchsorted(levels, np.clip(levels, low, high)) for low, high in limits], dtype=np.int64
    ).reshape(len(free), levels.size)
    return Problem(tuple(layers), tuple(free), held, levels, allowed, tuple(locked))
