"""Models and data that the page offers: the bundled demo, published networks, and studies of whoever runs the app.

A study of one's own is a function, named as ``LABEL=MODULE:FUNCTION``, that takes nothing and returns a `Study`, or a model with its data. It runs in the
kernel of each user who chooses it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from explorer.errors import ExplorerError
from explorer.widgets.texts import phrase

STUDIES_VARIABLE = "SPARSITY_EXPLORER_STUDIES"
"""Names the studies of the server for the kernels of the app, see `sparsity-explorer app --study`."""

_REPLAY, _OWN = "replay:", "python:"
_NAMED = re.compile(r"(?P<label>[^=]+)=\s*(?P<module>[\w.]+):(?P<function>\w+)")


@dataclass(frozen=True, slots=True)
class Choice:
    """A model and data that the page offers.

    `model` and `data` are sources for `load_model` and `load_data`; without data, "replay:NAME" is `explorer.Study.replay`, and "python:MODULE:FUNCTION" a
    function that returns a study.
    """

    label: str
    model: str
    data: str


DEMO_CHOICES = (
    Choice(phrase("choice.fashion_bundled"), "demo:fashion-resnet", "demo:fashion"),
    Choice(phrase("choice.fashion_all"), "demo:fashion-resnet", "fashion-mnist"),
    Choice(phrase("choice.resnet50"), "replay:resnet50-imagenet", ""),
    Choice(phrase("choice.mobilenet"), "replay:mobilenet-imagenet", ""),
)


def offered_choices(environment: Mapping[str, str] = os.environ) -> tuple[Choice, ...]:
    """Return what the app offers: the server's own studies first, then `DEMO_CHOICES`."""
    named = json.loads(environment.get(STUDIES_VARIABLE) or "[]")
    return (*(_own_choice(one) for one in named), *DEMO_CHOICES)


def studies_environment(named: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the variables by which kernels find studies that are named on the command line, in `folder` or installed.

    Parameters
    ----------
    named : sequence of str
        Each ``LABEL=MODULE:FUNCTION``.
    folder : path
        Where modules are looked for first, besides where Python always looks.

    Raises
    ------
    ExplorerError
        If one is not of that form, or there is no such module.
    """
    if not named:
        return {}
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    for one in named:
        module = _own_choice(one).model.split(":")[1]
        if not _is_there(module, folder):
            raise ExplorerError(
                f"There is no module {module} in {folder} or among the installed ones; start the app in the folder that has it, or install it."
            )
    return {STUDIES_VARIABLE: json.dumps(list(named)), "PYTHONPATH": path}


def _is_there(module: str, folder: Path) -> bool:
    sys.path.insert(0, str(folder))
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove(str(folder))


def _own_choice(named: str) -> Choice:
    found = _NAMED.fullmatch(named)
    if found is None:
        raise ExplorerError(
            f"{named!r} names no study; write LABEL=MODULE:FUNCTION, for instance 'Our network=our_models:study'."
        )
    return Choice(found["label"].strip(), f"{_OWN}{found['module']}:{found['function']}", "")


def open_study(choice: Choice) -> Any:
    """Load the model and data of a choice. In a function of its own because it imports torch, which takes seconds.

    Raises
    ------
    ExplorerError
        If model or data cannot be loaded, or a function of the server returns no study.
    """
    import explorer

    if choice.model.startswith(_REPLAY):
        return explorer.Study.replay(choice.model.removeprefix(_REPLAY))
    if choice.model.startswith(_OWN):
        return _call(choice.model.removeprefix(_OWN))
    return explorer.Study(explorer.load_model(choice.model), explorer.load_data(choice.data))


def _call(where: str) -> Any:
    """Return the study that a function makes."""
    import explorer

    module, _, name = where.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ExplorerError(phrase("refusal.own.no_function", module=module, name=name))
    made = function()
    if isinstance(made, explorer.Study):
        return made
    if isinstance(made, tuple) and len(made) == 2:
        return explorer.Study(*made)
    raise ExplorerError(phrase("refusal.own.no_study", module=module, name=name, kind=type(made).__name__))
