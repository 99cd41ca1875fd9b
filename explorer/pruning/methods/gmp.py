"""Gradual magnitude pruning: stabilise, remove the smallest weights on a cubic schedule, fine-tune.

Zhu and Gupta, "To prune, or not to prune" (2017). Removed weights are zero, so they have the smallest magnitude at the next update
and stay removed: the masks of one run are nested.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from explorer.masks import magnitude_mask
from explorer.pruning.events import Phase
from explorer.pruning.schedule import CubicSchedule
from explorer.pruning.settings import RunSettings


class GradualMagnitudePruning:
    """One cubic schedule per layer, all with the same begin, end and update frequency.

    Parameters
    ----------
    initial, final : mapping of str to float
        Sparsity by layer at the beginning and at the end, fractions in [0, 1).
    total_steps : int
        Optimiser steps of the whole run, at least 1.
    settings : RunSettings
        `stabilise`, `ramp` and `update_every` are read.
    """

    def __init__(
        self,
        initial: Mapping[str, float],
        final: Mapping[str, float],
        total_steps: int,
        settings: RunSettings,
    ) -> None:
        # At least one step follows the last mask: it trains what is left and brings batch norm statistics up to date.
        last = total_steps - 1
        self._begin = min(round(settings.stabilise * total_steps), last)
        self._end = min(round((settings.stabilise + settings.ramp) * total_steps), last)
        self.schedules = {
            name: CubicSchedule(initial[name], final[name], self._begin, self._end, settings.update_every)
            for name in final
        }

    def phase(self, step: int) -> Phase:
        """Return "stabilise" before the first update, "prune" up to the last one, then "fine-tune"."""
        if step < self._begin:
            return "stabilise"
        return "prune" if step <= self._end else "fine-tune"

    def select(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the masks by magnitude at the sparsity that is due, or None between two updates."""
        due = {name: schedule for name, schedule in self.schedules.items() if schedule.is_update(step)}
        if not due:
            return None
        return {
            name: magnitude_mask(weights[name], schedule.sparsity_at(step)) for name, schedule in due.items()
        }
