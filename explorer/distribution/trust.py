"""Can single-layer curves be trusted here? What they add up to for a distribution, beside what pruning all its layers at once gives.

Curves of single layers cannot know how layers hurt one another. Adding them up ranks distributions well, yet may be off by a factor; this says by which, for the
distribution on screen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from explorer.distribution.prediction import Prediction
from explorer.errors import DistributionError
from explorer.sensitivity import JointLoss

__all__ = ["Trust", "trust"]

_FACTOR = 2.0
"""Predicted and measured change within this factor of one another count as agreeing: scores are roots of it, and differ by less."""
_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Trust:
    """A prediction of the one-shot change beside its measurement.

    Attributes
    ----------
    kind : str
        "kl" or "loss".
    predicted, measured : float
        Increase over the dense network, in nats.
    std_error : float or None
        Of `measured`, over images.
    verdict : {"agrees", "worse", "better"}
        "worse": the layers together do more harm than their curves say.
    """

    kind: str
    predicted: float
    measured: float
    std_error: float | None
    verdict: str

    @property
    def ratio(self) -> float:
        """`measured` / `predicted`; infinite when nothing was predicted and something measured, and 1 when neither."""
        if self.predicted > 0:
            return self.measured / self.predicted
        return math.inf if self.measured > 0 else 1.0


def trust(prediction: Prediction, joint: JointLoss, dense_loss: float | None = None) -> Trust:
    """Compare what was predicted for a distribution with what its layers give together.

    Parameters
    ----------
    prediction : Prediction
        Of the distribution, with divergences, or else losses.
    joint : JointLoss
        Measured for the same distribution, on the same images.
    dense_loss : float, optional
        The dense network's loss, which is subtracted where divergences are missing.

    Raises
    ------
    DistributionError
        If there is no kind that both have.
    """
    if prediction.kl is not None and "kl" in joint.values:
        kind, predicted, measured = "kl", prediction.kl, joint.values["kl"]
    elif prediction.loss is not None and "loss" in joint.values and dense_loss is not None:
        kind, predicted = "loss", max(0.0, prediction.loss - dense_loss)
        measured = max(0.0, joint.values["loss"] - dense_loss)
    else:
        raise DistributionError(
            "There is nothing to compare: measure the sensitivity (divergences or losses) of all layers first."
        )
    error = joint.std_errors.get(kind)
    slack = _ERRORS * (error or 0.0)
    verdict = "agrees"
    if measured - slack > _FACTOR * predicted:
        verdict = "worse"
    elif measured + slack < predicted / _FACTOR:
        verdict = "better"
    return Trust(kind, predicted, measured, error, verdict)
