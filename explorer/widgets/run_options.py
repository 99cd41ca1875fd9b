"""What the page lets one set for a run: checked as it was typed, and as the settings that a run is made with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from explorer.errors import RunError
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_EVALUATIONS = 12
"""Most evaluations of a run: enough to see a curve, few enough to leave the time to training."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the page lets one set for a run. None leaves the default of the pruning room."""

    epochs: float = 5
    learning_rate: float | None = None
    stabilise: float = 0.1
    ramp: float = 0.4
    update_every: int | None = None
    seed: int = 0


_OPTION_LIMITS: dict[str, tuple[float, float, bool, str, str]] = {
    "epochs": (0.1, 1000, False, phrase("refusal.option.epochs"), phrase("refusal.option.epochs_accepted")),
    "learning_rate": (
        1e-6,
        10,
        False,
        phrase("refusal.option.learning_rate"),
        phrase("refusal.option.learning_rate_accepted"),
    ),
    "stabilise": (
        0,
        0.9,
        False,
        phrase("refusal.option.stabilise"),
        phrase("refusal.option.stabilise_accepted"),
    ),
    "ramp": (0, 1, False, phrase("refusal.option.ramp"), phrase("refusal.option.ramp_accepted")),
    "update_every": (
        1,
        100_000,
        True,
        phrase("refusal.option.update_every"),
        phrase("refusal.option.update_every_accepted"),
    ),
    "seed": (0, 2**31 - 1, True, phrase("refusal.option.seed"), phrase("refusal.option.seed_accepted")),
}


def checked_options(given: Mapping[str, Any]) -> RunOptions:
    """Return the options in `given`, texts as they were typed.

    Raises
    ------
    RunError
        If a setting is not known, is no number or is out of its range; the message says what is accepted.
    """
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in _OPTION_LIMITS:
            raise RunError(
                phrase("refusal.option.unknown", option=repr(name), options=", ".join(_OPTION_LIMITS))
            )
        if text is None or str(text).strip() == "":
            continue
        low, high, whole, shown, accepted = _OPTION_LIMITS[name]
        try:
            number = float(str(text).strip().replace(",", "."))
        except ValueError:
            number = math.nan
        if not (low <= number <= high) or (whole and number != int(number)):
            raise RunError(phrase("refusal.option.wrong", option=shown, given=text, accepted=accepted))
        values[name] = int(number) if whole else number
    options = RunOptions(**values)
    if options.stabilise + options.ramp > 1:
        raise RunError(
            phrase("refusal.option.shares", stabilise=f"{options.stabilise:g}", ramp=f"{options.ramp:g}")
        )
    return options


def options_of(settings: Any) -> RunOptions:
    """Return what the page shows of the `RunSettings` of a run that was made elsewhere."""
    return RunOptions(
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(RunOptions)}
    )


def run_settings(study: Any, options: RunOptions) -> dict[str, Any]:
    """Return the settings that a run on the page is made with."""
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    return chosen | {"evaluate_every": _evaluate_every(study, options.epochs)}


def _evaluate_every(study: Any, epochs: float) -> int:
    """Return after how many steps to evaluate, so that a run of a few epochs shows two points an epoch, and a long one a dozen."""
    from explorer.pruning import RunSettings

    steps = epochs * len(study.data.train) / RunSettings().batch_size
    return max(5, round(steps / min(MAX_EVALUATIONS, max(3, 2 * epochs))))
