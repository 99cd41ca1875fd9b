"""A file that says how sparse each layer shall be, whichever kind it is: a recipe or a distribution, as YAML or as JSON.

Whoever hands one over need not know which it is. It comes from anywhere, so nothing in it is trusted, and what is wrong is said with its line or its layer.
"""

from __future__ import annotations

import json
from typing import Any

from explorer.distribution import SparsityDistribution
from explorer.errors import DistributionError, FormatError
from explorer.formats.recipe import Recipe, parse_yaml

__all__ = ["read_distribution"]


def read_distribution(text: str) -> tuple[SparsityDistribution, Recipe | None]:
    """Read a recipe, or what `SparsityDistribution.to_yaml` or `to_json` wrote.

    Parameters
    ----------
    text : str

    Returns
    -------
    SparsityDistribution
    Recipe or None
        None when the text is a distribution alone.

    Raises
    ------
    FormatError
        If it is neither; the message names the line, the layer or the entry, and says what is expected.
    """
    if not text.strip("\ufeff \t\r\n"):
        raise FormatError("The file is empty; choose a recipe.yaml, or a distribution as YAML or JSON.")
    if "\0" in text or "\ufffd" in text:
        raise FormatError("The file is not text; choose a recipe.yaml, or a distribution as YAML or JSON.")
    document = _parsed(text.lstrip("\ufeff"))
    if isinstance(document, dict) and "recipe" in document:
        recipe = Recipe.from_document(document)
        return SparsityDistribution(recipe.distribution, recipe.locked, recipe.groups), recipe
    if not isinstance(document, dict) or "sparsity" not in document:
        held = (
            f"It holds {_some(document)}." if isinstance(document, dict) else "It holds no names with values."
        )
        raise FormatError(
            f"This is neither a recipe nor a distribution. {held} A recipe begins with 'recipe: sparsity-explorer', "
            "a distribution with 'sparsity:' and one line 'layer: fraction' for each layer."
        )
    try:
        return SparsityDistribution.from_dict(_named(document)), None
    except (DistributionError, TypeError) as error:
        raise FormatError(f"The distribution cannot be used: {error}") from error


def _named(document: dict[Any, Any]) -> dict[Any, Any]:
    """Return a distribution's document with names as texts: YAML reads the layer `0` of a sequence as a number."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return [text(one) for one in value]
        return str(value) if isinstance(value, int) else value

    found = {key: text(value) for key, value in document.items()}
    sparsities = document["sparsity"]
    if isinstance(sparsities, dict):
        found["sparsity"] = {str(name): value for name, value in sparsities.items()}
    return found


def _parsed(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return parse_yaml(text)
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise FormatError(f"This is not JSON: {error}.") from error
    except RecursionError as error:
        raise FormatError("This JSON is nested too deeply to be a distribution.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{twice!r} is written twice; keep one of the two.")
    return found


def _no_constant(word: str) -> float:
    raise FormatError(f"{word} is no number; give a fraction of at least 0 and below 1.")


def _some(document: dict[Any, Any]) -> str:
    names = [str(name)[:40] for name in document]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"
