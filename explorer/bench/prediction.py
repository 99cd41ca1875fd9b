"""Predicted against measured speed-up: how far the sum of the layers' measured times is from the time of the pruned network.

The tables are measured as the app measures them. Then networks are pruned by distributions that the tables have never seen (drawn at random,
uniform, solved), and each is timed in turn with the dense baseline. Speed-ups are compared, not milliseconds: a machine that changes its speed
between the scan and the check changes both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from explorer.errors import InfeasibleTarget
from explorer.study import Study

_TURNS = 3


@dataclass(frozen=True, slots=True)
class PredictionCheck:
    """One distribution.

    Attributes
    ----------
    name : str
        "random 1", "uniform 0.80", "solved 3.0", ...
    sparsity : float
        Zeros over all prunable weights, in [0, 1).
    predicted, measured : float
        Speed-up over the fastest dense contestant.
    """

    name: str
    sparsity: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1.0


def distributions(
    study: Study, *, n_random: int, seed: int, uniform: Sequence[float], solved: Sequence[float]
) -> dict[str, Mapping[str, float]]:
    """The distributions to check.

    Parameters
    ----------
    study : Study
        With measured sensitivity.
    n_random : int
        How many are drawn: each layer's sparsity evenly from [0, 0.98].
    seed : int
    uniform : sequence of float
        Sparsities in [0, 1).
    solved : sequence of float
        Speed-ups that are solved for from the tables alone, without measuring what was found; those out of reach are left out.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, Mapping[str, float]] = {}
    for i in range(n_random):
        drawn = generator.uniform(0.0, 0.98, len(study.layers))
        found[f"random {i + 1}"] = {
            layer.name: round(float(s), 3) for layer, s in zip(study.layers, drawn, strict=True)
        }
    for sparsity in uniform:
        found[f"uniform {sparsity:.2f}"] = study.uniform(sparsity)
    for speedup in solved:
        try:
            found[f"solved {speedup:.1f}"] = study.solve(speedup=speedup, check=False)
        except InfeasibleTarget:
            continue
    return found


def check_predictions(
    study: Study,
    *,
    n_random: int = 10,
    seed: int = 0,
    uniform: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    solved: Sequence[float] = (1.5, 2.0, 2.5, 3.0, 4.0),
    n_images: int = 100,
) -> Iterator[PredictionCheck]:
    """Measure the tables, then predict and measure one distribution after the other.

    Parameters
    ----------
    study : Study
        With data.
    n_random, seed, uniform, solved
        See `distributions`.
    n_images : int
        Validation images for the loss, which only the solved distributions depend on.

    Raises
    ------
    DataError
        If the study has no data.
    """
    # Of this moment: what is compared with it is measured now.
    study.measure_sensitivity(n_images=n_images, refresh_batchnorm=False, resume=False)
    chosen = distributions(study, n_random=n_random, seed=seed, uniform=uniform, solved=solved)
    for name, distribution in chosen.items():
        predicted = study.predict(distribution)
        assert predicted.speedup is not None
        turns = [study.pruned_latency(distribution) for _ in range(_TURNS)]
        measured = median(turn.dense_ms / turn.latency_ms for turn in turns)
        yield PredictionCheck(name, predicted.sparsity, predicted.speedup, measured)


def table(checks: Sequence[PredictionCheck]) -> str:
    """Lay the checks out as text, one line each, with the median and the largest error at the end."""
    lines = [f"{'distribution':<14} {'sparsity':>8} {'predicted':>10} {'measured':>9} {'error':>7}"]
    lines += [
        f"{c.name:<14} {c.sparsity:>8.2f} {c.predicted:>9.2f}x {c.measured:>8.2f}x {c.error:>+7.1%}"
        for c in checks
    ]
    errors = [abs(c.error) for c in checks]
    within = sum(error <= 0.15 for error in errors)
    lines.append(
        f"error: median {median(errors):.1%}, largest {max(errors):.1%}; {within} of {len(errors)} within 15%"
    )
    return "\n".join(lines)
