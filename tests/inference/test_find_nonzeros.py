"""The nonzeros of a matrix, found in native code: what the numpy twin finds, whatever a weight is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.inference import native
from explorer.inference.kernels import find_nonzeros
from explorer.inference.sparse_rows import SparseWeights
from tests.inference.test_kernels import ISAS, runnable

ODD = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38], np.float32)
"""Of these, two are zeros. The last overflows with most gains."""


@pytest.mark.parametrize("isa", [*filter(runnable, ISAS)])
@given(
    rows=st.integers(0, 20),
    columns=st.sampled_from([0, 1, 7, 64, 1000]),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    channels=st.sampled_from([1, 2, 3]),
    gained=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_nonzeros_are_those_of_the_numpy_twin(
    isa: str, rows: int, columns: int, density: float, channels: int, gained: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows * channels, columns)).astype(np.float32)
    weight[generator.random(weight.shape) >= density] = 0
    odd = generator.random(weight.shape) < 0.1
    weight[odd] = generator.choice(ODD, np.count_nonzero(odd))
    gain = generator.standard_normal(len(weight)) if gained else None
    found = SparseWeights.of(weight, native.host_isa(isa), gain, channels)
    with np.errstate(over="ignore"):
        ends, places, values = find_nonzeros.reference(weight, gain, channels)
    assert found.shape == (rows, columns)
    np.testing.assert_array_equal(found.starts, [0, *ends])
    np.testing.assert_array_equal(found.columns, places)
    np.testing.assert_array_equal(found.values, values)
