"""Pruning methods by name: one file each, one interface.

A method decides which weights are kept at a step. Data, optimiser, masks and events are the run's business, so that methods can be
compared with everything else equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from explorer.errors import RunError
from explorer.pruning.events import Phase
from explorer.pruning.methods.gmp import GradualMagnitudePruning
from explorer.pruning.settings import RunSettings


class Method(Protocol):
    """What a run asks of a pruning method. Steps are counted from 0; a question is put before the step is made."""

    def phase(self, step: int) -> Phase:
        """Return what the step at `step` is for."""
        ...

    def select(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return new masks (bool, true where kept) of the layers in `weights`, or None to keep those in force."""
        ...


MethodFactory = Callable[[Mapping[str, float], Mapping[str, float], int, RunSettings], Method]

METHODS: dict[str, MethodFactory] = {"gmp": GradualMagnitudePruning}


def make_method(
    initial: Mapping[str, float], final: Mapping[str, float], total_steps: int, settings: RunSettings
) -> Method:
    """Return the method that `settings` names, for a run of `total_steps` steps.

    Parameters
    ----------
    initial, final : mapping of str to float
        Sparsity by layer at the beginning and at the end, fractions in [0, 1).
    total_steps : int
        Optimiser steps of the whole run, at least 1.
    settings : RunSettings
        Name of the method, shares of the run and update frequency.

    Raises
    ------
    RunError
        If there is no method of that name.
    """
    if settings.method not in METHODS:
        raise RunError(
            f"There is no pruning method {settings.method!r}; choose one of {', '.join(sorted(METHODS))}."
        )
    return METHODS[settings.method](initial, final, total_steps, settings)
