"""How sparse each layer shall be: a value that sliders, solver, recipe and pruning run pass around.

Invariants: it never changes (every edit gives a new one), its layers are fixed when it is made, every sparsity is in [0, 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from explorer.errors import DistributionError, FormatError
from explorer.masks import n_zeros
from explorer.models import PrunableLayer

__all__ = ["SparsityDistribution", "uniform"]


class SparsityDistribution(Mapping[str, float]):
    """Immutable mapping from layer name to sparsity, with a set of locked layers.

    A lock tells the solver, and anybody else who edits, to leave a layer alone.

    Parameters
    ----------
    sparsities : mapping of str to float
        One entry for every layer, in execution order; fractions in [0, 1).
    locked : iterable of str
        Names among them.

    Raises
    ------
    DistributionError
        If a sparsity is out of range or a locked name is unknown.

    Examples
    --------
    >>> dist = SparsityDistribution({"conv1": 0.0, "conv2": 0.8})
    >>> edited = dist.set("conv2", 0.9).lock("conv1")
    >>> dict(edited), sorted(edited.locked), dist["conv2"]
    ({'conv1': 0.0, 'conv2': 0.9}, ['conv1'], 0.8)
    """

    __slots__ = ("_locked", "_sparsities")

    def __init__(self, sparsities: Mapping[str, float], locked: Iterable[str] = ()) -> None:
        self._sparsities = {name: _checked(name, value) for name, value in sparsities.items()}
        names = (locked,) if isinstance(locked, str) else tuple(locked)
        self._check_names(names)
        self._locked = frozenset(names)

    def __getitem__(self, name: str) -> float:
        return self._sparsities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsities)

    def __len__(self) -> int:
        return len(self._sparsities)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityDistribution):
            return NotImplemented
        return self._sparsities == other._sparsities and self._locked == other._locked

    def __hash__(self) -> int:
        return hash((frozenset(self._sparsities.items()), self._locked))

    def __repr__(self) -> str:
        inner = ", ".join(
            f"{name!r}: {value:g}{' (locked)' if name in self._locked else ''}"
            for name, value in self.items()
        )
        return f"SparsityDistribution({{{inner}}})"

    @property
    def locked(self) -> frozenset[str]:
        """Names of the locked layers."""
        return self._locked

    def set(self, name: str, sparsity: float) -> Self:
        """Return a distribution with one layer changed.

        Raises
        ------
        DistributionError
            If the layer is unknown or locked, or `sparsity` is outside [0, 1).
        """
        return self.replace({name: sparsity})

    def replace(self, sparsities: Mapping[str, float]) -> Self:
        """Return a distribution with several layers changed; refuses like `set`, and then changes none."""
        self._check_names(sparsities)
        held = [
            name
            for name, value in sparsities.items()
            if name in self._locked and value != self._sparsities[name]
        ]
        if held:
            raise DistributionError(
                f"Locked: {', '.join(map(repr, held))}. Unlock a layer before changing its sparsity."
            )
        return type(self)({**self._sparsities, **sparsities}, self._locked)

    def lock(self, *names: str) -> Self:
        """Return a distribution in which these layers are locked as well."""
        self._check_names(names)
        return type(self)(self._sparsities, self._locked | set(names))

    def unlock(self, *names: str) -> Self:
        """Return a distribution in which these layers are free; all of them when none is named."""
        self._check_names(names)
        return type(self)(self._sparsities, self._locked - set(names) if names else ())

    def zeros(self, layers: Iterable[PrunableLayer]) -> dict[str, int]:
        """Return the exact number of zeros that each layer will have.

        Raises
        ------
        DistributionError
            If the layers are not those of the distribution.
        """
        return {layer.name: n_zeros(layer.n_params, self[layer.name]) for layer in self._matched(layers)}

    def sparsity(self, layers: Iterable[PrunableLayer]) -> float:
        """Return the share of zeros among the weights of all layers, by exact counts."""
        layers = self._matched(layers)
        return sum(self.zeros(layers).values()) / sum(layer.n_params for layer in layers)

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"sparsity": {name: value}, "locked": [names]}``, fit for JSON and YAML."""
        return {"sparsity": dict(self._sparsities), "locked": [name for name in self if name in self._locked]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave.

        Raises
        ------
        FormatError
            If the content has another shape.
        DistributionError
            If a sparsity is out of range or a locked name is unknown.
        """
        sparsities, locked = content.get("sparsity"), content.get("locked", ())
        unknown = set(content) - {"sparsity", "locked"}
        if not isinstance(sparsities, Mapping) or not isinstance(locked, (list, tuple)) or unknown:
            raise FormatError(
                "A distribution is written as {'sparsity': {layer: fraction}, 'locked': [layers]}; "
                f"got entries {sorted(map(str, content))}."
            )
        return cls(sparsities, locked)

    def _matched(self, layers: Iterable[PrunableLayer]) -> tuple[PrunableLayer, ...]:
        layers = tuple(layers)
        check_same_layers(self, layers)
        return layers

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._sparsities:
                near = difflib.get_close_matches(str(name), self._sparsities, n=3, cutoff=0.5)
                advice = (
                    f"Did you mean {', '.join(map(repr, near))}?"
                    if near
                    else f"Layers are {', '.join(self._sparsities)}."
                )
                raise DistributionError(f"No layer {name!r} in this distribution. {advice}")


def check_same_layers(names: Iterable[str], layers: Iterable[PrunableLayer]) -> None:
    """Raise DistributionError unless `names` are exactly the layers' names."""
    given, expected = set(names), {layer.name for layer in layers}
    if given != expected:
        missing, extra = sorted(expected - given), sorted(given - expected)
        raise DistributionError(
            f"The distribution does not fit the model: missing layers {missing}, unknown layers {extra}. "
            "Give every prunable layer exactly one sparsity; 0 leaves it dense."
        )


def _checked(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < 1.0:
        raise DistributionError(
            f"Sparsity of layer {name!r} must be a fraction of zeros in [0, 1); got {value!r}. Write 90 % as 0.9."
        )
    return float(value)


def dense_ends(layers: Iterable[PrunableLayer]) -> frozenset[str]:
    """Return the names of the first and the last layer, which are small and mind pruning most."""
    names = [layer.name for layer in layers]
    return frozenset((names[0], names[-1])) if names else frozenset()


def uniform(
    layers: Iterable[PrunableLayer], sparsity: float, *, dense_first_last: bool = True
) -> SparsityDistribution:
    """Give every layer the same sparsity.

    Parameters
    ----------
    layers : iterable of PrunableLayer
        In execution order.
    sparsity : float
        Fraction in [0, 1).
    dense_first_last : bool
        Leave the first and the last layer dense, as is usual: in convolutional networks they hold few weights and mind pruning most.

    Raises
    ------
    DistributionError
        If `sparsity` is outside [0, 1).
    """
    layers = tuple(layers)
    dense = dense_ends(layers) if dense_first_last else frozenset()
    return SparsityDistribution({layer.name: 0.0 if layer.name in dense else sparsity for layer in layers})
