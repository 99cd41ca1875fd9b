"""The nonzeros of a matrix, found in native code: what the numpy twin finds, whatever a weight is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.errors import EngineError
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


@pytest.mark.parametrize("isa", [*filter(runnable, ISAS)])
@pytest.mark.parametrize("counted", [0, 1, 150, 15_000])
def test_weights_that_change_while_they_are_read_are_an_error_and_nothing_is_written_beyond(
    isa: str, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.ones((200, 100), np.float32)
    space, empty = counted + weight.shape[1] + 1, np.empty
    kept = []

    def guarded(shape: int | tuple[int, ...], dtype: type) -> np.ndarray:
        whole = empty(100_000, dtype)
        whole[:] = 7
        kept.append(whole)
        return whole[:space].reshape(shape)

    # As if most of them had been zero when they were counted.
    monkeypatch.setattr(np, "count_nonzero", lambda _: counted)
    monkeypatch.setattr(np, "empty", guarded)
    with pytest.raises(EngineError, match="changed while they were read"):
        SparseWeights.of(weight, native.host_isa(isa))
    assert len(kept) == 2
    assert all((whole[space:] == 7).all() for whole in kept)
