"""Baselines against the formulas of their papers, by plain numpy, and against what all of them promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from explorer.distribution import erk, global_magnitude, inverse_sensitivity, lamp
from explorer.errors import DistributionError, InfeasibleTarget
from explorer.models import prunable_layers
from explorer.sensitivity import SensitivityPoint, SensitivityTable


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 32), nn.Linear(32, 10)
    )  # fmt: skip
    with torch.no_grad():
        for i, factor in ((1, 3.0), (2, 0.5), (4, 10.0)):
            net[i].weight.mul_(factor)
    return net


NET = network()
LAYERS = prunable_layers(NET, torch.zeros(1, 3, 8, 8))
SIZES = {layer.name: layer.n_params for layer in LAYERS}
TOTAL = sum(SIZES.values())
WEIGHTS = {layer.name: NET.get_submodule(layer.name).weight.detach().double().numpy() for layer in LAYERS}


def table() -> SensitivityTable:
    rates = {"0": 9.0, "1": 3.0, "2": 1.0, "4": 0.2, "5": 5.0}
    return SensitivityTable.from_points(
        SensitivityPoint(name, s, "kl", rate * s**3)
        for name, rate in rates.items()
        for s in np.linspace(0, 0.99, 34)
    )


BASELINES = {
    "erk": lambda s, **options: erk(LAYERS, s, **options),
    "global": lambda s, **options: global_magnitude(NET, LAYERS, s, **options),
    "lamp": lambda s, **options: lamp(NET, LAYERS, s, **options),
    "inverse": lambda s, **options: inverse_sensitivity(LAYERS, table(), s, **options),
}


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=30, deadline=None)
@given(sparsity=st.floats(0.0, 0.95), ends=st.booleans(), lock=st.booleans())
def test_the_total_is_reached_in_exact_counts_and_never_short(
    name: str, sparsity: float, ends: bool, lock: bool
) -> None:
    locked = {"2": 0.25} if lock else None
    try:
        found = BASELINES[name](sparsity, dense_first_last=ends, locked=locked)
    except InfeasibleTarget:
        free = [n for n in SIZES if not (ends and n in ("0", "5")) and not (lock and n == "2")]
        # The curves of inverse_sensitivity end at 0.99.
        assert sum(0.985 * SIZES[n] for n in free) + (64 if lock else 0) < sparsity * TOTAL
        return
    zeros = found.zeros(LAYERS)
    extra = sum(zeros.values()) - sparsity * TOTAL
    assert -1e-6 * TOTAL <= extra <= (len(LAYERS) + 1 if not lock or sparsity > 0.02 else 70)
    assert all(zeros[layer] < size for layer, size in SIZES.items())
    if ends:
        assert found["0"] == found["5"] == 0.0
    if lock:
        assert found["2"] == 0.25
        assert found.locked == {"2"}


def test_erk_keeps_densities_in_the_proportion_of_its_formula() -> None:
    found = erk(LAYERS, 0.9, dense_first_last=False)
    formula = {"0": 17 / 216, "1": 30 / 1152, "2": 34 / 256, "4": 288 / 8192, "5": 42 / 320}
    scaled = {name: (1 - found[name]) / value for name, value in formula.items() if found[name] > 0}
    assert len(scaled) >= 3
    assert max(scaled.values()) == pytest.approx(min(scaled.values()), rel=1e-6)
    factor = min(scaled.values())
    assert all(factor * formula[name] >= 1 for name in formula if found[name] == 0.0), (
        "more than dense is dense"
    )


def test_global_magnitude_is_one_threshold() -> None:
    net = network()
    with torch.no_grad():
        for i, scale in ((0, 1.0), (1, 0.5), (2, 2.0), (4, 0.7), (5, 1.5)):  # no layer is emptied
            net[i].weight.normal_(0, scale)
    weights = {name: net.get_submodule(name).weight.detach().double().numpy() for name in SIZES}
    every = np.sort(np.concatenate([np.abs(w).ravel() for w in weights.values()]))
    threshold = every[int(np.ceil(0.8 * TOTAL - 1e-9)) - 1]
    zeros = global_magnitude(net, LAYERS, 0.8, dense_first_last=False).zeros(LAYERS)
    assert zeros == {name: int((np.abs(w) <= threshold).sum()) for name, w in weights.items()}


def lamp_by_definition(weight: np.ndarray) -> np.ndarray:
    squares = weight.ravel() ** 2
    return np.array([u / squares[squares >= u].sum() for u in squares])


def test_lamp_is_one_threshold_of_its_scores() -> None:
    scores = {name: lamp_by_definition(w) for name, w in WEIGHTS.items()}
    assert all(each.max() == 1.0 for each in scores.values())
    every = np.sort(np.concatenate(list(scores.values())))
    threshold = every[int(np.ceil(0.9 * TOTAL - 1e-9)) - 1]
    found = lamp(NET, LAYERS, 0.9, dense_first_last=False)
    assert found.zeros(LAYERS) == {name: int((each <= threshold).sum()) for name, each in scores.items()}


def test_lamp_does_not_care_for_the_scale_of_a_layer_and_global_does() -> None:
    other = network()
    with torch.no_grad():
        other[2].weight.mul_(100)
    assert lamp(other, LAYERS, 0.8) == lamp(NET, LAYERS, 0.8)
    assert global_magnitude(other, LAYERS, 0.8)["2"] < global_magnitude(NET, LAYERS, 0.8)["2"]


def test_inverse_sensitivity_makes_every_layer_do_equal_harm() -> None:
    found = inverse_sensitivity(LAYERS, table(), 0.6, dense_first_last=False)
    harms = {name: table().value(name, s, "kl") for name, s in found.items() if s < 0.99}
    assert len(harms) >= 3
    assert max(harms.values()) == pytest.approx(min(harms.values()), rel=1e-3)
    assert found["0"] < found["1"] < found["2"], "who minds most is spared most"


def test_a_layer_of_zeros_is_no_trouble() -> None:
    other = network()
    with torch.no_grad():
        other[2].weight.zero_()
    for found in (lamp(other, LAYERS, 0.5), global_magnitude(other, LAYERS, 0.5)):
        assert found.zeros(LAYERS)["2"] == 255


def test_requests_that_make_no_sense() -> None:
    for baseline in BASELINES.values():
        with pytest.raises(DistributionError, match="fraction of zeros"):
            baseline(1.0)
        with pytest.raises(DistributionError, match="No layer '9'"):
            baseline(0.5, locked={"9": 0.5})
        with pytest.raises(InfeasibleTarget, match="at most 0"):
            baseline(0.999)
    with pytest.raises(DistributionError, match="equal harm"):
        inverse_sensitivity(LAYERS, table(), 0.5, kind="accuracy")
    with pytest.raises(DistributionError, match="not been measured"):
        inverse_sensitivity(LAYERS, table(), 0.5, kind="loss")
