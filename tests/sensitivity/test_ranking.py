"""Which layer minds most, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from explorer.errors import DistributionError
from explorer.sensitivity import SensitivityPoint, SensitivityTable, published, ranking, stability


def table(values: dict[str, float], error: float | None, *, removed: int | None = 5) -> SensitivityTable:
    points = [SensitivityPoint(name, 0.0, "kl", 0.0) for name in values]
    points += [
        SensitivityPoint(name, 0.9, "kl", value, std_error=error, n_removed=removed)
        for name, value in values.items()
    ]
    return SensitivityTable.from_points(points)


def test_the_most_sensitive_layer_comes_first() -> None:
    ranked = ranking(table({"a": 0.1, "b": 0.5, "c": 0.3}, 1e-4))
    assert [one.layer for one in ranked] == ["b", "c", "a"]
    assert [one.value for one in ranked] == [0.5, 0.3, 0.1]
    assert [(one.lowest, one.highest) for one in ranked] == [(0, 0), (1, 1), (2, 2)]
    assert all(one.is_known for one in ranked)


def test_places_overlap_where_errors_do() -> None:
    """Two values that differ by a tenth of their error change places in 47 of 100 draws; a third stands apart."""
    ranked = ranking(table({"a": 1.00, "b": 1.01, "c": 9.0}, 0.1))
    places = {one.layer: (one.lowest, one.highest) for one in ranked}
    assert places == {"c": (0, 0), "a": (1, 2), "b": (1, 2)}


def test_without_errors_a_place_is_a_place() -> None:
    ranked = ranking(published("resnet50-imagenet"), 0.7, "accuracy")
    assert all(one.lowest == one.highest == place for place, one in enumerate(ranked))
    # The oracle: the published accuracies at 70 %, by numpy.
    raw = published("resnet50-imagenet")
    column = raw.levels("accuracy").index(0.7)
    lowest = np.minimum.accumulate(raw.values("accuracy"), axis=1)[:, column]
    dense = raw.values("accuracy")[:, 0]
    assert [one.layer for one in ranked][:3] == [raw.layers[i] for i in np.argsort(lowest - dense)[:3]]


def test_a_layer_from_which_nothing_was_removed_is_not_called_robust() -> None:
    points = [
        SensitivityPoint("pruned before", 0.9, "kl", 0.0, n_removed=0),
        SensitivityPoint("a", 0.9, "kl", 0.2, n_removed=3),
        SensitivityPoint("robust", 0.9, "kl", 0.0, n_removed=3),
    ]
    ranked = ranking(SensitivityTable.from_points(points))
    assert [one.layer for one in ranked] == ["a", "robust", "pruned before"]
    assert [one.is_known for one in ranked] == [True, True, False]


def test_levels_beyond_the_pruned_ones_are_known() -> None:
    points = [
        SensitivityPoint("a", 0.5, "kl", 0.0, n_removed=0),
        SensitivityPoint("a", 0.9, "kl", 0.4, n_removed=7),
    ]
    made = SensitivityTable.from_points(points)
    assert not ranking(made, 0.5)[0].is_known
    assert ranking(made, 0.9)[0].is_known


@pytest.mark.parametrize("kind", ["latency_ms", "kl", "speed"])
def test_what_was_not_measured_has_no_ranking(kind: str) -> None:
    made = SensitivityTable.from_points([SensitivityPoint("a", 0.5, "loss", 1.0)])
    with pytest.raises(DistributionError):
        ranking(made, 0.5, kind)


# ---- stability


def test_clear_differences_are_stable_on_any_images() -> None:
    found = stability(table({"a": 1.0, "b": 2.0, "c": 3.0}, 0.01))
    assert found.correlation == 1.0
    assert (found.is_stable, found.images_factor) == (True, 1)
    assert "stable on 500 images" in found.hint(500)


def test_noise_asks_for_as_many_images_as_it_takes() -> None:
    """The factor that is found makes it stable, and half of it does not."""
    values = {f"l{i}": float(i) for i in range(8)}
    found = stability(table(values, 1.5))
    assert not found.is_stable
    assert found.images_factor is not None
    assert stability(table(values, 1.5 / found.images_factor**0.5)).is_stable
    assert not stability(table(values, 1.5 / (found.images_factor / 2) ** 0.5)).is_stable
    assert f"{500 * found.images_factor:,}" in found.hint(500)


def test_the_correlation_is_spearmans() -> None:
    """Against scipy's definition by Pearson's correlation of ranks, over the same draws."""
    values, error = np.array([3.0, 2.0, 1.5, 0.2]), 0.8
    found = stability(table(dict(zip("abcd", values.tolist(), strict=True)), error))
    draws = values + error * np.random.default_rng(0).standard_normal((400, 4))
    ranks = [np.argsort(np.argsort(draw)) for draw in draws]
    own = np.argsort(np.argsort(values))
    assert found.correlation == pytest.approx(np.mean([np.corrcoef(own, rank)[0, 1] for rank in ranks]))


def test_layers_that_are_alike_need_no_order() -> None:
    found = stability(table({"a": 1.0, "b": 1.0, "c": 1.0}, 0.5))
    assert found.images_factor is None
    assert "does not matter" in found.hint(100)


def test_one_layer_and_unknown_errors_are_stable() -> None:
    assert stability(table({"a": 1.0}, 0.5)).is_stable
    assert stability(table({"a": 1.0, "b": 1.1}, None)).is_stable


# ---- break-even


def latencies(values: dict[float, float]) -> SensitivityTable:
    return SensitivityTable.from_points(
        [SensitivityPoint("a", s, "latency_ms", ms) for s, ms in values.items()]
    )


def test_break_even_is_where_the_sparse_line_meets_the_dense_time() -> None:
    """Dense 2 ms; sparse 5 (1 - s): they meet at 0.6, of which a fifth of a per cent of the slope is within the tolerance."""
    made = latencies({s: min(2.0, 5 * (1 - s)) for s in (0.0, 0.5, 0.8, 0.9, 0.95)})
    assert made.break_even("a", tolerance=0.0) == pytest.approx(0.6)
    assert made.break_even("a", tolerance=0.02) == pytest.approx(0.608)


def test_a_layer_that_never_gains_has_no_break_even() -> None:
    assert latencies({0.0: 2.0, 0.5: 2.0, 0.99: 1.97}).break_even("a") is None
    assert latencies({0.0: 2.0, 0.5: 2.3, 0.99: 2.1}).break_even("a") is None


def test_break_even_needs_the_dense_time() -> None:
    with pytest.raises(DistributionError, match="dense latency"):
        latencies({0.5: 2.0, 0.9: 1.0}).break_even("a")
    with pytest.raises(DistributionError, match="not been measured"):
        table({"a": 1.0}, None).break_even("a")
