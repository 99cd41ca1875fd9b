"""How sparsity grows and the learning rate falls during a run, as pure functions of the step.

Removing weights a few at a time lets the rest of the network take over their work. The cubic schedule removes many while there
are plenty and few when each one counts. Invariant: the first value is exactly `initial`, the last exactly `final`, and nothing in
between leaves the interval that they span.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from explorer.errors import RunError


@dataclass(frozen=True, slots=True)
class CubicSchedule:
    """Cubic growth of sparsity, equation 1 of Zhu and Gupta, "To prune, or not to prune" (2017).

    With `t` the step, the sparsity is `final + (initial - final) * (1 - (t - begin_step) / (end_step - begin_step)) ** 3`.

    Parameters
    ----------
    initial, final : float
        Sparsity before and after, fractions in [0, 1).
    begin_step, end_step : int
        First and last step at which sparsity changes, `0 <= begin_step <= end_step`. When they are equal, everything is removed at
        that one step (one-shot pruning).
    update_every : int
        Steps from one change of the masks to the next, at least 1.

    Raises
    ------
    RunError
        If a value is out of its range.

    Examples
    --------
    >>> schedule = CubicSchedule(initial=0.0, final=0.5, begin_step=0, end_step=100, update_every=10)
    >>> schedule.sparsity_at(50)
    0.4375
    >>> [step for step in range(200) if schedule.is_update(step)][-2:]
    [90, 100]
    """

    initial: float
    final: float
    begin_step: int
    end_step: int
    update_every: int

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.0 <= value < 1.0):
                raise RunError(
                    f"{name} sparsity {value} is out of range; give a fraction of at least 0 and below 1."
                )
        if not 0 <= self.begin_step <= self.end_step:
            raise RunError(
                f"A schedule from step {self.begin_step} to step {self.end_step} runs backwards; "
                "give 0 <= begin_step <= end_step."
            )
        if self.update_every < 1:
            raise RunError(
                f"update_every is {self.update_every}; give the number of steps between two mask updates, at least 1."
            )

    def sparsity_at(self, step: int) -> float:
        """Return the sparsity that is due at `step`, a fraction in [0, 1)."""
        # The end is tested first, so that a schedule of no length is already finished when it begins.
        if step >= self.end_step:
            return self.final
        if step <= self.begin_step:
            return self.initial
        left = 1.0 - (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.final + (self.initial - self.final) * left**3

    def is_update(self, step: int) -> bool:
        """Return whether masks are selected anew at `step`: every `update_every` steps, and always at the end."""
        if not self.begin_step <= step <= self.end_step:
            return False
        return step == self.end_step or (step - self.begin_step) % self.update_every == 0


def learning_rate_at(peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of the step after `step` finished ones: from `peak` to 0 along a half cosine.

    Parameters
    ----------
    peak : float
        Learning rate of the first step, above 0.
    step : int
        Finished steps, in [0, total_steps].
    total_steps : int
        Steps of the whole run, at least 1.

    Examples
    --------
    >>> [round(learning_rate_at(0.1, step, 4), 4) for step in range(5)]
    [0.1, 0.0854, 0.05, 0.0146, 0.0]
    """
    return peak * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
