"""What to do to which model, as a file a person can read, change and run again.

The distribution is written out layer by layer, so a recipe needs no sensitivity measurement and means the same on every machine.
Invariant: reading what was written gives an equal recipe. Nothing in a recipe is executed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from explorer.atomic import write_atomically
from explorer.distribution import SparsityDistribution
from explorer.errors import DistributionError, ExplorerError, FormatError
from explorer.pruning.settings import RunSettings

_VERSION = 1
# The fields of `RunSettings` by the section of the file that they stand in.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "schedule": ("epochs", "stabilise", "ramp", "update_every"),
    "optimiser": (
        "learning_rate",
        "momentum",
        "weight_decay",
        "batch_size",
        "distillation",
        "temperature",
        "threads",
        "precision",
    ),
    "evaluation": ("evaluate_every", "n_validation"),
}
_WHOLE_NUMBERS = ("update_every", "batch_size", "threads", "evaluate_every", "n_validation")
_OPTIONAL = ("threads", "evaluate_every", "n_validation")
_TARGETS = ("speedup", "latency_ms", "sparsity", "params", "size_bytes", "max_loss")


@dataclass(frozen=True)
class Recipe:
    """A pruning run that can be repeated.

    Parameters
    ----------
    model, data : str
        What `load_model` and `load_data` are given, for instance "demo:fashion-resnet" and "demo:fashion".
    distribution : mapping of str to float
        Final sparsity by layer, fractions in [0, 1).
    locked : tuple of str
        Layers whose sparsity a person fixed.
    groups : tuple of tuple of str
        Layers that move together; those of a group have the same sparsity.
    target : mapping of str to float, optional
        What the distribution was solved for, one of speedup, latency_ms, sparsity; said for the reader, not solved again.
    settings : RunSettings
        Method, schedule, optimiser and seed.
    threads, batch_size : int
        What latency is measured with.
    weights : mapping of str to str, optional
        "file" and "sha256" of the weights that the run began with; None for those that the model comes with.

    Raises
    ------
    FormatError
        If a sparsity is out of range, a locked layer is not in the distribution, or the target is unknown.
    """

    model: str
    data: str
    distribution: Mapping[str, float]
    locked: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    target: Mapping[str, float] | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    threads: int = 1
    batch_size: int = 1
    weights: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name, sparsity in self.distribution.items():
            if not 0.0 <= sparsity < 1.0:
                raise FormatError(
                    f"Layer {name!r} has sparsity {sparsity}; give a fraction of at least 0 and below 1."
                )
        for name in self.locked:
            if name not in self.distribution:
                raise FormatError(
                    f"Layer {name!r} is locked but has no sparsity; add it to the distribution."
                )
        try:
            SparsityDistribution(self.distribution, self.locked, self.groups)
        except DistributionError as error:
            raise FormatError(f"The groups cannot be used: {error}") from error
        if self.target is not None and (len(self.target) != 1 or next(iter(self.target)) not in _TARGETS):
            raise FormatError(
                f"The target is {dict(self.target)}; give exactly one of {', '.join(_TARGETS)}."
            )
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise FormatError(f"latency {name} is {getattr(self, name)}; give at least 1.")

    def to_yaml(self) -> str:
        """Return the text of the file."""
        settings = dataclasses.asdict(self.settings)
        document: dict[str, Any] = {
            "recipe": "sparsity-explorer",
            "version": _VERSION,
            "model": self.model,
            "data": self.data,
            "target": dict(self.target) if self.target else None,
            "latency": {"threads": self.threads, "batch_size": self.batch_size},
            "method": self.settings.method,
            "seed": self.settings.seed,
        }
        if self.weights is not None:
            document["weights"] = dict(self.weights)
        for section, names in _SECTIONS.items():
            document[section] = {name: settings[name] for name in names}
        document["distribution"] = {
            name: {"sparsity": float(sparsity)} | ({"locked": True} if name in self.locked else {})
            for name, sparsity in self.distribution.items()
        }
        if self.groups:
            document["groups"] = [list(group) for group in self.groups]
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Return the recipe that `text` describes. Schedule, optimiser, evaluation, latency, target and seed have defaults.

        Raises
        ------
        FormatError
            If the text is no YAML, is no recipe, or holds a key or value that is not known.
        """
        return cls.from_document(parse_yaml(text))

    @classmethod
    def from_document(cls, content: Any) -> Recipe:
        """Return the recipe in a document that was parsed already, see `from_yaml`.

        Raises
        ------
        FormatError
            As `from_yaml`.
        """
        document = _mapping(content, "the recipe")
        if document.get("recipe") != "sparsity-explorer":
            raise FormatError("This is not a recipe: it does not begin with 'recipe: sparsity-explorer'.")
        if document.get("version") != _VERSION:
            raise FormatError(
                f"The recipe has version {document.get('version')!r}; this program reads version {_VERSION}."
            )
        known = {
            "recipe",
            "version",
            "model",
            "data",
            "target",
            "latency",
            "method",
            "seed",
            "distribution",
            "groups",
            "weights",
            *_SECTIONS,
        }
        _refuse_unknown(document, known, "the recipe")
        values: dict[str, Any] = {}
        for section, names in _SECTIONS.items():
            entries = _mapping(document.get(section, {}), section)
            _refuse_unknown(entries, set(names), section)
            for name, value in entries.items():
                if name == "precision":
                    values[name] = _text(entries, name)
                    continue
                values[name] = _number(
                    value, f"{section}.{name}", whole=name in _WHOLE_NUMBERS, optional=name in _OPTIONAL
                )
        if "method" in document:
            values["method"] = _text(document, "method")
        if "seed" in document:
            values["seed"] = _number(document["seed"], "seed", whole=True)
        distribution: dict[str, float] = {}
        locked: list[str] = []
        for name, entry in _mapping(document.get("distribution"), "distribution").items():
            layer = _mapping(entry, f"distribution of layer {name!r}")
            _refuse_unknown(layer, {"sparsity", "locked"}, f"layer {name!r}")
            distribution[str(name)] = float(
                _number(layer.get("sparsity"), f"sparsity of layer {name!r}") or 0.0
            )
            fixed = layer.get("locked", False)
            if not isinstance(fixed, bool):
                raise FormatError(f"locked of layer {name!r} is {fixed!r}; write true or false.")
            if fixed:
                locked.append(str(name))
        groups = document.get("groups", [])
        if not isinstance(groups, list) or not all(
            isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
        ):
            raise FormatError(f"groups is {groups!r}; give a list of lists of layer names.")
        weights = document.get("weights")
        if weights is not None:
            weights = _mapping(weights, "weights")
            _refuse_unknown(weights, {"file", "sha256"}, "weights")
            weights = {name: _text(weights, name) for name in ("file", "sha256")}
        latency = _mapping(document.get("latency", {}), "latency")
        _refuse_unknown(latency, {"threads", "batch_size"}, "latency")
        target = document.get("target")
        if target is not None:
            target = {
                str(name): _number(value, f"target {name}")
                for name, value in _mapping(target, "target").items()
            }
        try:
            return cls(
                model=_text(document, "model"),
                data=_text(document, "data"),
                distribution=distribution,
                locked=tuple(locked),
                groups=tuple(map(tuple, groups)),
                target=target,
                settings=RunSettings(**values),
                weights=weights,
                **{
                    name: int(_number(value, f"latency.{name}", whole=True) or 0)
                    for name, value in latency.items()
                },
            )
        except FormatError:
            raise
        except ExplorerError as error:
            raise FormatError(f"The recipe cannot be used: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to `path`.

        Raises
        ------
        FormatError
            If the file cannot be written.
        """
        write_atomically(path, self.to_yaml().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from `path`.

        Raises
        ------
        FormatError
            If there is no such file, or it is not a recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"Cannot read the recipe {path}: {error}.") from error
        try:
            return cls.from_yaml(text)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, where YAML's own loader silently keeps the last one, and aliases, by which a few lines can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name) stands here; write its values out", self._mark()
            )
        return super().compose_node(parent, index)

    def _mark(self) -> Any:
        return self.peek_event().start_mark  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds: mappings, lists, texts and numbers, nothing that is executed.

    Raises
    ------
    FormatError
        If it is no YAML, a key is written twice, or it has aliases; the message names the line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FormatError(f"This is not YAML: {' '.join(str(error).split())}") from error


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {value!r}; names with values are expected.")
    return value


def _refuse_unknown(entries: Mapping[Any, Any], known: set[str], where: str) -> None:
    unknown = [str(name) for name in entries if name not in known]
    if unknown:
        raise FormatError(
            f"{where} holds {', '.join(unknown)}, which is not known; known are {', '.join(sorted(known))}."
        )


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise FormatError(f"{name} is {value!r}; give it as text.")
    return value


def _number(value: Any, where: str, *, whole: bool = False, optional: bool = False) -> float | int | None:
    if value is None and optional:
        return None
    if isinstance(value, str):
        # YAML reads 1e-4 as text, where everybody means a number.
        try:
            value = float(value)
        except ValueError:
            raise FormatError(f"{where} is {value!r}; give a number.") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{where} is {value!r}; give a number.")
    if not math.isfinite(value):
        raise FormatError(f"{where} is {value}; give a finite number.")
    if whole and value != int(value):
        raise FormatError(f"{where} is {value}; give a whole number.")
    return int(value) if whole else value
