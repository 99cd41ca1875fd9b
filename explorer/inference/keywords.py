"""Arguments by name: a network is captured, and called, with positional ones, which is what forward's signature makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from explorer.errors import EngineError


class Keywords:
    """Knows the names of a module's arguments.

    Parameters
    ----------
    module : nn.Module
    """

    def __init__(self, module: nn.Module) -> None:
        self._name = type(module).__name__
        try:
            self._signature: inspect.Signature | None = inspect.signature(module.forward)
        except (TypeError, ValueError):  # as of some that are written in C
            self._signature = None
        self._count = 0

    def positional(self, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments as positional ones, with defaults in between, and at the end as many as the network was compiled with.

        Parameters
        ----------
        given : tuple
        named : mapping

        Raises
        ------
        EngineError
            When forward would not take them, or takes one of them by name only.
        """
        if self._signature is None:
            raise EngineError(
                f"The forward of {self._name} does not tell the names of its arguments; pass them by position."
            )
        try:
            bound = self._signature.bind(*given, **named)
        except TypeError as error:
            raise EngineError(f"{self._name} cannot be called so: {error}.") from None
        mine = dict(bound.arguments)
        bound.apply_defaults()
        by_name_only = [name for name in bound.kwargs if name in named]
        if by_name_only:
            raise EngineError(
                f"{self._name} takes {', '.join(map(repr, by_name_only))} by name only, and a compiled network is called with positional arguments. Wrap it in a "
                "module whose forward(self, ...) has them as ordinary parameters."
            )
        # Of a parameter like *args each value counts, of any other the last that was given.
        last = max((i for i, name in enumerate(bound.arguments, 1) if name in mine), default=0)
        return bound.args[: max(last, len(given), self._count)]

    def compiled_with(self, arguments: tuple[Any, ...]) -> None:
        """Have as many from now on, where the last ones have defaults."""
        self._count = len(arguments)
