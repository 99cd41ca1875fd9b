"""Nonzeros put where the sparse kernel reads them, in native code: where the numpy twin puts them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.inference import native
from explorer.inference.kernels import place_entries
from explorer.inference.sparse_rows import SparseWeights, run_kernel
from tests.inference.test_kernels import ISAS, runnable


@pytest.mark.parametrize("isa", [*filter(runnable, ISAS)])
@given(
    rows=st.integers(0, 20),
    columns=st.sampled_from([1, 7, 200]),
    n_blocks=st.integers(1, 5),
    ascending=st.booleans(),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    channels=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_entries_come_to_the_places_of_the_numpy_twin(
    isa: str,
    rows: int,
    columns: int,
    n_blocks: int,
    ascending: bool,
    density: float,
    channels: int,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows * channels, columns)).astype(np.float32)
    weight[generator.random(weight.shape) >= density] = 0
    block = generator.integers(0, n_blocks, columns)
    block = np.sort(block) if ascending else block
    where = generator.integers(0, 2**31 - 1, columns).astype(np.int32)
    host = native.host_isa(isa)
    weights = SparseWeights.of(weight, host, channels=channels)
    words = weights.values.view(np.int32)
    cell = np.repeat(np.arange(rows), np.diff(weights.starts)) * n_blocks + block[weights.columns]

    # Cells lie in any order, and with room between them.
    n_cells = rows * n_blocks
    count = np.bincount(cell, minlength=n_cells)
    order = generator.permutation(n_cells)
    begins = np.zeros(n_cells, np.int64)
    begins[order] = np.cumsum(count[order] + 1) - count[order] - 1
    places, counted = place_entries.reference(cell, begins)

    tables = {"starts": weights.starts, "columns": weights.columns, "block": block}
    numbers = {"rows": rows, "n_blocks": n_blocks}
    found = np.zeros(n_cells, np.int64)
    counting = place_entries.PlaceEntriesKernel("count")
    run_kernel(counting, place_entries.ARGUMENTS, host, {**tables, "next": found}, **numbers)
    np.testing.assert_array_equal(found, counted)

    room = len(cell) + n_cells
    following, last = begins.copy(), np.full(n_cells, -1)
    offsets, filled = np.full(room, -1, np.int32), np.full((room, channels), -1, np.int32)
    results = {"next": following, "last": last, "offsets": offsets, "filled": filled}
    placing = place_entries.PlaceEntriesKernel("place", channels)
    run_kernel(
        placing,
        place_entries.ARGUMENTS,
        host,
        {**tables, "words": words, "where": where, **results},
        **numbers,
    )
    np.testing.assert_array_equal(following, begins + count)
    wanted_offsets, wanted_words = np.full_like(offsets, -1), np.full_like(filled, -1)
    wanted_offsets[places], wanted_words[places] = where[weights.columns], words
    np.testing.assert_array_equal(offsets, wanted_offsets)
    np.testing.assert_array_equal(filled, wanted_words)
    wanted_last = np.full(n_cells, -1)
    wanted_last[cell] = np.arange(len(cell))  # of several, numpy keeps the last
    np.testing.assert_array_equal(last, wanted_last)
