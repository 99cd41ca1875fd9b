"""How sparse each layer shall be: a value that sliders, solver, recipe and pruning run pass around.

Invariants: it never changes (every edit gives a new one), its layers are fixed when it is made, every sparsity is in [0, 1), layers of a group have the same one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import yaml

from explorer.errors import DistributionError, FormatError, InfeasibleTarget
from explorer.masks import n_zeros
from explorer.models import PrunableLayer

__all__ = ["Achieved", "SparsityDistribution", "uniform"]

_MAX_SPARSITY = 0.99
_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Achieved:
    """What was asked of a layer (or of all), and what its number of weights allows.

    Attributes
    ----------
    asked : float
        Fraction in [0, 1).
    zeros, n_params : int
    """

    asked: float
    zeros: int
    n_params: int

    @property
    def sparsity(self) -> float:
        """Zeros as a share of the weights: never less than asked, except that one weight always stays."""
        return self.zeros / self.n_params


class SparsityDistribution(Mapping[str, float]):
    """Immutable mapping from layer name to sparsity, with a set of locked layers, and groups of layers that move together.

    A lock tells the solver, and anybody else who edits, to leave a layer alone. Whoever changes one layer of a group changes all.

    Parameters
    ----------
    sparsities : mapping of str to float
        One entry for every layer, in execution order; fractions in [0, 1).
    locked : iterable of str
        Names among them.
    groups : iterable of iterable of str
        Names of layers that have the same sparsity, each in one group at most.

    Raises
    ------
    DistributionError
        If a sparsity is out of range, a name is unknown, or groups overlap or differ in themselves.

    Examples
    --------
    >>> dist = SparsityDistribution({"conv1": 0.0, "conv2": 0.8})
    >>> edited = dist.set("conv2", 0.9).lock("conv1")
    >>> dict(edited), sorted(edited.locked), dist["conv2"]
    ({'conv1': 0.0, 'conv2': 0.9}, ['conv1'], 0.8)
    """

    __slots__ = ("_groups", "_locked", "_sparsities")

    def __init__(
        self,
        sparsities: Mapping[str, float],
        locked: Iterable[str] = (),
        groups: Iterable[Iterable[str]] = (),
    ) -> None:
        self._sparsities = {name: _checked(name, value) for name, value in sparsities.items()}
        names = (locked,) if isinstance(locked, str) else tuple(locked)
        self._check_names(names)
        self._locked = frozenset(names)
        self._groups = self._checked_groups(groups)

    def _checked_groups(self, groups: Iterable[Iterable[str]]) -> frozenset[frozenset[str]]:
        found: list[frozenset[str]] = []
        for group in groups:
            members = frozenset((group,) if isinstance(group, str) else group)
            self._check_names(members)
            twice = [name for other in found for name in other & members]
            if twice:
                raise DistributionError(
                    f"Layer {min(twice)!r} is in two groups; a layer moves with one at most."
                )
            if len({self._sparsities[name] for name in members}) > 1:
                values = ", ".join(f"{name} {self._sparsities[name]:g}" for name in sorted(members))
                raise DistributionError(f"Layers of a group have the same sparsity; these differ: {values}.")
            if len(members) > 1:
                found.append(members)
        return frozenset(found)

    def __getitem__(self, name: str) -> float:
        return self._sparsities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsities)

    def __len__(self) -> int:
        return len(self._sparsities)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityDistribution):
            return NotImplemented
        return (self._sparsities, self._locked, self._groups) == (
            other._sparsities,
            other._locked,
            other._groups,
        )

    def __hash__(self) -> int:
        return hash((frozenset(self._sparsities.items()), self._locked, self._groups))

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
        """Return a distribution with one layer changed, and the others of its group.

        Raises
        ------
        DistributionError
            If the layer is unknown or locked, or `sparsity` is outside [0, 1).
        """
        return self.replace({name: sparsity})

    def replace(self, sparsities: Mapping[str, float]) -> Self:
        """Return a distribution with several layers changed, and their groups; refuses like `set`, and then changes none."""
        self._check_names(sparsities)
        sparsities = {
            member: value for name, value in sparsities.items() for member in self.group_of(name)
        } | dict(sparsities)
        held = [
            name
            for name, value in sparsities.items()
            if name in self._locked and value != self._sparsities[name]
        ]
        if held:
            raise DistributionError(
                f"Locked: {', '.join(map(repr, held))}. Unlock a layer before changing its sparsity."
            )
        return self._like({**self._sparsities, **sparsities})

    def _like(
        self,
        sparsities: Mapping[str, float] | None = None,
        *,
        locked: Iterable[str] | None = None,
        groups: Iterable[Iterable[str]] | None = None,
    ) -> Self:
        return type(self)(
            self._sparsities if sparsities is None else sparsities,
            self._locked if locked is None else locked,
            self._groups if groups is None else groups,
        )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that move together, each group and all of them in the layers' order."""
        place = {name: number for number, name in enumerate(self)}
        ordered = [tuple(sorted(group, key=place.__getitem__)) for group in self._groups]
        return tuple(sorted(ordered, key=lambda group: place[group[0]]))

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the layers that move with this one, itself among them."""
        return next((group for group in self.groups if name in group), (name,))

    def link(self, *names: str) -> Self:
        """Return a distribution in which these layers move together from now on, at the sparsity of the first; they leave other groups.

        Raises
        ------
        DistributionError
            If a name is unknown, or a locked layer would change.
        """
        self._check_names(names)
        if len(set(names)) < 2:
            raise DistributionError("A group has at least two layers.")
        freed = self.unlink(*names)
        equal = freed.replace(dict.fromkeys(names, self[names[0]]))
        return type(self)(equal, equal.locked, [*equal.groups, names])

    def unlink(self, *names: str) -> Self:
        """Return a distribution in which these layers move alone; all of them when none is named."""
        self._check_names(names)
        gone = set(names) if names else set(self)
        return self._like(groups=[group - gone for group in self._groups if group - gone])

    def lock(self, *names: str) -> Self:
        """Return a distribution in which these layers are locked as well."""
        self._check_names(names)
        return self._like(locked=self._locked | set(names))

    def unlock(self, *names: str) -> Self:
        """Return a distribution in which these layers are free; all of them when none is named."""
        self._check_names(names)
        return self._like(locked=self._locked - set(names) if names else ())

    # Algebra

    def mix(self, other: Mapping[str, float], share: float) -> Self:
        """Return a distribution between this one and another: ``(1 - share) * self + share * other`` in each layer that is not locked.

        Parameters
        ----------
        other : mapping of str to float
            Of the same layers.
        share : float
            In [0, 1].

        Raises
        ------
        DistributionError
            If the layers differ, `share` is out of range, or layers of a group would differ.
        """
        if not 0.0 <= share <= 1.0:
            raise DistributionError(f"share lies between 0 (this one) and 1 (the other); got {share!r}.")
        if set(other) != set(self):
            raise DistributionError(
                f"Only distributions of the same layers can be mixed; they differ in {sorted(set(other) ^ set(self))}."
            )
        mixed = {
            name: value if name in self._locked else (1.0 - share) * value + share * other[name]
            for name, value in self.items()
        }
        return self._like(mixed)

    def diff(self, other: Mapping[str, float]) -> dict[str, tuple[float | None, float | None]]:
        """Return where the two differ: by layer the sparsity here and there, None where there is no such layer."""
        names = dict.fromkeys([*self, *other])
        pairs = {name: (self._sparsities.get(name), other.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def scale_to(
        self, layers: Iterable[PrunableLayer], *, sparsity: float, max_sparsity: float = _MAX_SPARSITY
    ) -> Self:
        """Return a distribution of this shape with another sparsity in total.

        What remains of each layer is multiplied by one factor. Locked layers, and dense ones, stay as they are; no layer goes beyond `max_sparsity`, and none below 0.
        Zeros are counted, so that the total is never short, and more than asked by less than one weight a layer.

        Parameters
        ----------
        layers : iterable of PrunableLayer
        sparsity : float
            Zeros over all prunable weights, in [0, 1).
        max_sparsity : float

        Raises
        ------
        InfeasibleTarget
            If it cannot be reached so; the message names what can.
        DistributionError
            If a value is out of range, or the layers are not those of the distribution.
        """
        layers = self._matched(layers)
        _checked("all", sparsity)
        total = sum(layer.n_params for layer in layers)
        free = [name for name, value in self.items() if name not in self._locked and value > 0.0]

        def scaled(factor: float) -> dict[str, float]:
            highest = max(max_sparsity, 0.0)
            return self._sparsities | {
                name: min(max(1.0 - factor * (1.0 - self[name]), 0.0), highest) for name in free
            }

        def count(factor: float) -> int:
            return sum(self._like(scaled(factor)).zeros(layers).values())

        wanted = sparsity * total - 1e-9 * total
        left = [1.0 - self[name] for name in free]
        low, high = 0.0, 1.0 / min(left) if left else 1.0
        if count(low) < wanted:
            raise InfeasibleTarget(
                f"A sparsity of {sparsity:.4f} is out of reach: with {len(self) - len(free)} layers locked or dense and at most {max_sparsity:g} elsewhere it is "
                f"{count(low) / total:.4f}. Ask for that, unlock layers, or give dense ones a sparsity."
            )
        if count(high) >= wanted:  # with all free layers dense
            if count(high) > wanted + 1:
                raise InfeasibleTarget(
                    f"A sparsity of {sparsity:.4f} is less than locked layers have: with all others dense it is {count(high) / total:.4f}. Unlock layers."
                )
            return self._like(scaled(high))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if count(middle) >= wanted else (low, middle)
        return self._like(scaled(low))

    # Counts

    def achieved(self, layers: Iterable[PrunableLayer]) -> dict[str, Achieved]:
        """Return what was asked of each layer and what it gets, in exact counts.

        Raises
        ------
        DistributionError
            If the layers are not those of the distribution.
        """
        layers = self._matched(layers)
        zeros = self.zeros(layers)
        return {layer.name: Achieved(self[layer.name], zeros[layer.name], layer.n_params) for layer in layers}

    def total(self, layers: Iterable[PrunableLayer]) -> Achieved:
        """Return the same of all layers together."""
        each = self.achieved(layers).values()
        n_params = sum(one.n_params for one in each)
        return Achieved(
            sum(one.asked * one.n_params for one in each) / n_params,
            sum(one.zeros for one in each),
            n_params,
        )

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
        """Return ``{"sparsity": {name: value}, "locked": [names], "groups": [[names]]}``, fit for JSON and YAML; without groups the last is left out."""
        content: dict[str, Any] = {
            "sparsity": dict(self._sparsities),
            "locked": [name for name in self if name in self._locked],
        }
        return content | ({"groups": [list(group) for group in self.groups]} if self._groups else {})

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
        if not isinstance(content, Mapping):
            raise FormatError(f"A distribution is written as a mapping; got {type(content).__name__}.")
        sparsities, locked = content.get("sparsity"), content.get("locked", ())
        groups = content.get("groups", ())
        unknown = set(content) - {"sparsity", "locked", "groups"}
        lists = [locked, groups, *(groups if isinstance(groups, list | tuple) else ())]
        if (
            not isinstance(sparsities, Mapping)
            or not all(isinstance(one, list | tuple) for one in lists)
            or unknown
        ):
            raise FormatError(
                "A distribution is written as {'sparsity': {layer: fraction}, 'locked': [layers], 'groups': [[layers]]}; "
                f"got entries {sorted(map(str, content))}."
            )
        return cls(sparsities, locked, groups)

    def to_json(self) -> str:
        """Return the distribution as JSON; `from_json` gives an equal one."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` gave.

        Raises
        ------
        FormatError
            If the text is no such JSON.
        DistributionError
            As `from_dict`.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise FormatError(f"This is not JSON: {error}.") from error

    def to_yaml(self) -> str:
        """Return the distribution as YAML, for people to edit; `from_yaml` gives an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read what `to_yaml` gave.

        Raises
        ------
        FormatError
            If the text is no such YAML.
        DistributionError
            As `from_dict`.
        """
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise FormatError(f"This is not YAML: {' '.join(str(error).split())}.") from error

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
