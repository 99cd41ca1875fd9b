"""Means, errors and bands against numpy, and bands against what fresh images really give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explorer.sensitivity.estimates import MIN_DRAWN, Resampler


def test_mean_and_error_are_numpys() -> None:
    values = np.random.default_rng(0).gamma(0.5, size=200)
    found = Resampler().estimate(torch.from_numpy(values))
    assert found.value == pytest.approx(values.mean())
    assert found.std_error == pytest.approx(values.std(ddof=1) / np.sqrt(200))


def test_the_band_is_a_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(0.3, size=300)
    rng = np.random.default_rng(1)
    means = values[rng.integers(300, size=(20_000, 300))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    found = Resampler().estimate(torch.from_numpy(values))
    width = high - low
    assert found.low == pytest.approx(low, abs=0.1 * width)
    assert found.high == pytest.approx(high, abs=0.1 * width)
    assert found.high - found.value > found.value - found.low, "a long tail makes the band lopsided"


def test_the_band_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    resampler = Resampler()
    inside = 0
    for _ in range(300):
        found = resampler.estimate(torch.from_numpy(rng.exponential(size=250)))
        inside += found.low <= 1.0 <= found.high
    assert 0.90 <= inside / 300 <= 0.985


def test_weights_count_as_repetitions() -> None:
    values = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.1, 3.0, 2.5, 0.7], dtype=torch.float64)
    sizes = torch.tensor([2.0, 1.0, 3.0, 1.0, 2.0, 2.0, 1.0, 4.0], dtype=torch.float64)
    found = Resampler().estimate(values, sizes)
    assert found.value == pytest.approx(np.average(values.numpy(), weights=sizes.numpy()))
    assert found.low < found.value < found.high


def test_a_few_values_have_no_band() -> None:
    found = Resampler().estimate(torch.ones(MIN_DRAWN - 1, dtype=torch.float64))
    assert (found.value, found.std_error, found.low, found.high) == (1.0, None, None, None)


def test_the_same_images_give_the_same_band() -> None:
    values = torch.rand(50, dtype=torch.float64)
    assert Resampler().estimate(values) == Resampler().estimate(values)
