"""An output counts as torch's when every sample is, in its own place; against differences that numpy computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explorer.bench.outputs import check_output
from explorer.errors import EngineError


@pytest.fixture
def expected() -> torch.Tensor:
    """Four samples of very different size."""
    torch.manual_seed(0)
    return torch.randn(4, 50) * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])


def test_the_difference_is_that_of_the_worst_sample_beside_its_own_largest_entry(
    expected: torch.Tensor,
) -> None:
    given = expected.clone()
    given[3, 7] += 0.5
    given[2, 8] -= 0.2
    right = expected.numpy()
    found = check_output("one", given, expected, n_samples=4)
    assert found == pytest.approx(0.2 / np.abs(right[2]).max(), rel=1e-4)
    assert check_output("one", given.numpy(), expected, n_samples=1) == pytest.approx(
        0.5 / np.abs(right).max(), rel=1e-4
    )


def test_a_small_sample_that_is_wrong_is_seen_beside_large_ones(expected: torch.Tensor) -> None:
    given = expected.clone()
    given[1] = 0
    assert float((given - expected).abs().max() / expected.abs().max()) < 0.03
    with pytest.raises(EngineError, match=r"relative difference 1, 0\.3 is accepted"):
        check_output("one", given, expected, accepted=0.3, n_samples=4)


def test_rounding_of_a_sample_that_is_all_but_zero_is_not_held_against_an_engine() -> None:
    expected = torch.stack([torch.zeros(50), torch.linspace(-1, 1, 50)])
    assert check_output("one", expected + 1e-7, expected, n_samples=2) == pytest.approx(1e-5, rel=1e-2)


def test_samples_in_each_other_s_place_are_seen_although_they_differ_less_than_is_accepted() -> None:
    torch.manual_seed(0)
    common = torch.randn(50)
    expected = common + 0.1 * torch.randn(3, 50)
    mixed = expected[[0, 2, 1]] + 0.02 * torch.randn(3, 50)
    assert float((mixed - expected).abs().max() / expected.abs().max()) < 0.3
    with pytest.raises(EngineError, match="that of sample 1 is nearer to torch's of sample 2"):
        check_output("one", mixed, expected, accepted=0.3, n_samples=3)
    for _ in range(20):  # rounding as large as what sets the samples apart
        rounded = expected + 0.1 * torch.randn(3, 50)
        check_output("one", rounded, expected, accepted=0.3, n_samples=3)


def test_samples_with_equal_outputs_are_not_mixed_up() -> None:
    expected = torch.ones(3, 4)
    assert check_output("one", expected + 1e-4, expected, n_samples=3) == pytest.approx(1e-4, rel=1e-2)


def test_another_shape_and_nan_are_refused() -> None:
    with pytest.raises(EngineError, match=r"its shape is \(2,\), \(3,\) is right"):
        check_output("one", torch.ones(2), torch.ones(3))
    with pytest.raises(EngineError, match="relative difference nan"):
        check_output("one", torch.full((2,), torch.nan), torch.ones(2))
