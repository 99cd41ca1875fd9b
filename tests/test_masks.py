"""Masks against an independent numpy oracle: a stable argsort of the magnitudes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from explorer.errors import DistributionError, ModelError
from explorer.masks import keep_mask, magnitude_mask, n_zeros, pair_mask

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6),
    # Few distinct values, so that ties and existing zeros are the rule and not the exception.
    elements=st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 2.0]),
)
SPARSITY = st.floats(0.0, 1.0, exclude_max=True)


def oracle(weight: np.ndarray, zeros: int) -> np.ndarray:
    keep = np.ones(weight.size, dtype=bool)
    keep[np.argsort(np.abs(weight).reshape(-1), kind="stable")[:zeros]] = False
    return keep.reshape(weight.shape)


@settings(max_examples=200, deadline=None)
@given(WEIGHTS, SPARSITY)
def test_mask_equals_a_stable_argsort_of_the_magnitudes(weight: np.ndarray, sparsity: float) -> None:
    got = magnitude_mask(torch.from_numpy(weight), sparsity).numpy()
    np.testing.assert_array_equal(got, oracle(weight, n_zeros(weight.size, sparsity)))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**7), SPARSITY)
def test_count_is_never_short_and_never_the_whole_layer(numel: int, sparsity: float) -> None:
    zeros = n_zeros(numel, sparsity)
    assert 0 <= zeros <= numel - 1
    exact = Fraction(sparsity) * numel
    assert zeros >= min(numel - 1, exact - Fraction(1, 10**8))
    assert zeros < exact + 1


@pytest.mark.parametrize(
    ("numel", "percent"), [(100, 7), (1000, 29), (300, 57), (25_600, 98), (2_359_296, 90)]
)
def test_a_percentage_that_divides_the_layer_is_met_exactly(numel: int, percent: int) -> None:
    assert n_zeros(numel, percent / 100) == math.ceil(Fraction(numel * percent, 100))


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, SPARSITY, SPARSITY)
def test_masks_are_nested_and_a_second_pruning_changes_nothing(
    weight: np.ndarray, a: float, b: float
) -> None:
    low, high = sorted((a, b))
    tensor = torch.from_numpy(weight)
    mask_low, mask_high = magnitude_mask(tensor, low), magnitude_mask(tensor, high)
    assert not bool((mask_high & ~mask_low).any())
    pruned = tensor * mask_high
    assert torch.equal(pruned * magnitude_mask(pruned, low), pruned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_the_same_count(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = magnitude_mask(weight, 0.9)
    assert int((~mask).sum()) == n_zeros(37 * 11, 0.9)
    np.testing.assert_array_equal(mask.numpy(), oracle(weight.double().numpy(), n_zeros(37 * 11, 0.9)))


def test_infinite_weights_are_kept_to_the_last() -> None:
    weight = torch.tensor([float("inf"), 1.0, -float("inf"), 2.0])
    assert magnitude_mask(weight, 0.5).tolist() == [True, False, True, False]


def test_everything_may_be_removed_only_when_asked_by_count() -> None:
    assert not bool(keep_mask(torch.arange(4.0), 4).any())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 90.0, float("nan")])
def test_sparsity_out_of_range_is_refused_with_the_value(sparsity: float) -> None:
    with pytest.raises(DistributionError, match=r"\[0, 1\)"):
        magnitude_mask(torch.ones(4), sparsity)


def test_bad_counts_and_empty_layers_are_refused() -> None:
    with pytest.raises(DistributionError, match="Cannot remove 5 of 4"):
        keep_mask(torch.ones(4), 5)
    with pytest.raises(DistributionError, match="numel=0"):
        n_zeros(0, 0.5)


def test_nan_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="NaN"):
        magnitude_mask(torch.tensor([1.0, float("nan")]), 0.5)


@given(
    channels=st.integers(1, 12).map(lambda n: 2 * n),
    inputs=st.integers(1, 9),
    sparsity=st.floats(0, 0.999),
    seed=st.integers(0, 99),
)
def test_a_mask_of_pairs_keeps_the_pairs_with_the_largest_squares(
    channels: int, inputs: int, sparsity: float, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((channels, inputs, 1, 2)).astype(np.float32)
    mask = pair_mask(torch.from_numpy(weight), sparsity).numpy()
    assert mask.shape == weight.shape
    np.testing.assert_array_equal(mask[::2], mask[1::2])
    zeros, asked = int((~mask).sum()), n_zeros(weight.size, sparsity)
    assert asked <= zeros <= asked + 1 or (zeros == weight.size - 2 and asked == weight.size - 1)
    squares = (weight[::2].astype(np.float64) ** 2 + weight[1::2].astype(np.float64) ** 2).reshape(-1)
    kept = mask[::2].reshape(-1)
    if not kept.all():
        assert squares[kept].min() >= squares[~kept].max() * (1 - 1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (), (0, 3), (1, 2, 3, 3)])
def test_a_layer_without_pairs_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DistributionError, match="pairs of output channels"):
        pair_mask(torch.ones(shape), 0.5)
