from __future__ import annotations

import pytest

from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityPoint, SensitivityTable, summary


def table() -> SensitivityTable:
    def kl(layer: str, sparsity: float, value: float, n_removed: int) -> SensitivityPoint:
        return SensitivityPoint(layer, sparsity, "kl", value, False, 0.1, n_removed, value - 0.1, value + 0.2)

    points = [
        kl("stem", 0.0, 0.0, 0), kl("stem", 0.9, 2.0, 90), kl("big", 0.0, 0.0, 0), kl("big", 0.9, 1.0, 900),
        kl("sparse", 0.0, 0.0, 0), kl("sparse", 0.9, 0.0, 0),
        *(SensitivityPoint("big", s, "latency_ms", ms) for s, ms in ((0.0, 4.0), (0.5, 4.0), (0.9, 1.0), (0.95, 0.625))),
    ]  # fmt: skip
    return SensitivityTable.from_points(points)


def test_a_summary_says_what_the_table_knows_of_each_layer() -> None:
    stem, big, sparse = summary(table())
    assert (stem.layer, stem.value, stem.low, stem.high, stem.place) == ("stem", 2.0, 1.9, 2.2, (1, 1))
    assert (big.value, big.place, big.dense_ms, big.pruned_ms) == (1.0, (2, 2), 4.0, 1.0)
    assert big.break_even == table().break_even("big")
    assert (sparse.value, sparse.place, sparse.dense_ms) == (None, None, None), "it was that sparse already"
    assert summary(table())[1:] == (big, sparse)


def test_it_prints_as_aligned_text() -> None:
    lines = str(table().summary(0.9)).splitlines()
    assert lines[0].split() == [
        "layer",
        "kl",
        "95",
        "%",
        "band",
        "place",
        "dense",
        "ms",
        "at",
        "0.9",
        "faster",
        "from",
    ]
    assert lines[1].split() == ["stem", "2", "1.9", "to", "2.2", "1"]
    assert lines[2].split()[-3:] == ["4", "1", "51%"]
    assert lines[3].split() == ["sparse", "unknown"]


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(DistributionError, match="fraction of zeros"):
        summary(table(), 90)
    with pytest.raises(DistributionError, match="measure the sensitivity first"):
        summary(SensitivityTable.from_points([]))
