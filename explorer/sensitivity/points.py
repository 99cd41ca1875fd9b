"""The value that flows out of every measurement: one number for one layer at one sparsity.

Points arrive one by one, so that a chart can grow while the scan runs; `explorer.sensitivity.table` collects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from explorer.errors import DistributionError

Kind = Literal["kl", "loss", "accuracy", "removed_energy", "fisher", "latency_ms"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Eight levels are enough for the solver; most of them sit where curves bend.
DEFAULT_LEVELS: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)

# Latency points that belong to no layer carry this name: the median of the whole network.
WHOLE_NETWORK = ""

# At this sparsity layers differ most in how much they mind, so it makes the first picture.
_FIRST_LEVEL = 0.9


@dataclass(frozen=True, slots=True)
class SensitivityPoint:
    """One measured value.

    Attributes
    ----------
    layer : str
        Dotted module name; with kind "latency_ms", "" is the whole network.
    sparsity : float
        Sparsity asked of the layer, in [0, 1).
    kind : str
        "kl": mean over images of the Kullback-Leibler divergence of the pruned network's softmax output from the dense one's,
        in nats; it needs no labels (Cai, Yao, Dong, Gholami, Mahoney and Keutzer, "ZeroQ" (2020), section 3.2, measure layers so). "loss": criterion on labels, and
        "accuracy": share of right answers (Li, Kadav, Durdanovic, Samet and Graf, "Pruning filters for efficient ConvNets" (2017), section 3.2, prune one layer at
        a time and test). "removed_energy": removed share of the layer's squared weights, what magnitude pruning takes (Han, Pool, Tran and Dally, "Learning both weights
        and connections" (2015)). "fisher": second-order estimate of the increase of the loss, in nats (see `explorer.sensitivity.second_order`). "latency_ms": median
        milliseconds.
    value : float
    refreshed : bool
        BatchNorm statistics were estimated anew after pruning.
    std_error : float or None
        Standard error of `value` over images (losses) or spread over repeats (latency).
    n_removed : int or None
        How many non-zero weights this sparsity removed. Zero at a positive sparsity means that the layer was already that
        sparse: the value then says nothing about how much the layer minds.
    low, high : float or None
        Where the value lies in 95 of 100 draws of other images, see `explorer.sensitivity.estimates`.
    """

    layer: str
    sparsity: float
    kind: str
    value: float
    refreshed: bool = False
    std_error: float | None = None
    n_removed: int | None = None
    low: float | None = None
    high: float | None = None


class CellCounter:
    """Counts the cells of a scan as their points arrive, for a progress bar that ends at `explorer.study.Study.n_sensitivity_cells`.

    A cell gives points of several kinds, and losses come again from more images: it counts once. Each pass of a latency counts.
    """

    def __init__(self) -> None:
        self.done = 0
        self._seen: set[tuple[str, float, bool]] = set()

    def add(self, point: SensitivityPoint) -> bool:
        """Note a point; tell whether it brought the scan further."""
        cell = (point.layer, point.sparsity, point.refreshed)
        if point.kind != "latency_ms":
            if cell in self._seen:
                return False
            self._seen.add(cell)
        self.done += 1
        return True


def check_levels(levels: Iterable[float]) -> tuple[float, ...]:
    """Return the distinct positive levels in ascending order.

    Level 0 is always measured, as the baseline, and need not be given.

    Raises
    ------
    DistributionError
        If a level is outside [0, 1) or nothing remains.
    """
    given = [float(level) for level in levels]
    wrong = [level for level in given if not 0.0 <= level < 1.0]
    if wrong:
        raise DistributionError(
            f"Sparsity levels are fractions of zeros, in [0, 1); got {wrong}. Write 90 % as 0.9; 1 would remove the layer."
        )
    positive = tuple(sorted({level for level in given if level > 0.0}))
    if not positive:
        raise DistributionError(
            f"At least one sparsity level above 0 is needed; got {given}. The default is {DEFAULT_LEVELS}."
        )
    return positive


def level_order(levels: Sequence[float]) -> tuple[float, ...]:
    """Order levels so that a picture made of the first few is useful.

    The level nearest to 0.9 comes first, then the lowest and the highest, then always the middle of the widest gap.

    Parameters
    ----------
    levels : sequence of float
        Ascending and distinct.

    Examples
    --------
    >>> level_order(DEFAULT_LEVELS)
    (0.9, 0.5, 0.99, 0.97, 0.7, 0.8, 0.95, 0.98)
    """
    left = list(levels)
    if not left:
        return ()
    order = [min(left, key=lambda level: abs(level - _FIRST_LEVEL))]
    left.remove(order[0])
    for end in (min, max):
        if left:
            order.append(end(left))
            left.remove(order[-1])
    index = {level: i for i, level in enumerate(levels)}
    while left:
        # The distance is counted in levels, not in sparsity: levels are dense where curves bend.
        chosen = max(left, key=lambda level: min(abs(index[level] - index[done]) for done in order))
        order.append(chosen)
        left.remove(chosen)
    return tuple(order)
