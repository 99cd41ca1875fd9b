"""Predicted beside measured: agreement is a factor, and noise is no disagreement."""

from __future__ import annotations

import dataclasses
import math

import pytest

import explorer
from explorer.distribution import Prediction, trust
from explorer.errors import DistributionError
from explorer.sensitivity import JointLoss

PREDICTED = Prediction(
    kl=0.4,
    loss=1.4,
    accuracy=0.8,
    latency_ms=None,
    speedup=None,
    nnz=1,
    n_params=2,
    sparsity=0.5,
    size_bytes=8,
)


def joint(value: float, error: float | None = 0.01, kind: str = "kl") -> JointLoss:
    return JointLoss({kind: value}, {kind: error}, 1)


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [(0.4, "agrees"), (0.7, "agrees"), (0.21, "agrees"), (0.9, "worse"), (0.1, "better")],
)
def test_within_a_factor_of_two_they_agree(measured: float, verdict: str) -> None:
    found = trust(PREDICTED, joint(measured))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(measured / 0.4)


def test_noise_is_no_disagreement() -> None:
    assert trust(PREDICTED, joint(0.9, 0.06)).verdict == "agrees"
    assert trust(PREDICTED, joint(0.9, None)).verdict == "worse"


def test_losses_are_compared_as_increases() -> None:
    predicted = dataclasses.replace(PREDICTED, kl=None)
    found = trust(predicted, joint(2.2, kind="loss"), dense_loss=1.0)
    assert (found.kind, found.verdict) == ("loss", "worse")
    assert found.predicted == pytest.approx(0.4)
    assert found.measured == pytest.approx(1.2)


def test_where_nothing_was_predicted_the_ratio_says_so() -> None:
    nothing = dataclasses.replace(PREDICTED, kl=0.0)
    assert trust(nothing, joint(0.0)).ratio == 1.0
    assert trust(nothing, joint(0.1)).ratio == math.inf


def test_there_must_be_something_to_compare() -> None:
    with pytest.raises(DistributionError, match="measure the sensitivity"):
        trust(dataclasses.replace(PREDICTED, kl=None), joint(1.0, kind="loss"))


def test_the_demo_is_judged_on_its_own_data() -> None:
    study = explorer.Study("demo:fashion-resnet", "demo:fashion")
    study.measure_sensitivity(levels=[0.5, 0.9], n_images=125, refresh_batchnorm=False, latency=False)
    mild, severe = study.uniform(0.5), study.uniform(0.9)
    found = study.trust(mild, n_images=125)
    assert found is not None
    assert found.predicted == pytest.approx(study.predict(mild).kl)
    harsh = study.trust(severe, n_images=125)
    assert harsh is not None
    assert harsh.measured > found.measured
